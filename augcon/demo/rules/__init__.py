"""The rules behind the demonstration engine: replies to AugCon's prompts in the form that they ask for.

Everything is a pure function of the prompt and the seed. The questions are made in ``questions.py``.
"""

import dataclasses
import functools
import hashlib
import random
import re

from rapidfuzz.distance import LCSseq

from augcon.demo.rules.chinese import warm_up
from augcon.demo.rules.questions import make_question, weaker_question
from augcon.demo.rules.reading import content_words, plain
from augcon.demo.rules.recognition import Task, context_label, recognise, turns_of
from augcon.method.diversity import rouge_l_precision
from augcon.text import units as text
from augcon.text.prompts import Message

__all__ = ["COLD", "Message", "Reply", "Task", "halve", "recognise", "reply_to", "warm_up"]

COLD = 0.3  # temperature below which the seed makes no difference


@dataclasses.dataclass(frozen=True)
class Reply:
    """A whole reply, before stop strings and the limit cut it."""

    text: str
    prompt_tokens: int
    identity: str


def reply_to(prompt: list[Message] | str, seed: int | None) -> Reply:
    """The reply to messages, or to the same prompt as one text."""
    task = recognise(turns_of(prompt) if isinstance(prompt, str) else prompt)
    digest = hashlib.blake2b(f"{seed}\0".encode(), digest_size=12)
    for part in (task.kind, task.fixed, task.last):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    identity = digest.hexdigest()
    rules = {"tree": _tree, "weak tree": _tree, "answer": _answer, "grade": _grade, "judge": _judge}
    rules |= {"compare": _compare, "other": _other}
    written = rules[task.kind](task, random.Random(identity))
    return Reply(written, _piece_length(task.fixed) + _length(task.last), identity)


_LONGEST_CACHED = 10_000  # characters


def _length(part: str) -> int:
    """The length of a text, sentence by sentence: a tree repeats its sentences."""
    return sum(map(_piece_length, text.sentences(part)))


def _piece_length(piece: str) -> int:
    return _cached_length(piece) if len(piece) <= _LONGEST_CACHED else text.length(piece)


@functools.lru_cache(maxsize=2**16)
def _cached_length(piece: str) -> int:
    return text.length(piece)


# Step 1: the question and the two halves


def _tree(task: Task, random_: random.Random) -> str:
    context = task.last.removeprefix(context_label(task.prompts)).strip()
    near = halve(context, 0)
    halves = halve(context, 1) if random_.random() < 0.3 else near
    language = task.prompts.language
    weak = task.kind == "weak tree"
    few = len(task.examples) < len(task.prompts.examples)
    if random_.random() < (0.12 if weak or few else 0.97):
        question = make_question(near, _length(context), language, random_)
    else:
        question = weaker_question(context, language, weak, few, random_)
    return task.prompts.cst_reply(question, halves)


_CLAUSE_END = re.compile(r"[，；、：]|[,;:](?=\s)")
_LINE = re.compile(r"\n+")
_AROUND = 500  # characters on either side of the middle in which that cut is looked for
_DIVISIBLE = 40  # length from which a text without any mark is cut between words


def halve(context: str, choice: int) -> tuple[str, str]:
    """Cuts a text near its middle: at a sentence end, else at a clause mark, else between words.

    ``choice`` 0 is the nearest cut, 1 the second nearest where it is not far off. Both halves are shorter
    than the text and made of its words; where there is no such cut, the second half is empty.
    """
    context = context.strip()
    total = _length(context)
    for pieces in (_sentences(context), _cut_after(context, _CLAUSE_END)):
        cuts = _cuts(context, pieces, total)
        if cuts:
            at = cuts[min(choice, len(cuts) - 1)]
            return context[:at].strip(), context[at:].strip()
    if total >= _DIVISIBLE:
        middle = _between_words(context)
        if middle:
            return context[:middle].strip(), context[middle:].strip()
    return context, ""


def _sentences(context: str) -> list[str]:
    sentences = text.sentences(context)
    if "\n" not in context:
        return sentences
    return [piece for sentence in sentences for piece in _cut_after(sentence, _LINE)]


def _cut_after(part: str, mark: re.Pattern[str]) -> list[str]:
    ends = [*(match.end() for match in mark.finditer(part)), len(part)]
    return [part[a:b] for a, b in zip([0, *ends], ends, strict=False) if a < b]


def _inside_unit(context: str, at: int) -> bool:
    """Whether a cut here would make two units of one, and so add to the length."""
    beside = context[at - 1 : at + 1]
    return not (beside[0].isspace() or beside[1].isspace()) and _cached_length(beside) == 1


def _cuts(context: str, pieces: list[str], total: int) -> list[int]:
    """Where to cut between pieces, in characters: the nearest to the middle, and the next if not far off."""
    options, at, before = [], 0, 0
    for piece in pieces[:-1]:
        at += len(piece)
        before += _piece_length(piece)
        if 0 < before < total and not _inside_unit(context, at):
            options.append((abs(2 * before - total), at))
    best = sorted(options)[:2]
    return [at for distance, at in best if distance <= total * 0.5 or at == best[0][1]]


def _between_words(context: str) -> int:
    """A place near the middle where a cut leaves the words on both sides as they were; 0 if there is none."""
    start = max(0, len(context) // 2 - _AROUND)
    around = context[start : start + 2 * _AROUND]
    whole = text.words(around)
    at, ends = 0, []
    for word in whole:
        at = around.index(word, at) + len(word)
        ends.append(at)
    ends.sort(key=lambda end: abs(2 * end - len(around)))
    for end in ends[:8]:
        halves = around[:end].strip(), around[end:].strip()
        if all(
            half and text.length(half) < text.length(around) and rouge_l_precision(text.words(half), whole) > 0.9
            for half in halves
        ):
            return start + end
    return 0


# Step 3: answers and grades


def _answer(task: Task, random_: random.Random) -> str:
    """The sentences that bear on the question, about as long together as the answers shown."""
    labels = task.prompts.labels
    context, _, question = task.last.rpartition(f"\n\n{task.prompts.line(labels.question, '')}")
    context = context.removeprefix(context_label(task.prompts))
    language = task.prompts.language
    wanted = sum(map(_length, task.examples)) / len(task.examples) if task.examples else 0
    asked = content_words(question, language)
    sought = [sign for mark, sign in _SOUGHT if mark.search(question)]
    ranked = []
    for number, sentence in enumerate(text.sentences(context[:20_000])):
        said = plain(sentence, language)
        if len(said) > 1:
            overlap = len(asked & content_words(said, language)) + sum(bool(sign.search(said)) for sign in sought)
            ranked.append((-overlap, number, said))
    ranked.sort()
    chosen, size = [], 0
    for overlap, number, said in ranked[:4]:
        if chosen and (not overlap or size + _length(said) / 2 > max(wanted, 30)):
            break
        chosen.append((number, said))
        size += _length(said)
    glue = "" if language == "zh" else " "
    return glue.join(said for _, said in sorted(chosen)) or _NO_ANSWER[language]


# What a question asks for, and what a sentence has that tells it.
_SOUGHT = (
    (
        re.compile(r"多少|几|\bhow (?:much|many|long|often)", re.I),
        re.compile(r"\d|[二三四五六七八九十百千万]"),
    ),
    (
        re.compile(r"为什么|原因|缘故|\bwhy\b|\breason", re.I),
        re.compile(r"因为|由于|所以|\bbecause\b|\bso that\b"),
    ),
    (re.compile(r"什么时候|\bwhen\b", re.I), re.compile(r"[年月日点]|\b(?:after|before|until|in \d{4})\b")),
)
_NO_ANSWER = {
    "zh": "这件事目前没有更多可以说明的情况。",
    "en": "There is nothing more that can be said about it.",
}


def _grade(task: Task, random_: random.Random) -> str:
    """A grade by the words that answer and reference share in the same order (ROUGE-L F1)."""
    labels, line = task.prompts.labels, task.prompts.line
    asked, _, answer = task.last.rpartition(f"\n\n{line(labels.answer, '')}")
    reference = asked.rpartition(f"\n\n{line(labels.reference, '')}")[2]
    ours, theirs = (text.words(part[:20_000]) for part in (answer, reference))
    shared = LCSseq.similarity(ours, theirs)
    overlap = 2 * shared / max(1, len(ours) + len(theirs))
    return line(labels.grade, str(1 + round(9 * min(1.0, overlap))))


# Judging outputs


def _judge(task: Task, random_: random.Random) -> str:
    """Three grades of an answer: for the question's words in it, for its figures, and their mean."""
    question, _, answer = task.last.partition(f"\n\n{task.prompts.line(task.prompts.labels.answer, '')}")
    grades = _worth(question, answer, task)
    lines = zip(task.prompts.judge.scores, (*grades, round(sum(grades) / 2)), strict=True)
    return "\n".join(task.prompts.line(score, str(grade)) for score, grade in lines)


def _compare(task: Task, random_: random.Random) -> str:
    """The answer with the better grades."""
    judge, line = task.prompts.judge, task.prompts.line
    question, _, answers = task.last.partition(f"\n\n{line(judge.answers[0], '')}")
    first, _, second = answers.partition(f"\n\n{line(judge.answers[1], '')}")
    ours, theirs = (sum(_worth(question, answer, task)) for answer in (first, second))
    return line(judge.verdict, judge.verdicts[2 if ours == theirs else ours < theirs])


def _worth(question: str, answer: str, task: Task) -> tuple[int, int]:
    """Relevance and accuracy from 1 to 5, as far as words can tell: those of the question, and how many."""
    language = task.prompts.language
    asked = content_words(question.removeprefix(task.prompts.line(task.prompts.labels.question, "")), language)
    said = content_words(answer[:20_000], language)
    if not said:
        return 1, 1
    return 1 + round(4 * len(asked & said) / max(1, len(asked))), min(5, 1 + len(said) // 5)


_OTHER = {
    "zh": "这里是 AugCon 的演示引擎：它按规则回复，不是语言模型，只能回应 AugCon 自己的提示词。",
    "en": "This is AugCon's demonstration engine. It works by rules, is not a language model, and answers "
    "only AugCon's own prompts.",
}


def _other(task: Task, random_: random.Random) -> str:
    return _OTHER[task.prompts.language]
