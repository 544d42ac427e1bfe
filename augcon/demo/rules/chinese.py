"""Reading Chinese by the parts of speech in jieba's dictionary: terms, statements, clauses to ask with."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import jieba

from augcon.demo.rules.lexicon import Reading, Slots, Terms, rules
from augcon.text import units as text

Token = tuple[str, str, int]  # word, part of speech, place in the clause

_CLAUSE = re.compile(r"(?:[^，。；：？！…\n“”‘’「」『』,;?!—]|(?<=\d),(?=\d)|“[^“”，。；？！\n]{1,14}”){2,60}[？?]?")
_CODE = re.compile(r"(`[^`\n]{1,40}`)")
_HEAD = {"n", "nz", "nt", "ns", "vn", "j", "eng", "code"}
_MODIFIER = _HEAD | {"b", "nrt", "nrfg"}
_SUBJECT = _MODIFIER | {"nr", "new", "f", "s", "an"}
_PREDICATE = {"v", "d", "p", "a", "vg", "ad", "zg"}
_NO_END = {"c", "p", "uj", "r", "u", "d", "m"}
_NUMBER = re.compile(
    r"(?<![第\d.一二三四五六七八九十百千万两年月.—-])(?:\d[\d,]*(?:\.\d+)?|[一二三四五六七八九十百千万两]{1,8})多?"
    r"(?=(?:元|块|个|人|名|户|家|台|岁|米|公里|平方米|斤|公斤|克|吨|天|年|小时|分钟|箱|份|种|套|间|层|毫米|倍|册|张|日内)(?!代|级))"
)
_PERCENT = re.compile(r"\d[\d.]*%|百分之[一二三四五六七八九十]+")
_TIME = re.compile(
    r"(?:\d{4}|[一二三四五六七八九〇○零]{4})年(?:[\d一二三四五六七八九十]{1,2}月)?(?:[\d一二三四五六七八九十]{1,3}日)?"
    r"|(?:去年|前年|今年)(?:春天|夏天|秋天|冬天|\d{1,2}月)?"
    r"|(?:早上|上午|中午|下午|晚上|凌晨)[\d一二三四五六七八九十两]{1,3}点(?:半|[\d一二三四五六七八九十]{1,3}分)?"
)
_UNFINISHED = re.compile("有的|[的之得地了在向对由]")
_DUTY = re.compile("应当|不得|必须|应该|可以|有权|负责")
_FINITE = re.compile("是|了|过|着|被|把|将|应当|不得|可以|必须|能|会|有|比")
_MODAL = re.compile("可以|应当|要|会|能|来|去|须|必须|想|不得|不能")
_OBLIGED = re.compile("应当|不得|必须|有权")
_JUDGEMENT = re.compile("是|不|才|最|更|比|能|会|只|可|要|没有|难|容易")
_PEOPLE = re.compile(".*(?:人|者|员|师|客|民|家长|院长|业主|店主|摊主|车主|房东|学生|医生|女士|先生|住户|用户|租户)")
_OFFICES = re.compile("部门|机关|机构|单位|政府|委员会|公司|法院|银行|学校|组织|企业")


@functools.cache
def _tags() -> dict[str, str]:
    """The part of speech of each word in jieba's dictionary (its most frequent one)."""
    with jieba.dt.get_dict_file() as lines:
        return {word: tag.strip() for word, _, tag in (line.decode().split(" ") for line in lines)}


def warm_up() -> None:
    """Loads what the first request would wait for."""
    jieba.initialize()
    _tags()


def read(prose: str) -> Reading:
    """What questions can be made of a sentence."""
    terms: Terms = []
    slots: Slots = defaultdict(list)
    for clause in _CLAUSE.findall(prose):
        clause = clause.strip(" 　*#|-·、")
        if clause[:1] == "“" and clause[-1] == "”":
            clause = clause[1:-1]
        tokens = _tokens(clause)
        chunks = list(_chunks(tokens))
        terms += _terms(tokens, chunks, clause)
        if clause and clause[-1] not in "？?":
            _clause_slots(slots, tokens, chunks, clause)
    slots["p"] += _people(prose)
    return Reading(terms, dict(slots))


def _tokens(clause: str) -> list[Token]:
    """The words of a clause. What stands between backticks is one word."""
    tokens, at = [], 0
    for piece in _CODE.split(clause):
        for word in [piece] if _CODE.fullmatch(piece) else text.words(piece):
            at = clause.index(word, at)
            tokens.append((word, _tag(word), at))
            at += len(word)
    return tokens


@functools.lru_cache(maxsize=2**16)
def _tag(word: str) -> str:
    """The part of speech; "new" for words that are not in the dictionary, such as names."""
    if word[0] == "`" and len(word) > 2:
        return "code"
    tag = _tags().get(word)
    if tag is None:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_+#-]{2,}", word):
            return "eng"
        return "new" if len(word) > 1 and "\u4e00" <= word[0] <= "\u9fff" else "x"
    if word in rules("zh")["verbs"]:
        return "v"
    if tag[0] == "n" and len(word) > 1 and word[0] in "每各某几两半":
        return "m"
    if tag[0] in "nv" and word[-1] in "里上下中内外时后前":
        return "f"
    return tag


def _chunks(tokens: list[Token]) -> Iterator[tuple[int, int]]:
    """Noun phrases, as places of their tokens: nouns and modifiers that end in a noun.

    One-character words do not begin one: they are mostly measure words.
    """
    after = 0
    while after < len(tokens):
        i = j = after
        while j < len(tokens) and tokens[j][1] in _MODIFIER:
            j += 1
        after = max(j, i + 1)
        while j > i and tokens[j - 1][1] not in _HEAD:
            j -= 1
        i = max(i, j - 4)
        while i < j and len(tokens[i][0]) == 1:
            i += 1
        if i < j:
            yield i, j


def _phrase(tokens: list[Token], clause: str, i: int, j: int) -> str:
    return clause[tokens[i][2] : tokens[j - 1][2] + len(tokens[j - 1][0])]


def _terms(tokens: list[Token], chunks: list[tuple[int, int]], clause: str) -> Iterator[tuple[str, float]]:
    """Terms with how much each says: rare words and longer phrases more."""
    for number, (i, j) in enumerate(chunks):
        weight = max(_rarity(word) for word, _, _ in tokens[i:j]) + min(j - i, 3)
        if all(tag == "vn" for _, tag, _ in tokens[i:j]) or clause.isascii():
            weight /= 2
        term = _phrase(tokens, clause, i, j)
        if weight > 4 and len(term) <= 24:
            yield term, weight
        if number + 1 < len(chunks) and j + 1 == chunks[number + 1][0] and tokens[j][0] == "的":
            _head, end = chunks[number + 1]
            longer = _phrase(tokens, clause, i, end)
            if len(longer) <= 12 and weight > 4 and _rarity(tokens[end - 1][0]) > 0:
                yield longer, weight + 1


@functools.lru_cache(maxsize=2**16)
def _rarity(word: str) -> float:
    if word in rules("zh")["generic"]:
        return -5.0
    frequency = jieba.dt.FREQ.get(word, 0)
    if frequency < 25 and len(word) == 2 and not word.isascii():  # mostly two words that make no term
        return 3.0
    return math.log(1e6 / (frequency + 300))


def _clause_slots(slots: Slots, tokens: list[Token], chunks: list[tuple[int, int]], clause: str) -> None:
    """What a clause offers besides terms."""
    for i, j in chunks:
        action = _action(tokens, i, j, clause)
        if action:
            slots["a"].append(action)
    if chunks and chunks[0][0] == 0 and tokens[chunks[0][1] :] and _OBLIGED.match(tokens[chunks[0][1]][0]):
        slots["k"].append(_phrase(tokens, clause, *chunks[0]))
    start = _subject(tokens)
    statement = clause[tokens[start][2] :] if start is not None else ""
    statement = statement if statement.count("“") == statement.count("”") else ""
    if 7 <= text.length(statement) <= 26:
        slots["o" if _DUTY.search(statement) else "j" if _JUDGEMENT.search(statement) else "s"].append(statement)
        asked, count = _TIME.subn("什么时候", statement, count=1)
        if count and not asked.endswith("什么时候"):
            slots["w"].append(asked)
        slots["q"] += _without_object(tokens, chunks, clause, start)
        slots["z"] += _without_subject(tokens, chunks, clause, start)
    rest = _without_connectives(tokens)
    bare = "" if statement or not rest or _depends(rest) else clause[rest[0][2] :]
    if 7 <= text.length(bare) <= 22 and not _UNFINISHED.match(bare):
        slots["r" if rest[0][1] in _PREDICATE else "c"].append(bare)
    numbered = statement or bare
    for mark, asked in ((_PERCENT, "百分之多少"), (_NUMBER, "多少")):
        found = mark.search(numbered)
        if found and found.group() not in "一两" and 5 <= len(numbered) <= 30:
            question = f"{numbered[: found.start()]}{asked}{numbered[found.end() :]}"
            slots["n" if statement else "m"].append(question)
            break


def _action(tokens: list[Token], i: int, j: int, clause: str) -> str | None:
    """A verb of two characters and the noun phrase after it, at the end of the clause."""
    verb, tag, at = tokens[i - 1] if i else ("", "", 0)
    before = tokens[i - 2] if i > 1 else ("", "c", 0)
    fits = before[1] in ("c", "d") or _MODAL.fullmatch(before[0])
    fits = fits and tag == "v" and verb not in rules("zh")["light_verbs"]
    if not fits or len(verb) != 2 or j < len(tokens) or _rarity(tokens[-1][0]) <= 0:
        return None
    return clause[at:] if len(clause) - at <= 11 else None


def _depends(tokens: list[Token]) -> bool:
    """Whether a clause needs what stands around it to be a statement."""
    words = [word for word, _, _ in tokens]
    if tokens[-1][1] in _NO_END or words[-1] in rules("zh")["no_end"] or not rules("zh")["dependent"].isdisjoint(words):
        return True
    if words.count("《") != words.count("》") or words.count("“") != words.count("”"):
        return True
    if "的" not in words or _FINITE.search("".join(words)):
        return False
    after = len(words) - words[::-1].index("的")  # "what he bought at the market": a noun phrase
    return all(tag in _SUBJECT for _, tag, _ in tokens[after:])


def _without_connectives(tokens: list[Token]) -> list[Token]:
    """The tokens from the first that is no connective, time word or mark."""
    connectives = rules("zh")["connectives"]
    start = 0
    while start < len(tokens) and (tokens[start][0] in connectives or tokens[start][1] in ("c", "x", "t")):
        start += 1
    return tokens[start:]


def _subject(tokens: list[Token]) -> int | None:
    """Where the statement begins, if the clause has subject and predicate and stands alone."""
    start = i = len(tokens) - len(_without_connectives(tokens))
    while i < len(tokens) and (tokens[i][1] in _SUBJECT or (i > start and tokens[i][0] == "的")):
        i += 1
    if i == start or len(tokens) < i + 2 or tokens[i][1] not in _PREDICATE or len(tokens[start][0]) == 1:
        return None
    if tokens[i - 1][0] == "的" or not any(tag in ("v", "a") for _, tag, _ in tokens[i:]):
        return None
    if i == start + 1 and tokens[start][0] in rules("zh")["generic"]:
        return None
    return None if _depends(tokens) else start


def _without_object(
    tokens: list[Token], chunks: list[tuple[int, int]], clause: str, start: int | None
) -> Iterator[str]:
    """The statement with what? in place of the noun phrase at its end."""
    i, j = chunks[-1] if chunks else (0, 0)
    verb = i - 1 if i and tokens[i - 1][0] not in ("了", "着", "过") else i - 2
    if j == len(tokens) and verb > (start or 0) + 1 and tokens[verb][1] == "v" and tokens[verb][0] not in "是有":
        word = "什么人" if _PEOPLE.fullmatch(tokens[-1][0]) else "什么"
        yield clause[tokens[start or 0][2] : tokens[i][2]] + word


def _without_subject(
    tokens: list[Token], chunks: list[tuple[int, int]], clause: str, start: int | None
) -> Iterator[str]:
    """The statement with who? in place of its subject, where that is people or an office."""
    for i, j in chunks:
        if i == start and j < len(tokens) and tokens[j][1] in _PREDICATE and tokens[j][0] not in "是有":
            office = _OFFICES.search(tokens[j - 1][0])
            if office or _PEOPLE.fullmatch(tokens[j - 1][0]):
                yield (f"哪个{office.group()}" if office else "什么人") + clause[tokens[j][2] :]


def _people(prose: str) -> Iterator[str]:
    """Surnames with titles."""
    titles = "|".join(sorted(rules("zh")["titles"]))
    for name in re.findall(rf"(?<![\u4e00-\u9fff])[\u4e00-\u9fff](?:{titles})", prose):
        if (
            name[0] not in "位名个的是老女男各请找问和与对跟向叫让被把给小大一二两多好该他她我你您"
            and name[:2] != "店主"
        ):
            yield name
