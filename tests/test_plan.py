"""What augcon.sh asks: who serves, what is refused at once, and which step has something to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from augcon.demo.engine import MODEL
from augcon.errors import UserError
from augcon.files import digest
from augcon.method.contexts import split_corpus
from augcon.plan import DEMO_MODEL, check, needed, way
from augcon.run import cut as cut_module
from augcon.run.results import Results
from config import Settings, load_settings, pick

MADE = {"step 1": "queries.json", "scorer": "scorer", "step 2": "filtered_queries.json", "step 3": "sft_data"}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings from flags and environment variables."""
    for name in [name for name in os.environ if name.startswith("AUGCON_")]:
        monkeypatch.delenv(name)

    def load(*flags: object, **environment: str) -> Settings:
        monkeypatch.setattr(sys, "argv", ["augcon.sh", *map(str, flags)])
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return load_settings("")

    return load


def test_who_serves_and_what_scores(settings: Callable[..., Settings]):
    server = "http://127.0.0.1:1/v1"
    assert way(settings(), 0) == "demo tiny 0 real results"
    assert way(settings(), 2) == "vllm own 2 real results"
    assert way(settings("--results", "a b/"), 0) == "demo tiny 0 real a b"
    assert way(settings("--demo"), 2) == "demo tiny 2 real results"
    assert way(settings("--demo", "--scorer-model", "m"), 2) == "demo own 2 real results"
    assert way(settings("--dry-run"), 0) == "demo tiny 0 dry results"
    assert way(settings("--no-demo"), 0) == "vllm own 0 real results"
    assert way(settings("--api-base", server), 0) == "given tiny 0 real results"
    assert way(settings("--api-base", server), 2) == "given own 2 real results"
    assert way(settings(AUGCON_API_BASE=server, AUGCON_SCORER_MODEL="m"), 0) == "given own 0 real results"


# Which step has something to do


def steps_needed(results: Results) -> list[int]:
    return [step for step in (1, 2, 3) if needed(step, results)]


def finish(results: Results, stage: str, **facts: object) -> None:
    results.record.begin(stage, {}, [], redo=False)
    results.record.finish(stage, **facts)


@pytest.fixture
def done(tmp_path: Path) -> Results:
    """Results in which all steps have come to their end."""
    results = Results(tmp_path)
    for path in (results.queries, results.filtered_queries):
        path.write_text("{}")
    results.sft_data.mkdir()
    finish(results, "step 1", refills=0)
    finish(results, "step 2", queries=digest(b"{}"))
    finish(results, "step 3", queries=digest(b"{}"))
    return results


def test_all_steps_are_needed_at_first_and_none_at_last(tmp_path: Path, done: Results):
    assert steps_needed(Results(tmp_path / "new")) == [1, 2, 3]
    assert steps_needed(done) == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_that_was_begun_again_or_whose_file_is_gone_is_needed(done: Results, step: int):
    done.record.begin(f"step {step}", {}, [], redo=False)
    assert steps_needed(done) == [step]
    finish(done, f"step {step}", refills=0, queries=digest(b"{}"))
    assert steps_needed(done) == []
    path = done.made(f"step {step}")[0]
    path.rename(path.with_name("gone"))
    assert step in steps_needed(done)


def test_the_next_step_is_the_first_that_is_needed(tmp_path: Path, done: Results):
    def following(results: Path) -> str:
        command = [sys.executable, "-P", "-m", "augcon.plan", "next", "--results", str(results)]
        environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout

    assert (following(tmp_path / "new"), following(done.folder)) == ("1\n", "none\n")
    done.filtered_queries.write_text('{"0": []}')
    assert following(done.folder) == "3\n"
    done.queries.write_text('{"0": []}')
    assert following(done.folder) == "2\n"


def test_a_step_whose_input_has_changed_is_needed(done: Results):
    done.queries.write_text('{"0": []}')
    assert steps_needed(done) == [2]
    done.filtered_queries.write_text('{"0": []}')
    assert steps_needed(done) == [2, 3]


def test_step_1_is_needed_while_step_2_has_sent_roots_back(done: Results):
    done.refills.write_text("[[0, 3]]")
    assert steps_needed(done) == [1]
    finish(done, "step 1", refills=1)
    assert steps_needed(done) == []  # until it has written other queries


# What is refused at once


def test_inputs_that_cannot_be_read_are_refused_before_anything_is_run(
    tmp_path: Path, settings: Callable[..., Settings]
):
    with pytest.raises(UserError, match="no such corpus"):
        check(settings("--results", tmp_path, "--corpus", "no such corpus.jsonl"), 0)
    with pytest.raises(UserError, match="no such examples"):
        check(settings("--results", tmp_path, "--qa-examples", "no such examples.jsonl"), 0)


@pytest.fixture
def whole(tmp_path: Path, settings: Callable[..., Settings]) -> Path:
    """Results of the demonstration with the default settings, as far as the record goes."""
    results, default = Results(tmp_path / "whole"), settings("--demo")
    results.folder.mkdir()
    for stage, name in MADE.items():
        inputs = {**default.inputs(stage), **({} if stage == "scorer" else {"model served": MODEL})}
        results.record.begin(stage, inputs, [], redo=False)
        shares: dict[str, object] = {"accuracy_before": {}, "accuracy_after": {}}
        scorer = {"base": "m", "digest": "d", "held_out": "none", "speed": "", **shares}
        results.record.finish(stage, **(scorer if stage == "scorer" else {"queries": digest(b"{}"), "refills": 0}))
        (results.folder / name).write_text("{}")
    return results.folder


def outdated(folder: Path) -> set[str]:
    return {name for name, stage in json.loads((folder / "run.json").read_text()).items() if stage["outdated"]}


@pytest.mark.parametrize(
    ("flags", "said", "lost"),
    [
        (["--min-length", "21"], "min_length was 20 and is now 21", MADE),
        (["--seed", "1"], "seed was 42 and is now 1", MADE),
        (["--scorer-epochs", "9"], "scorer_epochs was 4 and is now 9", ["scorer", "step 2", "step 3"]),
        (["--sweep-threshold", "0"], "sweep_threshold was 0.9 and is now 0.0", ["step 2", "step 3"]),
        (["--answer-temperature", "1"], "answer_temperature was 0.2 and is now 1.0", ["step 3"]),
        (["--no-demo", "--model", "m"], f"model served was '{MODEL}' and is now 'm'", MADE),
    ],
)
def test_other_settings_are_refused_with_what_would_be_lost_and_redo_makes_that_again_alone(
    whole: Path, settings: Callable[..., Settings], flags: list[str], said: str, lost: Iterable[str]
):
    check(settings("--demo", "--results", whole), 0)
    other = settings("--results", whole, *([] if "--no-demo" in flags else ["--demo"]), *flags)
    with pytest.raises(UserError) as refused:
        check(other, 0)
    assert said in str(refused.value) and "--redo" in str(refused.value)
    assert str(refused.value).partition("--redo to replace ")[2].split(", ") == [MADE[stage] for stage in lost]
    assert not outdated(whole)
    check(other.model_copy(update={"redo": True}), 0)
    assert outdated(whole) == set(lost)
    assert steps_needed(Results(whole)) == [step for step in (1, 2, 3) if f"step {step}" in lost]


def test_settings_of_steps_that_made_nothing_may_change(whole: Path, settings: Callable[..., Settings]):
    (whole / "sft_data").unlink()
    check(settings("--demo", "--results", whole, "--answer-temperature", 1), 0)
    assert outdated(whole) == {"step 3"}


def test_a_given_server_says_itself_which_model_it_has(whole: Path, settings: Callable[..., Settings]):
    check(settings("--api-base", "http://127.0.0.1:1/v1", "--results", whole), 0)
    assert not outdated(whole) and DEMO_MODEL == MODEL


# The corpus is cut once


CORPUS = (
    "".join(f'{{"article": "社区食堂在午间{n}点开门，二十个座位常常坐满。老人刷卡。"}}\n' for n in "一二三")
    + '{"article": ""}\n'
)


@pytest.fixture
def cut(tmp_path: Path, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Reads the corpus as step 1 does; returns how often it was cut."""
    (tmp_path / "c.jsonl").write_text(CORPUS)
    cuts = []
    monkeypatch.setattr(cut_module, "split_corpus", lambda *given: cuts.append(1) or split_corpus(*given))

    def read(*flags: object) -> int:
        cuts.clear()
        chosen = settings("--demo", "--corpus", tmp_path / "c.jsonl", "--results", tmp_path / "r", *flags)
        rules = pick(cut_module.CorpusRules, chosen)
        found = cut_module.read_corpus(rules, Results(tmp_path / "r"))
        times = len(cuts)
        anew = cut_module.read_corpus(rules)
        for name in ("roots", "articles", "skipped"):
            assert list(getattr(found, name)) == list(getattr(anew, name)), "as if cut anew"
        assert (found.left_out, found.cut_from) == (anew.left_out, anew.cut_from)
        assert [skipped.reason for skipped in found.skipped] == ["empty"] and len(found.articles) == 3
        return times

    return read


def test_step_1_takes_the_root_contexts_that_the_check_has_cut(
    tmp_path: Path, settings: Callable[..., Settings], cut: Callable[..., int]
):
    assert cut() == 1
    check(settings("--demo", "--corpus", tmp_path / "c.jsonl", "--results", tmp_path / "r"), 0)
    assert cut() == 0


@pytest.mark.parametrize("change", ["longer", "same size and date", "cut otherwise", "other contexts", "no contexts"])
def test_root_contexts_are_never_those_of_another_corpus_or_cut(
    tmp_path: Path, settings: Callable[..., Settings], cut: Callable[..., int], change: str
):
    corpus, contexts = tmp_path / "c.jsonl", tmp_path / "r" / "contexts.jsonl"
    check(settings("--demo", "--corpus", corpus, "--results", tmp_path / "r"), 0)
    if change == "longer":
        corpus.write_text(CORPUS.replace("老人", "老人们"))
    elif change == "same size and date":
        stat = corpus.stat()
        corpus.write_text(CORPUS.replace("老人", "学生"))
        os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (corpus.stat().st_size, corpus.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    elif change == "other contexts":
        contexts.write_text(contexts.read_text().replace("老人", "学生"))
    elif change == "no contexts":
        contexts.unlink()
    assert cut(*(["--quota-unit", 9] if change == "cut otherwise" else [])) == 1


def test_a_corpus_that_is_refused_leaves_the_root_contexts_alone(whole: Path, settings: Callable[..., Settings]):
    check(settings("--demo", "--results", whole), 0)
    before = (whole / "contexts.jsonl").read_bytes()
    with pytest.raises(UserError, match="max_length was"):
        check(settings("--demo", "--results", whole, "--max-length", 100), 0)
    assert (whole / "contexts.jsonl").read_bytes() == before
    with Results(whole).held(), pytest.raises(UserError, match="another run is using"):
        check(settings("--demo", "--results", whole), 0)


def test_a_dry_run_outdates_nothing(whole: Path, settings: Callable[..., Settings]):
    before = (whole / "run.json").read_text()
    check(settings("--demo", "--results", whole, "--max-length", 100, "--redo", "--dry-run"), 0)
    stages = [json.loads(text) for text in (before, (whole / "run.json").read_text())]
    assert all(stages[0][name] == stages[1][name] for name in ("step 1", "step 2", "step 3"))
