"""The files of a results folder, read side by side: for each root context all that they say of it."""

import dataclasses
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from augcon.data import Pair, RootContext
from augcon.errors import UserError
from augcon.files import each_row, read_lines
from augcon.run.results import STEP_1, STEP_2, STEP_3, Results, Scored

UNKNOWN = -1  # the root context of pairs whose origin no file tells
Row = tuple[int, Any]  # the number of a root context, and a line about it


@dataclasses.dataclass(frozen=True, slots=True)
class NodeRow:
    """What is read of a line of nodes.jsonl."""

    id: str
    root: int
    context: str
    query: str | None
    outcome: str
    detail: str
    tries: int
    doubt: str


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What is read of a line of sft_origins.jsonl."""

    id: str
    question: str
    root: int
    depth: int | None
    score: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Dropped:
    """What is read of a line of dropped_queries.jsonl."""

    id: str
    root: int
    context: str
    question: str
    reason: str
    reply: str


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """A pair and where it came from."""

    pair: Pair
    origin: Origin


@dataclasses.dataclass(frozen=True)
class RootRows:
    """All rows about one root context. ``contexts`` has the text that each query is about, by id."""

    number: int
    root: RootContext | None
    nodes: list[NodeRow]
    scored: dict[str, Scored]
    answered: list[Answered]
    dropped: dict[str, Dropped]
    contexts: dict[str, str]


def each_root(results: Results) -> Iterator[RootRows]:
    """The root contexts, in order; memory for one. Raises UserError where a file is damaged."""
    added = _contexts_of_added(results)
    shapes = (
        (results.contexts, RootContext, STEP_1),
        (results.nodes, NodeRow, STEP_1),
        (results.scores, Scored, STEP_2),
        (results.dropped_queries, Dropped, STEP_3),
    )
    streams = [_numbered(read_lines(path, shape, made_by)) for path, shape, made_by in shapes if path.exists()]
    rows = heapq.merge(*streams, _answered(results), key=itemgetter(0))
    for number, of_root in itertools.groupby(rows, key=itemgetter(0)):
        found: defaultdict[type, list[Any]] = defaultdict(list)
        for _, row in of_root:
            found[type(row)].append(row)
        ids = {row.id for row in found[Scored]} | {row.origin.id for row in found[Answered]}
        yield RootRows(
            number,
            next(iter(found[RootContext]), None),
            found[NodeRow],
            {row.id: row for row in found[Scored]},
            found[Answered],
            {row.id: row for row in found[Dropped]},
            {id_: added[id_] for id_ in ids & added.keys()} | {row.id: row.context for row in found[NodeRow]},
        )


def _numbered(rows: Iterator[Any]) -> Iterator[Row]:
    return ((row.root, row) for row in rows)


def _contexts_of_added(results: Results) -> dict[str, str]:
    """The contexts of the queries that a person added, by id: no node has them."""
    if not (results.filtered_queries.exists() and results.sft_origins.exists()):
        return {}
    if all(":added:" not in row.id for row in read_lines(results.sft_origins, Origin, STEP_3)):
        return {}
    queries = itertools.chain.from_iterable(listed for _, listed in results.each_root(results.filtered_queries))
    return {query.id: query.context for query in queries if query.pass_number is None}


def _answered(results: Results) -> Iterator[Row]:
    """The pairs by root context, in which order they are unless a person has changed that of the queries."""
    if not results.sft_data.exists():
        return
    pairs = each_row(results.sft_data, Pair, STEP_3)
    if not results.sft_origins.exists():
        yield from ((UNKNOWN, Answered(pair, Origin("", pair.question, UNKNOWN, None, None))) for pair in pairs)
        return
    order = [row.root for row in read_lines(results.sft_origins, Origin, STEP_3)]
    origins = read_lines(results.sft_origins, Origin, STEP_3)
    rows = (_together(results, pair, origin) for pair, origin in itertools.zip_longest(pairs, origins))
    yield from rows if order == sorted(order) else sorted(rows, key=itemgetter(0))


def _together(results: Results, pair: Pair | None, origin: Origin | None) -> Row:
    if pair is None or origin is None or pair.question != origin.question:
        raise UserError(
            f"{results.sft_data} and {results.sft_origins} do not belong together; wait until step 3 has finished, "
            "or run it again"
        )
    return origin.root, Answered(pair, origin)
