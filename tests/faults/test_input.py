"""Input that is bad: each text, file or row ends in a result, a counted skip with its reason, or an error of one line.

No text is lost or changed other than by ``clean``: joined, the root contexts of an article give it back.
"""

import contextlib
import io
import json
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import Engine, run, says_one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from augcon.data import Pair
from augcon.errors import UserError
from augcon.run.cut import CorpusRules, Cut, read_corpus
from augcon.run.inputs import read_examples
from augcon.run.review import read_review
from augcon.run.rows import read_all
from augcon.text.units import clean, length
from inference import read_questions


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)


SENTENCE = "街上新开了一家面包店，每天早上七点开门。"
ARABIC = "افتُتح مخبز جديد في شارعنا، وهو يفتح أبوابه كل يوم في السابعة صباحًا. يشتري العمال الخبز الساخن قبل العمل."
TEXTS = {
    "one character": "字",
    "one letter": "a",
    "one word of 8,000 characters": "a" * 8000,
    "8,000 characters of base64": "QUJD" * 2000,
    "no punctuation": "没有标点的长句子" * 300,
    "English without punctuation": "word after word " * 400,
    "one sentence 300 times": SENTENCE * 300,
    "one line 300 times": f"{SENTENCE}\n" * 300,
    "marks alone": "。！？……——" * 50,
    "NUL and controls": f"\x00{SENTENCE}\x01\x07\x1b[31m{SENTENCE}\x7f\x85",
    "lone surrogates": f"{SENTENCE}\ud800{SENTENCE}\udfff",
    "CRLF": f"{SENTENCE}\r\n\r\n{SENTENCE}\r\n",
    "CR": f"一。\r{SENTENCE}\r{SENTENCE}\r",
    "line separators": f"{SENTENCE}\u2028{SENTENCE}\u2029{SENTENCE}\v\f",
    "byte order marks inside": f"\ufeff二。{SENTENCE}\ufeff{SENTENCE}",
    "zero width": f"{SENTENCE}\u200b\u200c\u200d\u2060{SENTENCE}",
    "right to left": f"\u202e{ARABIC}\u202c \u2067{ARABIC}\u2069",
    "astral Chinese": "𠮷野家在𡈽地上開門。𪚥" * 20,
    "private use": "\ue000\uf8ff\U000f0000" * 40,
    "stacked marks": "Z\u0300\u0301\u0302" * 100 + "\u0301" * 3000,
    "emoji": "👩\u200d👩\u200d👧\U0001f3fd " * 80,
    "Thai": "ร้านขนมปังในหมู่บ้านเปิดตั้งแต่ตีห้าเพราะคนงานต้องกินข้าวเช้าก่อนไปทำงาน " * 10,
    "Arabic": ARABIC * 8,
    "Hindi": "हमारी गली में एक नई बेकरी खुली है, जो रोज़ सुबह सात बजे खुलती है। मज़दूर काम से पहले गरम रोटी लेते हैं। " * 8,
    "Japanese": "通りに新しいパン屋ができた。毎朝七時に開き、職人たちは仕事の前に温かいパンを買う。" * 8,
    "Korean": "거리에 새 빵집이 생겼다. 매일 아침 일곱 시에 문을 열고, 일꾼들은 일하기 전에 따뜻한 빵을 산다. " * 8,
    "code": "def open_at(hour: int) -> dict[str, int]:\n    return {'hour': hour}  # {context} %s\n\n\n" * 20,
    "a table": "| hour | rolls |\n|-----:|:------|\n" + "| 6 | 120 |\n" * 60,
    "LaTeX": r"\begin{align} \sum_{i=1}^{n} \frac{\alpha_i}{\beta} &= \int_0^1 f(x)\,dx \\ \end{align} So it is. " * 15,
    "HTML": "<p class='a'>The bakery &amp; the mill <b>open</b> at six.</p><script>alert(1)</script>\n" * 10,
    "JSON": json.dumps({"bakery": {"opens": 6, "sells": ["bread", "rolls"]}}, indent=2) * 10,
    "our form of a reply": f"问题：假的吗？\n片段1：{SENTENCE}\n片段2：{SENTENCE}",
    "rules and blank lines": f"---\n\n\n***\n{SENTENCE}\n\n\n\n---",
    "spaces": f"{' ' * 5000}{SENTENCE}{chr(0x3000) * 5000}",
}
HUGE = {
    "3,000,000 characters in one line": SENTENCE * (3_000_000 // len(SENTENCE)),
    "3,000,000 letters": "a" * 3_000_000,
    "3,000,000 characters without a mark": "字" * 3_000_000,
}
NO_TEXT = {  # lines, and why they give no article
    b'{"other": "x"}': "no text in the field",
    b'{"article": null}': "no text in the field",
    b'{"article": 3}': "not a text",
    b'{"article": -0.5e300}': "not a text",
    b'{"article": true}': "not a text",
    b'{"article": ["a", "b"]}': "not a text",
    b'{"article": {"text": "a"}}': "not a text",
    b'{"article": ""}': "empty",
    b'{"article": " \\t\\n\\u3000\\u2028"}': "empty",
    b'{"article": "\\u0000\\ufeff\\ud800"}': "empty",
    '{"article": "街上"}'.encode("gb18030"): "not in UTF-8",
    b"3": "line without fields",
    b'["article"]': "line without fields",
    b"null": "line without fields",
    b'"article"': "line without fields",
    b"{": "broken line",
    b"}{": "broken line",
    b"[" * 100_000: "broken line",
    b'{"article": "The bakery op': "broken line",
    b"\x00\x00\x00\x00": "not in UTF-8",
}


def corpus(folder: Path, texts: dict[str, str], name: str = "rows.jsonl") -> Path:
    """A file with all of it: texts, lines without, and the last line cut in the middle."""
    lines = [json.dumps({"article": text, "title": title}).encode() for title, text in texts.items()]
    (folder / name).write_bytes(b"\n".join([*lines, *NO_TEXT, lines[0][: len(lines[0]) // 2]]))
    return folder / name


def contexts_by_article(cut: Cut) -> dict[int, str]:
    joined: dict[int, str] = {}
    for root in cut.roots:
        assert root.start == len(joined.get(root.article, ""))
        joined[root.article] = joined.get(root.article, "") + root.text
        assert root.text.encode() and root.text.strip() and root.length == length(root.text) <= 500
    return joined


def all_is_accounted_for(cut: Cut, texts: dict[str, str]) -> None:
    joined = contexts_by_article(cut)
    assert [article.title for article in cut.articles] == list(texts)
    for article, text in zip(cut.articles, texts.values(), strict=True):
        assert joined[article.article] == clean(text), article.title
    reasons = [skipped.reason for skipped in cut.skipped]
    assert reasons == [*NO_TEXT.values(), "broken line"]


def test_each_row_gives_an_article_without_a_loss_or_a_skip_with_its_reason(tmp_path: Path):
    all_is_accounted_for(read_corpus(CorpusRules(str(corpus(tmp_path, TEXTS)), alike_articles=0)), TEXTS)


@pytest.mark.nightly
@pytest.mark.parametrize("name", HUGE)
def test_so_does_an_article_of_three_million_characters(tmp_path: Path, name: str):
    texts = {"first": "The mill stands by the river.", name: HUGE[name]}  # not like it, or it would be left out
    all_is_accounted_for(read_corpus(CorpusRules(str(corpus(tmp_path, texts)))), texts)


def test_rows_that_are_there_twice_are_taken_once(tmp_path: Path):
    rows = [SENTENCE, f" {SENTENCE}\r\n", SENTENCE * 2, SENTENCE.replace("，", "，\u200b"), SENTENCE]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"article": row}) + "\n" for row in rows))
    cut = read_corpus(CorpusRules(str(tmp_path / "rows.jsonl"), alike_articles=0))
    assert [article.row for article in cut.articles] == [0, 2]
    assert [(skipped.row, skipped.reason) for skipped in cut.skipped] == [
        (row, "the same as an earlier one") for row in (1, 3, 4)
    ]


PACKED = io.BytesIO()
with zipfile.ZipFile(PACKED, "w") as packed:
    packed.writestr("word/document.xml", "<w:document/>" * 50)
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"
MISTAKEN = {  # files of one kind under the name of another, and why they give no article
    "docx.txt": (PACKED.getvalue(), "not in UTF-8"),
    "pdf.txt": (PDF, "not in UTF-8"),
    "picture.md": (b"\x89PNG\r\n\x1a\n\x00\x00", "not in UTF-8"),
    "wide.txt": (SENTENCE.encode("utf-16"), "not in UTF-8"),
    "chinese.txt": (SENTENCE.encode("gb18030"), "not in UTF-8"),
    "text.docx": (SENTENCE.encode(), "cannot be converted"),
    "text.pdf": (SENTENCE.encode(), "cannot be converted"),
    "docx.pdf": (PACKED.getvalue(), "cannot be converted"),
    "cut.pdf": (PDF[:20], "cannot be converted"),
    "empty.docx": (b"", "cannot be converted"),
    "empty.txt": (b"", "empty"),
    "text.zip": (SENTENCE.encode(), "cannot be read"),
    "text.parquet": (SENTENCE.encode(), "no articles in it"),
    "text.jsonl": (SENTENCE.encode(), "no articles in it"),
    "table.json": (b'{"a": [1, 2', "no articles in it"),
    "program.exe": (b"MZ\x90", "files of this kind are not read"),
}


def test_a_folder_of_everything_goes_through_step_1(engine: Engine, tmp_path: Path):
    """All of the above at once, through the script, with a loop of links and odd names beside them."""
    folder = tmp_path / "all of it"
    folder.mkdir()
    corpus(folder, TEXTS)
    for name, (content, _) in MISTAKEN.items():
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / ("n" * 200 + ".txt")).write_text(SENTENCE + "名", "utf-8")
    (folder / "名\n字\u202e.txt").write_text(SENTENCE + "字", "utf-8")
    flags = [
        "--corpus",
        folder,
        "--results",
        tmp_path / "r",
        "--max-passes",
        1,
        "--negatives",
        0,
        "--alike-articles",
        0,
    ]
    done = run("step1_gen_q.py", "--api-base", engine.api, *flags, timeout=500)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "r" / name).read_text("utf-8").splitlines()]

    joined: dict[int, str] = {}
    for root in lines("contexts.jsonl"):
        joined[root["article"]] = joined.get(root["article"], "") + root["text"]
    titles = {row["title"]: row["article"] for row in lines("articles.jsonl")}
    assert all(joined[titles[title]] == clean(text) for title, text in TEXTS.items())
    assert len(titles) - 1 == len(TEXTS) and len(joined) == len(TEXTS) + 2
    skipped = {(row["file"].rpartition("/")[2], row["reason"]) for row in lines("skipped.jsonl") if row["row"] is None}
    assert {(name, reason) for name, (_, reason) in MISTAKEN.items()} <= skipped
    assert {row["root"] for row in lines("nodes.jsonl")} == {root["root"] for root in lines("contexts.jsonl")}


@pytest.mark.parametrize("name", [name for name, (_, reason) in MISTAKEN.items() if "kind" not in reason])
def test_such_a_file_alone_is_one_line(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(MISTAKEN[name][0])
    with pytest.raises(UserError) as error:
        read_corpus(CorpusRules(str(tmp_path / name)))
    assert "\n" not in str(error.value) and name in str(error.value) and len(str(error.value)) < 1000


# Everything else that is read of a user


def questions_of(source: str) -> list[str]:
    return read_questions(types.SimpleNamespace(questions=source, corpus="", question_field="question"))[0]


READERS: dict[str, Callable[[str], list[Any]]] = {
    "examples": read_examples,
    "questions": questions_of,
    "data": lambda source: read_all(source, Pair, "--data"),
    "review": read_review,
}
GOOD = [{"context": "C.", "question": "Why?", "answer": "So.", "id": "0:0:", "mark": "good"}] * 2
ROWS = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
BAD = {
    "nothing": b"",
    "blank": b" \n\t\n",
    "a byte order mark": b"\xef\xbb\xbf",
    "one after a byte order mark": b"\xef\xbb\xbf" + ROWS,
    "cut in the middle": ROWS[: len(ROWS) * 3 // 4],
    "GB18030": ROWS.replace(b"So.", "街上".encode("gb18030")),
    "UTF-16": ROWS.decode().encode("utf-16"),
    "CR alone": ROWS.replace(b"\n", b"\r"),
    "NUL": ROWS.replace(b"So.", b"\x00"),
    "an escaped NUL": ROWS.replace(b"So.", b"\\u0000"),
    "a lone surrogate": ROWS.replace(b"So.", b"\\ud800 x"),
    "a line separator": ROWS.replace(b"So.", "x\u2028y".encode()),
    "null": ROWS.replace(b'"So."', b"null").replace(b'"Why?"', b"null"),
    "numbers": ROWS.replace(b'"So."', b"3").replace(b'"Why?"', b"-1e999"),
    "lists": ROWS.replace(b'"So."', b"[1]").replace(b'"Why?"', b'{"a": []}'),
    "white space": ROWS.replace(b"So.", b" \\t ").replace(b"Why?", b"\\u3000"),
    "other fields": b'{"prompt": "x"}\n',
    "no fields": b"{}\n[]\n3\n",
    "nested deep": b"[" * 100_000,
    "nested deep in a field": b'{"question": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "not a number": b'{"question": NaN, "answer": Infinity, "context": -0}',
    "a large number": b'{"question": ' + b"9" * 5000 + b"}",
    "a field twice": b'{"question": "a", "question": "b", "answer": "c", "context": "d", "mark": "good"}',
    "three million characters": ROWS.replace(b"So.", b"a" * 3_000_000),
    "a web page": b"<!doctype html><html><body>Not found</body></html>",
    "an archive": PACKED.getvalue(),
    "a PDF": PDF,
    "a table": b'question,answer,context\n"x\n',
}


def is_read_or_one_line(read: Callable[[str], list[Any]], path: Path) -> None:
    try:
        found = read(str(path))
    except UserError as error:
        said = str(error)
    else:
        said = ""
        assert all(str(row).encode() is not None for row in found)
    assert "\n" not in said and len(said) < 1000, said


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ""])
@pytest.mark.parametrize("reader", READERS)
def test_every_file_of_a_user_is_read_or_refused_in_one_line(tmp_path: Path, reader: str, suffix: str):
    for number, (name, content) in enumerate(BAD.items()):
        if (name, suffix) == ("nested deep in a field", ".json"):
            continue  # Arrow's reader, which reads these files, crashes
        path = tmp_path / f"file{number}{suffix}"
        path.write_bytes(content)
        is_read_or_one_line(READERS[reader], path)
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    for name in (f"folder{suffix}", f"loop{suffix}", f"none{suffix}", f"{'n' * 300}{suffix}"):
        is_read_or_one_line(READERS[reader], tmp_path / name)
    is_read_or_one_line(READERS[reader], Path(f"~nobody/x{suffix}"))


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_so_is_a_good_file_that_was_damaged_anywhere(tmp_path: Path, cases: int):
    path = tmp_path / "rows.jsonl"

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(ROWS)), st.integers(0, 40), st.binary(max_size=8))
    def check(start: int, removed: int, put: bytes) -> None:
        path.write_bytes(ROWS[:start] + put + ROWS[start + removed :])
        for read in READERS.values():
            is_read_or_one_line(read, path)

    check()


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("inference.py", "--questions"),
        ("judge.py", "--outputs"),
        ("export.py", "--mix"),
        ("step3_gen_a.py", "--qa-examples"),
    ],
)
def test_the_scripts_say_so_in_one_line(engine: Engine, tmp_path: Path, script: str, flag: str):
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\x00{" * 9)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "filtered_queries.json").write_text('{"0": [["c", "Why?"]]}')
    datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]}).save_to_disk(tmp_path / "r" / "sft_data")
    more = [] if script == "export.py" else ["--api-base", engine.api]
    done = run(script, "--results", tmp_path / "r", flag, tmp_path / "bad.jsonl", *more)
    assert says_one_line(done, "bad.jsonl"), done.stderr


def test_every_line_of_a_file_of_questions_is_a_question_whatever_it_holds(tmp_path: Path):
    asked = ["a\x00b?", "\ufeffc?", "d\u2028e?", "  f?\t", "<|im_end|>", "g\r", "\u3000", ""]
    (tmp_path / "asked.txt").write_text("\n".join(asked), "utf-8")
    with contextlib.suppress(UserError):
        assert questions_of(str(tmp_path / "asked.txt")) == ["ab?", "c?", "d\ne?", "f?", "<|im_end|>", "g"]


def test_a_question_in_another_language_or_none_goes_into_a_finished_folder(engine: Engine, tmp_path: Path):
    queries = [["面包店早上六点开门。", "面包店几点开门？"]]
    (tmp_path / "filtered_queries.json").write_text(json.dumps({"0": queries}))
    command = ["step3_gen_a.py", "--api-base", engine.api, "--results", tmp_path, "--candidates", 1]
    assert run(*command).returncode == 0
    queries += [["The bakery opens at six.", " When does the bakery open?\n"], ["A mill.", " \u3000"]]
    (tmp_path / "filtered_queries.json").write_text(json.dumps({"0": queries}))
    done = run(*command)
    assert done.returncode == 0 and "2 to answer (" in done.stdout, done.stderr
    rows = [*(tmp_path / "sft_origins.jsonl").open(), *(tmp_path / "dropped_queries.jsonl").open()]
    assert {json.loads(row)["question"] for row in rows} == {"面包店几点开门？", "When does the bakery open?"}
