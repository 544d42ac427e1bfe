"""ROUGE-L precision, and the choice of queries that differ: within a root context and across the corpus (paper 3.3)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from augcon.data import Fate
from augcon.text.units import words


def rouge_l_precision(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """LCS(candidate, reference) / |candidate| over words; 1 for a candidate without words."""
    if not candidate:
        return 1.0
    return LCSseq.similarity(candidate, reference) / len(candidate)


# Each word is one character, in the order of first sight, so that a query is a short string: LCS over words is LCS
# over its characters, which is compared a hundred times faster. Past a million words two may share a character.
_CHARACTERS: defaultdict[str, str] = defaultdict(lambda: chr((len(_CHARACTERS) + 1) % 0x110000))


def _cut(query: str) -> str:
    return "".join(map(_CHARACTERS.__getitem__, words(query)))


def _shared(query: str, others: Sequence[str]) -> Any:
    """LCS of a cut query with each of some others, as an array."""
    return process.cdist([query], others, scorer=LCSseq.similarity, dtype=np.int32)[0]


class DiverseQueries:
    """The queries kept so far of one root context.

    A query is kept when its ROUGE-L precision against every query kept before is below ``threshold``.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.kept: list[str] = []
        self._cut: list[str] = []

    def offer(self, query: str) -> bool:
        """Keeps the query if it is diverse enough; says whether it was kept. Without words, it is not."""
        cut = _cut(query)
        if not cut or (self._cut and _shared(cut, self._cut).max() / len(cut) >= self.threshold):
            return False
        self.kept.append(query)
        self._cut.append(cut)
        return True

    def offer_all(self, queries: Iterable[str]) -> int:
        """Offers queries in order; returns how many are kept in all."""
        for query in queries:
            self.offer(query)
        return len(self.kept)


class Sweep:
    """All queries kept so far, to find what is nearly the same elsewhere in the corpus (AugCon's own).

    Two queries are alike when the ROUGE-L precision of each against the other is at least ``threshold``:
    LCS / length of the longer. Such a pair shares that part of its words, so among the few rarest words of each there
    is one that both have; only queries found through those words are compared.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._with_word: defaultdict[str, list[str]] = defaultdict(list)

    def has_like(self, query: str) -> bool:
        """Whether a query kept before is alike."""
        cut = _cut(query)
        found = sorted({other for word in self._rarest(cut) for other in self._with_word.get(word, ())})
        if not found:
            return False
        longer = np.maximum(len(cut), np.fromiter(map(len, found), np.int32, len(found)))
        return bool((_shared(cut, found) / longer >= self.threshold).any())

    def add(self, query: str) -> None:
        """Takes a query that is kept."""
        cut = _cut(query)
        for word in set(self._rarest(cut)):
            self._with_word[word].append(cut)

    def _rarest(self, cut: str) -> str:
        """The words of which at least one must be shared: all but what two that are alike may differ in.

        A word seen late is a rare one, so the highest characters come first.
        """
        needed = math.ceil(self.threshold * len(cut) - 1e-9)
        return "".join(sorted(cut, reverse=True)[: len(cut) - needed + 1])


def rank_and_filter(
    queries: Sequence[str], scores: Sequence[float], quota: int, threshold: float, sweep: Sweep | None = None
) -> tuple[list[int], list[Fate]]:
    """The queries of one root context to keep, best score first, as their places; and the fate of each query.

    From the best down, a query is kept when it is diverse from all kept before ("alike" if not) and the sweep
    has none like it ("alike elsewhere"), until there are ``quota``. Then the sweep takes the kept ones.
    """
    diverse = DiverseQueries(threshold)
    fates: list[Fate] = ["over quota"] * len(queries)
    kept: list[int] = []
    for place in sorted(range(len(queries)), key=lambda place: -scores[place]):
        if len(kept) == quota:
            break
        query = queries[place]
        if sweep and sweep.has_like(query):
            fates[place] = "alike elsewhere"
        elif diverse.offer(query):
            fates[place] = "kept"
            kept.append(place)
        else:
            fates[place] = "alike"
    if sweep:
        for place in kept:
            sweep.add(queries[place])
    return kept, fates
