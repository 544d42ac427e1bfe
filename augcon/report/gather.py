"""What the report holds of a results folder.

Texts go into compressed chunks of a few root contexts each, which the page opens when it shows them. What the page
counts, filters and sorts by is kept as columns of numbers. So memory is for the columns and the compressed texts.
"""

import dataclasses
import gzip
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import LCSseq

from augcon.errors import UserError
from augcon.files import read_lines
from augcon.method.pairs import Sample
from augcon.report.alike import Alike, beside_kept
from augcon.report.questions import KINDS, kind_of
from augcon.report.rows import Answered, NodeRow, RootRows, each_root
from augcon.run.cut import ArticleRow
from augcon.run.results import STEP_1, Results, Scored
from augcon.text.units import language, length, units

MOST_NODES = 300_000  # of a larger run, the trees of some root contexts are shown
_CHUNK = 200_000  # characters of a chunk, opened in a few milliseconds
_EXAMPLES, _SIDE_BY_SIDE = 5, 25  # shown of each loss, and of each way to be alike
_EXCERPT, _TITLE = 500, 80  # characters
_COMPARED = 10**8  # the product of two lengths beyond which they are not laid along each other
BRANCH_ENDS = ("not shorter", "hallucinated", "loses text")


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is lost ``after`` a stage of the funnel for one reason, how often, and some examples: texts by name."""

    after: str
    reason: str
    detail: str
    count: int
    examples: list[dict[str, str]]


class Columns:
    """Columns of numbers of the same length; one that is not known is NaN."""

    def __init__(self, *names: str) -> None:
        self.of = {name: array("d") for name in names}

    def append(self, **row: float | None) -> None:
        """Adds a row, with a number for every column."""
        for name, column in self.of.items():
            value = row[name]
            column.append(math.nan if value is None else value)

    def __len__(self) -> int:
        return len(next(iter(self.of.values())))


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What the page shows of the texts. ``pairs``, ``roots`` and ``articles`` are columns; a pair names its root, and
    a root its article and its chunk, by their places. ``has``: the names of the files that were there."""

    has: list[str]
    language: str
    counts: dict[str, int]
    losses: list[Loss]
    alike: list[Alike]
    titles: list[str]
    pairs: Columns
    roots: Columns
    articles: Columns
    chunks: list[bytes]
    scores: "dict[str, array[float]]"
    depths: Counter[int]


def gather(results: Results, seed: int) -> Gathered:
    """Reads all files that are there. Raises UserError where none is, or one is damaged."""
    files = (results.contexts, results.nodes, results.scores, results.filtered_queries, results.sft_data)
    has = [path.name for path in files if path.exists()]
    if not has:
        raise UserError(f"{results.folder} holds nothing to report on; run bash augcon.sh first, or name --results")
    articles = read_lines(results.articles, ArticleRow, STEP_1) if results.articles.exists() else ()
    known = {row.article: row for row in articles}
    gathering = _Gathering(seed, 1 + _count_lines(results) // MOST_NODES, known)
    for rows in each_root(results):
        gathering.add(rows)
    return gathering.finish(has)


def _count_lines(results: Results) -> int:
    if not results.nodes.exists():
        return 0
    with results.nodes.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


class _Gathering:
    """What has been gathered so far. Of ``every`` so many root contexts, one has its trees shown."""

    def __init__(self, seed: int, every: int, known: Mapping[int, ArticleRow]) -> None:
        self.seed, self.every, self.known = seed, every, known
        self.counts: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.depths: Counter[int] = Counter()
        self.losses: dict[tuple[str, str, str], Sample[dict[str, str]]] = {}
        self.left_out: dict[str, Sample[tuple[Scored, list[Scored]]]] = {}
        self.kept: list[Scored] = []
        self.scores = {"kept": array("d"), "left out": array("d")}
        self.pairs = Columns("root", "depth", "score", "length", "chinese", "kind", "context", "share")
        self.roots = Columns("number", "article", "chunk", "length", "quota", "nodes", "pairs")
        self.articles = Columns("number", "length", "covered", "finer")
        self.titles: list[str] = []
        self.chunks: list[bytes] = []
        self._open: list[str] = []

    def add(self, rows: RootRows) -> None:
        """Adds a root context, with all that is said of it."""
        shown = len(self.roots) % self.every == 0
        self._count(rows)
        self._note_alike(rows)
        self._add_article(rows)
        texts = root_texts(rows, len(self.pairs), shown)
        for answered in rows.answered:
            self._add_pair(rows, answered)
        self.roots.append(
            number=rows.number,
            article=len(self.titles) - 1,
            chunk=len(self.chunks),
            length=rows.root.length if rows.root else None,
            quota=rows.root.quota if rows.root else None,
            nodes=len(rows.nodes) if shown else 0,
            pairs=len(rows.answered),
        )
        self._open.append(json.dumps(texts, ensure_ascii=False))
        if sum(map(len, self._open)) > _CHUNK:
            self._close_chunk()

    def _count(self, rows: RootRows) -> None:
        self.counts.update(roots=rows.root is not None, nodes=len(rows.nodes), pairs=len(rows.answered))
        if rows.root:
            self.languages[language(rows.root.text)] += rows.root.length
            self.counts["quota"] += rows.root.quota
        for answered in rows.answered:
            self.languages[language(answered.pair.question)] += 1
        for node in rows.nodes:
            self.counts.update(queries=node.query is not None, doubtful=bool(node.doubt))
            self.depths[len(node.id.rpartition(":")[2])] += node.query is not None
            if node.query is None or node.outcome in BRANCH_ENDS:
                after = "branches" if node.outcome in BRANCH_ENDS else "nodes"
                self._lose(after, node.outcome, node.detail, id=node.id, question=node.query, context=node.context)
        for row in rows.scored.values():
            self.counts["scored"] += 1
            self.scores["kept" if row.fate == "kept" else "left out"].append(row.score)
            if row.fate == "kept":
                self.counts["kept"] += 1
            else:
                context = rows.contexts.get(row.id)
                self._lose("queries", row.fate, "", id=row.id, question=row.question, context=context)
        for lost in rows.dropped.values():
            self.counts["dropped"] += 1
            self._lose(
                "kept", lost.reason, "", id=lost.id, question=lost.question, context=lost.context, reply=lost.reply
            )

    def _lose(self, after: str, reason: str, detail: str, **example: str | None) -> None:
        sample = self.losses.setdefault((after, reason, detail), Sample(_EXAMPLES, self.seed))
        sample.offer(example["id"], {name: excerpt(text) for name, text in example.items() if text})

    def _note_alike(self, rows: RootRows) -> None:
        kept = [row for row in rows.scored.values() if row.fate == "kept"]
        self.kept += kept
        for row in rows.scored.values():
            if row.fate in ("alike", "alike elsewhere"):
                self.left_out.setdefault(row.fate, Sample(_SIDE_BY_SIDE, self.seed)).offer(row.id, (row, kept))

    def _add_article(self, rows: RootRows) -> None:
        number = rows.root.article if rows.root else None
        if not self.titles or self.articles.of["number"][-1] != number:
            first = next(iter(rows.root.text.strip().splitlines()), "") if rows.root else ""
            title = excerpt(rows.root.title or first if rows.root else "", _TITLE)
            about = self.known.get(-1 if number is None else number)
            self.titles.append(f"{title} · {excerpt(str(about), _TITLE)}" if about and about.file else title)
            self.articles.append(number=number, length=0, covered=0, finer=0)
        if rows.root:
            used = {row.origin.id for row in rows.answered}
            parts = {rows.contexts[id_]: id_.rpartition(":")[2] != "" for id_ in used if id_ in rows.contexts}
            finer = held(rows.root.text, [part for part, is_finer in parts.items() if is_finer])
            self.articles.of["length"][-1] += rows.root.length
            self.articles.of["finer"][-1] += finer
            self.articles.of["covered"][-1] += finer if all(parts.values()) else rows.root.length

    def _add_pair(self, rows: RootRows, answered: Answered) -> None:
        pair, origin = answered.pair, answered.origin
        context = rows.contexts.get(origin.id)
        of = length(context) if context else None
        self.pairs.append(
            root=len(self.roots),
            depth=origin.depth,
            score=origin.score,
            length=length(pair.answer),
            chinese=language(pair.question) == "zh",
            kind=KINDS.index(kind_of(pair.question)),
            context=of,
            share=min(1, of / rows.root.length) if of and rows.root else None,
        )

    def _close_chunk(self) -> None:
        self.chunks.append(pack(f"[{','.join(self._open)}]"))
        self._open.clear()

    def finish(self, has: list[str]) -> Gathered:
        """Compares what is alike, and gives all."""
        if self._open:
            self._close_chunk()
        alike = [
            beside_kept(row, self.kept if fate == "alike elsewhere" else kept)
            for fate, sample in self.left_out.items()
            for row, kept in sample.kept
        ]
        return Gathered(
            has=has,
            language=max(self.languages, key=self.languages.__getitem__, default="en"),
            counts={**self.counts, "articles": len(self.titles) if self.counts["roots"] else 0, "every": self.every},
            losses=[Loss(*key, sample.offered, sample.kept) for key, sample in self.losses.items()],
            alike=sorted(filter(None, alike), key=lambda each: -each.likeness),
            titles=self.titles,
            pairs=self.pairs,
            roots=self.roots,
            articles=self.articles,
            chunks=self.chunks,
            scores=self.scores,
            depths=self.depths,
        )


def root_texts(rows: RootRows, first: int, shown: bool) -> dict[str, Any]:
    """The texts of a root context as the page reads them; its pairs are numbered from ``first`` on.

    Where its trees are not ``shown``, only the nodes that its pairs rest on are there.
    """
    used = {row.origin.id for row in rows.answered}
    of_nodes = {node.id for node in rows.nodes}
    pairs = [
        {"n": n, "id": row.origin.id, "question": row.pair.question, "answer": row.pair.answer}
        | ({"context": rows.contexts[row.origin.id]} if row.origin.id in rows.contexts.keys() - of_nodes else {})
        for n, row in enumerate(rows.answered, first)
    ]
    nodes = [node_texts(node, rows) for node in rows.nodes if shown or node.id in used]
    return {"root": rows.number, "text": rows.root.text if rows.root else "", "shown": shown} | {
        "nodes": nodes,
        "pairs": pairs,
    }


def node_texts(node: NodeRow, rows: RootRows) -> dict[str, Any]:
    """A node as the page reads it, without what is empty."""
    scored, dropped = rows.scored.get(node.id), rows.dropped.get(node.id)
    texts = {
        "id": node.id,
        "context": node.context,
        "query": node.query,
        "outcome": node.outcome,
        "detail": node.detail,
        "tries": node.tries if node.tries > 1 else 0,
        "doubt": node.doubt,
        "score": scored and scored.score,
        "fate": scored and scored.fate,
        "dropped": dropped and dropped.reason,
        "reply": dropped and dropped.reply,
    }
    return {name: value for name, value in texts.items() if value or (name == "score" and value == 0)}


def held(root: str, parts: Iterable[str]) -> int:
    """How many units of a root context lie in one of its parts, each laid along it by their longest common
    subsequence, for a part may have been rewritten."""
    letters: dict[str, str] = {}

    def coded(text: str) -> str:
        return "".join(letters.setdefault(unit.strip(), chr(len(letters))) for unit in units(text))

    whole = coded(root)
    covered = bytearray(len(whole))
    for part in map(coded, parts):
        start = whole.find(part)
        if start >= 0:
            blocks: Sequence[tuple[int, int]] = [(start, start + len(part))]
        elif len(whole) * len(part) > _COMPARED:
            blocks = []
        else:
            found = LCSseq.opcodes(whole, part)
            blocks = [(block.src_start, block.src_end) for block in found if block.tag == "equal"]
        for start, end in blocks:
            covered[start:end] = b"\1" * (end - start)
    return sum(covered)


def excerpt(text: str, most: int = _EXCERPT) -> str:
    """A text, cut where it is long."""
    return text if len(text) <= most else text[:most] + "…"


def pack(text: str) -> bytes:
    """A text compressed as the page can open it; the same for the same text."""
    return gzip.compress(text.encode(errors="replace"), compresslevel=6, mtime=0)
