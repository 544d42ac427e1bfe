"""Step 3 through the front door: the script as a process, its files, its last words."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, clean_environment, demo_engine, run, says_one_line, start
from scripted_server import Behaviour, ScriptedServer, prompt_of, refuses, says

from augcon.method.diversity import DiverseQueries
from augcon.run.results import Scored
from augcon.text.prompts import load_prompts

MADE = ("sft_origins.jsonl", "dropped_queries.jsonl", "example_search.json")
REQUESTS = "vllm:request_success_total"
QUESTIONS = [
    ["蜂蜡布怕热，不能用开水烫洗。", "蜂蜡布怕什么？"],
    ["蜂蜡布可以用冷水洗。", "蜂蜡布应该怎么洗？"],
    ["Beeswax wrap lasts a year.", "How long does beeswax wrap last?"],
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome_of(results: Path) -> dict[str, Any]:
    """All that step 3 has made, for comparing runs."""
    made = {name: (results / name).read_text(encoding="utf-8") for name in MADE}
    return {**made, "data": datasets.load_from_disk(results / "sft_data").to_dict()}


def by_hand(results: Path, *queries: list[str]) -> Path:
    """A results folder that has nothing but questions."""
    results.mkdir()
    (results / "filtered_queries.json").write_text(json.dumps({"0": queries or QUESTIONS}))
    return results


@pytest.fixture(scope="module")
def filtered(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of step 1 on two Chinese articles, filtered and scored by the simplest means."""
    folder = tmp_path_factory.mktemp("filtered")
    articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:3:2]
    (folder / "two.jsonl").write_text("".join(json.dumps({"article": article}) + "\n" for article in articles))
    results = folder / "results"
    flags = ["--corpus", folder / "two.jsonl", "--negatives", 0, "--results", results]
    assert run("step1_gen_q.py", "--api-base", engine.api, *flags).returncode == 0
    kept, scores = {}, []
    ids = defaultdict(list)
    for node in lines(results / "nodes.jsonl"):
        ids[node["root"], node["context"], node["query"]].append(node["id"])
    for root, queries in json.loads((results / "queries.json").read_text()).items():
        diverse = DiverseQueries(0.7)
        kept[root] = [pair for pair in queries if len(diverse.kept) < 15 and diverse.offer(pair[1])]
        scores += [
            asdict(Scored(ids[int(root), context, query].pop(0), int(root), query, n / 8, "kept"))
            for n, (context, query) in enumerate(queries)
        ]
    (results / "filtered_queries.json").write_text(json.dumps(kept))
    (results / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    return results


@pytest.fixture(scope="module")
def made(engine: Engine, filtered: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of a run."""
    results = tmp_path_factory.mktemp("made") / "results"
    shutil.copytree(filtered, results)
    done = run("step3_gen_a.py", "--api-base", engine.api, "--negatives", 0, "--results", results)
    assert done.returncode == 0, done.stderr
    return results, done.stdout


def test_every_question_is_answered_in_order_and_no_answer_speaks_of_the_context(made: tuple[Path, str]):
    results, output = made
    data = datasets.load_from_disk(results / "sft_data")
    kept = json.loads((results / "filtered_queries.json").read_text())
    questions = [(int(root), *pair) for root, queries in kept.items() for pair in queries]
    dropped = lines(results / "dropped_queries.jsonl")
    gone = Counter((row["root"], row["context"], row["question"]) for row in dropped)
    assert data.column_names == ["question", "answer"]
    assert [question for *_, question in (Counter(questions) - gone).elements()] == data["question"][:]
    alike = [row for row in dropped if row["reason"] == "says what another answer says"]
    assert len(dropped) - len(alike) <= 0.02 * len(questions)
    assert {row["reply"] for row in alike} and f"says what another answer says {len(alike):,}" in output
    assert f"{len(data):,} of {len(questions):,} queries" in output
    assert all(answer.strip() for answer in data["answer"])
    assert not any(re.search("上下文|文本中|文中提到|根据文|本文", answer) for answer in data["answer"])


def test_each_pair_has_a_line_that_says_where_it_came_from(made: tuple[Path, str]):
    results, _ = made
    data, origins = datasets.load_from_disk(results / "sft_data"), lines(results / "sft_origins.jsonl")
    assert [origin["question"] for origin in origins] == data["question"][:]
    articles = {context["root"]: context["article"] for context in lines(results / "contexts.jsonl")}
    nodes = {node["id"]: node for node in lines(results / "nodes.jsonl")}
    scores = {row["id"]: row["score"] for row in lines(results / "scores.jsonl")}
    assert len({origin["id"] for origin in origins}) == len(origins)
    for origin in origins:
        node = nodes[origin["id"]]
        assert node["query"] == origin["question"]
        assert all(node[name] == origin[name] for name in ("root", "pass", "path", "depth"))
        assert origin["article"] == articles[origin["root"]] and origin["score"] == scores[origin["id"]]
        assert (origin["tries"], origin["language"]) == (1, "zh")


def test_the_search_is_saved_whole_and_its_best_set_is_shown(made: tuple[Path, str]):
    results, output = made
    table = json.loads((results / "example_search.json").read_text())
    assert list(table) == ["zh"] and len(table["zh"]["sets"]) == 16
    for row in table["zh"]["sets"]:
        grades = [answer["grade"] for answer in row["answers"]]
        assert len(row["examples"]) == 3 and len(grades) == 7 and all(1 <= grade <= 10 for grade in grades)
        assert row["mean"] == pytest.approx(sum(grades) / 7)
        assert {answer["example"] for answer in row["answers"]} == set(range(10)) - set(row["examples"])
    best = max(table["zh"]["sets"], key=lambda row: row["mean"])
    assert table["zh"]["chosen"] == best["examples"]
    assert f"best mean {best['mean']:.2f}" in output


def test_a_second_run_makes_no_call_and_the_same_files(engine: Engine, made: tuple[Path, str]):
    results, _ = made
    before, calls = outcome_of(results), engine.metric(REQUESTS)
    again = run("step3_gen_a.py", "--api-base", engine.api, "--negatives", 0, "--results", results)
    assert again.returncode == 0 and "calls:   0 in this run" in again.stdout
    assert engine.metric(REQUESTS) == calls and outcome_of(results) == before


def test_other_settings_and_examples_are_refused_until_redo_agrees_and_other_queries_are_answered(
    engine: Engine, made: tuple[Path, str], tmp_path: Path
):
    shutil.copytree(made[0], results := tmp_path / "r")
    command = ["step3_gen_a.py", "--api-base", engine.api, "--negatives", 0, "--results", results]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"context": "甲。", "question": "是什么？", "answer": "是甲。"}))
    refused = run(*command, "--qa-examples", other, "--answer-temperature", 0.9)
    said = "answer_temperature was 0.2 and is now 0.9", "content of the examples has changed", "--redo", "sft_data"
    assert says_one_line(refused, *said)
    record = json.loads((results / "run.json").read_text())
    served = record["step 3"]["made_with"].pop("model served")
    (results / "run.json").write_text(
        json.dumps({"step 3": {**record["step 3"], "made_with": {"model served": "another"}}})
    )
    assert says_one_line(run(*command), "model served was 'another'", served)
    redone = run(*command, "--qa-examples", other, "--redo")
    assert redone.returncode == 0 and "1 examples by people" in redone.stdout, redone.stderr
    kept = json.loads((results / "filtered_queries.json").read_text())
    (results / "filtered_queries.json").write_text(
        json.dumps({"0": [*kept["0"][:5], ["蜂蜡布怕热。", "蜂蜡布怕什么？"]]})
    )
    assert run(*command, "--qa-examples", other).returncode == 0
    origins = lines(results / "sft_origins.jsonl")
    assert len(origins) + len(lines(results / "dropped_queries.jsonl")) == 6
    assert origins[-1]["id"].startswith("0:added:")
    assert origins[-1]["path"] is None and origins[0]["path"] is not None


def test_a_server_that_dies_is_waited_for_and_one_that_stays_away_ends_the_run_with_all_kept(
    filtered: Path, made: tuple[Path, str], tmp_path: Path
):
    shutil.copytree(filtered, results := tmp_path / "r")
    server = demo_engine(latency=0.05)
    flags = ["--api-base", server.api, "--negatives", 0, "--max-in-flight", 64, "--results", results]

    def killed_under_way(*more: object) -> "subprocess.Popen[str]":
        process = start("step3_gen_a.py", *flags, *more)
        while server.metric(REQUESTS) < 40:
            time.sleep(0.02)
        server.process.kill()
        server.process.wait()
        return process

    process = killed_under_way("--server-wait", 0.5)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "has not answered for" in errors and "run the same command again" in errors
    server = demo_engine(server.port, latency=0.05)
    process = killed_under_way()
    time.sleep(0.5)
    assert process.poll() is None
    server = demo_engine(server.port)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        server.stop()
    assert process.returncode == 0 and "retries: " in output, errors
    assert int(re.search(r"([\d,]+) replayed", output)[1]) >= 40
    assert outcome_of(results) == outcome_of(made[0])


def play(script: Any, results: Path, *flags: object) -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
    """Step 3 against a scripted server: how it ended, and the requests."""

    async def run_it() -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
        async with ScriptedServer(script) as server:
            command = ["step3_gen_a.py", "--api-base", server.url, "--results", results, *flags]
            return await asyncio.to_thread(run, *command, timeout=60), server.bodies

    return asyncio.run(run_it())


def is_grading(body: dict[str, Any]) -> bool:
    return any(body["messages"][0]["content"].startswith(load_prompts(of).grade.instruction) for of in ("zh", "en"))


def test_each_question_meets_its_own_fate(tmp_path: Path):
    fates: dict[str, list[Behaviour]] = {
        "好的问题": [says("好。")],
        "谈来源的问题": [says("根据上下文，是这样。")],
        "起初推托的问题": [says("抱歉，我无法回答。"), says("是这样。")],
        "太长的问题": [says("第一，", "length"), says("<think>没想完"), says(" ")],
        "服务器不收的问题": [refuses(400, "bad input")],
    }

    def script(body: dict[str, Any], before: int) -> Behaviour:
        question = prompt_of(body).rpartition("：")[2].rstrip("？")
        if question not in fates:
            return says("评分：8" if is_grading(body) else "示范的回答。")
        return fates[question][min(body["seed"] % 10_000, len(fates[question]) - 1)]

    results = by_hand(tmp_path / "r", *(["材料。", f"{question}？"] for question in fates))
    done, _ = play(script, results, "--candidates", 2)
    assert done.returncode == 0, done.stderr
    assert datasets.load_from_disk(results / "sft_data").to_list() == [
        {"question": "好的问题？", "answer": "好。"},
        {"question": "起初推托的问题？", "answer": "是这样。"},
    ]
    origins = lines(results / "sft_origins.jsonl")
    assert [origin["tries"] for origin in origins] == [1, 2]
    assert {origins[0][name] for name in ("article", "path", "depth", "pass", "score")} == {None}
    dropped = {row["question"]: (row["reason"], row["tries"], row["reply"]) for row in lines(results / MADE[1])}
    assert dropped == {
        "谈来源的问题？": ("speaks of the text", 3, "根据上下文，是这样。"),
        "太长的问题？": ("empty", 3, " "),
        "服务器不收的问题？": ("refused with status 400", 0, ""),
    }
    assert "answers: 2 of 5 queries; asked again 5 times; dropped: " in done.stdout
    assert "speaks of the text 1" in done.stdout and "search:  zh: 2 sets of 3 of 10 examples, 14" in done.stdout


def test_when_no_grade_can_be_read_the_first_set_is_used_and_that_is_said(tmp_path: Path):
    def script(body: dict[str, Any], before: int) -> Behaviour:
        answer = "This is an answer." if prompt_of(body).rpartition(": ")[2].isascii() else "这是回答。"
        return says("这个回答不是 8 分" if is_grading(body) else answer)

    results = by_hand(tmp_path / "r")
    done, bodies = play(script, results, "--candidates", 2)
    assert done.returncode == 0, done.stderr
    table = json.loads((results / "example_search.json").read_text())
    for of in ("zh", "en"):
        assert table[of]["chosen"] == table[of]["sets"][0]["examples"] and table[of]["sets"][0]["mean"] is None
        assert f"search:  {of}: 2 sets of 3 of 10 examples, 0 answers graded; no set has half" in done.stdout
    assert done.stdout.count("ungraded: no grade 14") == 2
    for of, file, (_, question) in (
        ("zh", "qa_examples.jsonl", QUESTIONS[0]),
        ("en", "qa_examples_en.jsonl", QUESTIONS[2]),
    ):
        human = [json.loads(line)["answer"] for line in (ROOT / file).read_text().splitlines()]
        asked = next(body for body in bodies if prompt_of(body).endswith(question))
        assert [turn["content"] for turn in asked["messages"][1::2]] == [human[n] for n in table[of]["chosen"]]


def test_a_model_that_only_refuses_ends_in_one_line_that_says_so(tmp_path: Path):
    results = by_hand(tmp_path / "r")
    done, _ = play(lambda body, before: says("抱歉，我无法回答这个问题。"), results, "--candidates", 2)
    assert says_one_line(done, "none of the 3 answers", "refusal 3", "dropped_queries.jsonl")
    assert len(lines(results / "dropped_queries.jsonl")) == 3 and not (results / "sft_data").exists()
    assert json.loads((results / "run.json").read_text())["step 3"]["finished"] is None


def test_what_a_user_can_mend_is_one_line(engine: Engine, tmp_path: Path):
    command = ["step3_gen_a.py", "--api-base", engine.api, "--results"]
    assert says_one_line(run(*command, tmp_path / "none"), "filtered_queries.json", "step2_scorer.py")
    results = by_hand(tmp_path / "r")
    assert says_one_line(run(*command, results, "--qa-examples", "no.jsonl"), "--qa-examples", "no.jsonl")
    (results / "filtered_queries.json").write_text('{"0": []}')
    assert says_one_line(run(*command, results), "has no query")


def test_the_bundled_examples_are_found_from_any_folder(engine: Engine, tmp_path: Path):
    by_hand(tmp_path / "results")
    command = [sys.executable, ROOT / "step3_gen_a.py", "--api-base", engine.api, "--candidates", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "20 examples by people" in done.stdout
    assert "search:  zh: " in done.stdout and "search:  en: " in done.stdout
    assert [row["language"] for row in lines(tmp_path / "results" / "sft_origins.jsonl")] == ["zh", "zh", "en"]
