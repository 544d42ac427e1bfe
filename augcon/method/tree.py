"""The Context-Split-Tree (paper section 3.2, Algorithm 1): trees of queries over root contexts."""

import asyncio
import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from augcon.data import TOO_LONG, Ask, Node, Outcome, Query, Request, RootContext
from augcon.method import focus
from augcon.method.ask import CUT_OFF, ask_until_parsed
from augcon.method.diversity import DiverseQueries, rouge_l_precision
from augcon.method.questions import COPY, CUT, Draft
from augcon.text.parse import Improvable, Unparseable, parse_question, parse_split
from augcon.text.prompts import Prompts
from augcon.text.units import length, sentences, words


@dataclasses.dataclass(frozen=True)
class TreeRules:
    """When to ask, when to ask again and when to stop; see the settings of the same names."""

    split: Literal["rewrite", "focus"] = "rewrite"
    bad_split: Literal["end", "cut"] = "end"
    min_length: int = 20
    leaf_length: int = 40
    rouge_threshold: float = 0.7
    coverage_threshold: float = 0.75
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
_MOST_BARREN = 2  # passes in which the server refused all
_TALK = 0.5  # ROUGE-L precision below which a line after the second half is the model's closing words


def question_request(
    prompts: Prompts, root: RootContext, context: str, rules: TreeRules, sample: int = 0, **weaker: Any
) -> Request:
    """Asks for the question about a context of a tree alone; ``weaker`` as in ``Prompts.cst_messages``."""
    if rules.split == "focus":
        messages = focus.messages(prompts, root, context, rules.min_length, **weaker)
    elif length(context) < rules.leaf_length and not weaker:
        messages = prompts.question_messages(context, root.title)
    else:
        messages = prompts.cst_messages(context, root.title, **weaker)
    end, pattern = prompts.end_of_question(), prompts.question_pattern()
    return Request(
        messages, rules.query_temperature, rules.query_max_tokens, sample, end, pattern=pattern, root=root.root
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A context of a tree, with what is measured of it."""

    text: str
    length: int
    words: list[str]

    @classmethod
    def of(cls, text: str) -> "_Part":
        text = text.strip()
        return cls(text, length(text), words(text))


async def grow_tree(
    ask: Ask, prompts: Prompts, root: RootContext, rules: TreeRules, pass_number: int = 0
) -> list[Node]:
    """Grows one tree over a root context, both halves of every node at once. The nodes come in order of their paths.

    ``pass_number`` draws fresh samples. Raises what ``ask`` raises, except Refused, which ends a node.
    """
    sample = pass_number * rules.tries
    if rules.split == "focus":
        return await focus.grow_tree(ask, prompts, root, rules, pass_number)

    async def grow(part: _Part, path: str, share: float, above: str | None) -> list[Node]:
        used_up = share < _SMALLEST_SHARE * rules.min_length
        if part.length < rules.min_length or used_up:
            detail = "share of the root used up" if used_up else ""
            return [Node(root.root, pass_number, path, part.text, None, "too short", detail)]
        draft, halves = Draft(part.text, above, root.title), list[_Part]()
        leaf = part.length < rules.leaf_length
        if not leaf:
            draft, halves = await _ask_about(ask, prompts, part, root, rules, sample, above)
        if leaf or draft.tries:  # else the server has refused
            await draft.improve(ask, prompts, question_request(prompts, root, part.text, rules, sample), rules.tries)
        total = sum(half.length for half in halves) or 1
        shares = [share * min(half.length / total, _LARGEST_HALF) for half in halves]
        paths, question = (f"{path}1", f"{path}2"), itertools.repeat(draft.question)
        below = await asyncio.gather(*map(grow, halves, paths, shares, question))
        return [draft.node(root.root, pass_number, path, part.text), *itertools.chain(*below)]

    return await grow(_Part.of(root.text), "", root.length, None)


async def _ask_about(
    ask: Ask, prompts: Prompts, part: _Part, root: RootContext, rules: TreeRules, sample: int, above: str | None
) -> tuple[Draft, list[_Part]]:
    """The node in the making, and the halves to go on with.

    A bad split is asked for again, unless the context is a single sentence: that may be left whole.
    """
    draft = Draft(part.text, above, root.title)
    single = len(sentences(part.text)) < 2

    def read(reply: str) -> list[_Part]:
        split = parse_split(reply, prompts)
        draft.offer(split.query)
        first, second = split.halves
        halves = [_Part.of(first), _Part.of(_without_talk(second, part.words))]
        draft.outcome = _outcome_of_split(part, halves, rules)
        if draft.outcome != "done" and not single:
            raise Improvable(draft.outcome)
        return halves

    request = Request(
        prompts.cst_messages(part.text, root.title),
        rules.query_temperature,
        rules.query_max_tokens,
        sample,
        text_end=prompts.end_of_reply(),
        pattern=prompts.cst_pattern(rules.max_length),
        root=root.root,
    )
    asked = await ask_until_parsed(ask, request, rules.tries, read)
    draft.tries = asked.tries
    if asked.value and draft.outcome == "done":
        return draft, asked.value
    if draft.outcome == "done":
        draft.outcome, draft.detail = "failed" if asked.refused else "not parseable", asked.reason
    halves: list[_Part] = []
    too_much = asked.reason in {CUT_OFF, TOO_LONG}  # for the model at once: smaller parts may be had
    if too_much:
        with contextlib.suppress(Unparseable):  # a question before the halves is whole
            draft.offer(parse_question(asked.reply.rpartition(f"\n{prompts.labels.halves[0]}")[0], prompts))
    if too_much or rules.bad_split == "cut":
        halves = [_Part.of(half) for half in _cut_in_two(part.text)]
        draft.detail = ", ".join(filter(None, [draft.detail, CUT if halves else ""]))
    return draft, halves


def _outcome_of_split(part: _Part, halves: Sequence[_Part], rules: TreeRules) -> Outcome:
    """Which kind of bad split it is, or "done" for a good one (Algorithm 1; "loses text" is AugCon's own)."""
    if max(half.length for half in halves) >= part.length:
        return "not shorter"
    if min(rouge_l_precision(half.words, part.words) for half in halves) < rules.rouge_threshold:
        return "hallucinated"
    together = list(itertools.chain(*(half.words for half in halves)))
    return "loses text" if rouge_l_precision(part.words, together) < rules.coverage_threshold else "done"


def _without_talk(half: str, context: Sequence[str]) -> str:
    """The second half without lines after it that are not made of the context's words."""
    lines = half.split("\n")
    while len(lines) > 1 and (not lines[-1].strip() or rouge_l_precision(words(lines[-1]), context) < _TALK):
        lines.pop()
    return "\n".join(lines)


def _cut_in_two(text: str) -> list[str]:
    """The text cut at the end of the sentence nearest to its middle; nothing if it is a single sentence."""
    ends = list(itertools.accumulate(map(len, sentences(text))))[:-1]
    if not ends:
        return []
    middle = min(ends, key=lambda end: abs(2 * end - len(text)))
    return [text[:middle], text[middle:]]


def coverage(root: RootContext, nodes: Sequence[Node]) -> list[float]:
    """The share of a root context that the asked leaves of one tree hold (ROUGE-L recall), by depth.

    At each depth, the leaves are those of the tree cut off below it. The last figure counts parts too short to be
    asked as held, too: what it lacks of 1 was lost by splits, or by replies that could not be had.
    """
    whole = words(root.text)
    asked = [node for node in nodes if node.query or COPY in node.detail]
    short = [node for node in nodes if node.outcome == "too short"]
    depth = max((len(node.path) for node in asked), default=0)

    def held(nodes: Sequence[Node]) -> float:
        inner = {node.path[:above] for node in nodes for above in range(len(node.path))}
        leaves = (words(node.context) for node in nodes if node.path not in inner)
        return rouge_l_precision(whole, list(itertools.chain(*leaves)))

    return [held([node for node in asked if len(node.path) <= most]) for most in range(depth + 1)] + [
        held(sorted([*asked, *short], key=lambda node: node.path))
    ]


@dataclasses.dataclass(frozen=True)
class Grown:
    """All trees over one root context, the last ``refills`` of them for step 2. ``diverse`` counts diverse queries."""

    root: RootContext
    nodes: list[Node]
    passes: int
    diverse: int
    refills: int = 0

    @property
    def good_queries(self) -> list[Query]:
        """The queries with nothing doubtful, from which the scorer may learn."""
        return [query for node in self.nodes if not node.doubt for query in node.queries]

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
    passes = kept = refilled = barren = 0
    wanted = rules.oversample * root.quota
    while (filling := not refilled and passes < rules.max_passes and kept < wanted) or refilled < refills:
        refilled += not filling
        tree = await grow_tree(ask, prompts, root, rules, passes)
        passes += 1
        nodes += tree
        kept = diverse.offer_all(query.text for node in tree for query in node.queries)
        barren += not any(node.query for node in tree) and tree[0].outcome == "failed"
        if tree[0].outcome == "too short" or barren == _MOST_BARREN:
            break  # another pass would meet the same
    return Grown(root, nodes, passes, kept, refilled)
