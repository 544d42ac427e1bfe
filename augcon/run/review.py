"""The review of pairs: what a person has marked in the report (``review.jsonl``), and the pairs that are left of it."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from augcon.data import Pair
from augcon.errors import UserError, one_line


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """What a person thinks of a pair: that it is good, that it is bad, or how it should read."""

    question: str
    mark: Literal["good", "bad", "edited"]
    id: str | None = None
    new_question: str = ""
    new_answer: str = ""

    def __post_init__(self) -> None:
        if self.mark == "edited" and not (self.new_question.strip() and self.new_answer.strip()):
            raise ValueError("an edited pair needs a new_question and a new_answer")


@dataclasses.dataclass(frozen=True, slots=True)
class Reviewed:
    """The pairs that are left; the place that each had before; how many there are of each mark, and of those unknown.

    ``unknown`` are marks of pairs that are not in the data, which may have been made again since the review.
    """

    pairs: list[Pair]
    places: list[int]
    marks: Counter[str]
    unknown: int

    def __str__(self) -> str:
        words = (
            f"{self.marks['bad']:,} bad pairs left out, {self.marks['edited']:,} edited, {self.marks['good']:,} good"
        )
        return words + (f"; {self.unknown:,} marks are of pairs that are not in the data" if self.unknown else "")


def read_review(source: str) -> list[Mark]:
    """The marks in a file. Raises UserError, with the line, where one cannot be read."""
    shape, marks = TypeAdapter(Mark), []
    try:
        with Path(source).expanduser().open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        marks.append(shape.validate_json(line))
                    except ValueError as error:
                        raise UserError(f"--review {source!r}, line {number}: {one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"--review {source!r} cannot be read: {one_line(error)}") from error
    return marks


def apply_review(pairs: Sequence[Pair], ids: Sequence[str | None], marks: Iterable[Mark]) -> Reviewed:
    """Leaves out what is bad and takes what is edited; of several marks of a pair, the last one counts.

    A mark is of the pair with its id and question or, where either side has no id, of all with its question. The id
    alone does not do: data made again may have another question there.
    """
    last = {(mark.id, mark.question): mark for mark in marks}
    by_question = {mark.question: mark for mark in last.values()}
    nameless = {mark.question: mark for mark in last.values() if mark.id is None}
    used: set[tuple[str | None, str]] = set()
    reviewed = Reviewed([], [], Counter(), 0)
    for place, (pair, id_) in enumerate(zip(pairs, ids, strict=True)):
        if id_ is None:
            mark = by_question.get(pair.question)
        else:
            mark = last.get((id_, pair.question)) or nameless.get(pair.question)
        if mark:
            used.add((mark.id, mark.question))
            reviewed.marks[mark.mark] += 1
        if mark is None or mark.mark != "bad":
            edited = mark is not None and mark.mark == "edited"
            reviewed.pairs.append(Pair(mark.new_question.strip(), mark.new_answer.strip()) if mark and edited else pair)
            reviewed.places.append(place)
    return dataclasses.replace(reviewed, unknown=len(last.keys() - used))
