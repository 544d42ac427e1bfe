"""The pairs that a model is to learn from, or that are exported: as reviewed, with their origins, some held out."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from augcon.data import Pair
from augcon.errors import UserError
from augcon.files import read_lines
from augcon.run.cut import ArticleRow
from augcon.run.results import STEP_1, STEP_3, Results
from augcon.run.review import apply_review, read_review
from augcon.run.rows import read_all
from augcon.text.units import Language

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class PairRules:
    """Which pairs, what a person thinks of them, and how many are held out; see the settings of the same names."""

    data: str
    review: str
    held_out: float
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What is read of a line of sft_origins.jsonl: the text that a question is about, its score and language."""

    question: str
    id: str | None = None
    article: int | None = None
    root: int | None = None
    score: float | None = None
    language: Language | None = None
    doubt: str = ""


@dataclasses.dataclass(frozen=True)
class Divided:
    """Pairs, where each came from, the places of those to learn and of those held out, and in words how many texts
    the latter are of."""

    pairs: list[Pair]
    origins: list[Origin]
    learnt: list[int]
    held_out: list[int]
    words: str

    def at(self, places: Sequence[int]) -> list[Pair]:
        """The pairs at these places."""
        return [self.pairs[place] for place in places]


def read_divided(results: Results, rules: PairRules) -> Divided:
    """The pairs as the review leaves them, divided. Raises UserError when there are none, or they are not complete."""
    pairs = _read_pairs(results, rules.data)
    origins = _origins_of(pairs, results)
    reviewed = apply_review(pairs, [origin.id for origin in origins], read_review(rules.review) if rules.review else [])
    if rules.review:
        print(f"review:  {reviewed}")
    if not reviewed.pairs:
        raise UserError(f"--review {rules.review!r} leaves no pair")
    origins = [origins[place] for place in reviewed.places]
    # Questions about one text have much in common; of fewer than 20 texts, one would be too large a part of the data.
    units = {
        "articles": [row.article for row in origins],
        "root contexts": [row.root for row in origins],
        "single pairs, as their texts are few or not known": range(len(origins)),
    }
    return Divided(reviewed.pairs, origins, *hold_out(range(len(origins)), units, rules.held_out, rules.seed, many=20))


def _read_pairs(results: Results, data: str) -> list[Pair]:
    """The pairs of --data or of the results folder. Raises UserError when they are not there or not complete."""
    source = Path(data).expanduser() if data else results.sft_data
    if not source.exists():
        raise UserError(f"there is no {source}; run bash augcon.sh or {STEP_3} first, or name the pairs with --data")
    unfinished = "step 3" in results.record.stages() and results.record.finished("step 3") is None
    if unfinished and source.resolve() == results.sft_data.resolve():
        raise UserError(f"step 3 in {results.folder} has not finished, so {source} is not up to date; run it first")
    return read_all(str(source), Pair, "--data")


def _origins_of(pairs: list[Pair], results: Results) -> list[Origin]:
    """Where every pair came from, as far as sft_origins.jsonl of the results folder knows its question."""
    rows = list(read_lines(results.sft_origins, Origin, STEP_3)) if results.sft_origins.exists() else []
    if [row.question for row in rows] == [pair.question for pair in pairs]:
        return rows  # of two pairs with the same question, each has its own
    origins = {row.question: row for row in rows}
    return [origins.get(pair.question, Origin(pair.question)) for pair in pairs]


def passages_of(results: Results, origins: Sequence[Origin]) -> list[str | None]:
    """The text that each pair was answered from: its root context's or, with --answer-from node, its node's."""
    step_3 = results.record.stages().get("step 3")
    if step_3 and step_3.made_with.get("answer_from") == "node":
        queries = results.each_root(results.filtered_queries) if results.filtered_queries.exists() else ()
        of_node = {query.id: query.context.strip() for _, listed in queries for query in listed}
        return [of_node.get(origin.id or "") for origin in origins]
    roots = results.read_contexts() if results.contexts.exists() else []
    of_root = {root.root: root.text.strip() for root in roots}
    return [None if origin.root is None else of_root.get(origin.root) for origin in origins]


def origin_columns(results: Results, origins: Sequence[Origin]) -> dict[str, list[Any]]:
    """Where the pairs came from, column by column, with what the corpus tells of their articles."""
    known = read_lines(results.articles, ArticleRow, STEP_1) if results.articles.exists() else ()
    by_number = {about.article: about for about in known}
    articles = [by_number.get(-1 if origin.article is None else origin.article) for origin in origins]
    names = ("id", "article", "root", "score", "doubt", "language")
    columns: dict[str, list[Any]] = {name: [getattr(origin, name) for origin in origins] for name in names}
    columns |= {name: [about and getattr(about, name) for about in articles] for name in ("file", "row", "title")}
    taken = {"question", "answer", "context", "system", *columns}
    for field in dict.fromkeys(field for about in articles if about for field in about.fields):
        name = field
        while name in taken:
            name = f"corpus_{name}"
        taken.add(name)
        columns[name] = _same_type([about and about.fields.get(field) for about in articles])
    return columns


def _same_type(values: list[Any]) -> list[Any]:
    """The values of a column: as they are where all are numbers or all are texts, otherwise as texts."""
    values = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]  # no JSON
    kinds = {type(value) for value in values if value is not None}
    large = any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in values)
    if not large and (len(kinds) < 2 or kinds == {int, float}):
        return values
    return [None if value is None else str(value) for value in values]


def hold_out(
    items: Sequence[Item], units: Mapping[str, Sequence[int | None]], share: float, seed: int, many: int = 2
) -> tuple[list[Item], list[Item], str]:
    """The items to learn from, about ``share`` of them held out in whole groups, and in words which groups those are.

    ``units`` has the group of every item for each way to group them, the best first; the first with ``many`` groups
    is used, or else the last. No more than the larger of ``share`` and 1/``many`` is held out, but at least a group.
    """
    for unit, groups in units.items():
        sizes = Counter(groups)
        if not share or None in sizes or len(sizes) < (2 if unit == list(units)[-1] else many):
            continue
        held: Counter[int | None] = Counter()
        most = max(1, share * len(items), len(items) / many)
        for group in random.Random(seed).sample(sorted(sizes), len(sizes)):  # type: ignore[type-var]
            if held.total() < share * len(items) and held.total() + sizes[group] <= most:
                held[group] = sizes[group]
        held = held or Counter([min(sizes, key=lambda group: (sizes[group], group))])
        parts: tuple[list[Item], list[Item]] = [], []
        for item, group in zip(items, groups, strict=True):
            parts[group in held].append(item)
        return *parts, f"{len(held):,} of {len(sizes):,} {unit}"
    return list(items), [], "none"
