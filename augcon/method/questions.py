"""Questions that hold: what is wrong with one, and another sample where something is (AugCon's own checks)."""

import dataclasses

from augcon.data import Ask, Request
from augcon.method.ask import ask_until_parsed
from augcon.method.diversity import likeness
from augcon.text.checks import ungrounded
from augcon.text.parse import Unparseable, parse_question
from augcon.text.prompts import Prompts

COPY = "copy of the question above"
ALIKE = 0.9  # likeness from which one question is a copy of another


@dataclasses.dataclass(slots=True)
class Draft:
    """The best question so far about a context: the first with nothing wrong, or else the first.

    ``context`` is what the question is checked against, ``above`` the question about the context above, if any.
    """

    context: str
    above: str | None
    question: str | None = None
    fault: str = "no question"

    def offer(self, question: str) -> None:
        """Takes another question into account."""
        if self.fault:
            fault = self._fault_of(question)
            if self.question is None or not fault:
                self.question, self.fault = question, fault

    def _fault_of(self, question: str) -> str:
        if self.above and likeness(question, self.above) >= ALIKE:
            return COPY
        names = ungrounded(question, self.context)
        return f"not in the context: {', '.join(names)}" if names else ""

    @property
    def kept(self) -> str | None:
        """The question, unless it is a copy."""
        return None if self.fault == COPY else self.question

    @property
    def doubt(self) -> str:
        """Which of its words the context does not hold; empty for none."""
        return self.fault if self.kept else ""

    async def improve(self, ask: Ask, prompts: Prompts, request: Request, tries: int) -> int:
        """Asks for the question alone while something is wrong with it; returns the number of replies."""

        def read(reply: str) -> None:
            self.offer(parse_question(reply, prompts))
            if self.fault:
                raise Unparseable(self.fault)

        return (await ask_until_parsed(ask, request, tries, read)).tries if self.fault and tries > 0 else 0
