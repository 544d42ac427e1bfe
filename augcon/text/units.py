"""Units of text: length, sentences, words, language.

All of it works on Chinese (simplified and traditional), English and mixed text, in time linear in the
length of the text.
"""

import functools
import logging
import re
from typing import Literal

import jieba

jieba.setLogLevel(logging.WARNING)

Language = Literal["zh", "en"]

# Han with its extensions, kana, hangul, bopomofo, CJK and full-width punctuation; and the marks that Chinese
# shares with Latin text (curly quotes, dash, ellipsis, middle dot), but not the apostrophe inside a word.
# The ideographic space U+3000 is white space like any other.
_CJK = (
    "\u2e80-\u2fdf\u3001-\u303f\u3040-\u30ff\u3100-\u312f\u3130-\u318f\u31a0-\u31ff\u3200-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_SHARED = "“”‘’—…·"
_UNIT = re.compile(rf"(?:[^\s{_CJK}{_SHARED}]|(?<=[A-Za-z])’(?=[A-Za-z]))+|[{_CJK}{_SHARED}]")
_CJK_CHARACTER = re.compile(f"[{_CJK}]")


def length(text: str) -> int:
    """Length in AugCon's unit: one per CJK character, one per run of other non-space characters.

    CJK punctuation counts as a CJK character, so that pure Chinese text has its character count (as in
    the paper) and English text its word count.
    """
    return len(_UNIT.findall(text))


def language(text: str) -> Language:
    """The language of a text: ``zh`` when it has at least one CJK character for every two Latin words."""
    cjk, latin = cjk_and_latin(text)
    return "zh" if cjk and 2 * cjk >= latin else "en"


def cjk_and_latin(text: str) -> tuple[int, int]:
    """How many CJK characters and how many Latin words a text has."""
    return len(_CJK_CHARACTER.findall(text)), len(re.findall(r"[A-Za-z]+", text))


# Sentence ends. Full-width marks always end a sentence. ASCII marks do so before white space or a CJK
# character; a full stop must not belong to an abbreviation, an initial or "e.g. this".
_CLOSING = "”’」』）】》〉\"')\\]"
_SENTENCE_END = re.compile(
    rf"[。！？；…][。！？；…!?]*+[{_CLOSING}]*+\s*+"
    rf"|(?<![.!?])[.!?]++[{_CLOSING}]*+(?:\s++|(?=[{_CJK}])|\Z)"
)
_ABBREVIATION = re.compile(
    r"(?:^|[^A-Za-z])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|"
    r"Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|"
    r"vs|etc|al|cf|ca|approx|est|incl|resp|Fig|Figs|Eq|Sec|Ch|Vol|No|Nos|pp|Art|Ed|Eds|"
    r"Inc|Ltd|Co|Corp|Dept|Univ|Ave|Blvd|Rd|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)$"
)
_LONGEST_ABBREVIATION = 16


def size(text: str, characters: int) -> int:
    """The length of a text in which every ``characters`` of a run count as one unit more.

    Where a script writes without spaces and is not CJK (Thai, base64), ``length`` takes a page for a word.
    """
    return sum(-(-len(unit) // characters) for unit in _UNIT.findall(text))


def units(text: str) -> list[str]:
    """The units that ``length`` counts, each with the white space around it; joined, they give the text."""
    starts = [0, *[unit.start() for unit in _UNIT.finditer(text)][1:]]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def sentences(text: str) -> list[str]:
    """Cuts a text at its sentence ends; the pieces, joined, give back the text exactly.

    Closing quotes, brackets and white space after an end belong to the sentence before.
    """
    pieces, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        if end.group().startswith(".") and not _full_stop_ends(text, end):
            continue
        pieces.append(text[start : end.end()])
        start = end.end()
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _full_stop_ends(text: str, stop: re.Match[str]) -> bool:
    """Whether the ASCII full stop matched in ``text`` ends a sentence rather than an abbreviation."""
    if stop.end() == len(text) or "\n" in stop.group():
        return True
    if text[stop.end()].islower():
        return False
    return not _ABBREVIATION.search(text[max(0, stop.start() - _LONGEST_ABBREVIATION) : stop.start()])


# jieba itself cuts at everything outside this class and treats the blocks between one by one: cutting
# block by block gives its exact result, and lets the blocks that a tree repeats level by level be cached.
# Only a block longer than any context is cut short: jieba's time grows faster than the block.
_BLOCK = re.compile(r"[\u4e00-\u9fd5a-zA-Z0-9+#&._%\-]{1,500}|\S")


def words(text: str) -> list[str]:
    """The words of a text, as ``jieba.lcut`` cuts them, without white space."""
    return [word for block in _BLOCK.findall(text) for word in _block_words(block)]


@functools.lru_cache(maxsize=2**16)
def _block_words(block: str) -> tuple[str, ...]:
    return tuple(jieba.cut(block)) if len(block) > 1 else (block,)


def paragraphs(text: str) -> list[str]:
    """The lines of a text, each with its line end; lines without content go with the line before."""
    starts = [0, *[line.start() for line in re.finditer(r"^(?=[^\S\n]*\S)", text, re.MULTILINE)][1:]]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


# Line ends of other systems; marks that are no text: byte order mark, NUL and other control characters
# (tab and newline stay), zero-width spaces, lone surrogates, non-characters.
_LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029\v\f]")
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with ``\\n`` line ends and without characters that are no text (NUL, BOM, surrogates...)."""
    return _NO_TEXT.sub("", _LINE_ENDS.sub("\n", text))
