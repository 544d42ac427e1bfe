"""Inference through the front door: the script as a process, its files, its last words."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, clean_environment, outputs_in, run, says_one_line
from scripted_server import ScriptedServer, answers, refuses, says

QUESTIONS = [f"第{n}个问题是什么？" for n in range(40)]


def question_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def play(
    script: Any,
    *flags: object,
    models: Any = ("tuned",),
    act: Callable[[ScriptedServer, list[str]], Awaitable[Any]] | None = None,
) -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
    """The script against a scripted server: how it ended, and the requests."""

    async def run_it() -> tuple["subprocess.CompletedProcess[str]", list[dict[str, Any]]]:
        async with ScriptedServer(script, models) as server:
            command = ["inference.py", "--api-base", server.url, *flags]
            if act:
                await act(server, command)
            return await asyncio.to_thread(run, *command, timeout=60), server.bodies

    return asyncio.run(run_it())


def asked_in(folder: Path, questions: list[Any] = QUESTIONS) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    return path


def saved(path: Path) -> list[tuple[str, str]]:
    rows = datasets.load_from_disk(path)
    assert rows.column_names == ["question", "answer"]
    return list(zip(rows["question"][:], rows["answer"][:], strict=True))


def test_answers_are_in_the_order_of_the_questions_whatever_the_delays(tmp_path: Path):
    delays = random.Random(5)
    done, bodies = play(
        lambda body, before: says(f"答：{question_of(body)}", after=delays.uniform(0, 0.3)),
        *("--questions", asked_in(tmp_path), "--results", tmp_path / "r", "--max-in-flight", 16),
    )
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "r" / "outputs") == [(question, f"答：{question}") for question in QUESTIONS]
    assert "serves 'tuned'" in done.stdout and "answers: 40\n" in done.stdout
    for body in bodies:
        assert body["messages"] == [{"role": "user", "content": question_of(body)}] and "stop" not in body
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("tuned", 0.2, 4096)


def test_what_is_wrong_with_an_answer_is_counted_and_its_row_stays(tmp_path: Path):
    fates = {
        "好的？": says("好。\n\n---\n\n### 再说\n- 一"),
        "空的？": says(" "),
        "太长？": says("第一，", "length"),
        "不收？": refuses(400, "bad input"),
        "想过？": says("<think>嗯</think>\n想好了。"),
        "最后？": says("好。"),
    }
    asked = [*fates, "好的？", 7, "", None]
    done, _ = play(
        lambda body, before: fates[question_of(body)],
        *("--questions", asked_in(tmp_path, asked), "--results", tmp_path / "r"),
    )
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "r" / "outputs") == [
        ("好的？", "好。\n\n---\n\n### 再说\n- 一"),
        ("空的？", ""),
        ("太长？", "第一，"),
        ("不收？", ""),
        ("想过？", "想好了。"),
        ("最后？", "好。"),
        ("好的？", "好。\n\n---\n\n### 再说\n- 一"),
        *[("", "")] * 3,
    ]
    assert "asked:   7 questions, 3 skipped (not a text 1, empty 1, no text in the field 1)" in done.stdout
    for flaw in ("answers: 10", "without a question 3", "empty 1", "cut off 1", "refused (refused with status 400) 1"):
        assert flaw in done.stdout


@pytest.mark.parametrize("here", [True, False])
def test_another_model_under_the_same_name_is_asked_anew(tmp_path: Path, here: bool):
    """The server tells where its model lies; where that is not on this machine, results/sft_model counts."""
    folder = tmp_path / "r" / "sft_model" if not here else tmp_path / "merged"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"first")
    root = str(folder) if here else "/far/away"
    models = answers(json.dumps({"data": [{"id": "tuned", "object": "model", "root": root}]}))
    flags = ["--questions", asked_in(tmp_path, QUESTIONS[:3]), "--results", tmp_path / "r"]
    for text, calls in [("甲", 3), ("甲", 0), ("乙", 3)]:
        if text == "乙":
            (folder / "model.safetensors").write_bytes(b"again")
        done, bodies = play(lambda body, before, text=text: says(text), *flags, models=models)
        assert done.returncode == 0 and len(bodies) == calls, done.stderr
        assert [answer for _, answer in saved(tmp_path / "r" / "outputs")] == [text] * 3
    elsewhere = answers(json.dumps({"data": [{"id": "tuned", "object": "model", "root": "/another/model"}]}))
    done, bodies = play(lambda body, before: says("丙"), *flags, models=elsewhere)
    assert done.returncode == 0 and len(bodies) == 3


@pytest.mark.parametrize("what", ["a folder of other things", "a file", "the SFT data", "."])
def test_what_is_no_outputs_is_never_replaced(tmp_path: Path, engine: Engine, what: str):
    place = {"the SFT data": tmp_path / "r" / "sft_data", ".": "."}.get(what, tmp_path / "mine")
    if what == "a folder of other things":
        place.mkdir()
        (place / "thesis.txt").write_text("years of work")
    elif what == "a file":
        place.write_text("years of work")
    elif what == "the SFT data":
        outputs_in(place, ["一？"], "甲")
    flags = ["--questions", asked_in(tmp_path, QUESTIONS[:3]), "--results", tmp_path / "r", "--api-base", engine.api]
    done = run("inference.py", *flags, "--outputs", place)
    assert says_one_line(done, f"--outputs {str(place)!r}", "another folder")
    assert what != "the SFT data" or saved(place) == [("一？", "甲")]
    assert what != "a folder of other things" or (place / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # outputs made before are replaced
        assert run("inference.py", *flags, "--outputs", tmp_path / "new").returncode == 0


def test_the_test_split_of_the_bundled_corpus_is_asked_from_any_folder(engine: Engine, tmp_path: Path):
    command = [sys.executable, ROOT / "inference.py", "--api-base", engine.api, "--outputs", "mine/outputs"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = datasets.load_from_disk(ROOT / "DailyM")["test"]["question"][:]
    assert [question for question, _ in saved(tmp_path / "mine" / "outputs")] == asked


def test_questions_may_stand_one_a_line(tmp_path: Path):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeff一是什么？\r\n\r\n二是什么？\n", encoding="utf-8")
    done, _ = play(lambda body, before: says("好。"), "--questions", path, "--results", tmp_path / "r")
    assert done.returncode == 0 and saved(tmp_path / "r" / "outputs") == [
        ("一是什么？", "好。"),
        ("二是什么？", "好。"),
    ]


def test_a_server_that_refuses_every_question_ends_in_one_line(tmp_path: Path):
    done, _ = play(
        lambda body, before: refuses(400, "maximum context length is 8"),
        *("--questions", asked_in(tmp_path, QUESTIONS[:3]), "--results", tmp_path / "r"),
    )
    assert says_one_line(done, "refused every question", "too long", "--answer-max-tokens")
    assert not (tmp_path / "r" / "outputs").exists()


def test_a_server_that_refuses_most_questions_ends_in_one_line_before_the_end(tmp_path: Path):
    done, bodies = play(
        lambda body, before: refuses(400, "maximum context length is 8"),
        *("--questions", asked_in(tmp_path, [f"{n}？" for n in range(1000)]), "--results", tmp_path / "r"),
    )
    assert says_one_line(done, "refused", "requests (context too long for the model", "larger window")
    assert len(bodies) < 1900 and not (tmp_path / "r" / "outputs").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--corpus", "qa_examples.jsonl", "--question-field", "q"],
            ["no field 'q'", "--question-field", "--questions"],
        ),
        (["--questions", "no.txt"], ["--questions", "no.txt"]),
    ],
)
def test_what_a_user_can_mend_is_one_line(engine: Engine, tmp_path: Path, flags: list[str], parts: list[str]):
    assert says_one_line(run("inference.py", "--api-base", engine.api, "--results", tmp_path / "r", *flags), *parts)
