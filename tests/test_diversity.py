"""ROUGE-L precision, and the greedy choice of mutually diverse queries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge

from augcon.method.diversity import DiverseQueries, Sweep, rank_and_filter, rouge_l_precision
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


QUERIES = st.lists(CHINESE | st.text(st.sampled_from("ab c？"), max_size=12), max_size=12)
THRESHOLDS = st.sampled_from([0.3, 0.5, 0.7, 1.0])


def plainly_alike(one: str, other: str, threshold: float) -> bool:
    """Each is made of the other's words, by the definition of the sweep."""
    a, b = words(one), words(other)
    return plain_lcs(a, b) / max(len(a), len(b), 1) >= threshold


@given(st.lists(QUERIES.filter(any), min_size=1, max_size=4), THRESHOLDS, st.integers(1, 5), st.booleans(), st.data())
def test_ranked_queries_are_kept_as_a_plain_reading_of_the_method_keeps_them(corpus, threshold, quota, swept, data):
    sweep = Sweep(threshold) if swept else None
    elsewhere: list[str] = []
    for queries in corpus:
        scores = data.draw(st.lists(st.sampled_from([-1.5, 0.0, 2.0]), min_size=len(queries), max_size=len(queries)))
        kept, fates = rank_and_filter(queries, scores, quota, threshold, sweep)

        expected: list[int] = []
        for place in sorted(range(len(queries)), key=lambda place: (-scores[place], place)):
            cut = words(queries[place])
            diverse = cut and all(plain_lcs(cut, words(queries[other])) / len(cut) < threshold for other in expected)
            new = not swept or not any(plainly_alike(queries[place], other, threshold) for other in elsewhere)
            if len(expected) < quota and diverse and new:
                expected.append(place)
        elsewhere += [queries[place] for place in expected]
        assert kept == expected
        assert [place for place, fate in enumerate(fates) if fate == "kept"] == sorted(expected)


def test_every_query_has_its_fate_and_the_place_of_one_swept_goes_to_the_next_in_rank():
    sweep = Sweep(0.7)
    first = ["面包店早上几点开门？", "谁在雨里唱歌？"]
    assert rank_and_filter(first, [1.0, 2.0], 2, 0.7, sweep) == ([1, 0], ["kept", "kept"])
    second = ["面包店早上几点开门呢？", "猫为什么怕水？", "猫为什么怕水啊？", "山上有什么树？", "河水从哪里来？"]
    assert rank_and_filter(second, [9.0, 8.0, 7.0, 6.0, 5.0], 2, 0.7, sweep) == (
        [1, 3],
        ["alike elsewhere", "kept", "alike", "kept", "over quota"],
    )
    assert rank_and_filter(second, [9.0, 8.0, 7.0, 6.0, 5.0], 2, 0.7) == (
        [0, 1],
        ["kept", "kept", "over quota", "over quota", "over quota"],
    )


@given(CHINESE, CHINESE, THRESHOLDS)
def test_the_sweep_is_symmetric(one, other, threshold):
    there, back = Sweep(threshold), Sweep(threshold)
    there.add(one)
    back.add(other)
    assert there.has_like(other) == back.has_like(one)
