"""Units of text: length, sentences, words, language, in linear time."""

import unicodedata

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from augcon.text.units import clean, language, length, paragraphs, sentences, size, units, words

NASTY = st.text(st.sampled_from("字，。？！；…“”‘’」）\"'.!? \n\t\u3000aAe.g1-—·é👩\u200dไ臺"), max_size=60)
SPACELESS = st.text(st.sampled_from("ไทยที่ ๆำາລາວခမြ်း၊။ខ្មែរ។៕བོད་།༎ \na1.?”字"), max_size=80)
ANY = NASTY | SPACELESS | st.text(max_size=80)

LONG_LINES = {
    "Chinese without a mark": "字",
    "Chinese sentences": "面包店早上六点开门。“为什么？”",
    "one endless word": "a",
    "English words": "word ",
    "abbreviations": "e.g. Mr. A. ",
    "full stops": ".",
    "stops and quotes": '."',
    "white space": " ",
    "ideographic spaces": "\u3000",
    "line ends": "\n",
    "blank lines": "字\n \n",
    "Thai": "ไทย",
    "Thai phrases": "ไทย  ",
    "Thai marks": "\u0e48",
    "Khmer": "ខ្មែរ។ ",
    "emoji": "👩\u200d👩\u200d👧",
    "apostrophes": "a’",
    "byte order marks": "\ufeff",
}


# Length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        (" \n\t\u3000", 0),
        ("今天天气很好，我们去公园。", 13),
        ("“好——”他说……", 9),
        ("臺灣的圖書館「很大」！", 11),
        ("The quick brown fox.", 4),
        ("It’s a well-known fact, isn't it?", 6),
        ("the “quoted” word", 5),
        ("用Python写3.14版", 5),
        ("𠮷野家", 3),
        ("カタカナとひらがな", 9),
        ("👩\u200d👩\u200d👧 ok", 2),
        ("\u3000\u3000段首空两格", 5),
        ("ภาษาไทย", 2),
        ("ภาษา ไทย", 2),
        ("ภาษาลาว ພາສາລາວ", 4),
        ("ខ្មែរ", 1),
        ("ใช้Python3ได้", 3),
    ],
)
def test_length_counts_cjk_characters_other_words_and_five_characters_where_no_spaces_are(text, expected):
    assert length(text) == expected


@settings(deadline=None)
@given(st.text(st.sampled_from("中文字，。？！；：“”‘’…—·《》（）「」、"), max_size=100))
def test_length_of_pure_chinese_is_its_character_count(text):
    assert length(text) == len(text)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc", "Zs"]), min_size=1)))
def test_length_of_english_is_its_word_count(spaced):
    assert length(" ".join(spaced)) == len(spaced)


def test_size_counts_long_runs_by_their_characters():
    assert size("é" * 25 + " word 字") == 3 + 1 + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("今天很好", "zh"),
        ("臺灣", "zh"),
        ("This is it", "en"),
        ("用 Python 写", "zh"),
        ("", "en"),
        ("1, 2", "en"),
        ("He said 好 and then went on with his way", "en"),
        ("\u3000\u3000Indented like Chinese", "en"),
    ],
)
def test_language_is_the_one_that_prevails(text, expected):
    assert language(text) == expected


# Cutting


@settings(deadline=None)
@given(ANY)
def test_sentences_paragraphs_and_units_tile_the_text(text):
    for cut in (sentences, paragraphs, units):
        assert "".join(cut(text)) == text


@settings(deadline=None)
@given(ANY)
def test_no_sentence_and_no_paragraph_of_a_text_is_blank(text):
    if text.strip():
        assert all(piece.strip() for piece in paragraphs(text))
        assert all(sentences(text))


@settings(deadline=None)
@given(ANY)
def test_there_are_as_many_units_as_the_length(text):
    assert len(units(text)) == max(1, length(text))


@settings(deadline=None)
@given(st.text(st.sampled_from("ไทยที่น้ำປີခမြ်းខ្មែរབོད་")))
def test_no_unit_begins_with_a_mark_that_stands_on_the_letter_before(text):
    assert not any(unicodedata.category(unit[0]).startswith("M") for unit in units(text)[1:])


@settings(deadline=None)
@given(SPACELESS, SPACELESS)
def test_parts_are_never_shorter_together_than_the_whole(first, second):
    assert length(first + second) <= length(first) + length(second)


@pytest.mark.parametrize(
    "expected",
    [
        ["ร้านเปิดเช้า ", "คนต่าง ๆ ", "มาซื้อขนมปัง 20 บาท ", "ปิดเย็น"],
        ["ຮ້ານເປີດເຊົ້າ ", "ຄົນມາຊື້"],
        ["ဆိုင်ဖွင့်သည်။ ", "လူများ၊ လာသည်။”", "ဝယ်သည်"],
        ["ហាងបើក។ ", "មនុស្សមក៕\n", "ទិញ"],
        ["ཁང་པ་ཡོད། ", "མི་ཡོང༎ ", "ཉོ"],
        ["“好吗？”", "他问。", "“好！”", "她说；", "然后走了……", "完"],
        ["他说：“为什么？！”）", "没人答。』」", "完。"],
        ["句一。 ", "句二！？", "句三"],
        ["Dr. Smith paid $3.50 to J. R. Brown, e.g. in May. ", "Then he left."],
        ["See Fig. 3 in Vol. 2, i.e. there. ", "It cost 1.5 million. ", "Mr. A. Jones etc. agreed."],
        ['He asked, "Why?" ', "(Nobody knew.) ", 'She said "No!" ', "End"],
        ["Wait... what? ", "Really?! ", "Yes."],
        ["Open www.example.com now. ", "Done."],
        ["版本3.14很好。", "It works.", "好。"],
        ["Line one.\n", "line two."],
    ],
)
def test_sentences_end_with_their_quotes_and_not_at_abbreviations(expected):
    assert sentences("".join(expected)) == expected


def test_blank_lines_go_with_the_paragraph_before():
    assert paragraphs("\n \na\n\n\u3000\nb\n c") == ["\n \na\n\n\u3000\n", "b\n", " c"]


# Words


@settings(deadline=None)
@given(
    st.text(max_size=200)
    | st.text(st.sampled_from("我们在北京大学图书馆研究生命科学abc12.5%+-_&#。， \u3000\n臺é👩"), max_size=300)
)
def test_words_are_those_of_jieba_without_white_space(text):
    assert words(text) == [word for word in jieba.lcut(text) if not word.isspace()]


# Cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a\u2028b\u2029c\x85d\x0be\x0cf", "a\nb\nc\nd\ne\nf"),
        ("\ufeffa\ufeffb", "ab"),
        ("a\x00b\x07c\x7f", "abc"),
        ("a\ud800b\udfffc", "abc"),
        ("a\u200bb\u2060c\uffff", "abc"),
        ("\tkept \u3000", "\tkept \u3000"),
        ("👩\u200d👧 é 臺", "👩\u200d👧 é 臺"),
    ],
)
def test_clean_leaves_only_text_with_plain_line_ends(text, expected):
    assert clean(text) == expected


@settings(deadline=None)
@given(st.text(st.characters() | st.sampled_from("\r\n\x00\u2028\ufeff\ud800\udfff\u200b")))
def test_clean_is_encodable_and_clean_already(text):
    once = clean(text)
    assert clean(once.encode().decode()) == once


# Time


@pytest.mark.timeout(60)
@pytest.mark.parametrize("repeated", LONG_LINES.values(), ids=LONG_LINES)
def test_half_a_million_characters_in_one_line_take_linear_time(repeated):
    text = (repeated * 500_000)[:500_000] + "x"
    for cut in (sentences, paragraphs, units):
        assert sum(map(len, cut(text))) == len(text)
    assert length(text) == sum(map(length, sentences(text)))
    assert clean(text).endswith("x")
    assert sum(map(len, words(text[:100_000]))) == len("".join(text[:100_000].split()))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from("字a.。 ’"), st.integers(1, 2000))
def test_blocks_longer_than_any_context_lose_no_word(character, count):
    assert "".join(words(character * count)) == (character * count).strip()
