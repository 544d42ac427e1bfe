"""The report as one HTML file, which asks for nothing from outside.

What a model or a corpus wrote is only in the compressed parts, and the script shows it as text alone. So no markup in
it can become part of the page. A policy in the page's head forbids all other scripts, and all requests.
"""

import base64
import dataclasses
import hashlib
import json
import math
import tomllib
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from augcon.report.charts import Paces, draw_charts
from augcon.report.gather import Columns, Gathered, Loss, pack
from augcon.report.questions import KINDS
from augcon.run.corpus import Skipped
from augcon.run.results import Figures, ShortRoot

_FOLDER = Path(__file__).parent
_EXAMPLES = 5  # of each loss


@dataclasses.dataclass(frozen=True)
class SearchSet:
    """What is read of a set of examples that was tried: their places and questions, and the mean grade."""

    examples: list[int]
    questions: list[str]
    mean: float | None


@dataclasses.dataclass(frozen=True)
class SearchTable:
    """What is read of the search for examples in one language."""

    sets: list[SearchSet]
    chosen: list[int]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of the run; ``run`` is a name for its marks, ``stages`` its record."""

    folder: str
    run: str
    stages: Mapping[str, Any]
    figures: Mapping[str, Figures]
    search: Mapping[str, SearchTable]
    short_roots: list[ShortRoot]
    skipped: list[Skipped]
    versions: Mapping[str, str]


def write_page(file: IO[str], gathered: Gathered, facts: Facts) -> None:
    """Writes the page, part by part."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    texts = tomllib.loads((_FOLDER / f"{gathered.language}.toml").read_text(encoding="utf-8"))
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    parts = environment.get_template("page.html").generate(
        t=texts,
        language=gathered.language,
        script=script,
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=facts,
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        charts=draw_charts(gathered, _paces(facts), texts, texts["kinds"]),
        index=_base64(pack(json.dumps(_index(gathered, facts, texts), ensure_ascii=False))),
        chunks=map(_base64, gathered.chunks),
    )
    file.writelines(parts)


def _paces(facts: Facts) -> Paces:
    """How each step went on, run by run."""
    asked = [(step, run) for step, figures in facts.figures.items() for run in figures.get("asked", [])]
    return [(step, run["pace"]) for step, run in asked if run.get("pace")]


def _base64(packed: bytes) -> str:
    return base64.b64encode(packed).decode()


def _index(gathered: Gathered, facts: Facts, texts: Mapping[str, Any]) -> dict[str, Any]:
    """What the page knows from the start. It is large at most by the columns."""
    return {
        "texts": texts,
        "kinds": KINDS,
        **dataclasses.asdict(facts),
        "has": gathered.has,
        "counts": gathered.counts,
        "losses": [dataclasses.asdict(loss) for loss in _losses(gathered, facts)],
        "alike": [dataclasses.asdict(alike) for alike in gathered.alike],
        "titles": gathered.titles,
        "pairs": _columns(gathered.pairs, leave_out=("context", "share")),
        "roots": _columns(gathered.roots),
        "articles": _columns(gathered.articles),
    }


def _losses(gathered: Gathered, facts: Facts) -> list[Loss]:
    """All losses, the largest first; also what other files tell: rows skipped, roots short, queries edited by hand."""
    losses = []
    for reason, count in Counter(row.reason for row in facts.skipped).items():
        some = [row for row in facts.skipped if row.reason == reason][:_EXAMPLES]
        named = [{"id": row.name, **({"reason": row.detail} if row.detail else {})} for row in some]
        losses.append(Loss("articles", reason, "", count, named))
    if short := facts.short_roots:
        named = [{"id": str(row.root), "reason": row.reason} for row in short[:_EXAMPLES]]
        losses.append(Loss("roots", "short of their quota", "", len(short), named))
    counts = Counter(gathered.counts)
    by_hand = counts["pairs"] + counts["dropped"] - counts["kept"]
    if by_hand and counts["scored"] and counts["pairs"]:
        losses.append(Loss("kept", "added by hand" if by_hand > 0 else "removed by hand", "", abs(by_hand), []))
    return sorted([*losses, *gathered.losses], key=lambda loss: -loss.count)


def _columns(columns: Columns, leave_out: tuple[str, ...] = ()) -> dict[str, list[float | None]]:
    return {name: _numbers(column) for name, column in columns.of.items() if name not in leave_out}


def _numbers(column: "array[float]") -> list[float | None]:
    """Numbers as JSON can say them, in few characters."""
    return [None if math.isnan(value) else int(value) if value.is_integer() else round(value, 4) for value in column]
