"""What is wrong with an answer (paper section 3.4; the patterns are in the prompt files), or with a question."""

import re
import unicodedata
from collections.abc import Sequence

import opencc
from rapidfuzz.distance import Indel

from augcon.data import Example, Query
from augcon.text.parse import Unparseable, bare_answer
from augcon.text.prompts import Prompts, all_checks, disarm
from augcon.text.units import cjk_and_latin, language, load_jieba

ALIKE = 0.9  # an answer whose characters are this similar counts as copied


def parse_answer(reply: str, query: Query, prompts: Prompts, shown: Sequence[Example] = ()) -> str:
    """The answer in a reply. Raises Unparseable if it cannot stand alone; ``shown`` are the prompt's examples."""
    answer = bare_answer(reply, query.text, prompts)
    if disarm(answer) != answer:
        raise Unparseable("control mark")
    if answer == query.text:
        raise Unparseable("only the question")
    if mentions_text(answer, query.context, query.text):
        raise Unparseable("speaks of the text")
    if is_refusal(answer, query.context):
        raise Unparseable("refusal")
    if _in_wrong_language(answer, query.text):
        raise Unparseable("wrong language")
    for example in shown:
        alike = Indel.normalized_similarity(answer, example.answer, score_cutoff=ALIKE)
        if alike and query.text != example.question:
            raise Unparseable("answer of an example")
    return answer


def points_at_text(question: str, context: str) -> bool:
    """Whether a question speaks of the text that it is about, so that nobody who has not read it can understand it."""
    found = (
        found for checks in all_checks() for pattern in checks.in_questions for found in pattern.finditer(question)
    )
    return mentions_text(question, context, "") or any(words.group().lower() not in context.lower() for words in found)


def mentions_text(answer: str, context: str, question: str) -> bool:
    """Whether an answer mentions the text it was made from, other than as its subject."""
    context, question = context.lower(), question.lower()
    for checks in all_checks():
        pointers = (found.group().lower() for pattern in checks.self_references for found in pattern.finditer(answer))
        if any(pointer not in question for pointer in pointers):
            return True
        for found in (found for pattern in checks.mentions for found in pattern.finditer(answer)):
            phrase = found.group().lower()
            noun = (found.groupdict().get("noun") or phrase).lower()
            is_subject = noun in question or (noun in checks.subjects and noun in context)
            if not is_subject and phrase not in context:
                return True
    return False


def is_refusal(answer: str, context: str) -> bool:
    """Whether an answer declines to answer. The context's own words do not count."""
    found = (pattern.search(answer) for checks in all_checks() for pattern in checks.refusals)
    return any(refusal.group().strip() not in context for refusal in found if refusal)


def _in_wrong_language(answer: str, question: str) -> bool:
    cjk, latin = cjk_and_latin(answer)
    if language(question) == "zh":
        return cjk == 0 and latin > 2  # one or two words may be a name
    return cjk > 2 * latin and cjk_and_latin(question)[0] == 0


_QUOTED = re.compile('[“"「『《]([^“”"「」『』《》]+)[”"」』》]')
_NUMBER = re.compile(r"\d++(?:,\d{3}(?!\d))*+(?:\.\d++)?+")
_RANK = re.compile(r"\d+(?:st|nd|rd|th|s|\s*世纪|\s*年代)(?![a-z])")  # often worked out from a year
_ONES = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|"
    "eighteen|nineteen"
)
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_DIGITS = {
    word: str(digit)
    for words, first in ((_ONES, 1), (_TENS, 2), ("一|二|三|四|五|六|七|八|九", 1), ("两", 2))
    for digit, word in enumerate(words.split("|"), first)
}
_DIGIT = "|".join(sorted(_DIGITS, key=len, reverse=True))
_NUMERAL = re.compile(
    rf"[〇零十百千万亿两一二三四五六七八九]+|\b(?:(?:{_DIGIT}|hundred|thousand|[mb]illion)\b[\s-]*(?:and )?)+"
)

_WORD = re.compile(r"(?:[A-Z]\.){2,}|[^\W\d_\u2e80-\U0003ffff]+")  # not Chinese
_SPELLED_OUT = re.compile(r"[A-Z]\w+(?:[ -](?:(?:of|and|the|for) )*[A-Z]\w+)+")
_OPENING = re.compile(r'(?:^|[.?!:;“"(])\s*$')
_NO_NAME = re.compile(
    "i|mr|mrs|ms|dr|ad|bc|am|pm|january|february|march|april|may|june|july|august|september|october|november|december|"
    "monday|tuesday|wednesday|thursday|friday|saturday|sunday"
)
_ONLY_IN_TITLES = re.compile("who|what|which|when|where|why|how|is|are|was|were|do|does|did|can", re.IGNORECASE)

_simplified = opencc.OpenCC("t2s").convert


def ungrounded(question: str, context: str) -> list[str]:
    """The names, numbers and quoted words of a question that its context does not hold.

    It would rather miss one than raise a false alarm. Names and quotes in another language than the context's, which
    may be translated, are not looked at.
    """
    chinese = language(question) == "zh"
    translated = language(question) != language(context)
    question, context = _plain(question), _plain(context)
    absent = _absent_numbers(question, context)
    if not translated:
        held = _compact(context)
        absent += [quoted for quoted in _QUOTED.findall(question) if _compact(quoted) not in held]
        question = _QUOTED.sub(" ", question)
        absent += _absent_words(question, context, chinese=chinese)
    if not translated and chinese:
        load_jieba()
        from jieba import posseg  # takes a second

        names = (word for word, tag in posseg.cut(question) if tag[:2] in {"nr", "ns", "nt", "nz"})
        absent += [name for name in names if len(name) > 1 and not set(name) <= set(context)]  # 北大 is 北京大学
    return list(dict.fromkeys(absent))


def _plain(text: str) -> str:
    """The text without accents, full-width forms and traditional characters."""
    bare = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    return str(_simplified(unicodedata.normalize("NFC", bare)))


def _compact(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def _absent_numbers(question: str, context: str) -> list[str]:
    """The numbers of two digits or more. Zeros are not compared, so that 3400 is 三千四百 or "34 hundred"."""
    numbers = [number for number in _NUMBER.findall(_RANK.sub("", question)) if len(re.sub(r"\D", "", number)) > 1]
    if not numbers:
        return []
    spelled = (
        "".join(_DIGITS.get(digit, "1") for digit in re.findall(rf"{_DIGIT}|^十", numeral))  # 十二 is 12, 二十 is 2
        for numeral in _NUMERAL.findall(context.lower())
    )
    held = {re.sub(r"\D|0", "", number) or "1" for number in (*_NUMBER.findall(context), *spelled)}
    return [number for number in numbers if (re.sub(r"\D|0", "", number) or "1") not in held]


def _absent_words(question: str, context: str, *, chinese: bool) -> list[str]:
    """In English capitalised words, in Chinese all foreign words but short ones, which may stand for Chinese ones."""
    asked = [
        word.group()
        for word in _WORD.finditer(question)
        if (len(word.group()) > 3 if chinese else word.group()[0].isupper())
        and (chinese or not _OPENING.search(question, 0, word.start()))
    ]
    if not asked or any(_ONLY_IN_TITLES.fullmatch(word) for word in asked):
        return []
    words = [word.replace(".", "") for word in _WORD.findall(context)]
    held, text = {word.lower() for word in words}, _compact(context)
    names = tuple(word.lower() for word in words if not word.islower())
    initials = ["".join(word[0] for word in words if len(word) > least).lower() for least in (0, 3)]
    spelled_out = " ".join(name for name in _SPELLED_OUT.findall(question) if re.sub("[^A-Z]", "", name) in words)

    def is_held(word: str) -> bool:
        key = word.replace(".", "").lower()
        if len(key) < 2 or key in held or (len(key) > 3 and key in text) or word in spelled_out:
            return True
        if word.isupper():
            return any(key in letters for letters in initials)
        stem = key[: max(3, len(key) - 3)]  # American, Americas: America
        return bool(_NO_NAME.fullmatch(key)) or any(name.startswith(stem) for name in names)

    return [word for word in asked if not is_held(word)]
