"""What a model makes of a corpus, for each way to split a context: how much holds, and how much of the text is covered.

    python serve.py --model MODEL -- python benchmarks/quality.py --corpus corpus.jsonl [--roots 10] [--answers 30]

Takes one root context from the middle of each article, as many Chinese as English ones. Grows --passes trees over each,
ranks as without a scorer, and answers the first --answers queries of each language. Prints a table in Markdown,
and with --pairs a seeded sample of the pairs, unselected.
"""

import argparse
import asyncio
import dataclasses
import itertools
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from augcon.data import Answer, Example, Query, Reply, Request, RootContext  # noqa: E402
from augcon.llm.client import LLM, Endpoint  # noqa: E402
from augcon.llm.store import Store  # noqa: E402
from augcon.method.answers import AnswerRules, answer_query, plan_search, thin_out  # noqa: E402
from augcon.method.diversity import Candidates, rank_and_filter  # noqa: E402
from augcon.method.tree import Grown, TreeRules, coverage, fill_root  # noqa: E402
from augcon.ordered import map_in_order  # noqa: E402
from augcon.run.cut import CorpusRules, read_corpus  # noqa: E402
from augcon.run.inputs import prompts_for, read_examples  # noqa: E402
from augcon.text.parse import Unparseable, parse_focus, parse_question, parse_split  # noqa: E402
from augcon.text.units import language, length  # noqa: E402

CountTokens = Callable[[Iterable[str]], int]
WAYS = {
    "rewrite": TreeRules(),
    "rewrite, cut": TreeRules(bad_split="cut"),
    "focus": TreeRules(split="focus"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", default="DailyM")
    parser.add_argument("--text-field", default="article")
    parser.add_argument("--languages", default="zh,en")
    parser.add_argument("--ways", default=",".join(WAYS).replace("rewrite, cut", "rewrite_cut"))
    parser.add_argument("--roots", type=int, default=10, help="root contexts of each language")
    parser.add_argument("--max-length", type=int, default=300)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--leaf-length", type=int, default=TreeRules.leaf_length)
    parser.add_argument("--answers", type=int, default=30, help="queries to answer of each language")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=0, help="pairs to print")
    options = parser.parse_args()
    asyncio.run(measure(options))


async def measure(options: argparse.Namespace) -> None:
    """Prints the table."""
    endpoint = Endpoint(os.environ["AUGCON_API_BASE"], structured_output=False, max_in_flight=options.in_flight)
    ways = [way.replace("_", ", ") for way in options.ways.split(",")]
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "replies.sqlite") as store:
        async with LLM(endpoint, store) as llm:
            await llm.connect("")
            tokens = token_counter(llm.served.get(llm.model) or llm.model)
            chosen = {of: choose_roots(options, of) for of in options.languages.split(",")}
            asked = (figures(llm, of, chosen[of], WAYS[way], tokens, options) for of in chosen for way in ways)
            measured = iter(await asyncio.gather(*asked))  # all at once, so that the server is never idle
            for of, roots in chosen.items():
                columns = dict(zip(ways, measured, strict=False))
                print(f"\n{Path(llm.model).name}, {of}, {len(roots)} root contexts, {mean_length(roots):.0f} long\n")
                print("| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
                for name in next(iter(columns.values())):
                    print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |", flush=True)


def token_counter(model: str) -> CountTokens:
    """Counts the tokens of texts with the model's tokenizer; for the demonstration engine, AugCon's units."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    except OSError:
        return lambda written: sum(map(length, written))
    return lambda written: sum(len(tokenizer(text).input_ids) for text in written)


def choose_roots(options: argparse.Namespace, of: str) -> list[RootContext]:
    """The middle root context of each article in a language."""
    roots = read_corpus(CorpusRules(options.corpus, options.text_field, max_length=options.max_length)).roots
    middle = []
    for _, group in itertools.groupby(roots, lambda root: root.article):
        of_article = list(group)
        middle.append(of_article[len(of_article) // 2])
    return [root for root in middle if language(root.text) == of][: options.roots]


def mean_length(roots: list[RootContext]) -> float:
    return statistics.fmean(root.length for root in roots)


async def figures(
    llm: LLM, of: str, roots: list[RootContext], rules: TreeRules, tokens: CountTokens, options: argparse.Namespace
) -> dict[str, str]:
    """The figures of one way to split, by their names."""
    rules = dataclasses.replace(rules, max_passes=options.passes, leaf_length=options.leaf_length)
    prompts, parsed = prompts_for(roots[0].text, "auto"), Counter[bool]()
    written: list[str] = []

    async def ask(request: Request) -> Reply:
        reply = await llm.ask(request)
        written.append(reply.text)
        parse = parse_question if request.end else parse_focus if rules.split == "focus" else parse_split
        try:
            parse(reply.text if reply.complete else "", prompts)
            parsed[True] += 1
        except Unparseable:
            parsed[False] += 1
        return reply

    async def fill(root: RootContext) -> Grown:
        return await fill_root(ask, prompts, root, rules)

    grown = [tree async for _, tree in map_in_order(fill, roots, llm.servers.room)]
    tree_tokens = tokens(written)
    nodes = [node for tree in grown for node in tree.nodes]
    asked = [node for node in nodes if node.outcome != "too short"]
    queries = [query for node in nodes for query in node.queries]
    outcomes = Counter(node.outcome for node in asked)
    covered = [coverage(tree.root, tree.nodes) for tree in grown]
    kept = [query for tree in grown for query in keep(tree)]

    answers = await answer(llm, of, kept[: options.answers], {root.root: root for root in roots}, options)
    pairs = [answer for answer in answers if answer.text is not None]
    answer_tokens = tokens(str(answer.text) for answer in pairs)
    dropped = Counter(answer.reason for answer in answers if answer.text is None)
    for pair in random.Random(0).sample(pairs, min(options.pairs, len(pairs))):
        print(f"- {pair.query.text} → {' '.join(str(pair.text).split())}")

    def share(number: float, whole: float) -> str:
        return f"{100 * number / whole:.0f}%" if whole else "–"

    return {
        "replies that parse": share(parsed[True], parsed.total()),
        **{
            f"contexts asked whose split is {kind!r}": share(outcomes[kind], len(asked))
            for kind in ("not shorter", "hallucinated", "loses text")
        },
        "cuts replaced by the middle": share(sum(node.detail.endswith("middle") for node in asked), len(asked)),
        "text held by asked leaves": share(statistics.fmean(of[-2] for of in covered), 1),
        "the same, with parts too short to be asked": share(statistics.fmean(of[-1] for of in covered), 1),
        "queries a root context": f"{len(queries) / len(roots):.1f}",
        "of which mutually diverse": share(sum(tree.diverse for tree in grown), len(queries)),
        "root contexts with their quota": share(sum(not tree.shortfall for tree in grown), len(grown)),
        "ungrounded questions": share(sum(bool(node.doubt) for node in asked), len(queries)),
        "output tokens a kept query": f"{tree_tokens / max(1, len(kept)):.0f}",
        "output tokens an answer": f"{answer_tokens / max(1, len(pairs)):.0f}",
        "answers kept": f"{len(pairs)} of {len(answers)}",
        "answers dropped": ", ".join(f"{reason} {number}" for reason, number in dropped.most_common()) or "–",
    }


def keep(tree: Grown) -> list[Query]:
    """The queries that step 2 keeps where all scores are equal."""
    queries = [query for node in tree.nodes for query in node.queries]
    texts, scores = [query.text for query in queries], [0.0] * len(queries)
    [(places, _)] = rank_and_filter([Candidates(tree.root.quota, texts, scores)], 0.7)
    return [queries[place] for place in places]


async def answer(
    llm: LLM, of: str, queries: list[Query], roots: dict[int, RootContext], options: argparse.Namespace
) -> list[Answer]:
    """Answers with the examples that are drawn first, as if the search had chosen them."""
    examples: list[Example] = read_examples("qa_examples.jsonl,qa_examples_en.jsonl")
    search = plan_search(examples, "zh" if of == "zh" else "en", 3, 1, 42)

    async def one(query: Query) -> Answer:
        prompts, root = prompts_for(query.text, "auto"), roots[query.root]
        return await answer_query(
            llm.ask, prompts, search.shown(0), query, root.text.strip(), AnswerRules(answer_max_tokens=1024)
        )

    answers = [answered async for _, answered in map_in_order(one, queries, llm.servers.room)]
    return list(thin_out(answers, {number: root.article for number, root in roots.items()}, 0.9))


if __name__ == "__main__":
    main()
