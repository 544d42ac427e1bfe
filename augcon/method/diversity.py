"""ROUGE-L precision, and the choice of queries that differ: within a root context and across the corpus (paper 3.3)."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from augcon.data import Fate, Query
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


def _words_at(threshold: float, size: int) -> int:
    """The fewest words that make up this part of a query of ``size`` words."""
    return math.ceil(threshold * size - 1e-9)


def _is_diverse(cut: str, kept: Sequence[str], threshold: float) -> bool:
    """Whether the ROUGE-L precision against every one kept is below the threshold. One without words is not diverse."""
    at_least = _words_at(threshold, len(cut))
    return bool(cut) and process.extractOne(cut, kept, scorer=LCSseq.similarity, score_cutoff=at_least) is None


class DiverseQueries:
    """The queries of a root context whose ROUGE-L precision against every one kept before is below ``threshold``."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.kept: list[str] = []
        self._cut: list[str] = []

    def offer(self, query: str) -> bool:
        """Keeps the query if it is diverse enough, and says whether it did. One without words is not kept."""
        cut = _cut(query)
        if not _is_diverse(cut, self._cut, self.threshold):
            return False
        self.kept.append(query)
        self._cut.append(cut)
        return True

    def offer_all(self, queries: Iterable[str]) -> int:
        """Offers queries in order; returns how many are kept in all."""
        for query in queries:
            self.offer(query)
        return len(self.kept)


def last_tree_added(queries: Sequence[Query], threshold: float) -> bool:
    """Whether the last tree over a root context brought a query that differs from all of the trees before it."""
    last = max((query.pass_number for query in queries if query.pass_number is not None), default=-1)
    diverse = DiverseQueries(threshold)
    before = diverse.offer_all(query.text for query in queries if query.pass_number != last)
    return diverse.offer_all(query.text for query in queries if query.pass_number == last) > before


# The words looked up together. One alone would find every text on a frequent topic, four find hardly any but those
# alike; texts in which more than three words may differ have too many fours, but rare words enough.
_TOGETHER, _MOST_APART = 4, 3


class Sweep:
    """All texts kept so far, to find near-duplicates across the corpus (AugCon's own addition).

    Two texts are alike when the ROUGE-L precision of each against the other is at least ``threshold``. So they share
    that part of their words. Sort the words of each from the rarest on: the first four that they share are among the
    first four and as many more as may differ. Texts are looked up by the fours among those (a short one is filled up
    at its end), and only where one is the same are they compared. No text that is alike is missed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._texts: list[tuple[str, int | None]] = []
        self._first: dict[int, int] = {}  # the first text with a key; a list for each key would take twice the memory
        self._others: defaultdict[int, list[int]] = defaultdict(list)

    def has_like(self, text: str) -> bool:
        """Whether a text added before is alike."""
        return self.has_like_cut(_cut(text))

    def add(self, text: str) -> None:
        """Adds a text that is kept."""
        self.add_cut(_cut(text))

    def has_like_cut(self, cut: str, root: int | None = None) -> bool:
        """As ``has_like``, of a text that is cut, and looking only at those of other root contexts."""
        size = len(cut)
        together = {self._together(_words_at(self.threshold, size)), self._together(int(size / self.threshold + 1e-6))}
        keys = [key for number in together for key in self._keys(cut, number)]
        found = {self._first[key] for key in keys if key in self._first}
        if not found:
            return False
        found.update(itertools.chain.from_iterable(self._others[key] for key in keys if key in self._others))
        others = [text for text, of in map(self._texts.__getitem__, found) if of is None or of != root]
        # LCS / length of the longer; rapidfuzz rounds so that a score nearer to its cutoff than 1e-7 may be missed
        scorer, cutoff = LCSseq.normalized_similarity, self.threshold - 1e-6
        return process.extractOne(cut, others, scorer=scorer, score_cutoff=cutoff) is not None

    def add_cut(self, cut: str, root: int | None = None) -> None:
        """As ``add``, of a text that is cut."""
        number = len(self._texts)
        self._texts.append((cut, root))
        for key in self._keys(cut, self._together(len(cut))):
            if self._first.setdefault(key, number) != number:
                self._others[key].append(number)

    def _together(self, size: int) -> int:
        """How many words of a text of this size are looked up together. Two alike must agree, so look both ways."""
        return _TOGETHER if size - _words_at(self.threshold, size) <= _MOST_APART else 1

    def _keys(self, cut: str, together: int) -> set[int]:
        """The hashes by which it is found, if it has words. A word first seen late is rare, and is a high character."""
        most_apart = len(cut) - _words_at(self.threshold, len(cut))
        rarest = (sorted(cut, reverse=True) + ["\0"] * together)[: most_apart + together]
        return set(map(hash, itertools.combinations(rarest, together))) if cut else set()


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The queries of a root context and their scores; ``quota`` is how many are wanted."""

    quota: int
    queries: Sequence[str]
    scores: Sequence[float]


def rank_and_filter(
    roots: Sequence[Candidates], threshold: float, sweep_threshold: float = 0
) -> Iterator[tuple[list[int], list[Fate]]]:
    """For each root context the places of the queries to keep, best score first; and the fate of each query.

    From the best query of the corpus down, one is kept when it is diverse from all that its root context keeps (else
    "alike") and from other root contexts nothing like it is kept (else "alike elsewhere"; looked for from a
    ``sweep_threshold`` above 0), until the root context has its quota. So within a root context it is the paper's
    choice, the next in rank takes a swept place, and of two alike in the corpus the better one stays. That compares
    scores of different contexts: it assumes that the centring term of the scorer's loss has put them on one scale.
    Equal scores count in the order given.
    """
    sweep = Sweep(sweep_threshold) if sweep_threshold else None
    kept: list[list[int]] = [[] for _ in roots]
    kept_cuts: list[list[str]] = [[] for _ in roots]
    fates: list[list[Fate]] = [["over quota"] * len(root.queries) for root in roots]
    ranked = [(-score, number, place) for number, root in enumerate(roots) for place, score in enumerate(root.scores)]
    ranked.sort()
    for _, number, place in ranked:
        if len(kept[number]) == roots[number].quota:
            continue
        cut = _cut(roots[number].queries[place])  # which takes the most time, so not of all
        if not _is_diverse(cut, kept_cuts[number], threshold):
            fates[number][place] = "alike"
        elif sweep and sweep.has_like_cut(cut, number):
            fates[number][place] = "alike elsewhere"
        else:
            fates[number][place] = "kept"
            kept[number].append(place)
            kept_cuts[number].append(cut)
            if sweep:
                sweep.add_cut(cut, number)
    return zip(kept, fates, strict=True)
