"""What a model wrote → an answer that stands alone, or a grade, or the reason why not (paper section 3.4)."""

import functools
import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Indel

from augcon.text.parse import Unparseable, label_line, without_thinking
from augcon.text.prompts import Prompts, disarm
from augcon.text.units import cjk_and_latin, language

ALIKE = 0.9  # similarity by characters from which an answer counts as parroted


def parse_answer(
    reply: str, context: str, question: str, prompts: Prompts, shown: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The answer, without label, checked; ``shown`` are the (context, question, answer) that it was asked with.

    Raises Unparseable with what is wrong: empty, thinking not ended, control mark, speaks of the text,
    refusal, wrong language, answer of an example.
    """
    answer = bare_answer(reply, question, prompts)
    if disarm(answer) != answer:
        raise Unparseable("control mark")
    if mentions_text(answer, context, question):
        raise Unparseable("speaks of the text")
    if is_refusal(answer, context):
        raise Unparseable("refusal")
    if _in_wrong_language(answer, question):
        raise Unparseable("wrong language")
    for _, asked, told in shown:
        if question != asked and Indel.normalized_similarity(answer, told, score_cutoff=ALIKE):
            raise Unparseable("answer of an example")
    return answer


def bare_answer(reply: str, question: str, prompts: Prompts) -> str:
    """The answer without thinking block, repeated question and label. Raises Unparseable where nothing is left."""
    visible = without_thinking(reply).strip()
    if not visible and reply.strip():
        raise Unparseable("thinking not ended")
    labels = "|".join(re.escape(label) for label in (prompts.labels.question, "问题", "Question"))
    first, _, rest = visible.partition("\n")
    if (echo := label_line(labels).match(first)) and first[echo.end() :].strip(" *") == question:
        visible = rest.strip()
    labels = "|".join(re.escape(label) for label in (prompts.labels.answer, "答案", "回答", "答", "Answer"))
    if label := label_line(labels).match(visible):
        visible = visible[label.end() :].strip()
        if visible.count("**") % 2:  # the label stood inside the bold text
            visible = visible.removesuffix("**").rstrip()
    if not re.search(r"\w", visible):
        raise Unparseable("empty")
    return visible


# Mentions of the text that the answer was made from. A word such as 文章 or "context" may as well belong to the
# subject. So the end of a longer word (论文中, 短信文本) is none, and a phrase is forgiven where the question uses its
# noun, or where the context uses the phrase itself. Words by which a text points to itself (本文, "as mentioned
# above") are not forgiven for being copied from it.

_APART = r"(?:(?<![一-鿿])|(?<=[在从据如按照与和由见自于是]))"  # not the end of a longer word
_THIS = rf"(?:{_APART}|(?<=[这该此篇段份整全的]))"
_FROM = "(?:根据|依据|按照|依照|基于|结合|参照|从|据|由)"
_ABOVE = "(?:以上|上述|上面|前述|给定|所给|给出|提供|所提供)"
_NOUN = "(?P<noun>上下文|语境|文本|原文|文段|段落|文章|材料|资料|片段)"
_CITES = (
    "[并也还又只仅已曾则都]?(?:主要|特别|反复)?(?:没有|没|未|未能)?(?:明确|直接|具体|详细)?"
    "(?:提到|提及|提供|指出|说明|说到|讲到|介绍|描述|显示|表明|认为|强调|写道|写明|记载|叙述|给出|涉及|交代|谈到|谈及|"
    "列出|列举|所述|所说|所示|所提|所讲)"
)
_GIVEN = "(?:above|given|provided|supplied|preceding|following|source|original)"
_TEXT = "(?P<noun>text|passage|context|excerpt|paragraph|snippet|article|document|material|author)"
_SAYS = (
    r"(?:says?|states?|stated|mentions?|mentioned|notes?|describes?|explains?|indicates?|suggests?|provides?|shows?"
    r"|discuss(?:es)?|emphasi[sz]es?|highlights?|points? out|tells?|specif(?:y|ies)|impl(?:y|ies)|argues?|claims?"
    r"|recommends?|refers?|do(?:es)? not|do(?:es)?n['’]t)"
)

_POINTS_TO_ITSELF = [
    rf"{_APART}[上前下后]文(?=[中里所提说讲指的已述介曾可给，,])",
    rf"{_APART}本文(?=[中里所将的是介认指提主旨说讲描讨从以通还并内作，,])",
    rf"{_APART}文中(?![心华子])",
    rf"{_APART}笔者",
    r"\bas (?:(?:was|is|has been|we have) )?(?:mentioned|noted|stated|described|discussed|explained|shown|seen|said"
    r"|indicated) (?:above|earlier|previously|before|below)\b",
]
_MENTIONS = [
    rf"{_FROM}(?P<noun>上下文|语境|文本|原文|文段|段落|文章)",
    rf"{_FROM}(?P<noun>材料|资料|内容)(?=[，,中里所来看可]|显示|提到|介绍|描述)",
    rf"(?:{_FROM}{_ABOVE}|给定|所给|以上)的?{_NOUN}",
    rf"{_FROM}{_ABOVE}的?(?P<noun>内容|信息|文字|描述)",
    r"(?:这段|该段|此段|这篇|该篇|这份)(?P<noun>文字|文本|文段|文章|材料|内容|描述|资料|话)",
    r"(?<![应因])[该此](?P<noun>文)(?=指出|认为|提到|提及|说明|强调|介绍|写道|主张)",
    rf"{_APART}根据(?P<noun>描述|题目)(?=[，,可中里所])",
    rf"{_APART}(?P<noun>原文|文章)说",
    r"(?<![应因])[该此](?P<noun>文本|段落|文段|文章|片段)",
    rf"{_THIS}{_NOUN}(?:中|里|内|之中)?{_CITES}",
    rf"{_APART}(?P<noun>上下文|文本|原文|文段|文章)[中里]",
    rf"{_THIS}(?P<noun>作者)在?[并也还又曾则]?(?:认为|指出|提到|强调|说|写道|主张|建议|介绍|表示|文中|文章中)",
    rf"\b(?:according to|based on|per) (?:the|this|that) (?:{_GIVEN} )?{_TEXT}s?\b",
    r"\b(?:stated|mentioned|described|noted|explained|discussed|shown|outlined|indicated|seen|provided|given|listed)"
    rf" in (?:the|this|that) (?:{_GIVEN} )?{_TEXT}s?\b(?! of\b)",
    rf"\b(?:the|this) (?:{_GIVEN} )?{_TEXT} (?:itself |also |only |\w+ly )?{_SAYS}\b",
    r"\b(?:in|from) (?:the|this) (?P<noun>text|passage|excerpt|article)\b(?! (?:message|box|field|editor|file|area))",
    rf"\b(?:the|this) {_GIVEN} (?P<noun>text|passage|context|excerpt|article|document|material|information)\b",
    r"\bthe (?P<noun>text|passage|context|excerpt) (?:provided|given|above)\b",
    r"\b(?:based on|according to|from) the (?P<noun>information|material|details) (?:provided|given|above)"
    r"(?! (?:by|to|in|on|for|with|at|from))\b",
]
_ABOUT_LANGUAGE = {"上下文", "语境", "context"}  # a text that uses these words itself is about them


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def mentions_text(answer: str, context: str, question: str) -> bool:
    """Whether an answer speaks of the text that it was made from."""
    context, question = context.lower(), question.lower()
    for pattern in _POINTS_TO_ITSELF:
        if any(mention.group().lower() not in question for mention in _compiled(pattern).finditer(answer)):
            return True
    for pattern in _MENTIONS:
        for mention in _compiled(pattern).finditer(answer):
            noun, phrase = mention["noun"].lower(), mention.group().lower()
            is_subject = noun in question or (noun in _ABOUT_LANGUAGE and noun in context)
            if not is_subject and phrase not in context:
                return True
    return False


# Refusals open an answer, or speak as an AI. "抱歉" inside a story is none, nor is what the context itself says.
_SORRY = r"\A我?(?:很|非常|十分|深感|感到)*(?:抱歉|遗憾|对不起|不好意思)[，,。！!\s]*"
_UNABLE = r"(?:无法|不能|没法|没办法|没有办法|不便|难以|不会)(?:直接|准确|继续|为[您你])*"
_DO = "(?:回答|作答|答复|提供|协助|帮助|帮[您你]|满足|完成|讨论|给出|判断|处理|确定|参与)"
_I_AM_UNABLE = r"(?:can(?:not| not|['’]t)|(?:am|['’]m) (?:not able|unable) to|won['’]t|will not)"
_REFUSALS = [
    rf"{_SORRY}[^。！？\n]{{0,15}}?(?:{_UNABLE}|没有(?:足够|相关|提供|找到)|不(?:清楚|知道|了解|确定))",
    rf"\A(?:我|[这该此]个?问题|[您你]的问题)[^。！？，,\n]{{0,6}}{_UNABLE}{_DO}",
    r"作为(?:[^，。；！？\n]{0,20}(?:AI|人工智能|语言模型|助手|助理|大模型|机器人)|一个模型)[，,]?\s*我",
    r"(?:没有|缺乏|缺少|未提供)[^。，！？\n]{0,8}信息(?:来|以|可以|能够)?(?:回答|作答|判断|确定)",
    rf"\A(?:(?:I['’]m|I am|we['’]re|we are)\s+)?(?:(?:so|very|really|truly) )?sorry,? (?:but|I {_I_AM_UNABLE})",
    rf"\A(?:I apologi[sz]e|my apologies|unfortunately),? (?:but )?I ?{_I_AM_UNABLE}",
    rf"\AI ?{_I_AM_UNABLE} (?:help|assist|answer|provide|comply|fulfil+|do that|discuss|engage|determine|continue)",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)(?: (?:language )?(?:model|assistant))?,? I\b",
    r"(?:\bnot|n['’]t) (?:contain |provide |have |give )?(?:enough|sufficient) information to (?:answer|say|determ)",
]


def is_refusal(answer: str, context: str) -> bool:
    """Whether an answer declines to answer."""
    found = (_compiled(pattern).search(answer) for pattern in _REFUSALS)
    return any(refusal.group().strip() not in context for refusal in found if refusal)


def _in_wrong_language(answer: str, question: str) -> bool:
    """Whether a Chinese question got a sentence without any Chinese, or an English one mainly Chinese."""
    cjk, latin = cjk_and_latin(answer)
    if language(question) == "zh":
        return cjk == 0 and latin >= 3  # two words may be a name
    return cjk > 2 * latin and cjk_and_latin(question)[0] == 0


_MARKUP = str.maketrans("", "", '*_`#>【】[]"“”')


def parse_grade(reply: str, labels: Sequence[str], lowest: int = 1, highest: int = 10) -> int:
    """The grade that a reply consists of: a whole number, perhaps with a label, markup and "分" or "/10".

    Raises Unparseable for anything else: a number that stands among other words is no grade.
    """
    plain = unicodedata.normalize("NFKC", without_thinking(reply)).translate(_MARKUP).strip()
    names = "|".join(re.escape(label) for label in labels)
    grade = re.fullmatch(
        rf"(?:(?:{names})\s*(?:[:：]|是|为|\bis\b)?\s*)?(\d{{1,2}})\s*(?:/\s*{highest}|分)?[.。]?", plain, re.I
    )
    if not grade or not lowest <= int(grade.group(1)) <= highest:
        raise Unparseable("no grade")
    return int(grade.group(1))


GRADE_LABELS = ("评分", "分数", "得分", "打分", "Grade", "Score", "Rating")
