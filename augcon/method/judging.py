"""Judging outputs: a model grades answers from 1 to 5, and says which of two is better (paper section 4)."""

import dataclasses
import random
from collections.abc import Sequence

from augcon.data import Ask, Grades, Pair, Request
from augcon.method.answers import AnswerRules
from augcon.method.ask import ask_until_parsed
from augcon.text.parse import parse_grades, parse_verdict
from augcon.text.prompts import Prompts

RESAMPLES = 10_000
SCORES = ("satisfaction", "relevance", "accuracy")


async def grade(ask: Ask, prompts: Prompts, pair: Pair, rules: AnswerRules) -> Grades | str:
    """The grades of an answer, or the reason why there are none."""
    messages = prompts.judge_messages(pair.question, pair.answer)
    request = Request(messages, 0, rules.answer_max_tokens, pattern=prompts.judge_pattern())
    return (await ask_until_parsed(ask, request, rules.tries, lambda said: parse_grades(said, prompts))).outcome


def coins(number: int, seed: int) -> list[bool]:
    """Whether to swap the two answers to each of ``number`` questions, at random, since judges favour one place."""
    return random.Random(seed).choices((True, False), k=number)


async def compare(
    ask: Ask, prompts: Prompts, first: Pair, second: Pair, swapped: bool, rules: AnswerRules
) -> int | str:
    """Which of two answers to a question is better (0, 1, or 2 for neither), or why that is not known.

    ``swapped`` shows the second answer first.
    """
    shown = (second.answer, first.answer) if swapped else (first.answer, second.answer)
    messages = prompts.compare_messages(first.question, *shown)
    request = Request(messages, 0, rules.answer_max_tokens, pattern=prompts.compare_pattern())
    place = (await ask_until_parsed(ask, request, rules.tries, lambda said: parse_verdict(said, prompts))).outcome
    return 1 - place if swapped and place in (0, 1) else place


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, and the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_of(values: Sequence[int], seed: int) -> Mean:
    """The mean of at least one value with its interval (percentiles of resampled means)."""
    import numpy as np  # slow: not for --help

    distinct, counts = np.unique(values, return_counts=True)
    # A resample of n values is a multinomial draw of how often each distinct one comes.
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), RESAMPLES)
    low, high = np.percentile(drawn @ distinct / len(values), [2.5, 97.5])
    return Mean(float(np.mean(values)), float(low), float(high))


def means_of(graded: Sequence[Grades | str], seed: int) -> dict[str, Mean]:
    """The mean of each score over the answers that have grades; empty where none has."""
    grades = [each for each in graded if isinstance(each, Grades)]
    return {score: mean_of([getattr(each, score) for each in grades], seed) for score in SCORES if grades}
