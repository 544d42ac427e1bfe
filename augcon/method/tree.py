"""The Context-Split-Tree (paper section 3.2, Algorithm 1): trees of queries over root contexts."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar, get_args

from augcon.llm.client import Refused, Reply, Request
from augcon.method.diversity import DiverseQueries, rouge_l_precision
from augcon.run.corpus import RootContext
from augcon.text.parse import Unparseable, parse_split
from augcon.text.prompts import Prompts
from augcon.text.units import length, words

Parsed = TypeVar("Parsed")
Ask = Callable[[Request], Awaitable[Reply]]
Outcome = Literal["done", "too short", "not parseable", "hallucinated", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a tree and its fate.

    ``path`` leads to it from the root context: "" is the root itself, "12" the second half of the first.
    ``query`` is None where the context was not asked (too short) or no query could be had (not
    parseable, failed). "done": the query is kept, and the halves were visited or are no shorter than
    their context. "hallucinated": the query is kept, the halves are not. ``detail`` gives the reason.
    """

    root: int
    path: str
    pass_number: int
    context: str
    query: str | None
    outcome: Outcome
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class TreeRules:
    """When to ask, when to ask again and when to stop; see the settings of the same names."""

    min_length: int = 20
    rouge_threshold: float = 0.7
    temperature: float = 0.85
    max_tokens: int = 1024
    tries: int = 4
    oversample: float = 1.15
    max_passes: int = 6
    pattern_length: int | None = None  # longest root context, where the server is held to the reply's form


# A tree must stay linear in its text even if a model returns two halves that are each nearly the whole. So
# each node has a share of its root's length: halves divide it by their lengths, and a half never takes more
# than nine tenths. Honest halves keep a share near their length; a share used up counts as too short.
_LARGEST_HALF = 0.9
_SMALLEST_SHARE = 0.25  # of min_length


async def grow_tree(
    ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, pass_number: int = 0
) -> list[Node]:
    """Grows one tree over a root context, both halves of every node at once; nodes in order of their paths.

    ``pass_number`` draws fresh samples. Raises what ``ask`` raises, save Refused, which ends a node.
    """

    async def visit(spot: _Spot) -> list[Node]:
        def node(outcome: Outcome, query: str | None = None, detail: str = "") -> Node:
            return Node(root.root, spot.path, pass_number, spot.context, query, outcome, detail)

        if spot.size < rules.min_length:
            return [node("too short")]
        if spot.share < _SMALLEST_SHARE * rules.min_length:
            return [node("too short", detail="share of the root used up")]
        try:
            query, halves = await _query_and_split(ask, prompts, spot.context, rules, pass_number)
        except Unparseable as error:
            return [node("not parseable", detail=str(error))]
        except Refused as error:
            return [node("failed", detail=str(error))]
        sizes = [length(half) for half in halves]
        if max(sizes) >= spot.size:
            return [node("done", query, "not shorter")]
        cuts = [words(half) for half in halves]
        if min(rouge_l_precision(half, spot.words) for half in cuts) < rules.rouge_threshold:
            return [node("hallucinated", query)]
        shares = [spot.share * min(size / (sum(sizes) or 1), _LARGEST_HALF) for size in sizes]
        spots = [_Spot(half, sizes[i], cuts[i], f"{spot.path}{i + 1}", shares[i]) for i, half in enumerate(halves)]
        if min(sizes) < rules.min_length:  # at most one of them is asked: no need for two tasks
            first, second = [await visit(spot) for spot in spots]
        else:
            first, second = await asyncio.gather(*map(visit, spots))
        return [node("done", query), *first, *second]

    context = root.text.strip()
    return await visit(_Spot(context, root.length, words(context), "", root.length))


@dataclasses.dataclass(frozen=True)
class _Spot:
    """Where a tree has grown to: a context not yet asked, with its length and words and its share of the root."""

    context: str
    size: int
    words: list[str]
    path: str
    share: float


async def _query_and_split(
    ask: Ask, prompts: Prompts, context: str, rules: TreeRules, pass_number: int
) -> tuple[str, tuple[str, str]]:
    pattern = prompts.cst_pattern(rules.pattern_length) if rules.pattern_length else None
    request = Request(
        prompts.cst_messages(context),
        rules.temperature,
        rules.max_tokens,
        sample=pass_number * rules.tries,
        text_end=prompts.end_of_reply(),
        pattern=pattern,
    )
    return await parsed_reply(ask, request, rules.tries, lambda text: parse_split(text, prompts))


async def parsed_reply(ask: Ask, request: Request, tries: int, parse: Callable[[str], Parsed]) -> Parsed:
    """What ``parse`` makes of the reply, asked again for a fresh sample while that is nothing.

    Raises what ``ask`` raises, and after ``tries`` replies the Unparseable of the last.
    """
    reason = Unparseable("never asked")
    for attempt in range(tries):
        end = () if attempt else request.end  # a stop string may have cut the reply short: only once
        reply = await ask(dataclasses.replace(request, sample=request.sample + attempt, end=end))
        try:
            if not reply.complete:
                raise Unparseable("cut off")
            return parse(reply.text)
        except Unparseable as error:
            reason = error
    raise reason


@dataclasses.dataclass(frozen=True)
class RootResult:
    """All trees over one root context, the last ``refills`` of them grown because step 2 left it short.

    ``diverse`` counts its mutually diverse queries.
    """

    root: RootContext
    nodes: list[Node]
    passes: int
    diverse: int
    refills: int = 0

    @property
    def shortfall(self) -> str:
        """Why the root context does not have its quota of mutually diverse queries; empty when it has."""
        if self.diverse >= self.root.quota:
            return ""
        outcomes = Counter(node.outcome for node in self.nodes if node.query is None)
        if any(node.query for node in self.nodes):
            return f"{self.diverse} of {self.root.quota} diverse queries after {self.passes} passes"
        return ", ".join(outcomes) if outcomes else "nothing to ask"


async def fill_root(ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, refills: int = 0) -> RootResult:
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
        kept = diverse.offer_all(node.query for node in tree if node.query)
        if tree[0].outcome in {"too short", "failed"}:
            break  # another pass would meet the same
    return RootResult(root, nodes, passes, kept, refilled)
