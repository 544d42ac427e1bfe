"""The pictures of the report: SVG in the page's own colours and font, so that they follow its light and dark."""

import io
import itertools
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from augcon.report.gather import Gathered
from augcon.report.questions import KINDS

# Stand for the colours of the page in what matplotlib writes.
_INK, _FIRST, _SECOND = "#010101", "#020202", "#030303"
_COLOURS = {_INK: "currentColor", _FIRST: "var(--accent)", _SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "augcon",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.5,
}
Paces = Sequence[tuple[str, Sequence[Sequence[float]]]]  # a step, and samples of seconds since its start and calls


def draw_charts(
    gathered: Gathered, paces: Paces, texts: Mapping[str, Any], names_of_kinds: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """The title and the SVG of each picture for which there is something to draw."""
    of = gathered.pairs.of
    pairs, queries = Counter(map(int, _known(of["depth"]))), gathered.depths
    if queries or pairs:
        depths = range(max([*queries, *pairs]) + 1)
        with _Picture(texts["depth"], texts["count"]) as picture:
            picture.bars(list(map(str, depths)), [queries[depth] for depth in depths], texts["queries"], second=True)
            picture.bars(list(map(str, depths)), [pairs[depth] for depth in depths], texts["pairs"])
        yield texts["chart_depth"], picture.svg
    if any(gathered.scores.values()):
        with _Picture(texts["score"], texts["queries"]) as picture:
            picture.histogram(gathered.scores, [texts["kept"], texts["left_out"]])
        yield texts["chart_scores"], picture.svg
    if len(gathered.pairs):
        kinds = Counter(map(int, of["kind"]))
        with _Picture(texts["pairs"], "") as picture:
            names = [names_of_kinds[name] for name in KINDS]
            picture.bars_across(names[::-1], [kinds[place] for place in range(len(KINDS))][::-1])
        yield texts["chart_kinds"], picture.svg
    for name in ("length", "share", "context"):
        if known := _known(of[name]):
            with _Picture(texts[f"axis_{name}"], texts["pairs"]) as picture:
                picture.histogram({"pairs": known}, [])
            yield texts[f"chart_{name}"], picture.svg
    for step, pace in paces:
        if len(pace) > 1:
            with _Picture(texts["minutes"], texts["calls_per_second"]) as picture:
                picture.rate(pace)
            yield f"{texts['chart_rate']}: {texts['step_names'].get(step, step)}", picture.svg


def _known(column: "array[float]") -> "array[float]":
    return array("d", (value for value in column if value == value))  # NaN is not equal to itself


class _Picture:
    """A small pair of axes; ``svg`` is there once the block ends."""

    def __init__(self, x: str, y: str) -> None:
        self.x, self.y, self.svg = x, y, ""

    def __enter__(self) -> "_Picture":
        import matplotlib
        from matplotlib.figure import Figure

        self._style: Any = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        self._figure: Any = Figure(figsize=(4.7, 2.6), layout="constrained")
        self.axes: Any = self._figure.subplots()
        return self

    def bars(self, names: Sequence[str], heights: Sequence[float], label: str, second: bool = False) -> None:
        self.axes.bar(
            names, heights, 0.8 if second else 0.5, color=_SECOND if second else _FIRST, label=label, zorder=2
        )
        if not second:
            self._figure.legend(loc="outside upper right", ncols=2, frameon=False)

    def bars_across(self, names: Sequence[str], widths: Sequence[float]) -> None:
        bars = self.axes.barh(names, widths, 0.6, color=_FIRST)
        self.axes.bar_label(bars, [f"{width:,}" for width in widths], padding=3)
        self.axes.set_xmargin(0.12)

    def histogram(self, columns: "Mapping[str, array[float]]", labels: Sequence[str]) -> None:
        import numpy

        values = [numpy.frombuffer(column) for column in columns.values() if column]
        low, high = numpy.percentile(numpy.concatenate(values), [0, 99.5])  # a few far away would hide the others
        edges = numpy.linspace(low, high if high > low else low + 1, 25)
        self.axes.hist(
            [numpy.clip(each, edges[0], edges[-1]) for each in values],
            edges,
            stacked=True,
            color=[_FIRST, _SECOND][: len(values)],
        )
        if len(labels) == len(values):
            handles = self.axes.containers
            self._figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)

    def rate(self, pace: Sequence[Sequence[float]]) -> None:
        pairs = [(one, other) for one, other in itertools.pairwise(pace) if other[0] > one[0]]
        minutes = [pace[0][0] / 60, *(other[0] / 60 for _, other in pairs)]
        self.axes.stairs([(other[1] - one[1]) / (other[0] - one[0]) for one, other in pairs], minutes, color=_FIRST)

    def __exit__(self, *error: object) -> None:
        self._style_axes()
        written = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the fonts
            self._figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        self._style.__exit__(None, None, None)
        self.svg = _for_page(written.getvalue())

    def _style_axes(self) -> None:
        self.axes.set(xlabel=self.x, ylabel=self.y)
        self.axes.tick_params(length=0)
        self.axes.yaxis.get_major_locator().set_params(nbins=5, integer=True) if self.y else None


def _for_page(svg: str) -> str:
    """An SVG document as an element of the page: without what is for documents, with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"|(?<=<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r' height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r"font: [\d.]+px [^;\"]*", lambda font: font[0].partition("'")[0] + "inherit", svg)
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg
