"""The client of the LLM: limits, retries, outages, what is refused, and order, against a scripted server."""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import functools
import gzip
import itertools
import json
import random
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from augcon.data import Refused, Reply, Request
from augcon.errors import UserError
from augcon.llm import client as llm_module
from augcon.llm.client import LLM, STRIKES, Endpoint
from augcon.llm.servers import LARGEST
from augcon.llm.store import Store
from augcon.ordered import map_in_order
from augcon.text.units import clean
from tests.scripted_server import (
    Behaviour,
    ScriptedServer,
    answers,
    babbles,
    cuts,
    cuts_midway,
    drips,
    hangs,
    prompt_of,
    refuses,
    reply_body,
    says,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "replies.sqlite") as store:
        yield store


def play(main: Coroutine[Any, Any, None], limit: float = 20) -> None:
    """Runs a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(main, limit))


@contextlib.asynccontextmanager
async def connected(server: ScriptedServer, store: Store, **changes: Any) -> AsyncIterator[LLM]:
    """A client of the scripted server."""
    async with LLM(Endpoint(server.url, **changes), store) as llm:
        await llm.connect("model")
        yield llm


def request(prompt: str, **changes: Any) -> Request:
    return dataclasses.replace(
        Request([{"role": "user", "content": prompt}], temperature=0.5, max_tokens=10), **changes
    )


async def outcome(awaitable: Awaitable[Any]) -> Any:
    """What it returns or raises."""
    return (await asyncio.gather(awaitable, return_exceptions=True))[0]


async def reply_or_refusal(llm: LLM, prompt: object) -> Reply | Refused:
    try:
        return await llm.ask(request(str(prompt)))
    except Refused as error:
        return error


def echo(body: dict[str, Any], before: int) -> Behaviour:
    """The script of a server in good health."""
    return says("re: " + prompt_of(body))


def always(behaviour: Behaviour) -> Any:
    return lambda body, before: behaviour


def retries(llm: LLM) -> dict[str, int]:
    return {name.removeprefix("retries: "): n for name, n in llm.counts.items() if name.startswith("retries: ")}


# Many at once


def test_results_come_in_order_whatever_the_timing(store: Store):
    async def main() -> None:
        delays = random.Random(1)
        script = lambda body, before: says("re: " + prompt_of(body), after=delays.uniform(0, 0.05))  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=32) as llm:
            prompts = [f"question {n}" for n in range(300)]
            replies = [reply.text async for _, reply in map_in_order(llm.ask, map(request, prompts), lambda: 64)]
        assert replies == ["re: " + prompt for prompt in prompts]

    play(main())


def test_as_many_requests_are_in_flight_as_allowed_and_never_more(store: Store):
    async def main() -> None:
        script = always(says("x", after=0.2))
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=40) as llm:
            asks = [asyncio.ensure_future(llm.ask(request(f"{n}"))) for n in range(400)]
            most = 0
            while not all(ask.done() for ask in asks):
                most = max(most, llm.in_flight)
                await asyncio.sleep(0.01)
            assert most == server.most_under_way == 40
            assert llm.in_flight == 0
            assert llm.counts["calls"] == 400
            assert (llm.counts["prompt tokens"], llm.counts["reply tokens"]) == (400 * 7, 400 * 3)

    play(main())


def test_in_flight_is_0_again_after_failures_and_cancellation(store: Store):
    async def main() -> None:
        script = lambda body, before: hangs if prompt_of(body) == "hang" else refuses(401)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            hanging = asyncio.ensure_future(llm.ask(request("hang")))
            await outcome(llm.ask(request("refused")))
            assert llm.in_flight == 1
            hanging.cancel()
            await outcome(hanging)
            assert llm.in_flight == 0

    play(main())


# What passes is tried again

PASSING: dict[str, tuple[Behaviour, str]] = {
    **{f"status {status}": (refuses(status), f"status {status}") for status in (408, 409, 429, 500, 502, 503, 504)},
    "hangs": (hangs, "timeout"),
    "drips": (drips, "timeout"),
    "a queue": (refuses(503, "The queue is too long, it took too long"), "status 503"),
    "cuts": (cuts, "connection lost"),
    "cuts midway": (cuts_midway, "connection lost"),
    "no HTTP": (babbles, "connection lost"),
    "a proxy's page": (answers("<html>Bad gateway</html>", content_type="text/html"), "bad reply"),
    "a page called JSON": (answers("<html>Bad gateway</html>"), "bad reply"),
    "half a JSON": (answers('{"choices": [{"me'), "bad reply"),
    "no UTF-8": (answers(b'{"choices": "\xff\xfe"}'), "bad reply"),
    "nothing": (answers(""), "bad reply"),
    "no object": (answers("[1]"), "bad reply"),
    "null": (answers("null"), "bad reply"),
    "no choices": (answers('{"choices": []}'), "bad reply"),
    "null choices": (answers('{"choices": null}'), "bad reply"),
    "an error with status 200": (answers('{"error": {"message": "busy"}}'), "bad reply"),
    "too long a body": (answers(json.dumps(reply_body("x" * LARGEST))), "bad reply"),
    "a small body that grows": (
        answers(gzip.compress(json.dumps(reply_body("x" * 3_000_000)).encode()), headers={"Content-Encoding": "gzip"}),
        "bad reply",
    ),
    "nested deep": (answers('{"choices": ' + "[" * 200_000), "bad reply"),
    "a list for the end": (answers(json.dumps(reply_body("x", []))), "bad reply"),  # type: ignore[arg-type]
    **{
        f"usage {usage}": (answers(json.dumps({**reply_body("x"), "usage": usage})), "bad reply")
        for usage in (["x"], "x", {"prompt_tokens": "7"}, {"completion_tokens": [7]}, {"prompt_tokens": -7.5})
    },
    "usage infinite": (answers(json.dumps(reply_body("x")).replace(": 7", ": 1e999")), "bad reply"),
    "a number for content": (answers(json.dumps(reply_body(5))), "bad reply"),  # type: ignore[arg-type]
}


def test_what_passes_is_tried_again_and_counted_by_kind(store: Store):
    async def main() -> None:
        script = lambda body, before: echo(body, 0) if before else PASSING[prompt_of(body)][0]  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, request_timeout=0.5) as llm:
            started = time.monotonic()
            outcomes = await asyncio.gather(*(outcome(llm.ask(request(name))) for name in PASSING))
            assert time.monotonic() - started < 3.5  # the deadline, a back-off of at most 1.5 s, and the reply
        for name, got in zip(PASSING, outcomes, strict=True):
            assert got == Reply("re: " + name, complete=True), name
        assert retries(llm) == Counter(kind for _, kind in PASSING.values())
        assert llm.counts["calls"] == 2 * len(PASSING)

    play(main())


def in_3_seconds() -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3), usegmt=True)


RETRY_AFTER = {  # header: (at least, below) seconds until the next try
    "0.05": (0.05, 0.45),
    "1": (1, 1.4),
    "in 3 seconds": (1.9, 3.4),
    "Thu, 01 Jan 1970 00:00:00 GMT": (0.5, 1.9),  # long past: the usual back-off
    "Thu, 01 Jan 99999999999 00:00:00 GMT": (0.5, 1.9),
    "soon": (0.5, 1.9),
    "nan": (0.5, 1.9),
    "-7": (0.5, 1.9),
    "86400": (3, 3.6),  # never beyond server_wait
    "inf": (3, 3.6),
}


def test_tries_are_spaced_ever_further_apart_or_as_the_server_asks(store: Store):
    async def main() -> None:
        headers: dict[str, str | None] = {**{name: name for name in RETRY_AFTER}, "in 3 seconds": in_3_seconds()}
        headers["none"] = None

        def script(body: dict[str, Any], before: int) -> Behaviour:
            failures = 2 if prompt_of(body) == "none" else 1
            return refuses(429, retry_after=headers[prompt_of(body)]) if before < failures else echo(body, before)

        async with ScriptedServer(script) as server, connected(server, store, server_wait=3) as llm:
            outcomes = await asyncio.gather(*(outcome(llm.ask(request(name))) for name in headers))
        assert [reply for reply in outcomes if not isinstance(reply, Reply)] == []
        times: dict[str, list[float]] = {name: [] for name in headers}
        for body, at in zip(server.bodies, server.times, strict=True):
            times[prompt_of(body)].append(at)
        waits = {name: [b - a for a, b in itertools.pairwise(at)] for name, at in times.items()}
        first, second = waits.pop("none")
        assert 0.5 <= first < 1.9 and 1 <= second < 2.4
        for name, (at_least, below) in RETRY_AFTER.items():
            assert len(waits[name]) == 1 and at_least <= waits[name][0] < below, name

    play(main())


# What cannot succeed is not tried again


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (refuses(401), ["refuses the key", "AUGCON_API_KEY"]),
        (refuses(403), ["refuses the key", "AUGCON_API_KEY"]),
        (refuses(404, "The model `model` does not exist.", "model_not_found"), ["'model', 'other'", "--api-model"]),
        (refuses(400, "Unrecognized request argument: seed"), ["status 400", "seed"]),
        (refuses(422, "regex not supported"), ["status 422", "regex not supported"]),
        (answers('{"detail": "no such\\n field"}', 422), ["no such field"]),
        (answers('{"error": "top_k is unknown"}', 400), ["top_k is unknown"]),
        (refuses(429, "You exceeded your current quota", "insufficient_quota"), ["used up", "exceeded"]),
        (refuses(402, "Insufficient Balance"), ["status 402", "Balance"]),
    ],
)
def test_what_no_request_can_get_is_said_at_once_in_one_line(store: Store, refusal: Behaviour, words: list[str]):
    async def main() -> None:
        async with (
            ScriptedServer(always(refusal), models=("model", "other")) as server,
            connected(server, store) as llm,
        ):
            error = await outcome(llm.ask(request("x")))
            assert isinstance(error, UserError)
            assert all(word in str(error) for word in words) and "\n" not in str(error)
            neutral = [body for body in server.bodies if prompt_of(body) == "1"]  # is it this request, or all?
            assert len(server.bodies) - len(neutral) == 1 >= len(neutral) and not retries(llm)

    play(main())


def test_one_bad_request_at_the_start_does_not_end_the_run(store: Store):
    def filtered(body: dict[str, Any], before: int) -> Behaviour:
        bad = prompt_of(body) == "bad"
        return refuses(400, "inappropriate content", "data_inspection_failed") if bad else says("fine", after=0.2)

    async def main() -> None:
        async with ScriptedServer(filtered) as server, connected(server, store) as llm:
            prompts = ("bad", "one", "two")
            bad, *others = await asyncio.gather(*(outcome(llm.ask(request(prompt))) for prompt in prompts))
            assert isinstance(bad, Refused) and [reply.text for reply in others] == ["fine", "fine"]

    play(main())


def test_the_proxies_of_the_environment_are_not_asked_for_this_machine(store: Store, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def main() -> None:
        async with ScriptedServer(echo) as server, connected(server, store) as llm:
            assert isinstance(await llm.ask(request("x")), Reply)

    play(main())


@pytest.mark.parametrize("reason", ["length", "abort", "content_filter"])
def test_a_reply_that_was_cut_off_is_not_complete(store: Store, reason: str):
    async def main() -> None:
        async with ScriptedServer(always(says("half a", reason))) as server, connected(server, store) as llm:
            assert await llm.ask(request("x")) == Reply("half a", complete=False)

    play(main())


def test_a_missing_endpoint_is_not_called_a_missing_model(store: Store):
    async def main() -> None:
        nowhere = answers("404: Not Found", 404, "text/plain")
        async with ScriptedServer(always(nowhere)) as server, connected(server, store, completions=True) as llm:
            error = await outcome(llm.ask(request("x")))
            assert isinstance(error, UserError)
            assert "/completions" in str(error) and "does not serve" not in str(error)

    play(main())


TOO_LONG = [
    # vLLM, by age
    "This model's maximum context length is 4096 tokens. However, you requested 5120 tokens "
    "(4096 in the messages, 1024 in the completion). Please reduce the length of the messages or completion.",
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096. "
    "Make sure that `max_model_len` is no smaller than the number of text tokens.",
    "'max_tokens' or 'max_completion_tokens' is too large: 2000. This model's maximum context length is 4096 tokens "
    "and your request has 2104 input tokens (2000 > 4096 - 2104).",
    "max_tokens=4096 cannot be greater than max_model_len=2048. Please request fewer output tokens.",
    # llama.cpp, SGLang, TGI, Gemini
    "the request exceeds the available context size. try increasing the context size or enable context shift",
    "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
    "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
]


def test_a_context_too_long_is_refused_for_that_request_only(store: Store):
    async def main() -> None:
        bodies = {message: refuses(400, message) for message in TOO_LONG}
        bodies["by code"] = refuses(400, "Please reduce the length of the messages.", "context_length_exceeded")
        bodies["by status"] = answers("Payload Too Large", 413, "text/plain")
        bodies["old vLLM"] = answers(json.dumps({"object": "error", "message": TOO_LONG[0], "code": 40303}), 400)
        bodies["TGI"] = answers(json.dumps({"error": TOO_LONG[6], "error_type": "validation"}), 422)
        bodies["Anthropic"] = refuses(400, "prompt is too long: 210000 tokens > 200000 maximum")
        bodies["xinference"] = answers(json.dumps({"detail": TOO_LONG[1]}), 500)
        script = lambda body, before: bodies.get(prompt_of(body)) or echo(body, before)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            for name in bodies:
                error = await outcome(llm.ask(request(name)))
                assert isinstance(error, Refused) and "too long" in str(error), name
            assert len(server.bodies) == 2 * len(bodies)  # each once more, without max_tokens
            assert (await llm.ask(request("short"))).text == "re: short"

    play(main())


def test_where_the_reply_could_be_too_long_the_rest_of_the_window_is_used(store: Store):
    def script(body: dict[str, Any], before: int) -> Behaviour:
        too_long = prompt_of(body) == "too long" or body.get("max_tokens", 0) > 10
        bad = prompt_of(body) == "bad"
        return refuses(400, TOO_LONG[0]) if too_long else refuses(400) if bad else echo(body, before)

    async def main() -> None:
        async with ScriptedServer(script) as server:
            async with connected(server, store) as llm:
                assert (await llm.ask(request("x", max_tokens=4096))).text == "re: x"
                for prompt in ("bad", "too long"):
                    assert isinstance(await outcome(llm.ask(request(prompt, max_tokens=4096))), Refused)
                assert [body.get("max_tokens") for body in server.bodies if prompt_of(body) == "x"] == [4096, None]
            async with connected(server, store) as llm:
                assert (await llm.ask(request("x", max_tokens=4096))).text == "re: x"
                assert (llm.counts["replayed"], llm.counts["calls"]) == (1, 0)
            async with connected(server, store, completions=True) as llm:  # 16 tokens would be the limit there
                assert isinstance(await outcome(llm.ask(request("x", max_tokens=4096))), Refused)
                assert llm.counts["calls"] == 1

    play(main())


@pytest.mark.parametrize("in_flight", [1, 32])
def test_a_run_in_which_most_requests_are_refused_ends_soon(store: Store, in_flight: int):
    async def main() -> None:
        bad = refuses(400, TOO_LONG[0])
        script = lambda body, before: bad if int(prompt_of(body)) % 5 else echo(body, before)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=in_flight) as llm:
            outcomes = map_in_order(functools.partial(reply_or_refusal, llm), range(1000), lambda: 2 * in_flight)
            with pytest.raises(UserError, match=r"refused [\d,]+ of [\d,]+ .*too long.*\).*--max-length") as caught:
                async for _ in outcomes:
                    pass
            assert "\n" not in str(caught.value) and len(server.bodies) < 400

    play(main())


def test_a_run_goes_on_while_most_of_its_requests_end_in_a_reply_or_may_yet(store: Store):
    async def main() -> None:
        bad = refuses(400, TOO_LONG[0])
        script = lambda body, before: bad if int(prompt_of(body)) % 3 == 0 else says("x", after=0.3)  # noqa: E731
        async with ScriptedServer(script) as server:
            for _ in range(2):  # the second has the refused ones left over
                async with connected(server, store, max_in_flight=32) as llm:
                    outcomes = map_in_order(functools.partial(reply_or_refusal, llm), range(150), lambda: 64)
                    ended = [each async for _, each in outcomes]
                assert sum(isinstance(each, Refused) for each in ended) == 50
            assert llm.counts["replayed"] == 100

    play(main())


def test_a_run_goes_on_where_the_halves_of_what_is_refused_are_answered(store: Store):
    async def halved(llm: LLM, number: int) -> list[Reply | Refused]:
        assert isinstance(await reply_or_refusal(llm, f"{number} whole"), Refused)
        return await asyncio.gather(*(reply_or_refusal(llm, f"{number} half {half}") for half in (1, 2)))

    async def main() -> None:
        bad = refuses(400, TOO_LONG[0])
        script = lambda body, before: bad if "whole" in prompt_of(body) else says("x", after=0.1)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=32) as llm:
            halves = [
                each async for _, each in map_in_order(functools.partial(halved, llm), range(100), llm.servers.room)
            ]
        assert halves == [[Reply("x", True)] * 2] * 100

    play(main())


def test_a_400_after_others_with_the_same_parameters_succeeded_is_refused_for_that_request_only(store: Store):
    def script(body: dict[str, Any], before: int) -> Behaviour:
        bad = prompt_of(body) == "bad" or "structured_outputs" in body
        return refuses(400) if bad else echo(body, before)

    async def main() -> None:
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            await llm.ask(request("good"))
            assert isinstance(await outcome(llm.ask(request("bad"))), Refused)
            assert isinstance(await outcome(llm.ask(request("bad", pattern="a+"))), UserError)  # other parameters
            await llm.ask(request("good still"))
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            await llm.ask(request("good"))  # a reply from the store proves as much
            assert isinstance(await outcome(llm.ask(request("bad"))), Refused)
            assert len(server.bodies) == 1

    play(main())


# One bad request, or no server


def test_a_request_that_always_fails_is_given_up_and_the_rest_goes_on(store: Store):
    async def main() -> None:
        bad = refuses(500, retry_after="0.1")
        script = lambda body, before: bad if prompt_of(body) == "bad" else says("fine", after=0.02)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=3) as llm:
            prompts = ["bad", *(f"good {n}" for n in range(120))]
            outcomes = await asyncio.gather(*(outcome(llm.ask(request(prompt))) for prompt in prompts))
            assert isinstance(outcomes[0], Refused) and "500" in str(outcomes[0])
            assert [reply.text for reply in outcomes[1:]] == ["fine"] * 120
            assert [prompt_of(body) for body in server.bodies].count("bad") == STRIKES

    play(main())


@pytest.mark.parametrize("completions", [False, True])
def test_a_request_that_always_fails_is_given_up_also_when_it_is_the_last(store: Store, completions: bool):
    """Nobody else succeeds meanwhile; were it an outage for the client, no run could ever end."""

    async def main() -> None:
        bad = refuses(500, retry_after="0.02")
        script = lambda body, before: bad if prompt_of(body) == "bad" else echo(body, before)  # noqa: E731
        async with (
            ScriptedServer(script) as server,
            connected(server, store, server_wait=2, completions=completions) as llm,
        ):
            assert isinstance(await outcome(llm.ask(request("bad"))), Refused)
            assert (await llm.ask(request("good"))).text == "re: good"
            assert sum(body["max_tokens"] == 1 for body in server.bodies) <= STRIKES

    play(main())


def test_a_server_that_fails_every_request_is_an_outage_not_many_bad_requests(store: Store):
    async def main() -> None:
        async with (
            ScriptedServer(always(refuses(500, "engine dead", retry_after="0.02"))) as server,
            connected(server, store, server_wait=0.6) as llm,
        ):
            outcomes = await asyncio.gather(*(outcome(llm.ask(request(f"{n}"))) for n in range(5)))
            assert all(isinstance(error, UserError) and "engine dead" in str(error) for error in outcomes), outcomes

    play(main())


def test_rate_limits_are_no_sign_of_a_bad_request(store: Store):
    async def main() -> None:
        def script(body: dict[str, Any], before: int) -> Behaviour:
            return refuses(429) if prompt_of(body) == "late" and before < 2 * STRIKES else says("x", after=0.005)

        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=2) as llm:
            prompts = ["late", *(f"{n}" for n in range(80))]
            replies = await asyncio.gather(*(llm.ask(request(prompt)) for prompt in prompts))
            assert len(replies) == 81 and retries(llm) == {"status 429": 2 * STRIKES}

    play(main())


def test_all_requests_succeed_after_an_outage(store: Store):
    async def main() -> None:
        script = lambda body, before: says("re: " + prompt_of(body), after=0.2)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store, max_in_flight=16) as llm:
            asks = [asyncio.ensure_future(llm.ask(request(f"{n}"))) for n in range(200)]
            while llm.counts["calls"] < 60 or llm.in_flight < 12:
                await asyncio.sleep(0.005)
            await server.go()
            assert not all(ask.done() for ask in asks)
            await asyncio.sleep(1.2)
            await server.come()
            assert [reply.text for reply in await asyncio.gather(*asks)] == [f"re: {n}" for n in range(200)]
            assert retries(llm)["connection lost"] >= 8

    play(main())


def test_a_server_gone_for_too_long_ends_the_run_and_loses_no_reply(store: Store):
    async def main() -> None:
        async with ScriptedServer(echo) as server, connected(server, store, server_wait=0.4) as llm:
            replies = map_in_order(llm.ask, (request(f"{n}") for n in itertools.count()), lambda: 8)
            for _ in range(50):
                await anext(replies)
            await server.go()
            started = time.monotonic()
            with pytest.raises(UserError, match="run the same command again") as caught:
                async for _ in replies:
                    pass
            assert time.monotonic() - started < 3 and "\n" not in str(caught.value)
            await server.come()
            async with connected(server, store) as again:
                replies = [
                    reply.text
                    async for _, reply in map_in_order(again.ask, (request(f"{n}") for n in range(50)), lambda: 8)
                ]
            assert replies == [f"re: {n}" for n in range(50)] and again.counts["calls"] == 0

    play(main())


def test_trouble_before_a_pause_is_not_counted_as_an_outage(store: Store):
    async def main() -> None:
        def script(body: dict[str, Any], before: int) -> Behaviour:
            return refuses(503) if not before else refuses(413) if prompt_of(body) == "bad" else echo(body, before)

        async with ScriptedServer(script) as server, connected(server, store, server_wait=0.3) as llm:
            assert isinstance(await outcome(llm.ask(request("bad"))), Refused)
            for prompt in ("good", "good too"):
                await asyncio.sleep(0.4)
                assert (await llm.ask(request(prompt))).text == "re: " + prompt

    play(main())


# Connecting


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "PATIENCE", 0.3)


@pytest.mark.usefixtures("impatient")
def test_no_server_is_said_after_some_patience(store: Store):
    async def main() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        for address in (nowhere, "127.0.0.1:8000/v1", "localhost", ""):
            started = time.monotonic()
            async with LLM(Endpoint(address or "http://[broken"), store) as llm:
                with pytest.raises(UserError, match="no server answered") as caught:
                    await llm.connect("model")
            assert "--api-base" in str(caught.value) and "\n" not in str(caught.value)
            assert time.monotonic() - started < 3

    play(main())


def test_a_server_that_was_started_just_before_is_waited_for(store: Store):
    async def main() -> None:
        async with ScriptedServer(echo) as server:
            await server.go()
            async with LLM(Endpoint(server.url), store) as llm:
                connecting = asyncio.create_task(llm.connect("model"))
                await asyncio.sleep(0.5)
                await server.come()
                assert await connecting == "model"

    play(main())


@pytest.mark.usefixtures("impatient")
def test_a_server_that_hangs_on_connecting_is_said_after_the_deadline(store: Store):
    async def main() -> None:
        async with (
            ScriptedServer(echo, models=hangs) as server,
            LLM(Endpoint(server.url, request_timeout=0.3), store) as llm,
        ):
            with pytest.raises(UserError, match="no server answered"):
                await llm.connect("model")

    play(main())


def test_the_model_is_found_or_those_on_offer_are_listed(store: Store):
    async def main() -> None:
        one, two = ScriptedServer(echo, models=("its name",)), ScriptedServer(echo, models=("first", "second"))
        async with one, two, LLM(Endpoint(one.url), store) as only, LLM(Endpoint(two.url), store) as several:
            assert await only.connect("Qwen/Qwen1.5-32B-Chat") == only.model == "its name"
            assert await several.connect("second") == "second"
            assert await several.connect("Qwen/Qwen1.5-32B-Chat", "first") == "first"
            for llm, model, api_model in ((several, "Qwen", ""), (several, "", ""), (only, "its name", "typo")):
                with pytest.raises(UserError, match="--api-model") as caught:
                    await llm.connect(model, api_model)
                assert all(repr(name) in str(caught.value) for name in llm.served)

    play(main())


@pytest.mark.parametrize(
    "listing",
    [
        refuses(403),  # a key that may ask, but not list
        refuses(404),
        refuses(405),
        refuses(503),
        answers("<html>", content_type="text/html"),
        answers("<html>"),
        answers("[]"),
        answers("null"),
        answers('{"data": null}'),
        answers('{"data": []}'),
        answers('{"data": [{}, null, "x"]}'),
        answers('{"data": [{"id": 5}, {"id": ["x"]}]}'),
        answers('{"data": ' + "[" * 200_000),
        answers('{"data": "x"}'),
    ],
)
def test_a_server_that_lists_no_models_is_used_all_the_same(store: Store, listing: Behaviour):
    async def main() -> None:
        async with ScriptedServer(echo, models=listing) as server, LLM(Endpoint(server.url), store) as llm:
            assert await llm.connect("mine") == "mine"
            await llm.ask(request("x"))
            assert server.bodies[0]["model"] == "mine"

    play(main())


def test_a_name_of_a_model_that_is_no_text_is_cleaned(store: Store):
    listing = answers(json.dumps({"data": [{"id": "mo\ud83ddel\n", "max_model_len": "long"}]}))

    async def main() -> None:
        async with ScriptedServer(echo, models=listing) as server, LLM(Endpoint(server.url), store) as llm:
            assert await llm.connect("mine") == "model\n"
            await llm.ask(request("x"))

    play(main())


def test_a_server_that_lists_no_models_and_has_none_of_that_name_is_told_on_connecting(store: Store):
    unknown = always(refuses(404, "The model `mine` does not exist"))

    async def main() -> None:
        nameless = ScriptedServer(unknown, models=answers("[]"), greets=False)
        async with nameless as server, LLM(Endpoint(server.url), store) as llm:
            with pytest.raises(UserError, match=r"'mine'.*--api-model"):
                await llm.connect("mine")

    play(main())


@pytest.mark.parametrize("known", [False, True])
def test_what_answers_with_a_page_to_everything_is_no_outage(store: Store, known: bool):
    page = answers("<html>Sign in</html>", content_type="text/html")

    async def main() -> None:
        async with ScriptedServer(always(page), models=page, greets=known) as server:
            async with LLM(Endpoint(server.url), store) as llm:
                if known:
                    await llm.connect("model")
            async with LLM(Endpoint(server.url), store) as llm:
                error = await outcome(llm.connect("model"))
                if known:
                    error = await outcome(llm.ask(request("x")))
                assert isinstance(error, UserError) and "\n" not in str(error)
                assert "Sign in" in str(error) and "--api-base" in str(error)

    play(main())


def test_a_refused_key_is_said_on_connecting(store: Store):
    async def main() -> None:
        refusal = refuses(401)
        async with (
            ScriptedServer(always(refusal), models=refusal, greets=False) as server,
            LLM(Endpoint(server.url), store) as llm,
        ):
            with pytest.raises(UserError, match="AUGCON_API_KEY"):
                await llm.connect("model")

    play(main())


# Several servers


@contextlib.asynccontextmanager
async def connected_to_all(*servers: ScriptedServer, store: Store, **changes: Any) -> AsyncIterator[LLM]:
    async with LLM(Endpoint(",".join(server.url for server in servers), **changes), store) as llm:
        await llm.connect("model")
        yield llm


def test_several_servers_share_the_work_and_one_that_goes_is_left_out_until_it_comes(store: Store):
    async def main() -> None:
        script = lambda body, before: says("re: " + prompt_of(body), after=0.05)  # noqa: E731
        one, two = ScriptedServer(script), ScriptedServer(script)
        async with one, two, connected_to_all(one, two, store=store, max_in_flight=32) as llm:  # so both get full

            async def ask_all(first: int, number: int) -> None:
                asked = range(first, first + number)
                replies = map_in_order(lambda n: llm.ask(request(f"{n}", root=n)), asked, llm.servers.room)
                assert [reply.text async for _, reply in replies] == [f"re: {n}" for n in asked]

            await ask_all(0, 200)
            assert len(one.bodies) > 50 < len(two.bodies)
            asking = asyncio.create_task(ask_all(200, 400))
            await asyncio.sleep(0.2)
            await two.go()
            await asking
            assert [server.up for server in llm.servers.all] == [True, False]
            await two.come()
            while not llm.servers.all[1].up:
                await asyncio.sleep(0.05)
            before = len(two.bodies)
            await ask_all(600, 100)
            assert len(two.bodies) > before + 20

    play(main(), 30)


@pytest.mark.usefixtures("impatient")
def test_a_server_of_several_that_is_not_there_at_the_start_is_waited_for_in_the_background(store: Store):
    async def main() -> None:
        one, two = ScriptedServer(echo), ScriptedServer(echo)
        async with one, two:
            await two.go()
            async with connected_to_all(one, two, store=store) as llm:
                assert (await llm.ask(request("x"))).text == "re: x"
                await two.come()
                while not llm.servers.all[1].up:
                    await asyncio.sleep(0.05)

    play(main())


def test_servers_of_which_one_has_another_model_are_refused(store: Store):
    async def main() -> None:
        one, two = ScriptedServer(echo), ScriptedServer(echo, models=("another",))
        async with one, two:
            with pytest.raises(UserError, match=r"does not serve 'model'.*'another'") as caught:
                async with connected_to_all(one, two, store=store):
                    pass
            assert two.url in str(caught.value)

    play(main())


# Never twice


def test_a_second_run_makes_no_calls_and_gets_the_same_replies(store: Store):
    async def main() -> None:
        texts = {"plain": "黄河\n之水", "null": None, "empty": "", "NUL": "a\0b", "long": "x" * 1_500_000}
        script = lambda body, before: says(texts[prompt_of(body)], "length" if prompt_of(body) == "long" else "stop")  # noqa: E731
        async with ScriptedServer(script) as server:
            async with connected(server, store) as llm:
                first = [await llm.ask(request(name)) for name in texts]
            async with connected(server, store) as llm:
                second = [await llm.ask(request(name)) for name in texts]
            assert first == second == [Reply(clean(text or ""), name != "long") for name, text in texts.items()]
            assert len(server.bodies) == llm.counts["replayed"] == len(texts) and llm.counts["calls"] == 0

    play(main())


def test_what_a_model_wrote_is_clean_text_also_where_an_earlier_version_kept_it(store: Store):
    async def main() -> None:
        body = json.dumps(reply_body("half a \ud83d smile\r\n\x00"))
        async with ScriptedServer(always(answers(body))) as server:
            async with connected(server, store) as llm:
                first = await llm.ask(request("x"))
                connection = sqlite3.connect(store._path)
                (kept,) = (row[0] for row in connection.execute("SELECT reply FROM replies") if "smile" in row[0])
                raw = (kept.replace("smile", "smile\\udc00"), kept)
                connection.execute("UPDATE replies SET reply = ? WHERE reply = ?", raw)
                connection.commit()
                connection.close()
            async with connected(server, store) as llm:
                assert await llm.ask(request("x")) == first
        assert first.text == "half a  smile\n"

    play(main())


@pytest.mark.parametrize(
    "body",
    [
        '{"choices": [{"finish_reason": "length", "message": {"role": "assistant"}}]}',  # all spent on thinking
        '{"choices": [{"finish_reason": "length", "message": {"content": null}}], "usage": null}',
        '{"choices": [{"finish_reason": "length", "message": {"content": ""}}], "usage": {"prompt_tokens": null}}',
    ],
)
def test_a_reply_without_content_is_an_empty_text(store: Store, body: str):
    async def main() -> None:
        async with ScriptedServer(always(answers(body))) as server, connected(server, store) as llm:
            assert await llm.ask(request("x")) == Reply("", complete=False)
            assert len(server.bodies) == 1

    play(main())


def test_whatever_differs_in_a_request_it_is_asked_anew(store: Store):
    async def main() -> None:
        async with ScriptedServer(echo, models=("model", "other")) as server:
            first = request("x")
            for model, changes, asked in [
                ("model", {}, [first] * 2),
                ("model", {}, [dataclasses.replace(first, temperature=0.6), dataclasses.replace(first, sample=1)]),
                ("model", {}, [request("y"), dataclasses.replace(first, messages=[*first.messages, *first.messages])]),
                ("model", {}, [dataclasses.replace(first, max_tokens=11), dataclasses.replace(first, end=("e",))]),
                ("model", {}, [dataclasses.replace(first, pattern="a+")]),
                ("model", {"seed": 1}, [first]),
                ("model", {"completions": True}, [first]),
                ("other", {}, [first]),
            ]:
                async with LLM(Endpoint(server.url, **changes), store) as llm:
                    await llm.connect(model)
                    for each in asked:
                        await llm.ask(each)
            assert len(server.bodies) == len({json.dumps(body) for body in server.bodies}) == 11
            assert server.bodies[0]["seed"] != server.bodies[2]["seed"]

    play(main())


def test_equal_requests_at_once_make_one_call_also_when_it_fails(store: Store):
    async def main() -> None:
        good = says("x", after=0.05)
        bad = answers('{"error": {"message": "no"}}', 400, after=0.1)
        script = lambda body, before: good if prompt_of(body) == "good" else bad  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            prompts = ["good", "bad"] * 10
            outcomes = await asyncio.gather(*(outcome(llm.ask(request(prompt))) for prompt in prompts))
            assert outcomes[::2] == [Reply("x", True)] * 10
            assert all(isinstance(error, Refused) for error in outcomes[1::2])
            assert len(server.bodies) == 2 and llm.counts["shared"] == 18

    play(main())


def test_who_shares_a_call_outlives_the_first_asker(store: Store):
    async def main() -> None:
        script = lambda body, before: says("x", after=0.1)  # noqa: E731
        async with ScriptedServer(script) as server, connected(server, store) as llm:
            asks = [asyncio.ensure_future(llm.ask(request("x"))) for _ in range(5)]
            await asyncio.sleep(0.05)
            asks[0].cancel()  # the asker
            asks[1].cancel()  # one who shares
            first, second, *rest = await asyncio.gather(*map(outcome, asks))
            assert isinstance(first, asyncio.CancelledError) and isinstance(second, asyncio.CancelledError)
            assert rest == [Reply("x", True)] * 3
            assert len(server.bodies) == 2 and llm.in_flight == 0

            asks = [asyncio.ensure_future(llm.ask(request("y"))) for _ in range(2)]
            await asyncio.sleep(0.05)
            asks[1].cancel()  # one who shares, alone: the asker does not notice
            assert (await asks[0]).text == "x"

    play(main())


def test_the_store_being_full_ends_the_run_with_one_line(store: Store, monkeypatch: pytest.MonkeyPatch):
    def full(key: bytes, reply: str) -> None:
        raise UserError("the store is full")

    async def main() -> None:
        async with ScriptedServer(echo) as server, connected(server, store) as llm:
            monkeypatch.setattr(store, "put", full)
            assert isinstance(await outcome(llm.ask(request("x"))), UserError)
            assert llm.in_flight == 0

    play(main())


# What is sent


def test_completions_get_one_text_and_stop_strings(store: Store):
    async def main() -> None:
        messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
        asked = Request(messages, 0.5, 10, end=("E",), text_end=("T",))
        async with ScriptedServer(echo) as server:
            for completions in (True, False):
                async with connected(server, store, completions=completions) as llm:
                    await llm.ask(asked)
        text, chat = server.bodies
        assert server.paths == ["/v1/completions", "/v1/chat/completions"]
        assert text["prompt"] == "ask\n\nsay\n\n" and text["stop"] == ["E", "T"] and "messages" not in text
        assert chat["messages"] == messages and chat["stop"] == ["E"] and "prompt" not in chat

    play(main())


def test_a_pattern_reaches_the_server_as_top_level_structured_outputs(store: Store):
    async def main() -> None:
        async with ScriptedServer(echo) as server, connected(server, store) as llm:
            await llm.ask(request("x", pattern="问题：.+"))
            await llm.ask(request("x"))
        with_pattern, without = server.bodies
        assert with_pattern["structured_outputs"] == {"regex": "问题：.+"}
        assert set(without) == {"model", "messages", "temperature", "max_tokens", "seed", "top_p"}

    play(main())


def test_the_sampling_of_every_request_is_ours_whatever_the_model_s_own(store: Store):
    of_vllm = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}

    async def main() -> None:
        listing = answers(json.dumps({"data": [{"id": "model", "object": "model", "owned_by": "vllm"}]}))
        for models, sampling in ((("model",), {"top_p": 1}), (answers("[]"), {"top_p": 1}), (listing, of_vllm)):
            async with ScriptedServer(echo, models) as server, connected(server, store) as llm:
                await llm.ask(request(server.url))
                assert llm.sampling == sampling
                fixed = {"model", "messages", "temperature", "max_tokens", "seed"}
                assert {name: of for name, of in server.bodies[-1].items() if name not in fixed} == sampling

    play(main())


# Order


def test_map_in_order_keeps_order_and_its_bound_on_infinite_iterables():
    async def main() -> None:
        running = most = handed_on = 0
        delays = random.Random(2)

        async def work(number: int) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(delays.uniform(0, 0.003))
            running -= 1
            return number

        async for item, result in map_in_order(work, itertools.count(), lambda: 10):
            assert item == result == handed_on
            handed_on += 1
            if handed_on == 300:
                break
        assert most == 10

    play(main())


def test_a_slow_item_keeps_none_from_beginning():
    async def main() -> None:
        others_done = asyncio.Event()
        done = 0

        async def work(number: int) -> int:
            nonlocal done
            if number == 0:
                await others_done.wait()
            done += 1
            if done == 99:
                others_done.set()
            return number

        assert [item async for item, _ in map_in_order(work, range(100), lambda: 4)] == list(range(100))

    play(main())


def test_items_begin_as_soon_as_there_is_more_room():
    async def main() -> None:
        room, running = 1, 0
        all_run = asyncio.Event()

        async def work(_: int) -> None:
            nonlocal room, running
            running += 1
            room = 5  # while the first item is under way, and nothing has ended
            if running == 5:
                all_run.set()
            await all_run.wait()

        assert [item async for item, _ in map_in_order(work, range(5), lambda: room)] == list(range(5))

    play(main())


@pytest.mark.parametrize("place", ["first", "last", "iterable", "consumer"])
def test_the_first_exception_wherever_it_arises_ends_all(place: str):
    async def main() -> None:
        noises: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noises.append(context))
        running = 0

        async def work(number: int) -> int:
            nonlocal running
            running += 1
            try:
                if number == {"first": 0, "last": 19}.get(place):
                    await asyncio.sleep(0.05)
                    raise ValueError(place)
                await asyncio.sleep(60 if number or place == "first" else 0.01)
                return number
            finally:
                running -= 1

        def items() -> Iterator[int]:
            yield from range(20)
            if place == "iterable":
                raise ValueError(place)

        async def consume() -> None:
            async with contextlib.aclosing(
                map_in_order(work, items(), lambda: 20 if place != "iterable" else 30)
            ) as results:
                async for _ in results:
                    if place == "consumer":
                        raise ValueError(place)

        started = time.monotonic()
        with pytest.raises(ValueError, match=place):
            await consume()
        assert time.monotonic() - started < 1
        assert running == 0 and len(asyncio.all_tasks()) <= 2  # this one, and play's
        await asyncio.sleep(0)
        assert not noises

    play(main())


def test_a_failure_that_nobody_waits_for_any_more_makes_no_noise():
    async def main() -> None:
        noises: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noises.append(context))

        async def work(number: int) -> int:
            if number:
                await asyncio.sleep(0.01)
                raise ValueError
            return number

        results = map_in_order(work, range(10), lambda: 10)
        await anext(results)
        await asyncio.sleep(0.05)  # the others fail while the consumer is busy
        await results.aclose()
        del results
        await asyncio.sleep(0)
        assert not noises

    play(main())


def test_nothing_to_map_is_nothing():
    async def main() -> None:
        assert [result async for result in map_in_order(asyncio.sleep, [], lambda: 10)] == []

    play(main())
