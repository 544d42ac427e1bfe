"""One async call to the LLM: limit, deadline, retries, outages, usage.

Every reply goes through the store, so that a call made once is never made again.
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

from augcon.errors import UserError, one_line
from augcon.llm import failures as faults
from augcon.llm.store import Store
from augcon.text.prompts import Message, as_text

STRIKES = 6  # failures of one request, others succeeding meanwhile, before it is given up
PATIENCE = 8  # seconds for a server that was started just before
stamina.instrumentation.set_on_retry_hooks([])  # retries are counted here, not logged one by one


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked: messages, sampling parameters, and ``sample``, the number of this draw of them.

    ``end`` are stop strings, ``text_end`` further ones for the completions endpoint, where a model would
    go on with a turn of its own. ``pattern`` is a regular expression that the server holds the reply to.
    """

    messages: list[Message]
    temperature: float
    max_tokens: int
    sample: int = 0
    end: tuple[str, ...] = ()
    text_end: tuple[str, ...] = ()
    pattern: str | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back. ``complete`` is false when the server cut it off (``finish_reason`` "length")."""

    text: str
    complete: bool


class Refused(Exception):
    """The server will never answer this one request; the message says why. Other requests go on."""


@dataclasses.dataclass
class Server:
    """Where and how to ask; see the settings of the same names."""

    api_base: str
    api_key: str = "EMPTY"
    completions: bool = False
    max_in_flight: int = 256
    request_timeout: float = 300.0
    server_wait: float = 600.0
    seed: int = 0


class LLM:
    """A model on an OpenAI-compatible server, as an async function from Request to Reply.

    Use as an async context manager. ``counts`` says what happened: calls, replayed, retries, tokens.
    """

    def __init__(self, server: Server, store: Store) -> None:
        self.server = server
        self.model = ""
        self.weights = ""  # tells models that are served under the same name apart, where that matters
        self.served: list[str] = []
        self.folders: dict[str, str] = {}  # where vLLM has each from, by name
        self.counts: Counter[str] = Counter()
        self.in_flight = 0
        self._store = store
        self._slots = asyncio.Semaphore(server.max_in_flight)
        self._pending: dict[bytes, asyncio.Future[Reply]] = {}
        self._endpoint = "/completions" if server.completions else "/chat/completions"
        self._trouble_since: float | None = None  # first failure after the last answer
        self._successes = 0
        self._accepted: set[frozenset[str]] = set()  # sets of parameters that the server has answered
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=server.max_in_flight, max_keepalive_connections=server.max_in_flight
        )
        self._client = openai.AsyncOpenAI(
            base_url=server.api_base,
            api_key=server.api_key,
            max_retries=0,
            timeout=server.request_timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, trust_env=not _on_loopback(server.api_base)),
        )

    async def __aenter__(self) -> "LLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def connect(self, model: str, api_model: str = "") -> str:
        """Finds the model on the server; returns the name it is served by.

        Asks for ``api_model``; when that is empty, for the only model served or else for ``model``. Raises
        UserError when no server answers for some seconds, it refuses the key, or it does not serve the model.
        """
        starting = stamina.retry_context(on=faults.NO_ANSWER, attempts=None, timeout=PATIENCE, wait_max=1)
        try:
            async for attempt in starting:
                with attempt:
                    async with asyncio.timeout(min(60, self.server.request_timeout)):
                        listed = [entry async for entry in self._client.models.list()]
            self.served = [entry.id for entry in listed]
            self.folders = {entry.id: str(getattr(entry, "root", None) or "") for entry in listed}
        except faults.NO_ANSWER as error:
            raise UserError(
                f"no server answers at {self.server.api_base} ({faults.words(error)}); "
                "start one (python serve.py, or for one command python serve.py -- COMMAND) or name another: --api-base"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._wrong_key(error) from error
        except (openai.APIError, TypeError, AttributeError, ValueError):
            pass  # a gateway that does not list its models
        wanted = api_model or (self.served[0] if len(self.served) == 1 else model)
        if self.served and wanted not in self.served:
            raise UserError(self._unknown_model(wanted))
        self.model = wanted
        if not self.served:  # whether address and name are right, one token tells
            await self._ask_server(self._body(_NEUTRAL))
        return wanted

    async def ask(self, request: Request) -> Reply:
        """The reply to a request, from the store or the server.

        Raises Refused when this request cannot be answered, UserError when none can.
        """
        body = self._body(request)
        key = _key_of({**body, "weights": self.weights} if self.weights else body)
        while shared := self._pending.get(key):  # the same text elsewhere in the corpus: one call serves both
            await asyncio.wait([shared])
            if not shared.cancelled():  # else its asker has gone, and who comes first asks
                self.counts["shared"] += 1
                return shared.result()
        if kept := self._store.get(key):
            self.counts["replayed"] += 1
            self._accepted.add(frozenset(body))
            return Reply(**json.loads(kept))
        future = self._pending[key] = asyncio.get_running_loop().create_future()
        try:
            async with self._slots:
                self.in_flight += 1
                try:
                    reply = await self._ask_server(body)
                    await self._store.put(key, json.dumps(dataclasses.asdict(reply), ensure_ascii=False))
                finally:
                    self.in_flight -= 1
            future.set_result(reply)
            return reply
        except BaseException as error:
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # whoever shares the call sees it; nobody has to
            else:
                future.cancel()
            raise
        finally:
            del self._pending[key]

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": self.server.seed * 10_000 + request.sample,
        }
        if self.server.completions:
            body["prompt"] = as_text(request.messages)
        else:
            body["messages"] = request.messages
        stop = request.end + (request.text_end if self.server.completions else ())
        if stop:
            body["stop"] = list(stop)
        if request.pattern:
            body["structured_outputs"] = {"regex": request.pattern}
        return body

    async def _ask_server(self, body: dict[str, Any]) -> Reply:
        shape = frozenset(body)
        strikes, successes_before, alone = 0, -1, False

        def again(error: Exception) -> bool | float:
            """Decides about a failure: raise what it means, or wait (default or given seconds) and retry."""
            nonlocal strikes, successes_before, alone
            if not isinstance(error, (*faults.NO_ANSWER, openai.APIError, faults.BadReply)):
                return False
            if _refusal(error) and shape not in self._accepted and not alone:
                alone = True  # this request or all of this kind? The neutral one will tell
                return 0.01
            self._raise_if_final(error, shape in self._accepted)
            now = time.monotonic()
            self._trouble_since = self._trouble_since or now
            if now - self._trouble_since > self.server.server_wait:
                raise UserError(
                    f"the server at {self.server.api_base} has answered nothing for "
                    f"{now - self._trouble_since:.0f} s ({faults.kind(error)}: {faults.words(error)}); "
                    "all replies so far are kept: run the same command again when it is back"
                ) from error
            limited = isinstance(error, openai.RateLimitError)
            strikes += self._successes > successes_before >= 0 and not limited
            alone = self._successes == successes_before and not limited
            successes_before = self._successes
            if strikes >= STRIKES - 1:
                raise Refused(f"{faults.kind(error)} every time, while others are answered") from error
            self.counts["retries: " + faults.kind(error)] += 1
            return faults.retry_after(error, self.server.server_wait) or True

        async for attempt in stamina.retry_context(
            on=again, attempts=None, timeout=None, wait_initial=0.5, wait_max=15, wait_jitter=1
        ):
            with attempt:
                async with asyncio.timeout(self.server.request_timeout):
                    if alone:  # nothing else tells whether the server is down or this request is bad
                        await self._call({**body, **self._body(_NEUTRAL)})
                        self._succeeded(shape)
                    reply = await self._call(body)
        self._succeeded(shape)
        return reply

    def _succeeded(self, shape: frozenset[str]) -> None:
        self._trouble_since = None
        self._successes += 1
        self._accepted.add(shape)

    async def _call(self, body: dict[str, Any]) -> Reply:
        """One HTTP call. The client's typed methods would spend more than the call itself on checking the body."""
        self.counts["calls"] += 1
        try:
            response: Any = await self._client.post(self._endpoint, body=body, cast_to=object)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise faults.BadReply(f"the reply is no JSON: {one_line(error)}") from error
        try:
            choice = response["choices"][0]
            text = (choice["text"] if self.server.completions else choice["message"].get("content")) or ""
            finish_reason = choice["finish_reason"]
            usage = response.get("usage") or {}
            prompt_tokens, reply_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        except (AttributeError, TypeError, IndexError, KeyError) as error:
            raise faults.BadReply(f"the reply is none of the OpenAI protocol: {response!r:.200}") from error
        if not isinstance(text, str):
            raise faults.BadReply(f"the reply's content is no text: {text!r:.200}")
        self.counts["prompt tokens"] += prompt_tokens
        self.counts["reply tokens"] += reply_tokens
        return Reply(text, complete=finish_reason not in _CUT_OFF)

    def _raise_if_final(self, error: Exception, accepted: bool) -> None:
        """Raises Refused or UserError for a failure that no retry can mend."""
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            raise self._wrong_key(error) from error
        if not isinstance(error, openai.APIStatusError):
            return
        message = faults.message(error)
        if error.code == "insufficient_quota":
            raise UserError(f"the server's account is used up: {message}") from error
        if error.status_code == 413 or any(sign in str(error.body).lower() for sign in faults.TOO_LONG):
            self._trouble_since = None
            raise Refused("context too long for the model") from error
        if error.status_code >= 500 or error.status_code in {408, 409, 425, 429}:
            return
        self._trouble_since = None
        if error.status_code == 404 and "model" in message.lower():
            raise UserError(f"{self._unknown_model(self.model)} ({message})") from error
        if error.status_code == 404:
            raise UserError(
                f"the server at {self.server.api_base} has no {self._endpoint} (status 404: {message}); "
                "correct --api-base, which usually ends in /v1"
            ) from error
        if accepted or error.code == "content_filter":
            raise Refused(f"refused with status {error.status_code}") from error
        raise UserError(f"the server refuses this kind of request (status {error.status_code}): {message}") from error

    def _wrong_key(self, error: openai.APIStatusError) -> UserError:
        return UserError(
            f"the server at {self.server.api_base} refuses the key (status {error.status_code}); "
            "set AUGCON_API_KEY or --api-key"
        )

    def _unknown_model(self, wanted: str) -> str:
        offered = ", ".join(repr(name) for name in self.served) or "a list it does not tell"
        return (
            f"the server at {self.server.api_base} does not serve {wanted!r}; it offers {offered}; "
            "name one with --api-model"
        )


_NEUTRAL = Request([{"role": "user", "content": "1"}], temperature=0, max_tokens=1)
_CUT_OFF = {"length", "max_tokens", "abort", "error", "content_filter"}  # finish reasons, of vLLM and others


def _key_of(body: dict[str, Any]) -> bytes:
    """A digest of all that determines a reply. Long texts go in as they are: escaping them costs most of the time."""
    digest = hashlib.sha256()
    texts = [body["prompt"]] if "prompt" in body else [part for turn in body["messages"] for part in turn.values()]
    parameters = json.dumps({name: body[name] for name in sorted(body) if name not in {"prompt", "messages"}})
    for part in (parameters, "prompt" if "prompt" in body else "messages", *texts):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _refusal(error: Exception) -> bool:
    """Whether the server refuses a request for what it is, not for its length."""
    refused = isinstance(error, openai.APIStatusError) and error.status_code in {400, 422}
    return refused and not any(sign in str(error.body).lower() for sign in faults.TOO_LONG)


def _on_loopback(address: str) -> bool:
    """Whether an address is on this machine, where the environment's proxies are not to be asked."""
    return bool(re.match(r"https?://(?:127\.|localhost\b|\[::1\])", address, re.IGNORECASE))
