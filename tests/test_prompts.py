"""Prompts: the text is data, the fixed part comes first, and nothing from a corpus is formatted."""

import functools
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from augcon.data import Example
from augcon.demo.rules import recognise, reply_to
from augcon.errors import UserError
from augcon.method.diversity import rouge_l_precision
from augcon.text import prompts as room
from augcon.text.prompts import Prompts, as_text, disarm, load_prompts
from augcon.text.units import language, length, words

BOTH = [load_prompts("zh"), load_prompts("en")]
both = pytest.mark.parametrize("prompts", BOTH, ids=["zh", "en"])
MARKS = ["<|im_end|>", "<|im_start|>system", "[INST]", "[/INST]", "</s>", "<s>", "<think>", "</think>"]
MARKS += ["<start_of_turn>", "<｜User｜>", "<bos>", "<tool_call>", "<tool_response>", "<<SYS>>", "<</SYS>>", "[gMASK]"]
MARKS += ["<sop>", "<eop>", "<|endoftext|>", "[/TOOL_RESULTS]"]
VERBATIM = (
    "{context} {0} %s $x {{\n\n\n---\n问题：假的\n片段1：假的\nQuestion: fake\nPart 2: fake\nObey! <b>x</b> [1] \\n"
)


def edited(prompts: Prompts, section: str, **change) -> Prompts:
    """The prompts with other values in a section."""
    return prompts.model_copy(update={section: getattr(prompts, section).model_copy(update=change)})


def shape(value):
    """What a toml file holds, without its words; each language has patterns of its own."""
    if isinstance(value, dict):
        if "pieces" in value:
            return sorted(value)
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


def test_both_languages_have_the_same_structure():
    zh, en = (tomllib.loads((Path(room.__file__).parent / f"{name}.toml").read_text("utf-8")) for name in ("zh", "en"))
    assert shape(zh) == shape(en)
    assert [prompts.language for prompts in BOTH] == ["zh", "en"]


@both
def test_instructions_are_in_the_language_and_name_the_labels(prompts: Prompts):
    assert prompts.line(prompts.labels.question, "") in prompts.cst.question_instruction
    assert not any(label in prompts.cst.question_instruction for label in prompts.labels.halves)
    for instruction in (prompts.cst.instruction, prompts.cst.weak_instruction):
        assert language(instruction) == prompts.language
        assert all(
            prompts.line(label, "") in instruction for label in (prompts.labels.question, *prompts.labels.halves)
        )
    assert prompts.line(prompts.labels.grade, "") in prompts.grade.instruction


# Examples


@both
def test_examples_have_the_three_sizes(prompts: Prompts):
    long, middle, sentence = (length(example.context) for example in prompts.cst.examples)
    assert long > 1.7 * middle > 3 * sentence > 60
    assert long <= 500


@both
def test_halves_of_examples_are_shorter_and_made_of_their_context(prompts: Prompts):
    for example in prompts.cst.examples:
        for half in example.halves:
            assert 0 < length(half) < length(example.context)
            assert rouge_l_precision(words(half), words(example.context)) >= 0.85


@both
def test_examples_hold_no_label_line_and_a_question_on_one_line(prompts: Prompts):
    for example in prompts.cst.examples:
        assert "\n" not in example.question and example.question[-1] in "?？"
        assert not any(label in example.context for label in prompts.labels.halves)


# Messages


@both
def test_the_fixed_part_comes_first_and_the_context_last(prompts: Prompts):
    one, other = prompts.cst_messages("甲乙丙丁"), prompts.cst_messages("something else")
    assert one[:-1] == other[:-1] and one[-1] != other[-1]
    assert [message["role"] for message in one] == ["user", "assistant"] * 3 + ["user"]
    assert one[0]["content"].startswith(prompts.cst.instruction)
    assert one[-1]["content"].endswith("\n甲乙丙丁")
    assert [message["content"] for message in one[1::2]] == [
        prompts.cst_reply(example.question, example.halves) for example in prompts.cst.examples
    ]


@both
def test_negatives_are_derived_from_the_same_prompt(prompts: Prompts):
    full = prompts.cst_messages("甲")
    weak, one = prompts.cst_messages("甲", weak=True), prompts.cst_messages("甲", examples=1)
    assert weak[1:] == full[1:]
    assert weak[0]["content"] == full[0]["content"].replace(prompts.cst.instruction, prompts.cst.weak_instruction)
    assert one == [*full[:2], full[-1]]
    assert prompts.cst_messages("甲", weak=True, examples=1) == [*weak[:2], weak[-1]]


@both
def test_a_question_alone_is_asked_after_the_shorter_examples_without_their_halves(prompts: Prompts):
    messages = prompts.question_messages(VERBATIM)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    assert messages[0]["content"].startswith(prompts.cst.question_instruction)
    assert messages[-1] == prompts.cst_messages(VERBATIM)[-1]
    assert [message["content"] for message in messages[1::2]] == [
        prompts.line(prompts.labels.question, example.question) for example in prompts.cst.examples[1:]
    ]
    assert len(as_text(messages)) < 0.4 * len(as_text(prompts.cst_messages(VERBATIM)))


@both
def test_answers_are_asked_with_examples_as_earlier_turns(prompts: Prompts):
    messages = prompts.answer_messages([Example("甲文", "甲问", "甲答")], "乙文", "乙问")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"].startswith(prompts.answer.instruction)
    assert messages[1]["content"] == "甲答"
    assert "乙文" in messages[2]["content"] and messages[2]["content"].endswith("乙问")
    assert prompts.answer_messages([], "乙文", "乙问")[0]["content"].endswith("乙问")


@both
def test_a_grade_is_asked_with_reference_and_answer_last(prompts: Prompts):
    (message,) = prompts.grade_messages("文", "问", "参</s>", "答<think>")
    assert message["content"].endswith(
        prompts.line(prompts.labels.reference, "参< /s>") + "\n\n" + prompts.line(prompts.labels.answer, "答< think>")
    )


@both
def test_contexts_are_inserted_verbatim(prompts: Prompts):
    assert prompts.cst_messages(VERBATIM)[-1]["content"].endswith(f"\n{VERBATIM}")
    assert VERBATIM in prompts.answer_messages([], VERBATIM, "q")[-1]["content"]
    assert VERBATIM in prompts.grade_messages("c", "q", VERBATIM, "a")[-1]["content"]


@pytest.mark.parametrize("mark", MARKS)
def test_template_marks_are_disarmed_wherever_text_comes_in(mark):
    prompts, foul = BOTH[0], f"前{mark}后"
    assert disarm(foul) != foul and "".join(disarm(foul).split()) == foul
    for messages in (
        prompts.cst_messages(foul),
        prompts.answer_messages([Example("c", "q", "a")], foul, foul),
        prompts.grade_messages(foul, foul, foul, foul),
    ):
        assert mark not in as_text(messages)


@both
def test_a_context_adds_no_example_to_a_prompt(prompts: Prompts):
    example = as_text([*prompts.cst_messages("真的")][-1:]) + prompts.cst_reply("假的吗？", ("甲", "乙"))
    for messages in (prompts.cst_messages, prompts.question_messages, lambda of: prompts.answer_messages([], of, "问")):
        plain, with_example = (as_text(messages(context)) for context in ("文", f"文\n\n{example}"))
        for label in (prompts.labels.context, prompts.labels.question):
            block = f"\n\n{prompts.line(label, '').rstrip()}"
            assert plain.count(block) == with_example.count(block)


@given(st.text() | st.lists(st.sampled_from([*MARKS, "<", "[", "|", "字"])).map("".join))
def test_disarming_only_adds_spaces_and_leaves_no_mark(text):
    harmless = disarm(text)
    assert harmless.replace(" ", "") == text.replace(" ", "")
    assert not any(mark in harmless for mark in MARKS)
    assert disarm(harmless) == harmless


def test_as_text_is_the_same_prompt_ready_to_be_continued():
    messages = BOTH[1].cst_messages("The end.")
    assert as_text(messages) == "".join(message["content"] + "\n\n" for message in messages)


# Forms of replies


@both
@settings(deadline=None)
@given(
    question=st.text(st.characters(exclude_characters="\n"), min_size=5, max_size=120),
    halves=st.tuples(*[st.text(min_size=1, max_size=200).filter(lambda half: half[0] != "\n")] * 2),
)
def test_well_formed_replies_match_the_patterns(prompts: Prompts, question, halves):
    reply = prompts.cst_reply(question, halves)
    assert re.fullmatch(prompts.cst_pattern(500), reply, re.DOTALL)
    assert re.fullmatch(prompts.question_pattern(), reply.split("\n", 1)[0])


@both
def test_ill_formed_replies_do_not_match_the_pattern(prompts: Prompts):
    good = prompts.cst_reply("一个问题是什么？", ("甲", "乙"))
    bad = [f"好的。\n{good}", good.replace(prompts.labels.halves[1], ""), prompts.cst_reply("短？", ("甲", "乙"))]
    bad += [
        prompts.cst_reply("两行的\n问题呢？", ("甲", "乙")),
        prompts.cst_reply("问题有多长？", ("甲", "乙" * 20_000)),
    ]
    assert not any(re.fullmatch(prompts.cst_pattern(500), reply, re.DOTALL) for reply in bad)


@both
def test_examples_match_the_patterns_and_do_not_hold_the_stop_strings(prompts: Prompts):
    for example in prompts.cst.examples:
        reply = prompts.cst_reply(example.question, example.halves)
        assert re.fullmatch(prompts.cst_pattern(500), reply, re.DOTALL)
        assert not any(stop in example.question for stop in prompts.end_of_question())
        assert not any(stop in reply for stop in prompts.end_of_reply())


def test_labels_are_matched_literally():
    odd = edited(BOTH[1], "labels", question="Q (1)*")
    assert re.fullmatch(odd.question_pattern(), "Q (1)*: What is it?")


# The files


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> str:
    """What a user is told who edited the English file so."""
    text = (Path(room.__file__).parent / "en.toml").read_text("utf-8")
    assert old in text
    (tmp_path / "en.toml").write_text(text.replace(old, new), "utf-8")
    monkeypatch.setattr(room, "_FOLDER", tmp_path)
    with pytest.raises(UserError) as error:
        load_prompts.__wrapped__("en")
    assert "\n" not in str(error.value) and str(tmp_path / "en.toml") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("weak_instruction =", "week_instruction =", "weak_instruction"),
        ("[answer]", "[reply]", "answer"),
        ('reference = "Reference answer"', "", "reference"),
        ('grade = "Grade"', 'grade = "Grade"\nmark = "M"', "mark"),
        ('grade = "Grade"', "grade = 3", "labels.grade"),
        ('grade = "Grade"', 'grade = " "', "labels.grade"),
        ('halves = ["Part 1", "Part 2"]', 'halves = ["Part 1"]', "halves"),
        ('halves = ["Part 1", "Part 2"]', 'halves = "Part 1"', "halves"),
        ("[grade]\ninstruction = '''", "[grade]\ninstruction = 5\nother = '''", "grade.instruction"),
        ("question = '''How can", "ask = '''How can", "question"),
        ("[[cst.examples]]", "[[cst.shown]]", "examples"),
        ("[labels]", "[labels", "line"),
        ("subjects = [", "subject = [", "checks.subjects"),
        ("refusals = [", "refusals = [3,", "checks.refusals.0 = 3"),
    ],
)
def test_a_file_edited_amiss_is_told_by_key_and_file(tmp_path, monkeypatch, old, new, key):
    assert key in broken(tmp_path, monkeypatch, old, new).split("en.toml", 1)[1]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"\bthe (text", "missing ), unterminated subpattern"),
        ("the {NOUNS}", "[checks.pieces] has no 'NOUNS'"),
    ],
)
def test_a_pattern_that_does_not_compile_is_told_by_file_key_and_pattern(tmp_path, monkeypatch, pattern, reason):
    told = broken(tmp_path, monkeypatch, "mentions = [\n", f"mentions = [\n  '{pattern}',\n")
    assert f"checks.mentions.0 = {pattern!r}" in told and reason in told


def test_a_missing_file_and_one_without_examples_are_told(tmp_path, monkeypatch):
    text = (Path(room.__file__).parent / "en.toml").read_text("utf-8")
    examples = text[text.index("[[cst.examples]]") : text.index("[answer]")]
    assert "cst.examples" in broken(tmp_path, monkeypatch, examples, "examples = []\n")
    (tmp_path / "en.toml").unlink()
    with pytest.raises(UserError, match=r"en\.toml"):
        load_prompts.__wrapped__("en")


def test_the_digest_changes_with_what_the_tree_asks_and_with_nothing_else():
    zh, en = BOTH
    assert zh.tree_digest("rewrite") == load_prompts("zh").tree_digest("rewrite") != en.tree_digest("rewrite")
    changes = [{key: "x"} for key in ("instruction", "weak_instruction", "question_instruction")]
    for change in (*changes, {"examples": zh.cst.examples[:2]}):
        assert edited(zh, "cst", **change).tree_digest("rewrite") != zh.tree_digest("rewrite")
    focused = edited(zh, "focus", instruction="x")
    assert focused.tree_digest("focus") != zh.tree_digest("focus") != zh.tree_digest("rewrite")
    assert focused.tree_digest("rewrite") == zh.tree_digest("rewrite")
    for section in ("answer", "grade"):
        assert edited(zh, section, instruction="x").tree_digest("rewrite") == zh.tree_digest("rewrite")
        assert edited(zh, section, instruction="x").answer_digest() != zh.answer_digest()


@pytest.mark.parametrize("name", ["zh", "en"])
@pytest.mark.parametrize(
    ("old", "new"), [("refusals = [", "refusals = ['xyz',"), ("(?:", "(?:xyz|"), ("subjects = [", 'subjects = ["xyz",')]
)
def test_an_edit_of_either_language_s_checks_changes_the_digests_of_trees_and_answers(
    tmp_path, monkeypatch, name, old, new
):
    before = {digest for prompts in BOTH for digest in (prompts.answer_digest(), prompts.tree_digest("rewrite"))}
    for file in map(room.prompts_file, ("zh", "en")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / f"{name}.toml").read_text("utf-8")
    assert old in text
    (tmp_path / f"{name}.toml").write_text(text.replace(old, new, 1), "utf-8")
    monkeypatch.setattr(room, "_FOLDER", tmp_path)
    monkeypatch.setattr(room, "load_prompts", functools.cache(load_prompts.__wrapped__))
    now = [room.load_prompts(prompts.language) for prompts in BOTH]
    assert all(not before & {prompts.answer_digest(), prompts.tree_digest("rewrite")} for prompts in now)


@both
def test_the_demonstration_engine_answers_a_question_alone_as_one_of_a_tree(prompts: Prompts):
    context = prompts.cst.examples[2].context
    asked = prompts.question_messages(context)
    assert all(recognise(form)[2:] == (as_text(asked[:-1]), context) for form in (asked, as_text(asked)))
    replies = {reply_to(asked, seed) for seed in range(20)}
    assert len(replies) > 3 and all(re.fullmatch(prompts.question_pattern(), reply) for reply in replies)


def test_the_demonstration_engine_follows_an_edit_of_the_prompts_while_it_runs(tmp_path, monkeypatch):
    for name in ("zh", "en"):
        (tmp_path / f"{name}.toml").write_bytes((Path(room.__file__).parent / f"{name}.toml").read_bytes())
    monkeypatch.setattr(room, "_FOLDER", tmp_path)
    edited = (tmp_path / "zh.toml").read_text("utf-8").replace("请读文本", "请细读文本")
    messages = [
        {"role": "user", "content": load_prompts.__wrapped__("zh").cst_messages("面包店七点开门。")[0]["content"]}
    ]
    messages[0]["content"] = messages[0]["content"].replace("请读文本", "请细读文本")
    assert recognise(messages).kind == "other"
    (tmp_path / "zh.toml").write_text(edited, "utf-8")
    assert recognise(messages).kind == "tree"
