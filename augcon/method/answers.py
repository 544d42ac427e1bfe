"""High-fidelity answers: the search for demonstrations, and the answers (paper section 3.4)."""

import dataclasses
import hashlib
import itertools
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from augcon.errors import UserError, one_line
from augcon.llm.client import Refused, Reply, Request
from augcon.method.tree import Ask, parsed_reply
from augcon.text.checks import GRADE_LABELS, bare_answer, parse_answer, parse_grade
from augcon.text.parse import Unparseable
from augcon.text.prompts import Prompts
from augcon.text.units import Language, clean, language

Example = tuple[str, str, str]  # context, question, answer written by a person
_WARMER = 0.7  # temperature


@dataclasses.dataclass(frozen=True)
class AnswerRules:
    """How answers and grades are asked for; see the settings of the same names."""

    temperature: float = 0.2
    max_tokens: int = 4096
    answer_tries: int = 3
    tries: int = 4
    structured_output: bool = False


def read_examples(path: Path) -> list[Example]:
    """The examples in a JSON Lines file of context, question, answer.

    Raises UserError, with file and line, where it is not such a file.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"--qa-examples: {path} cannot be read: {one_line(error)}") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--qa-examples: {path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON in UTF-8: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not an object with the fields context, question, answer")
        for field in ("context", "question", "answer"):
            if not isinstance(row.get(field), str) or not clean(row[field]).strip():
                raise UserError(f"{where}: {field!r} must be a text, not {row.get(field)!r:.80}")
        examples.append(tuple(clean(row[field]).strip() for field in ("context", "question", "answer")))
    if not examples:
        raise UserError(f"--qa-examples: {path} has no examples; give some, one a line")
    return examples


def examples_digest(examples: list[Example]) -> str:
    """A digest of the examples, so that answers after other examples are not mixed."""
    return hashlib.sha256(repr(examples).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# The search


@dataclasses.dataclass(frozen=True)
class Graded:
    """The answer to an example that was left out, and its grade; both None where they could not be had."""

    example: int
    answer: str | None
    grade: int | None
    detail: str = ""


@dataclasses.dataclass
class Search:
    """The random search over sets of demonstrations for the questions of one language.

    ``examples`` are those that it chooses from, ``sets`` the candidates as places in them, in the order drawn;
    with a single set there is nothing to search. ``trials`` has the graded answers of each.
    """

    language: Language
    examples: list[Example]
    sets: list[tuple[int, ...]]
    own: bool  # whether the examples are of this language
    trials: list[list[Graded]] = dataclasses.field(default_factory=list)

    def left_out(self, chosen: tuple[int, ...]) -> list[int]:
        """The examples that a set leaves for trying it, none where there is no choice."""
        return [n for n in range(len(self.examples)) if n not in chosen] if len(self.sets) > 1 else []

    def mean(self, candidate: int) -> float | None:
        """The mean grade of a set; None where fewer than half of its answers are graded."""
        trials = self.trials[candidate] if self.trials else []
        grades = [trial.grade for trial in trials if trial.grade is not None]
        return statistics.fmean(grades) if grades and 2 * len(grades) >= len(trials) else None

    @property
    def winner(self) -> int:
        """The set with the best mean; of equals, and where none has a mean, the first drawn."""
        return max(range(len(self.sets)), key=lambda candidate: self.mean(candidate) or 0)

    @property
    def demonstrations(self) -> list[Example]:
        """The winner's examples."""
        return [self.examples[n] for n in self.sets[self.winner]]

    def table(self) -> dict[str, Any]:
        """All of it, for reading."""
        return {
            "examples": [question for _, question, _ in self.examples],
            "chosen": list(self.sets[self.winner]),
            "sets": [
                {
                    "examples": list(chosen),
                    "questions": [self.examples[n][1] for n in chosen],
                    "mean": self.mean(candidate),
                    "answers": [
                        {"question": self.examples[trial.example][1], **dataclasses.asdict(trial)}
                        for trial in (self.trials[candidate] if self.trials else [])
                    ],
                }
                for candidate, chosen in enumerate(self.sets)
            ],
        }


def plan_search(
    examples: list[Example], of: Language, demonstrations: int, candidates: int, random_: random.Random
) -> Search:
    """Draws ``candidates`` different sets of ``demonstrations`` examples in a language, or of all if it has none."""
    own = [example for example in examples if language(example[1]) == of]
    pool = own or examples
    if len(pool) <= demonstrations:  # nothing would be left to try a set on
        return Search(of, pool, [tuple(range(len(pool)))], bool(own))
    sets: dict[tuple[int, ...], None] = {}
    if math.comb(len(pool), demonstrations) <= candidates:
        sets.update(dict.fromkeys(itertools.combinations(range(len(pool)), demonstrations)))
    while len(sets) < min(candidates, math.comb(len(pool), demonstrations)):
        sets[tuple(sorted(random_.sample(range(len(pool)), demonstrations)))] = None
    return Search(of, pool, list(sets), bool(own))


async def try_example(
    ask: Ask, prompts: Prompts, shown: list[Example], example: Example, number: int, rules: AnswerRules
) -> Graded:
    """Answers a left-out example and grades the answer against the human one. Raises UserError as ``ask``.

    Apart from an empty answer, what is wrong with one is left to the grade.
    """
    context, question, reference = example
    request = _request(prompts, shown, context, question, rules)
    try:
        answer = await parsed_reply(
            ask, request, rules.answer_tries, lambda reply: bare_answer(reply, question, prompts)
        )
    except (Unparseable, Refused) as error:
        return Graded(number, None, None, f"no answer: {error}")
    try:
        return Graded(number, answer, await _grade(ask, prompts, context, question, reference, answer, rules))
    except (Unparseable, Refused) as error:
        return Graded(number, answer, None, str(error))


def asking_warmer(ask: Ask) -> Ask:
    """``ask``, but with some temperature when it is asked again: at 0 the same reply would come."""

    async def ask_warmer(request: Request) -> Reply:
        return await ask(dataclasses.replace(request, temperature=_WARMER) if request.sample else request)

    return ask_warmer


async def _grade(
    ask: Ask, prompts: Prompts, context: str, question: str, reference: str, answer: str, rules: AnswerRules
) -> int:
    messages = prompts.grade_messages(context, question, reference, answer)
    pattern = prompts.grade_pattern() if rules.structured_output else None
    request = Request(messages, 0, rules.max_tokens, text_end=prompts.end_of_reply(), pattern=pattern)
    labels = (prompts.labels.grade, *GRADE_LABELS)
    return await parsed_reply(asking_warmer(ask), request, rules.tries, lambda reply: parse_grade(reply, labels))


# The answers


@dataclasses.dataclass(frozen=True)
class Answered:
    """What came of a question: the answer, or None with the reason and the last reply; ``tries`` counts replies."""

    answer: str | None
    tries: int
    reason: str = ""
    reply: str = ""


async def answer_question(
    ask: Ask, prompts: Prompts, shown: Sequence[Example], context: str, question: str, rules: AnswerRules
) -> Answered:
    """Answers a question from its context, asked again until nothing is wrong. Raises UserError as ``ask``."""
    replies = []

    async def ask_and_count(request: Request) -> Reply:
        replies.append(await ask(request))
        return replies[-1]

    def parse(reply: str) -> str:
        return parse_answer(reply, context, question, prompts, shown)

    request = _request(prompts, shown, context, question, rules)
    asked = ask_and_count if rules.temperature else asking_warmer(ask_and_count)
    try:
        return Answered(await parsed_reply(asked, request, rules.answer_tries, parse), len(replies))
    except (Unparseable, Refused) as error:
        return Answered(None, len(replies), str(error), replies[-1].text if replies else "")


def _request(prompts: Prompts, shown: Sequence[Example], context: str, question: str, rules: AnswerRules) -> Request:
    messages = prompts.answer_messages(list(shown), context, question)
    return Request(messages, rules.temperature, rules.max_tokens, text_end=prompts.end_of_reply())
