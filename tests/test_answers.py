"""The search for demonstrations: what is tried, what wins, and what is said where it cannot be."""

import asyncio
import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augcon.data import Answer, Example, Query, Refused, Reply, Request
from augcon.errors import UserError
from augcon.method.answers import AnswerRules, Graded, Search, answer_query, plan_search, thin_out, try_examples
from augcon.run.inputs import read_examples
from augcon.text.prompts import load_prompts

ZH = load_prompts("zh")
CHINESE = [Example(f"第{n}段。", f"第{n}个问题是什么？", f"第{n}个回答。") for n in range(6)]
ENGLISH = [Example(f"Text {n}.", f"What is question {n}?", f"Answer {n}.") for n in range(3)]
ASKED = Query("0:0:", 0, "甲。", "是什么？")
RULES = AnswerRules()


class Model:
    """Replies in turn, the last one again and again; remembers the requests."""

    def __init__(self, *replies: str | Reply | Exception) -> None:
        self.replies, self.requests = list(replies), []

    async def __call__(self, request: Request) -> Reply:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Reply) else Reply(reply, True)


def search_with(*grades: list[int | None]) -> Search:
    """A search with these grades for its sets."""
    graded = {(candidate, n): Graded("a", grade) for candidate, row in enumerate(grades) for n, grade in enumerate(row)}
    return Search("zh", CHINESE, [(n,) for n in range(len(grades))], True, graded)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 99))
def test_different_sets_of_the_size_asked_for_as_many_as_there_are(size: int, candidates: int, seed: int):
    search = plan_search(CHINESE + ENGLISH, "zh", size, candidates, seed)
    assert search.examples == CHINESE and search.own
    assert len(search.sets) == len(set(search.sets)) == min(candidates, math.comb(6, size))
    trials = search.trials()
    for candidate, chosen in enumerate(search.sets):
        assert len(set(chosen)) == size
        left_out = [example for of, example in trials if of == candidate]
        assert not trials or sorted([*chosen, *left_out]) == list(range(6))
    assert search == plan_search(CHINESE + ENGLISH, "zh", size, candidates, seed)


def test_another_seed_draws_other_sets():
    assert plan_search(CHINESE, "zh", 3, 5, 1).sets != plan_search(CHINESE, "zh", 3, 5, 2).sets


def test_with_too_few_examples_all_are_shown_and_nothing_is_searched():
    search = plan_search(ENGLISH, "en", 3, 16, 0)
    assert search.sets == [(0, 1, 2)] and search.trials() == []
    assert search.shown(search.winner) == ENGLISH


def test_a_language_without_examples_uses_those_of_others():
    search = plan_search(ENGLISH, "zh", 2, 16, 0)
    assert not search.own and search.examples == ENGLISH and len(search.sets) == 3


@pytest.mark.parametrize(
    ("grades", "winner"),
    [
        ([[5, 5], [9, 8], [7, 7]], 1),
        ([[5, 5], [8, 8], [8, 8]], 1),  # of equals the first drawn
        ([[2, 2, 2], [10, None, None], [3, None, 3]], 2),  # fewer than half graded cannot win
        ([[2, 2], [10, None]], 1),  # half is enough
        ([[None, None], [None, None]], 0),
    ],
)
def test_the_best_mean_grade_wins(grades: list[list[int | None]], winner: int):
    search = search_with(*grades)
    assert search.winner == winner and search.table()["chosen"] == (winner,)
    assert search.shown(search.winner) == [CHINESE[winner]]


def test_an_ungraded_set_has_no_mean_in_the_table():
    table = search_with([4, 6, None], [None, None, 9]).table()
    assert [row["mean"] for row in table["sets"]] == [5.0, None]
    assert table["sets"][0]["answers"][2]["grade"] is None


def attempt(model: Model, rules: AnswerRules = RULES) -> Graded:
    """What comes of the sixth example where the first two are shown."""
    return asyncio.run(try_examples(model, ZH, CHINESE[:2], CHINESE[5], rules))


def answer(model: Model, shown: list[Example]) -> Answer:
    return asyncio.run(answer_query(model, ZH, shown, ASKED, ASKED.context, RULES))


def test_a_left_out_example_is_answered_then_graded_against_the_human_answer():
    model = Model("答案：第五。", "评分：7")
    graded = attempt(model)
    assert graded == Graded("第五。", 7)
    asked, grading = model.requests
    assert (
        asked.messages == ZH.answer_messages(CHINESE[:2], CHINESE[5].context, CHINESE[5].question)
        and asked.temperature == 0.2
    )
    assert (
        grading.messages == ZH.grade_messages(*dataclasses.astuple(CHINESE[5]), "第五。") and grading.temperature == 0
    )


def test_an_unreadable_grade_is_asked_again_by_a_draw_that_can_differ_and_never_guessed():
    model = Model("第五。", "这个回答不错，8", "评分：6")
    assert attempt(model).grade == 6
    assert model.requests[2].sample == 1 and model.requests[2].temperature > 0
    model = Model("第五。", "这个回答不错，8")
    assert attempt(model) == Graded("第五。", None, "no grade")
    assert len(model.requests) == 1 + RULES.tries


def test_an_example_without_an_answer_is_not_graded():
    model = Model(" ")
    graded = attempt(model)
    assert graded == Graded(None, None, "no answer: empty") and len(model.requests) == RULES.answer_tries
    graded = attempt(Model(Refused("too long")))
    assert graded.detail == "no answer: too long"


def test_a_server_can_be_held_to_the_form_of_a_grade():
    model = Model("好", "评分：3")
    attempt(model)
    assert [request.pattern for request in model.requests] == [None, "评分：([1-9]|10)"]


def test_answers_are_asked_for_again_with_fresh_samples_and_then_dropped_with_the_reason():
    model = Model("根据文本，是甲。", Reply("是", complete=False), "答案：是甲。")
    answered = answer(model, CHINESE[:3])
    assert (answered.text, answered.tries) == ("是甲。", 3)
    assert [request.sample for request in model.requests] == [0, 1, 2]
    model = Model("根据文本，是甲。")
    answered = answer(model, [])
    assert (answered.text, answered.tries, answered.reason) == (None, 3, "speaks of the text")
    assert answered.reply == "根据文本，是甲。"
    answered = answer(Model(Refused("refused")), [])
    assert (answered.text, answered.tries, answered.reason) == (None, 0, "refused")


def row(**changes: object) -> str:
    return json.dumps({"context": "甲。", "question": "是什么？", "answer": "是甲。"} | changes, ensure_ascii=False)


def test_examples_are_read_whatever_the_editor_left(tmp_path: Path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(("\ufeff" + row(note=1) + "\r\n\r\n  \n" + row(answer=" 乙\r\n丙 ")).encode())
    assert read_examples(str(path)) == [Example("甲。", "是什么？", "是甲。"), Example("甲。", "是什么？", "乙\n丙")]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty file"]),
        (b"\n\n", ["no rows"]),
        (f"{row()}\n{{".encode(), ["row 2", "not JSON"]),
        (f"{row()}\n\n{row()}".encode("gb18030"), ["row 1", "UTF-8"]),
        (b"[1]", ["row 1", "context, question, answer"]),
        (b"[" * 100_000, ["row 1"]),
        (b'{"context": "a", "question": "b"}', ["row 1", "'answer'", "None"]),
        (row(answer=7).encode(), ["row 1", "'answer'", "7"]),
        (row(context=" \n").encode(), ["row 1", "'context'"]),
    ],
)
def test_a_bad_file_of_examples_is_named_with_its_line(tmp_path: Path, content: bytes, parts: list[str]):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_examples(str(path))
    assert all(part in str(error.value) for part in ("--qa-examples", "bad.jsonl", *parts))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no\.jsonl"):
        read_examples(str(tmp_path / "no.jsonl"))


def test_the_whole_root_context_is_shown_with_the_node_in_focus_and_the_answer_is_checked_against_it():
    model = Model("第五。")
    asyncio.run(answer_query(model, ZH, [], ASKED, f"前文。{ASKED.context}后文。", RULES))
    asyncio.run(answer_query(model, ZH, [], ASKED, f"{ASKED.context}\n", RULES))
    within, alone = (request.messages[-1]["content"] for request in model.requests)
    assert f"前文。{ASKED.context}后文。\n\n所问部分：{ASKED.context}\n\n问题：{ASKED.text}" in within
    assert "所问部分：" not in alone.rpartition("文本：")[2]


def test_what_the_root_context_itself_says_is_no_mention_of_it():
    said = "文章指出，桥已经拆了。"
    for context, text in ((f"{ASKED.context}{said}", said), (ASKED.context, None)):
        assert asyncio.run(answer_query(Model(said), ZH, [], ASKED, context, RULES)).text == text


def answered(root: int, text: str | None) -> Answer:
    return Answer(Query(f"{root}:0:", root, "文本", f"第{root}问？"), text, 1)


def test_answers_on_one_article_that_say_the_same_are_thinned_out():
    said = "面包店每天早上七点开门，晚上九点关门，周日休息。"
    answers = [
        answered(0, said),
        answered(1, said.replace("周日", "周一")),
        answered(2, said),  # of another article
        answered(0, "老板是本地人。"),
        answered(1, None),
        answered(7, said),  # of an article that nothing is known of
        answered(7, said),
    ]
    kept = list(thin_out(answers, {0: 0, 1: 0, 2: 1}, 0.9))
    assert [answer.text for answer in kept] == [said, None, said, "老板是本地人。", None, said, None]
    assert (kept[1].reason, kept[1].reply) == ("says what another answer says", answers[1].text)
    assert list(thin_out(answers, {0: 0, 1: 0, 2: 1}, 1.0))[1].text is not None
