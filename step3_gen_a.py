"""Step 3: questions become SFT data (paper section 3.4, high-fidelity answers).

Reads results/filtered_queries.json and the example answers written by people. Searches for the examples that the
model answers best with, then answers every question. Writes into results/: example_search.json (the sets tried, with
grades), sft_data (dataset of question and answer), sft_origins.jsonl (a line a pair: where it came from) and
dropped_queries.jsonl (questions without a good answer, with the reason). Run it again and it goes on where it was.

    python step3_gen_a.py --api-base http://127.0.0.1:8000/v1
"""

import asyncio
import gc
import random
import statistics
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from augcon import progress
from augcon.errors import UserError, stage
from augcon.llm.client import LLM
from augcon.llm.ordered import map_in_order
from augcon.llm.store import Store
from augcon.method import answers as alignment
from augcon.method.answers import Answered, Graded, Search
from augcon.run.recipes import prompts_for, qa_examples, report_calls, say, server
from augcon.run.results import Results
from augcon.text.prompts import load_prompts
from augcon.text.units import length
from config import Settings, load_settings

Query = tuple[int, str, str]  # root, context, question
Searches = dict[str, Search]  # by language


@stage
def main() -> None:
    settings = load_settings(__doc__)
    print(settings.describe(), flush=True)
    results = Results(settings.results)
    gc.freeze()  # as in step 1
    gc.set_threshold(100_000, 50, 100)
    with results.held(), Store(results.store) as store:
        asyncio.run(run(settings, results, store))


async def run(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: questions, search for demonstrations, answers, figures."""
    started = time.monotonic()
    filtered = results.read_queries(results.filtered_queries)
    queries = [(root, context, question) for root, pairs in filtered.items() for context, question in pairs]
    if not queries:
        raise UserError(f"{results.filtered_queries} has no question; see the figures of steps 1 and 2")
    examples = qa_examples(settings)
    asked = Counter(prompts_for(settings, question).language for _, _, question in queries)
    searches = {
        of: alignment.plan_search(
            examples, of, settings.demonstrations, settings.candidates, random.Random(settings.seed)
        )
        for of in sorted(asked)
    }
    print(f"queries: {len(queries):,} to answer ({say(asked)}); {len(examples)} examples written by people")
    async with LLM(server(settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"server:  {settings.api_base} serves {model!r}")
        made_with = {
            "model that answers": (3, model),
            "content of the examples": (3, alignment.examples_digest(examples)),
            "content of the answer prompts": (3, {of: load_prompts(of).answer_digest() for of in searches}),
        }
        results.settle(3, {**settings.made_with(), **made_with})

        cost = 2 * sum(len(search.left_out(chosen)) for search in searches.values() for chosen in search.sets)
        with progress.bar(cost + len(queries), "answers", "calls") as bar:
            await search_all(settings, llm, searches, bar)
            results.write_json(results.example_search, {of: search.table() for of, search in searches.items()})
            outcomes = await answer_all(settings, llm, searches, queries, bar)
        for search in searches.values():
            report_search(search)
        write_data(settings, results, queries, outcomes)
        report_calls(llm, time.monotonic() - started)
        print(f"made:    {results.sft_data}, {results.sft_origins}, {results.example_search}")
    refills = results.finished().get("step 2", {}).get("refills", 0)
    results.finish(3, refills=refills, queries=results.digest(results.filtered_queries))


def rules(settings: Settings) -> alignment.AnswerRules:
    """The part of the settings that says how answers are asked for."""
    return alignment.AnswerRules(
        temperature=settings.answer_temperature,
        max_tokens=settings.answer_max_tokens,
        answer_tries=settings.answer_tries,
        tries=settings.tries,
        structured_output=settings.structured_output,
    )


async def search_all(settings: Settings, llm: LLM, searches: Searches, bar: "tqdm[None]") -> None:
    """Tries every set of examples on the examples that it leaves out."""
    trials = [
        (search, candidate, number)
        for search in searches.values()
        for candidate, chosen in enumerate(search.sets)
        for number in search.left_out(chosen)
    ]
    for search in searches.values():
        search.trials = [[] for _ in search.sets]

    async def attempt(trial: tuple[Search, int, int]) -> Graded:
        search, candidate, number = trial
        shown = [search.examples[n] for n in search.sets[candidate]]
        prompts = load_prompts(search.language)
        graded = await alignment.try_example(llm.ask, prompts, shown, search.examples[number], number, rules(settings))
        bar.update(2)
        return graded

    begun = iter(trials)
    async for graded in map_in_order(attempt, trials, 2 * settings.max_in_flight):
        search, candidate, _ = next(begun)
        search.trials[candidate].append(graded)


async def answer_all(
    settings: Settings, llm: LLM, searches: Searches, queries: list[Query], bar: "tqdm[None]"
) -> list[Answered]:
    """Answers every question with the demonstrations of its language."""
    shown = {of: search.demonstrations for of, search in searches.items()}

    async def answer(query: Query) -> Answered:
        _, context, question = query
        prompts = prompts_for(settings, question)
        answered = await alignment.answer_question(
            llm.ask, prompts, shown[prompts.language], context, question, rules(settings)
        )
        bar.set_postfix_str(f"{llm.counts['calls']:,} calls, {llm.in_flight} in flight", refresh=False)
        bar.update()
        return answered

    return [answered async for answered in map_in_order(answer, queries, 2 * settings.max_in_flight)]


def report_search(search: Search) -> None:
    """Prints the figures of one language's search."""
    whose = "" if search.own else f"no examples in {search.language}, those of other languages serve; "
    if len(search.sets) == 1:
        shown, there = len(search.sets[0]), len(search.examples)
        print(
            f"search:  {search.language}: {whose}none, " + (f"{shown} of {there}" if shown < there else f"all {there}"),
            end="",
        )
        print(" examples are shown")
        return
    means = [mean for candidate in range(len(search.sets)) if (mean := search.mean(candidate)) is not None]
    trials = [trial for trials in search.trials for trial in trials]
    ungraded = Counter(trial.detail for trial in trials if trial.grade is None)
    print(
        f"search:  {search.language}: {whose}{len(search.sets)} sets of {len(search.sets[0])} of "
        f"{len(search.examples)} examples, {len(trials) - ungraded.total():,} answers graded; "
        + (f"best mean {max(means):.2f}, mean of all {statistics.fmean(means):.2f}" if means else "")
        + ("none has half of its answers graded, so the first drawn is used" if not means else "")
        + (f"; ungraded: {say(ungraded)}" if ungraded else "")
    )


def write_data(settings: Settings, results: Results, queries: list[Query], outcomes: list[Answered]) -> None:
    """Writes the pairs, where they came from and what was dropped. Raises UserError when no pair is left."""
    kept, dropped = [], []
    reasons: Counter[str] = Counter()
    for query, outcome in zip(queries, outcomes, strict=True):
        root, context, question = query
        if outcome.answer is not None:
            kept.append((query, outcome))
            continue
        reasons[outcome.reason] += 1
        dropped.append(
            {
                "root": root,
                "context": context,
                "question": question,
                "reason": outcome.reason,
                "tries": outcome.tries,
                "reply": outcome.reply,
            }
        )
    results.write_lines(results.dropped_queries, dropped)
    origins = origins_of(results, {query for query, _ in kept})
    results.write_lines(
        results.sft_origins,
        (
            {
                "question": query[2],
                **origins[query],
                "tries": outcome.tries,
                "language": prompts_for(settings, query[2]).language,
            }
            for query, outcome in kept
        ),
    )
    columns = {"question": [query[2] for query, _ in kept], "answer": [outcome.answer for _, outcome in kept]}
    results.write_dataset(results.sft_data, columns)
    if not kept:
        raise UserError(
            f"none of the {len(queries):,} answers could be used ({say(reasons)}); "
            f"see {results.dropped_queries}, then try another model or prompt"
        )
    again = sum(outcome.tries - 1 for outcome in outcomes if outcome.tries)
    print(
        f"answers: {len(kept):,} of {len(queries):,} questions"
        + (f"; asked again {again:,} times" if again else "")
        + (f"; dropped: {say(reasons)}, listed in {results.dropped_queries}" if dropped else "")
    )
    print(f"length:  {statistics.fmean(length(outcome.answer) for _, outcome in kept):.0f} an answer in the mean")


def origins_of(results: Results, queries: set[Query]) -> dict[Query, dict[str, Any]]:
    """The article, node and score of each query; None where the files of steps 1 and 2 do not tell."""
    articles: dict[int, int] = {}
    if results.contexts.exists():
        articles = {context.root: context.article for context in results.read_contexts()}
    empty = {"path": None, "depth": None, "pass": None, "score": None}
    origins = {query: {"article": articles.get(query[0]), "root": query[0], **empty} for query in queries}
    places: dict[tuple[int, int], Query] = {}  # by root and place in queries.json[root], as scores.jsonl has them
    asked: Counter[int] = Counter()
    for node in results.read_lines(results.nodes, "step1_gen_q.py") if results.nodes.exists() else ():
        if node["query"] is None:
            continue
        place = (node["root"], asked[node["root"]])
        asked[node["root"]] += 1
        query = (node["root"], node["context"], node["query"])
        if query in origins:
            origins[query].update({name: node[name] for name in ("path", "depth", "pass")})
            places[place] = query
    for row in results.read_lines(results.scores, "step2_scorer.py") if results.scores.exists() else ():
        query = places.get((row["root"], row["index"]))
        if query and query[2] == row["question"]:
            origins[query]["score"] = row["score"]
    return origins


if __name__ == "__main__":
    main()
