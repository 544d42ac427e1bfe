"""What is wrong with an answer (paper section 3.4). The patterns are in the prompt files."""

from collections.abc import Sequence

from rapidfuzz.distance import Indel

from augcon.data import Example, Query
from augcon.text.parse import Unparseable, bare_answer
from augcon.text.prompts import Prompts, all_checks, disarm
from augcon.text.units import cjk_and_latin, language

ALIKE = 0.9  # an answer whose characters are this similar counts as copied


def parse_answer(reply: str, query: Query, prompts: Prompts, shown: Sequence[Example] = ()) -> str:
    """The answer in a reply. Raises Unparseable if it cannot stand alone; ``shown`` are the prompt's examples."""
    answer = bare_answer(reply, query.text, prompts)
    if disarm(answer) != answer:
        raise Unparseable("control mark")
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
