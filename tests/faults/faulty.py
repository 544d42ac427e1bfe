"""The demonstration engine's replies, through a server in every kind of trouble, for tests and the soak.

    python tests/faults/faulty.py --port 8000 --latency 0.2 --share 60

It is a fake. Which request meets which trouble depends on the seed, on the request, and on how often it came before,
and on nothing else, so that runs can be compared.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from scripted_server import (  # noqa: E402
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
)

from augcon.demo.engine import COLD, cut  # noqa: E402
from augcon.demo.rules import reply_to  # noqa: E402

PAGE = "<!DOCTYPE html><title>502 Bad Gateway</title>"
# How often each happens, in relation to the others: of 60, 20 are errors 500, 10 rate limits, and 3 have no end.
TROUBLES: dict[str, tuple[int, Behaviour]] = {
    "status 500": (15, refuses(500, "engine overloaded", retry_after=None)),
    "a page with status 502": (5, answers(PAGE, 502, "text/html")),
    "status 429": (5, refuses(429, retry_after=None)),
    "status 429 with Retry-After": (5, refuses(429, retry_after="1")),
    "no answer": (3, hangs),
    "a body without end": (1, drips),
    "no connection": (4, cuts),
    "a connection cut in the body": (4, cuts_midway),
    "no HTTP": (2, babbles),
    "half a JSON": (4, answers('{"choices": [{"index": 0, "mess')),
    "no choices": (4, answers('{"choices": []}')),
    "a page with status 200": (4, answers(PAGE, content_type="text/html")),
    "no JSON of ours": (3, answers('{"choices": [{"message": {"content": {"a": 1}}}]}')),
    "ten megabytes": (1, answers(json.dumps(reply_body("x" * 10_000_000)))),
}


def engine_reply(body: dict[str, Any], latency: float) -> Behaviour:
    """What the demonstration engine would say."""

    async def behaviour(_: web.Request) -> web.Response:
        await asyncio.sleep(latency)
        asked = body.get("messages") or body["prompt"]
        seed = body.get("seed") if body.get("temperature", 1) >= COLD else None
        text, finish, _tokens = cut(reply_to(asked, seed), body.get("stop", []), body.get("max_tokens"))
        return web.json_response(reply_body(text, finish))

    return behaviour


class Faulty(ScriptedServer):
    """``share`` of a thousand requests meet trouble. It counts ``met`` troubles, and calls of each request."""

    def __init__(self, share: int, latency: float = 0.0, seed: int = 0) -> None:
        super().__init__(self._answer)
        self.share, self.latency, self.seed = share, latency, seed
        self.bodies = collections.deque(maxlen=1)  # type: ignore[assignment]  # a soak has millions
        self.times = collections.deque(maxlen=1)  # type: ignore[assignment]
        self.paths = collections.deque(maxlen=1)  # type: ignore[assignment]
        self.met, self.asked = collections.Counter[str](), collections.Counter[bytes]()

    def _answer(self, body: dict[str, Any], _: int) -> Behaviour:
        self._seen.clear()
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()[:12]
        chance = random.Random(f"{self.seed} {self.asked[key]} {key.hex()}")
        if prompt_of(body) != "1":
            self.asked[key] += 1
        if chance.random() < self.share / 1000:
            (trouble,) = chance.choices(list(TROUBLES), [often for often, _ in TROUBLES.values()])
            self.met[trouble] += 1
            return TROUBLES[trouble][1]
        return engine_reply(body, self.latency)


async def serve(server: Faulty, port: int) -> None:
    """Serves until SIGTERM, and then prints what was asked and what trouble there was."""
    server._port = port
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    async with server:
        await end.wait()
    counts = {"calls": server.asked.total(), "distinct": len(server.asked), "troubles": server.met.total()}
    print(json.dumps({**counts, **server.met}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--share", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asyncio.run(serve(Faulty(options.share, options.latency, options.seed), options.port))


if __name__ == "__main__":
    main()
