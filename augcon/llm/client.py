"""The client of the LLM: one async call for a request, within limits, with retries, and never made twice."""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
from collections import Counter

import openai
import stamina
from pydantic import SecretStr

from augcon.data import Refused, Reply, Request
from augcon.errors import UserError
from augcon.llm import failures
from augcon.llm.store import Store
from augcon.text.prompts import as_text

STRIKES = 6  # failures after which a request is given up, if others succeed in between
PATIENCE = 8  # seconds to wait for a server that has just been started
_CUT_OFF = {"length", "max_tokens", "abort", "error", "content_filter"}  # finish reasons, of vLLM and others
_MANY = 20  # refused requests from which on it matters whether most are
# Sampling is AugCon's own; a model's generation_config.json would change it on some servers. vLLM knows more of it.
_SAMPLING = {"top_p": 1}
_VLLM_SAMPLING = {**_SAMPLING, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
_PROBE = Request([{"role": "user", "content": "1"}], temperature=0, max_tokens=1)
stamina.instrumentation.set_on_retry_hooks([])  # retries are counted here, not logged one by one


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask; the fields are the settings of the same names."""

    api_base: str
    api_key: SecretStr = dataclasses.field(default=SecretStr("EMPTY"))
    completions: bool = False
    structured_output: bool = True
    max_in_flight: int = 256
    request_timeout: float = 300.0
    server_wait: float = 600.0
    seed: int = 0


class LLM(contextlib.AbstractAsyncContextManager["LLM"]):
    """A model on an OpenAI-compatible server; an async context manager.

    ``counts`` has the calls, the requests that were "replayed" from the store or "shared" a call, the retries by
    kind of failure, and the tokens. ``served`` maps the models served to the folders that vLLM read them from.
    ``sampling`` has the parameters that are the same in every request.
    ``weights`` can be set to tell apart models that are served under the same name.
    """

    def __init__(self, endpoint: Endpoint, store: Store) -> None:
        self.endpoint = endpoint
        self.model = ""
        self.weights = ""
        self.served: dict[str, str] = {}
        self.sampling: dict[str, int] = _SAMPLING
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self._store = store
        self._slots = asyncio.Semaphore(endpoint.max_in_flight)
        self._pending: dict[bytes, asyncio.Task[Reply]] = {}
        self._waiting = self._answered = 0
        self._refused: Counter[str] = Counter()  # by reason
        self._successes = 0
        self._failing_since: float | None = None  # first failure after the last success
        self._accepted: set[frozenset[str]] = set()  # sets of parameters that the server has answered
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=endpoint.max_in_flight)
        loopback = re.match(r"https?://(127\.|localhost\b|\[::1\])", endpoint.api_base, re.IGNORECASE)
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.api_base,
            api_key=endpoint.api_key.get_secret_value(),
            max_retries=0,
            timeout=endpoint.request_timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, trust_env=not loopback),  # no proxy to loopback
        )

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def connect(self, model: str, api_model: str = "") -> str:
        """Chooses the model to ask; returns the name under which it is served.

        That is ``api_model`` or, if empty, the only model served or else ``model``. Raises UserError when no server
        answers within PATIENCE seconds, when it refuses the key, or when it does not serve the model.
        """
        api_base = self.endpoint.api_base
        try:
            async for attempt in stamina.retry_context(failures.NO_ANSWER, attempts=None, timeout=PATIENCE, wait_max=1):
                with attempt:
                    async with asyncio.timeout(min(60, self.endpoint.request_timeout)):
                        models = [model async for model in self._client.models.list()]
            self.served = {model.id: str(getattr(model, "root", None) or "") for model in models}
            if any(getattr(model, "owned_by", "") == "vllm" for model in models):
                self.sampling = _VLLM_SAMPLING
        except failures.NO_ANSWER as error:
            raise UserError(
                f"no server answered at {api_base} ({failures.describe(error)}); start one with python serve.py, or "
                "for a single command with python serve.py -- COMMAND, or pass another address with --api-base"
            ) from error
        except (openai.APIError, TypeError, AttributeError, ValueError):
            pass  # some gateways do not list their models
        self.model = api_model or (next(iter(self.served)) if len(self.served) == 1 else model)
        if self.served and self.model not in self.served:
            raise failures.unknown_model(self.model, api_base, self.served)
        if not self.served:  # a request for one token shows whether address, key and name are right
            await _Attempts(self, self._body(_PROBE)).reply()
        return self.model

    async def ask(self, request: Request) -> Reply:
        """The reply to a request, from the store or the server.

        Raises Refused when this request cannot be answered, UserError when no request can or most cannot.
        """
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
        return reply

    def _stop_if_most_are_refused(self) -> None:
        refused, (reason, times) = self._refused.total(), self._refused.most_common(1)[0]
        ended = refused + self._answered
        hopeful = min(self._waiting, 2 * self.endpoint.max_in_flight)  # replies take longer than refusals
        if refused >= _MANY and 2 * refused > ended + hopeful:
            raise UserError(
                f"the server refused {refused:,} of {ended:,} requests ({reason}: {times:,}); if they are too long, "
                "use a model with a larger window, or lower --max-length, --examples-shown or --answer-max-tokens"
            )

    async def _stored_or_shared(self, request: Request) -> Reply:
        body = self._body(request)
        asked = json.dumps([self.weights, body], sort_keys=True, ensure_ascii=False)  # all that determines a reply
        key = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).digest()
        while shared := self._pending.get(key):  # the same text elsewhere in the corpus: one call serves both
            await asyncio.wait([shared])
            if not shared.cancelled():  # otherwise whoever asked first has gone, and the next one asks
                self.counts["shared"] += 1
                return shared.result()
        if stored := self._store.get(key):
            self.counts["replayed"] += 1
            self._accepted.add(frozenset(body))
            return Reply(**json.loads(stored))
        self._pending[key] = asyncio.create_task(self._ask_and_store(body, key))
        try:
            return await self._pending[key]
        finally:
            del self._pending[key]

    async def _ask_and_store(self, body: dict[str, object], key: bytes) -> Reply:
        async with self._slots:
            self.in_flight += 1
            try:
                reply = await _Attempts(self, body).reply()
                self._store.put(key, json.dumps(dataclasses.asdict(reply), ensure_ascii=False))
            finally:
                self.in_flight -= 1
        return reply

    def _body(self, request: Request) -> dict[str, object]:
        completions = self.endpoint.completions
        stop = request.end + (request.text_end if completions else ())
        pattern = self.endpoint.structured_output and request.pattern
        return {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": self.endpoint.seed * 10_000 + request.sample,
            **self.sampling,
            **({"prompt": as_text(request.messages)} if completions else {"messages": request.messages}),
            **({"stop": list(stop)} if stop else {}),
            **({"structured_outputs": {"regex": request.pattern}} if pattern else {}),
        }

    async def _call(self, body: dict[str, object]) -> Reply:
        """One HTTP call. The client's typed methods would spend more time on checking the body than on the call."""
        self.counts["calls"] += 1
        path = "/completions" if self.endpoint.completions else "/chat/completions"
        answer = await self._client.post(path, body=body, cast_to=str)
        try:
            response = json.loads(answer)
            choice, usage = response["choices"][0], response.get("usage") or {}
            text = (choice["text"] if self.endpoint.completions else choice["message"].get("content")) or ""
            if not isinstance(text, str):
                raise TypeError
            reply = Reply(text, complete=choice["finish_reason"] not in _CUT_OFF)
            self.counts["prompt tokens"] += usage.get("prompt_tokens") or 0
            self.counts["reply tokens"] += usage.get("completion_tokens") or 0
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise failures.BadReply(f"the reply does not follow the OpenAI protocol: {answer!r:.200}") from error
        self._successes += 1
        self._failing_since = None
        self._accepted.add(frozenset(body))
        return reply


@dataclasses.dataclass(slots=True)
class _Attempts:
    """The attempts at one request, and what to do after each that fails."""

    llm: LLM
    body: dict[str, object]
    probe: bool = False  # whether to send a harmless request first, to tell a bad request from a bad server
    strikes: int = 0
    successes: float = math.inf  # of all requests, when this one last failed

    async def reply(self) -> Reply:
        """The reply, after as many attempts as it takes. Raises Refused or UserError where none can help."""
        retrying = stamina.AsyncRetryingCaller(attempts=None, timeout=None, wait_initial=0.5, wait_max=15)
        return await retrying(self._decide, self._attempt)

    async def _attempt(self) -> Reply:
        async with asyncio.timeout(self.llm.endpoint.request_timeout):
            if self.probe:
                await self.llm._call({**self.body, **self.llm._body(_PROBE)})
            return await self.llm._call(self.body)

    def _decide(self, error: Exception) -> bool | float:
        """Whether to try again: False, True (after the usual wait) or the seconds to wait."""
        if not isinstance(error, failures.FAILURES):
            return False
        llm, endpoint = self.llm, self.llm.endpoint
        accepted = frozenset({*self.body, "max_tokens"}) in llm._accepted
        final = failures.final(error, accepted, endpoint.api_base, llm.model, llm.served)
        if isinstance(final, UserError) and not self.probe:
            self.probe = True  # is it this request that is refused, or all?
            return 0.01
        if final:
            llm._failing_since = None
            # What the prompt leaves of the window may do. Without a limit, the completions endpoint gives 16 tokens.
            if failures.too_long(error) and not endpoint.completions and self.body.pop("max_tokens", None):
                return 0.01
            raise final from error
        kind, now = failures.kind(error), time.monotonic()
        llm._failing_since = llm._failing_since or now
        if now - llm._failing_since > endpoint.server_wait:
            raise UserError(
                f"the server at {endpoint.api_base} has not answered for {now - llm._failing_since:.0f} s ({kind}: "
                f"{failures.describe(error)}); no reply is lost: run the same command again when the server is back"
            ) from error
        to_blame = not isinstance(error, openai.RateLimitError)
        self.strikes += to_blame and llm._successes > self.successes
        self.probe = to_blame and llm._successes == self.successes
        self.successes = llm._successes
        if self.strikes >= STRIKES - 1:
            raise Refused(f"failed {STRIKES} times ({kind}), while other requests succeeded") from error
        llm.counts[f"retries: {kind}"] += 1
        return failures.retry_after(error, endpoint.server_wait) or True
