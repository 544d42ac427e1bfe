"""Questions that were left out as too similar, each beside the kept one that it is most like."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Generic, TypeVar

from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from augcon.method.diversity import likeness, rouge_l_precision
from augcon.report.rows import Scored
from augcon.text.units import words

Item = TypeVar("Item")
_COMPARED = 20


class Sample(Generic[Item]):
    """A random sample of what it is offered, at most ``size``, and how many there were; the same for the same seed."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.offered = size, 0
        self.items: list[Item] = []
        self._random = random.Random(seed)

    def offer(self, item: Item) -> None:
        """Takes the item in, perhaps for another one."""
        place = self._random.randrange(self.offered + 1)
        self.offered += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif place < self.size:
            self.items[place] = item


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
