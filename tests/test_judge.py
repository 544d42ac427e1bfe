"""How the judge is asked, and what becomes of its grades."""

import asyncio
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, outputs_in, run, says_one_line
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer, says

from augcon.data import Grades, Pair, Refused, Reply, Request
from augcon.demo.rules import reply_to
from augcon.method.answers import AnswerRules
from augcon.method.judging import Mean, coins, compare, grade, mean_of, means_of
from augcon.ordered import map_in_order
from augcon.text.parse import parse_grades, parse_verdict
from augcon.text.prompts import load_prompts
from judge import plot

ZH, EN = load_prompts("zh"), load_prompts("en")
RULES = AnswerRules(tries=3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=200), st.integers(0, 99))
def test_a_mean_lies_in_its_interval_which_repeats(values: list[int], seed: int):
    mean = mean_of(values, seed)
    assert mean.mean == pytest.approx(statistics.fmean(values))
    assert min(values) <= mean.low <= mean.mean + 1e-9 and mean.mean - 1e-9 <= mean.high <= max(values)
    assert mean == mean_of(values, seed)


def test_the_interval_is_that_of_the_mean():
    values = [1, 5] * 200  # standard error 2 / sqrt(400) = 0.1
    mean = mean_of(values, 1)
    assert mean.low == pytest.approx(3 - 1.96 * 0.1, abs=0.02)
    assert mean.high == pytest.approx(3 + 1.96 * 0.1, abs=0.02)
    assert mean_of([4] * 9, 1) == Mean(4, 4, 4) and str(mean_of([4], 1)) == "4.00 [4.00, 4.00]"


def test_the_ungraded_are_in_no_mean():
    means = means_of([Grades(5, 4, 3), "no three grades", Grades(3, 4, 1)], 0)
    assert {score: mean.mean for score, mean in means.items()} == {"satisfaction": 2, "relevance": 4, "accuracy": 4}
    assert means_of(["refused"], 0) == {}


def ask_with(judge) -> tuple[list[Request], object]:
    """An ask function that replies with what ``judge`` says to the last turn, and the requests."""
    requests: list[Request] = []

    async def ask(request: Request) -> Reply:
        requests.append(request)
        await asyncio.sleep(0.001 * (len(requests) % 3))  # replies come in another order
        return Reply(judge(request), True)

    return requests, ask


def grade_all(ask, pairs: list[Pair]) -> list[Grades | str]:
    async def collect() -> list[Grades | str]:
        return [of async for _, of in map_in_order(lambda pair: grade(ask, ZH, pair, RULES), pairs, lambda: 8)]

    return asyncio.run(collect())


def compare_all(ask, both: list[tuple[Pair, Pair]], seed: int, window: int = 8) -> list[int | str]:
    swapped = coins(len(both), seed)

    async def collect() -> list[int | str]:
        places = map_in_order(lambda n: compare(ask, ZH, *both[n], swapped[n], RULES), range(len(both)), lambda: window)
        return [place async for _, place in places]

    return asyncio.run(collect())


def test_grades_come_in_order_and_what_cannot_be_read_is_asked_again_then_named():
    def judge(request: Request) -> str:
        if "坏" in request.messages[0]["content"]:
            return "这个回答值 4 分"
        if "拒" in request.messages[0]["content"]:
            raise Refused("too long")
        number = request.messages[0]["content"][-1]
        return f"相关性：{number}\n准确性：{number}\n满意度：{number}"

    requests, ask = ask_with(judge)
    pairs = [Pair("问什么？", answer) for answer in ("答1", "坏2", "拒3", "答4")]
    assert grade_all(ask, pairs) == [Grades(1, 1, 1), "no three grades", "too long", Grades(4, 4, 4)]
    again = [request for request in requests if "坏" in request.messages[0]["content"]]
    assert [request.sample for request in again] == [0, 1, 2]
    assert [request.temperature > 0 for request in again] == [False, True, True]


def test_a_judge_that_only_likes_the_first_place_finds_no_winner():
    both = [(Pair(f"第{n}个问题？", f"甲{n}"), Pair(f"第{n}个问题？", f"乙{n}")) for n in range(200)]
    requests, ask = ask_with(lambda request: "结论：一更好")
    better = compare_all(ask, both, 42, 32)
    assert 70 < better.count(0) < 130 and better.count(0) + better.count(1) == 200
    shown = {request.messages[0]["content"] for request in requests}
    assert all(any(f"回答一：{'甲乙'[place]}{n}\n" in prompt for prompt in shown) for n, place in enumerate(better))
    assert better == compare_all(ask, both, 42, 1)
    assert better != compare_all(ask, both, 43, 1)


def test_a_judge_that_prefers_an_answer_finds_it_wherever_it_stands():
    def judge(request: Request) -> str:
        first, _, second = request.messages[0]["content"].rpartition("回答一：")[2].partition("\n\n回答二：")
        return "不相上下" if first == second else "一更好" if first == "好" else "二更好"

    _, ask = ask_with(judge)
    good, bad = Pair("问什么？", "好"), Pair("问什么？", "坏")
    assert compare_all(ask, [(good, bad), (bad, good), (bad, bad)] * 20, 1) == [0, 1, 2] * 20


def test_the_demonstration_engine_judges_in_the_form_asked_for():
    for prompts, question, good, bad in (
        (ZH, "蜂蜡布应该怎样清洗？", "蜂蜡布用冷水和中性洗涤剂清洗，挂起来晾干。", "不知道。"),
        (EN, "How is beeswax wrap cleaned?", "Beeswax wrap is cleaned in cold water with mild soap.", "No."),
    ):
        grades = [
            parse_grades(reply_to(prompts.judge_messages(question, answer), 0), prompts) for answer in (good, bad, "")
        ]
        assert grades[0].satisfaction > grades[1].satisfaction >= grades[2].satisfaction == 1
        for pair, verdict in (((good, bad), 0), ((bad, good), 1), ((good, good), 2)):
            assert parse_verdict(reply_to(prompts.compare_messages(question, *pair), 0), prompts) == verdict


def test_the_picture_is_drawn_for_one_and_for_many(tmp_path: Path):
    for names in (["a"], [f"model {n}" for n in range(8)]):
        plot(tmp_path / "judge.png", dict.fromkeys(names, Mean(3.5, 3.0, 3.9)))
        assert (tmp_path / "judge.png").read_bytes().startswith(b"\x89PNG")


# The script


def play_judge(script: Any, *flags: object) -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
    """The script against a scripted server: how it ended, and the requests."""

    async def run_it() -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
        async with ScriptedServer(script) as server:
            command = ["judge.py", "--api-base", server.url, *flags]
            return await asyncio.to_thread(run, *command, timeout=60), server.bodies

    return asyncio.run(run_it())


@pytest.mark.parametrize(
    ("outputs", "parts"),
    [
        ("tests", ["tests", "inference.py"]),
        (" , ", ["--outputs", "names no folder"]),
        ("none", ["none", "inference.py"]),
    ],
)
def test_folders_without_outputs_are_one_line(engine: Engine, tmp_path: Path, outputs: str, parts: list[str]):
    done = run("judge.py", "--api-base", engine.api, "--results", tmp_path / "r", "--outputs", outputs)
    assert says_one_line(done, *parts)


def test_outputs_of_two_models_are_graded_compared_and_drawn(engine: Engine, tmp_path: Path):
    asked = ["蜂蜡布应该怎样清洗？", "蜂蜡布能用多久？", "How is beeswax wrap cleaned?"]
    base = outputs_in(tmp_path / "base", asked, "")
    tuned = outputs_in(
        tmp_path / "tuned", asked, "蜂蜡布用冷水清洗，晾干，能用一年。Beeswax wrap is cleaned in cold water."
    )
    flags = ["--api-base", engine.api, "--results", tmp_path / "r", "--outputs", f"{base}, {tuned}"]
    done = run("judge.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r" / "judge.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == asked
    assert {row["better"] for row in rows} == {str(tuned)}
    summary = json.loads((tmp_path / "r" / "judge.json").read_text())
    assert summary["judge"] == "augcon-demo-not-an-llm"
    assert summary["better"] == {str(base): 0, str(tuned): 3, "neither": 0, "undecided": 0}
    for name in (str(base), str(tuned)):
        grades = [row["grades"][name]["satisfaction"] for row in rows]
        assert summary[name]["satisfaction"]["mean"] == pytest.approx(sum(grades) / 3)
        assert (summary[name]["graded"], summary[name]["ungraded"]) == (3, 0)
    assert summary[str(base)]["satisfaction"]["high"] == 1 < summary[str(tuned)]["satisfaction"]["low"]
    assert f"better:  {base} 0, {tuned} 3, neither 0, undecided 0" in done.stdout
    assert (tmp_path / "r" / "judge.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").glob("judge.json*")}
    again = run("judge.py", *flags)
    assert "calls:   0 in this run" in again.stdout
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").glob("judge.json*")}


def test_outputs_for_other_questions_are_not_compared_and_an_unreadable_judge_is_told(tmp_path: Path):
    first, second = (
        outputs_in(tmp_path / "a", ["一？", "二？"], "甲"),
        outputs_in(tmp_path / "b", ["二？", "一？"], "甲"),
    )
    flags = ["--results", tmp_path / "r", "--outputs"]
    done, bodies = play_judge(lambda body, before: says("这个回答值 4 分"), *flags, f"{first},{second}")
    assert says_one_line(done, "--outputs", str(second), "in the same order") and not bodies
    done, bodies = play_judge(lambda body, before: says("这个回答值 4 分"), *flags, first)
    assert says_one_line(done, "no answer could be graded", "no three grades 2") and len(bodies) == 2 * 4
    rows = [json.loads(line) for line in (tmp_path / "r" / "judge.jsonl").read_text().splitlines()]
    assert [row["grades"] for row in rows] == [{str(first): None}] * 2
