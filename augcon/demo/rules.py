"""The demonstration engine's replies to AugCon's prompts, by rules that only look at the surface of a text, in Chinese
and in English. A reply depends on prompt and seed alone."""

import functools
import itertools
import random
import re
import tomllib
from pathlib import Path
from typing import NamedTuple, get_args

from rapidfuzz.distance import LCSseq

from augcon.data import Message
from augcon.text import units as text
from augcon.text.checks import mentions_text
from augcon.text.prompts import Prompts, as_text, load_prompts, prompts_file

_MOST_READ = 20_000  # characters of a text that are read; a corpus has far shorter contexts
_DIVISIBLE = 40  # length from which a text without any mark is cut between words
_SAYINGS = tomllib.loads(Path(__file__).with_name("words.toml").read_text("utf-8"))


def reply_to(prompt: list[Message] | str, seed: int | None) -> str:
    """The whole reply to messages, or to the same prompt as one text."""
    task = recognise(prompt)
    if task.kind == "other":
        return str(_SAYINGS[task.prompts.language]["other"])
    if "focus" in task.kind:
        return _focused(task, seed)
    if task.kind == "leaf":
        question = _question(task, task.last, True, random.Random(f"{seed}\n{task.fixed}{task.last}"))
        return task.prompts.line(task.prompts.labels.question, question)
    if "tree" in task.kind:
        return _tree(task, random.Random(f"{seed}\n{task.fixed}{task.last}"))
    return _answer(task) if task.kind == "answer" else _graded(task)


class Task(NamedTuple):
    """What a prompt asks for: its kind, its last turn (a context first, without label), and as ``fixed`` all before."""

    kind: str
    prompts: Prompts
    fixed: str
    last: str

    def parts(self, *labels: str) -> list[str]:
        """The last turn cut at its last lines with these labels: what stands before them, then what they name."""
        parts = [self.last]
        for label in reversed(labels):
            parts[:1] = parts[0].rpartition(f"\n\n{self.prompts.line(label, '')}")[::2]
        return [part[:_MOST_READ] for part in parts]


def recognise(prompt: list[Message] | str) -> Task:
    """Finds out which of AugCon's prompts this is, by how it begins: a context may hold anything."""
    turns = [prompt.removesuffix("\n\n")] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    whole = "\n\n".join(turns)
    for prompts in map(_prompts_now, get_args(text.Language)):
        label = prompts.end_of_reply()[0].lstrip()
        for kind, instruction in {
            "tree": prompts.cst.instruction,
            "weak tree": prompts.cst.weak_instruction,
            "leaf": prompts.cst.question_instruction,
            "focus": prompts.focus.instruction,
            "weak focus": prompts.focus.weak_instruction,
            "answer": prompts.answer.instruction,
            "grade": prompts.grade.instruction,
            "judge": prompts.judge.instruction,
            "compare": prompts.judge.compare_instruction,
        }.items():
            if whole.startswith(f"{instruction}\n\n"):
                fixed = f"{instruction}\n\n"
                if kind.endswith(("tree", "leaf", "focus")):
                    weak = kind.startswith("weak")
                    *shown, _ = {
                        "tree": prompts.cst_messages("", weak=weak),
                        "leaf": prompts.question_messages(""),
                        "focus": prompts.focus_messages([], 0, 0, weak=weak),
                    }[kind.removeprefix("weak ")]
                    known = (as_text(shown[:number]) for number in range(2, len(shown) + 1, 2))
                    fixed = max([fixed, *filter(whole.startswith, known)], key=len)
                elif kind == "answer":
                    last = turns[-1] if len(turns) > 1 else label + whole.rpartition(f"\n\n{label}")[2]
                    fixed = whole.removesuffix(last)
                rest = whole.removeprefix(fixed)
                if rest.startswith(prompts.line(prompts.labels.title, "")):
                    rest = rest.partition("\n\n")[2]
                return Task(kind, prompts, fixed, rest.removeprefix(label))
    return Task("other", _prompts_now(text.language(whole[-2000:])), "", whole)


def _prompts_now(language: text.Language) -> Prompts:
    """The prompts as their file stands: users edit it while the engine runs."""
    return _prompts_of(language, prompts_file(language).stat().st_mtime_ns)


@functools.lru_cache
def _prompts_of(language: text.Language, _changed: int) -> Prompts:
    return load_prompts.__wrapped__(language)


def halve(context: str, second_best: bool) -> tuple[str, str]:
    """Cuts a text near its middle: at the end of a sentence or line, else of a clause, else between words.

    ``second_best`` takes the next best cut if it is not far off. Both halves are shorter than the text and made
    of its words; where there is no such cut, the second half is empty.
    """
    context = context.strip()
    total, middle = text.length(context), len(context) // 2
    ends = [*itertools.accumulate(map(len, text.sentences(context)))]
    lines, clauses = ([end.end() for end in re.finditer(mark, context)] for mark in (r"\n+", r"[，；、：]|[,;:](?=\s)"))
    start = max(0, middle - 200)
    words = text.words(context[start : start + 400]) if total >= _DIVISIBLE else []
    between = itertools.accumulate(words, lambda at, word: context.index(word, at) + len(word), initial=start)
    for places in (ends + lines, clauses, between):
        nearest = sorted(places, key=lambda end: abs(end - middle))[:8]
        halves = ((context[:end].strip(), context[end:].strip()) for end in nearest)
        fit = (cut for cut in halves if all(cut) and sum(map(text.length, cut)) == total)  # else it cuts a unit
        for first in fit:
            second = next(fit, first) if second_best else first
            return second if max(map(len, second)) < 1.5 * middle else first
    return context, ""


def _tree(task: Task, random_: random.Random) -> str:
    """A question and the halves."""
    question = _question(task, task.last, task.fixed == as_text(task.prompts.cst_messages("")[:-1]), random_)
    return task.prompts.cst_reply(question, halve(task.last, second_best=random_.random() < 0.3))


def _focused(task: Task, seed: int | None) -> str:
    """A question about the sentences in focus, and the number of the one in their middle."""
    listed, focus = task.parts(task.prompts.labels.focus)
    first, *_, last = map(int, 2 * re.findall(r"\d+", focus))
    lines = re.split(r"^\[\d+\] ", listed, flags=re.MULTILINE)[first : last + 1]
    whole = task.fixed == as_text(task.prompts.focus_messages([], 0, 0)[:-1])
    question = _question(task, "".join(lines), whole, random.Random(f"{seed}\n{task.fixed}{task.last}"))
    labels, line = task.prompts.labels, task.prompts.line
    return f"{line(labels.question, question)}\n{line(labels.cut, str((first + last) // 2))}"


def _question(task: Task, about: str, whole: bool, random_: random.Random) -> str:
    """A question; mostly a weaker one unless the prompt is ``whole``: its instruction and all of its examples."""
    language, context = task.prompts.language, text.clean(about[:_MOST_READ])
    pieces: dict[str, list[str]] = {slot: [] for slot in "tsqc"}
    for sentence in text.sentences(context):
        for slot, piece in (_chinese if language == "zh" else _english)(sentence[:1000]):
            pieces[slot].append(piece)
    pieces["u"], pieces["c"] = pieces["t"], pieces["s"] or pieces["c"]
    best, weaker = (random_.choices(_SAYINGS[language][templates], k=20) for templates in ("good", "weak"))
    good = random_.random() < (0.97 if whole else 0.06)
    question = str(_SAYINGS[language]["weak"][-1])
    for template in [*best, *weaker] if good else weaker:
        values = {slot: random_.choice(found or [""]) for slot, found in pieces.items() if f"{{{slot}}}" in template}
        if all(values.values()) and not any(one in other for one, other in itertools.permutations(values.values(), 2)):
            question = template.format(**values)
            break
    return question


_ZH_CLAUSE = re.compile(r"(?:[^\W_]|[.%](?=\d)|(?<=\d)[,%])+")
_DIGIT = "一二三四五六七八九十百千万两"
_ZH_NUMBER = re.compile(rf"(?<=[^\W\d第的{_DIGIT}])(?:\d[\d,.]*|[{_DIGIT}]{{2,}})(?=[^\W\d多余几{_DIGIT}]{{1,3}}$)")
_ZH_UNFIT = re.compile(  # what depends on words before it, asks, or is unfinished
    "[他她它我你您这那此该其某者吗呢哪谁则才也就又还便却]|什么|怎|[本上下]文|文[中本]|上述|如[下何]"
    "|^(?:[第一二两但而若]|因为|如果|所以|虽然|既然)|[的时后前说问道是和与对在]$"
)


@functools.lru_cache(maxsize=2**15)  # a tree repeats its sentences on every level
def _chinese(sentence: str) -> list[tuple[str, str]]:
    """What a sentence offers for the slots of the templates."""
    text.load_jieba()
    from jieba import posseg  # takes a second

    pieces = []
    for clause in _ZH_CLAUSE.findall(sentence):
        words = posseg.lcut(clause)
        pieces += [("t", word.word) for word in words if word.flag[0] == "n" and len(word.word) > 2]
        if 7 <= len(clause) <= 24 and text.language(clause) == "zh":
            tags = "".join("的" if word.word == "的" else word.flag[0] for word in words)
            fit = re.search("[va]", tags) and not _ZH_UNFIT.search(clause)
            pieces.append(("s" if fit else "c", clause))
            asked, thing = _ZH_NUMBER.sub("多少", clause), re.search("(?<=v)u?(?=m?q?[nb]+$)", tags)
            if thing and asked == clause:
                asked = "".join(word.word for word in words[: thing.end()]) + "什么"
            pieces += [("q", asked)] if fit and asked != clause and len(asked) > 5 else []
    return pieces


_EN_TERM = re.compile(
    r"\bthe [\w-]+ [\w-]{4,}(?= (?:of|in|and|is|are|was|has)\b|[,.;])|(?<=[a-z,] )[A-Z]\w+(?: [A-Z]\w+)+"
)
_EN_STATEMENT = re.compile(
    r"^(?:(The|An?|In|On|At|By|For|After|Some|Many|Most|All) |[A-Z]\w+ [A-Z]\w+ )[\w'’ ,%-]{15,120}(?=[.;!]\s*$)"
)
_EN_NAMED = re.compile(
    r"^(?:(The) [\w-]+|[A-Z]\w+ [A-Z]\w+) ((?:is|was|has|had|can|must|will|[a-z]+ed|[a-z]+[^s]s) .{12,})"
)
_EN_CLAUSE = re.compile(
    r"\b(?!(?:and|but|or|so|which|that|who)\b)[^\W\d_](?:[\w'’ -]|[,.](?=\d)){20,120}\b(?=[^\w, ]|, )"
)
_EN_UNFIT = re.compile(r"\b(?:s?he|it|they|we|I|you|this|that|these|those|my|your|our)\b", re.IGNORECASE)


@functools.lru_cache(maxsize=2**15)
def _english(sentence: str) -> list[tuple[str, str]]:
    """The same for English."""
    slots = {"t": _EN_TERM.findall(sentence), "s": [], "q": [], "c": _EN_CLAUSE.findall(sentence)}
    whole = _EN_STATEMENT.match(sentence)
    if whole and not _EN_UNFIT.search(whole[0]):
        slots["s"] = [whole[0][0].lower() + whole[0][1:] if whole[1] else whole[0]]
        slots["q"] = [f"{'Who or what' if the else 'Who'} {said}" for the, said in _EN_NAMED.findall(whole[0])]
    return [(slot, piece) for slot, pieces in slots.items() for piece in pieces]


def _answer(task: Task) -> str:
    """The sentences that bear on the question, together about as long as the answers shown."""
    context, question = task.parts(task.prompts.labels.question)
    label = f"\n\n{task.prompts.line(task.prompts.labels.focus, '')}"
    context = context.rpartition(label)[2]  # the part in question, if one is named
    language, asked = text.language(question), _content(question)
    turns = task.fixed.split(f"\n\n{task.prompts.line(task.prompts.labels.question, '')}")[1:]
    shown = [turn.partition("\n\n")[2].partition(task.prompts.end_of_reply()[0])[0] for turn in turns]
    wanted = max(30, sum(map(text.length, shown)) / max(1, len(shown)))
    said = [sentence.strip() for sentence in text.sentences(context) if text.language(sentence) == language]
    chosen: list[str] = []
    for sentence in sorted(said, key=lambda sentence: -len(asked & _content(sentence))):
        if chosen and (text.length("".join(chosen)) > wanted / 2 or not asked & _content(sentence)):
            break
        if sentence and not mentions_text(sentence, context, question):
            chosen.append(sentence)
    answer = ("" if language == "zh" else " ").join(sorted(chosen, key=said.index)) or _SAYINGS[language]["no_answer"]
    return answer[0].upper() + re.sub("[，；：、,;:]$", "。" if language == "zh" else ".", answer[1:])


def _content(part: str) -> set[str]:
    """The words that carry meaning: the longer ones, and numbers."""
    return {word for word in text.words(part.lower()) if word.isdigit() or len(word) > (3 if word.isascii() else 1)}


def _graded(task: Task) -> str:
    """A grade by the words that answer and reference share in order (ROUGE-L F1), or the judge's grades or verdict."""
    labels, judge, line = task.prompts.labels, task.prompts.judge, task.prompts.line
    if task.kind == "grade":
        reference, answer = map(text.words, task.parts(labels.reference, labels.answer)[1:])
        overlap = 2 * LCSseq.similarity(reference, answer) / max(1, len(reference) + len(answer))
        return line(labels.grade, str(1 + round(9 * overlap)))
    question, *answers = task.parts(*([labels.answer] if task.kind == "judge" else judge.answers))
    asked = _content(question)
    grades = [1 + round(4 * len(asked & _content(answer)) / max(1, len(asked))) for answer in answers]
    if task.kind == "judge":
        return "\n".join(line(score, str(grades[0])) for score in judge.scores)
    return line(judge.verdict, judge.verdicts[2 if grades[0] == grades[1] else grades[0] < grades[1]])
