"""The servers of a run: which one a request goes to and when, and what is known of each."""

import asyncio
import contextlib
import hashlib
import heapq
import itertools
import math
import re
import resource
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import httpx2
import openai
import stamina
from pydantic import SecretStr

from augcon.errors import UserError
from augcon.llm import failures
from augcon.llm.limit import Limit, figures, now
from augcon.progress import say
from augcon.text.units import clean

READING = 0.5  # seconds between two readings of a server's figures
PROBING = 1.0  # seconds between two probes of a server that does not answer
_PROBED = 30.0  # seconds that a probe is waited for, at least
_PROBES = 50  # connections besides those of requests
_SILENCE = 20.0  # seconds without a reply from any server, and several times as long as any took, before that is said
_IN_A_ROW = 8  # failures without a reply in between from which a server is taken to be out of order
_OTHER_FILES = 200  # that a process may have open besides its connections
_EXPERIENCE = 100  # replies from which on it is known how long one may take
_LOST = 1.5  # times that, after which it is lost
LARGEST = 4_000_000  # bytes of a response; no reply that was asked for is longer

_Waiting = tuple[bool, int, int, asyncio.Future["Server"]]  # first tries last; root context; number


def connections(wanted: int) -> int:
    """How many of the connections wanted the system allows this process, once asked for as many as it can have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return wanted if most == resource.RLIM_INFINITY else max(1, min(wanted, most - _OTHER_FILES))


def clock(moment: float) -> str:
    """A moment of the event loop's clock as the time of day."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + moment - now()))


class _Bounded(httpx2.AsyncByteStream):
    """The body of a response. Raises BadReply where it goes on and on, which would take all memory."""

    def __init__(self, body: httpx2.AsyncByteStream) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._body:
            size += len(part)
            if size > LARGEST:
                raise failures.BadReply(f"the reply is longer than {LARGEST:,} bytes")
            yield part

    async def aclose(self) -> None:
        await self._body.aclose()


async def _bound(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise failures.BadReply("the reply is compressed, so that its length is anyone's guess")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)


class Server:
    """One address, with its limit and what is known of it. ``up``: requests may be sent to it."""

    def __init__(self, api_base: str, api_key: SecretStr, most: int, timeout: float) -> None:
        self.api_base = api_base
        self.limit = Limit(most, timeout)
        self.figures: dict[str, float] = {}  # of vLLM, as last read
        self.first_figures: dict[str, float] = {}
        self.served: dict[str, str] = {}  # the models, and the folders that vLLM read them from
        self.is_vllm = False
        self.window = math.inf  # tokens of a prompt and its reply, where the server tells
        self.up = True
        self.replied = False  # whether it has given a reply that could be read
        self.under_way = self.most_under_way = self.successes = 0
        self.failures = 0  # since the last success
        self.failing_since: float | None = None
        self.waiting: list[_Waiting] = []  # a heap
        self.may_be_lost: dict[asyncio.Timeout, float] = {}  # those under way, and when they began
        self.longest = 0.0  # seconds of a reply
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=most + _PROBES)
        loopback = re.match(r"https?://(127\.|localhost\b|\[::1\])", api_base, re.IGNORECASE)
        transport = openai.DefaultAioHttpClient(
            limits=limits,
            trust_env=not loopback,  # no proxy to loopback
            event_hooks={"response": [_bound]},
        )
        self.client = openai.AsyncOpenAI(
            base_url=api_base,
            api_key=api_key.get_secret_value(),
            max_retries=0,
            timeout=timeout,
            default_headers={"Accept-Encoding": "identity"},
            http_client=transport,
        )

    async def find_models(self, patience: float) -> Exception | None:
        """Asks which models there are; returns why there was no answer within ``patience`` seconds, if none came."""
        try:
            async for attempt in stamina.retry_context(failures.NO_ANSWER, attempts=None, timeout=patience, wait_max=1):
                with attempt:
                    async with asyncio.timeout(min(60, self.limit.timeout)):
                        models = [model async for model in self.client.models.list()]
            self.served = {clean(model.id): clean(str(getattr(model, "root", None) or "")) for model in models}
            self.is_vllm = any(getattr(model, "owned_by", "") == "vllm" for model in models)
            self.window = min(float(getattr(model, "max_model_len", None) or math.inf) for model in models)
        except failures.NO_ANSWER as error:
            return error
        except (openai.APIError, TypeError, AttributeError, ValueError, RecursionError):
            pass  # some gateways do not list their models
        return None

    def answered(self, seconds: float, size: int, wanted: bool) -> None:
        """Takes a reply of ``size`` characters into account."""
        self.alive()
        self.replied = True
        self.longest = max(self.longest, seconds)
        self.limit.answered(seconds, size, self.under_way, wanted)

    def alive(self) -> None:
        """Takes into account that it has answered."""
        self.successes += 1
        self.failures, self.failing_since = 0, None

    def failed(self) -> None:
        """Takes the failure of a request into account. Once all that are under way fail, it is out of order."""
        self.failures += 1
        self.failing_since = self.failing_since or now()
        if self.failures >= min(_IN_A_ROW, self.under_way + 1):
            self.up = False

    def overdue(self) -> list[asyncio.Timeout]:
        """The requests that take far longer than any reply so far: lost, or as soon to be had again."""
        if self.successes < _EXPERIENCE:
            return []
        return [timeout for timeout, began in self.may_be_lost.items() if now() - began > _LOST * self.longest]

    async def read_figures(self) -> dict[str, float]:
        """Reads the figures of vLLM; none where there are none."""
        address = re.sub(r"(/v1)?/?$", "/metrics", self.api_base, count=1)
        try:
            read = figures(await self.client.with_options(timeout=10).get(address, cast_to=str))
        except (*failures.FAILURES, ValueError):
            return {}
        self.first_figures, self.figures = self.first_figures or read, read
        return read


class Servers:
    """All servers of a run, which serve the same model. ``probe`` sends one a harmless request and raises its failure,
    or UserError where it has another model now.

    Between ``start`` and ``close``, the limits follow what the servers tell of themselves.
    """

    def __init__(self, servers: list[Server], probe: Callable[[Server], Awaitable[object]], wait: float) -> None:
        self.all = servers
        self._probe, self._wait = probe, wait
        self._numbers = itertools.count()
        self._end: UserError | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._tasks: dict[Server, asyncio.Task[None]] = {}  # that wait for a server
        self._searches: dict[Server, asyncio.Task[None]] = {}  # for what a silent server has lost

    def start(self) -> None:
        """Begins to read the servers' figures."""
        self._readers = [asyncio.create_task(self._read(server)) for server in self.all]
        self._readers += [asyncio.create_task(self._hurry()), asyncio.create_task(self._watch())]

    async def close(self) -> None:
        """Ends what goes on in the background, and the connections."""
        self._end = self._end or UserError("the connections are closed")
        tasks = [*self._readers, *self._tasks.values(), *self._searches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.all:
            await server.client.close()

    @property
    def successes(self) -> int:
        """Requests that were answered, by any server."""
        return sum(server.successes for server in self.all)

    @property
    def wanted(self) -> bool:
        """Whether requests wait for a slot."""
        return any(server.waiting for server in self.all)

    def gained(self, figure: str) -> float:
        """By how much a figure of vLLM has grown in this run, over all servers."""
        return sum(server.figures.get(figure, 0) - server.first_figures.get(figure, 0) for server in self.all)

    def room(self) -> int:
        """How many items there should be under way: enough for all slots, and for the next ones."""
        return 2 * sum(server.limit.value for server in self.all if server.up) or 1

    @contextlib.asynccontextmanager
    async def slot(
        self, root: int | None, again: bool, patient: bool = False, home: Server | None = None
    ) -> AsyncIterator[Server]:
        """A server to send one request to, in the time for it. It is waited for until one that is up has a slot free.

        Earlier root contexts come first, and what is tried ``again`` before all. All requests about one root context
        go to one server, whose prefix cache may have its text, or to ``home``, unless another server has nothing to
        do. A ``patient`` request, which was taken for lost before, has all the time. Raises UserError when no server
        has answered for too long.
        """
        server = await self._take(root, again, home)
        try:
            async with asyncio.timeout(server.limit.timeout) as timeout:
                if not patient:
                    server.may_be_lost[timeout] = now()
                yield server
        finally:
            server.may_be_lost.pop(timeout, None)
            self._free(server)

    async def _take(self, root: int | None, again: bool, home: Server | None) -> Server:
        if self._end:
            raise self._end
        server = home if home and home.up else self._home(root)
        if server.up and not server.waiting and server.under_way < server.limit.value:
            return self._enter(server)
        waits: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        heapq.heappush(server.waiting, (not again, root or 0, next(self._numbers), waits))
        self.fill()
        try:
            return await waits
        except asyncio.CancelledError:
            if waits.done() and not waits.cancelled() and not waits.exception():
                self._free(waits.result())
            raise

    def _free(self, server: Server) -> None:
        server.under_way -= 1
        self.fill()

    def fill(self) -> None:
        """Gives free slots to those who wait, of a server without any to those who wait for another."""
        for server in self.all:
            while server.up and server.under_way < server.limit.value:
                queue = server.waiting or max((other.waiting for other in self.all), key=len)
                if not queue:
                    break
                waits = heapq.heappop(queue)[-1]
                if not waits.done():
                    waits.set_result(self._enter(server))

    def _enter(self, server: Server) -> Server:
        server.under_way += 1
        server.most_under_way = max(server.most_under_way, server.under_way)
        return server

    def _home(self, root: int | None) -> Server:
        if len(self.all) == 1:
            return self.all[0]
        up = [server for server in self.all if server.up] or self.all
        if root is None:
            return min(up, key=lambda server: (server.under_way + len(server.waiting)) / server.limit.value)
        return max(up, key=lambda server: hashlib.sha256(f"{root} {server.api_base}".encode()).digest())

    async def _read(self, server: Server) -> None:
        """Reads the figures of a server again and again, if it has any, and lets the limit follow them."""
        while (read := await server.read_figures()) or server.first_figures:
            if server.up and server not in self._searches:
                server.limit.follow(read, server.under_way - len(server.overdue()), self.wanted)
            self.fill()
            await asyncio.sleep(READING)

    async def _hurry(self) -> None:
        """Where nobody waits for a slot, all that is left is under way, and what is lost is better sent again soon."""
        while True:
            await asyncio.sleep(READING)
            for timeout in () if self.wanted else itertools.chain(*(server.overdue() for server in self.all)):
                timeout.reschedule(now())

    async def _watch(self) -> None:
        """Says that all servers are silent, and when they no longer are."""
        heard, since, said = self.successes, now(), False
        while True:
            await asyncio.sleep(READING)
            under_way = sum(server.under_way for server in self.all if server.up)
            if self.successes > heard or not under_way:
                if said and self.successes > heard:
                    say(f"server:  replies come again after {now() - since:.0f} s")
                heard, since, said = self.successes, now(), False
                continue
            silence, longest = now() - since, max(server.longest for server in self.all)
            if not said and silence > max(_SILENCE, 3 * longest):
                said, timeout = True, self.all[0].limit.timeout
                say(
                    f"server:  no reply since {clock(since)}, with {under_way:,} requests under way; each is waited "
                    f"for {timeout:.0f} s (--request-timeout)"
                )
            for server in self.all:
                if silence > _LOST * longest and server.up and server.overdue() and server not in self._searches:
                    self._searches[server] = asyncio.create_task(self._send_again_what_is_lost(server, self.successes))

    async def _send_again_what_is_lost(self, server: Server, successes: int) -> None:
        """A server that answers a probe, but nothing else, knows nothing of what is under way: it has been away."""
        try:
            async with contextlib.aclosing(self._probes(server)) as probes:
                async for there in probes:
                    if there:
                        for timeout in server.overdue():
                            timeout.reschedule(now())
                    if there or self.successes > successes:
                        break
        finally:
            del self._searches[server]

    # Servers that are not there

    def leave_out(self, server: Server, error: Exception) -> None:
        """Sends nothing to a failed server until a probe finds it in order; what waits for it goes to others."""
        server.up = False
        waiting, server.waiting = server.waiting, []
        for again, root, number, waits in waiting:
            heapq.heappush(self._home(root).waiting, (again, root, number, waits))
        if server not in self._tasks and not self._end:
            self._tasks[server] = asyncio.create_task(self._wait_for(server, error))
        self.fill()

    async def _wait_for(self, server: Server, error: Exception) -> None:
        since, said, successes = server.failing_since or now(), False, server.successes

        def tell() -> None:
            nonlocal said
            if not said:
                said = True
                others = any(each.up for each in self.all)
                until = "the others go on" if others else f"waiting for it until {clock(since + self._wait)}"
                why = failures.describe(error)
                say(f"server:  {server.api_base} has not answered since {clock(since)} ({why}); {until}")

        soon = asyncio.get_running_loop().call_later(PROBING, tell)  # even where the probe hangs
        try:
            async with contextlib.aclosing(self._probes(server)) as probes:
                async for there in probes:
                    out = now() - since
                    if there or (there is None and server.successes > successes):  # it is slow, but answers
                        break
                    if out >= self._wait and not any(each.up for each in self.all):
                        self._stop(_gone(server, out, error))
                        return
                    tell()
            if said:
                say(f"server:  {server.api_base} answers again after {out:.0f} s")
            server.up = True
        finally:
            soon.cancel()
            del self._tasks[server]
        self.fill()

    async def _probes(self, server: Server) -> AsyncGenerator[bool | None]:
        """Tells once a second whether a probe was answered, None where it may still be.

        Each is sent whatever becomes of those before.
        """
        probes: set[asyncio.Task[bool]] = set()
        try:
            while True:
                probes.add(asyncio.create_task(self._is_there(server)))
                done, probes = await asyncio.wait(probes, timeout=PROBING, return_when=asyncio.FIRST_COMPLETED)
                yield any(map(asyncio.Task.result, done)) if done else None
                if done:
                    await asyncio.sleep(PROBING)
        finally:
            for probe in probes:
                probe.cancel()

    async def _is_there(self, server: Server) -> bool:
        try:
            async with asyncio.timeout(min(server.limit.timeout, max(_PROBED, 2 * server.longest))):
                await self._probe(server)
        except failures.FAILURES as error:
            if failures.out_of_order(error):
                return False
        except UserError as another_model:
            self._stop(another_model)
        server.alive()
        return True

    def _stop(self, error: UserError) -> None:
        """Ends the run: raises the error for all who wait for a slot, now or later."""
        self._end = error
        for each in self.all:
            for *_, waits in each.waiting:
                if not waits.done():
                    waits.set_exception(error)
            each.waiting = []


def _gone(server: Server, seconds: float, error: Exception) -> UserError:
    return UserError(
        f"the server at {server.api_base} has not answered for {seconds:.0f} s ({failures.kind(error)}: "
        f"{failures.describe(error)}); no reply is lost: run the same command again when the server is back"
    )
