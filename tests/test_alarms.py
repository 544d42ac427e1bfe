"""A run that goes wrong says so in its first minute."""

import asyncio
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from scripted_server import Behaviour, ScriptedServer, hangs, says

from augcon.data import Request
from augcon.errors import UserError
from augcon.llm import servers
from augcon.llm.client import LLM, Endpoint
from augcon.llm.store import Store
from augcon.method.ask import ask_until_parsed
from augcon.run.record import ScorerFacts
from augcon.text.parse import Improvable, Unparseable
from step2_scorer import print_accuracy

JUNK = "As a helpful assistant, I am happy to talk about anything that you like."
GOOD = "Question: What does the fox see?\nContext 1: The fox sees.\nContext 2: The dog sleeps."


async def run(server: ScriptedServer, script: str, *flags: object, limit: float = 60) -> tuple[int, str, str, float]:
    """A script asks the server: status, what it prints, and after how many seconds it ends."""
    command = (sys.executable, "-P", ROOT / script, "--api-base", server.url, *map(str, flags))
    pipe, began = asyncio.subprocess.PIPE, time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=pipe, stderr=pipe, env={**clean_environment(), "PYTHONPATH": str(ROOT)}
    )
    out, err = await asyncio.wait_for(process.communicate(), limit)
    return process.returncode or 0, out.decode(), err.decode(), time.monotonic() - began


@pytest.mark.parametrize("split", ["rewrite", "focus"])
def test_a_server_that_answers_junk_is_not_asked_for_long(tmp_path: Path, split: str):
    async def main() -> None:
        async with ScriptedServer(lambda body, before: says(JUNK)) as server:
            status, _, err, seconds = await run(server, "step1_gen_q.py", "--results", tmp_path, "--split", split)
            assert status == 1 and "Traceback" not in err
            said = err.strip().split("\n")[-1]
            assert re.match(r"error: \d+ of the first \d+ replies are of no use \(no question \d+\), such as ", said)
            assert JUNK in said and "--structured-output" in said and "model" in said
            assert len(server.bodies) < 200 and seconds < 30

    asyncio.run(main())


def test_once_the_server_is_mended_the_same_command_goes_on(tmp_path: Path):
    async def main() -> None:
        reply = JUNK

        def script(body: dict[str, object], before: int) -> Behaviour:
            return says(reply)

        async with ScriptedServer(script) as server:
            flags = ("--results", tmp_path, "--negatives", 0, "--max-passes", 1)
            assert (await run(server, "step1_gen_q.py", *flags))[0] == 1
            reply = GOOD
            status, out, err, _ = await run(server, "step1_gen_q.py", *flags)
            assert status == 0, err
            assert int(re.search(r"in flight\), (\d+) replayed", out)[1]) < 20  # what was under way at the end

    asyncio.run(main())


def play(store: Path, script: Callable[..., Behaviour], use: Callable[[LLM], Awaitable[None]], **how: float) -> None:
    """Uses a client of a scripted server."""

    async def main() -> None:
        with Store(store) as kept:
            async with ScriptedServer(script) as server, LLM(Endpoint(server.url, **how), kept) as llm:
                await llm.connect("model")
                await use(llm)

    asyncio.run(asyncio.wait_for(main(), 30))


def request(number: int) -> Request:
    return Request([{"role": "user", "content": f"{number}"}], 0, 10)


@pytest.mark.parametrize(("bad", "error"), [(0.5, Unparseable), (1.0, Unparseable), (1.0, Improvable)])
def test_only_a_model_whose_replies_are_hardly_ever_of_use_is_stopped(
    tmp_path: Path, bad: float, error: type[Exception]
):
    chance = random.Random(1)

    def parse(reply: str) -> str:
        if chance.random() < bad:
            raise error("no question")
        return reply

    async def use(llm: LLM) -> None:
        asks = (ask_until_parsed(llm.ask, request(number), 4, parse) for number in range(100))
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert any(isinstance(outcome, UserError) for outcome in outcomes) == (bad == 1 and error is Unparseable)

    play(tmp_path / "store", lambda body, before: says("reply"), use)


def test_a_server_that_never_answers_is_told_of_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(servers, "_SILENCE", 0.5)
    monkeypatch.setattr(servers, "READING", 0.1)

    def script(body: dict[str, object], before: int) -> Behaviour:
        return hangs if not before else says("at last")

    async def use(llm: LLM) -> None:
        replies = await asyncio.gather(*(llm.ask(request(number)) for number in range(3)))
        assert [reply.text for reply in replies] == ["at last"] * 3

    play(tmp_path / "store", script, use, request_timeout=2)
    silent, *others = [line for line in capsys.readouterr().out.split("\n") if line]
    assert re.fullmatch(
        r"server:  no reply since \d\d:\d\d:\d\d, with 3 requests under way; each is waited for 2 s "
        r"\(--request-timeout\)",
        silent,
    )
    assert any("answers again" in line or "replies come again" in line for line in others), others


def test_an_outage_is_told_with_its_beginning_its_reason_and_how_long_it_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async def main() -> None:
        with Store(tmp_path / "store") as kept:
            async with (
                ScriptedServer(lambda body, before: says("yes")) as server,
                LLM(Endpoint(server.url), kept) as llm,
            ):
                await llm.connect("model")
                await server.go()
                ask = asyncio.create_task(llm.ask(request(1)))
                await asyncio.sleep(2)
                said = r"has not answered since \d\d:\d\d:\d\d \(.+\); waiting for it until \d\d:\d\d:\d\d\n"
                assert re.search(said, capsys.readouterr().out)
                await server.come()
                assert (await ask).text == "yes"

    asyncio.run(asyncio.wait_for(main(), 30))
    assert re.search(r"answers again after \d+ s", capsys.readouterr().out)


def test_a_scorer_that_is_no_better_than_a_coin_is_told_of(capsys: pytest.CaptureFixture[str]):
    def printed(pairs: int, right: float) -> str:
        shares = {"all": (pairs, right)}
        print_accuracy(ScorerFacts("base", "digest", "none", shares, shares, ""))
        return capsys.readouterr().out

    assert "no better than chance (0.500; it would take 0.567)" in printed(150, 0.5)
    assert "no better" in printed(20, 0.65) and "no better" not in printed(200, 0.65)
    assert "--scorer-model" in printed(150, 0.5) and "scorer_pairs" in printed(150, 0.5)
