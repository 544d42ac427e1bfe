"""High-fidelity answers: the search for examples to show, and the answers (paper section 3.4)."""

import dataclasses
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from augcon.data import Answer, Ask, Example, Message, Query, Request
from augcon.method.ask import ask_until_parsed
from augcon.method.diversity import Sweep
from augcon.text.checks import parse_answer
from augcon.text.parse import bare_answer, parse_grade
from augcon.text.prompts import Prompts
from augcon.text.units import Language, language


@dataclasses.dataclass(frozen=True)
class AnswerRules:
    """How answers and grades are asked for; see the settings of the same names."""

    answer_temperature: float = 0.2
    answer_max_tokens: int = 4096
    answer_tries: int = 3
    tries: int = 4  # of a grade


Trial = tuple[int, int]  # the number of a set of examples, and of an example that is not in it


@dataclasses.dataclass(frozen=True)
class Graded:
    """An answer to the example that a trial leaves out, and its grade. If either is None, ``detail`` says why."""

    answer: str | None
    grade: int | None
    detail: str = ""


@dataclasses.dataclass
class Search:
    """The random search over sets of examples for the queries of one language.

    ``sets`` are the candidates in the order drawn, as places in ``examples``. With a single one, nothing is searched.
    """

    language: Language
    examples: list[Example]
    sets: list[tuple[int, ...]]
    own: bool  # whether the examples are in this language
    graded: dict[Trial, Graded] = dataclasses.field(default_factory=dict)

    def trials(self) -> list[Trial]:
        """Every set with every example that is not in it; none if there is only one set."""
        numbers = range(len(self.examples)) if len(self.sets) > 1 else ()
        return [(candidate, n) for candidate, chosen in enumerate(self.sets) for n in numbers if n not in chosen]

    def shown(self, candidate: int) -> list[Example]:
        """The examples of a set."""
        return [self.examples[n] for n in self.sets[candidate]]

    def mean(self, candidate: int) -> float | None:
        """The mean grade of a set; None if fewer than half of its answers are graded."""
        every = [graded.grade for _, graded in self._graded(candidate)]
        grades = [grade for grade in every if grade is not None]
        return statistics.fmean(grades) if grades and 2 * len(grades) >= len(every) else None

    @property
    def winner(self) -> int:
        """The set with the best mean. Among equals, or if none has a mean, it is the first drawn."""
        return max(range(len(self.sets)), key=lambda candidate: self.mean(candidate) or 0)

    def table(self) -> dict[str, object]:
        """The whole search as a table to read."""
        sets = [
            {
                "examples": chosen,
                "questions": [example.question for example in self.shown(candidate)],
                "mean": self.mean(candidate),
                "answers": [
                    {"question": self.examples[n].question, "example": n, **dataclasses.asdict(graded)}
                    for n, graded in self._graded(candidate)
                ],
            }
            for candidate, chosen in enumerate(self.sets)
        ]
        questions = [example.question for example in self.examples]
        return {"examples": questions, "chosen": self.sets[self.winner], "sets": sets}

    def _graded(self, candidate: int) -> list[tuple[int, Graded]]:
        """The examples tried with a set, and what came of them."""
        numbers = range(len(self.examples))
        return [(n, self.graded[candidate, n]) for n in numbers if (candidate, n) in self.graded]


def plan_search(examples: Sequence[Example], of: Language, shown: int, candidates: int, seed: int) -> Search:
    """Draws ``candidates`` different sets of ``shown`` examples in a language, or in any if it has none."""
    own = [example for example in examples if language(example.question) == of]
    pool = own or list(examples)
    size = min(shown, len(pool))
    random_, sets = random.Random(seed), dict[tuple[int, ...], None]()
    while len(sets) < min(candidates, math.comb(len(pool), size)):
        sets[tuple(sorted(random_.sample(range(len(pool)), size)))] = None
    return Search(of, pool, list(sets), bool(own))


async def try_examples(
    ask: Ask, prompts: Prompts, shown: Sequence[Example], example: Example, rules: AnswerRules
) -> Graded:
    """Answers an example that is not shown, and grades that against the human answer. Raises what ``ask`` raises.

    Faults of the answer are left to the grade, unless it is empty.
    """
    request = _request(prompts.answer_messages(shown, example.context, example.question), prompts, rules)
    answer = await ask_until_parsed(
        ask, request, rules.answer_tries, lambda reply: bare_answer(reply, example.question, prompts)
    )
    if answer.value is None:
        return Graded(None, None, f"no answer: {answer.reason}")
    messages = prompts.grade_messages(example.context, example.question, example.answer, answer.value)
    end, pattern = prompts.end_of_reply(), prompts.grade_pattern()
    request = Request(messages, 0, rules.answer_max_tokens, text_end=end, pattern=pattern)
    grade = await ask_until_parsed(ask, request, rules.tries, lambda reply: parse_grade(reply, prompts))
    return Graded(answer.value, grade.value, grade.reason)


async def answer_query(
    ask: Ask,
    prompts: Prompts,
    shown: Sequence[Example],
    query: Query,
    context: str,
    rules: AnswerRules,
    title: str = "",
) -> Answer:
    """Answers a query, asking again until an answer passes. Raises what ``ask`` raises.

    ``context`` is that of the query or a larger one around it; ``title`` is the article's.
    """
    messages = prompts.answer_messages(shown, context, query.text, query.context, title)
    request = _request(messages, prompts, rules, query.root)
    within = dataclasses.replace(query, context=context)
    answer = await ask_until_parsed(
        ask, request, rules.answer_tries, lambda reply: parse_answer(reply, within, prompts, shown)
    )
    return Answer(query, answer.value, answer.tries, answer.reason, "" if answer.value else answer.reply)


def thin_out(answers: Iterable[Answer], articles: Mapping[int, int], alike: float) -> Iterator[Answer]:
    """The answers, without those that say what an earlier one on the same article says (AugCon's own).

    ``articles`` has the article of each root context; ``alike`` is the threshold of ``Sweep``.
    """
    sweeps = defaultdict[int | tuple[int], Sweep](lambda: Sweep(alike))
    for answer in answers:
        sweep = sweeps[articles.get(answer.query.root, (answer.query.root,))]
        if answer.text is not None and sweep.has_like(answer.text):
            yield dataclasses.replace(answer, text=None, reason="says what another answer says", reply=answer.text)
            continue
        if answer.text is not None:
            sweep.add(answer.text)
        yield answer


def _request(messages: list[Message], prompts: Prompts, rules: AnswerRules, root: int | None = None) -> Request:
    end = prompts.end_of_reply()
    return Request(messages, rules.answer_temperature, rules.answer_max_tokens, text_end=end, root=root)
