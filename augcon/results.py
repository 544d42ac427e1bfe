"""The results folder: names and shapes of its files, atomic writes, and the record of what made them."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets

from augcon.corpus import RootContext
from augcon.cst import Node
from augcon.errors import UserError, one_line
from augcon.pairs import ScorerPair

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class Results:
    """One results folder, held by one run at a time; a file that exists under its name is complete."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.store = self.folder / "replies.sqlite"
        self.record = self.folder / "settings.json"
        self.contexts = self.folder / "contexts.jsonl"
        self.nodes = self.folder / "nodes.jsonl"
        self.queries = self.folder / "queries.json"
        self.scorer_pairs = self.folder / "scorer_pairs"
        self.short_roots = self.folder / "short_roots.jsonl"

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

    def settle(self, step: int, made_with: dict[str, tuple[int, Any]]) -> None:
        """Records what step ``step`` is made with, or refuses a folder that was made with something else.

        ``made_with`` maps a name to (first step that it changes, value); only what changes this step or
        one before it counts.
        """
        mine = {name: value for name, (first, value) in made_with.items() if 0 < first <= step}
        try:
            kept = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.record} cannot be read ({one_line(error)}); restore or remove the folder"
            ) from error
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
        self.write_json(self.record, {**kept, **mine})

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
        """Writes ``scorer_pairs``, in place of the one that is there; no pairs, no dataset."""
        if not pairs:
            shutil.rmtree(self.scorer_pairs, ignore_errors=True)
            return
        names = [field.name for field in dataclasses.fields(ScorerPair)]
        features = datasets.Features({name: datasets.Value("int64" if name == "root" else "string") for name in names})
        columns = {name: [getattr(pair, name) for pair in pairs] for name in names}
        self._replace_dataset(self.scorer_pairs, datasets.Dataset.from_dict(columns, features=features))

    def _replace_dataset(self, path: Path, dataset: datasets.Dataset) -> None:
        unfinished = path.with_name(path.name + ".unfinished")
        datasets.disable_progress_bars()
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            dataset.save_to_disk(unfinished)
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
