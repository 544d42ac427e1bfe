"""How the demonstration engine reads a context: sentence by sentence, without markup."""

import functools
import re
from collections import defaultdict

from augcon.demo.rules import chinese, english
from augcon.demo.rules.lexicon import Reading, rules
from augcon.text import units as text
from augcon.text.units import Language

LONGEST_CONTEXT = 20_000  # characters of a context that are read; a corpus has far shorter ones
_LONGEST_SENTENCE = 2000

_MARKUP = re.compile(
    r"<!--.{0,500}?-->|</?(?:span|div|img|a|p|br|b|i|em|strong|code|pre|table|tr|td|th|h\d)\b[^<>\n]{0,200}>"
    r"|https?://\S{1,500}|\*\*|^```.*$|^[ \t　]*(?:#{1,6}|[>*+-]|\d{1,3}[.、)）])\s+"
    r"|^[ \t　]*第[一二三四五六七八九十百零〇\d]{1,8}[条章节款]\s*|[（(][一二三四五六七八九十\d]{1,3}[)）]",
    re.MULTILINE,
)
_LINK = re.compile(r"!?\[([^\]\n]{1,200})\]\([^)\n]{1,300}\)")
_SELF_MENTION = re.compile(
    r"(?:根据|按照|依据|正如|如)?(?:(?:本|该|这段|上述|以上)文本|文本(?=中|里|所)|本文(?!件|化|本)|文中|上文|下文(?!件|化)"
    r"|(?:上述|以上)内容|材料(?=[中里]))[中里]?(?:所[述说示]|提到|指出)?，?"
    r"|(?:according to |in |as )?\b(?:the|this) (?:text|passage|context|above)\b,?",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"[（(\[][^（）()\[\]]{0,80}[)）\]]")


def without_markup(sentence: str) -> str:
    """A sentence without Markdown, list marks, article numbers and addresses."""
    return _MARKUP.sub("", _LINK.sub(r"\1", sentence))


def plain(sentence: str, language: Language) -> str:
    """A sentence as prose that stands alone: no markup, whole, and without mention of the text itself."""
    prose = _SELF_MENTION.sub("", without_markup(sentence))
    prose = re.sub(r"\s+", " ", prose).strip().rstrip("，；、：,;:")
    if prose and prose[-1] not in "。！？；….!?;”’」』）)】》\"'":
        prose += "。" if language == "zh" else "."
    return prose


def content_words(part: str, language: Language) -> set[str]:
    """The words that carry meaning."""
    if language == "en":
        return set(re.findall(r"[a-z0-9][a-z0-9'-]*", part.lower())) - rules("en")["stop"]
    return {word for word in text.words(part) if len(word) > 1 or word.isdigit()} - rules("zh")["dependent"]


def read(part: str, language: Language) -> Reading:
    """What questions can be made of a part of a context; the terms best first."""
    part = part[:LONGEST_CONTEXT]
    weights: dict[str, float] = {}
    slots: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for sentence in text.sentences(part):
        reading = _read_sentence(sentence[:_LONGEST_SENTENCE], language)
        weights |= reading.terms
        for slot, values in reading.slots.items():
            slots[slot].update(dict.fromkeys(values))
    terms = ((term, weight * min(4, max(1, part.count(term)))) for term, weight in weights.items())
    best = sorted(terms, key=lambda item: -item[1])[:12]
    return Reading(best, {slot: list(values) for slot, values in slots.items() if values})


@functools.lru_cache(maxsize=2**15)
def _read_sentence(sentence: str, language: Language) -> Reading:
    prose = _BRACKETS.sub("", without_markup(text.clean(sentence)))
    return chinese.read(prose) if language == "zh" else english.read(prose)
