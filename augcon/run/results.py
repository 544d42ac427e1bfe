"""The results folder: the names of its files, and the shapes of those that several steps share."""

import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from augcon.data import Node, Query, RootContext, ScorerPair
from augcon.errors import UserError, one_line
from augcon.files import (
    Lines,
    digest,
    json_line,
    new_file,
    read_dataset,
    read_entries,
    read_json,
    read_lines,
    reading,
    write_dataset,
    write_json,
    write_lines,
)
from augcon.run.record import Record

if TYPE_CHECKING:
    from augcon.run.report import CallFigures

Entry = tuple[int, list[tuple[str, str]]]  # of queries.json: a root context, and the context and text of each query
Shape = TypeVar("Shape")
Ids = defaultdict[tuple[str, str | None], list[str]]  # by context and query; of some nodes both are the same
STEP_1, STEP_2, STEP_3 = "step1_gen_q.py", "step2_scorer.py", "step3_gen_a.py"


@dataclasses.dataclass(frozen=True, slots=True)
class _NodeRow:
    """What is read of a line of ``nodes.jsonl``."""

    id: Annotated[str, Field(pattern="^[0-9]{1,9}:")]
    context: str
    query: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """A line of ``scores.jsonl``."""

    id: str
    root: int
    question: str
    score: float
    fate: str


@dataclasses.dataclass(frozen=True, slots=True)
class ShortRoot:
    """A root context that has not its quota, with the reason: of its trees or, ``filtered``, of what step 2 keeps."""

    root: int
    quota: int
    reason: str
    filtered: bool = False


class Asked(TypedDict, total=False):
    """What is read of the figures of a run that asked the server; there are others."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    pace: list[tuple[float, int, int]]


class Figures(TypedDict, total=False):
    """What is read of the figures of a step; there are others."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    roots: int
    queries: int
    fates: dict[str, int]
    dropped: dict[str, int]
    asked: list[Asked]


def read_entry_by_entry(path: Path, made_by: str) -> Iterator[Entry]:
    """What ``queries.json`` or ``filtered_queries.json`` holds; memory for one root context."""
    return read_entries(path, tuple[int, list[tuple[str, str]]], made_by)


class Results:
    """One results folder, used by one run at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record = Record(self.folder)
        self.shards = self.folder / "shards"  # parts for the nodes of a cluster, each a results folder
        self.store = self.folder / "replies.sqlite"
        self.contexts = self.folder / "contexts.jsonl"
        self.articles = self.folder / "articles.jsonl"  # what is known of each article
        self.skipped = self.folder / "skipped.jsonl"  # what of the corpus gave no article
        self.nodes = self.folder / "nodes.jsonl"
        self.queries = self.folder / "queries.json"
        self.scorer_pairs = self.folder / "scorer_pairs"
        self.short_roots = self.folder / "short_roots.jsonl"
        self.refills = self.folder / "refills.json"  # the roots that step 2 sends back to step 1, round by round
        self.scorer = self.folder / "scorer"
        self.scorer_checkpoints = self.folder / "scorer_checkpoints"
        self.sample = self.folder / "sample.jsonl"  # of a shard: queries from which the scorer's pairs may be made
        self.scores = self.folder / "scores.jsonl"
        self.scores_parts = self.folder / "scores_parts"  # scores as they come, a folder for each scorer
        self.filtered_queries = self.folder / "filtered_queries.json"
        self.example_search = self.folder / "example_search.json"
        self.sft_data = self.folder / "sft_data"
        self.sft_origins = self.folder / "sft_origins.jsonl"  # where each pair of sft_data came from
        self.dropped_queries = self.folder / "dropped_queries.jsonl"
        self.checkpoints = self.folder / "ckpts"
        self.lora = self.folder / "LoRA"
        self.log = self.folder / "log.json"
        self.loss_plot = self.folder / "loss.png"
        self.sft_model = self.folder / "sft_model"
        self.outputs = self.folder / "outputs"
        self.judged = self.folder / "judge.jsonl"  # the judge's grades of each model's answer, by question
        self.judge = self.folder / "judge.json"  # their means
        self.judge_plot = self.folder / "judge.png"
        self.server_log = self.folder / "server.log"
        self.figures = self.folder / "figures.json"  # of each step, as it printed them
        self.export = self.folder / "export"  # the pairs in the form that trainers read
        self.report = self.folder / "report.html"
        self.review = self.folder / "review.jsonl"  # the marks that a person set in the report

    def made(self, stage: str) -> list[Path]:
        """What making a stage again would replace: what it has made, and what was made from that."""
        chain = {
            "step 1": [self.queries, self.scorer_pairs],
            "scorer": [self.scorer, *self.scorer_checkpoints.glob("checkpoint-*")],
            "step 2": [self.filtered_queries],
            "step 3": [self.sft_data],
        }
        if stage == "finetune":
            return [self.lora, *self.checkpoints.glob("checkpoint-*")]
        return [path for name in list(chain)[list(chain).index(stage) :] for path in chain[name]]

    @contextlib.contextmanager
    def held(self, patience: float = 0) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it. Raises UserError when that cannot be done.

        ``patience``: seconds for a run that is there to end.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot write to the results folder {self.folder}: {one_line(error)}") from error
        with lock:
            try:
                _lock(lock, patience)
            except BlockingIOError as error:
                lock.seek(0)
                other = one_line(lock.read(200).strip() or "unknown", 100)
                raise UserError(
                    f"another run is using {self.folder} ({other}); wait, or choose another --results"
                ) from error
            except OSError as error:  # some network file systems have no locks
                words = f"warning: {self.folder} cannot be locked ({one_line(error)}); start no second run in it"
                print(words, file=sys.stderr)
            with contextlib.suppress(OSError):  # a full disk, which what follows will meet
                lock.truncate(0)
                lock.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}\n")
                lock.flush()
            yield

    def keep_figures(self, stage: str, asked: "CallFigures | None" = None, same: bool = False, **figures: Any) -> None:
        """Keeps the figures of a stage; what it ``asked`` in this run, after earlier runs if it is the ``same``."""
        known = self.read_figures()
        runs: list[Any] = [*known.get(stage, {}).get("asked", [])] if same else []
        if asked and (asked.calls or not runs):
            runs.append(dataclasses.asdict(asked))
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"finished": finished, **figures} | ({"asked": runs} if runs else {})
        write_json(self.figures, {**known, stage: entry})

    def read_figures(self) -> dict[str, Figures]:
        """The figures by step; none where there is no such file."""
        return read_json(self.figures, dict[str, Figures], "bash augcon.sh") if self.figures.exists() else {}

    def figures_of(self, stage: str, shape: type[Shape]) -> Shape:
        """What a shard has kept of a stage in its figures, as ``shape``. Raises UserError where it is not there."""
        with reading(self.figures, "bash augcon.sh"):
            return TypeAdapter(shape).validate_python(self.read_figures()[stage].get("of"))

    def read_short_roots(self) -> list[ShortRoot]:
        """The root contexts that are short of their quota; none where no step has listed any."""
        return list(read_lines(self.short_roots, ShortRoot, STEP_1)) if self.short_roots.exists() else []

    def write_short_roots(self, rows: Iterable[ShortRoot], filtered: bool) -> None:
        """Lists those that one step has found beside those of the other; a root of both with what its trees lack."""
        all_rows = [*rows, *(row for row in self.read_short_roots() if row.filtered != filtered)]
        one_each = {row.root: row for row in sorted(all_rows, key=lambda row: (row.root, not row.filtered))}
        write_lines(self.short_roots, map(dataclasses.asdict, one_each.values()))

    def read_contexts(self) -> Sequence[RootContext]:
        """The root contexts, as step 1 wrote them."""
        return Lines(self.contexts, RootContext, STEP_1)

    def each_root(self, path: Path) -> Iterator[tuple[int, list[Query]]]:
        """The queries of ``queries.json`` or ``filtered_queries.json`` with their ids, root by root; memory for one.

        Both files hold (context, query) only; ``nodes.jsonl`` beside them knows the ids. A query that is not there
        was added by hand, and gets an id that says so.
        """
        made_by = STEP_1 if path == self.queries else STEP_2
        rows = read_lines(self.nodes, _NodeRow, STEP_1) if self.nodes.exists() else iter(())
        trees = itertools.groupby(rows, lambda node: int(node.id.partition(":")[0]))
        passed: dict[int, Ids] = {}  # where the roots of the two files are in different orders

        def ids_of(root: int) -> Ids:
            while root not in passed:
                number, nodes = next(trees, (root, iter(())))
                ids = passed.setdefault(number, defaultdict(list))
                for node in nodes:
                    ids[node.context, node.query].append(node.id)
            return passed.pop(root)

        for root, pairs in read_entry_by_entry(path, made_by):
            ids, queries = ids_of(root), []
            for context, text in pairs:
                known = ids[context, text]
                id_ = known.pop(0) if known else f"{root}:added:{digest(context, text)[:8]}"
                queries.append(Query(id_, root, context, text))
            yield root, queries

    def count_queries(self) -> dict[int, int]:
        """The number of queries in ``queries.json`` by root context; memory for one."""
        entries = read_entry_by_entry(self.queries, STEP_1)
        return {root: len(pairs) for root, pairs in entries}

    @contextlib.contextmanager
    def writing_queries(self, path: Path) -> Iterator[Callable[[int, Iterable[Query]], None]]:
        """Writes (context, query) root by root, through the function given."""
        with new_file(path) as file:
            before = "{\n"

            def write(root: int, queries: Iterable[Query]) -> None:
                nonlocal before
                pairs = [[query.context, query.text] for query in queries]
                file.write(f'{before}"{root}": {json.dumps(pairs, ensure_ascii=False)}')
                before = ",\n"

            yield write
            file.write("\n}\n" if before == ",\n" else "{}\n")

    def write_entries(self, path: Path, entries: Iterable[Entry]) -> None:
        """Writes (context, query) root by root, as they were read."""
        with self.writing_queries(path) as write:
            for root, pairs in entries:
                write(root, (Query("", root, context, text) for context, text in pairs))

    @contextlib.contextmanager
    def writing_trees(self) -> Iterator[Callable[[int, Iterable[Node]], None]]:
        """Writes ``nodes.jsonl`` and ``queries.json`` together, root by root, through the function given."""
        with new_file(self.nodes) as file, self.writing_queries(self.queries) as write_queries:

            def write(root: int, nodes: Iterable[Node]) -> None:
                file.writelines(json_line(_node_row(node)) for node in nodes)
                write_queries(root, (query for node in nodes for query in node.queries))

            yield write

    def write_pairs(self, pairs: Sequence[ScorerPair]) -> None:
        """Writes ``scorer_pairs``."""
        write_dataset(self.scorer_pairs, map(dataclasses.asdict, pairs))

    def read_pairs(self) -> list[ScorerPair]:
        """The pairs of ``scorer_pairs``; none where there is no such dataset."""
        return read_dataset(self.scorer_pairs, ScorerPair, STEP_1) if self.scorer_pairs.exists() else []


def _lock(file: IO[str], patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _node_row(node: Node) -> dict[str, object]:
    return {
        "id": node.id,
        "root": node.root,
        "pass": node.pass_number,
        "path": node.path,
        "depth": len(node.path),
        "context": node.context,
        "query": node.query,
        "outcome": node.outcome,
        "detail": node.detail,
        "tries": node.tries,
        "doubt": node.doubt,
    }
