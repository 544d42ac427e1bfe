"""A results folder in parts: shards of whole articles, each a results folder of its own, for the nodes of a cluster.

What is made of a root context, an article or a query depends on nothing outside of it. So the joined files are those of
one machine, however the work is cut.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from augcon.data import Pair, RootContext
from augcon.errors import UserError
from augcon.files import (
    each_row,
    file_digest,
    join_lines,
    new_file,
    read_json,
    read_lines,
    reading,
    write_dataset,
    write_json,
    write_lines,
)
from augcon.run.results import STEP_1, STEP_2, STEP_3, Results, read_entry_by_entry

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The root contexts from ``first`` to before ``end``, of whole articles, and their results folder."""

    first: int
    end: int
    results: Results


@dataclasses.dataclass(frozen=True, slots=True)
class _Manifest:
    contexts: str  # digest of the file that was cut
    shards: list[tuple[int, int]]


def cut_in_shards(results: Results, size: int) -> list[Shard]:
    """The shards of a results folder: of ``size`` root contexts and as many more as the last article has.

    They stay as they were first cut, or what is in their folders would be lost, until the root contexts change.
    """
    path, whole = results.shards / "manifest.json", file_digest(results.contexts)
    manifest = read_json(path, _Manifest, STEP_1) if path.exists() else None
    if manifest is None or manifest.contexts != whole:
        manifest = _Manifest(whole, [])
        for roots in _in_parts(read_lines(results.contexts, RootContext, STEP_1), size):
            shard = _shard(results, roots[0].root, roots[-1].root + 1)
            shard.results.folder.mkdir(parents=True, exist_ok=True)
            write_lines(shard.results.contexts, map(dataclasses.asdict, roots))
            manifest.shards.append((shard.first, shard.end))
        write_json(path, dataclasses.asdict(manifest))
    return [_shard(results, first, end) for first, end in manifest.shards]


def _shard(results: Results, first: int, end: int) -> Shard:
    return Shard(first, end, Results(results.shards.absolute() / f"{first:09}"))


def _in_parts(roots: Iterable[RootContext], size: int) -> Iterator[list[RootContext]]:
    part: list[RootContext] = []
    for root in roots:
        if len(part) >= size and root.article != part[-1].article:
            yield part
            part = []
        part.append(root)
    if part:
        yield part


def hand_out_queries(results: Results, shards: Sequence[Shard]) -> None:
    """Gives each shard its part of what steps 1 and 2 have made; memory for one of them.

    Raises UserError where that does not follow the order of the root contexts.
    """
    entries = read_entry_by_entry(results.filtered_queries, STEP_2)
    for shard, part in _by_shard(results.filtered_queries, shards, entries, itemgetter(0)):
        shard.results.write_entries(shard.results.filtered_queries, part)
    for path, made_by in ((results.nodes, STEP_1), (results.scores, STEP_2)):
        lines = _lines_by_root(path, made_by) if path.exists() else iter(())
        for shard, of_shard in _by_shard(path, shards, lines, itemgetter(0)):
            with new_file(shard.results.folder / path.name) as file:
                file.writelines(line for _, line in of_shard)


def _lines_by_root(path: Path, made_by: str) -> Iterator[tuple[int, str]]:
    number = 0
    with reading(path, made_by, lambda: f", line {number}"), path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):  # noqa: B007 - where it ended, for the error
            yield int(json.loads(line)["root"]), line


def _by_shard(
    path: Path, shards: Iterable[Shard], items: Iterator[Item], root_of: Callable[[Item], int]
) -> Iterator[tuple[Shard, list[Item]]]:
    item = next(items, None)
    for shard in shards:
        part = []
        while item is not None and shard.first <= root_of(item) < shard.end:
            part.append(item)
            item = next(items, None)
        yield shard, part
    if item is not None:
        where = f"{path} names root context {root_of(item)} out of order, or it is none of contexts.jsonl"
        raise UserError(f"{where}; a cluster needs them in order: run {STEP_2} again")


def join_trees(results: Results, shards: Sequence[Shard]) -> None:
    """Joins what step 1 has made of the shards: nodes, queries and the roots that are short of their quota."""
    join_lines(results.nodes, [shard.results.nodes for shard in shards])
    entries = (entry for shard in shards for entry in read_entry_by_entry(shard.results.queries, STEP_1))
    results.write_entries(results.queries, entries)
    short = (row for shard in shards for row in shard.results.read_short_roots())
    results.write_short_roots(short, filtered=False)


def join_pairs(results: Results, shards: Sequence[Shard]) -> None:
    """Joins what step 3 has made of the shards: the pairs, where they came from, and what was dropped."""
    join_lines(results.dropped_queries, [shard.results.dropped_queries for shard in shards])
    join_lines(results.sft_origins, [shard.results.sft_origins for shard in shards])
    parts = (shard.results.sft_data for shard in shards)
    pairs = (pair for part in parts if part.exists() for pair in each_row(part, Pair, STEP_3))
    write_dataset(results.sft_data, map(dataclasses.asdict, pairs))
