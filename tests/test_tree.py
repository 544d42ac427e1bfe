"""The Context-Split-Tree against models played by small functions (no model runs here)."""

import asyncio
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest

from augcon.data import TOO_LONG, Node, Query, Refused, Reply, Request, RootContext, ScorerPair
from augcon.method import pairs
from augcon.method.questions import COPY
from augcon.method.tree import Grown, TreeRules, coverage, fill_root, grow_tree
from augcon.text.prompts import load_prompts
from augcon.text.units import length, sentences

PROMPTS = load_prompts("zh")
RULES = TreeRules()
TEXT = "".join(f"第{word}条街上新开了一家面包店，每天早上{word}点开门。" for word in "一二三四五六七八")
SUBJECTS = [
    "面包",
    "牛奶",
    "房租",
    "医保",
    "电梯",
    "公园",
    "菜价",
    "快递",
    "天气",
    "学校",
    "地铁",
    "养老",
    "书店",
    "停车",
]


def root_of(text: str, quota: int = 3) -> RootContext:
    return RootContext(0, 0, 0, len(text), length(text), quota, text)


def context_of(request: Request) -> str:
    return request.messages[-1]["content"].partition("\n")[2]


def halves_of(context: str) -> tuple[str, str]:
    pieces = sentences(context)
    if len(pieces) < 2:
        return context, ""
    return "".join(pieces[: len(pieces) // 2]), "".join(pieces[len(pieces) // 2 :])


class Model:
    """Answers well; ``odd`` may answer a request in its own way or raise. Keeps what it was asked."""

    def __init__(self, odd: Callable[[str, Request], str | Reply | None] = lambda context, request: None) -> None:
        self.asked: list[Request] = []
        self.odd = odd

    async def __call__(self, request: Request) -> Reply:
        self.asked.append(request)
        await asyncio.sleep(0)
        context = context_of(request)
        answer = self.odd(context, request)
        if answer is None:
            n = len(self.asked)
            question = f"{SUBJECTS[n % 14]}对{SUBJECTS[(n * 5 + 3) % 14]}有什么要紧的？"
            answer = PROMPTS.cst_reply(question, halves_of(context))
        return answer if isinstance(answer, Reply) else Reply(answer, complete=True)


def grow(model: Model, text: str = TEXT, rules: TreeRules = RULES) -> list[Node]:
    return asyncio.run(grow_tree(model, PROMPTS, root_of(text), rules))


def test_one_call_gives_the_query_and_the_split_and_every_node_is_visited_once():
    model = Model()
    nodes = grow(model)
    assert len(model.asked) == sum(node.query is not None for node in nodes) > 7
    assert [node.path for node in nodes] == sorted({node.path for node in nodes})
    by_path = {node.path: node for node in nodes}
    for node in nodes[1:]:
        assert node.context in by_path[node.path[:-1]].context
    leaves = [node for node in nodes if node.path + "1" not in by_path]
    assert "".join(node.context for node in leaves) == TEXT
    assert len({node.id for node in nodes}) == len(nodes) and by_path["12"].id == "0:0:12"
    (query,) = by_path["12"].queries
    assert (query.id, query.root, query.pass_number, query.path) == ("0:0:12", 0, 0, "12")


def test_a_context_below_min_length_is_asked_nothing():
    model = Model()
    assert [node.outcome for node in grow(model, "面包店开门了。")] == ["too short"]
    assert model.asked == []


SHORT = "第一条街上新开了一家面包店，每天早上一点开门，晚上十点关门。"
WHOLE = dataclasses.replace(RULES, leaf_length=0)  # every context is split


def test_a_context_below_leaf_length_is_asked_for_its_question_alone():
    model = Model()
    nodes = grow(model)
    short = [node for node in nodes if length(node.context) < RULES.leaf_length]
    assert short and all((node.outcome, node.tries, bool(node.query)) == ("done", 1, True) for node in short)
    assert not any(other.path.startswith(f"{node.path}1") for node in short for other in nodes)
    alone = [request for request in model.asked if request.end]
    assert [request.messages for request in alone] == [PROMPTS.question_messages(node.context) for node in short]
    assert all(request.pattern == PROMPTS.question_pattern() for request in alone)
    whole = Model()
    assert len(grow(whole, rules=WHOLE)) == len(nodes) and not any(request.end for request in whole.asked)


def test_a_context_without_a_question_of_its_own_ends_alone_with_the_reason():
    def odd(context: str, request: Request) -> str | None:
        if request.end and context == short[0].context:
            raise Refused("refused with status 400")
        return "我不明白。" if context == short[1].context else None

    short = [node for node in grow(Model()) if length(node.context) < RULES.leaf_length]
    by_path = {node.path: node for node in grow(Model(odd))}
    refused, unread, *others = (by_path[node.path] for node in short)
    assert (refused.outcome, refused.detail, refused.tries) == ("failed", "refused with status 400", 0)
    assert (unread.outcome, unread.detail, unread.tries) == ("not parseable", "no question", 4)
    assert not refused.query and not unread.query and all(node.query for node in others)


def test_the_query_is_kept_where_a_half_is_hallucinated_and_the_halves_are_not():
    def invents(context: str, _: Request) -> str | None:
        if context == TEXT:
            return None
        return PROMPTS.cst_reply(
            "这家面包店怎么样呢？", (context[:30], "月亮背面的宇航员昨夜梦见了一片蓝色大海和许多鲸鱼。")
        )

    nodes = grow(Model(invents))
    assert Counter(node.outcome for node in nodes) == {"done": 1, "hallucinated": 2}
    assert all(node.query or node.detail == COPY for node in nodes)


LOSES = ("".join(sentences(TEXT)[:2]), "".join(sentences(TEXT)[6:]))
BAD_SPLITS = {
    "not shorter": (TEXT, ""),
    "hallucinated": (halves_of(TEXT)[0], "月亮背面的宇航员昨夜梦见了一片蓝色大海和许多鲸鱼。"),
    "loses text": LOSES,
}


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_a_bad_split_is_asked_for_again_and_the_first_question_is_kept(kind: str):
    def bad_twice(context: str, request: Request) -> str | None:
        if context == TEXT and request.sample < 2:
            return PROMPTS.cst_reply(f"面包店第{request.sample}次几点开门呢？", BAD_SPLITS[kind])
        return None

    nodes = grow(Model(bad_twice))
    assert (nodes[0].outcome, nodes[0].tries, nodes[0].query) == ("done", 3, "面包店第0次几点开门呢？")
    assert len(nodes) > 7


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_a_split_that_stays_bad_ends_the_branch_with_its_kind(kind: str):
    model = Model(lambda context, _: PROMPTS.cst_reply("面包店几点开门呢？", BAD_SPLITS[kind]))
    (node,) = grow(model)
    assert (node.outcome, node.query, node.tries) == (kind, "面包店几点开门呢？", RULES.tries)


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_or_is_cut_at_the_sentence_end_nearest_the_middle_and_the_tree_goes_on(kind: str):
    def bad(context: str, _: Request) -> str | None:
        return PROMPTS.cst_reply("面包店几点开门呢？", BAD_SPLITS[kind]) if context == TEXT else None

    nodes = grow(Model(bad), rules=dataclasses.replace(RULES, bad_split="cut"))
    assert (nodes[0].outcome, nodes[0].detail) == (kind, "cut in the middle")
    by_path = {node.path: node.context for node in nodes}
    assert (by_path["1"], by_path["2"]) == halves_of(TEXT)
    assert coverage(root_of(TEXT), nodes)[-1] == 1


def test_a_single_sentence_that_does_not_divide_is_asked_once():
    model = Model(lambda context, _: PROMPTS.cst_reply("面包店几点开门呢？", (SHORT, "")))
    (node,) = grow(model, SHORT, WHOLE)
    assert (node.outcome, node.tries, len(model.asked)) == ("not shorter", 1, 1)


def test_talk_after_the_second_half_is_no_part_of_it():
    def chatty(context: str, request: Request) -> str | None:
        if context != TEXT:
            return None
        return PROMPTS.cst_reply("面包店几点开门呢？", halves_of(TEXT)) + "\n\n希望以上拆分对您有所帮助！"

    assert [node.context for node in grow(Model(chatty)) if node.path == "2"] == [halves_of(TEXT)[1]]


@pytest.mark.parametrize("why", ["cut off", "refused"])
def test_a_context_too_large_for_the_model_is_cut_by_us(why: str):
    def overflows(context: str, _: Request) -> Reply | None:
        if context != TEXT:
            return None
        if why == "refused":
            raise Refused(TOO_LONG)
        return Reply(f"问题：面包店几点开门呢？\n片段1：{context[:50]}", complete=False)

    model = Model(overflows)
    nodes = grow(model)
    assert nodes[0].query == ("面包店几点开门呢？" if why == "cut off" else None)
    assert nodes[0].detail.endswith("cut in the middle") and len(nodes) > 7
    assert sum(context_of(request) == TEXT for request in model.asked) == (2 if why == "cut off" else 1)


def test_an_ungrounded_question_is_asked_again_alone_then_marked():
    def dreams(context: str, request: Request) -> str | None:
        question = f"{request.sample}号桥头的1987年《月亮报》讲了什么？"
        return PROMPTS.cst_reply(question, halves_of(context)) if context == TEXT else None

    model = Model(dreams)
    root = grow(model)[0]
    of_root = [request for request in model.asked if context_of(request) == TEXT]
    assert [bool(request.end) for request in of_root] == [False, True, True, True]  # none but the first wrote halves
    assert root.query == "0号桥头的1987年《月亮报》讲了什么？" and "1987" in root.doubt
    better = Model(lambda context, request: dreams(context, request) if request.sample < 2 else None)
    root = grow(better)[0]
    assert (root.doubt, root.tries) == ("", 3) and root.query and root.query.endswith("有什么要紧的？")


def test_a_question_that_is_asked_for_again_is_drawn_anew_even_at_temperature_0():
    model = Model(lambda *_: "问题：1987年《月亮报》讲了什么？")
    (node,) = grow(model, SHORT, dataclasses.replace(RULES, query_temperature=0))
    assert [(request.sample, request.temperature) for request in model.asked] == [(0, 0), (1, 0.7), (2, 0.7), (3, 0.7)]
    assert node.query and "1987" in node.doubt


def test_a_question_that_speaks_of_the_text_is_asked_again_alone():
    def points(context: str, request: Request) -> str | None:
        return PROMPTS.cst_reply("作者在文中的态度是怎样的？", halves_of(context)) if not request.sample else None

    root = grow(Model(points))[0]
    assert (root.tries, root.doubt) == (2, "") and root.query and "文中" not in root.query


def test_a_copy_of_the_question_above_is_not_kept_and_the_tree_goes_on():
    same = Model(lambda context, _: PROMPTS.cst_reply("面包店每天几点开门呢？", halves_of(context)))
    nodes = grow(same)
    assert [node.query for node in nodes if node.query] == ["面包店每天几点开门呢？"]
    assert nodes[1].detail == COPY and len(nodes) > 7


def test_coverage_tells_by_depth_what_the_asked_leaves_hold():
    text = "街上有面包店。" * 6
    nodes = [
        Node(0, 0, "", text, "问", "loses text"),
        Node(0, 0, "1", text[:14], "问", "done"),
        Node(0, 0, "2", text[14:21], None, "too short"),
    ]
    assert coverage(root_of(text), nodes) == pytest.approx([1, 2 / 6, 3 / 6])
    assert coverage(root_of(text), nodes[:1]) == [1, 1]
    assert coverage(root_of("短。"), [Node(0, 0, "", "短。", None, "too short")]) == [0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "好的。",
        "问题：短\n片段1：甲\n片段2：乙",
    ],
)
def test_a_bad_reply_is_asked_again_with_a_fresh_sample(bad: str | Reply):
    model = Model(lambda context, request: bad if request.sample % RULES.tries < RULES.tries - 1 else None)
    nodes = grow(model)
    assert {node.outcome for node in nodes} <= {"done", "not shorter"}
    of_root = [request.sample for request in model.asked if context_of(request) == TEXT]
    assert of_root == [0, 1, 2, 3] and nodes[0].tries == 4


def test_a_node_that_never_parses_ends_alone_and_its_siblings_go_on():
    stubborn = halves_of(TEXT)[0]
    model = Model(lambda context, _: "我不明白。" if context == stubborn else None)
    nodes = grow(model)
    assert [node.path for node in nodes if node.outcome == "not parseable"] == ["1"]
    assert sum(context_of(request) == stubborn for request in model.asked) == RULES.tries
    assert sum(node.path.startswith("2") and node.query is not None for node in nodes) >= 3


def test_a_refused_node_fails_alone_with_its_reason():
    def too_long(context: str, _: Request) -> None:
        if context == halves_of(TEXT)[1]:
            raise Refused("refused with status 400")

    nodes = grow(Model(too_long))
    failed = [node for node in nodes if node.outcome == "failed"]
    assert [(node.path, node.detail) for node in failed] == [("2", "refused with status 400")]
    assert sum(node.path.startswith("1") and node.query is not None for node in nodes) >= 3


def test_an_error_of_the_run_is_not_swallowed():
    def breaks(context: str, _: Request) -> None:
        if context != TEXT:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        grow(Model(breaks))


@pytest.mark.parametrize("keep", ["both nearly whole", "one character shorter", "one character shorter and empty"])
def test_a_tree_stays_linear_whatever_the_model_returns(keep: str):
    text = "街上新开了一家面包店每天早上七点开门" * 20

    def greedy(context: str, _: Request) -> str:
        halves = {
            "both nearly whole": (context[1:], context[:-1]),
            "one character shorter": (context[1:], context[:1]),
            "one character shorter and empty": (context[1:], ""),
        }[keep]
        return PROMPTS.cst_reply("这家面包店几点开门呢？", halves)

    nodes = grow(Model(greedy), text)
    assert len(nodes) < len(text)


def test_passes_are_repeated_until_the_quota_of_diverse_queries_is_covered():
    numbers = itertools.count()

    def diverse(context: str, _: Request) -> str:
        n = next(numbers)
        return PROMPTS.cst_reply(f"{SUBJECTS[n % 14]}与{SUBJECTS[(n * 5 + 3) % 14]}在哪里", (context, ""))

    result = asyncio.run(fill_root(Model(diverse), PROMPTS, root_of(TEXT, quota=4), RULES))
    assert result.diverse >= math.ceil(1.15 * 4) and result.passes == 5 and result.shortfall == ""
    assert [node.pass_number for node in result.nodes] == [0, 1, 2, 3, 4]


def test_a_root_whose_queries_repeat_stops_at_max_passes_and_says_why():
    same = Model(lambda context, _: PROMPTS.cst_reply("面包店每天几点开门呢？", (context, "")))
    result = asyncio.run(fill_root(same, PROMPTS, root_of(TEXT, quota=4), RULES))
    assert result.passes == RULES.max_passes and result.diverse == 1
    assert result.shortfall == f"1 of 4 diverse queries after {RULES.max_passes} passes"
    assert [request.sample for request in same.asked] == list(range(RULES.max_passes * RULES.tries))


@pytest.mark.parametrize(("text", "passes", "reason"), [("开门了。", 1, "too short"), (TEXT, 2, "failed, failed")])
def test_a_root_that_can_bear_no_query_is_soon_given_up_and_says_why(text: str, passes: int, reason: str):
    def refuses(context: str, _: Request) -> None:
        raise Refused("no")

    result = asyncio.run(fill_root(Model(refuses), PROMPTS, root_of(text), RULES))
    assert (result.passes, result.shortfall) == (passes, "failed" if passes == 2 else reason)


def test_a_pass_that_the_server_refuses_does_not_end_the_others():
    def once(context: str, request: Request) -> None:
        if request.sample == 0:
            raise Refused("failed 6 times")

    result = asyncio.run(fill_root(Model(once), PROMPTS, root_of(TEXT), RULES))
    assert result.passes > 1 and result.diverse >= 1


def test_the_scorer_learns_from_queries_without_a_doubt():
    nodes = [
        Node(0, 0, "", TEXT, "问一？", "done"),
        Node(0, 0, "1", TEXT, "问二？", "done", doubt="speaks of the text"),
    ]
    assert [query.text for query in Grown(root_of(TEXT), nodes, 1, 2).good_queries] == ["问一？"]


def test_a_refill_grows_one_more_tree_each_over_what_was_grown_before():
    numbers = itertools.count()

    def fresh(context: str, _: Request) -> str:
        return PROMPTS.cst_reply(f"第{next(numbers)}个问题问的是什么？", (context, ""))

    before = asyncio.run(fill_root(Model(fresh), PROMPTS, root_of(TEXT, quota=1), RULES))
    numbers = itertools.count()
    after = asyncio.run(fill_root(Model(fresh), PROMPTS, root_of(TEXT, quota=1), RULES, refills=2))
    assert (after.passes, after.refills) == (before.passes + 2, 2) and before.refills == 0
    assert after.nodes[: len(before.nodes)] == before.nodes
    assert [node.pass_number for node in after.nodes if not node.path] == list(range(after.passes))


def pairs_of(model: Model, queries: list[Query], negatives: int = 100) -> list[ScorerPair | str]:
    async def collect() -> list[ScorerPair | str]:
        roots = [root_of(query.context) for query in QUERIES]
        source = pairs.make_pairs(model, lambda root: PROMPTS, roots, queries, negatives, RULES, room=lambda: 8)
        return [outcome async for outcome in source]

    return asyncio.run(collect())


QUERIES = [Query(f"{n}:0:", n, f"{TEXT}{n}", f"第{n}家面包店几点开门？") for n in range(60)]


def test_negatives_come_from_the_three_weaker_prompts_and_stop_after_the_question():
    model = Model(lambda context, request: f"问题：{len(request.messages)}面包怎么样")
    made = pairs_of(model, QUERIES, negatives=5)
    assert Counter(pair.type for pair in made) == dict.fromkeys(pairs.NEGATIVES, 5)
    seen = Counter(
        (request.messages[0]["content"].startswith(PROMPTS.cst.weak_instruction), len(request.messages))
        for request in model.asked
    )
    assert seen == {(True, 7): 5, (False, 3): 5, (True, 3): 5}
    assert all(request.end == PROMPTS.end_of_question() for request in model.asked)
    assert PROMPTS.end_of_question()[:2] == ("\n片段1：", "\n片段1:")
    good = {query.id: (query.root, query.context, query.text) for query in QUERIES}
    assert all(good[pair.id] == (pair.root, pair.context, pair.pos_query) for pair in made)
    assert all(pair.pos_query != pair.neg_query for pair in made)


def test_a_worse_question_about_a_short_context_comes_from_the_same_weaker_prompts():
    root = root_of(SHORT)
    assert pairs.question_request(PROMPTS, root, SHORT, RULES).messages == PROMPTS.question_messages(SHORT)
    for weaker in pairs.NEGATIVES.values():
        request = pairs.question_request(PROMPTS, root, SHORT, RULES, **weaker)
        assert request.messages == PROMPTS.cst_messages(SHORT, **weaker)


def test_a_negative_like_the_good_query_is_asked_for_again_then_thrown_away_and_replaced_from_the_reserve():
    def equal(context: str, request: Request) -> str:
        number = int(context.removeprefix(TEXT))
        return f"问题：第{number}家面包店几点开门？" if number % 4 == 0 else "问题：面包怎么样"

    model = Model(equal)
    outcomes = pairs_of(model, QUERIES, negatives=6)
    made = [outcome for outcome in outcomes if isinstance(outcome, ScorerPair)]
    assert Counter(pair.type for pair in made) == dict.fromkeys(pairs.NEGATIVES, 6)
    assert set(outcomes) - set(made) == {"like the good one"}
    thrown_away = len(outcomes) - len(made)
    assert len(model.asked) == len(made) + RULES.tries * thrown_away
    assert all(pair.pos_query != pair.neg_query for pair in made)


def test_a_negative_that_differs_from_the_good_query_by_a_mark_is_like_it():
    def nearly(context: str, request: Request) -> str:
        return f"问题：第{context.removeprefix(TEXT)}家面包店几点开门"

    assert set(pairs_of(Model(nearly), QUERIES, negatives=1)) == {"like the good one"}


def test_a_stop_string_is_used_once_as_it_may_have_cut_the_reply_short():
    model = Model(lambda context, request: "嗯" if request.end else "问题：面包怎么样")
    assert len(pairs_of(model, QUERIES, negatives=3)) == 9


def test_types_are_balanced_unless_one_can_hardly_be_had():
    def made(*sizes: int) -> dict[str, list[ScorerPair]]:
        kinds = zip(pairs.NEGATIVES, sizes, strict=True)
        return {kind: [ScorerPair("c", "p", "n", kind, n, f"{n}:0:") for n in range(size)] for kind, size in kinds}

    assert Counter(pair.type for pair in pairs.balance(made(30, 28, 29))) == dict.fromkeys(pairs.NEGATIVES, 28)
    assert len(pairs.balance(made(30, 0, 29))) == 59
    assert pairs.balance(made(0, 0, 0)) == []


def test_on_a_small_corpus_each_type_has_at_most_a_third_of_the_queries():
    made = pairs_of(Model(lambda context, request: "问题：面包怎么样"), QUERIES[:11])
    assert Counter(pair.type for pair in made) == dict.fromkeys(pairs.NEGATIVES, 3)
    assert len({pair.root for pair in made}) == 9
    assert pairs_of(Model(), QUERIES[:2]) == []
