"""Trees that name sentences in place of rewriting, against models played by small functions (no model runs here)."""

import asyncio
import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augcon.data import Node, Refused, Reply, Request, RootContext
from augcon.method import focus
from augcon.method.tree import TreeRules, coverage, grow_tree, question_request
from augcon.text.parse import parse_focus
from augcon.text.prompts import load_prompts
from augcon.text.units import length

PROMPTS = load_prompts("en")
RULES = TreeRules(split="focus")
TEXT = " ".join(
    f"The {word} baker on the square opens at dawn and sells loaves of rye and wheat until the market closes for lunch."
    for word in ("first", "second", "third", "fourth", "fifth", "sixth")
)
ROOT = RootContext(0, 0, 0, len(TEXT), length(TEXT), 3, TEXT)
TOPICS = itertools.cycle(["bread", "flour", "rent", "ovens", "weather", "staff", "noise", "yeast", "queues", "prices"])


def grow(answer: Callable[[int, int], str], root: RootContext = ROOT, rules: TreeRules = RULES) -> list[Node]:
    """A tree over a root; ``answer`` gives the line about the cut for the first and the last sentence in focus."""

    async def ask(request: Request) -> Reply:
        first, *_, last = map(int, 2 * re.findall(r"\d+", request.messages[-1]["content"].rpartition("Focus:")[2]))
        return Reply(f"Question: What about {next(TOPICS)} and {next(TOPICS)}?\n{answer(first, last)}", complete=True)

    return asyncio.run(grow_tree(ask, PROMPTS, root, rules))


def test_every_context_is_a_run_of_sentences_of_the_root_and_all_are_covered():
    nodes = grow(lambda first, last: f"Cut after: {first}")
    assert all(node.context in TEXT and node.query for node in nodes)
    by_path = {node.path: node.context for node in nodes}
    assert by_path[""] == TEXT and by_path["1"] == TEXT.partition(" The second")[0]
    assert coverage(ROOT, nodes)[-1] == 1 and len(nodes) == 11


@pytest.mark.parametrize(
    "cut", ["", "Cut after:", "Cut after: 6", "Cut after: 0", "Cut after: none", "Cut after: 9999", "Cut: after all"]
)
def test_a_cut_that_will_not_do_is_replaced_by_the_middle(cut: str):
    nodes = grow(lambda first, last: cut if (first, last) == (1, 6) else f"Cut after: {first}")
    halves = [node.context for node in nodes if len(node.path) == 1]
    assert halves == [TEXT.partition(" The fourth")[0], TEXT[TEXT.index("The fourth") :]]
    assert nodes[0].detail == "cut in the middle" and nodes[0].tries == 1


def test_a_cut_that_leaves_a_half_too_short_is_replaced_where_the_middle_does_not():
    text = "So it is. " + TEXT
    root = dataclasses.replace(ROOT, text=text, length=length(text))
    nodes = grow(lambda first, last: f"Cut after: {first}", root)
    assert nodes[0].detail == "cut in the middle"
    assert all(length(node.context) > 3 * RULES.min_length for node in nodes if len(node.path) == 1)


def test_a_long_sentence_is_cut_at_a_clause_and_a_part_too_short_is_not_asked():
    text = "上游的石桥修好以后，去镇上的人都走石桥，带着牲口的人家还坐老渡口的木船；因为桥面太窄，牛不肯上去。"
    parts = focus.split_sentences(text, 20)
    assert len(parts) > 1 and "".join(parts) == text and all(part[-1] in "，；。" for part in parts)


@given(st.text(st.sampled_from("上游的石桥，。；a b. \n"), max_size=200), st.integers(1, 30))
def test_sentences_joined_give_back_the_text(text: str, min_length: int):
    assert "".join(focus.split_sentences(text, min_length)) == text


def test_where_there_is_nothing_to_cut_the_reply_ends_with_the_question():
    asked: list[Request] = []

    async def ask(request: Request) -> Reply:
        asked.append(request)
        return Reply(f"Question: What about {next(TOPICS)} and {next(TOPICS)}?\nCut after: 1", complete=True)

    def grow(rules: TreeRules) -> tuple[list[Node], int]:
        asked.clear()
        nodes = asyncio.run(grow_tree(ask, PROMPTS, ROOT, rules))
        assert all((node.outcome, node.tries) == ("done", 1) for node in nodes)
        return nodes, sum(bool(request.end) for request in asked)

    nodes, alone = grow(dataclasses.replace(RULES, leaf_length=0))
    assert (len(nodes), alone) == (11, 6)  # each of the six sentences
    nodes, alone = grow(dataclasses.replace(RULES, leaf_length=60))
    halved = {node.path[:-1] for node in nodes}
    assert alone == sum(node.path not in halved for node in nodes) == 4
    assert all((length(node.context) < 60) == (node.path not in halved) for node in nodes)


def test_a_question_may_name_what_the_rest_of_the_root_context_holds():
    text = TEXT + " All of them learnt from Agnes Brandt in 1931, as their parents had done before they took over."
    root = dataclasses.replace(ROOT, text=text, length=length(text))

    async def resolves(request: Request) -> Reply:
        about = "Paris" if request.messages[-1]["content"].endswith("[1]") else "Agnes Brandt"
        return Reply(f"Question: What did {about} teach the {next(TOPICS)} and {next(TOPICS)}?", complete=True)

    nodes = asyncio.run(grow_tree(resolves, PROMPTS, root, RULES))
    assert {node.doubt for node in nodes if node.context.startswith("The second")} == {""}
    assert [node.doubt for node in nodes if node.context.startswith("The first") and node.query][-1].endswith("Paris")


def test_a_refused_or_unparseable_node_ends_alone_with_its_reason():
    async def refuses(_: Request) -> Reply:
        raise Refused("refused with status 400")

    (node,) = asyncio.run(grow_tree(refuses, PROMPTS, ROOT, RULES))
    assert (node.outcome, node.detail) == ("failed", "refused with status 400")


def test_the_root_comes_before_what_is_asked_of_it_so_that_a_prefix_cache_serves_the_tree():
    whole, part = (
        question_request(PROMPTS, ROOT, context, RULES).messages for context in (TEXT, TEXT.partition(" The third")[0])
    )
    assert whole[:-1] == part[:-1]
    shared = whole[-1]["content"].partition("Focus:")[0]
    assert part[-1]["content"] == shared + "Focus: [1]–[2]" and whole[-1]["content"] == shared + "Focus: [1]–[6]"


def test_negatives_have_weaker_prompts_about_the_same_sentences():
    weak = question_request(PROMPTS, ROOT, TEXT, RULES, weak=True).messages
    one = question_request(PROMPTS, ROOT, TEXT, RULES, examples=1).messages
    assert weak[0]["content"].startswith(PROMPTS.focus.weak_instruction) and len(weak) == 7
    assert one[0]["content"].startswith(PROMPTS.focus.instruction) and len(one) == 3
    assert weak[-1] == one[-1]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_examples_keep_their_own_rules(language: str):
    prompts = load_prompts("zh" if language == "zh" else "en")
    for example in prompts.focus.examples:
        first, last = example.focus
        assert 1 <= first <= last <= len(example.sentences)
        assert first <= example.cut < last or first == example.cut == last
        assert parse_focus(f"{prompts.labels.question}: Is this it?\n{prompts.labels.cut}: {example.cut}", prompts) == (
            "Is this it?",
            example.cut,
        )
