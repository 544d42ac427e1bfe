"""The results folder: names and shapes of its files, atomic writes, and the record of what made them.

What reads and writes datasets is imported where it is needed: who only asks for a name is spared two seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from augcon.errors import UserError, one_line

if TYPE_CHECKING:
    from augcon.method.pairs import ScorerPair
    from augcon.method.tree import Node
    from augcon.run.corpus import RootContext

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class Results:
    """One results folder, held by one run at a time; a file that exists under its name is complete."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.store = self.folder / "replies.sqlite"
        self.record = self.folder / "settings.json"
        self.finished_file = self.folder / "finished.json"
        self.contexts = self.folder / "contexts.jsonl"
        self.nodes = self.folder / "nodes.jsonl"
        self.queries = self.folder / "queries.json"
        self.scorer_pairs = self.folder / "scorer_pairs"
        self.short_roots = self.folder / "short_roots.jsonl"
        self.refills = self.folder / "refills.json"  # the roots that step 2 sends back to step 1, round by round
        self.scorer = self.folder / "scorer"
        self.scorer_checkpoints = self.folder / "scorer_checkpoints"
        self.scores = self.folder / "scores.jsonl"
        self.scores_parts = self.folder / "scores_parts"  # scores as they come, a folder a scorer
        self.filtered_queries = self.folder / "filtered_queries.json"
        self.example_search = self.folder / "example_search.json"
        self.sft_data = self.folder / "sft_data"
        self.sft_origins = self.folder / "sft_origins.jsonl"  # a line a pair of sft_data: where it came from
        self.dropped_queries = self.folder / "dropped_queries.jsonl"
        self.checkpoints = self.folder / "ckpts"
        self.lora = self.folder / "LoRA"
        self.log = self.folder / "log.json"
        self.loss_plot = self.folder / "loss.png"
        self.sft_model = self.folder / "sft_model"
        self.outputs = self.folder / "outputs"
        self.judged = self.folder / "judge.jsonl"  # a line a question: the judge's grades of each model's answer
        self.judge = self.folder / "judge.json"  # their means
        self.judge_plot = self.folder / "judge.png"
        self.server_log = self.folder / "server.log"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it. Raises UserError when that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"the results folder {self.folder} cannot be written: {one_line(error)}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"another run is at work in {self.folder}; wait for it or use another folder with --results"
                ) from error
            yield

    def settle(self, step: int, made_with: dict[str, tuple[int, Any]], since: int = 1) -> None:
        """Records what step ``step`` is made with, or refuses a folder that was made with something else.

        ``made_with`` maps a name to (first step that it changes, value); only what changes this step or
        one from ``since`` on before it counts.
        """
        mine = {name: value for name, (first, value) in made_with.items() if since <= first <= step}
        self.write_json(self.record, {**self.check(step, made_with, since), **mine})

    def check(self, step: int, made_with: dict[str, tuple[int, Any]], since: int = 1) -> dict[str, Any]:
        """What the folder was made with. Raises UserError where that differs, as ``settle`` counts it.

        A step that came to nothing binds nobody: it may be tried again with other settings.
        """
        kept = self.read_json(self.record) if self.record.exists() else {}
        binding = {first for first in range(since, step + 1) if self._has_made_something(first)}
        mine = {name: value for name, (first, value) in made_with.items() if first in binding}
        changes = [
            f"the {name} has changed"
            if name.startswith("content of")
            else f"{name} was {kept[name]!r} and is now {value!r}"
            for name, value in mine.items()
            if name in kept and kept[name] != value
        ]
        if changes:
            raise UserError(
                f"{self.folder} was made with other settings: {'; '.join(changes)}. Use the old settings, or "
                f"another folder with --results; a copy of {self.store.name} in it saves the calls that are the same"
            )
        return kept

    def _has_made_something(self, step: int) -> bool:
        whole = {2: self.scorer_checkpoints, 4: self.checkpoints}
        made = {2: (self.scorer, self.filtered_queries), 3: (self.sft_data,), 4: (self.lora,)}
        if step not in made:
            return True
        return any(path.exists() for path in made[step]) or (
            step in whole and any(whole[step].glob("checkpoint-*/whole"))
        )

    def finish(self, step: int, **facts: Any) -> None:
        """Records that a step has come to its end, with what the next step to run depends on."""
        self.write_json(self.finished_file, {**self.finished(), f"step {step}": facts})

    def finished(self) -> dict[str, dict[str, Any]]:
        """The steps that have come to their end ("step 1", …) with their facts."""
        return self.read_json(self.finished_file) if self.finished_file.exists() else {}

    def digest(self, path: Path) -> str:
        """What tells one content of a file from another."""
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def read_json(self, path: Path, made_by: str = "") -> Any:
        """A JSON file of this folder. Raises UserError when it is not there, naming who makes it, or is damaged."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}; run {made_by or 'the steps before'} first") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); remove it and run {made_by} again") from error

    def read_lines(self, path: Path, made_by: str) -> Iterator[dict[str, Any]]:
        """The rows of a JSON Lines file of this folder; raises as ``read_json``."""
        try:
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}; run {made_by} first") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}); remove it and run {made_by} again") from error

    def read_contexts(self) -> list[RootContext]:
        """The root contexts, as step 1 wrote them."""
        from augcon.run.corpus import RootContext

        return [RootContext(**row) for row in self.read_lines(self.contexts, "step1_gen_q.py")]

    def read_queries(self, path: Path) -> dict[int, list[tuple[str, str]]]:
        """(context, question) by root context, from ``queries.json`` or ``filtered_queries.json``."""
        made_by = "step1_gen_q.py" if path == self.queries else "step2_scorer.py"
        rows = self.read_json(path, made_by)
        try:
            return {int(root): [(context, query) for context, query in pairs] for root, pairs in rows.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not of the shape {{root: [[context, question], …]}}; run {made_by}") from error

    def write_queries(self, path: Path, queries: dict[int, list[tuple[str, str]]]) -> None:
        """Writes (context, question) by root context."""
        with self.writing(path) as file:
            lines = (f'"{root}": {json.dumps(pairs, ensure_ascii=False)}' for root, pairs in queries.items())
            file.write("{\n" + ",\n".join(lines) + "\n}\n")

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[IO[str]]:
        """A text file that takes its name only when it is complete and on disk."""
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            with unfinished.open("w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            if error.filename is None and error.errno not in _DISK:
                raise  # what failed was not this file
            raise UserError(f"{path} cannot be written: {one_line(error)}") from error

    def write_json(self, path: Path, value: Any) -> None:
        """Writes one JSON value, readable."""
        with self.writing(path) as file:
            json.dump(value, file, ensure_ascii=False, indent=1)
            file.write("\n")

    def write_lines(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        """Writes JSON Lines."""
        with self.writing(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def writing_trees(self) -> Iterator[Callable[[int, list[Node]], None]]:
        """Writes ``nodes.jsonl`` and ``queries.json`` together, root by root, through the function given."""
        with self.writing(self.nodes) as nodes_file, self.writing(self.queries) as queries_file:
            separator = "{"

            def write(root: int, nodes: list[Node]) -> None:
                nonlocal separator
                for node in nodes:
                    nodes_file.write(json.dumps(node_row(node), ensure_ascii=False) + "\n")
                queries = [[node.context, node.query] for node in nodes if node.query is not None]
                queries_file.write(f'{separator}\n"{root}": {json.dumps(queries, ensure_ascii=False)}')
                separator = ","

            yield write
            queries_file.write("\n}\n")

    def write_pairs(self, pairs: list[ScorerPair]) -> None:
        """Writes ``scorer_pairs``."""
        from augcon.method.pairs import ScorerPair

        names = [field.name for field in dataclasses.fields(ScorerPair)]
        self.write_dataset(self.scorer_pairs, {name: [getattr(pair, name) for pair in pairs] for name in names})

    def read_pairs(self) -> list[ScorerPair]:
        """The pairs of ``scorer_pairs``; none where there is no such dataset."""
        import datasets

        from augcon.method.pairs import ScorerPair

        if not self.scorer_pairs.exists():
            return []
        names = [field.name for field in dataclasses.fields(ScorerPair)]
        try:
            dataset = datasets.load_from_disk(self.scorer_pairs)
            if missing := set(names) - set(dataset.column_names):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            return [ScorerPair(**row) for row in dataset.select_columns(names).to_list()]
        except Exception as error:  # the library raises many kinds
            raise UserError(
                f"{self.scorer_pairs} cannot be read ({one_line(error)}); remove it and run step1_gen_q.py again"
            ) from error

    def write_dataset(self, path: Path, columns: dict[str, list[str] | list[int]]) -> None:
        """Writes a dataset in place of the one that is there; no rows, no dataset, for it could not be loaded."""
        if not any(columns.values()):
            shutil.rmtree(path, ignore_errors=True)
            return
        import datasets

        unfinished = path.with_name(path.name + ".unfinished")
        datasets.disable_progress_bars()
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            datasets.Dataset.from_dict(columns).save_to_disk(unfinished)
            shutil.rmtree(path, ignore_errors=True)
            unfinished.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {one_line(error)}") from error


def context_row(context: RootContext) -> dict[str, Any]:
    """A line of ``contexts.jsonl``."""
    return dataclasses.asdict(context)


def node_row(node: Node) -> dict[str, Any]:
    """A line of ``nodes.jsonl``."""
    return {
        "root": node.root,
        "path": node.path,
        "depth": len(node.path),
        "pass": node.pass_number,
        "context": node.context,
        "query": node.query,
        "outcome": node.outcome,
        "detail": node.detail,
    }
