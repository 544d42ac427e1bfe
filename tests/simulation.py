"""A server of known capacity on a clock of its own, for what would take hours.

Time leaps to the next event as soon as nothing is left to do. The client under test is the real one, but for HTTP: the
server is a fake in the same process, whose replies mean nothing.
"""

import asyncio
import json
import re
import selectors
import zlib
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from augcon.llm import limit, servers
from augcon.llm.client import LLM

Result = TypeVar("Result")


class _Leaping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits for no time to pass, but sets the clock forward."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Leaping()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


def simulate(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine on a clock that leaps from event to event."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


def now() -> float:
    """Seconds since the start of the simulation."""
    return asyncio.get_running_loop().time()


class SlotServer:
    """Answers as many requests at once as it has ``slots``, at a time; the others wait in a queue.

    ``seconds`` says how long the reply to some messages takes; infinite, it never comes, and takes no slot. ``tells``:
    it has the figures of vLLM. ``reply`` makes the text of a reply to a body; by default, it is of about 50 words a
    second. It takes the place of the OpenAI client of a ``Server``.
    """

    def __init__(
        self,
        slots: Callable[[float], int],
        seconds: Callable[[str], float],
        tells: bool = True,
        reply: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        self.slots, self.seconds, self.tells, self.reply = slots, seconds, tells, reply
        self.running = self.answered = self.given_up = 0
        self.busy = 0.0  # slots times seconds
        self.queue: deque[asyncio.Future[None]] = deque()

    async def post(self, path: str, *, body: dict[str, Any], cast_to: type[str]) -> str:
        """The reply to a request."""
        asked = json.dumps(body["messages"])
        seconds = self.seconds(asked)
        if seconds == float("inf"):
            await asyncio.Event().wait()
        try:
            await self._slot()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        began = now()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.running -= 1
            self.busy += now() - began
            self._next()
        self.answered += 1
        tokens = max(1, round(50 * seconds))
        text = self.reply(body) if self.reply else "word " * tokens
        choice = {"finish_reason": "stop", "message": {"content": text}}
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}})

    async def get(self, path: str, *, cast_to: type[str]) -> str:
        """The figures."""
        if not self.tells or not re.fullmatch(r"http://[\w-]+/metrics", path):
            return "<html>Not here</html>"
        waiting = sum(not each.done() for each in self.queue)
        return f"vllm:num_requests_running{{}} {self.running}\nvllm:num_requests_waiting{{}} {waiting}\n"

    def with_options(self, **_: object) -> "SlotServer":
        return self

    async def close(self) -> None:
        pass

    async def _slot(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self.queue.append(turn)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.running -= 1
            raise

    def _next(self) -> None:
        while self.queue and self.running < self.slots(now()):
            turn = self.queue.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)


def replace_servers(llm: LLM, *fakes: SlotServer, start: bool = True) -> None:
    """Puts fakes in the place of the HTTP clients of a client that has as many servers, and begins to watch them."""
    for server, fake in zip(llm.servers.all, fakes, strict=True):
        server.client = fake  # type: ignore[assignment]
    if start:
        llm.servers.start()


class Fixed(limit.Limit):
    """A limit that follows nothing: what was there before."""

    def _set(self, value: float) -> None:
        pass

    @classmethod
    def at(cls, value: int, server: servers.Server) -> None:
        """Fixes the limit of a server."""
        server.limit = cls(value, server.limit.timeout)
        server.limit.value = value


def spread(asked: str, mean: float) -> float:
    """Seconds between a half and one and a half times the mean, the same for the same request."""
    return mean * (0.5 + zlib.crc32(asked.encode()) % 1000 / 1000)
