"""Questions that were left out as too similar, each beside the kept one that it is most like."""

import dataclasses
from collections.abc import Sequence

from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from augcon.method.diversity import likeness, rouge_l_precision
from augcon.run.results import Scored
from augcon.text.units import words

_COMPARED = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Alike:
    """A question that was left out, the kept one, and how alike they are, from 0 to 1, as step 2 compared them."""

    left_out: Scored
    kept: Scored
    likeness: float


def beside_kept(row: Scored, kept: Sequence[Scored]) -> Alike | None:
    """The question beside the one of ``kept`` that it is most like: of its root context or, by its fate, of others.

    Among many, only those most like it by their characters are compared word by word.
    """
    if row.fate == "alike":
        cut = words(row.question)
        found = [Alike(row, one, rouge_l_precision(cut, words(one.question))) for one in kept if one.root == row.root]
    else:
        texts = [one.question if one.root != row.root else "" for one in kept]
        near = process.extract(row.question, texts, scorer=LCSseq.normalized_similarity, limit=_COMPARED)
        found = [Alike(row, kept[place], likeness(row.question, text)) for text, _, place in near if text]
    return max(found, key=lambda alike: alike.likeness, default=None)
