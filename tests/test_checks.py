"""What counts as an answer that stands alone."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augcon.data import Example, Query
from augcon.text.checks import is_refusal, mentions_text, parse_answer, points_at_text, ungrounded
from augcon.text.parse import Unparseable
from augcon.text.prompts import load_prompts

ZH = load_prompts("zh")
CONTEXT = "蜂蜡布怕热，不能用开水烫洗。它可以反复使用一年左右。"
QUESTION = "蜂蜡布应该怎样清洗？"


def fault(reply: str, question: str = QUESTION, context: str = CONTEXT, shown=()) -> str:
    """What is wrong with an answer; empty when nothing is."""
    try:
        parse_answer(reply, Query("", 0, context, question), ZH, shown)
    except Unparseable as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("答案：", "empty"),
        ("……", "empty"),
        ("Answer: Answer:", "empty"),
        ("**问题：**\n\n**回答：**", "empty"),
        ("<think>还在想", "thinking not ended"),
        ("用冷水洗。<|im_end|>", "control mark"),
        ("用冷水洗。[/INST]", "control mark"),
        ("Wash it in cold water.", "wrong language"),
        ("抱歉，我无法回答这个问题。", "refusal"),
        ("根据上下文，要用冷水洗。", "speaks of the text"),
    ],
)
def test_what_is_wrong_with_an_answer_is_named(reply: str, reason: str):
    assert fault(reply) == reason


def test_the_answer_follows_the_language_of_the_question():
    assert fault("用冷水洗。", "How is beeswax wrap cleaned?") == "wrong language"
    assert fault("Wash it in cold water.", "How is beeswax wrap cleaned?") == ""
    assert fault("The wrap is called 蜂蜡布 in Chinese.", "What is beeswax wrap called there?") == ""
    assert fault("MySQL", "这套系统用的是什么数据库？") == ""
    assert fault("用的是 MySQL 5.7 和 Redis。", "这套系统用的是什么数据库？") == ""


def test_an_example_s_answer_is_no_answer_unless_its_question_was_asked():
    shown = [Example("阳台公约", "阳台能装晾衣架吗？", "不可以，护栏外面不能加装晾衣架，花架也一样。")]
    assert fault("不可以，护栏外面不能加装晾衣架，花架也一样。", shown=shown) == "answer of an example"
    assert fault("不可以！护栏外面不能加装晾衣架，花架也一样", shown=shown) == "answer of an example"
    assert fault("不可以用开水，护栏那样的硬物也会刮伤它。", shown=shown) == ""
    assert fault("不可以，护栏外面不能加装晾衣架，花架也一样。", "阳台能装晾衣架吗？", shown=shown) == ""


ANSWERS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("row", ANSWERS, ids=lambda row: row["answer"][:40])
def test_bad_answers_are_told_from_good_ones(row: dict[str, str]):
    expected = "" if row["verdict"] == "good" or "missed" in row else row["verdict"]
    assert fault(row["answer"], row["question"], row["context"]) == expected


def test_nine_of_ten_bad_answers_are_caught():
    bad = [row for row in ANSWERS if row["verdict"] != "good"]
    assert sum("missed" in row for row in bad) <= len(bad) / 10


def test_a_text_s_pointers_to_itself_are_not_forgiven_for_being_copied():
    for answer in ("本文介绍三种洗法。", "如上文所述，用冷水洗。", "As noted above, cold water is best."):
        assert mentions_text(answer, answer, QUESTION)


def test_what_someone_in_the_context_says_is_no_refusal():
    said = "对不起，我无法回答你。"
    assert is_refusal(said, CONTEXT) and not is_refusal(said, f"他只说：“{said}”说完就走了。")


@given(st.text(max_size=200), st.sampled_from(["根据文本，", "文中提到，", "The text says "]))
def test_no_reply_breaks_the_checks_and_a_plain_mention_is_never_let_through(said: str, mention: str):
    try:
        answer = parse_answer(said, Query("", 0, "", "问什么？"), ZH)
    except Unparseable:
        return
    assert answer.strip() == answer and answer
    assert fault(f"{answer}。{mention}", "问什么？", "")


@pytest.mark.parametrize(
    ("question", "context", "absent"),
    [
        ("Why did Tesla leave Edison in 1885?", "Tesla left him after a year.", ["1885", "Edison"]),
        (
            "What did the 1,200 members of NASA's staff call “the Vomit Comet”?",
            "Its staff flew often.",
            ["1,200", "the Vomit Comet", "NASA"],
        ),
        ("Why did the United States leave UNESCO?", "The U.S. left the organisation.", ["UNESCO"]),
        ("Was Zürich like Germany hit by Americans?", "Zurich and German towns were hit by America.", []),
        ("Which GDP did the World Health Organization count?", "WHO counted the gross domestic product.", []),
        ("How Can Germany Save Energy in July?", "Gas is dear.", []),
        ("In which July did I see 3 ships?", "He saw some.", []),
        ("How were 3,400 of 250 people fed in the 1940s and the 20th century?", "三千四百人，二百五十人。", []),
        ("What cost $25 and 40%?", "It cost twenty-five dollars, forty per cent of the price.", []),
        ("1943年發生了什麼？有１２個人嗎？", "一九四三年，他和十二个人走了。", []),
        ("1944年发生了什么？", "一九四三年，他走了。", ["1944"]),
        ("鲁迅为什么去北京？", "他去了北平，住在京城。", ["鲁迅"]),
        ("臺灣的《阿Q 正傳》由誰出版？", "《阿Ｑ正传》在台湾由他出版。", []),
        ("“高收低租”和「以租养贷」是什么？", "以租養貸要小心。", ["高收低租"]),
        ("Redis 和 MySQL 用在哪个 app 里？", "数据存在 mysql 里。", ["Redis"]),
        ("What is 蜂蜡布 in Germany?", "蜂蜡布怕热，不能用开水烫洗。", []),
    ],
)
def test_what_a_question_has_from_elsewhere_is_found(question: str, context: str, absent: list[str]):
    assert ungrounded(question, context) == absent


@pytest.mark.parametrize(
    ("question", "points"),
    [
        ("What topic does the text discuss?", True),
        ("What role do teachers have, according to the passage?", True),
        ("作者在文中的态度是怎样的？", True),
        ("总结文本内容。", True),
        ("“以目偿头”这句话是什么意思？", True),
        ("Why does a text message cost more abroad?", False),
        ("How do teachers in private schools differ from others?", False),
        ("国防专利复审委员会由哪些人组成？", False),
    ],
)
def test_a_question_that_only_a_reader_of_the_text_understands_points_at_it(question: str, points: bool):
    assert points_at_text(question, "Teachers, schools, 专利。") == points
    assert not points_at_text("How is the text of the treaty kept?", "The text of the treaty is kept in Bern.")
