"""Whatever is damaged in a results folder: each script ends in a result, or in one line that names the file."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, says_one_line
from preloaded import Preloaded
from reports import write_run

from augcon.api import read_pairs
from augcon.errors import UserError
from augcon.plan import needed
from augcon.report.gather import gather
from augcon.run.card import describe_run
from augcon.run.pairs import PairRules, origin_columns, passages_of, read_divided
from augcon.run.results import Results
from augcon.train.scores import KeptScores
from report import facts_of
from step2_scorer import read_step_1

# Each file or folder of a finished run, and the scripts that read it or write it.
READERS = {
    "contexts.jsonl": "step1_gen_q step2_scorer step3_gen_a export report augcon.plan",
    "articles.jsonl": "step1_gen_q export report augcon.plan",
    "skipped.jsonl": "step1_gen_q report augcon.plan",
    "nodes.jsonl": "step2_scorer step3_gen_a report",
    "queries.json": "step1_gen_q step2_scorer augcon.plan",
    "scorer_pairs": "step1_gen_q step2_scorer",
    "short_roots.jsonl": "step1_gen_q report",
    "refills.json": "step1_gen_q step2_scorer augcon.plan",
    "scorer": "step2_scorer",
    "scores.jsonl": "step2_scorer step3_gen_a report",
    "scores_parts": "step2_scorer",
    "filtered_queries.json": "step2_scorer step3_gen_a report augcon.plan",
    "example_search.json": "step3_gen_a report",
    "sft_data": "step3_gen_a finetune export report augcon.plan",
    "sft_origins.jsonl": "finetune export report",
    "dropped_queries.jsonl": "step3_gen_a report",
    "ckpts": "finetune",
    "LoRA": "finetune merge",
    "log.json": "finetune",
    "sft_model": "merge inference",
    "outputs": "inference judge",
    "judge.jsonl": "judge",
    "judge.json": "judge",
    "export": "export",
    "report.html": "report",
    "figures.json": "step1_gen_q step2_scorer step3_gen_a export report",
    "run.json": "step1_gen_q step2_scorer step3_gen_a finetune merge export report augcon.plan",
    "replies.sqlite": "step1_gen_q step3_gen_a inference judge",
}
OTHER_SHAPES = ["[]", "{}", "7", "null", '"text"', '[1, "a", null]', '{"a": {"b": [1]}}', '{"step 1": 7}', "[[{}]]"]
OTHER_VALUES = [None, 7, -1, "x", [], {}, [[1]], {"a": 1}]
Damage = Callable[[Path], object]


def damages(path: Path) -> Iterator[tuple[str, Damage]]:
    """Ways to damage a file or a folder, each with its name."""
    if path.is_dir():
        yield "a file in its place", lambda path: (shutil.rmtree(path), path.write_text("x"))
        yield "emptied", lambda path: (shutil.rmtree(path), path.mkdir())
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            name = inner.relative_to(path)
            yield f"{name} missing", lambda path, name=name: (path / name).unlink()
            for kind, content in contents(inner):
                yield f"{name} {kind}", lambda path, name=name, content=content: (path / name).write_bytes(content)
        return
    yield "a folder in its place", lambda path: (path.unlink(), path.mkdir())
    yield "a link to nowhere", lambda path: (path.unlink(), path.symlink_to("/nowhere/x"))
    for kind, content in contents(path):
        yield kind, lambda path, content=content: path.write_bytes(content)


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    data = path.read_bytes()
    yield "empty", b""
    yield "cut in the middle", data[: len(data) // 2]
    yield "without its end", data[:-2]
    yield "noise", random.Random(1).randbytes(3000)
    middle = len(data) // 2
    yield "noise inside", data[:middle] + random.Random(2).randbytes(20) + data[middle + 20 :]
    if path.suffix in (".json", ".jsonl"):
        yield "nested deep", b"[" * 100_000
        for shape in OTHER_SHAPES:
            yield f"as {shape}", shape.encode()
    if path.suffix == ".json" and len(data) < 100_000:
        for name, value in mutations(json.loads(data)):
            yield name, json.dumps(value).encode()
    if path.suffix == ".jsonl" and data.count(b"\n") > 2:
        first, second, *rest = data.splitlines(keepends=True)
        for shape in OTHER_SHAPES:
            yield f"line 2 as {shape}", b"".join([first, shape.encode(), b"\n", *rest])
        for name, value in mutations(json.loads(second)):
            yield f"line 2 with {name}", b"".join([first, json.dumps(value).encode(), b"\n", *rest])


def mutations(whole: Any, name: str = "", deepest: int = 5) -> Iterator[tuple[str, Any]]:
    """The value with one thing in it replaced by something of another kind, or left out."""
    parts = whole.items() if isinstance(whole, dict) else list(enumerate(whole))[:1] if isinstance(whole, list) else ()
    for key, part in parts:
        changed = [(f"{name}.{key} = {value!r}", value) for value in OTHER_VALUES if type(value) is not type(part)]
        if deepest:
            changed += mutations(part, f"{name}.{key}", deepest - 1)
        for described, value in changed:
            copy = whole.copy()
            copy[key] = value
            yield described, copy
        if isinstance(whole, dict):
            yield f"{name} without {key}", {other: value for other, value in whole.items() if other != key}


# What the scripts read, without what is slow in them


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of 3 root contexts, with the files that scripts read of each other."""
    folder = write_run(tmp_path_factory.mktemp("written"), 3)
    kept = json.loads((folder / "filtered_queries.json").read_text())
    lines = {
        "articles.jsonl": [
            {"article": n, "file": "a.csv", "row": n, "title": "", "fields": {"n": n}} for n in range(3)
        ],
        "skipped.jsonl": [{"file": "a.csv", "row": n, "reason": "empty", "detail": ""} for n in range(3)],
        "short_roots.jsonl": [{"root": n, "quota": 3, "reason": "too short"} for n in range(3)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    dropped = {"id": "0:0:12", "root": 0, "context": "c", "question": "q?", "reason": "empty", "tries": 1, "reply": ""}
    (folder / "dropped_queries.jsonl").write_text(3 * (json.dumps(dropped) + "\n"))
    shares = {"all": [2, 0.5]}
    scorer = {"base": "b", "digest": "d", "held_out": "none", "speed": "", "accuracy_before": shares}
    facts = {
        "step 1": {"refills": 0, "pairs": 2},
        "scorer": {**scorer, "accuracy_after": shares},
        "step 2": {"queries": "x"},
        "step 3": {"queries": "x"},
    }
    made_with = {"model served": "m", "corpus": "a.csv", "scorer_model": ""}
    asked = {"seconds": 1.0, "calls": 3, "retries": {}, "pace": [[0.0, 0, 0], [1.0, 3, 9]]}
    write_all(
        folder,
        {
            "queries.json": kept,
            "refills.json": [[0]],
            "run.json": {
                name: {"made_with": made_with, "finished": of, "outdated": False} for name, of in facts.items()
            },
            "figures.json": {
                "step 1": {"finished": "now", "roots": 3, "queries": 9, "outcomes": {"done": 9}, "asked": [asked]},
                "step 2": {"fates": {"kept": 6}},
                "step 3": {"dropped": {"empty": 1}, "asked": [asked]},
            },
            "example_search.json": {
                "en": {
                    "examples": ["q?"],
                    "chosen": [0],
                    "sets": [{"examples": [0], "questions": ["q?"], "mean": 7.5, "answers": []}],
                }
            },
        },
    )
    pair = {"context": "c", "pos_query": "p", "neg_query": "n", "type": "both", "root": 0, "id": "0:0:"}
    datasets.Dataset.from_list([pair] * 2).save_to_disk(folder / "scorer_pairs")
    (folder / "scores_parts" / "d").mkdir(parents=True)
    (folder / "scores_parts" / "d" / "part-0.jsonl").write_text('\n{"0:0:#1": 1.5}\n\n{"0:0:1#2": 2.5}\n\n{"x": 1}\n')
    return folder


def write_all(folder: Path, values: dict[str, Any]) -> None:
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value, indent=1))


def read_all(results: Results) -> Iterator[Callable[[], object]]:
    """All that is read of a results folder, by one script or another."""
    rules = PairRules(data="", review="", held_out=0.1, seed=0)
    yield lambda: (gather(results, 0), facts_of(results))
    yield lambda: read_pairs(results.folder)
    yield lambda: describe_run(results, {})
    yield lambda: [passages_of(results, read_divided(results, rules).origins)]
    yield lambda: origin_columns(results, read_divided(results, rules).origins)
    yield lambda: read_step_1(results)
    yield lambda: [list(results.each_root(path)) for path in (results.queries, results.filtered_queries)]
    yield lambda: results.keep_figures("step 1", None, same=True)
    yield lambda: KeptScores(results.scores_parts / "d").read()
    for step in (1, 2, 3):
        yield lambda step=step: needed(step, results)


@pytest.mark.parametrize("most", [12, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_a_line_that_names_it_or_is_not_needed(written: Path, tmp_path: Path, name: str, most: int):
    """``most``: kinds of damage of each file."""
    if not (written / name).exists():
        pytest.skip("in the nightly test")
    said, wrong = set(), []
    chance, kinds = random.Random(name), list(damages(written / name))
    for kind, damage in chance.sample(kinds, min(most, len(kinds))):
        folder = tmp_path / "results"
        shutil.copytree(written, folder)
        damage(folder / name)
        for number, read in enumerate(read_all(Results(folder))):
            try:
                read()
            except (UserError, OSError) as error:  # which the scripts show in a line
                said.add(str(error))
                known = name in str(error) or re.search("step 1 has not finished|step 3 .* run it first", str(error))
                if not known or "\n" in str(error):
                    wrong.append((kind, number, repr(error)))
            except Exception as error:
                wrong.append((kind, number, repr(error)))
        shutil.rmtree(folder)
    assert not wrong, wrong
    assert said or name == "scores_parts"  # of which what is damaged is scored again


# Everything through the front door


class Run:
    """A results folder, and how each script is run on it."""

    FEW = ("--negatives", 8, "--scorer-epochs", 1, "--scorer-batch", 8, "--epochs", 1, "--answer-max-tokens", 64)

    def __init__(self, folder: Path, tools: Path, api: str, preloaded: Preloaded) -> None:
        self.folder, self.results, self.preloaded = folder, folder / "results", preloaded
        self.tools, self.api, model = tools, api, tools / "tiny"
        self.flags = ["--results", self.results, "--corpus", tools / "corpus.jsonl", "--api-base", api, *self.FEW]
        self.flags += ["--questions", tools / "questions.txt", "--scorer-model", model, "--model", model]

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        words = {"augcon.plan": ["check"], "judge": ["--outputs", self.results / "outputs"]}.get(script, [])
        return self.preloaded.run(self.folder / script, script, *words, *self.flags)

    def copy(self, folder: Path) -> "Run":
        shutil.copytree(self.results, folder / "results")
        return Run(folder, self.tools, self.api, self.preloaded)


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A folder in which everything has been made once."""
    from augcon.demo.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("whole")
    articles = [text[:1200] for text in datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:2]]
    rows = [{"article": text, "id": n} for n, text in enumerate([*articles, None, "Short."])]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "questions.txt").write_text("What is it?\nWhy?\n")
    make_tiny_model(folder / "tiny", articles)
    run = Run(folder, folder, engine.api, Preloaded(training=True))
    first = [
        "step1_gen_q",
        "step2_scorer",
        "step3_gen_a",
        "finetune",
        "merge",
        "inference",
        "judge",
        "export",
        "report",
    ]
    for script in first:
        done = run.run(script)
        assert done.returncode == 0, (script, done.stdout, done.stderr)
    (run.results / "refills.json").write_text("[[0]]")
    return run


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", READERS)
def test_every_script_ends_in_a_result_or_a_line_whatever_file_is_damaged(whole: Run, tmp_path: Path, name: str):
    chance, kinds = random.Random(name), list(damages(whole.results / name))
    for number, (kind, damage) in enumerate(chance.sample(kinds, min(40, len(kinds)))):
        for script in READERS[name].split():
            run = whole.copy(tmp_path / f"{number}-{script}")
            damage(run.results / name)
            done = run.run(script)
            said = f"{script} with {name} {kind}: {done.returncode} {done.stdout} {done.stderr}"
            assert "Traceback" not in done.stdout + done.stderr and done.returncode != -9, said
            changed = name == "run.json" and says_one_line(done, "results was made with other settings: ")
            assert done.returncode == 0 or says_one_line(done, name) or changed, said
            shutil.rmtree(run.folder)
