"""Scores on disk, kept as they come: a kill loses at most the batch under way, a refill scores only what is new.

``plan.jsonl`` holds the batches, a list of keys each; every process appends the scores of the batches it has done to
a file of its own. Batches stay as planned, for the numbers of a row change a little with its company: so a run that
was killed gives the same scores as one that was not.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from augcon.errors import UserError, one_line


def key(context: str, question: str) -> str:
    """By which a score is kept."""
    text = json.dumps([context, question])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class KeptScores:
    """The scores that one scorer has given, in one folder; one folder a scorer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: list[list[str]] = []
        self.scores: dict[str, float] = {}

    def read(self) -> None:
        """Reads plan and scores; what a kill has torn is not counted."""
        self.plan = [row for row in self._rows("plan.jsonl") if isinstance(row, list)]
        self.scores = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for row in self._rows(path.name):
                if len(self.plan[row["batch"]]) == len(row["scores"]):
                    self.scores.update(zip(self.plan[row["batch"]], row["scores"], strict=True))

    def add_to_plan(self, batches: Iterable[Sequence[str]]) -> None:
        """Plans batches of what was in none."""
        batches = [list(batch) for batch in batches]
        whole = self.folder / "plan.jsonl.unfinished"
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            whole.write_text("".join(json.dumps(batch) + "\n" for batch in [*self.plan, *batches]))
            whole.replace(self.folder / "plan.jsonl")
        self.plan += batches

    def part(self, process: int) -> IO[str]:
        """The file to which a process appends."""
        with self._writing():
            return (self.folder / f"part-{process}.jsonl").open("a", encoding="utf-8")

    def keep(self, part: IO[str], batch: int, scores: list[float]) -> None:
        """Keeps the scores of a planned batch; the first line break ends what a kill may have torn."""
        with self._writing():
            part.write("\n" + json.dumps({"batch": batch, "scores": scores}) + "\n")
            part.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"scores cannot be kept in {self.folder}: {one_line(error)}") from error

    def _rows(self, name: str) -> Iterable:
        path = self.folder / name
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue  # empty, or torn by a kill
