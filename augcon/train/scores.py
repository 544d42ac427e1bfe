"""Scores on disk, kept as they come: a kill loses at most the batch in progress, a refill scores only what is new.

``plan.jsonl`` holds the batches, each a list of keys; every process appends what a batch has scored to a file of its
own. Batches stay as planned, since the scores of a batch depend a little on its composition: so a run that was killed
gives the same scores as one that was not.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from augcon.data import Query
from augcon.errors import UserError, one_line
from augcon.files import digest, new_file, read_lines


def key(query: Query) -> str:
    """The key of a score, "12:0:21#1a2b3c4d": the query's id, and a digest, so that an edited query is scored anew."""
    return f"{query.id}#{digest(query.context, query.text)[:8]}"


class KeptScores:
    """The scores that one scorer has given, in a folder for each scorer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: list[list[str]] = []
        self.scores: dict[str, float] = {}

    def read(self) -> None:
        """Reads plan and scores; a line that a kill has cut short does not count."""
        plan = self.folder / "plan.jsonl"
        self.plan = list(read_lines(plan, list[str], "step2_scorer.py")) if plan.exists() else []
        self.scores = {}
        for part in self.folder.glob("part-*.jsonl"):
            for line in part.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # empty, or cut short by a kill
                    self.scores.update(json.loads(line))

    def add_to_plan(self, batches: Sequence[Sequence[str]]) -> None:
        """Plans further batches."""
        self.plan += map(list, batches)
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / "plan.jsonl") as file:
            file.writelines(json.dumps(batch) + "\n" for batch in self.plan)

    def keep(self, process: int, scores: Mapping[str, float]) -> None:
        """Appends the scores of a batch to a process's own file. Raises UserError when it cannot."""
        try:
            with (self.folder / f"part-{process}.jsonl").open("a", encoding="utf-8") as part:
                part.write("\n" + json.dumps(scores) + "\n")  # the first one ends a line that a kill has cut short
        except OSError as error:
            raise UserError(f"cannot write scores to {self.folder}: {one_line(error)}") from error
