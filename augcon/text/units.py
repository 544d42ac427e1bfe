"""Units of Chinese, English and other text: length, sentences, words, language. All take time linear in the text."""

import functools
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

Language = Literal["zh", "en"]

# Han with its extensions, kana, hangul, bopomofo, CJK and full-width punctuation, but not the ideographic space U+3000;
# and the marks that Chinese shares with Latin text, but not the apostrophe inside a word.
_CJK = (
    "\u2e80-\u2fdf\u3001-\u303f\u3040-\u30ff\u3100-\u312f\u3130-\u318f\u31a0-\u31ff\u3200-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_SHARED = "“”‘’—…·"
# Thai, Lao, Tibetan, Burmese and Khmer put no space between words. Marks stay with the letter that they stand on.
_SPACELESS = "\u0e00-\u109f\u1780-\u17ff"
_MARKS = "".join(filter(lambda letter: unicodedata.category(letter)[0] == "M", map(chr, range(0x0E00, 0x1800))))
_UNIT = re.compile(
    rf"(?:[^\s{_CJK}{_SHARED}{_SPACELESS}]|(?<=[A-Za-z])’(?=[A-Za-z]))+|[{_CJK}{_SHARED}]"
    rf"|[{_SPACELESS}]{{1,5}}[{_MARKS}]*+"
)
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
CHARACTERS_PER_UNIT = 12  # in a run without spaces, for ``size``


def length(text: str) -> int:
    """The length in AugCon's unit: one per CJK character (punctuation too), one per run of other non-space characters.

    In scripts that put no space between words, such as Thai, every five characters stand for a word.
    So pure Chinese text has the length that the paper gives it, its characters; and English text has its words.
    """
    return len(_UNIT.findall(text))


def size(text: str) -> int:
    """The length, but with long runs counted more than once: a page of base64 is a single run."""
    return sum(1 + (len(unit) - 1) // CHARACTERS_PER_UNIT for unit in _UNIT.findall(text))


def language(text: str) -> Language:
    """The language of a text: ``zh`` if it has at least one CJK character for every two Latin words."""
    cjk, latin = cjk_and_latin(text)
    return "zh" if cjk and 2 * cjk >= latin else "en"


def cjk_and_latin(text: str) -> tuple[int, int]:
    """The numbers of CJK characters and of Latin words in a text."""
    return len(_CJK_CHARACTER.findall(text)), len(re.findall(r"[A-Za-z]+", text))


def units(text: str) -> list[str]:
    """The units that ``length`` counts, each with the white space around it. Joined, they give back the text."""
    return _cut(text, [unit.start() for unit in _UNIT.finditer(text)][1:])


def paragraphs(text: str) -> list[str]:
    """The lines of a text, each with its line end; a blank line belongs to the line before it."""
    return _cut(text, [line.start() for line in re.finditer(r"^(?=[^\S\n]*\S)", text, re.MULTILINE)][1:])


def _cut(text: str, places: Iterable[int]) -> list[str]:
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


# Full-width marks and those of Khmer, Burmese and Tibetan always end a sentence. ASCII marks do so before white space
# or a CJK character; a full stop must not belong to an abbreviation, an initial or "e.g. this". In Thai and Lao a space
# does, except before the sign of repetition.
_MARK = "。！？；…។៕။།༎"
_CLOSING = "”’」』）】》〉\"')\\]"
_SENTENCE_END = re.compile(
    rf"[{_MARK}][{_MARK}!?]*+[{_CLOSING}]*+\s*+"
    rf"|(?<![.!?])[.!?]++[{_CLOSING}]*+(?:\s++|(?=[{_CJK}])|\Z)"
    "|(?<=[\u0e00-\u0eff]) ++(?=[\u0e00-\u0eff])(?![ๆໆ])"
)
_ABBREVIATION = re.compile(
    r"(?<![A-Za-z])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|"
    r"Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|"
    r"vs|etc|al|cf|ca|approx|est|incl|resp|Fig|Figs|Eq|Sec|Ch|Vol|No|Nos|pp|Art|Ed|Eds|"
    r"Inc|Ltd|Co|Corp|Dept|Univ|Ave|Blvd|Rd|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its closing quotes and the white space after it."""
    ends = [end.end() for end in _SENTENCE_END.finditer(text) if _ends_sentence(text, end)]
    return [sentence for sentence in _cut(text, ends) if sentence]


def _ends_sentence(text: str, mark: re.Match[str]) -> bool:
    if not mark.group().startswith(".") or "\n" in mark.group() or mark.end() == len(text):
        return True
    return not text[mark.end()].islower() and not _ABBREVIATION.search(text, max(0, mark.start() - 16), mark.start())


# jieba cuts such blocks one by one; so do these functions, to cache what a tree repeats level by level. A block longer
# than any context is cut short, because jieba's time grows faster than the block.
_BLOCK = re.compile(r"[\u4e00-\u9fd5a-zA-Z0-9+#&._%\-]{1,500}|\S")


def words(text: str) -> list[str]:
    """The words of a text, as ``jieba.lcut`` cuts them, without white space."""
    return [word for block in _BLOCK.findall(text) for word in _block_words(block)]


@functools.lru_cache(maxsize=2**16)
def _block_words(block: str) -> tuple[str, ...]:
    return tuple(load_jieba().cut(block)) if len(block) > 1 else (block,)


@functools.cache
def load_jieba() -> Any:
    """jieba, where it is needed, since it takes a while, and without its messages about that.

    It would keep its dictionary in the folder for temporary files, and take what anyone else has put there for it.
    """
    import jieba

    jieba.setLogLevel(logging.WARNING)
    jieba.dt.FREQ, jieba.dt.total = jieba.dt.gen_pfdict(jieba.dt.get_dict_file())
    jieba.dt.initialized = True
    return jieba


# Control characters (tab and newline stay), zero-width spaces, byte order marks, lone surrogates, non-characters.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with ``\\n`` as its only line end, and without characters that are no text."""
    return _NO_TEXT.sub("", re.sub("\r\n?|[\u0085\u2028\u2029\v\f]", "\n", text))
