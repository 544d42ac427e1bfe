"""Asking the LLM until its reply can be parsed."""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from augcon.data import Ask, Refused, Request
from augcon.text.parse import Unparseable

Parsed = TypeVar("Parsed")
WARMER = 0.7  # the temperature of further tries where the first has none: at 0 the same reply would come again


@dataclasses.dataclass(frozen=True, slots=True)
class Asked(Generic[Parsed]):
    """What asking came to. ``tries`` counts the replies, ``reply`` is the last; ``refused``: there will be none."""

    value: Parsed | None
    tries: int
    reason: str = ""
    reply: str = ""
    refused: bool = False

    @property
    def outcome(self) -> Parsed | str:
        """The value, or the reason why there is none."""
        return self.reason if self.value is None else self.value


async def ask_until_parsed(ask: Ask, request: Request, tries: int, parse: Callable[[str], Parsed]) -> Asked[Parsed]:
    """What ``parse`` makes of the reply. While it raises Unparseable, a fresh sample is asked for, ``tries`` in all.

    Raises what ``ask`` raises, except Refused.
    """
    reason, text = "never asked", ""
    for attempt in range(tries):
        if attempt:  # a fresh sample, without stop strings: one of them may have cut the reply short
            warm = request.temperature or WARMER
            request = dataclasses.replace(request, sample=request.sample + 1, end=(), temperature=warm)
        try:
            reply = await ask(request)
        except Refused as error:
            return Asked(None, attempt, str(error), text, refused=True)
        text = reply.text
        if not reply.complete:
            reason = "cut off"
            continue
        try:
            return Asked(parse(text), attempt + 1, reply=text)
        except Unparseable as error:
            reason = str(error)
    return Asked(None, tries, reason, text)
