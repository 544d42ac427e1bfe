"""What a server refuses or calls otherwise, and whether its model thinks first: found out by a few probes.

A dialect is the difference between our requests and those that a server takes. It is the same for all requests of a
run, so that equal requests stay equal.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Set
from typing import Any

import openai
from pydantic import TypeAdapter

from augcon.data import Request
from augcon.llm import failures
from augcon.text.prompts import load_prompts

QUESTION = "What is 17 times 23? Reply with the number alone."  # worth a thought to a model that thinks
PROBE = Request(
    [{"role": "user", "content": QUESTION}],
    temperature=0.85,
    max_tokens=64,  # enough to see that a model thinks
    end=load_prompts("en").end_of_question(),
    text_end=load_prompts("en").end_of_reply(),
    pattern="[0-9]{1,9}",
)
_LONGER = 1024  # tokens where what is cut off may be thinking that only its end would show
_MOST = 4096  # tokens of an answer, to see whether a server takes as many and room for thinking
ROOM = 8192  # tokens more for a reply whose thinking stays
# What turns thinking off, each taken by some: vLLM, SGLang and llama.cpp (one of the two names, by model); DashScope;
# OpenRouter; DeepSeek and others; OpenAI and Ollama. A server may take what it does not know, so the reply decides.
SWITCHES: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    {"enable_thinking": False},
    {"reasoning": {"enabled": False}},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
)
_EFFORTS: tuple[dict[str, Any], ...] = ({"reasoning_effort": "minimal"}, {"reasoning_effort": "low"})
_SWITCHING = {name for switch in SWITCHES for name in switch}
_NEEDED = {"model", "messages", "prompt"}
_NO_ROOM = "output limit was reached"  # OpenAI's refusal where thinking leaves nothing for the reply

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """What a reply to the probe shows: thinking, or an end that is not one."""

    thinks: bool
    cut_off: bool


Send = Callable[[Body], Awaitable[Seen]]  # raises openai.APIStatusError for what is refused


@dataclasses.dataclass(frozen=True, slots=True)
class Dialect:
    """How requests are changed. ``left_out`` are parameters that are not sent, ``stops`` the most stop strings.

    ``limit`` is the name of max_tokens, empty where it has none; ``room`` is added to it, for thinking. ``switch`` are
    the parameters that turn thinking off, or keep it short.
    """

    left_out: tuple[str, ...] = ()
    limit: str = "max_tokens"
    stops: int | None = None
    switch: Body = dataclasses.field(default_factory=dict)
    room: int = 0

    @classmethod
    def read(cls, stored: str) -> "Dialect | None":
        """The dialect that ``write`` wrote; None for what is none."""
        with contextlib.suppress(ValueError):
            return TypeAdapter(cls).validate_json(stored)
        return None

    def write(self) -> str:
        """The dialect as JSON."""
        return json.dumps(dataclasses.asdict(self))

    def apply(self, body: Body) -> Body:
        """A request as the server takes it."""
        said = {name: value for name, value in body.items() if name not in self.left_out}
        if "stop" in said and self.stops:
            said["stop"] = said["stop"][: self.stops]
        most = said.pop("max_tokens")
        return {**said, **({self.limit: most + self.room} if self.limit else {}), **self.switch}

    def same(self, body: Body) -> Body:
        """What is the same in all requests, of what they have in common; None for what is not sent."""
        return {**body, **self.switch, **dict.fromkeys(self.left_out)}

    def describe(self) -> str:
        """What is unusual, in one line; nothing where all is as usual."""
        switch = ", ".join(f"{name} {value}" if self.room else name for name, value in self.switch.items())
        thinks = "the model thinks before it replies, which costs time and money"
        short = f" ({switch} may keep that short)" if switch else ""
        room = f", and may write {self.room:,} tokens more for each" if self.limit else ""
        said = {
            f"it refuses {', '.join(self.left_out)}": self.left_out,
            f"max_tokens is {self.limit or 'not sent'} here": self.limit != "max_tokens",
            f"it takes {self.stops} stop strings at most": self.stops,
            f"thinking is turned off ({switch})": switch and not self.room,
            f"{thinks}{short}{room}": self.room,
        }
        return "; ".join(words for words, true in said.items() if true)

    def heeding(self, error: openai.APIStatusError, sent: Body, given: Set[str]) -> "Dialect | None":
        """The dialect without what a refusal names, or with what it asks for. ``given`` are parameters by the user."""
        named = parameter_named(error, sent.keys() - _NEEDED - given)
        if named and named == self.limit:
            return dataclasses.replace(self, limit="max_completion_tokens" if named == "max_tokens" else "")
        if named in self.switch:
            return dataclasses.replace(self, switch={}, room=ROOM)
        if named == "stop":
            numbers = map(int, re.findall(r"\d{1,9}", str(error.body)))
            if fewer := [number for number in numbers if 0 < number < len(sent["stop"])]:
                return dataclasses.replace(self, stops=max(fewer))
        if named:
            return dataclasses.replace(self, left_out=(*self.left_out, named))
        for switch in () if self.switch or self.room or given & _SWITCHING else SWITCHES:
            if parameter_named(error, switch):
                return dataclasses.replace(self, switch=switch)
        return None


async def find_out(send: Send, body: Body, known: Dialect, given: Set[str]) -> Dialect:
    """The dialect of a server, with what is ``known`` of others with the same model.

    ``given`` are parameters that the user wants sent as they are. Each refusal makes the dialect another one, and none
    comes twice. Raises the refusal where nothing is to be done.
    """
    found, thinks = known, None
    form = {name: value for name, value in body.items() if name == "structured_outputs"}
    body = {name: value for name, value in body.items() if name not in form}
    while thinks is None:
        try:
            thinks = await _thinks(send, body, found)
        except openai.APIStatusError as error:
            if not (heeding := found.heeding(error, found.apply(body), given)):
                raise
            found = heeding
    if thinks and not found.room:
        settled = found.switch or given & _SWITCHING
        found = await _make_room(send, body, found) if settled else await _turn_off(send, body, found)
    if form and not form.keys() & set(found.left_out):
        try:
            await send(found.apply({**body, **form}))
        except openai.APIStatusError:
            found = dataclasses.replace(found, left_out=(*found.left_out, *form))
    return found


async def _turn_off(send: Send, body: Body, dialect: Dialect) -> Dialect:
    """The dialect with the first switch that ends the thinking; else with as little of it as may be, and room."""
    for switch in SWITCHES:
        tried = dataclasses.replace(dialect, switch=switch)
        with contextlib.suppress(openai.APIStatusError):
            if not await _thinks(send, body, tried):
                return tried
    return await _make_room(send, body, dialect, *_EFFORTS)


async def _make_room(send: Send, body: Body, dialect: Dialect, *efforts: Body) -> Dialect:
    """The dialect with room for thinking, and the first of some efforts that the server takes."""
    for effort in (*efforts, dialect.switch):
        roomy = dataclasses.replace(dialect, switch=effort, room=ROOM)
        try:
            await send(roomy.apply({**body, "max_tokens": _MOST}))
            break
        except openai.APIStatusError as error:
            if failures.too_long(error) or parameter_named(error, [roomy.limit]):  # more than there may be
                return dataclasses.replace(roomy, limit="")
    return roomy


async def _thinks(send: Send, body: Body, dialect: Dialect) -> bool:
    """Whether the model thinks before it replies. Chat that is cut off without a sign of that is asked for longer."""
    for tokens in (body["max_tokens"], _LONGER) if "messages" in body else (body["max_tokens"],):
        try:
            seen = await send(dataclasses.replace(dialect, room=0).apply({**body, "max_tokens": tokens}))
        except openai.APIStatusError as error:
            if _NO_ROOM in str(error.body):
                return True
            raise
        if seen.thinks or not seen.cut_off:
            return seen.thinks
    return False


def look(answer: str) -> Seen:
    """What a reply shows. Raises ValueError, LookupError, TypeError or AttributeError where it is not one."""
    response = json.loads(answer)
    choice, usage = response["choices"][0], response.get("usage") or {}
    message = choice.get("message") or {}
    cut_off, written = choice["finish_reason"] == "length", message.get("content") or ""
    before, end, _ = written.partition("</think")
    block = re.sub(r"^\s*<think(ing)?>", "", before)
    apart = message.get("reasoning_content") or message.get("reasoning")
    counted = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    hidden = message and cut_off and not written  # all the tokens went where they are not shown
    return Seen(bool(apart or counted or hidden or ((end or block != before) and block.strip())), cut_off)


def parameter_named(error: openai.APIStatusError, names: Iterable[str]) -> str:
    """Which of some parameters a refusal names, in its field for that or else first in its words; or none."""
    pattern = "|".join(sorted(filter(None, names)))
    for words in _said(error.body):
        if pattern and (found := re.search(rf"(?<![\w-])({pattern})(?![\w-])", words, re.IGNORECASE | re.ASCII)):
            return found[1].lower()
    return ""


def _said(error: object, depth: int = 8) -> Iterator[str]:
    """The texts in an error, those first that name a parameter; of OpenAI's form, FastAPI's, OpenRouter's or TGI's."""
    if isinstance(error, str):
        yield error
    elif isinstance(error, dict):
        error = [error.get(key) for key in ("param", "loc", "msg", "message", "detail", "error", "metadata", "raw")]
    if isinstance(error, list) and depth:  # of what is nested deeper, nothing is meant
        for part in error:
            yield from _said(part, depth - 1)
