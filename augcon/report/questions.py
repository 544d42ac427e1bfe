"""What kind of question it is, by the word that it asks with, in Chinese and English."""

import re

_KINDS = {
    "how many": r"how (?:many|much|long|often|far|old)\b|多少|多久|多长|多大|多远|几(?!乎|何)",
    "why": r"why\b|为什么|为何|何以|为啥|什么原因",
    "how": r"how\b|怎么|怎样|如何|怎",
    "when": r"when\b|什么时候|什么时间|何时|哪一?[年天月]",
    "where": r"where\b|什么地方|哪里|哪儿|何处",
    "who": r"who(?:m|se)?\b|谁|什么人",
    "which": r"which\b|哪",
    "what": r"what\b|什么|何",
}
KINDS = (*_KINDS, "yes or no", "other")
_ASKING = re.compile("|".join(f"(?P<k{n}>{pattern})" for n, pattern in enumerate(_KINDS.values())), re.IGNORECASE)
_YES_OR_NO = re.compile(
    r"\W*(?:is|are|was|were|am|do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must)\b"
    r"|.*(?:是否|能否|可否|会不会|是不是|有没有|能不能|吗[？?]?\s*$)",
    re.IGNORECASE | re.DOTALL,
)
_WORD_BEFORE = re.compile(r"(?<![a-z])", re.IGNORECASE)


def kind_of(question: str) -> str:
    """One of ``KINDS``. An English question that begins with a verb is "yes or no" whatever else it asks."""
    if _YES_OR_NO.match(question):
        return "yes or no"
    for found in _ASKING.finditer(question):
        if _WORD_BEFORE.match(question, found.start()):
            return KINDS[int(str(found.lastgroup)[1:])]
    return "other"
