"""Trees without rewriting (AugCon's own): the model sees the whole root context with its sentences numbered, is asked
about some of them in a row, and names the one to cut after. Nothing is rewritten, so nothing is lost or made up."""

import asyncio
import bisect
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from augcon.data import Ask, Message, Node, Request, RootContext
from augcon.method.ask import ask_until_parsed
from augcon.method.questions import CUT, Draft
from augcon.text.parse import parse_focus
from augcon.text.prompts import Prompts
from augcon.text.units import length, sentences

if TYPE_CHECKING:
    from augcon.method.tree import TreeRules

_CLAUSE_END = re.compile(r"[，；：]|[,;:—](?=\s)")


def split_sentences(text: str, min_length: int) -> list[str]:
    """The sentences of a root context. One that is long enough for two queries is cut at the clause nearest its middle.

    Joined, they give back the text.
    """
    return list(itertools.chain(*(_split_clauses(sentence, min_length) for sentence in sentences(text))))


def _split_clauses(sentence: str, min_length: int) -> list[str]:
    if length(sentence) < 2 * min_length:
        return [sentence]
    cuts = [(sentence[: end.end()], sentence[end.end() :]) for end in _CLAUSE_END.finditer(sentence)]
    lengths = [(min(map(length, cut)), cut) for cut in cuts]
    shortest, cut = max(lengths, default=(0, ("", "")), key=lambda measured: measured[0])
    if shortest < min_length / 2:
        return [sentence]
    return [*_split_clauses(cut[0], min_length), *_split_clauses(cut[1], min_length)]


def messages(prompts: Prompts, root: RootContext, context: str, min_length: int, **weaker: Any) -> list[Message]:
    """Asks about a context that is a part of its root; ``weaker`` as in ``Prompts.focus_messages``."""
    listed = split_sentences(root.text, min_length)
    ends = list(itertools.accumulate(map(len, listed)))
    start = max(0, root.text.find(context))
    first = bisect.bisect_right(ends, start)
    last = bisect.bisect_left(ends, min(start + len(context), ends[-1]))
    return prompts.focus_messages(listed, first, last + 1, root.title, **weaker)


async def grow_tree(ask: Ask, prompts: Prompts, root: RootContext, rules: "TreeRules", pass_number: int) -> list[Node]:
    """Like ``tree.grow_tree``. A cut that will not do is replaced by the middle, so no split is asked for twice."""
    listed = split_sentences(root.text, rules.min_length)
    before = list(itertools.accumulate(map(length, listed), initial=0))
    sample = pass_number * rules.tries

    async def grow(first: int, end: int, path: str, above: str | None) -> list[Node]:
        context = "".join(listed[first:end]).strip()
        if before[end] - before[first] < rules.min_length:
            return [Node(root.root, pass_number, path, context, None, "too short")]
        draft, told = Draft(root.text, above, root.title), -1
        leaf = end - first == 1 or before[end] - before[first] < rules.leaf_length

        def read(reply: str) -> bool:
            nonlocal told
            question, told = parse_focus(reply, prompts)
            draft.offer(question)
            return True

        request = Request(
            prompts.focus_messages(listed, first, end, root.title),
            rules.query_temperature,
            rules.query_max_tokens,
            sample,
            text_end=prompts.end_of_reply(),
            pattern=prompts.focus_pattern(),
            root=root.root,
        )
        if not leaf:
            asked = await ask_until_parsed(ask, request, rules.tries, read)
            draft.tries = asked.tries
            if asked.value is None:
                draft.outcome, draft.detail = "failed" if asked.refused else "not parseable", asked.reason
        if draft.outcome == "done":
            end_of_question, pattern = prompts.end_of_question(), prompts.question_pattern()
            alone = dataclasses.replace(request, end=end_of_question, text_end=(), pattern=pattern)
            await draft.improve(ask, prompts, alone, rules.tries)
        halves: Sequence[list[Node]] = ()
        if draft.outcome == "done" and not leaf:
            cut = _cut(before, first, end, told, rules.min_length)
            draft.detail = "" if cut == told else CUT
            above = draft.question
            halves = await asyncio.gather(grow(first, cut, f"{path}1", above), grow(cut, end, f"{path}2", above))
        return [draft.node(root.root, pass_number, path, context), *itertools.chain(*halves)]

    return await grow(0, len(listed), "", None)


def _cut(before: list[int], first: int, end: int, told: int, min_length: int) -> int:
    """Where to cut: after the sentence ``told``, unless it leaves a half too short that the middle would not."""

    def shorter(cut: int) -> int:
        return min(before[cut] - before[first], before[end] - before[cut])

    middle = max(range(first + 1, end), key=shorter)
    return told if first < told < end and shorter(told) >= min(min_length, shorter(middle)) else middle
