"""What a model wrote → the query and the halves, or the reason why not.

Models add talk, markdown, other colons and thinking blocks, and contexts may contain anything, labels
included. A part begins at the first line that starts with its label after the part before.
"""

import functools
import re

from augcon.text.prompts import Prompts
from augcon.text.units import clean

SHORTEST_QUESTION = 5  # characters


class Unparseable(Exception):
    """The reply has no usable content; the message is the reason, in a few words, for counting."""


# Labels that models put in place of ours, for either language.
_QUESTION = ("问题", "提问", "问", "Question", "Query", "Q")
_HALF = ("片段", "上下文", "语境", "文本", "段落", "部分", "Context", "Part", "Passage", "Text", "Half")
_NUMBER = (r"(?:1|１|一|①|One|A)", r"(?:2|２|二|②|Two|B)")


def parse_split(reply: str, prompts: Prompts) -> tuple[str, tuple[str, str]]:
    """The query and the two halves of a reply to a Context-Split-Tree prompt, stripped; a half may be empty.

    Raises Unparseable when a part is missing, or the question is unusable.
    """
    visible = without_thinking(reply)
    question_label = _find_question(visible, prompts)
    if not question_label:
        raise Unparseable("no question")
    first = _find_half(visible, prompts, 0, question_label.end())
    second = first and _find_half(visible, prompts, 1, first.end())
    if not first or not second:
        raise Unparseable("no halves")
    question = _question(visible[question_label.end() : first.start()], prompts)
    return question, (_half(visible[first.end() : second.start()]), _half(visible[second.end() :]))


def parse_question(reply: str, prompts: Prompts) -> str:
    """The query alone, from a reply that may end after it. Raises Unparseable as ``parse_split``."""
    visible = without_thinking(reply)
    label = _find_question(visible, prompts)
    if not label:
        raise Unparseable("no question")
    first = _find_half(visible, prompts, 0, label.end())
    return _question(visible[label.end() : first.start() if first else None], prompts)


def without_thinking(reply: str) -> str:
    """The reply after the thinking block of a reasoning model; nothing when it never came out of it."""
    visible = re.split(r"</think(?:ing)?>", clean(reply))[-1]
    return "" if re.match(r"\s*<think(?:ing)?>", visible) else visible


def _find_question(text: str, prompts: Prompts) -> re.Match[str] | None:
    labels = tuple(sorted({prompts.labels.question, *_QUESTION}, key=len, reverse=True))
    return label_line("|".join(map(re.escape, labels))).search(text)


def _find_half(text: str, prompts: Prompts, index: int, start: int) -> re.Match[str] | None:
    """The label of a half: ours if it is there, else another word for it, which the text itself may also hold."""
    ours = label_line(re.escape(prompts.labels.halves[index]))
    others = label_line(rf"(?:{'|'.join(_HALF)})[ ]?{_NUMBER[index]}")
    return ours.search(text, start) or others.search(text, start)


@functools.cache
def label_line(labels: str) -> re.Pattern[str]:
    """A line that begins with one of some labels (a regular expression): in bold, or before a colon, or alone.

    Each repetition is possessive, so that the time stays linear whatever a model repeats.
    """
    label = rf"[【\[]?(?:{labels})[ \t]*+[】\]]?+[ \t]*+"
    bold = rf"(?P<mark>[*_]{{1,3}}){label}[:：]?+[ \t]*+(?P=mark)[ \t]*+[:：]?"
    plain = rf"[*_]{{0,3}}{label}(?:[:：]|$)"
    line = rf"^[ \t>#\-•]*+(?:\*[ \t]++|\d{{1,2}}[.、)][ \t]*+)?(?:{bold}|{plain})"
    return re.compile(line, re.IGNORECASE | re.MULTILINE)


def _question(written: str, prompts: Prompts) -> str:
    lines = [line.strip(" \t*_#>") for line in written.splitlines()]
    lines = [line for line in lines if line]
    question = " ".join(lines[:1] if lines and lines[0].endswith(("?", "？")) else lines)
    if re.fullmatch('“[^“”]*”|"[^"]*"|「[^「」]*」', question):
        question = question[1:-1].strip()
    if len(question) < SHORTEST_QUESTION:
        raise Unparseable("question too short")
    if re.fullmatch(r"[（(\[【<].*[）)\]】>]", question) or not re.search(r"\w", question):
        raise Unparseable("no question, only its place")
    if question in {example.question for example in prompts.examples}:
        raise Unparseable("question of an example")
    return question


def _half(written: str) -> str:
    """A half without what belongs to the reply's form: marks left open, closing rules, words for "empty"."""
    lines = written.strip().split("\n")
    while lines and re.fullmatch(r"\s*(?:-{3,}|\*{3,}|={3,}|)\s*", lines[-1]):
        lines.pop()
    half = "\n".join(lines).rstrip()
    for mark in ("```", "**"):
        if half.count(mark) % 2:
            half = half.removesuffix(mark).rstrip()
    return "" if half in {"空", "（空）", "(empty)", "（无）", "无", "None", "N/A", "-"} else half
