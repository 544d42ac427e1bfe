"""Which step augcon.sh runs next, and who serves."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from augcon.errors import UserError
from augcon.run.plan import check_and_plan, next_step, way
from config import Settings, load_settings

Facts = dict[str, int] | None


@pytest.mark.parametrize(
    ("one", "two", "three", "step"),
    [
        (None, None, None, "1"),
        ({"refills": 0}, None, None, "2"),
        ({"refills": 0}, {"refills": 0, "ordered": 0}, None, "3"),
        ({"refills": 0}, {"refills": 0, "ordered": 0}, {"refills": 0}, "done"),
        ({"refills": 0}, {"refills": 0, "ordered": 1}, None, "1"),
        ({"refills": 1}, {"refills": 0, "ordered": 1}, None, "2"),
        ({"refills": 1}, {"refills": 1, "ordered": 1}, None, "3"),
        ({"refills": 1}, {"refills": 1, "ordered": 1}, {"refills": 0}, "3"),  # answers from before the refill
        ({"refills": 1}, {"refills": 1, "ordered": 2}, {"refills": 1}, "1"),  # --max-refills was raised
        (None, {"refills": 0, "ordered": 0}, {"refills": 0}, "1"),  # queries.json was removed
        ({"refills": 0}, None, {"refills": 0}, "2"),
    ],
)
def test_the_next_step(one: Facts, two: Facts, three: Facts, step: str):
    assert next_step({1: one, 2: two, 3: three}) == step


def test_a_step_whose_file_was_removed_is_to_be_run_again(tmp_path: Path, settings: Callable[..., Settings]):
    facts = {"step 1": {"refills": 0}, "step 2": {"refills": 0, "ordered": 0}}
    facts["step 3"] = {"refills": 0, "queries": hashlib.sha256(b"{}").hexdigest()[:16]}
    (tmp_path / "finished.json").write_text(json.dumps(facts))
    for step, name in (("1", "queries.json"), ("2", "filtered_queries.json"), ("3", "sft_data")):
        assert check_and_plan(settings("--results", tmp_path)) == step
        (tmp_path / name).write_text("{}")
    assert check_and_plan(settings("--results", tmp_path)) == "done"
    (tmp_path / "filtered_queries.json").write_text("{} ")  # step 2 has kept others since
    assert check_and_plan(settings("--results", tmp_path)) == "3"


def test_inputs_that_cannot_be_read_are_told_before_anything_is_run(tmp_path: Path, settings: Callable[..., Settings]):
    with pytest.raises(UserError, match="no such corpus"):
        check_and_plan(settings("--results", tmp_path, "--corpus", "no such corpus.jsonl"))
    with pytest.raises(UserError, match="no such examples"):
        check_and_plan(settings("--results", tmp_path, "--qa-examples", "no such examples.jsonl"))


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
    assert way(settings(), 0) == "demo tiny 0 results"
    assert way(settings(), 2) == "vllm own 2 results"
    assert way(settings("--results", "a b/"), 0) == "demo tiny 0 a b"
    assert way(settings("--demo"), 2) == "demo tiny 2 results"
    assert way(settings("--demo", "--scorer-model", "m"), 2) == "demo own 2 results"
    assert way(settings("--no-demo"), 0) == "vllm own 0 results"
    assert way(settings("--api-base", server), 0) == "given tiny 0 results"
    assert way(settings("--api-base", server), 2) == "given own 2 results"
    assert way(settings(AUGCON_API_BASE=server, AUGCON_SCORER_MODEL="m"), 0) == "given own 0 results"


def test_results_of_other_settings_are_refused(tmp_path: Path, settings: Callable[..., Settings]):
    results = ["--results", tmp_path]
    record = {"min_length": 20, "content of the corpus as cut": "other", "model served": "augcon-demo-not-an-llm"}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="content of the corpus as cut has changed"):
        check_and_plan(settings("--demo", *results))
    with pytest.raises(UserError, match="min_length was 20 and is now 21"):
        check_and_plan(settings("--demo", *results, "--min-length", 21))
    del record["content of the corpus as cut"]
    record |= {"scorer_epochs": 9, "answer_temperature": 1.0}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert check_and_plan(settings("--demo", *results)) == "1"  # steps that came to nothing bind nobody
    (tmp_path / "scorer").mkdir()
    with pytest.raises(UserError, match="scorer_epochs was 9 and is now 4"):
        check_and_plan(settings("--demo", *results))
    (tmp_path / "sft_data").mkdir()
    with pytest.raises(UserError, match=r"answer_temperature was 1\.0 and is now 0\.2"):
        check_and_plan(settings("--demo", *results))
    (tmp_path / "sft_data").rmdir()
    (tmp_path / "scorer").rmdir()
    record = {name: record[name] for name in ("min_length", "model served")}
    (tmp_path / "settings.json").write_text(json.dumps(record))
    assert check_and_plan(settings("--demo", *results)) == "1"
    assert check_and_plan(settings("--api-base", "http://127.0.0.1:1/v1", *results)) == "1"
    with pytest.raises(UserError, match=r"augcon-demo-not-an-llm.*--results"):  # else rules would pass for an LLM's
        check_and_plan(settings(*results))
    (tmp_path / "settings.json").write_text(json.dumps({**record, "model served": "real"}))
    with pytest.raises(UserError, match=r"'real'.*--results"):
        check_and_plan(settings("--demo", *results))
