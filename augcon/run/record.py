"""The record of a run: what each stage was made with and how far it came, in one file (``run.json``).

A stage that is run again with the same inputs goes on where it was. Other inputs would replace what is there, so they
are refused, with the difference named, unless ``--redo`` agrees to it. The stages that follow are then made again too.
"""

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from augcon.errors import UserError, one_line
from augcon.files import read_json, reading, write_json

Inputs = Mapping[str, Any]  # name → a value that JSON can hold; a name that begins with "content of" has a digest
CHAIN = ("step 1", "scorer", "step 2", "step 3")  # each depends on those before it


@dataclasses.dataclass(frozen=True)
class _Cut:
    contexts: str
    left_out: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Step:
    refills: int = 0
    pairs: int = 0
    queries: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ScorerFacts:
    """What is on record of a scorer; by type of negative the number of held-out pairs and the share ranked right."""

    base: str
    digest: str  # of its weights
    held_out: str  # in words
    accuracy_before: dict[str, tuple[int, float]]
    accuracy_after: dict[str, tuple[int, float]]
    speed: str


# The facts that other stages and the report rely on.
_FACTS = {"corpus as cut": _Cut, "step 1": _Step, "scorer": ScorerFacts, "step 2": _Step, "step 3": _Step}


@dataclasses.dataclass
class Stage:
    """The entry of one stage. ``finished`` holds its facts for other stages, and is None until it comes to its end.

    ``outdated``: a stage before it was made again with the user's consent, so it may be replaced without asking.
    """

    made_with: dict[str, Any]
    finished: dict[str, Any] | None = None
    outdated: bool = False


class Record:
    """The record in a folder. Every method raises UserError when the file is damaged or cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "run.json"

    def stages(self) -> dict[str, Stage]:
        """The entries of all stages that were ever begun."""
        if not self.path.exists() and (self.folder / "settings.json").exists():
            raise UserError(f"{self.folder} is from an earlier version of AugCon; choose another folder with --results")
        stages = read_json(self.path, dict[str, Stage], "bash augcon.sh") if self.path.exists() else {}
        with reading(self.path, "bash augcon.sh"):
            for name in stages.keys() & _FACTS.keys():
                if (facts := stages[name].finished) is not None:
                    TypeAdapter(_FACTS[name]).validate_python(facts)
        return stages

    def finished(self, name: str) -> dict[str, Any] | None:
        """The facts of a stage that came to its end and is not outdated."""
        stage = self.stages().get(name)
        return None if stage is None or stage.outdated else stage.finished

    def done_with(self, name: str, inputs: Inputs) -> dict[str, Any] | None:
        """The facts of a stage that came to its end with just these inputs, outdated or not."""
        stage = self.stages().get(name)
        return stage.finished if stage and stage.made_with == dict(inputs) else None

    def begin(self, name: str, inputs: Inputs, made: Iterable[Path], redo: bool, stale: Iterable[Path] = ()) -> bool:
        """Records that a stage begins; says whether it did so with the same inputs before. Raises as ``check``.

        If not, what is ``stale`` is removed first: after a kill, the stage goes on with what it finds.
        """
        self.check(name, inputs, made, redo)
        stages = self.stages()
        before = stages.get(name)
        same = before is not None and before.made_with == dict(inputs)
        try:
            for path in () if same else stale:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {one_line(error)}") from error
        stages[name] = Stage(dict(inputs))
        self._write(stages)
        return same

    def check(self, name: str, inputs: Inputs, made: Iterable[Path], redo: bool) -> None:
        """Raises UserError when the inputs differ from those on record and something of ``made`` would be replaced.

        With ``redo``, or where nothing is there, the stage and those that follow become outdated instead.
        """
        stages = self.stages()
        stage = stages.get(name)
        changes = differences(stage.made_with, inputs) if stage else []
        if stage is None or not changes:
            return
        lost = [path.name for path in made if path.exists()]
        if lost and not redo and not stage.outdated:
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(changes)}. Go back to the old ones, choose "
                f"another folder, or add --redo to replace {', '.join(lost)}"
            )
        for later in CHAIN[CHAIN.index(name) :] if name in CHAIN else (name,):
            if later in stages:
                stages[later].outdated = True
        self._write(stages)

    def finish(self, name: str, **facts: Any) -> None:
        """Records that a stage that was begun has come to its end."""
        stages = self.stages()
        stages[name] = Stage(stages[name].made_with, facts)
        self._write(stages)

    def _write(self, stages: dict[str, Stage]) -> None:
        write_json(self.path, {name: dataclasses.asdict(stage) for name, stage in stages.items()})


def differences(before: Inputs, now: Inputs) -> list[str]:
    """In words, what has changed of the inputs that both have."""
    return [
        f"the {name} has changed"
        if name.startswith("content of")
        else f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
