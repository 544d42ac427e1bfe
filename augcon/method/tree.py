"""The Context-Split-Tree (paper section 3.2, Algorithm 1): trees of queries over root contexts."""

import asyncio
import dataclasses
from collections import Counter

from augcon.data import Ask, Node, Outcome, Query, Request, RootContext
from augcon.method.ask import Asked, ask_until_parsed
from augcon.method.diversity import DiverseQueries, rouge_l_precision
from augcon.text.parse import parse_split
from augcon.text.prompts import Prompts
from augcon.text.units import length, words


@dataclasses.dataclass(frozen=True)
class TreeRules:
    """When to ask, when to ask again and when to stop; see the settings of the same names."""

    min_length: int = 20
    rouge_threshold: float = 0.7
    query_temperature: float = 0.85
    query_max_tokens: int = 1024
    tries: int = 4
    oversample: float = 1.15
    max_passes: int = 6
    structured_output: bool = False
    max_length: int = 500  # of a root context: bounds the halves where the server enforces the form of replies


# A tree must stay linear in its text even if a model returns two halves that are each nearly the whole. So
# each node has a share of its root's length: halves divide it by their lengths, and a half never takes more
# than nine tenths. Honest halves keep a share near their length; a share used up counts as too short.
_LARGEST_HALF = 0.9
_SMALLEST_SHARE = 0.25  # of min_length


@dataclasses.dataclass(frozen=True)
class _Spot:
    """Where a tree has grown to: a context not yet asked, its length and words, and its share of the root's length."""

    context: str
    size: int
    words: list[str]
    path: str
    share: float


class _Tree:
    """One tree over a root context; ``pass_number`` draws fresh samples."""

    def __init__(self, ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, pass_number: int) -> None:
        self.ask, self.prompts, self.root, self.rules, self.pass_number = ask, prompts, root, rules, pass_number

    async def grow(self, spot: _Spot) -> list[Node]:
        """The node at a spot and all below it, in the order of their paths."""
        if spot.size < self.rules.min_length:
            return [self.node(spot, "too short")]
        if spot.share < _SMALLEST_SHARE * self.rules.min_length:
            return [self.node(spot, "too short", detail="share of the root used up")]
        asked = await self.query_and_split(spot.context)
        if asked.value is None:
            outcome: Outcome = "failed" if asked.refused else "not parseable"
            return [self.node(spot, outcome, detail=asked.reason, tries=asked.tries)]
        query, halves = asked.value
        sizes = [length(half) for half in halves]
        if max(sizes) >= spot.size:
            return [self.node(spot, "done", query, "not shorter", asked.tries)]
        cuts = [words(half) for half in halves]
        if min(rouge_l_precision(cut, spot.words) for cut in cuts) < self.rules.rouge_threshold:
            return [self.node(spot, "hallucinated", query, tries=asked.tries)]
        shares = [spot.share * min(size / (sum(sizes) or 1), _LARGEST_HALF) for size in sizes]
        spots = [_Spot(half, sizes[i], cuts[i], f"{spot.path}{i + 1}", shares[i]) for i, half in enumerate(halves)]
        if min(sizes) < self.rules.min_length:  # at most one of them is asked: no need for two tasks
            first, second = [await self.grow(half) for half in spots]
        else:
            first, second = await asyncio.gather(*map(self.grow, spots))
        return [self.node(spot, "done", query, tries=asked.tries), *first, *second]

    async def query_and_split(self, context: str) -> Asked[tuple[str, tuple[str, str]]]:
        """The one call of a node: its query and its halves."""
        rules, prompts = self.rules, self.prompts
        request = Request(
            prompts.cst_messages(context),
            rules.query_temperature,
            rules.query_max_tokens,
            sample=self.pass_number * rules.tries,
            text_end=prompts.end_of_reply(),
            pattern=prompts.cst_pattern(rules.max_length) if rules.structured_output else None,
        )
        return await ask_until_parsed(self.ask, request, rules.tries, lambda text: parse_split(text, prompts))

    def node(self, spot: _Spot, outcome: Outcome, query: str | None = None, detail: str = "", tries: int = 0) -> Node:
        return Node(self.root.root, self.pass_number, spot.path, spot.context, query, outcome, detail, tries)


async def grow_tree(
    ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, pass_number: int = 0
) -> list[Node]:
    """Grows one tree over a root context, both halves of every node at once; the nodes in the order of their paths.

    ``pass_number`` draws fresh samples. Raises what ``ask`` raises, except Refused, which ends a node.
    """
    context = root.text.strip()
    spot = _Spot(context, root.length, words(context), "", root.length)
    return await _Tree(ask, prompts, root, rules, pass_number).grow(spot)


@dataclasses.dataclass(frozen=True)
class Grown:
    """All trees over one root context, the last ``refills`` of them grown because step 2 left it short.

    ``diverse`` counts its mutually diverse queries.
    """

    root: RootContext
    nodes: list[Node]
    passes: int
    diverse: int
    refills: int = 0

    @property
    def first_queries(self) -> list[Query]:
        """The queries of the trees before the refills."""
        first = self.passes - self.refills
        return [query for node in self.nodes if node.pass_number < first for query in node.queries]

    @property
    def shortfall(self) -> str:
        """Why the root context does not have its quota of mutually diverse queries; empty when it has."""
        if self.diverse >= self.root.quota:
            return ""
        if any(node.query for node in self.nodes):
            return f"{self.diverse} of {self.root.quota} diverse queries after {self.passes} passes"
        return ", ".join(Counter(node.outcome for node in self.nodes)) or "nothing to ask"


async def fill_root(ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, refills: int = 0) -> Grown:
    """Grows trees until they hold ``oversample`` quotas of mutually diverse queries, or ``max_passes``.

    Then ``refills`` trees more, for a root context that step 2 left short.
    """
    diverse = DiverseQueries(rules.rouge_threshold)
    nodes: list[Node] = []
    passes = kept = refilled = 0
    wanted = rules.oversample * root.quota
    while (filling := not refilled and passes < rules.max_passes and kept < wanted) or refilled < refills:
        refilled += not filling
        tree = await grow_tree(ask, prompts, root, rules, passes)
        passes += 1
        nodes += tree
        kept = diverse.offer_all(query.text for node in tree for query in node.queries)
        if tree[0].outcome in {"too short", "failed"}:
            break  # another pass would meet the same
    return Grown(root, nodes, passes, kept, refilled)
