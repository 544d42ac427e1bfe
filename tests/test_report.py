"""report.py: what is in the file, for whole and for unfinished runs, and that no text in it is markup."""

import base64
import gzip
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, run, says_one_line
from hypothesis import given
from hypothesis import strategies as st
from reports import HOSTILE, write_run

from augcon.data import Pair
from augcon.errors import UserError
from augcon.method.pairs import Sample
from augcon.report.alike import Scored, beside_kept
from augcon.report.gather import held
from augcon.report.questions import KINDS, kind_of
from augcon.run.review import Mark, apply_review, read_review


def blocks_of(page: str) -> dict[str, Any]:
    """The compressed blocks of a report, opened as the page opens them."""
    found = re.findall(r'<script type="text/plain" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>', page)
    return {name: json.loads(gzip.decompress(base64.b64decode(block))) for name, block in found}


def report_on(results: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The page, its index and its root contexts."""
    done = run("report.py", "--results", results)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page = (results / "report.html").read_text(encoding="utf-8")
    blocks = blocks_of(page)
    chunks = [blocks[f"chunk-{n}"] for n in range(len(blocks) - 1)]
    return page, blocks["index"], [root for chunk in chunks for root in chunk]


@pytest.fixture(scope="module")
def finished(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of steps 1 and 3 on two articles; step 2 by hand, which keeps one query, and leaves out two."""
    folder = tmp_path_factory.mktemp("finished")
    articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:2]
    (folder / "two.jsonl").write_text("".join(json.dumps({"article": article}) + "\n" for article in articles))
    results = folder / "results"
    flags = ["--negatives", 0, "--results", results, "--api-base", engine.api]
    done = run("step1_gen_q.py", "--corpus", folder / "two.jsonl", *flags)
    assert done.returncode == 0, done.stderr
    nodes = [json.loads(line) for line in (results / "nodes.jsonl").read_text().splitlines()]
    kept: dict[str, list[list[str]]] = {str(node["root"]): [] for node in nodes}
    fates, lines = ("kept", "alike", "over quota"), []
    asked = [node for node in nodes if node["query"]]
    for n, node in enumerate(asked):
        fate = fates[n % 3]
        lines.append({"id": node["id"], "root": node["root"], "question": node["query"], "score": n / 7, "fate": fate})
        if fate == "kept":
            kept[str(node["root"])].append([node["context"], node["query"]])
    (results / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (results / "filtered_queries.json").write_text(json.dumps(kept))
    done = run("step3_gen_a.py", *flags)
    assert done.returncode == 0, done.stderr
    return results


def test_it_holds_every_pair_every_node_and_every_number(finished: Path):
    page, index, roots = report_on(finished)
    data = datasets.load_from_disk(finished / "sft_data").to_list()
    pairs = [pair for root in roots for pair in root["pairs"]]
    assert [{"question": pair["question"], "answer": pair["answer"]} for pair in pairs] == data
    assert [pair["n"] for pair in pairs] == list(range(len(data)))
    origins = [json.loads(line) for line in (finished / "sft_origins.jsonl").read_text().splitlines()]
    assert [pair["id"] for pair in pairs] == [origin["id"] for origin in origins]
    assert index["pairs"]["depth"] == [origin["depth"] for origin in origins]
    assert index["pairs"]["score"] == pytest.approx([origin["score"] for origin in origins], abs=1e-4)
    assert [roots[place]["root"] for place in index["pairs"]["root"]] == [origin["root"] for origin in origins]
    nodes = [json.loads(line) for line in (finished / "nodes.jsonl").read_text().splitlines()]
    shown = [node for root in roots for node in root["nodes"]]
    assert [(node["id"], node["context"], node.get("query")) for node in shown] == [
        (node["id"], node["context"], node["query"]) for node in nodes
    ]
    counts, losses = index["counts"], index["losses"]
    queries = sum(node["query"] is not None for node in nodes)
    assert counts["articles"] == 2 and counts["nodes"] == len(nodes) and counts["queries"] == queries
    assert counts["pairs"] == len(data) and counts["kept"] == len(data) + counts.get("dropped", 0)

    def lost(after: str) -> int:
        return sum(loss["count"] for loss in losses if loss["after"] == after)

    assert lost("nodes") == len(nodes) - queries and lost("queries") == queries - counts["kept"]
    assert lost("kept") == counts["kept"] - counts["pairs"]
    assert all(1 <= len(loss["examples"]) <= 5 for loss in losses)
    assert "<svg" in page and page.count("<figure>") >= 6 and "<text" in page
    assert index["stages"]["step 1"]["made_with"]["max_length"] == 500 and "python" in index["versions"]
    assert index["search"] and 0 < index["articles"]["finer"][0] <= index["articles"]["length"][0]
    assert all(alike["kept"]["root"] == alike["left_out"]["root"] for alike in index["alike"])


def test_it_is_the_same_for_the_same_run(finished: Path):
    assert report_on(finished)[0] == report_on(finished)[0]


@pytest.mark.parametrize(
    ("there", "pairs", "scored"),
    [
        (("contexts.jsonl",), False, False),
        (("contexts.jsonl", "nodes.jsonl", "queries.json", "short_roots.jsonl"), False, False),
        (("contexts.jsonl", "nodes.jsonl", "queries.json", "scores.jsonl", "filtered_queries.json"), False, True),
        (("sft_data",), True, False),
        (("filtered_queries.json", "sft_data", "sft_origins.jsonl"), True, False),
    ],
)
def test_of_an_unfinished_run_it_shows_what_is_there(
    there: tuple[str, ...], pairs: bool, scored: bool, finished: Path, tmp_path: Path
):
    for name in there:
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copyfile
        copy(finished / name, tmp_path / name)
    _, index, roots = report_on(tmp_path)
    assert bool(index["pairs"]["root"]) == pairs == any(root["pairs"] for root in roots)
    assert ("scored" in index["counts"]) == scored
    assert any(root["nodes"] for root in roots) == ("nodes.jsonl" in there)
    assert any(root["text"] for root in roots) == ("contexts.jsonl" in there)


def test_it_takes_no_lock_and_says_what_is_not_finished(finished: Path, tmp_path: Path):
    from augcon.run.results import Results

    results = tmp_path / "in use"
    shutil.copytree(finished, results)
    with Results(results).held():
        done = run("report.py", "--results", results)
    assert done.returncode == 0 and "not finished: step 2" in done.stdout and "report.html" in done.stdout


def test_what_cannot_be_reported_is_said_in_a_line(finished: Path, tmp_path: Path):
    assert says_one_line(run("report.py", "--results", tmp_path), "nothing to report", "augcon.sh")
    assert says_one_line(run("report.py", "--results", tmp_path / "missing"), "nothing to report")
    assert not (tmp_path / "missing").exists()
    results = tmp_path / "damaged"
    shutil.copytree(finished, results)
    with (results / "nodes.jsonl").open("a") as file:
        file.write("{")
    assert says_one_line(run("report.py", "--results", results), "nodes.jsonl")
    lines = (finished / "sft_origins.jsonl").read_text().splitlines(keepends=True)
    shutil.copyfile(finished / "nodes.jsonl", results / "nodes.jsonl")
    (results / "sft_origins.jsonl").write_text("".join(lines[1:]))
    assert says_one_line(run("report.py", "--results", results), "do not belong together")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_model_or_corpus_is_markup(hostile: str, tmp_path: Path):
    write_run(tmp_path, roots=2, text=hostile)
    page, index, roots = report_on(tmp_path)
    outside = re.sub(r'<script type="text/plain"[^>]*>[A-Za-z0-9+/=]*</script>', "", page)
    assert hostile not in outside and "onerror" not in outside
    assert outside.count("<script") == outside.count("</script>") == 1
    assert roots[0]["pairs"][0]["answer"].startswith(hostile) and hostile in roots[0]["text"]
    assert hostile.strip()[:20] in json.dumps(index["titles"], ensure_ascii=False) or "\n" in hostile or "\0" in hostile


def test_the_policy_forbids_requests_and_other_scripts(finished: Path):
    page = report_on(finished)[0]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page) and "http-equiv" in page
    # The only addresses are names of XML namespaces.
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_query_added_by_hand_has_its_passage(finished: Path, tmp_path: Path):
    results = tmp_path / "by hand"
    shutil.copytree(finished, results)
    kept = json.loads((results / "filtered_queries.json").read_text())
    kept["0"].append(["A context by hand.", "A question by hand?"])
    (results / "filtered_queries.json").write_text(json.dumps(kept))
    origins = (results / "sft_origins.jsonl").read_text()
    at = sum(json.loads(line)["root"] == 0 for line in origins.splitlines())
    rows = datasets.load_from_disk(results / "sft_data").to_list()
    rows.insert(at, {"question": "A question by hand?", "answer": "Yes."})
    shutil.rmtree(results / "sft_data")
    datasets.Dataset.from_list(rows).save_to_disk(results / "sft_data")
    from augcon.files import digest

    added = f"0:added:{digest('A context by hand.', 'A question by hand?')[:8]}"
    row = {"id": added, "question": "A question by hand?", "root": 0, "depth": None, "score": None}
    lines = origins.splitlines()
    (results / "sft_origins.jsonl").write_text("\n".join([*lines[:at], json.dumps(row), *lines[at:]]) + "\n")
    _, index, roots = report_on(results)
    pair = roots[0]["pairs"][-1]
    assert pair["id"] == added and pair["context"] == "A context by hand."
    assert index["pairs"]["depth"][pair["n"]] is None


def test_of_a_large_run_some_trees_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from augcon.report import gather
    from augcon.run.results import Results

    write_run(tmp_path, roots=10)
    monkeypatch.setattr(gather, "MOST_NODES", 40)
    found = gather.gather(Results(tmp_path), 1)
    shown = [root for chunk in found.chunks for root in json.loads(gzip.decompress(chunk)) if root["shown"]]
    assert found.counts["every"] > 1 and 0 < len(shown) < 10
    assert found.counts["nodes"] > 40 and len(found.pairs) == 20


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is glued laminated timber?", "what"),
        ("In which year was it built?", "which"),
        ("为什么什么都没有？", "why"),
        ("周阿姨提着什么？", "what"),
        ("会议是什么时候开的？", "when"),
        ("有多少住户？", "how many"),
        ("How many people came?", "how many"),
        ("How did they do it?", "how"),
        ("谁贴了告示？", "who"),
        ("Whose idea was it?", "who"),
        ("哪里可以借书？", "where"),
        ("哪一层最抢手？", "which"),
        ("电梯是否装好了？", "yes or no"),
        ("电梯装好了吗？", "yes or no"),
        ("Is it heavier than steel, and why?", "yes or no"),
        ("Somehow it works.", "other"),
        ("请介绍一下蜂蜡布。", "other"),
        ("如何清洗蜂蜡布？", "how"),
        ("", "other"),
    ],
)
def test_the_kind_of_a_question_follows_the_word_it_asks_with(question: str, kind: str):
    assert kind_of(question) == kind and kind in KINDS


def test_what_a_part_holds_of_its_root_context_is_counted_once():
    root = "The bakery opens at seven. It sells out by eight."
    assert held(root, []) == 0 and held(root, [root]) == 10
    assert held(root, ["The bakery opens at seven.", "opens at seven. It sells"]) == 7
    assert held(root, ["By eight the bakery sells out"]) in range(2, 5)
    assert held("", ["x"]) == 0


def test_a_question_left_out_stands_beside_the_kept_one_that_it_is_most_like():
    kept = [
        Scored(f"{n}:0:", n // 2, text, 1.0, "kept") for n, text in enumerate(["Why a b c?", "Why x y z?", "Why a b?"])
    ]
    here = beside_kept(Scored("9:0:1", 0, "Why x y q?", 0.5, "alike"), kept)
    assert here and here.kept.question == "Why x y z?" and 0.5 < here.likeness < 1
    elsewhere = beside_kept(Scored("9:0:2", 0, "Why a b?", 0.5, "alike elsewhere"), kept)
    assert elsewhere and elsewhere.kept == kept[2] and elsewhere.likeness == 1
    assert beside_kept(Scored("9:0:3", 7, "Why?", 0.5, "alike"), kept) is None


def test_a_sample_is_fair_and_the_same_for_its_seed():
    drawn = []
    for seed in range(300):
        sample = Sample[int](5, seed)
        for item in range(20):
            sample.offer(item, item)
        assert len(set(sample.kept)) == 5 and sample.offered == 20
        drawn += sample.kept
    assert all(40 < drawn.count(item) < 115 for item in range(20))


@given(st.integers(0, 8), st.lists(st.integers(0, 3), max_size=40))
def test_a_sample_of_parts_is_that_of_the_whole(size: int, part_of: list[int]):
    whole, parts = Sample[int](size, 7), [Sample[int](size, 7) for _ in range(4)]
    for item, part in enumerate(part_of):
        whole.offer(item, item)
        parts[part].offer(item, item)
    joined = parts.pop()
    for part in parts:
        joined += part
    assert joined.kept == whole.kept and joined.offered == whole.offered == len(part_of)


PAIRS = [Pair("One?", "1"), Pair("Two?", "2"), Pair("Three?", "3"), Pair("One?", "4")]
IDS = ["0:0:", "0:0:1", "1:0:", "1:0:1"]


def test_a_review_leaves_out_what_is_bad_and_takes_edits():
    marks = [
        Mark("One?", "bad", "0:0:"),
        Mark("Two?", "edited", "0:0:1", "Two, too?", "22"),
        Mark("Three?", "good", "1:0:"),
        Mark("Another?", "bad", "1:0:1"),
        Mark("One?", "bad", "7:0:"),
    ]
    reviewed = apply_review(PAIRS, IDS, marks)
    assert reviewed.pairs == [Pair("Two, too?", "22"), PAIRS[2], PAIRS[3]] and reviewed.places == [1, 2, 3]
    assert reviewed.marks == {"bad": 1, "edited": 1, "good": 1} and reviewed.unknown == 2
    assert str(reviewed) == "1 bad pairs left out, 1 edited, 1 good; 2 marks are of pairs that are not in the data"


def test_without_ids_a_review_goes_by_the_question_and_the_last_mark_counts():
    marks = [Mark("One?", "good", "0:0:"), Mark("One?", "bad", "0:0:"), Mark("Two?", "bad")]
    assert apply_review(PAIRS, [None] * 4, marks).pairs == [PAIRS[2]]
    assert apply_review(PAIRS, IDS, marks).pairs == [PAIRS[2], PAIRS[3]]
    assert apply_review(PAIRS, IDS, []).pairs == PAIRS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"id": "0:0:", "mark": "bad"}', "question"),
        ('{"question": "One?", "mark": "poor"}', "mark"),
        ('{"question": "One?", "mark": "edited", "new_question": "x"}', "new_answer"),
        ("[]", "line 2"),
    ],
)
def test_a_broken_review_is_told_with_its_line(line: str, said: str, tmp_path: Path):
    file = tmp_path / "review.jsonl"
    file.write_text(f'{{"question": "Two?", "mark": "good", "id": null, "later": 1}}\n{line}\n')
    with pytest.raises(UserError, match="line 2") as error:
        read_review(str(file))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_fine_tuning_tells_what_is_wrong_with_a_review(finished: Path, tmp_path: Path):
    missing = run("finetune.py", "--results", finished, "--review", tmp_path / "none.jsonl", "--output", tmp_path / "o")
    assert says_one_line(missing, "--review", "none.jsonl")
    (tmp_path / "review.jsonl").write_text('{"question": "One?"}\n')
    broken = run(
        "finetune.py", "--results", finished, "--review", tmp_path / "review.jsonl", "--output", tmp_path / "o"
    )
    assert says_one_line(broken, "--review", "line 1")
    origins = [json.loads(line) for line in (finished / "sft_origins.jsonl").read_text().splitlines()]
    bad = [{"id": origin["id"], "question": origin["question"], "mark": "bad"} for origin in origins]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in bad))
    none = run("finetune.py", "--results", finished, "--review", tmp_path / "all.jsonl", "--output", tmp_path / "o")
    assert says_one_line(none, "leaves no pair") and f"{len(bad):,} bad pairs left out" in none.stdout


def test_both_languages_have_every_text_that_the_page_uses():
    folder = ROOT / "augcon" / "report"
    chinese, english = (tomllib.loads((folder / f"{of}.toml").read_text(encoding="utf-8")) for of in ("zh", "en"))
    assert chinese.keys() == english.keys() and set(chinese["kinds"]) == set(english["kinds"]) == set(KINDS)
    used = {*re.findall(r"\bT\.(\w+)", (folder / "page.js").read_text())}
    used |= {*re.findall(r"\bt\.(\w+)", (folder / "page.html").read_text())}
    used |= {*re.findall(r'texts\["(\w+)"\]', (folder / "charts.py").read_text())}
    assert used <= chinese.keys()
    for name in (name for name, sentence in chinese.items() if isinstance(sentence, str)):
        assert set(re.findall(r"{\w+}", chinese[name])) == set(re.findall(r"{\w+}", english[name])), name
