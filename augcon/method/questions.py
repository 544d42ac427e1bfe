"""Questions that hold: what is wrong with one, and another sample where something is (AugCon's own checks)."""

import dataclasses

from augcon.data import Ask, Node, Outcome, Request
from augcon.method.ask import WARMER, ask_until_parsed
from augcon.method.diversity import likeness
from augcon.text.checks import points_at_text, ungrounded
from augcon.text.parse import parse_question
from augcon.text.prompts import Prompts

CUT, COPY = "cut in the middle", "copy of the question above"  # details of a node
ALIKE = 0.9  # likeness from which one question is a copy of another


@dataclasses.dataclass(slots=True)
class Draft:
    """A node in the making. Its question is the first with nothing wrong, or else the first.

    The question is checked against ``text`` and the article's ``title``; ``above`` is the question about the context
    above, if any.
    """

    text: str
    above: str | None
    title: str = ""
    question: str | None = None
    fault: str = "no question"
    outcome: Outcome = "done"
    detail: str = ""
    tries: int = 0

    def offer(self, question: str) -> None:
        """Takes another question into account."""
        if self.fault:
            fault = self._fault_of(question)
            if self.question is None or not fault:
                self.question, self.fault = question, fault

    def _fault_of(self, question: str) -> str:
        if self.above and likeness(question, self.above) >= ALIKE:
            return COPY
        if points_at_text(question, self.text):
            return "speaks of the text"
        names = ungrounded(question, f"{self.title}\n{self.text}" if self.title else self.text)
        return f"not in the context: {', '.join(names)}" if names else ""

    async def improve(self, ask: Ask, prompts: Prompts, request: Request, most: int) -> None:
        """Asks for the question alone while none is there or it has a fault, up to ``most`` replies in all."""

        def read(reply: str) -> bool:
            self.offer(parse_question(reply, prompts))
            return True

        # One reply at a time, as further tries of one request go without its stop strings, and so write the halves.
        while self.fault and self.tries < most:
            warm = request.temperature or (WARMER if self.tries else 0)
            again = dataclasses.replace(request, sample=request.sample + self.tries, temperature=warm)
            asked = await ask_until_parsed(ask, again, most - self.tries, read)
            self.tries += asked.tries
            if asked.value is None:
                if self.question is None and self.outcome == "done":
                    self.outcome, self.detail = "failed" if asked.refused else "not parseable", asked.reason
                break

    def node(self, root: int, pass_number: int, path: str, context: str) -> Node:
        """The node. A copy of the question above is left out."""
        copy = self.fault == COPY
        question, doubt = (None, "") if copy else (self.question, self.fault if self.question else "")
        detail = ", ".join(filter(None, [self.detail, COPY * copy]))
        return Node(root, pass_number, path, context, question, self.outcome, detail, self.tries, doubt)
