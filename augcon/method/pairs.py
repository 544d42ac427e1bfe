"""Pairs for the scorer: a query of a tree, and a worse one for the same context (paper section 3.3)."""

import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from augcon.llm.client import Refused, Request
from augcon.llm.ordered import map_in_order
from augcon.method.tree import Ask, TreeRules, parsed_reply
from augcon.text.parse import Unparseable, parse_question
from augcon.text.prompts import Prompts

Query = tuple[int, str, str]  # root, context, query

NEGATIVES: dict[str, dict[str, Any]] = {
    "weak instruction": {"weak": True},
    "one example": {"examples": 1},
    "both": {"weak": True, "examples": 1},
}


@dataclasses.dataclass(frozen=True)
class ScorerPair:
    """A query of a tree and a worse one for the same context; ``type`` says how the worse one was made."""

    context: str
    pos_query: str
    neg_query: str
    type: str
    root: int


async def scorer_pairs(
    ask: Ask,
    prompts_of: Callable[[int], Prompts],
    positives: list[Query],
    per_type: int,
    rules: TreeRules,
    seed: int,
    window: int,
) -> AsyncIterator[ScorerPair | str]:
    """Pairs each of some queries with a query for the same context from a weaker prompt.

    Each type of negative has a third of them to draw from, in random order, until it has ``per_type`` pairs.
    Yields pairs and, where a query made none, the reason.
    """
    order = random.Random(seed).sample(positives, len(positives))
    third = len(order) // len(NEGATIVES)
    for number, kind in enumerate(NEGATIVES):

        async def pair(positive: Query, kind: str = kind) -> ScorerPair | str:
            root, context, query = positive
            try:
                negative = await _worse_query(ask, prompts_of(root), context, kind, rules)
            except (Unparseable, Refused) as error:
                return str(error)
            if "".join(negative.split()) == "".join(query.split()):
                return "equal to the good one"
            return ScorerPair(context, query, negative, kind, root)

        reserve, made = order[number * third : (number + 1) * third], 0
        while reserve and made < per_type:
            batch, reserve = reserve[: per_type - made], reserve[per_type - made :]
            async for outcome in map_in_order(pair, batch, window):
                made += isinstance(outcome, ScorerPair)
                yield outcome


async def _worse_query(ask: Ask, prompts: Prompts, context: str, kind: str, rules: TreeRules) -> str:
    """A query from a weaker prompt; generation stops where the halves would begin."""
    messages = prompts.cst_messages(context, **NEGATIVES[kind])
    pattern = rules.pattern_length and prompts.question_pattern()
    end = prompts.end_of_question()
    request = Request(messages, rules.temperature, rules.max_tokens, end=end, pattern=pattern or None)
    return await parsed_reply(ask, request, rules.tries, lambda text: parse_question(text, prompts))


class Reservoir:
    """A uniform random sample of a stream of unknown length, the same for the same stream and seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.offered = size, 0
        self.kept: list[Query] = []
        self._random = random.Random(seed)

    def offer(self, query: Query) -> None:
        """Takes the next query of the stream."""
        self.offered += 1
        if len(self.kept) < self.size:
            self.kept.append(query)
        elif (place := self._random.randrange(self.offered)) < self.size:
            self.kept[place] = query


_BALANCED = 0.8


def balance(made: dict[str, list[ScorerPair]]) -> list[ScorerPair]:
    """As many pairs of each type, unless a type has so few that this would throw away much of the others."""
    sizes = [len(pairs) for pairs in made.values()]
    most = min(sizes) if min(sizes) >= _BALANCED * max(sizes) else max(sizes)
    return [pair for pairs in made.values() for pair in pairs[:most]]
