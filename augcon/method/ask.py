"""Asking the LLM until its reply can be parsed."""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

from augcon.data import Ask, Refused, Request
from augcon.text.parse import Improvable, Unparseable

Parsed = TypeVar("Parsed")
WARMER = 0.7  # the temperature of further tries if the first was at 0, where the same reply would come again
CUT_OFF = "cut off"
_MOST_CUT_OFF = 2  # replies after which a further one would hardly fit either


@dataclasses.dataclass(frozen=True, slots=True)
class Asked(Generic[Parsed]):
    """What came of asking. ``tries`` counts the replies and ``reply`` is the last; ``refused``: there will be none."""

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
    """What ``parse`` makes of the reply. If it raises Unparseable, another sample is asked for, up to ``tries`` in all.

    Two replies that were cut off end it too. Raises what ``ask`` raises, except Refused.
    """
    asked: Asked[Parsed] = Asked(None, 0, "never asked")
    cut_off = 0
    for attempt in range(1, tries + 1):
        try:
            reply = await ask(request)
            if reply.complete:
                return Asked(parse(reply.text), attempt, reply=reply.text)
            asked = Asked(None, attempt, CUT_OFF, reply.text)
            useless = [(CUT_OFF, reply.text)]
            cut_off += 1
            if cut_off == _MOST_CUT_OFF:
                break
        except Unparseable as error:
            asked = Asked(None, attempt, str(error), reply.text)
            useless = [] if isinstance(error, Improvable) else [(str(error), reply.text)]
        except Refused as error:
            return dataclasses.replace(asked, reason=str(error), refused=True)
        # Another sample, without stop strings: one of them may have cut the reply short.
        warm = request.temperature or WARMER
        request = dataclasses.replace(
            request, sample=request.sample + 1, end=(), temperature=warm, unusable=(*request.unusable, *useless)
        )
    return asked
