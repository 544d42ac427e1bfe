"""What counts as an answer that stands alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augcon.data import Example, Query
from augcon.text.checks import is_refusal, mentions_text, parse_answer, ungrounded
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


MENTIONS = [
    "根据上下文，要用冷水洗。",
    "根据文本，要用冷水洗。",
    "根据所给材料，要用冷水洗。",
    "根据提供的信息，要用冷水洗。",
    "根据以上内容，要用冷水洗。",
    "从文章来看，要用冷水洗。",
    "文中提到，要用冷水洗。",
    "正如文中所说，要用冷水洗。",
    "要用冷水洗，这在文中有说明。",
    "上文说过，要用冷水洗。",
    "如上文所述，要用冷水洗。",
    "本文介绍了清洗的办法。",
    "该段落说明了清洗的办法。",
    "这段文字讲的是清洗的办法。",
    "在文章中，清洗要用冷水。",
    "文章指出，要用冷水洗。",
    "文本没有提到怎样清洗。",
    "文本中并未提及清洗的办法。",
    "给定的材料没有说怎样清洗。",
    "材料中提到，要用冷水洗。",
    "作者认为要用冷水洗。",
    "笔者建议用冷水洗。",
    "这段话说明了清洗的办法。",
    "原文说要用冷水洗。",
    "该文指出，要用冷水洗。",
    "根据描述，要用冷水洗。",
    "根据题目所给的内容，要用冷水洗。",
    "According to the text, cold water is used.",
    "Based on the passage, cold water is used.",
    "Based on the information provided, cold water is used.",
    "According to the given context, cold water is used.",
    "The text says that cold water is used.",
    "The passage does not mention how to wash it.",
    "The article doesn’t say how to wash it.",
    "As mentioned above, cold water is used.",
    "As described in the passage, cold water is used.",
    "In the text, cold water is used.",
    "The provided context covers cold water only.",
    "The author argues for cold water.",
]


@pytest.mark.parametrize("answer", MENTIONS)
def test_an_answer_that_speaks_of_the_text_is_noticed(answer: str):
    assert mentions_text(answer, CONTEXT, QUESTION)
    assert mentions_text(f"要用冷水洗。\n\n{answer}", CONTEXT, QUESTION)


@pytest.mark.parametrize(
    ("answer", "context", "question"),
    [
        ("大模型会根据上下文预测下一个词。", "大语言模型靠上下文预测下一个词。", "大模型是怎样写出句子的？"),
        ("上下文窗口越长，能记住的内容就越多。", "窗口", "大模型的上下文窗口有什么用？"),
        ("短信文本中有链接的，不要点开。", "短信里的链接不要点。", "收到陌生短信怎么办？"),
        ("他的作文中常常提到外婆。", "作文", "他为什么总写外婆？"),
        ("这篇论文中的数据由两个小组核对过。", "论文", "数据可靠吗？"),
        ("英文中没有这样的量词，中文中有。", "量词", "量词有什么用？"),
        ("建筑材料中含有甲醛，要多通风。", "甲醛", "新房为什么要通风？"),
        ("报名时要交身份证明等材料，材料不全的要补。", "材料", "怎么报名？"),
        ("晚上文化馆有演出，日本文化展也在那里。", "演出", "晚上有什么活动？"),
        ("她在文章中写道，家里从来没有缺过书。", "她后来在文章中写道，家里不缺书。", "她怎样回忆童年？"),
        ("文章要先列提纲，再动笔。", "写作", "怎样写好一篇文章？"),
        ("因此文章写得再好也要改。", "写作", "为什么要修改？"),
        ("他听了这番话，说明天再来。", "明天", "他什么时候再来？"),
        ("画家根据描述者的话画出了嫌疑人。", "嫌疑人", "画像是怎么来的？"),
        ("应该文明用语，也应该文静一些。", "文明", "说话要注意什么？"),
        ("把文本框拖到左边，文本文件另存一份。", "软件", "怎样排版？"),
        ("鉴定人根据材料的颜色判断年份。", "鉴定", "怎样断代？"),
        ("有资料显示，这里曾经是码头。", "有资料显示，这里曾是码头。", "这里从前是什么样？"),
        ("In this context the word means a bank of earth.", "word", "What does the word mean here?"),
        ("Seen in the context of the 1930s, the price was high.", "1930s", "Was the price high?"),
        ("He sent a text message in the morning.", "message", "What did he do?"),
        ("The text message says to call back.", "He got a text message.", "What should he do?"),
        ("The model reads the context and guesses the next word.", "x", "What does the model do with the context?"),
        ("Type it in the text box and save.", "software", "Where do I type it?"),
        ("The information provided by the bank must be kept.", "bank", "What must I keep?"),
        ("The document states the price.", "The document states the price and the date.", "Where is the price?"),
        ("The shop opens at nine, as noted on the door.", "shop", "When does it open?"),
    ],
)
def test_words_of_the_subject_are_no_mention(answer: str, context: str, question: str):
    assert not mentions_text(answer, context, question)


def test_a_text_s_pointers_to_itself_are_not_forgiven_for_being_copied():
    for answer in ("本文介绍三种洗法。", "如上文所述，用冷水洗。", "As noted above, cold water is best."):
        assert mentions_text(answer, answer, QUESTION)


@pytest.mark.parametrize(
    "answer",
    [
        "抱歉，我无法回答这个问题。",
        "很抱歉，我不能提供相关建议。",
        "非常抱歉，目前没有找到答案。",
        "对不起，无法判断。",
        "我无法回答这个问题。",
        "这个问题我无法回答。",
        "作为一个AI，我没有个人看法。",
        "作为人工智能语言模型，我不能发表意见。",
        "作为由某公司开发的大模型，我不便评价。",
        "这里没有足够的信息来回答。",
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but that is not possible.",
        "Sorry, I cannot answer this.",
        "I cannot provide legal advice.",
        "I'm unable to answer that.",
        "As an AI, I have no opinions.",
        "As an AI language model, I do not know.",
        "Unfortunately, I can't determine that.",
        "There is not enough information to answer.",
    ],
)
def test_refusals_are_noticed(answer: str):
    assert is_refusal(answer, CONTEXT)


@pytest.mark.parametrize(
    "answer",
    [
        "她向邻居说了声抱歉，第二天就修好了水管。",
        "店主会先说“对不起”，再退钱。",
        "作为人工智能的重要分支，机器学习靠数据。",
        "作为AI公司的创始人，我认为先要有数据。",
        "我不能吃辣，所以点了清汤。",
        "租客不能提供收据的，押金照退。",
        "无法判断真假时，可以请鉴定机构出具意见。",
        "逾期无法提供证明的，按放弃处理。",
        "遗憾的是，当我们运行它时，程序并没有通过。",
        "对不起，这四个字我等了十年。",
        "You can't park here after ten.",
        "Say sorry, but keep to the rule.",
        "As an AI engineer, she tests models.",
        "I cannot eat nuts, he said.",
    ],
)
def test_ordinary_words_are_no_refusal(answer: str):
    assert not is_refusal(answer, CONTEXT)


def test_what_someone_in_the_context_says_is_no_refusal():
    said = "对不起，我无法答应你。"
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
