"""ROUGE-L precision, and the greedy choice of mutually diverse queries."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge

from augcon.data import Query
from augcon.method.diversity import (
    Candidates,
    DiverseQueries,
    Sweep,
    last_tree_added,
    rank_and_filter,
    rouge_l_precision,
)
from augcon.text.units import words

FEW_WORDS = st.lists(st.sampled_from("abcd"), max_size=12)
CHINESE = st.text(st.sampled_from("面包店早上六点开门为什么怎样的人在哪里，？"), min_size=1, max_size=40)


def plain_lcs(a: list[str], b: list[str]) -> int:
    """The longest common subsequence by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def plainly_diverse(queries: list[str], threshold: float) -> list[str]:
    """The definition, word for word."""
    kept: list[str] = []
    for query in queries:
        cut = words(query)
        if cut and all(plain_lcs(cut, words(other)) / len(cut) < threshold for other in kept):
            kept.append(query)
    return kept


@settings(deadline=None)
@given(FEW_WORDS, FEW_WORDS)
def test_precision_is_the_common_subsequence_over_the_candidate(candidate, reference):
    expected = plain_lcs(candidate, reference) / len(candidate) if candidate else 1.0
    assert rouge_l_precision(candidate, reference) == expected


@settings(deadline=None)
@given(CHINESE, CHINESE)
def test_precision_is_that_of_the_rouge_chinese_package(candidate, reference):
    candidate, reference = words(candidate), words(reference)
    oracle = Rouge(metrics=["rouge-l"]).get_scores(" ".join(candidate), " ".join(reference))[0]["rouge-l"]["p"]
    assert rouge_l_precision(candidate, reference) == pytest.approx(oracle)


def test_precision_is_of_the_candidate_and_not_of_the_reference():
    assert rouge_l_precision(["a"], ["a", "b", "c", "d"]) == 1
    assert rouge_l_precision(["a", "b", "c", "d"], ["a"]) == 0.25
    assert rouge_l_precision(["a"], []) == 0


@settings(deadline=None)
@given(st.lists(CHINESE | st.text(st.sampled_from("ab c？")), max_size=12), st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_queries_are_kept_as_a_plain_reading_of_the_definition_keeps_them(queries, threshold):
    diverse = DiverseQueries(threshold)
    assert diverse.offer_all(queries) == len(plainly_diverse(queries, threshold))
    assert diverse.kept == plainly_diverse(queries, threshold)


def test_a_query_at_the_threshold_is_too_alike():
    diverse = DiverseQueries(0.5)
    assert diverse.offer("alpha beta")
    assert not diverse.offer("alpha gamma")
    assert diverse.offer("alpha gamma delta")


def test_later_offers_are_compared_with_all_that_was_kept_before():
    diverse = DiverseQueries(0.7)
    assert diverse.offer_all(["面包店几点开门？", "谁在雨里唱歌？"]) == 2
    assert diverse.offer_all(["谁在雨里唱歌？", "面包店几点开门？"]) == 2
    assert not diverse.offer("") and not diverse.offer(" \n")


# Few words, so that many queries are alike; some with enough of them that several may differ.
LONGER = st.text(st.sampled_from("abcdef "), min_size=1, max_size=60).map(" ".join)
QUERIES = st.lists(CHINESE | LONGER | st.text(st.sampled_from("ab c？"), max_size=12), max_size=12)
THRESHOLDS = st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0])
SCORES = st.sampled_from([-1.5, 0.0, 2.0])
CORPUS = st.lists(st.lists(st.tuples(CHINESE | LONGER | st.text(st.sampled_from("ab c？"), max_size=12), SCORES),
                           max_size=12), min_size=1, max_size=4)  # fmt: skip


def chosen(corpus: list[list[tuple[str, float]]], quotas: list[int], threshold: float, sweep: float) -> list:
    """Queries with their scores by root context → what is kept of each root context, and the fates."""
    roots = [
        Candidates(quota, [text for text, _ in queries], [score for _, score in queries])
        for quota, queries in zip(quotas, corpus, strict=True)
    ]
    return list(rank_and_filter(roots, threshold, sweep))


def plainly_diverse_from(query: str, others: list[str], threshold: float) -> bool:
    cut = words(query)
    return bool(cut) and all(plain_lcs(cut, words(other)) / len(cut) < threshold for other in others)


def plainly_alike(one: str, other: str, threshold: float) -> bool:
    """Each is made of the other's words, by the definition of the sweep."""
    a, b = words(one), words(other)
    return plain_lcs(a, b) / max(len(a), len(b), 1) >= threshold - 1e-9


@given(CORPUS, THRESHOLDS, st.integers(1, 5))
def test_within_each_root_context_queries_are_kept_as_a_plain_reading_of_the_paper_keeps_them(corpus, threshold, quota):
    for queries, (kept, fates) in zip(corpus, chosen(corpus, [quota] * len(corpus), threshold, 0), strict=True):
        expected: list[int] = []
        for place in sorted(range(len(queries)), key=lambda place: (-queries[place][1], place)):
            others = [queries[other][0] for other in expected]
            if len(expected) < quota and plainly_diverse_from(queries[place][0], others, threshold):
                expected.append(place)
        assert kept == expected
        assert [place for place, fate in enumerate(fates) if fate == "kept"] == sorted(expected)


@given(CORPUS, THRESHOLDS, THRESHOLDS, st.integers(1, 5))
def test_across_the_corpus_the_best_of_those_alike_is_kept_as_a_plain_reading_of_the_method_keeps_it(
    corpus, threshold, sweep, quota
):
    kept: dict[int, list[int]] = {number: [] for number in range(len(corpus))}
    ranked = [
        (-score, number, place) for number, queries in enumerate(corpus) for place, (_, score) in enumerate(queries)
    ]
    for _, number, place in sorted(ranked):
        query = corpus[number][place][0]
        same = [corpus[number][other][0] for other in kept[number]]
        elsewhere = [corpus[root][other][0] for root in kept for other in kept[root] if root != number]
        new = not any(plainly_alike(query, other, sweep) for other in elsewhere)
        if len(kept[number]) < quota and plainly_diverse_from(query, same, threshold) and new:
            kept[number].append(place)
    assert [places for places, _ in chosen(corpus, [quota] * len(corpus), threshold, sweep)] == list(kept.values())


def test_every_query_has_its_fate_and_the_place_of_one_swept_goes_to_the_next_in_rank():
    first = [("面包店早上几点开门？", 9.5), ("谁在雨里唱歌？", 10.0)]
    second = [
        ("面包店早上几点开门呢？", 9.0),
        ("猫为什么怕水？", 8.0),
        ("猫为什么怕水啊？", 7.0),
        ("山上有什么树？", 6.0),
        ("河水从哪里来？", 5.0),
    ]
    assert chosen([first, second], [2, 2], 0.7, 0.7) == [
        ([1, 0], ["kept", "kept"]),
        ([1, 3], ["alike elsewhere", "kept", "alike", "kept", "over quota"]),
    ]
    assert chosen([first, second], [2, 2], 0.7, 0)[1] == (
        [0, 1],
        ["kept", "kept", "over quota", "over quota", "over quota"],
    )


def test_the_sweep_leaves_alone_what_one_root_context_keeps():
    queries = [("alpha beta gamma delta eta", 2.0), ("alpha beta one two three", 1.0)]
    assert chosen([queries], [2], 0.9, 0.3) == [([0, 1], ["kept", "kept"])]
    assert chosen([[query] for query in queries], [1, 1], 0.9, 0.3)[1] == ([], ["alike elsewhere"])


def test_of_two_queries_alike_the_better_one_stays_whichever_root_context_comes_first():
    queries = [[("面包店早上几点开门？", 1.0)], [("面包店早上几点开门呢？", 2.0)]]
    assert [kept for kept, _ in chosen(queries, [1, 1], 0.7, 0.7)] == [[], [0]]
    assert [kept for kept, _ in chosen(queries[::-1], [1, 1], 0.7, 0.7)] == [[0], []]
    # One that its own root context has no room for takes no other's place.
    queries[1].insert(0, ("谁在雨里唱歌？", 3.0))
    assert [kept for kept, _ in chosen(queries, [1, 1], 0.7, 0.7)] == [[0], [0]]


@given(st.lists(QUERIES, min_size=2, max_size=2), THRESHOLDS)
@example([["上上上"], ["上" * 10]], 0.3)  # just at the threshold, where rapidfuzz rounds
def test_the_sweep_finds_all_that_is_alike_and_nothing_else(texts, threshold):
    sweep = Sweep(threshold)
    added, asked = texts
    for text in added:
        sweep.add(text)
    for text in asked:
        assert sweep.has_like(text) == any(plainly_alike(text, other, threshold) for other in added)


def test_texts_in_which_many_words_may_differ_are_found_too():
    text = [f"w{n}" for n in range(100)]
    for apart in (0, 3, 4, 10, 11):
        sweep = Sweep(0.9)
        sweep.add(" ".join(text))
        assert sweep.has_like(" ".join(["other"] * apart + text[apart:])) == (apart <= 10)
    long, short = [f"v{n}" for n in range(40)], [f"v{n}" for n in range(38)]  # the one is looked up by fours only
    for one, other in ((long, short), (short, long)):
        sweep = Sweep(0.9)
        sweep.add(" ".join(one))
        assert sweep.has_like(" ".join(other))


@given(CHINESE, CHINESE, THRESHOLDS)
def test_the_sweep_is_symmetric(one, other, threshold):
    there, back = Sweep(threshold), Sweep(threshold)
    there.add(one)
    back.add(other)
    assert there.has_like(other) == back.has_like(one)


def queries_of(*trees: list[str]) -> list[Query]:
    return [Query(f"7:{n}:{'1' * m}", 7, "", text) for n, tree in enumerate(trees) for m, text in enumerate(tree)]


def test_a_tree_that_only_repeats_the_trees_before_it_added_nothing():
    first, second = ["面包店几点开门？", "谁在雨里唱歌？"], ["谁在雨里唱歌呢？", "猫为什么怕水？"]
    assert last_tree_added(queries_of(first), 0.7) and last_tree_added(queries_of(first, second), 0.7)
    assert not last_tree_added(queries_of(first, second, first), 0.7)
    by_hand = Query("7:added:0123abcd", 7, "", second[1])
    assert not last_tree_added([*queries_of(first, [second[0]]), by_hand], 0.7)
    assert last_tree_added([*queries_of(first, second)], 0.7) and not last_tree_added([by_hand], 0.7)
    assert not last_tree_added([], 0.7)
