"""Servers that fail, go and come back: nothing is lost, and hardly any time.

Time is that of a clock that leaps (see simulation.py) where it counts.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT
from faulty import Faulty as FaultyServer
from scripted_server import Behaviour, ScriptedServer, answers, says
from simulation import SlotServer, now, simulate, spread
from test_alarms import run
from test_in_flight import ask_all, status, steady

from augcon.data import Request
from augcon.errors import UserError
from augcon.llm.client import LLM, Endpoint
from augcon.llm.store import Store

PROBE = '"content": "1"'


class Faulty(SlotServer):
    """Of a thousand tries, 20 end in status 500, 10 in 429, and 3 never."""

    def __init__(self, slots: int, mean: float, tells: bool, retry_after: str | None = None) -> None:
        super().__init__(lambda _: slots, lambda asked: spread(asked, mean), tells)
        self.headers = {"retry-after": retry_after} if retry_after else {}
        self.tries = Counter[str]()

    async def post(self, path: str, *, body: dict[str, Any], cast_to: type[str]) -> str:
        asked = json.dumps(body["messages"])
        self.tries[asked] += 1
        place = int(1000 * spread(f"{self.tries[asked]}: {asked}", 1) - 500)
        if place < 20:
            raise status(500)
        if place < 30:
            refusal = status(429)
            refusal.response.headers.update(self.headers)
            raise refusal
        if place < 33:
            await asyncio.Event().wait()
        return await super().post(path, body=body, cast_to=cast_to)


@pytest.mark.parametrize(("tells", "retry_after"), [(True, None), (False, "1")])
def test_faults_cost_hardly_more_time_than_they_are_frequent(tells: bool, retry_after: str | None):
    undisturbed = simulate(ask_all(steady(64, 1, tells), 3_000))
    run = simulate(ask_all(Faulty(64, 1, tells, retry_after), 3_000))
    assert undisturbed.seconds / run.seconds > 0.9
    assert len(run.ends) == 3_000 and run.counts["retries: status 500"] > 30


class Away(SlotServer):
    """Is away from 20 seconds until ``back``. ``silent``: nothing is said of it, and what was under way never comes."""

    def __init__(self, back: float, silent: bool, tells: bool) -> None:
        super().__init__(lambda _: 64, lambda asked: 0.05 if PROBE in asked else spread(asked, 1), tells)
        self.back, self.silent = back, silent
        self.probes = 0

    async def post(self, path: str, *, body: dict[str, Any], cast_to: type[str]) -> str:
        if not 20 <= now() < self.back:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(20 if now() < 20 else None):
                    return await super().post(path, body=body, cast_to=cast_to)
        self.probes += PROBE in json.dumps(body["messages"])
        if self.silent:
            await asyncio.Event().wait()
        raise status(502)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("seconds", "silent"), [(15, False), (15, True), (120, True)])
def test_a_server_that_comes_back_is_busy_again_within_two_seconds(seconds: int, silent: bool, tells: bool):
    fake = Away(20 + seconds, silent, tells)
    run = simulate(ask_all(fake, 2_400))
    assert len(run.ends) == 2_400
    assert run.rate(fake.back + 2, fake.back + 12) > 0.9 * 64
    assert seconds - 12 <= fake.probes <= seconds + 1  # one a second, for all


# Over real connections


def small_corpus(folder: Path) -> Path:
    articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:4]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"article": article}) + "\n" for article in articles), encoding="utf-8")
    return corpus


def files(results: Path, *names: str) -> dict[str, bytes]:
    return {name: (results / name).read_bytes() for name in names}


def test_whatever_the_server_does_steps_1_and_3_make_what_they_make_of_a_good_one(tmp_path: Path):
    corpus = small_corpus(tmp_path)
    made: list[dict[str, Any]] = []

    async def both(results: Path, share: int, seed: int) -> FaultyServer:
        async with FaultyServer(share, seed=seed) as server:
            step1 = ("--corpus", corpus, "--negatives", 0, "--request-timeout", 3, "--results", results)
            status, _, err, _ = await run(server, "step1_gen_q.py", *step1, limit=250)
            assert status == 0, err
            (results / "filtered_queries.json").write_bytes((results / "queries.json").read_bytes())
            step3 = ("--negatives", 0, "--request-timeout", 3, "--results", results)
            status, _, err, _ = await run(server, "step3_gen_a.py", *step3, limit=250)
            assert status == 0, err
            names = ("nodes.jsonl", "queries.json", "sft_origins.jsonl", "dropped_queries.jsonl")
            made.append({**files(results, *names), "data": datasets.load_from_disk(results / "sft_data").to_dict()})
            return server

    good = asyncio.run(both(tmp_path / "good", 0, 0))
    bad = asyncio.run(both(tmp_path / "bad", 60, 1))
    assert made[0] == made[1]
    assert bad.asked.keys() == good.asked.keys() and bad.met.total() > 40
    assert bad.asked.total() - good.asked.total() <= 2 * bad.met.total()  # only what met trouble, and what it delayed


def lists(name: str, root: str) -> Behaviour:
    return answers(json.dumps({"data": [{"id": name, "object": "model", "root": root}]}))


@pytest.mark.parametrize("listing", [lists("other", "/other"), lists("model", "/other")])
def test_a_server_that_comes_back_with_another_model_is_refused(tmp_path: Path, listing: Behaviour):
    """Also one that answers to every name, as llama.cpp does."""

    async def main() -> None:
        with Store(tmp_path / "store") as store:
            before = ScriptedServer(lambda body, _: says("mine"), models=lists("model", "/first"))
            after = ScriptedServer(lambda body, _: says("other"), models=listing)
            async with before, LLM(Endpoint(before.url), store) as llm:
                await llm.connect("model")
                request = Request([{"role": "user", "content": "x"}], 0, 10)
                assert (await llm.ask(request)).text == "mine"
                await before.go()
                asks = asyncio.gather(
                    *(llm.ask(dataclasses.replace(request, sample=n)) for n in range(1, 5)), return_exceptions=True
                )
                await asyncio.sleep(1.5)
                after._port = before._port
                async with after:
                    errors = await asyncio.wait_for(asks, 10)
                assert all(isinstance(error, UserError) for error in errors)
                assert "another model" in str(errors[0]) or "does not serve 'model'" in str(errors[0])

    asyncio.run(main())
