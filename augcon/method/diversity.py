"""ROUGE-L precision, and the choice of queries that differ: within a root context and across the corpus (paper 3.3)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from augcon.data import Fate
from augcon.text.units import words


def rouge_l_precision(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """LCS(candidate, reference) / |candidate| over words; 1 for a candidate without words."""
    return LCSseq.similarity(candidate, reference) / len(candidate) if candidate else 1.0


def likeness(one: str, other: str) -> float:
    """The lower of the ROUGE-L precisions of two texts against each other, marks aside; 0 if either has no words."""
    cut, other_cut = ([word for word in words(text) if any(map(str.isalnum, word))] for text in (one, other))
    longer = max(len(cut), len(other_cut))
    return LCSseq.similarity(cut, other_cut) / longer if cut and other_cut else 0.0


# Each word is one character, in the order of first sight. So a query is a short string, and compared a hundred times as
# fast as a list of words. Past a million words, two may share a character.
_CHARACTERS: defaultdict[str, str] = defaultdict(lambda: chr((len(_CHARACTERS) + 1) % 0x110000))


def _cut(query: str) -> str:
    return "".join(map(_CHARACTERS.__getitem__, words(query)))


def _words_at(threshold: float, cut: str) -> int:
    """The fewest words that make up this part of a query."""
    return math.ceil(threshold * len(cut) - 1e-9)


class DiverseQueries:
    """The queries of a root context whose ROUGE-L precision against every one kept before is below ``threshold``."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.kept: list[str] = []
        self._cut: list[str] = []

    def offer(self, query: str) -> bool:
        """Keeps the query if it is diverse enough, and says whether it did. One without words is not kept."""
        cut = _cut(query)
        at_least = _words_at(self.threshold, cut)
        if not cut or process.extractOne(cut, self._cut, scorer=LCSseq.similarity, score_cutoff=at_least):
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
    """All queries kept so far, to find near-duplicates across the corpus (AugCon's own addition).

    Two queries are alike when the ROUGE-L precision of each against the other is at least ``threshold``. They share
    that part of their words, so among the few rarest of each is one that both have; only such pairs are compared.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._with_word: defaultdict[str, list[str]] = defaultdict(list)

    def has_like(self, query: str) -> bool:
        """Whether a query kept before is alike."""
        cut = _cut(query)
        found = {other for word in self._rarest(cut) for other in self._with_word.get(word, ())}
        nearest = process.extractOne(cut, found, scorer=LCSseq.normalized_similarity)  # LCS / length of the longer
        return nearest is not None and nearest[1] >= self.threshold - 1e-9

    def add(self, query: str) -> None:
        """Adds a query that is kept."""
        cut = _cut(query)
        for word in set(self._rarest(cut)):
            self._with_word[word].append(cut)

    def _rarest(self, cut: str) -> str:
        """One word more than alike queries may differ in. A word first seen late is rare, and is a high character."""
        return "".join(sorted(cut, reverse=True)[: len(cut) - _words_at(self.threshold, cut) + 1])


def rank_and_filter(
    queries: Sequence[str], scores: Sequence[float], quota: int, threshold: float, sweep: Sweep | None = None
) -> tuple[list[int], list[Fate]]:
    """The places of the queries to keep of one root context, best score first; and the fate of each query.

    From the best down, a query is kept when the sweep has none like it (else "alike elsewhere") and it is diverse from
    all kept before (else "alike"), until there are ``quota``. Then the sweep takes the kept ones.
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
