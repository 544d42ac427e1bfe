"""Articles → root contexts with their quota (paper section 3.2; how an article is cut is AugCon's own)."""

import math
import re
from collections.abc import Iterable, Iterator

from augcon.data import Article, RootContext
from augcon.text.units import length, paragraphs, sentences, size, units

SHORT = 20  # a context under this length would bear no query (the paper's λ): avoided where possible
CHARACTERS_PER_UNIT = 12  # in a run without spaces: a page of Thai must not pass for one word
_MID_PARAGRAPH = 1.0  # cost of a cut inside a paragraph, in units of one empty context
_TOO_SHORT = 2.0


def split_article(article: str, max_length: int) -> list[str]:
    """Cuts an article into contexts of at most ``max_length``; joined in order, they give it back exactly.

    Cuts fall at paragraph ends, else at sentence ends, else (one sentence alone too long) inside it. As a
    typesetter breaks a paragraph into lines, the cuts are chosen together: few and evenly filled contexts,
    whole paragraphs where that is possible, none too short to bear a query. Time is linear in the article.
    """
    pieces = _pieces(article, max_length)
    sizes = [_size(piece) for piece in pieces]
    best = [0.0] + [math.inf] * len(pieces)
    cut_before = [0] * (len(pieces) + 1)
    for end in range(1, len(pieces) + 1):
        inside = end < len(pieces) and not pieces[end - 1].endswith("\n")
        total = 0
        for start in range(end - 1, -1, -1):
            total += sizes[start]
            if total > max_length and start < end - 1:
                break
            cost = best[start] + (1 - total / max_length) ** 2
            cost += _MID_PARAGRAPH * inside + _TOO_SHORT * (total < SHORT)
            if cost < best[end]:
                best[end], cut_before[end] = cost, start
    contexts, end = [], len(pieces)
    while end:
        contexts.append("".join(pieces[cut_before[end] : end]))
        end = cut_before[end]
    return contexts[::-1]


def _size(piece: str) -> int:
    return size(piece, CHARACTERS_PER_UNIT)


def _pieces(article: str, max_length: int) -> list[str]:
    """What is not cut further: sentences, or parts of those that are too long; the tiniest glued together."""
    pieces: list[str] = []
    tiny = min(SHORT, max_length // 25)
    for paragraph in paragraphs(article):
        for sentence in sentences(paragraph):
            for part in [sentence] if _size(sentence) <= max_length else _hard_cut(sentence, max(1, max_length // 10)):
                if pieces and _size(pieces[-1]) < tiny and _size(pieces[-1] + part) <= max_length:
                    pieces[-1] += part
                else:
                    pieces.append(part)
    return pieces


def _hard_cut(sentence: str, limit: int) -> Iterator[str]:
    """Cuts a sentence between its units into parts of at most ``limit``, fine enough to choose the cuts among."""
    part, filled = "", 0
    for unit in units(sentence):
        for piece in re.findall(rf"\s*\S{{1,{limit * CHARACTERS_PER_UNIT}}}\s*", unit):
            if part and filled + _size(piece) > limit:
                yield part
                part, filled = "", 0
            part += piece
            filled += _size(piece)
    if part:
        yield part


def split_corpus(articles: Iterable[Article], max_length: int, quota_unit: int) -> Iterator[RootContext]:
    """The root contexts of all articles, in their order.

    The quota of a root context is one pair for each ``quota_unit`` of its length, rounded up.
    """
    root = 0
    for article in articles:
        start = 0
        for context in split_article(article.text, max_length):
            end, long = start + len(context), length(context)
            yield RootContext(root, article.number, start, end, long, max(1, math.ceil(long / quota_unit)), context)
            root, start = root + 1, end
