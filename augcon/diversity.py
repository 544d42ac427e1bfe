"""ROUGE-L precision, and the greedy choice of mutually diverse queries (paper section 3.3)."""

from collections.abc import Iterable, Sequence

from rapidfuzz.distance import LCSseq

from augcon.text import words


def rouge_l_precision(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """LCS(candidate, reference) / |candidate| over words; 1 for a candidate without words."""
    if not candidate:
        return 1.0
    return LCSseq.similarity(candidate, reference) / len(candidate)


class DiverseQueries:
    """The queries kept so far of one root context.

    A query is kept when its ROUGE-L precision against every query kept before is below ``threshold``.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.kept: list[str] = []
        self._words: list[list[str]] = []

    def offer(self, query: str) -> bool:
        """Keeps the query if it is diverse enough; says whether it was kept. Without words, it is not."""
        cut = words(query)
        if not cut or any(rouge_l_precision(cut, kept) >= self.threshold for kept in self._words):
            return False
        self.kept.append(query)
        self._words.append(cut)
        return True

    def offer_all(self, queries: Iterable[str]) -> int:
        """Offers queries in order; returns how many are kept in all."""
        for query in queries:
            self.offer(query)
        return len(self.kept)
