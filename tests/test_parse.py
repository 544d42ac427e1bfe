"""What a model wrote → the query and the halves, an answer, a grade or a verdict, or the reason why there is none."""

import contextlib
import json
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from augcon.data import Grades, Query, Split
from augcon.text.checks import parse_answer
from augcon.text.parse import (
    Unparseable,
    bare_answer,
    parse_focus,
    parse_grade,
    parse_grades,
    parse_question,
    parse_split,
    parse_verdict,
)
from augcon.text.prompts import load_prompts
from augcon.text.units import Language, clean

ZH, EN = load_prompts("zh"), load_prompts("en")
BY_HAND = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "replies_by_hand.jsonl").read_text("utf-8").splitlines()
]
Q, A, B = "面包店为什么六点开门？", "面包店早上六点开门。", "因为工人要吃早饭。"
FORM = f"问题：{Q}\n片段1：{A}\n片段2：{B}"

# Replies that all say Q, A, B
UGLY = {
    "as asked": FORM,
    "line end after labels": f"问题：\n{Q}\n\n片段1：\n{A}\n\n片段2：\n{B}",
    "ASCII colons": FORM.replace("：", ":"),
    "spaces around": f"  问题 ： {Q}  \n\t片段1 ：{A} \n片段2： {B}\n\n",
    "bold labels": f"**问题**：{Q}\n**片段1**：{A}\n**片段2**：{B}",
    "bold labels with the colon": f"**问题：**{Q}\n**片段1：** {A}\n**片段2：** {B}",
    "bold lines": f"**问题：{Q}**\n**片段1：{A}**\n**片段2：{B}**",
    "bold italics": f"***问题***：{Q}\n__片段1__：{A}\n*片段2*：{B}",
    "headings": f"### 问题\n{Q}\n### 片段1\n{A}\n### 片段2\n{B}",
    "bold headings": f"## **问题**\n\n{Q}\n\n## **片段1**\n\n{A}\n\n## **片段2**\n\n{B}",
    "bullets": f"- 问题：{Q}\n- 片段1：{A}\n- 片段2：{B}",
    "starred bullets": f"* **问题**：{Q}\n* **片段1**：{A}\n* **片段2**：{B}",
    "round bullets": f"• 问题：{Q}\n• 片段1：{A}\n• 片段2：{B}",
    "numbers": f"1. 问题：{Q}\n2. 片段1：{A}\n3、片段2：{B}",
    "quoted": f"> 问题：{Q}\n> 片段1：{A}\n> 片段2：{B}",
    "brackets": f"【问题】：{Q}\n【片段1】{':'}{A}\n[片段2]：{B}",
    "brackets alone": f"【问题】\n{Q}\n【片段1】\n{A}\n【片段2】\n{B}",
    "spaced numbers": f"问题：{Q}\n片段 1：{A}\n片段 2：{B}",
    "other numbers": f"问：{Q}\n片段一：{A}\n片段②：{B}",
    "other labels": f"提问：{Q}\n上下文1：{A}\n上下文2：{B}",
    "English labels": f"Question: {Q}\nContext 1: {A}\nContext 2: {B}",
    "talk before": f"好的，我来完成这个任务：\n\n{FORM}",
    "talk with the word": f"这个问题是这样的。\n片段1和片段2如下。\n{FORM}",
    "fence": f"```\n{FORM}\n```",
    "fence with a name": f"```text\n{FORM}\n```",
    "rules between": f"---\n问题：{Q}\n---\n片段1：{A}\n---\n片段2：{B}\n---",
    "rules at the end": f"{FORM}\n***\n===\n\n---",
    "CRLF": FORM.replace("\n", "\r\n"),
    "line separators": FORM.replace("\n", "\u2028"),
    "control characters": f"\ufeff{FORM}\x00\x07".replace("片段", "片\u200b段"),
    "question in quotes": f"问题：“{Q}”\n片段1：{A}\n片段2：{B}",
    "question in ASCII quotes": f'问题："{Q}"\n片段1：{A}\n片段2：{B}',
    "remark after the question": f"问题：{Q}\n（这个问题考察全文。）\n片段1：{A}\n片段2：{B}",
    "thinking": f"<think>问题：这是草稿吗？\n片段1：甲\n片段2：乙</think>\n{FORM}",
    "thinking twice": f"<think>一</think>\n问题：旧的问题吗？\n<thinking>二</thinking>{FORM}",
    "thinking opened by the template": f"先想一想。\n问题：这是草稿吗？\n</think>\n\n{FORM}",
}

# Replies of no use, and what is said of them
USELESS = {
    "": "no question",
    " \n\n": "no question",
    "好的。": "no question",
    "抱歉，我无法完成这个任务。": "no question",
    f"片段1：{A}\n片段2：{B}": "no question",
    f"<think>\n{FORM}": "no question",
    f"<think>想</think>\n<thinking>\n{FORM}": "no question",
    f"问题：{Q}": "no halves",
    f"问题：{Q}\n片段1：{A}": "no halves",
    f"问题：{Q}\n片段2：{A}": "no halves",
    f"问题：{Q}\n片段2：{B}\n片段1：{A}": "no halves",
    "问题：": "no halves",
    "问题：\n片段1：\n片段2：": "question too short",
    "问题：为什么？\n片段1：甲\n片段2：乙": "question too short",
    f"问题：{'长' * 999}吗？\n片段1：甲\n片段2：乙": "question too long",
    "问题：** **\n片段1：甲\n片段2：乙": "question too short",
    "问题：（一个问句）\n片段1：（前一个片段）\n片段2：（后一个片段）": "no question, only its place",
    "问题：（一个完整的问句）\n片段1：甲\n片段2：乙": "no question, only its place",
    "问题：【在此填写问题】\n片段1：甲\n片段2：乙": "no question, only its place",
    "问题：……？？？\n片段1：甲\n片段2：乙": "no question, only its place",
    f"问题：<|im_end|>{Q}\n片段1：{A}\n片段2：{B}": "control mark",
    f"问题：[INST] {Q}\n片段1：{A}\n片段2：{B}": "control mark",
    f"问题：{Q}</s>\n片段1：{A}\n片段2：{B}": "control mark",
    ZH.cst_reply(ZH.cst.examples[1].question, (A, B)): "question of an example",
    f"问题：**{ZH.cst.examples[0].question}**\n片段1：{A}\n片段2：{B}": "question of an example",
}


@pytest.mark.parametrize("reply", UGLY.values(), ids=UGLY)
def test_ugly_replies_are_read(reply):
    assert parse_split(reply, ZH) == Split(Q, (A, B))
    assert parse_question(reply, ZH) == Q


@pytest.mark.parametrize(("reply", "reason"), USELESS.items())
def test_useless_replies_are_refused_with_the_reason(reply, reason):
    with pytest.raises(Unparseable, match=rf"^{reason}$"):
        parse_split(reply, ZH)


def test_english_replies_are_read_with_labels_of_either_language():
    said = Split("Why does it open at six?", ("The shop opens at six.", "Workers eat early."))
    for form in ("Question: {}\nPart 1: {}\nPart 2: {}", "**QUESTION**\n{}\n**Part One:** {}\n**PART TWO:** {}"):
        assert parse_split(form.format(said.query, *said.halves), EN) == said
    for form in (
        "Query: {}\nPassage A: {}\nPassage B: {}",
        "问题：{}\n片段1：{}\n片段2：{}",
        "Q: {}\n文本1：{}\n文本2：{}",
    ):
        assert parse_split(form.format(said.query, *said.halves), EN) == said


EMPTY = ["", "空", "（空）", "无", "（无）", "(empty)", "None", "N/A", "-"]


@pytest.mark.parametrize("empty", [*EMPTY, " ", "\n\n", "---", "```", "**"])
def test_a_half_may_be_empty(empty):
    assert parse_split(f"问题：{Q}\n片段1：{A}\n片段2：{empty}", ZH) == Split(Q, (A, ""))


def test_halves_keep_their_lines_and_marks():
    first = "一、标题\n\n- 甲\n- 乙\n---\n“引文”\n> 丙\n```\ncode: x\n```"
    second = "**粗体**的字\n\n\n| 表 | 格 |\n{a: 1}"
    assert parse_split(ZH.cst_reply(Q, (first, second)), ZH) == Split(Q, (first, second))


def test_labels_in_the_midst_of_a_line_are_text():
    halves = ("他问：问题：为什么？片段2：没有。", "见片段1：第三行；Part 2: none.")
    assert parse_split(ZH.cst_reply(Q, halves), ZH) == Split(Q, halves)


def test_other_words_for_a_label_are_text_where_ours_are_there():
    halves = ("甲说。\n文本2：附件\nPart 2: annex\n问：谁？\n段落1：总则", "乙说。\n片段1：附录\nQuestion: who?")
    assert parse_split(ZH.cst_reply(Q, halves), ZH) == Split(Q, halves)
    assert parse_question(f"问题：{Q}\nPart 1 of the story is long.\n片段1：{A}", ZH) == Q


@pytest.mark.parametrize("other", ["问：它开门吗？", "Q: does it open?", "提问：\n开门？", "Question 1\nQuery: open?"])
def test_our_label_wins_over_other_words_for_it_before(other):
    assert parse_split(f"{other}\n{FORM}", ZH) == Split(Q, (A, B))
    assert parse_question(f"Q: May I ask?\nQuestion: {Q}", EN) == Q


def test_of_several_questions_the_one_before_the_halves_is_taken():
    draft = "问题：这是草稿吗？\n太短，重写。\n"
    assert parse_split(draft + FORM, ZH) == parse_split(f"{FORM}\n", ZH) == Split(Q, (A, B))
    assert parse_split(f"问：这是草稿吗？\n问：{Q}\n片段1：{A}\n片段2：{B}", ZH) == Split(Q, (A, B))
    assert parse_split(f"问题：{Q}\n片段1：{draft}{A}\n片段2：{draft}{B}", ZH).query == Q
    assert parse_question(f"{draft}问题：{Q}", ZH) == Q


def test_a_half_that_holds_our_label_loses_nothing():
    split = parse_split(f"问题：{Q}\n片段1：{A}\n片段2：假的\n片段2：{B}", ZH)
    assert split.halves == (A, f"假的\n片段2：{B}")


def test_a_question_may_end_the_reply():
    assert parse_question(f"问题：{Q}\n", ZH) == Q
    assert parse_question(f"**问题：{Q}**", ZH) == Q
    with pytest.raises(Unparseable, match="question too short"):
        parse_question("问题：", ZH)
    with pytest.raises(Unparseable, match="question of an example"):
        parse_question(f"Question: {EN.cst.examples[2].question}\nPart 1:", EN)


def test_a_question_over_several_lines_is_one_line():
    assert parse_question("问题：面包店为什么\n六点开门\n片段1：", ZH) == "面包店为什么 六点开门"


@pytest.mark.parametrize("row", BY_HAND, ids=lambda row: f"{row['kind']}-{row['source']}")
def test_replies_of_a_real_model_are_read(row):
    prompts = load_prompts(row["language"])
    assert parse_question(row["reply"], prompts) == row["question"]
    if "halves" in row:
        assert parse_split(row["reply"], prompts) == Split(row["question"], tuple(row["halves"]))


# Any text

# Without the letters of any label, thinking block, fence, rule or bold mark
LABEL_FREE = st.characters(
    exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="问题提片段文部语境QqTtPpHh<`*-="
)
PLAIN = st.text(LABEL_FREE | st.just("\n"), max_size=200).map(lambda text: clean(text).strip())
QUESTION = st.text(LABEL_FREE, min_size=5, max_size=120).map(lambda text: " ".join(clean(text).split()).strip("_#> "))
PIECES = st.lists(
    st.sampled_from(
        [*"*_#>-•·`=:：\n \t（）【】“”?？甲1a", "问题", "片段1", "片段2", "Part 1", "Q", "<think>", "</think>", "---"]
    )
).map("".join)


@settings(deadline=None)
@given(st.sampled_from(["zh", "en"]), QUESTION, PLAIN, PLAIN)
def test_well_formed_replies_round_trip(language: Language, question, first, second):
    prompts = load_prompts(language)
    assume(len(question) >= 5 and re.search(r"\w", question) and question[0] not in '（([【“"「')
    assume(not {first, second} & set(EMPTY[1:]))
    assert parse_split(prompts.cst_reply(question, (first, second)), prompts) == Split(question, (first, second))


@settings(deadline=None)
@given(st.sampled_from(["zh", "en"]), PIECES | st.text(st.characters(), max_size=200))
def test_any_text_is_read_or_refused(language: Language, reply):
    prompts = load_prompts(language)
    for parse in (parse_split, parse_question):
        with contextlib.suppress(Unparseable):
            assert parse(reply, prompts)


REPEATED = [
    "*",
    "_",
    ":",
    "：",
    "\n",
    " ",
    "\t",
    "-",
    "#",
    ">",
    "`",
    "“",
    "（",
    "问题",
    "问题：\n",
    "片段1：",
    "片段1：\n",
]
REPEATED += ["\n---", "\n***", "** ", "* ", "1. ", "<think>", "</think>", "【", "\u3000"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("repeated", [*REPEATED, ",", "/", "分", "相关性：4\n"])
def test_what_a_model_repeats_without_end_does_not_hang(repeated):
    run = (repeated * 100_000)[:100_000]
    replies = [run, f"问题{run}x", f"**问题{run}x", f"{run}{FORM}", f"问题：{run}？\n片段1：甲\n片段2：乙"]
    replies += [f"问题：{Q}\n片段1{run}x", f"问题：{Q}\n片段1：甲{run}甲\n片段2：乙{run}乙"]
    for reply in replies:
        for parse in (parse_split, parse_question):
            with contextlib.suppress(Unparseable):
                parse(reply, ZH)
    for judged in (run, f"评分：8{run}x", f"相关性：4{run}准确性：5{run}满意度{run}3{run}x", f"结论{run}一更好{run}x"):
        for parse in (parse_grade, parse_grades, parse_verdict):
            with contextlib.suppress(Unparseable):
                parse(judged, ZH)


READERS = {  # with a reply that has a long run in many places
    parse_split: f"R问题R：R{Q}\n片段1：R甲R\nR甲\n片段2：---R甲\nR乙R甲\nR---R",
    parse_question: f"R\n问题：\nR\n{Q}R？\nR",
    parse_focus: f"问题：{Q}R\n分开处R：R3R",
    parse_grade: "R评分R：R8R/R10R。",
    parse_grades: "相关性R：R4R/R5R，R准确性：5R满意度R3R",
    parse_verdict: "结论R：R一更好R。R",
    lambda reply, prompts: bare_answer(reply, Q, prompts): f"问题：{Q}R\nR**答案R：R甲R**\nR",
    lambda reply, prompts: parse_answer(reply, Query("", 0, A, Q), prompts): "R答案R：R甲R\nR乙R",
}
NASTY = [*" \n\t\u3000*-`#>[【（“：:9/，", "1. ", "\n---", "问题：", "片段2：\n", "\nAnswer:", "<think>", "</think>"]
NASTY += ["<|", "\u0301\u0327"]


@pytest.mark.parametrize("piece", NASTY)
def test_the_time_to_read_a_reply_is_linear_in_its_length(piece: str):
    def seconds(read, form: str, size: int) -> float:
        reply = form.replace("R", (piece * size)[: size // form.count("R")])
        began = time.process_time()
        with contextlib.suppress(Unparseable):
            read(reply, ZH)
        return time.process_time() - began

    for read, form in READERS.items():
        for each in (form, "R甲R", f"<think>R</think>R{form}"):
            assert seconds(read, each, 300_000) < 40 * seconds(read, each, 20_000) + 0.5, each


# Answers


@pytest.mark.parametrize(
    "reply",
    [
        "用冷水洗。",
        "答案：用冷水洗。",
        "回答: 用冷水洗。",
        "**答案：**用冷水洗。",
        "**答案**：用冷水洗。",
        "**回答：用冷水洗。**",
        "### 答案\n用冷水洗。",
        "【答案】：用冷水洗。",
        "Answer: 用冷水洗。",
        "问题：蜂蜡布应该怎样清洗？\n回答：用冷水洗。",
        "<think>根据上下文……</think>\n\n用冷水洗。",
        "<think>怎么洗呢</think>答：用冷水洗。",
    ],
)
def test_labels_and_thinking_are_no_part_of_an_answer(reply: str):
    assert bare_answer(reply, "蜂蜡布应该怎样清洗？", ZH) == "用冷水洗。"


@pytest.mark.parametrize(
    "answer", ["答应了就要做到。", "答题卡要用铅笔涂。", "回答得好不好，看准备。", "**用冷水洗**，别烫。"]
)
def test_words_that_only_begin_like_a_label_stay(answer: str):
    assert bare_answer(answer, "蜂蜡布应该怎样清洗？", ZH) == answer


# Grades and verdicts


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *((f"评分：{n}", n) for n in range(1, 11)),
        ("8", 8),
        ("评分: 8", 8),
        ("评分：８", 8),
        ("**评分：8**", 8),
        ("**评分**：8", 8),
        ("评分：8分", 8),
        ("8/10", 8),
        ("评分：8 / 10", 8),
        ("８／１０", 8),
        ("评分是8。", 8),
        ("Grade: 10", 10),
        ("grade: 7.", 7),
        ("Score: `7`", 7),
        ("<think>也许 3 分？</think>\n评分：9", 9),
        ("\n\n评分：9\n", 9),
    ],
)
def test_a_grade_is_read(reply: str, grade: int):
    assert parse_grade(reply, ZH) == grade


@pytest.mark.parametrize(
    "reply",
    [
        *("", "不是", "好", "评分：", "评分：N", "评分：0", "评分：11", "评分：100", "-5", "7.5", "8.0.1", "七"),
        *("10 out of 100", "8/100", "between 7 and 8", "7 8", "评分：7 或 8", "评分：8\n评分：7", "7-8", "1 到 10"),
        *("I would give this answer 8", "这个回答有 3 个要点", "<think>评分：8", "８５", "8%", "评分：8/9"),
    ],
)
def test_anything_else_is_no_grade(reply: str):
    with pytest.raises(Unparseable):
        parse_grade(reply, ZH)


@given(st.text(max_size=60))
def test_a_grade_is_in_its_range_and_made_of_the_reply_s_only_number(reply: str):
    try:
        grade = parse_grade(reply, ZH)
    except Unparseable:
        return
    assert 1 <= grade <= 10 and str(grade) in unicodedata.normalize("NFKC", reply)


@pytest.mark.parametrize(
    "reply",
    [
        "相关性：4\n准确性：5\n满意度：3",
        "相关性: 4\n\n准确性: 5\n满意度: 3\n",
        "**相关性：4**\n**准确性：5**\n**满意度：3**",
        "相关性：４分\n准确性：５分\n满意度：３分",
        "相关性：4/5，准确性：5/5，满意度：3/5",
        "<think>相关性：1</think>相关性：4\n准确性：5\n满意度：3。",
    ],
)
def test_three_grades_are_read(reply: str):
    assert parse_grades(reply, ZH) == Grades(relevance=4, accuracy=5, satisfaction=3)


def test_three_grades_are_read_in_english():
    assert parse_grades("Relevance: 4\naccuracy: 5\nSatisfaction: 3/5", EN) == Grades(4, 5, 3)


@pytest.mark.parametrize(
    "reply",
    [
        *(
            "",
            "4",
            "4\n5\n3",
            "相关性：4\n准确性：5",
            "相关性：4\n准确性：5\n满意度：6",
            "相关性：4\n准确性：5\n满意度：0",
        ),
        *("准确性：5\n相关性：4\n满意度：3", "相关性：4\n准确性：5\n满意度：好", "相关性：N\n准确性：N\n满意度：N"),
        *(
            "相关性：4\n准确性：5\n满意度：3\n总分：12",
            "<think>相关性：4\n准确性：5\n满意度：3",
            "相关性：4.5\n准确性：5\n满意度：3",
        ),
        "相关性：4\n准确性：5\n满意度不是 3",
    ],
)
def test_anything_else_is_no_three_grades(reply: str):
    with pytest.raises(Unparseable):
        parse_grades(reply, ZH)


@pytest.mark.parametrize(
    ("reply", "prompts", "verdict"),
    [
        ("结论：一更好", ZH, 0),
        ("**结论：二更好。**", ZH, 1),
        ("不相上下", ZH, 2),
        ("Verdict: 1 is better.", EN, 0),
        ("verdict: Equally good", EN, 2),
        ("<think>1 is better</think>\nVerdict: 2 is better", EN, 1),
    ],
)
def test_a_verdict_is_read(reply: str, prompts, verdict: int):
    assert parse_verdict(reply, prompts) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "一",
        "结论：",
        "结论：一不更好",
        "结论：一更好还是二更好",
        "不是一更好",
        "结论：一更好\n结论：二更好",
        "结论：三更好",
    ],
)
def test_anything_else_is_no_verdict(reply: str):
    with pytest.raises(Unparseable):
        parse_verdict(reply, ZH)
