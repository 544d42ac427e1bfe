"""The client of the LLM: one async call for a request, within limits, with retries.

Every reply goes through the store, so that no call is made twice.
"""

import asyncio
import dataclasses
import hashlib
import json
import re
import time
from collections import Counter
from typing import Any

import openai
import stamina
from pydantic import SecretStr

from augcon.data import Refused, Reply, Request
from augcon.errors import UserError, one_line
from augcon.llm import failures
from augcon.llm.store import Store
from augcon.text.prompts import as_text

STRIKES = 6  # failures after which a request is given up, if others succeed in between
PATIENCE = 8  # seconds to wait for a server that has just been started
_CUT_OFF = {"length", "max_tokens", "abort", "error", "content_filter"}  # finish reasons, of vLLM and others
_PROBE = Request([{"role": "user", "content": "1"}], temperature=0, max_tokens=1)
stamina.instrumentation.set_on_retry_hooks([])  # retries are counted here, not logged one by one


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to ask; the fields are the settings of the same names."""

    api_base: str
    api_key: SecretStr = dataclasses.field(default=SecretStr("EMPTY"))
    completions: bool = False
    max_in_flight: int = 256
    request_timeout: float = 300.0
    server_wait: float = 600.0
    seed: int = 0


class LLM:
    """A model on an OpenAI-compatible server; an async context manager.

    ``counts`` has the calls, the requests that were "replayed" from the store or "shared" a call, the retries by
    kind of failure, and the tokens. ``folders`` maps the models served to the folders that vLLM read them from.
    ``weights`` can be set to tell apart models that are served under the same name.
    """

    def __init__(self, endpoint: Endpoint, store: Store) -> None:
        self.endpoint = endpoint
        self.model = ""
        self.weights = ""
        self.served: list[str] = []
        self.folders: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self._store = store
        self._slots = asyncio.Semaphore(endpoint.max_in_flight)
        self._pending: dict[bytes, asyncio.Task[Reply]] = {}
        self._successes = 0
        self._failing_since: float | None = None  # first failure after the last success
        self._accepted: set[frozenset[str]] = set()  # sets of parameters that the server has answered
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=endpoint.max_in_flight, max_keepalive_connections=endpoint.max_in_flight
        )
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.api_base,
            api_key=endpoint.api_key.get_secret_value(),
            max_retries=0,
            timeout=endpoint.request_timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, trust_env=not _is_loopback(endpoint.api_base)),
        )

    async def __aenter__(self) -> "LLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def connect(self, model: str, api_model: str = "") -> str:
        """Chooses the model to ask; returns the name under which it is served.

        That is ``api_model`` or, if empty, the only model served or else ``model``. Raises UserError when no server
        answers within PATIENCE seconds, when it refuses the key, or when it does not serve the model.
        """
        api_base = self.endpoint.api_base
        starting = stamina.AsyncRetryingCaller(attempts=None, timeout=PATIENCE, wait_max=1)
        try:
            await starting(failures.NO_ANSWER, self._list_models)
        except failures.NO_ANSWER as error:
            raise UserError(
                f"no server answered at {api_base} ({failures.describe(error)}); start one with python serve.py, or "
                "for a single command with python serve.py -- COMMAND, or pass another address with --api-base"
            ) from error
        except failures.WRONG_KEY as error:
            raise failures.wrong_key(error, api_base) from error
        except (openai.APIError, TypeError, AttributeError, ValueError):
            pass  # some gateways do not list their models
        self.model = api_model or (self.served[0] if len(self.served) == 1 else model)
        if self.served and self.model not in self.served:
            raise failures.unknown_model(self.model, api_base, self.served)
        if not self.served:  # a request for one token shows whether the address and the name are right
            await _Attempts(self, self._body(_PROBE)).reply()
        return self.model

    async def _list_models(self) -> None:
        async with asyncio.timeout(min(60, self.endpoint.request_timeout)):
            models = [model async for model in self._client.models.list()]
        self.served = [model.id for model in models]
        self.folders = {model.id: str(getattr(model, "root", None) or "") for model in models}

    async def ask(self, request: Request) -> Reply:
        """The reply to a request, from the store or the server.

        Raises Refused when this request cannot be answered, UserError when no request can.
        """
        body = self._body(request)
        key = self._key(request, body)
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
        """The JSON of a call."""
        completions = self.endpoint.completions
        stop = request.end + (request.text_end if completions else ())
        return {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": self.endpoint.seed * 10_000 + request.sample,
            **({"prompt": as_text(request.messages)} if completions else {"messages": request.messages}),
            **({"stop": list(stop)} if stop else {}),
            **({"structured_outputs": {"regex": request.pattern}} if request.pattern else {}),
        }

    def _key(self, request: Request, body: dict[str, object]) -> bytes:
        """A digest of all that determines a reply. Texts go in as they are: escaping them takes most of the time."""
        parameters = {name: value for name, value in body.items() if name not in {"prompt", "messages"}}
        if self.weights:
            parameters["weights"] = self.weights
        if self.endpoint.completions:
            texts = ["prompt", as_text(request.messages)]
        else:
            texts = ["messages", *(text for message in request.messages for text in message.values())]
        digest = hashlib.sha256()
        for part in (json.dumps(parameters, sort_keys=True), *texts):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.digest()

    async def _call(self, body: dict[str, object]) -> Reply:
        """One HTTP call. The client's typed methods would spend more time on checking the body than on the call."""
        self.counts["calls"] += 1
        path = "/completions" if self.endpoint.completions else "/chat/completions"
        try:
            response: Any = await self._client.post(path, body=body, cast_to=object)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise failures.BadReply(f"the reply is not JSON: {one_line(error)}") from error
        try:
            choice = response["choices"][0]
            text = (choice["text"] if self.endpoint.completions else choice["message"].get("content")) or ""
            finish_reason = choice["finish_reason"]
            usage = response.get("usage") or {}
            prompt_tokens, reply_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        except (AttributeError, TypeError, IndexError, KeyError) as error:
            raise failures.BadReply(f"the reply does not follow the OpenAI protocol: {response!r:.200}") from error
        if not isinstance(text, str):
            raise failures.BadReply(f"the content of the reply is not text: {text!r:.200}")
        self.counts["prompt tokens"] += prompt_tokens
        self.counts["reply tokens"] += reply_tokens
        self._successes += 1
        self._failing_since = None
        self._accepted.add(frozenset(body))
        return Reply(text, complete=finish_reason not in _CUT_OFF)


class _Attempts:
    """The attempts at one request, and what to do after each that fails."""

    def __init__(self, llm: LLM, body: dict[str, object]) -> None:
        self._llm = llm
        self._body = body
        self._probe = False  # whether to send a harmless request first, to tell a bad request from a bad server
        self._strikes = 0
        self._successes: int | None = None  # of all requests, when this one last failed

    async def reply(self) -> Reply:
        """The reply, after as many attempts as it takes. Raises Refused or UserError where none can help."""
        retrying = stamina.AsyncRetryingCaller(attempts=None, timeout=None, wait_initial=0.5, wait_max=15)
        return await retrying(self._decide, self._attempt)

    async def _attempt(self) -> Reply:
        async with asyncio.timeout(self._llm.endpoint.request_timeout):
            if self._probe:
                await self._llm._call({**self._body, **self._llm._body(_PROBE)})
            return await self._llm._call(self._body)

    def _decide(self, error: Exception) -> bool | float:
        """Whether to try again: False, True (after the usual wait) or the seconds to wait."""
        if not isinstance(error, failures.FAILURES):
            return False
        llm, endpoint = self._llm, self._llm.endpoint
        accepted = frozenset(self._body) in llm._accepted
        if failures.is_refusal(error) and not accepted and not self._probe:
            self._probe = True  # is it this request that is refused, or all with these parameters?
            return 0.01
        if final := failures.final(error, accepted, endpoint.api_base, llm.model, llm.served):
            llm._failing_since = None
            raise final from error
        kind, now = failures.kind(error), time.monotonic()
        llm._failing_since = llm._failing_since or now
        if now - llm._failing_since > endpoint.server_wait:
            raise UserError(
                f"the server at {endpoint.api_base} has not answered for {now - llm._failing_since:.0f} s "
                f"({kind}: {failures.describe(error)}); all replies so far are stored: "
                "run the same command again when the server is back"
            ) from error
        rate_limited = isinstance(error, openai.RateLimitError)  # which is not the fault of this request
        if self._successes is not None and llm._successes > self._successes and not rate_limited:
            self._strikes += 1
        self._probe = llm._successes == self._successes and not rate_limited
        self._successes = llm._successes
        if self._strikes >= STRIKES - 1:
            raise Refused(f"failed {STRIKES} times ({kind}), while other requests succeeded") from error
        llm.counts[f"retries: {kind}"] += 1
        return failures.retry_after(error, endpoint.server_wait) or True


def _is_loopback(address: str) -> bool:
    """Whether an address is on this machine, which no proxy of the environment can reach."""
    return bool(re.match(r"https?://(?:127\.|localhost\b|\[::1\])", address, re.IGNORECASE))
