"""How the demonstration engine makes questions: what it read in a context, put into the templates of
``lexicon.toml``."""

import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable, Iterator

from augcon.demo.rules.lexicon import Reading, rules
from augcon.demo.rules.reading import LONGEST_CONTEXT, read
from augcon.text import units as text
from augcon.text.units import Language

_ATTEMPTS = 20
_LENGTHS = {"zh": (8, 45), "en": (4, 36)}
_SLOT = re.compile(r"\{([a-z])\}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Templates of one kind of question, and the contexts that they fit."""

    templates: list[tuple[str, frozenset[str]]]  # with their slots
    weight: float
    cue: re.Pattern[str] | None
    least: float
    most: float


@functools.cache
def _groups(language: Language) -> list[Group]:
    return [
        Group(
            [(template, frozenset(_SLOT.findall(template))) for template in group["templates"]],
            group["weight"],
            re.compile(group["cue"]) if "cue" in group else None,
            group.get("least", 0),
            group.get("most", math.inf),
        )
        for group in rules(language)["good"]
    ]


def make_question(halves: tuple[str, str], size: int, language: Language, random_: random.Random) -> str:
    """A question about a context of this length, its halves given: about both, where that is possible."""
    first, second = (read(half, language) for half in halves)
    context = " ".join(halves)[:LONGEST_CONTEXT]
    templates, weights = _fitting(context, size, language, _offered(first, second))
    shortest, longest = _LENGTHS[language]
    for _ in range(_ATTEMPTS if templates else 0):
        template = random_.choice(random_.choices(templates, weights)[0])
        question = _filled(template, lambda slot: _choices(slot, first, second), random_)
        if question and shortest <= text.length(question) <= longest:
            return question
    return _fallback(context, first, second, language, random_)


def _offered(first: Reading, second: Reading) -> set[str]:
    """The slots that there is something for."""
    terms = len({term for term, _ in first.terms + second.terms})
    return {"t", "u", "v"}.intersection("tuv"[:terms]) | first.slots.keys() | second.slots.keys()


def _fitting(context: str, size: int, language: Language, offered: set[str]) -> tuple[list[list[str]], list[float]]:
    """The templates of each kind of question that fits the context, and the kinds' weights."""
    kinds, weights = [], []
    for group in _groups(language):
        if group.least <= size <= group.most and (group.cue is None or group.cue.search(context)):
            templates = [template for template, slots in group.templates if slots <= offered]
            if templates:
                kinds.append(templates)
                weights.append(group.weight)
    return kinds, weights


Choices = tuple[list[str], list[float] | None]


def _filled(template: str, choices: Callable[[str], Choices], random_: random.Random) -> str | None:
    """The template with its slots filled; None where there is nothing new for one of them."""
    used: list[str] = []

    def fill(slot: re.Match[str]) -> str:
        values, weights = choices(slot.group(1))
        for _ in range(4 if values else 0):
            value = random_.choices(values, weights)[0]
            if not any(value in other or other in value for other in used):
                used.append(value)
                return value
        raise LookupError

    try:
        question = _SLOT.sub(fill, template)
    except LookupError:
        return None
    return question[0].upper() + question[1:]


def _choices(slot: str, first: Reading, second: Reading) -> Choices:
    """What may fill a slot, with weights: the best terms of the half in question, anything else of both."""
    if slot in "tuv":
        topics = sorted(first.terms[:4] + second.terms[:4], key=lambda term: -term[1])[:4]
        best = {"t": topics, "u": second.terms[:5], "v": first.terms[:5]}[slot] or topics
        return [term for term, _ in best], [weight**2 for _, weight in best]
    return first.slots.get(slot, []) + second.slots.get(slot, []), None


def _fallback(context: str, first: Reading, second: Reading, language: Language, random_: random.Random) -> str:
    """A plain question, for contexts that offer too little for any other."""
    fallback = rules(language)["fallback"]
    question = _filled(random_.choice(fallback["terms"]), lambda slot: _choices(slot, first, second), random_)
    if question:
        return question
    clauses = re.findall(r"[^\s，。；：？！…,;:?!“”\"]{2,24}", context)
    if not clauses:
        return random_.choice(fallback["nothing"])
    return random_.choice(fallback["bare"]).replace("{b}", max(clauses, key=len))


def weaker_question(context: str, language: Language, weak: bool, few: bool, random_: random.Random) -> str:
    """A worse question: vague for a weaker instruction, at the edge for few examples, empty for both."""
    kind = "empty" if weak and few else "edge" if few else "vague"
    templates = rules(language)["weak"]
    context = context[:LONGEST_CONTEXT]
    reading = read(context, language)
    foreign = [term.replace("_", " ") for term in sorted(rules(language)["foreign"]) if term not in context]
    values = reading.slots | {
        "g": [term for term, _ in reading.terms[-4:]],
        "f": list(_fragments(context, language, random_)),
        "x": foreign,
        "y": foreign,
    }
    for _ in range(_ATTEMPTS):
        question = _filled(random_.choice(templates[kind]), lambda slot: (values.get(slot, []), None), random_)
        if question:
            return question
    return random_.choice([template for template in templates["empty"] if "{" not in template])


def _fragments(context: str, language: Language, random_: random.Random) -> Iterator[str]:
    """Pieces of the first and the last clause, cut without regard to grammar."""
    clauses = re.findall(
        r"[^，。；：？！…\s“”‘’,;:?!]{4,60}" if language == "zh" else r"[^,.;:?!\n\"“”]{12,200}", context
    )
    for clause in dict.fromkeys(clauses[:1] + clauses[-1:]):
        words = text.words(clause) if language == "zh" else clause.split()
        if len(words) >= 3:
            start = random_.randrange(max(1, len(words) - 4))
            yield ("" if language == "zh" else " ").join(words[start : start + 4])
