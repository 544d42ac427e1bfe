"""Pairs for the scorer: a query of a tree, and a worse one for the same context (paper section 3.3)."""

import hashlib
import heapq
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from augcon.data import Ask, Query, RootContext, ScorerPair
from augcon.method.ask import ask_until_parsed
from augcon.method.diversity import likeness
from augcon.method.questions import ALIKE
from augcon.method.tree import TreeRules, question_request
from augcon.ordered import map_in_order
from augcon.text.parse import Improvable, parse_question
from augcon.text.prompts import Prompts

Item = TypeVar("Item")
PromptsFor = Callable[[int], Prompts]  # the prompts for a root context by its number
NEGATIVES: dict[str, dict[str, Any]] = {  # what is weaker in the prompt; see ``Prompts.cst_messages``
    "weak instruction": {"weak": True},
    "one example": {"examples": 1},
    "both": {"weak": True, "examples": 1},
}
_BALANCED = 0.8


async def make_pairs(
    ask: Ask,
    prompts_for: PromptsFor,
    roots: Sequence[RootContext],
    queries: Sequence[Query],
    negatives: int,
    rules: TreeRules,
    room: Callable[[], int],
) -> AsyncIterator[ScorerPair | str]:
    """Pairs queries, in a random order, with worse ones, or says why a query makes no pair.

    Each kind of negative takes of its third of the queries until it has ``negatives`` pairs.
    """

    async def pair(drawn: tuple[str, Query]) -> ScorerPair | str:
        kind, query = drawn
        return await make_pair(ask, prompts_for(query.root), roots[query.root], rules, kind, query)

    third = len(queries) // len(NEGATIVES)
    reserve = {kind: queries[number * third : (number + 1) * third] for number, kind in enumerate(NEGATIVES)}
    lacking = dict.fromkeys(NEGATIVES, negatives)
    while batch := [(kind, query) for kind, number in lacking.items() for query in reserve[kind][:number]]:
        reserve = {kind: reserve[kind][number:] for kind, number in lacking.items()}
        async for (kind, _), outcome in map_in_order(pair, batch, room):
            lacking[kind] -= isinstance(outcome, ScorerPair)
            yield outcome


async def make_pair(
    ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, kind: str, query: Query
) -> ScorerPair | str:
    """A query and a worse one, or why it makes no pair."""

    def read(reply: str) -> str:
        worse = parse_question(reply, prompts)
        if likeness(worse, query.text) >= ALIKE:
            raise Improvable("like the good one")
        return worse

    request = question_request(prompts, root, query.context, rules, **NEGATIVES[kind])
    worse = await ask_until_parsed(ask, request, rules.tries, read)
    if worse.value is None:
        return worse.reason
    return ScorerPair(query.context, query.text, worse.value, kind, query.root, query.id)


def balance(made: Mapping[str, Sequence[ScorerPair]]) -> list[ScorerPair]:
    """Equally many pairs of each kind, unless one has so few that too many of the others would be lost."""
    sizes = [len(pairs) for pairs in made.values()]
    most = min(sizes) if min(sizes) >= _BALANCED * max(sizes) else max(sizes)
    return [pair for pairs in made.values() for pair in pairs[:most]]


class Sample(Generic[Item]):
    """A uniform random sample of items by their keys: the same in whatever order, and in how many parts, they come."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.offered = size, seed, 0
        self._drawn: list[tuple[int, int, Item]] = []  # a heap, the last one drawn on top

    def offer(self, key: object, item: Item) -> bool:
        """Offers an item, and says whether it is in the sample so far."""
        self.offered += 1
        drawn = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
        return self._offer(int.from_bytes(drawn), item)

    def __iadd__(self, other: "Sample[Item]") -> "Sample[Item]":
        """The sample of what was offered to either."""
        self.offered += other.offered
        for drawn, _, item in other._drawn:
            self._offer(-drawn, item)
        return self

    @property
    def kept(self) -> list[Item]:
        """The items in the order in which they were drawn, which is a random one."""
        return [item for *_, item in sorted(self._drawn, key=lambda drawn: -drawn[0])]

    def _offer(self, drawn: int, item: Item) -> bool:
        if len(self._drawn) == self.size and (not self.size or drawn >= -self._drawn[0][0]):
            return False
        heapq.heappush(self._drawn, (-drawn, len(self._drawn), item))
        if len(self._drawn) > self.size:
            heapq.heappop(self._drawn)
        return True
