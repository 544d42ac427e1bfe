"""A fake LLM server that misbehaves as a script tells it to.

It is a fake, in-process on loopback, because no real server hangs, cuts connections, answers garbage or
goes away at the moment a test needs it. It speaks the wire form of OpenAI's API; its replies mean nothing.

A script is a function of the request's JSON and of the number of times that this very request came before;
it returns a behaviour, itself a function from the HTTP request to the HTTP response.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from augcon.llm.dialect import QUESTION

Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]
Script = Callable[[dict[str, Any], int], Behaviour]


def prompt_of(body: dict[str, Any]) -> str:
    """The last thing that a request says."""
    return body["prompt"].strip() if "prompt" in body else body["messages"][-1]["content"]


def reply_body(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """A reply of either endpoint."""
    choice = {"index": 0, "finish_reason": finish_reason, "text": text, "message": {"content": text}}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def says(text: str | None, finish_reason: str = "stop", after: float = 0.0) -> Behaviour:
    """A good reply, after some seconds."""
    return answers(json.dumps(reply_body(text, finish_reason)), after=after)


def answers(
    body: str | bytes,
    status: int = 200,
    content_type: str = "application/json",
    after: float = 0.0,
    headers: dict[str, str] | None = None,
) -> Behaviour:
    """Any status and body."""
    content = body.encode() if isinstance(body, str) else body

    async def behaviour(_: web.Request) -> web.Response:
        await asyncio.sleep(after)
        return web.Response(status=status, body=content, content_type=content_type, headers=headers)

    return behaviour


def refuses(status: int, message: str = "no", code: str | None = None, retry_after: str | None = "0.01") -> Behaviour:
    """An error of OpenAI's form; by default it asks to be tried again soon, so that tests are fast."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return answers(json.dumps({"error": {"message": message, "code": code}}), status, headers=headers)


async def hangs(_: web.Request) -> web.Response:
    """No answer, ever."""
    await asyncio.Event().wait()
    raise AssertionError


async def drips(request: web.Request) -> web.StreamResponse:
    """A body that never ends, one byte at a time: each read succeeds."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


async def cuts(request: web.Request) -> web.Response:
    """The connection ends before any answer."""
    assert request.transport
    request.transport.abort()
    return web.Response()


async def cuts_midway(request: web.Request) -> web.StreamResponse:
    """The connection ends in the middle of the body."""
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "500"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport
    request.transport.close()
    return response


async def babbles(request: web.Request) -> web.Response:
    """Bytes that are no HTTP."""
    assert request.transport
    request.transport.write(b"\x00\x01 what?\r\n\r\n")
    request.transport.close()
    return web.Response()


class ScriptedServer:
    """Plays a script; an async context manager. ``bodies`` are the requests received, in order.

    It ``greets`` a client: the probes by which one finds out what the server takes are answered and not counted.
    """

    def __init__(self, script: Script, models: Behaviour | tuple[str, ...] = ("model",), greets: bool = True) -> None:
        self.script, self.greets = script, greets
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        listing = {"data": [{"id": name, "object": "model"} for name in models] if isinstance(models, tuple) else []}
        self._models = answers(json.dumps(listing)) if isinstance(models, tuple) else models
        self._seen: Counter[str] = Counter()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def __aenter__(self) -> "ScriptedServer":
        await self.come()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.go()

    async def come(self) -> None:
        """Listens, at the same address as before."""
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/{endpoint:.*}", self._play)
        self._runner = web.AppRunner(application, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=1024, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def go(self) -> None:
        """Stops listening and cuts what is under way."""
        await self._runner.cleanup()

    async def _play(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.greets and prompt_of(body) == QUESTION:
            return await says("391")(request)
        before = self._seen[key := json.dumps(body, sort_keys=True)]
        self._seen[key] += 1
        self.bodies.append(body)
        self.paths.append(request.path)
        self.times.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            with contextlib.suppress(ConnectionError):
                return await self.script(body, before)(request)
            return web.Response()  # to a connection that is gone
        finally:
            self.under_way -= 1
