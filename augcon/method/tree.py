"""The Context-Split-Tree (paper section 3.2, Algorithm 1): trees of queries over root contexts."""

import asyncio
import dataclasses
import functools
from collections import Counter

from augcon.data import Ask, Node, Query, Request, RootContext
from augcon.method.ask import ask_until_parsed
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
    max_length: int = 500  # of a root context: bounds the halves where the server enforces the form of replies


# A tree must stay linear in its text even if a model returns two halves that are each nearly the whole. So each node
# has a share of its root's length: halves divide it by their lengths, but none takes more than nine tenths. Honest
# halves keep a share near their length; a share used up counts as too short.
_LARGEST_HALF = 0.9
_SMALLEST_SHARE = 0.25  # of min_length


async def grow_tree(
    ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, pass_number: int = 0
) -> list[Node]:
    """Grows one tree over a root context, both halves of every node at once. The nodes come in order of their paths.

    ``pass_number`` draws fresh samples. Raises what ``ask`` raises, except Refused, which ends a node.
    """

    async def grow(context: str, size: int, cut: list[str], path: str, share: float) -> list[Node]:
        node = functools.partial(Node, root.root, pass_number, path, context)
        if size < rules.min_length:
            return [node(None, "too short")]
        if share < _SMALLEST_SHARE * rules.min_length:
            return [node(None, "too short", "share of the root used up")]
        request = Request(
            prompts.cst_messages(context),
            rules.query_temperature,
            rules.query_max_tokens,
            sample=pass_number * rules.tries,
            text_end=prompts.end_of_reply(),
            pattern=prompts.cst_pattern(rules.max_length),
        )
        asked = await ask_until_parsed(ask, request, rules.tries, lambda text: parse_split(text, prompts))
        if asked.value is None:
            return [node(None, "failed" if asked.refused else "not parseable", asked.reason, asked.tries)]
        query, halves = asked.value.query, asked.value.halves
        sizes = [length(half) for half in halves]
        if max(sizes) >= size:
            return [node(query, "done", "not shorter", asked.tries)]
        cuts = [words(half) for half in halves]
        if min(rouge_l_precision(half, cut) for half in cuts) < rules.rouge_threshold:
            return [node(query, "hallucinated", tries=asked.tries)]
        shares = [share * min(half / (sum(sizes) or 1), _LARGEST_HALF) for half in sizes]
        first, second = await asyncio.gather(*map(grow, halves, sizes, cuts, (f"{path}1", f"{path}2"), shares))
        return [node(query, "done", tries=asked.tries), *first, *second]

    whole = root.text.strip()
    return await grow(whole, root.length, words(whole), "", root.length)


@dataclasses.dataclass(frozen=True)
class Grown:
    """All trees over one root context, the last ``refills`` of them for step 2. ``diverse`` counts diverse queries."""

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
        return ", ".join(Counter(node.outcome for node in self.nodes))


async def fill_root(ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, refills: int = 0) -> Grown:
    """Grows trees up to ``oversample`` quotas of diverse queries or ``max_passes``, then ``refills`` more."""
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
