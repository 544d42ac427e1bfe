"""Articles in, root contexts with their quota out."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from augcon.data import Article, RootContext
from augcon.errors import UserError
from augcon.method.contexts import SHORT, split_article, split_corpus
from augcon.run.corpus import Corpus
from augcon.run.inputs import names_in
from augcon.run.rows import Unreadable, read_column, text_of
from augcon.text import units as text

FREE = Path(__file__).parents[2] / "shared" / "data" / "corpus_zh_free.jsonl"
ROWS = datasets.Dataset.from_dict({"article": ["甲。", "B."], "title": ["一", "two"]})

NASTY = st.text(
    st.sampled_from("字字字，。？！；…“”」)\"'.!? \n\t\u3000aAeg1ไที่ខ្។—é👩\r\x00\u2028\ufeff\ud800\u200b"), max_size=300
)
LONG = st.lists(st.tuples(NASTY, st.integers(1, 40)), max_size=4).map(lambda runs: "".join(run * n for run, n in runs))


def contexts_of(*rows: object, max_length: int = 500, quota_unit: int = 35) -> tuple[list[RootContext], Counter[str]]:
    texts = list(map(text_of, rows))
    articles = [Article(number, text) for number, text in enumerate(texts) if isinstance(text, str)]
    skipped = Counter(text.reason for text in texts if isinstance(text, Unreadable))
    return list(split_corpus(articles, max_length, quota_unit)), skipped


# Splitting


@settings(deadline=None, max_examples=200)
@given(st.lists(LONG, max_size=3), st.integers(20, 200), st.integers(1, 50))
def test_contexts_give_back_the_articles_and_keep_their_bounds(articles, max_length, quota_unit):
    roots, skipped = contexts_of(*articles, max_length=max_length, quota_unit=quota_unit)
    assert [root.root for root in roots] == list(range(len(roots)))
    by_article = {n: list(group) for n, group in itertools.groupby(roots, lambda root: root.article)}
    assert list(by_article) == [n for n, article in enumerate(articles) if text.clean(article).strip()]
    assert skipped.total() == len(articles) - len(by_article)
    for number, group in by_article.items():
        article = text.clean(articles[number])
        assert "".join(root.text for root in group) == article
        for root in group:
            assert article[root.start : root.end] == root.text
            assert root.text.strip()
            assert root.length == text.length(root.text) <= max_length
            assert root.quota == max(1, math.ceil(root.length / quota_unit))


SENTENCES = st.lists(
    st.tuples(st.integers(2, 40), st.sampled_from(["。", "。\n", "？”", "……\n\n", ". ", ".\n"])),
    min_size=1,
    max_size=80,
).map(lambda parts: "".join("字" * size + end for size, end in parts))


@settings(deadline=None)
@given(SENTENCES, st.integers(100, 500))
def test_no_context_is_short_where_it_can_be_avoided(article, max_length):
    contexts = split_article(article, max_length)
    if text.length(article) > 60:
        assert min(map(text.length, contexts)) >= SHORT


@settings(deadline=None)
@given(SENTENCES, st.integers(100, 500))
def test_cuts_fall_at_sentence_ends(article, max_length):
    ends = set(itertools.accumulate(map(len, text.sentences(article))))
    assert set(itertools.accumulate(map(len, split_article(article, max_length)))) <= ends


def test_cuts_fall_at_paragraph_ends_where_they_can():
    paragraphs = [f"{'字' * 99}。{'字' * 149}。\n" for _ in range(8)]
    assert split_article("".join(paragraphs), 510) == ["".join(paragraphs[n : n + 2]) for n in range(0, 8, 2)]
    paragraphs = [f"{'字' * 99}。{'字' * 199}。\n" for _ in range(4)]
    assert split_article("".join(paragraphs), 510) == paragraphs


def test_closing_quotes_stay_with_their_sentence():
    article = ("“" + "字" * 47 + "。”") * 6
    assert all(context.endswith("。”") for context in split_article(article, 110))


def test_english_is_split_at_sentences_not_at_abbreviations():
    sentence = "Dr. Smith of No. 5 paid 3.50 for e.g. bread. "
    contexts = split_article(sentence * 30, 60)
    assert len(contexts) == 5 and all(context.endswith("bread. ") for context in contexts)


def test_a_short_tail_joins_its_neighbours():
    contexts = split_article("字" * 249 + "。" + "字" * 249 + "。\n短尾。", 500)
    assert list(map(len, contexts)) == [250, 254]


@pytest.mark.parametrize("size", [501, 999, 1000, 1001, 1490, 4990, 20_000])
@pytest.mark.parametrize("unit", ["字", "word ", "字\u3000", "a字"], ids=["Chinese", "English", "spaces", "mixed"])
def test_one_endless_sentence_is_cut_into_as_few_parts_as_can_be(unit, size):
    article = unit * (size // text.length(unit))
    contexts = split_article(article, 500)
    assert "".join(contexts) == article
    assert len(contexts) == math.ceil(text.length(article) / 500)
    assert min(map(text.length, contexts)) >= 200


def test_words_are_not_cut():
    contexts = split_article("incomprehensibilities and internationalization " * 300, 100)
    assert {word for context in contexts for word in context.split()} == {
        "incomprehensibilities",
        "and",
        "internationalization",
    }


THAI = "ร้านขนมปังในหมู่บ้านเปิดตั้งแต่ตีห้าเพราะคนงานต้องกินข้าวเช้าก่อนไปทำงาน"
KHMER = "ហាងនំប៉័ងក្នុងភូមិបើកតាំងពីព្រលឹម ព្រោះកម្មករត្រូវញ៉ាំមុនទៅធ្វើការ"


@pytest.mark.parametrize("end", [" ", "", "។", "။"])
@pytest.mark.parametrize("sentence", [THAI, KHMER], ids=["Thai", "Khmer"])
def test_scripts_without_spaces_are_cut_too(sentence, end):
    article = ((sentence + end) * 40)[:2000].strip()
    contexts = split_article(article, 100)
    assert "".join(contexts) == article and 4 <= len(contexts) <= 8
    assert all(SHORT <= text.length(context) <= 100 for context in contexts)
    if end.strip() or (end and sentence == THAI):
        assert all(context.endswith(end) for context in contexts[:-1])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["字", "word ", "a", "字。", "字\n", "e.g. ", "\u3000字", "👩\u200d👧", "ไทยที่", "ไทย "]
)
def test_half_a_million_characters_in_one_line_are_split(unit):
    article = (unit * 500_000)[:500_000].strip()
    contexts = split_article(article, 500)
    assert "".join(contexts) == article
    assert min(map(len, contexts)) >= SHORT and max(map(text.length, contexts)) <= 500


@pytest.mark.parametrize(("length", "quota"), [(1, 1), (35, 1), (36, 2), (70, 2), (71, 3), (500, 15)])
def test_quota_is_a_pair_for_each_35_rounded_up(length, quota):
    (root,), _ = contexts_of("字" * length)
    assert (root.length, root.quota) == (length, quota)


def test_skipped_rows_are_counted_by_reason_and_keep_their_numbers():
    roots, skipped = contexts_of(None, "甲。", "", " \u3000\n\x00\ufeff", 3, ["a"], b"b", "乙。")
    assert [(root.root, root.article, root.text) for root in roots] == [(0, 1, "甲。"), (1, 7, "乙。")]
    assert skipped == {"no text in the field": 1, "empty": 2, "not a text": 3}


def test_a_root_context_cannot_be_changed():
    (root,), _ = contexts_of("甲。")
    with pytest.raises(dataclasses.FrozenInstanceError):
        root.text = "乙"


@pytest.mark.skipif(not FREE.exists(), reason="the free corpus is not beside the project")
def test_the_free_corpus_is_split_evenly():
    articles = list(read_column(str(FREE), "article"))
    roots, skipped = contexts_of(*articles)
    assert not skipped
    assert "".join(root.text for root in roots) == "".join(map(text.clean, articles))
    assert max(root.length for root in roots) <= 500
    long = [root for root in roots if text.length(articles[root.article]) > 60]
    assert min(root.length for root in long) >= SHORT
    assert sum(root.length > 250 for root in long) > 0.9 * len(long)


# Reading


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What is read of a file with this name and content."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def read(name: str, content: str | bytes, field: str = "article") -> list[object]:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_column(str(tmp_path / name), field))

    return read


def corpus_of(*sources: object, field: str = "article", limit: int = 0, alike: float = 0.8) -> tuple[Corpus, list]:
    """What is read of some sources: the corpus, for what was skipped, and the articles."""
    corpus = Corpus(map(str, sources), field, "title", limit, alike)
    return corpus, list(corpus.articles())


def refusal(source: object, field: str = "article") -> str:
    """The one line that is said of a corpus that cannot be had."""
    with pytest.raises(UserError) as error:
        corpus_of(source, field=field)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


def test_a_saved_dataset_is_read(tmp_path):
    ROWS.save_to_disk(tmp_path / "saved")
    assert list(read_column(str(tmp_path / "saved"), "article")) == ["甲。", "B."]
    assert list(read_column(str(tmp_path / "saved"), "title")) == ["一", "two"]


@pytest.mark.parametrize("splits", [["train"], ["test", "train"], ["odd"]])
def test_of_a_saved_dict_train_or_the_only_split_is_read(tmp_path, splits):
    wanted = "train" if "train" in splits else splits[0]
    others = ROWS.select([0])
    datasets.DatasetDict({name: ROWS if name == wanted else others for name in splits}).save_to_disk(tmp_path / "saved")
    assert list(read_column(str(tmp_path / "saved"), "article")) == ["甲。", "B."]


def test_a_saved_dict_of_several_splits_without_train_is_refused(tmp_path):
    datasets.DatasetDict(test=ROWS, dev=ROWS).save_to_disk(tmp_path / "saved")
    assert "'train'" in (said := refusal(tmp_path / "saved")) and "test, dev" in said


def test_the_sample_corpus_is_read():
    articles = list(read_column(str(Path(__file__).parents[1] / "DailyM"), "article"))
    assert articles and all(isinstance(article, str) for article in articles)


def test_the_sample_corpus_is_found_from_anywhere_that_has_none_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_in("DailyM") == [str(Path(__file__).parents[1] / "DailyM")]
    (tmp_path / "DailyM").mkdir()
    (tmp_path / "DailyM" / "mine.txt").write_text("甲。", "utf-8")
    assert [article.text for article in corpus_of(*names_in("DailyM"))[1]] == ["甲。"]


def test_json_lines_are_read_whatever_some_lines_are(read):
    lines = [
        b'\xef\xbb\xbf{"article": "first", "title": 1}\r',
        b"",
        b"  \r",
        b"{broken",
        b'["not", "a", "row"]',
        b"3",
        b'{"title": "no article"}',
        b'{"article": null}',
        b'{"article": 3}',
        b'{"article": "lone \\ud800 surrogate"}',
        b'{"article": "not UTF-8 \xff"}',
        b"[" * 100_000,
        '{"article": "末行\u2028里"}'.encode(),
    ]
    rows = read("corpus.jsonl", b"\n".join(lines))
    roots, skipped = contexts_of(*rows)
    assert [root.text for root in roots] == ["first", "lone  surrogate", "末行\n里"]
    without = {"line without fields": 2, "no text in the field": 2, "not a text": 1}
    assert skipped == {"broken line": 2, "not in UTF-8": 1, **without}


def test_json_lines_may_end_in_cr_alone(read):
    assert read("corpus.jsonl", b'{"article": "A."}\r{"article": "B."}\r') == ["A.", "B."]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *(
            ('{"article": "甲。"}\n{"article": "乙。"}\n'.encode(of), "not in UTF-8")
            for of in ("gbk", "utf-16", "utf-16-le")
        ),
        (b" \n\n", "no rows"),
        (b"{a\n{b\n[1]\n", "broken line"),
        (b"[1]\n[2]\n", "line without fields"),
    ],
)
def test_why_no_line_of_json_lines_can_be_read_is_said(read, content, reason):
    with pytest.raises(UserError, match=reason):
        read("corpus.jsonl", content)


def test_json_is_read(read):
    rows = [{"article": "甲\n乙"}, {"article": None}, {"title": "x"}, {"article": "lone \ud800 surrogate"}]
    roots, skipped = contexts_of(*read("corpus.json", json.dumps(rows)))
    assert [root.text for root in roots] == ["甲\n乙", "lone  surrogate"]
    assert skipped == {"no text in the field": 2}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.csv", 'title,article\r\n1,"甲, ""乙""\n丙"\r\n2,B\r\n3,\r\n'),
        ("bom.CSV", '\ufefftitle,article\n1,"甲, ""乙""\n丙"\n2,B\n3,\n'),
        ("corpus.tsv", 'title\tarticle\n1\t"甲, ""乙""\n丙"\n2\tB\n3\t\n'),
    ],
)
def test_tables_are_read(read, name, content):
    assert read(name, content) == ['甲, "乙"\n丙', "B", None]


def test_parquet_is_read(read, tmp_path):
    ROWS.to_parquet(tmp_path / "rows")
    assert read("corpus.parquet", (tmp_path / "rows").read_bytes()) == ["甲。", "B."]


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.MD"])
def test_one_text_file_is_one_article(tmp_path, name):
    (tmp_path / name).write_text("\ufeff# 标题\n甲。", "utf-8")
    assert [article.text for article in corpus_of(tmp_path / name)[1]] == ["# 标题\n甲。"]


def test_a_folder_is_read_in_order_and_what_is_not_read_is_listed(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "a.txt").write_text("甲", "utf-8")
    (tmp_path / "b.txt").write_bytes("乙".encode("gb18030"))
    (tmp_path / "c.txt").symlink_to("nowhere")
    (tmp_path / "d.png").write_text("a picture", "utf-8")
    (tmp_path / ".hidden.txt").write_text("not meant", "utf-8")
    (tmp_path / "deep" / "er" / "e.md").write_text("丙", "utf-8")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "settings.json").write_text('[{"a": 1}]')
    corpus, articles = corpus_of(tmp_path)
    name = tmp_path.name
    assert [(article.number, article.file, article.text) for article in articles] == [
        (0, f"{name}/a.txt", "甲"),
        (3, f"{name}/deep/er/e.md", "丙"),
    ]
    assert {(skipped.file, skipped.reason) for skipped in corpus.skipped} == {
        (f"{name}/b.txt", "not in UTF-8"),
        (f"{name}/c.txt", "cannot be read"),
        (f"{name}/d.png", "files of this kind are not read"),
        (f"{name}/settings.json", "no articles in it"),
    }


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.txt", "a.md", "a.x"]
)
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    assert name in (said := refusal(tmp_path / name)) and "empty" in said


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.jsonl", "a.ndjson"])
def test_a_file_of_rubbish_is_refused(tmp_path, name, capfd):
    (tmp_path / name).write_bytes(b'\xff\xfe{"\x00\n\n,,\xff')
    assert name in refusal(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"title": 1, "body": "x"}'),
        ("a.json", '[{"title": 1, "body": "x"}]'),
        ("a.csv", "title,body\n1,x"),
        ("a.tsv", "title\tbody\n1\tx"),
    ],
)
def test_a_wrong_field_is_told_with_the_fields_there_are(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    said = refusal(tmp_path / name)
    assert all(part in said for part in ("'article'", "'title'", "'body'", "--text-field"))


def test_a_wrong_field_of_a_saved_dataset_is_told(tmp_path):
    ROWS.save_to_disk(tmp_path / "saved")
    assert "'article', 'title'" in refusal(tmp_path / "saved", "body")


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "deep/no.json", "/no/where", "./no", "~/no", "../no"])
def test_a_missing_file_is_told_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert repr(name) in (said := refusal(name)) and "no such file" in said


@pytest.mark.parametrize(
    "name", ["nobody/no-such-corpus", "no-such-corpus", "bad name!!", "~nobody/x", "x" * 300, "a\0b"]
)
def test_what_cannot_be_a_corpus_is_told(name):
    assert repr(name) in refusal(name)


@pytest.mark.parametrize("content", [None, "state.json", "dataset_dict.json", "notes.xyz"])
def test_a_folder_without_a_corpus_is_refused(tmp_path, content):
    if content:
        (tmp_path / content).write_text("{}")
    assert str(tmp_path) in refusal(tmp_path)


def test_a_file_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "corpus.xls").write_text("x")
    assert ".jsonl" in (said := refusal(tmp_path / "corpus.xls")) and "corpus.xls" in said


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "corpus.jsonl").write_text("{}")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refusal(tmp_path / "corpus.jsonl")
