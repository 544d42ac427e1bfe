"""High-fidelity answers: the search for examples to show, and the answers (paper section 3.4)."""

import dataclasses
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from augcon.data import Answer, Ask, Example, Query, Request
from augcon.method.ask import ask_until_parsed
from augcon.text.checks import parse_answer
from augcon.text.parse import GRADE_LABELS, bare_answer, parse_grade
from augcon.text.prompts import Prompts
from augcon.text.units import Language, language


@dataclasses.dataclass(frozen=True)
class AnswerRules:
    """How answers and grades are asked for; see the settings of the same names."""

    answer_temperature: float = 0.2
    answer_max_tokens: int = 4096
    answer_tries: int = 3
    tries: int = 4  # of a grade
    structured_output: bool = False


# The search


@dataclasses.dataclass(frozen=True)
class Trial:
    """A set of examples (by its number) to be tried on an example that it leaves out."""

    candidate: int
    example: int


@dataclasses.dataclass(frozen=True)
class Graded:
    """The answer to the left-out example of a trial, and its grade; both None where there is none."""

    example: int
    answer: str | None
    grade: int | None
    detail: str = ""


@dataclasses.dataclass
class Search:
    """The random search over sets of examples for the queries of one language.

    ``examples`` are those that it chooses from, ``sets`` the candidates as places in them, in the order drawn. With a
    single set there is nothing to search. ``graded`` has the graded answers of each candidate.
    """

    language: Language
    examples: list[Example]
    sets: list[tuple[int, ...]]
    own: bool  # whether the examples are in this language
    graded: dict[int, list[Graded]] = dataclasses.field(default_factory=dict)

    def trials(self) -> list[Trial]:
        """Every set with every example that it leaves out; none where there is no choice."""
        if len(self.sets) == 1:
            return []
        numbers = range(len(self.examples))
        return [Trial(candidate, n) for candidate, chosen in enumerate(self.sets) for n in numbers if n not in chosen]

    def add(self, trial: Trial, graded: Graded) -> None:
        """Takes the outcome of a trial."""
        self.graded.setdefault(trial.candidate, []).append(graded)

    def shown(self, candidate: int) -> list[Example]:
        """The examples of a set."""
        return [self.examples[n] for n in self.sets[candidate]]

    def mean(self, candidate: int) -> float | None:
        """The mean grade of a set; None where fewer than half of its answers are graded."""
        of = self.graded.get(candidate, [])
        grades = [graded.grade for graded in of if graded.grade is not None]
        return statistics.fmean(grades) if grades and 2 * len(grades) >= len(of) else None

    @property
    def winner(self) -> int:
        """The set with the best mean; of equals, and where none has a mean, the first drawn."""
        return max(range(len(self.sets)), key=lambda candidate: self.mean(candidate) or 0)

    @property
    def ungraded(self) -> Counter[str]:
        """Why answers have no grade."""
        return Counter(graded.detail for of in self.graded.values() for graded in of if graded.grade is None)

    def table(self) -> dict[str, object]:
        """All of it, for reading."""
        return {
            "examples": [example.question for example in self.examples],
            "chosen": self.sets[self.winner],
            "sets": [
                {
                    "examples": chosen,
                    "questions": [example.question for example in self.shown(candidate)],
                    "mean": self.mean(candidate),
                    "answers": [
                        {"question": self.examples[graded.example].question, **dataclasses.asdict(graded)}
                        for graded in self.graded.get(candidate, [])
                    ],
                }
                for candidate, chosen in enumerate(self.sets)
            ],
        }


def plan_search(examples: Iterable[Example], of: Language, shown: int, candidates: int, seed: int) -> Search:
    """Draws ``candidates`` different sets of ``shown`` examples in a language, or in any if it has none."""
    every = list(examples)
    own = [example for example in every if language(example.question) == of]
    pool = own or every
    if len(pool) <= shown:  # nothing would be left to try a set on
        return Search(of, pool, [tuple(range(len(pool)))], bool(own))
    random_, sets = random.Random(seed), dict[tuple[int, ...], None]()
    if math.comb(len(pool), shown) <= candidates:
        sets.update(dict.fromkeys(itertools.combinations(range(len(pool)), shown)))
    while len(sets) < min(candidates, math.comb(len(pool), shown)):
        sets[tuple(sorted(random_.sample(range(len(pool)), shown)))] = None
    return Search(of, pool, list(sets), bool(own))


async def try_examples(ask: Ask, prompts: Prompts, search: Search, trial: Trial, rules: AnswerRules) -> Graded:
    """Answers the left-out example of a trial and grades that against the human answer. Raises UserError as ``ask``.

    Apart from an empty answer, what is wrong with one is left to the grade.
    """
    example = search.examples[trial.example]
    request = _request(prompts, search.shown(trial.candidate), example.context, example.question, rules)
    answer = await ask_until_parsed(
        ask, request, rules.answer_tries, lambda reply: bare_answer(reply, example.question, prompts)
    )
    if answer.value is None:
        return Graded(trial.example, None, None, f"no answer: {answer.reason}")
    messages = prompts.grade_messages(example.context, example.question, example.answer, answer.value)
    pattern = prompts.grade_pattern() if rules.structured_output else None
    request = Request(messages, 0, rules.answer_max_tokens, text_end=prompts.end_of_reply(), pattern=pattern)
    labels = (prompts.labels.grade, *GRADE_LABELS)
    grade = await ask_until_parsed(ask, request, rules.tries, lambda reply: parse_grade(reply, labels))
    return Graded(trial.example, answer.value, grade.value, grade.reason)


# The answers


async def answer_query(
    ask: Ask, prompts: Prompts, shown: Sequence[Example], query: Query, rules: AnswerRules
) -> Answer:
    """Answers a query from its context, asked again until nothing is wrong. Raises UserError as ``ask``."""
    request = _request(prompts, shown, query.context, query.text, rules)
    answer = await ask_until_parsed(
        ask,
        request,
        rules.answer_tries,
        lambda reply: parse_answer(reply, query.context, query.text, prompts, shown),
    )
    return Answer(query, answer.value, answer.tries, answer.reason, "" if answer.value else answer.reply)


def _request(prompts: Prompts, shown: Sequence[Example], context: str, question: str, rules: AnswerRules) -> Request:
    messages = prompts.answer_messages(shown, context, question)
    return Request(messages, rules.answer_temperature, rules.answer_max_tokens, text_end=prompts.end_of_reply())
