"""What a model wrote → the query and the halves, an answer, a grade or a verdict, or the reason why there is none.

Models add talk, markup and thinking blocks, and contexts may hold anything, labels included. So a part of a reply
begins at the first line after the part before that starts with its label; the question, at the last before the halves.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

from augcon.data import Grades, Split
from augcon.text.prompts import Prompts, disarm
from augcon.text.units import clean

SHORTEST_QUESTION, LONGEST_QUESTION = 5, 1000  # characters

# Labels that models put in place of ours, in either language.
_QUESTION = ("问题", "提问", "问", "Question", "Query", "Q")
_HALF = "(?:片段|上下文|语境|文本|段落|部分|Context|Part|Passage|Text|Half)"
_NUMBER = (r"(?:1|１|一|①|One|A)", r"(?:2|２|二|②|Two|B)")
_CUT = r"(?:分开处|分割处|切分处|Cut(?: after)?|Split(?: after)?)"
_ANSWER = ("答案", "回答", "答", "Answer")
_LONGEST_GRADE = 1000  # characters; Unicode's normal form takes time in the square of the length
_GRADE = ("评分", "分数", "得分", "打分", "Grade", "Score", "Rating")
_IS, _OF = r"\s*+(?::|是|为|\bis\b)?+\s*+", r"(?:\s*+/\s*+{}|\s*+分)?+[.。]?+"  # before and after a grade


class Unparseable(Exception):
    """The reply has no usable content. The message is the reason in a few words, so that reasons can be counted."""


class Improvable(Unparseable):
    """The reply has the form that was asked for, but a better one is worth a try."""


def parse_split(reply: str, prompts: Prompts) -> Split:
    """The query and its context's halves, stripped; a half may be empty. Raises Unparseable if a part is missing."""
    question, *halves = _parts(reply, prompts)
    if len(halves) < 2:
        raise Unparseable("no halves")
    return Split(_question(question, prompts), (_half(halves[0]), _half(halves[1])))


def parse_focus(reply: str, prompts: Prompts) -> tuple[str, int]:
    """The query, and the number of the sentence to cut after, or -1. Raises Unparseable if there is no query."""
    question, *cut = _parts(reply, prompts, ((prompts.labels.cut, _CUT),))
    number = re.search(r"\d{1,4}", cut[0]) if cut else None
    return _question(question, prompts), int(number[0]) if number else -1


def parse_question(reply: str, prompts: Prompts) -> str:
    """The query in a reply that may end right after it. Raises Unparseable if there is none."""
    return _question(_parts(reply, prompts)[0], prompts)


def bare_answer(reply: str, question: str, prompts: Prompts) -> str:
    """The answer without a thinking block, a repeated question or a label. Raises Unparseable if nothing is left."""
    visible = without_thinking(reply).strip()
    if not visible and reply.strip():
        raise Unparseable("thinking not ended")
    first, _, rest = visible.partition("\n")
    label = _label_line(_any_of(prompts.labels.question, *_QUESTION)).match(first)
    if label and first[label.end() :].strip(" *") == question:
        visible = rest.strip()
    if label := _label_line(_any_of(prompts.labels.answer, *_ANSWER)).match(visible):
        visible = visible[label.end() :].strip()
        if visible.count("**") % 2:  # the label stood inside the bold text
            visible = visible.removesuffix("**").rstrip()
    lines = (line.strip(" \t*_#>】]") for line in visible.splitlines())
    if not re.search(r"\w", visible) or all(line.endswith((":", "：")) for line in lines if line):  # labels alone
        raise Unparseable("empty")
    return visible


def parse_grade(reply: str, prompts: Prompts) -> int:
    """The grade from 1 to 10 in a reply that says nothing else, markup and "/10" aside. Else raises Unparseable."""
    label = _any_of(prompts.labels.grade, *_GRADE)
    return int(_whole(rf"(?:(?:{label}){_IS})?([1-9]|10){_OF.format(10)}", reply, "no grade")[1])


def parse_grades(reply: str, prompts: Prompts) -> Grades:
    """The three grades in a reply that says nothing else, labelled and in order. Else raises Unparseable."""
    labels = (re.escape(_plain(label)) for label in prompts.judge.scores)
    grades = r"[\s,;]++".join(rf"{label}{_IS}([1-5]){_OF.format(5)}" for label in labels)
    return Grades(*map(int, _whole(grades, reply, "no three grades").groups()))


def parse_verdict(reply: str, prompts: Prompts) -> int:
    """Which of ``judge.verdicts`` a reply gives, with or without its label. Else raises Unparseable."""
    label, *verdicts = (_plain(words).casefold() for words in (prompts.judge.verdict, *prompts.judge.verdicts))
    said = _whole(rf"(?:{re.escape(label)}{_IS})?({_any_of(*verdicts)})[.。]*", reply, "no verdict")
    return verdicts.index(said[1].casefold())


def without_thinking(reply: str) -> str:
    """The reply after a reasoning model's thinking block; nothing if the block never ends."""
    visible = re.split(r"</think(?:ing)?>", clean(reply))[-1]
    return "" if re.match(r"\s*<think(?:ing)?>", visible) else visible


def _plain(text: str) -> str:
    """The text without markup and full-width forms."""
    return re.sub(r"[*_`#>【】\[\]\"“”]", "", unicodedata.normalize("NFKC", text)).strip(" \t\n,;")


def _whole(pattern: str, reply: str, reason: str) -> re.Match[str]:
    said = without_thinking(reply).strip()
    if len(said) <= _LONGEST_GRADE and (found := re.fullmatch(pattern, _plain(said), re.IGNORECASE)):
        return found
    raise Unparseable(reason)


def _parts(reply: str, prompts: Prompts, following: Sequence[tuple[str, str]] = ()) -> list[str]:
    """What follows the question's label and each label after it, up to the first that is missing.

    ``following`` are those labels with patterns of others in their place; where there are none, the halves'.
    """
    text = without_thinking(reply)
    numbered = (f"{_HALF} ?{number}" for number in _NUMBER)
    halves = zip(prompts.labels.halves, numbered, strict=True)
    found: list[re.Match[str]] = []
    for ours, others in ((prompts.labels.question, _any_of(*_QUESTION)), *(following or halves)):
        # Other words for a label count only where ours is missing, since talk and the text may hold them.
        for kind in (_any_of(ours), others):
            if label := _label_line(kind).search(text, found[-1].end() if found else 0):
                found.append(label)
                break
        else:
            break
    if not found:
        raise Unparseable("no question")
    end = found[1].start() if found[1:] else len(text)
    *_, found[0] = found[0].re.finditer(text, found[0].start(), end)  # drafts and quotations come before
    ends = [*(label.start() for label in found[1:]), len(text)]
    return [text[label.end() : end] for label, end in zip(found, ends, strict=True)]


def _any_of(*labels: str) -> str:
    return "|".join(map(re.escape, labels))


@functools.cache
def _label_line(labels: str) -> re.Pattern[str]:
    """A line that begins with one of some labels (a regular expression): in bold, or before a colon, or alone.

    Every repetition is possessive, so that the time stays linear whatever a model repeats.
    """
    label = rf"[【\[]?(?:{labels})[ \t]*+[】\]]?+[ \t]*+"
    bold = rf"(?P<mark>[*_]{{1,3}}){label}[:：]?+[ \t]*+(?P=mark)[ \t]*+[:：]?"
    plain = rf"[*_]{{0,3}}{label}(?:[:：]|$)"
    line = rf"^[ \t>#\-•]*+(?:\*[ \t]++|\d{{1,2}}[.、)][ \t]*+)?(?:{bold}|{plain})"
    return re.compile(line, re.IGNORECASE | re.MULTILINE)


def _question(written: str, prompts: Prompts) -> str:
    lines = [line for part in written.splitlines() if (line := part.lstrip(" \t>*_#").rstrip(" \t*_#"))]
    question = " ".join(lines[:1] if lines and lines[0].endswith(("?", "？")) else lines)
    if re.fullmatch('“[^“”]*”|"[^"]*"|「[^「」]*」', question):
        question = question[1:-1].strip()
    if len(question) < SHORTEST_QUESTION:
        raise Unparseable("question too short")
    if len(question) > LONGEST_QUESTION:
        raise Unparseable("question too long")
    if re.fullmatch(r"[（(\[【<].*[）)\]】>]", question) or not re.search(r"\w", question):
        raise Unparseable("no question, only its place")
    shown = {example.question for example in prompts.cst.examples} | {e.question for e in prompts.focus.examples}
    if question in shown:
        raise Unparseable("question of an example")
    if disarm(question) != question:
        raise Unparseable("control mark")
    return question


def _half(written: str) -> str:
    """A half without what is not its text: unclosed marks, closing rules, words for "empty"."""
    lines = written.strip().split("\n")
    while lines and re.fullmatch(r"-{3,}|\*{3,}|={3,}|", lines[-1].strip()):
        lines.pop()
    half = "\n".join(lines).rstrip()
    for mark in ("```", "**"):
        if half.count(mark) % 2:
            half = half.removesuffix(mark).rstrip()
    return "" if half in {"空", "（空）", "(empty)", "（无）", "无", "None", "N/A", "-"} else half
