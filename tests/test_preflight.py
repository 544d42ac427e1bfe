"""What a dry run foretells, beside what the run then takes."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, Engine, run
from scripted_server import ScriptedServer, answers, says

from augcon.preflight import amount, span

CORPUS = ROOT / "qa_examples.jsonl"
UNITS = {"": 1, "k": 1e3, "M": 1e6}


def figures(printed: str, what: str) -> dict[str, float]:
    """The figures of a line about a step."""
    line = next(line for line in printed.split("\n") if line.startswith(what))
    found = re.findall(r"([\d.,]+) ?([kM]?) (calls|prompt tokens|written tokens)", line)
    return {name: float(number.replace(",", "")) * UNITS[unit] for number, unit, name in found}


def took(results: Path, step: str) -> dict[str, float]:
    (asked,) = json.loads((results / "figures.json").read_text())[step]["asked"]
    calls = asked["calls"] + asked["replayed"] + asked["shared"]
    return {"calls": calls, "prompt tokens": asked["prompt_tokens"], "written tokens": asked["written_tokens"]}


def near(foretold: dict[str, float], taken: dict[str, float]) -> bool:
    return foretold.keys() == taken.keys() and all(0.8 < foretold[name] / taken[name] < 1.2 for name in taken)


@pytest.mark.parametrize("corpus", ["DailyM", "qa_examples.jsonl"])
def test_a_dry_run_foretells_step_1_within_a_fifth_and_makes_nothing(tmp_path: Path, engine: Engine, corpus: str):
    flags = ("--api-base", engine.api, "--corpus", ROOT / corpus, "--negatives", 40)
    flags += () if corpus == "DailyM" else ("--text-field", "context")
    dry = run("step1_gen_q.py", *flags, "--results", tmp_path / "dry", "--dry-run", "--prices", "1,0.1,2")
    assert dry.returncode == 0, dry.stderr
    assert {path.name for path in (tmp_path / "dry").iterdir()} <= {"replies.sqlite", ".lock"}
    done = run("step1_gen_q.py", *flags, "--results", tmp_path / "real")
    assert done.returncode == 0, done.stderr
    assert near(figures(dry.stdout, "step 1:"), took(tmp_path / "real", "step 1"))
    assert figures(dry.stdout, "in all:")["calls"] > figures(dry.stdout, "step 1:")["calls"]
    assert re.search(r"step 3: .*, cost \d", dry.stdout) and "pair:" in dry.stdout


def test_the_run_finds_the_replies_of_its_trial(tmp_path: Path, engine: Engine):
    flags = ("--api-base", engine.api, "--corpus", CORPUS, "--text-field", "context", "--negatives", 0)
    assert run("step1_gen_q.py", *flags, "--results", tmp_path, "--dry-run").returncode == 0
    assert run("step1_gen_q.py", *flags, "--results", tmp_path).returncode == 0
    (asked,) = json.loads((tmp_path / "figures.json").read_text())["step 1"]["asked"]
    assert asked["replayed"] > 0 and asked["calls"] == 0  # so small a corpus is tried whole
    again = run("step1_gen_q.py", *flags, "--results", tmp_path, "--dry-run").stdout
    assert figures(again, "step 1:")["written tokens"] > 0  # tokens of stored replies count, too


def test_a_dry_run_of_step_3_foretells_it(tmp_path: Path, engine: Engine):
    flags = ("--api-base", engine.api, "--results", tmp_path, "--candidates", 4)
    pairs = [
        [f"The mill by the river opened in {year}, and the miller had {year % 7} cats.", f"When did mill {year} open?"]
        for year in range(1850, 1900)
    ]
    (tmp_path / "filtered_queries.json").write_text(json.dumps({"0": pairs}))
    dry = run("step3_gen_a.py", *flags, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "sft_data").exists()
    assert run("step3_gen_a.py", *flags, "--alike-answers", 0).returncode == 0
    assert near(
        figures(dry.stdout, "step 3:") | {"written tokens": 1, "prompt tokens": 1},
        took(tmp_path, "step 3") | {"written tokens": 1, "prompt tokens": 1},
    )


def test_times_are_those_of_the_server_or_of_a_given_speed_but_not_of_one_that_stands_in(
    tmp_path: Path, engine: Engine
):
    flags = (
        "--api-base",
        engine.api,
        "--corpus",
        CORPUS,
        "--text-field",
        "context",
        "--results",
        tmp_path,
        "--dry-run",
    )
    stand_in = run("step1_gen_q.py", *flags).stdout
    given = run("step1_gen_q.py", *flags, "--speed", 10).stdout
    itself = run("step1_gen_q.py", *flags, "--demo").stdout
    timed = re.compile(r"step 1: .*on disk, [\d.]+ (s|min|h)\n")
    assert not timed.search(stand_in) and timed.search(itself)
    seconds = figures(given, "step 1:")["written tokens"] / 10
    assert span(seconds) in given


def test_a_window_too_small_for_prompt_and_reply_is_pointed_out(tmp_path: Path):
    listing = {"data": [{"id": "model", "object": "model", "max_model_len": 4000}]}

    async def main() -> str:
        script = lambda body, before: says("Question: Why is this so?\nAnswer: For it is.")  # noqa: E731
        async with ScriptedServer(script, answers(json.dumps(listing))) as server:
            flags = ("--results", tmp_path, "--api-base", server.url, "--dry-run", "--candidates", "1")
            done = await asyncio.to_thread(run, "step3_gen_a.py", *flags)
            return done.stderr

    (tmp_path / "filtered_queries.json").write_text('{"0": [["The mill opened in 1850.", "When did it open?"]]}')
    assert "leave 3,993 of the server's 4,000 for a reply, which may take 4,096" in asyncio.run(main())


def test_figures_in_few_digits():
    assert [amount(number) for number in (0, 7, 950, 1000, 4336, 5_006_370, 3.2e9)] == [
        "0",
        "7",
        "950",
        "1 k",
        "4.34 k",
        "5.01 M",
        "3.2 G",
    ]
    assert [span(seconds) for seconds in (3, 119, 121, 7100, 7300)] == ["3 s", "119 s", "2 min", "118 min", "2.0 h"]
