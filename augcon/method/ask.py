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
    asked: Asked[Parsed] = Asked(None, 0, "never asked")
    for attempt in range(1, tries + 1):
        try:
            reply = await ask(request)
            if reply.complete:
                return Asked(parse(reply.text), attempt, reply=reply.text)
            asked = Asked(None, attempt, "cut off", reply.text)
        except Unparseable as error:
            asked = Asked(None, attempt, str(error), reply.text)
        except Refused as error:
            return dataclasses.replace(asked, reason=str(error), refused=True)
        # A fresh sample, without stop strings: one of them may have cut the reply short.
        warm = request.temperature or WARMER
        request = dataclasses.replace(request, sample=request.sample + 1, end=(), temperature=warm)
    return asked
