"""Reading English by its function words: terms, statements and actions."""

import re
from collections import defaultdict
from collections.abc import Iterator

from augcon.demo.rules.lexicon import Reading, Slots, Terms, rules

_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*|\d[\d,.]*|`[^`\n]{1,40}`|[^\sA-Za-z\d]")
_ARTICLES = {"a", "an", "the"}
_OWN = {"its", "their", "his", "her", "our", "my", "your"}
_BEFORE_NOUN = re.compile(
    r"a|an|the|its|their|his|her|our|my|your|of|in|on|at|by|from|with|without|into|onto|over|under|between|for"
)
_AFTER_NOUN = re.compile(
    r"of|is|are|was|were|has|have|had|can|could|must|will|would|may|should|that|which|who|and|or|to|with|than|if|\W.*"
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|has|have|had|can|must|will|may|should|would|could|does|do|did|needs?|means?|\w+ed)\b"
)


def read(prose: str) -> Reading:
    """What questions can be made of a sentence."""
    stop, generic = rules("en")["stop"], rules("en")["generic"]
    terms: Terms = []
    slots: Slots = defaultdict(list)
    words = _WORD.findall(prose)
    for start, end in _runs(words, stop):
        before = words[start - 1].lower() if start else ""
        after = words[end].lower() if end < len(words) else "."
        run = words[start:end]
        if (run[-1].endswith("s") and not _AFTER_NOUN.fullmatch(after)) or after in _ARTICLES | _OWN:
            run = words[start : end - 1]  # the last one is probably a verb
        if not _BEFORE_NOUN.fullmatch(before) or not run or end - start > 3:
            continue
        if run[-1].lower() in generic or len(run[-1]) < 3 or run[-1].lower().endswith(("ed", "ing", "ly")):
            continue
        article = f"{before} " if before in _ARTICLES else "the " if before in _OWN else ""
        term = article + " ".join(run)
        terms.append((term, 2.0 + len(run) + 2 * bool(article)))
        if article and start > 2 and words[start - 3].lower() == "to":
            verb = words[start - 2].lower()
            if verb.isalpha() and verb not in stop and not verb.endswith(("ed", "ing", "s")):
                slots["a"].append(f"{verb} {term}")
    statement = _en_statement(prose)
    if statement:
        slots["s"].append(statement)
    slots["p"] += re.findall(r"\b(?:Mr|Mrs|Ms|Dr|Professor)\.? [A-Z][a-z]+", prose)
    return Reading(terms, dict(slots))


def _runs(words: list[str], stop: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Runs of words that are neither function words nor punctuation nor numbers, as places."""
    start = None
    for i, word in enumerate([*words, "."]):
        content = (word[0].isalpha() or word[0] == "`") and word.lower() not in stop
        if content and start is None:
            start = i
        elif not content and start is not None:
            yield start, i
            start = None


def _en_statement(prose: str) -> str | None:
    """The sentence as a clause that can follow "that", if it stands alone."""
    sentence = re.sub(r"\s+", " ", prose).strip()
    if sentence.endswith("?") or any(mark in sentence for mark in '"“”{}[]|#:'):
        return None
    first, _, rest = sentence.rstrip(".;!").partition(" ")
    while first.lower().rstrip(",") in rules("en")["connectives"]:
        first, _, rest = rest.partition(" ")
    if rest.count(" ") > 18:
        rest = re.split(r"[,;—]", rest)[0]
    said = set(re.findall(r"[a-z]+", f"{first} {rest}".lower()))
    if not 4 <= rest.count(" ") <= 22 or not _VERB.search(rest) or said & rules("en")["dependent"]:
        return None
    if first.lower() in rules("en")["stop"]:
        first = first.lower()
    elif not re.fullmatch(r"(?:Mr|Mrs|Ms|Dr|Professor)\.?", first):
        return None  # a name or not? it could not follow "that" with the wrong capital
    return f"{first} {rest.rstrip(' ,;')}"
