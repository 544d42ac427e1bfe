"""The client of the LLM: one async call for a request, within limits, with retries, and never made twice."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import openai
import stamina
from pydantic import SecretStr, TypeAdapter

from augcon.data import Refused, Reply, Request
from augcon.errors import UserError, one_line
from augcon.llm import dialect, failures
from augcon.llm.dialect import Dialect, Seen
from augcon.llm.limit import now
from augcon.llm.pace import Pace
from augcon.llm.servers import PROBING, Server, Servers, connections
from augcon.llm.store import Store
from augcon.progress import say
from augcon.text.prompts import as_text
from augcon.text.units import clean

Result = TypeVar("Result")
STRIKES = 6  # failures after which a request is given up, if others succeed in between
_HOPELESS = 3  # bad replies to a request after which a server that never gave a good one is taken for something else
PATIENCE = 8  # seconds to wait for a server that has just been started
_CUT_OFF = {"length", "max_tokens", "abort", "error", "content_filter"}  # finish reasons, of vLLM and others
_MANY = 20  # refused requests, or asks, from which on it matters whether most are refused or their replies no use
_HARDLY_ANY = 0.8  # share of requests whose first reply is of no use, from which on there is no point in more
_AT_FIRST = 1000  # requests among which that is noticed
# Sampling is AugCon's own; a model's generation_config.json would change it on some servers. vLLM knows more of it.
_SAMPLING = {"top_p": 1}
_VLLM_SAMPLING = {**_SAMPLING, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
_REPLY = TypeAdapter(Reply)
_PROBE = Request([{"role": "user", "content": "1"}], temperature=0, max_tokens=1)
stamina.instrumentation.set_on_retry_hooks([])  # retries are counted here, not logged one by one


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask; the fields are the settings of the same names."""

    api_base: str
    api_key: SecretStr = dataclasses.field(default=SecretStr("EMPTY"))
    completions: bool = False
    structured_output: bool = True
    max_in_flight: int = 8192
    request_timeout: float = 300.0
    server_wait: float = 600.0
    seed: int = 0
    extra_body: str = ""


class LLM(contextlib.AbstractAsyncContextManager["LLM"]):
    """A model on OpenAI-compatible servers; an async context manager.

    ``counts`` has the calls, the requests that were "replayed" from the store or "shared" a call, the retries by
    kind of failure, and the tokens. ``served`` maps the models served to the folders that vLLM read them from.
    ``sampling`` has the parameters that are the same in every request, None for those that the server refuses; its
    ``dialect`` is what else it wants otherwise. ``pace`` has what was done by when.
    ``weights`` can be set to tell apart models that are served under the same name.
    """

    def __init__(self, endpoint: Endpoint, store: Store) -> None:
        self.endpoint = endpoint
        self.model = ""
        self.weights = ""
        self.served: dict[str, str] = {}
        self.dialect = Dialect()
        self._extra: dict[str, Any] = json.loads(endpoint.extra_body or "{}")
        self._fixed: dict[str, Any] = {**_SAMPLING, **self._extra}
        self.counts: Counter[str] = Counter()
        self.pace = Pace()
        self._pacing: asyncio.Task[None] | None = None
        addresses = [address for address in endpoint.api_base.split(",") if address.strip()] or [endpoint.api_base]
        most = max(1, connections(endpoint.max_in_flight) // len(addresses))
        servers = [Server(address, endpoint.api_key, most, endpoint.request_timeout) for address in addresses]
        self.servers = Servers(servers, self._probe, endpoint.server_wait)
        self._store = store
        self._pending: dict[bytes, asyncio.Task[Reply]] = {}
        self._waiting = self._answered = 0
        self._refused: Counter[str] = Counter()  # by reason
        self._unusable: Counter[str] = Counter()  # first replies to a request, by reason
        self._first_replies = 0
        self._early: list[bytes] = []  # keys of the replies that came meanwhile
        self._accepted: set[frozenset[str]] = set()  # sets of parameters that a server has answered

    async def __aexit__(self, *error: object) -> None:
        if self._pacing:
            self._pacing.cancel()
        await self.servers.close()

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters that are the same in every request; None for those that are not sent."""
        return self.dialect.same(self._fixed)

    @property
    def in_flight(self) -> int:
        """The number of requests under way."""
        return sum(server.under_way for server in self.servers.all)

    @property
    def most_in_flight(self) -> int:
        """The most requests that were under way at once, over all servers."""
        return sum(server.most_under_way for server in self.servers.all)

    @property
    def state(self) -> str:
        """What is going on, in words, for a progress bar."""
        retries = sum(number for kind, number in self.counts.items() if kind.startswith("retries"))
        refused = self._refused.total()
        return (
            f"{self.counts['calls']:,} calls, {self.in_flight:,} in flight, {self.pace.tokens_a_second():,.0f} tokens/s"
            + (f", {retries:,} retries" if retries else "")
            + (f", {refused:,} refused" if refused else "")
        )

    async def connect(self, model: str, api_model: str = "") -> str:
        """Chooses the model to ask; returns the name under which it is served.

        That is ``api_model`` or, if empty, the only model served or else ``model``. Raises UserError when no server
        answers within PATIENCE seconds, when one refuses the key, or when one does not serve the model.
        """
        servers = self.servers.all
        errors = await asyncio.gather(*(server.find_models(PATIENCE) for server in servers))
        if error := all(errors) and errors[0]:
            raise UserError(
                f"no server answered at {self.endpoint.api_base} ({failures.describe(error)}); start one with python "
                "serve.py, or for a single command with python serve.py -- COMMAND, or pass another address with "
                "--api-base"
            ) from error
        there = [server for server, error in zip(servers, errors, strict=True) if not error]
        self.served = there[0].served
        self.model = api_model or (next(iter(self.served)) if len(self.served) == 1 else model)
        sampling = _VLLM_SAMPLING if all(server.is_vllm for server in there) else _SAMPLING
        self._fixed = {**sampling, **self._extra}
        for server in there:
            if server.served and self.model not in server.served:
                raise failures.unknown_model(self.model, server.api_base, server.served)
        self.servers.start()
        self._pacing = asyncio.create_task(self._pace())
        for server, error in zip(servers, errors, strict=True):
            if error:
                self.servers.leave_out(server, error)
        await self._learn(there)
        return self.model

    async def _learn(self, servers: list[Server]) -> None:
        """Takes the servers' dialect from the store, or finds it out, and says what is unusual in it.

        That shows, too, whether address, key and name are right. Raises UserError where a server refuses all.
        """
        self.dialect = Dialect()
        probe = self._body(dialect.PROBE)
        root = self.served.get(self.model)
        key = _digest(["dialect", self.endpoint.api_base, root, probe, dialect.SWITCHES])
        if known := Dialect.read(self._store.get(key) or ""):
            self.dialect = known
        else:
            waiting = list(servers)
            while waiting:
                server, before = waiting.pop(0), self.dialect
                self.dialect = await self._find_out(server, probe)
                if self.dialect != before:  # what one refuses is left out for all
                    waiting = [other for other in servers if other is not server]
            self._store.put(key, self.dialect.write())
        if unusual := self.dialect.describe():
            say(f"server:  {unusual}")

    async def _find_out(self, server: Server, probe: dict[str, Any]) -> Dialect:
        async def send(body: dict[str, Any]) -> Seen:
            return await _Trial(self, body, probe=True, home=server).outcome()

        try:
            return await dialect.find_out(send, probe, self.dialect, self._extra.keys())
        except (Refused, openai.APIStatusError) as error:
            if isinstance(error, openai.APIStatusError) and not failures.too_long(error):
                final = failures.final(error, False, server.api_base, self.model, self.served)
                if isinstance(final, UserError):
                    raise final from error
            raise UserError(
                f"the server at {server.api_base} refuses even a short request: {failures.describe(error)}"
            ) from error

    async def _pace(self) -> None:
        started = now()
        while True:
            self.pace.sample(now() - started, self.counts)
            await asyncio.sleep(1)

    async def ask(self, request: Request) -> Reply:
        """The reply to a request, from the store or the server.

        Raises Refused when this request cannot be answered, UserError when no request can or most cannot, or when
        hardly any reply was of use.
        """
        if len(request.unusable) == 1:
            self._stop_if_most_are_no_use(*request.unusable[0])
        self._waiting += 1
        try:
            reply = await self._stored_or_shared(request)
        except Refused as error:
            self._refused[str(error)] += 1
            self._stop_if_most_are_refused()
            raise
        finally:
            self._waiting -= 1
        self._answered += 1
        self._first_replies += not request.unusable
        return reply

    def _stop_if_most_are_no_use(self, reason: str, reply: str) -> None:
        self._unusable[reason] += 1
        useless = self._unusable.total()
        if useless >= _MANY and _HARDLY_ANY * self._first_replies < useless <= _AT_FIRST:
            self._store.forget(self._early)  # or a server that was mended would never be asked again
            reasons = ", ".join(f"{why} {times:,}" for why, times in self._unusable.most_common(3))
            raise UserError(
                f"{useless:,} of the first {self._first_replies:,} replies are of no use ({reasons}), such as "
                f"{one_line(reply)!r}. Try another model; --structured-output, where the server is vLLM; another chat "
                "template in the server, or --completions for a base model without one"
            )

    def _stop_if_most_are_refused(self) -> None:
        refused, (reason, times) = self._refused.total(), self._refused.most_common(1)[0]
        ended = refused + self._answered
        hopeful = min(self._waiting, self.servers.room())  # replies take longer than refusals
        if refused >= _MANY and 2 * refused > ended + hopeful:
            raise UserError(
                f"the server refused {refused:,} of {ended:,} requests ({reason}: {times:,}); if they are too long, "
                "use a model with a larger window, or lower --max-length, --examples-shown or --answer-max-tokens"
            )

    async def _stored_or_shared(self, request: Request) -> Reply:
        body = self._body(request)
        key = _digest([self.weights, {"seed": self._seed(request), **body}])  # all that determines a reply
        while shared := self._pending.get(key):  # the same text elsewhere in the corpus: one call serves both
            await asyncio.wait([shared])
            if not shared.cancelled():  # otherwise whoever asked first has gone, and the next one asks
                self.counts["shared"] += 1
                return shared.result()
        if stored := self._stored(key):
            self.counts["replayed"] += 1
            self._accepted.add(self._kind(body))
            return dataclasses.replace(stored, text=clean(stored.text))  # earlier versions kept it as it came
        self._pending[key] = asyncio.create_task(self._ask_and_store(request, body, key))
        try:
            return await self._pending[key]
        finally:
            del self._pending[key]

    def _stored(self, key: bytes) -> Reply | None:
        stored = self._store.get(key)
        with contextlib.suppress(ValueError):  # what is not a reply is asked for again
            return _REPLY.validate_json(stored.encode(errors="ignore")) if stored else None
        return None

    async def _ask_and_store(self, request: Request, body: dict[str, Any], key: bytes) -> Reply:
        reply = await _Attempts(self, body, request.root).reply()
        self._store.put(key, json.dumps(dataclasses.asdict(reply), ensure_ascii=False))
        if self._first_replies <= _AT_FIRST:
            self._early.append(key)
        return reply

    def _seed(self, request: Request) -> int:
        """The seed of a request: different for each sample, also where the server is not told."""
        return self.endpoint.seed * 10_000 + request.sample

    def _kind(self, body: dict[str, Any]) -> frozenset[str]:
        """The parameters of a request, with or without a limit of tokens."""
        return frozenset(body) - {self.dialect.limit}

    def _body(self, request: Request) -> dict[str, Any]:
        completions = self.endpoint.completions
        stop = request.end + (request.text_end if completions else ())
        pattern = self.endpoint.structured_output and request.pattern
        body = {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": self._seed(request),
            **({"prompt": as_text(request.messages)} if completions else {"messages": request.messages}),
            **({"stop": list(stop)} if stop else {}),
            **({"structured_outputs": {"regex": request.pattern}} if pattern else {}),
            **self._fixed,
        }
        return self.dialect.apply(body)

    async def _post(self, server: Server, body: dict[str, Any]) -> str:
        """One HTTP call. The client's typed methods would spend more time on checking the body than on the call."""
        path = "/completions" if self.endpoint.completions else "/chat/completions"
        return await server.client.post(path, body=body, cast_to=str)

    async def _call(self, server: Server, body: dict[str, Any]) -> Reply:
        started = now()
        answer = await self._post(server, body)
        with _protocol(answer):
            response = json.loads(answer)
            choice, usage = response["choices"][0], response.get("usage") or {}
            text = (choice["text"] if self.endpoint.completions else choice["message"].get("content")) or ""
            if not isinstance(text, str):
                raise TypeError
            prompt, written = _tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens")
            cached = _tokens(usage.get("prompt_tokens_details") or {}, "cached_tokens")
            reply = Reply(clean(text), choice["finish_reason"] not in _CUT_OFF, prompt, cached, written)
        self.counts.update({"prompt tokens": prompt, "cached tokens": cached, "reply tokens": written})
        self._accepted.add(self._kind(body))
        server.answered(now() - started, len(text), self.servers.wanted)
        return reply

    async def _probe(self, server: Server) -> None:
        await self._post(server, self._body(_PROBE))
        before = server.served.get(self.model)
        if await server.find_models(PROBING) or not server.served:
            return
        root = server.served.get(self.model)
        if root is None:
            raise failures.unknown_model(self.model, server.api_base, server.served)
        if before not in {None, root}:
            raise UserError(
                f"the server at {server.api_base} came back with another model, {root!r} in place of {before!r}; no "
                "reply is lost: run the same command again when the first is back"
            )


def _tokens(usage: dict[str, Any], name: str) -> int:
    number = usage.get(name) or 0
    if not isinstance(number, (int, float)) or not 0 <= number < math.inf:
        raise TypeError
    return int(number)


def _digest(asked: list[Any]) -> bytes:
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@contextlib.contextmanager
def _protocol(answer: str) -> Iterator[None]:
    """Raises BadReply where an answer cannot be read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise failures.BadReply(f"the reply does not follow the OpenAI protocol: {one_line(answer)!r:.200}") from error


@dataclasses.dataclass(slots=True)
class _Attempts:
    """The attempts at one request, and what to do after each that fails."""

    llm: LLM
    body: dict[str, Any]
    root: int | None = None
    probe: bool = False  # whether to send a harmless request first, to tell a bad request from a bad server
    strikes: int = 0
    bad_replies: int = 0
    hurried: bool = False  # whether it was taken for lost
    successes: float = math.inf  # of all requests, when this one last failed
    server: Server | None = None  # of the last attempt
    began: float = 0.0  # when that was
    seen: int = 0  # successes of that server before it

    async def reply(self) -> Reply:
        """The reply, after as many attempts as it takes. Raises Refused or UserError where none can help."""
        return await self._until_done(self._attempt)

    async def _until_done(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        retrying = stamina.AsyncRetryingCaller(attempts=None, timeout=None, wait_initial=0.5, wait_max=15)
        return await retrying(self._decide, attempt)

    async def _attempt(self) -> Reply:
        async with self.llm.servers.slot(self.root, self.server is not None, self.hurried) as self.server:
            self.seen, self.began = self.server.successes, now()
            if self.probe:
                await self.llm._call(self.server, {**self.body, **self.llm._body(_PROBE)})
            self.llm.counts["calls"] += 1
            return await self.llm._call(self.server, self.body)

    def _decide(self, error: Exception) -> bool | float:
        """Whether to try again: False, True (after the usual wait) or the seconds to wait."""
        if not isinstance(error, failures.FAILURES):
            return False
        llm, server = self.llm, self.server
        assert server
        final = failures.final(error, llm._kind(self.body) in llm._accepted, server.api_base, llm.model, llm.served)
        if isinstance(final, UserError) and not self.probe:
            self.probe = True  # is it this request that is refused, or all?
            return 0.01
        if final:
            server.failures, server.failing_since = 0, None
            # What the prompt leaves of the window may do. Without a limit, the completions endpoint gives 16 tokens.
            if failures.too_long(error) and not llm.endpoint.completions and self.body.pop(llm.dialect.limit, None):
                return 0.01
            raise final from error
        kind = failures.kind(error)
        llm.counts[f"retries: {kind}"] += 1
        if kind == "bad reply" and not server.replied:  # a page of something else, rather than an outage
            self.bad_replies += 1
            if self.bad_replies < _HOPELESS:
                return True
            raise UserError(
                f"the server at {server.api_base} has given no good reply ({failures.describe(error)}); is it an LLM "
                "server? Correct --api-base, which often ends in /v1"
            ) from error
        if isinstance(error, openai.RateLimitError):
            server.limit.refused(server.under_way)
            return failures.retry_after(error, llm.endpoint.server_wait) or True
        if kind == "timeout":
            if now() - self.began < 0.9 * llm.endpoint.request_timeout:
                self.hurried = True
                return 0.01  # it was in no queue, and is worth another try: see Servers._hurry
            server.limit.timed_out(server.successes - self.seen, server.under_way)
        server.failed()
        if not server.up:
            llm.servers.leave_out(server, error)
        successes = llm.servers.successes
        self.strikes += successes > self.successes
        self.successes = successes
        if self.strikes >= STRIKES - 1:
            raise Refused(f"failed {STRIKES} times ({kind}), while other requests succeeded") from error
        if not server.up:
            return 0.01  # a slot will be had when there is a server again
        return failures.retry_after(error, llm.endpoint.server_wait) or True


@dataclasses.dataclass(slots=True)
class _Trial(_Attempts):
    """The attempts at a probe of one server, not counted as calls. A refusal of parameters is raised as it came."""

    home: Server | None = None

    async def outcome(self) -> Seen:
        """What the reply shows."""
        return await self._until_done(self._look)

    async def _look(self) -> Seen:
        async with self.llm.servers.slot(None, self.server is not None, home=self.home) as self.server:
            self.seen, self.began = self.server.successes, now()
            answer = await self.llm._post(self.server, self.body)
            with _protocol(answer):
                shown = dialect.look(answer)
            self.server.alive()
            self.server.replied = True
            return shown

    def _decide(self, error: Exception) -> bool | float:
        refused = isinstance(error, openai.APIStatusError) and error.status_code in {400, 422}
        return False if refused else _Attempts._decide(self, error)
