"""Articles → root contexts with their quota (paper section 3.2; how an article is cut is AugCon's own)."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator

from augcon.data import Article, RootContext
from augcon.text.units import CHARACTERS_PER_UNIT, length, paragraphs, sentences, size, units

SHORT = 20  # a shorter context yields no query (the paper's λ), so it is avoided where possible
_MID_PARAGRAPH = 1.0  # cost of a cut inside a paragraph, in units of one empty context
_TOO_SHORT = 2.0


def split_article(article: str, max_length: int) -> list[str]:
    """Cuts an article into contexts of at most ``max_length``; joined in order, they give it back exactly.

    Cuts fall at the ends of paragraphs, else of sentences, and inside a sentence only if it is too long. They are
    chosen together, as a typesetter breaks a paragraph into lines: few and evenly filled contexts, whole paragraphs
    where possible, none too short to yield a query.
    """
    pieces = _pieces(article, max_length)
    sizes = list(map(size, pieces))
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


def _pieces(article: str, max_length: int) -> list[str]:
    """What is not cut further: sentences, or parts of very long ones; tiny ones are joined."""
    pieces: list[str] = []
    tiny, fine = min(SHORT, max_length // 25), max(1, max_length // 10)
    for sentence in itertools.chain.from_iterable(map(sentences, paragraphs(article))):
        for part in [sentence] if size(sentence) <= max_length else _hard_cut(sentence, fine):
            if pieces and size(pieces[-1]) < tiny and size(pieces[-1] + part) <= max_length:
                pieces[-1] += part
            else:
                pieces.append(part)
    return pieces


def _hard_cut(sentence: str, fine: int) -> Iterator[str]:
    """Cuts a sentence between units into parts of about ``fine``, small enough to choose good cuts among."""
    run = re.compile(rf"\s*\S{{1,{fine * CHARACTERS_PER_UNIT}}}\s*")
    pieces = [piece for unit in units(sentence) for piece in run.findall(unit)]
    before = itertools.accumulate(map(size, pieces), initial=0)
    for _, part in itertools.groupby(zip(pieces, before, strict=False), lambda placed: placed[1] // fine):
        yield "".join(piece for piece, _ in part)


def split_corpus(articles: Iterable[Article], max_length: int, quota_unit: int) -> Iterator[RootContext]:
    """The root contexts of all articles in order, each with a quota of one pair per ``quota_unit`` of its length."""
    root = 0
    for article in articles:
        start = 0
        for context in split_article(article.text, max_length):
            end, long = start + len(context), length(context)
            quota = max(1, math.ceil(long / quota_unit))
            yield RootContext(root, article.number, start, end, long, quota, context, article.title)
            root, start = root + 1, end
