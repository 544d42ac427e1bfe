"""Scores on disk, kept as they come: a kill loses at most the batch in progress, a refill scores only what is new.

The texts to be scored are encoded once, by the first process, into a file that all of them map into memory. Every
process appends what a batch has scored to a file of its own. The texts stay until all have their scores, and so do the
batches, which follow from their lengths: the scores of a batch depend a little on its composition, and a run that was
killed should give the same scores as one that was not.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat, TypeAdapter

from augcon.data import Query
from augcon.errors import UserError, one_line
from augcon.files import digest, reading, write_arrow

if TYPE_CHECKING:
    import datasets  # slow: only where it is needed

Batch = tuple["datasets.Dataset", list[int]]  # encoded texts, and the rows that are scored together


def key(query: Query) -> str:
    """The key of a score, "12:0:21#1a2b3c4d": the query's id, and a digest, so that an edited query is scored anew."""
    return f"{query.id}#{digest(query.context, query.text)[:8]}"


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places in batches, the longest first, each of at most ``budget`` tokens with padding (or of one place)."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class KeptScores:
    """The scores that one scorer has given, in a folder for each scorer, and the texts that still have none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, float]:
        """The scores by key; a line that a kill has cut short does not count, nor does one that is damaged."""
        scores: dict[str, float] = {}
        read = TypeAdapter(dict[str, FiniteFloat]).validate_json
        for path in self.folder.glob("part-*.jsonl"):
            with path.open("rb") as part:
                for line in part:
                    with contextlib.suppress(ValueError):
                        scores.update(read(line))
        return scores

    def texts(self) -> list["datasets.Dataset"]:
        """The encoded texts, ``key``, ``tokens`` and ``length``, as they were added."""
        import datasets

        paths = sorted(self.folder.glob("texts-*.arrow"), key=lambda path: int(path.stem.partition("-")[2]))
        with reading(self.folder, "step2_scorer.py"):
            return [datasets.Dataset.from_file(str(path)) for path in paths]

    def add_texts(self, encoded: Iterable[Mapping[str, list[Any]]]) -> None:
        """Adds encoded texts, some rows at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        types = {"key": "string", "tokens": ["int32"], "length": "int32"}
        write_arrow(self.folder / f"texts-{len(self.texts())}.arrow", types, encoded)

    def forget_texts(self) -> None:
        """Removes the encoded texts, which all have their scores."""
        for path in self.folder.glob("texts-*.arrow"):
            path.unlink()

    def batches(self, budget: int) -> list[Batch]:
        """All texts in batches of at most so many tokens."""
        return [(texts, batch) for texts in self.texts() for batch in batches(texts["length"][:], budget)]

    def keep(self, process: int, scores: Mapping[str, float]) -> None:
        """Appends the scores of a batch to a process's own file. Raises UserError when it cannot."""
        try:
            with (self.folder / f"part-{process}.jsonl").open("a", encoding="utf-8") as part:
                part.write("\n" + json.dumps(scores) + "\n")  # the first one ends a line that a kill has cut short
        except OSError as error:
            raise UserError(f"cannot write scores to {self.folder}: {one_line(error)}") from error
