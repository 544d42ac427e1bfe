"""Judging outputs: a model grades answers from 1 to 5, and says which of two it prefers (paper section 4)."""

import dataclasses
import random
import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from augcon.errors import UserError, one_line
from augcon.llm.client import Refused, Request
from augcon.llm.ordered import map_in_order
from augcon.method.answers import asking_warmer
from augcon.method.tree import Ask, Parsed, parsed_reply
from augcon.text.checks import parse_grade
from augcon.text.parse import Unparseable, without_thinking
from augcon.text.prompts import Message, Prompts

RESAMPLES = 10_000
SCORES = ("satisfaction", "relevance", "accuracy")


@dataclasses.dataclass(frozen=True)
class Grades:
    """What the judge thinks of an answer; each from 1 to 5."""

    relevance: int
    accuracy: int
    satisfaction: int


@dataclasses.dataclass(frozen=True)
class JudgeRules:
    """How the judge is asked; see the settings of the same names."""

    max_tokens: int = 4096
    tries: int = 4
    structured_output: bool = False


def read_outputs(folder: str) -> list[tuple[str, str]]:
    """The questions and answers in a folder of outputs. Raises UserError when it is none."""
    try:
        rows = datasets.load_from_disk(folder)
        return list(zip(rows["question"][:], rows["answer"][:], strict=True))
    except Exception as error:  # the library raises many kinds
        raise UserError(
            f"--judge: {folder!r} is no folder of outputs ({one_line(error)}); run inference.py for it first"
        ) from error


async def grade_all(
    ask: Ask,
    prompts_of: Callable[[str], Prompts],
    pairs: Sequence[tuple[str, str]],
    rules: JudgeRules,
    window: int,
) -> AsyncIterator[Grades | str]:
    """The grades of each (question, answer), in order, or the reason why there are none."""

    async def grade(pair: tuple[str, str]) -> Grades | str:
        prompts = prompts_of(pair[0])
        pattern = prompts.judge_pattern() if rules.structured_output else None
        return await _asked(
            ask, prompts.judge_messages(*pair), pattern, rules, lambda said: parse_grades(said, prompts)
        )

    async for graded in map_in_order(grade, pairs, window):
        yield graded


async def compare_all(
    ask: Ask,
    prompts_of: Callable[[str], Prompts],
    triples: Sequence[tuple[str, str, str]],
    rules: JudgeRules,
    seed: int,
    window: int,
) -> AsyncIterator[int | str]:
    """Which answer of each (question, answer, answer) is better: 0, 1, or 2 for neither; or why that is not known.

    Judges prefer places, so a coin says for each question which answer is shown first.
    """

    async def compare(turned: tuple[tuple[str, str, str], bool]) -> int | str:
        (question, first, second), swap = turned
        prompts = prompts_of(question)
        messages = prompts.compare_messages(question, *((second, first) if swap else (first, second)))
        pattern = prompts.compare_pattern() if rules.structured_output else None
        place = await _asked(ask, messages, pattern, rules, lambda said: parse_verdict(said, prompts))
        return 1 - place if swap and place in (0, 1) else place

    coin = random.Random(seed)
    swaps = [coin.random() < 0.5 for _ in triples]
    async for preferred in map_in_order(compare, zip(triples, swaps, strict=True), window):
        yield preferred


async def _asked(
    ask: Ask, messages: list[Message], pattern: str | None, rules: JudgeRules, parse: Callable[[str], Parsed]
) -> Parsed | str:
    request = Request(messages, 0, rules.max_tokens, pattern=pattern)
    try:
        return await parsed_reply(asking_warmer(ask), request, rules.tries, parse)
    except (Unparseable, Refused) as error:
        return str(error)


def parse_grades(reply: str, prompts: Prompts) -> Grades:
    """The three grades that a reply consists of, each with its label, in the order asked for.

    Raises Unparseable for anything else.
    """
    lines = [line.strip() for line in re.split(r"[\n,;]+", _plain(reply)) if line.strip()]
    labels = [_plain(label) for label in prompts.judge.scores]
    if len(lines) != len(labels):
        raise Unparseable("no three grades")
    for line, label in zip(lines, labels, strict=True):
        if not line.casefold().startswith(label.casefold()):
            raise Unparseable("no three grades")
    return Grades(*(parse_grade(line, [label], 1, 5) for line, label in zip(lines, labels, strict=True)))


def parse_verdict(reply: str, prompts: Prompts) -> int:
    """The verdict that a reply consists of, perhaps with its label, as ``compare``. Raises Unparseable."""
    said = _plain(reply).rstrip(".。").casefold()
    said = re.sub(rf"^{re.escape(_plain(prompts.judge.verdict).casefold())}\s*:?\s*", "", said)
    verdicts = [_plain(verdict).casefold() for verdict in prompts.judge.verdicts]
    if said not in verdicts:
        raise Unparseable("no verdict")
    return verdicts.index(said)


def _plain(reply: str) -> str:
    """The reply without thinking, markup and full-width forms."""
    return re.sub(r"[*_`#>【】\[\]\"“”]", "", unicodedata.normalize("NFKC", without_thinking(reply))).strip()


Mean = dict[str, float]  # "mean", and "low" and "high", the ends of its 95% bootstrap interval


def row(graded: Grades | str) -> dict[str, int] | None:
    """The grades of an answer for a table; None where there are none."""
    return dataclasses.asdict(graded) if isinstance(graded, Grades) else None


def summary(graded: Sequence[Grades | str], seed: int) -> dict[str, Any]:
    """How many answers are graded and how many not, and the Mean of each score, None without grades."""
    grades = [grade for grade in graded if isinstance(grade, Grades)]
    means = {score: mean_of([getattr(grade, score) for grade in grades], seed) if grades else None for score in SCORES}
    return {"graded": len(grades), "ungraded": len(graded) - len(grades), **means}


def mean_of(values: Sequence[int], seed: int) -> Mean:
    """The mean of at least one value with its interval (percentiles of resampled means)."""
    distinct, counts = np.unique(values, return_counts=True)
    # A resample of n values is a multinomial draw of how often each distinct one comes.
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), RESAMPLES)
    low, high = np.percentile(drawn @ distinct / len(values), [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def in_words(mean: Mean) -> str:
    """A mean with its interval, for reading."""
    return "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**mean)


def plot(path: Path, names: Sequence[str], means: Sequence[Mean]) -> None:
    """One picture: the mean satisfaction of each set of outputs with its interval, in the order given."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(4.0, 1.6 * len(names)), 4), layout="constrained")
    ends = [[of["mean"] - of["low"] for of in means], [of["high"] - of["mean"] for of in means]]
    axes.errorbar(range(len(names)), [of["mean"] for of in means], yerr=ends, fmt="o-", capsize=5)
    for place, of in enumerate(means):
        axes.annotate(f"{of['mean']:.2f}", (place, of["mean"]), xytext=(7, 4), textcoords="offset points")
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 2 else 0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("satisfaction (1 to 5), mean and 95% interval")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
