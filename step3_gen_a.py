"""Step 3: queries become SFT data (paper section 3.4, high-fidelity answers).

Reads results/filtered_queries.json and the example answers written by people. Searches for the examples with which the
model answers best, then answers every query. Writes into results/: example_search.json (the sets tried, with grades),
sft_data (dataset of question and answer), sft_origins.jsonl (where each pair came from) and dropped_queries.jsonl
(queries without a good answer, with the reason). Run it again and it goes on where it was.

    python step3_gen_a.py --api-base http://127.0.0.1:8000/v1
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from augcon.cluster import on_nodes
from augcon.data import Answer, Example, Query, RootContext
from augcon.errors import UserError, stage
from augcon.files import digest, file_digest, read_lines, write_dataset, write_json, write_lines
from augcon.llm.store import Store
from augcon.method.answers import AnswerRules, Graded, Search, Trial, answer_query, plan_search, thin_out, try_examples
from augcon.ordered import map_in_order
from augcon.preflight import try_step_3
from augcon.progress import Panel, bar
from augcon.run.inputs import answer_inputs, prompts_for, read_examples, text_for
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.record import Inputs
from augcon.run.report import AnswerFigures, CallFigures, format_counts, print_search
from augcon.run.results import STEP_1, STEP_2, Results, Scored
from augcon.run.shards import cut_in_shards, hand_out_queries, join_pairs
from augcon.text.prompts import load_prompts
from augcon.text.units import Language, clean
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from tqdm import tqdm

    from augcon.llm.client import LLM

Searches = dict[Language, Search]
Shown = dict[Language, list[Example]]
Roots = dict[int, RootContext]  # by their number; empty where step 1 has left no list of them


@dataclasses.dataclass(frozen=True, slots=True)
class Doubted:
    """What is read of a line of nodes.jsonl."""

    id: str
    doubt: str = ""


@stage
def main() -> None:
    settings = load_settings(__doc__, "step 3", "server")
    run_recipe(try_step_3 if settings.dry_run else make_answers, settings)


async def make_answers(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: queries, search for examples, answers, figures."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    started = time.monotonic()
    queries = each_query(results) if settings.ray else list(each_query(results))
    languages = Counter(prompts_for(query.text, settings.language).language for query in queries)
    if not languages:
        raise UserError(f"{results.filtered_queries} has no query; see the figures of steps 1 and 2")
    number, examples = languages.total(), read_examples(settings.qa_examples)
    print(f"queries: {number:,} to answer ({format_counts(languages)}); {len(examples)} examples by people")
    searches = {
        of: plan_search(examples, of, settings.examples_shown, settings.candidates, settings.seed)
        for of in sorted(languages)
    }
    async with LLM(pick(Endpoint, settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"server:  {settings.api_base} serves {model!r}")
        inputs = {
            **answer_inputs(settings.inputs("step 3"), examples, searches),
            "model served": model,
            "sampling": llm.sampling,
        }
        same = results.record.begin("step 3", inputs, results.made("step 3"), settings.redo)

        calls = 2 * sum(len(search.trials()) for search in searches.values()) + number
        with bar(calls, "answers", "calls") as progress:
            for search in searches.values():
                await try_sets(settings, llm, search, progress)
            write_json(results.example_search, {of: search.table() for of, search in searches.items()})
            by_nodes: list[CallFigures] = []
            shown: Shown = {of: search.shown(search.winner) for of, search in searches.items()}
            if isinstance(queries, list):
                answers = await answer_all(settings, results, llm, shown, queries, progress)
            else:
                answers, by_nodes = await answer_on_nodes(settings, results, inputs, shown, progress)
        for search in searches.values():
            print_search(search)
        answers.print(results.dropped_queries)
        if not answers.kept:
            reasons = format_counts(answers.dropped)
            raise UserError(f"none of the {number:,} answers is usable ({reasons}); see {results.dropped_queries}")
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices)).beside(by_nodes)
        asked.print()
        results.keep_figures("step 3", asked, same, queries=number, dropped=answers.dropped)
        print(f"made:    {results.sft_data}, {results.sft_origins}, {results.example_search}")
    results.record.finish("step 3", queries=file_digest(results.filtered_queries))


async def try_sets(settings: Settings, llm: "LLM", search: Search, progress: "tqdm[None]") -> None:
    """Tries every set of examples on the examples that it leaves out."""
    prompts, rules = load_prompts(search.language), pick(AnswerRules, settings)

    async def attempt(trial: Trial) -> Graded:
        candidate, left_out = trial
        graded = await try_examples(llm.ask, prompts, search.shown(candidate), search.examples[left_out], rules)
        progress.update(2)
        return graded

    async for trial, graded in map_in_order(attempt, search.trials(), llm.servers.room):
        search.graded[trial] = graded


async def answer_on_nodes(
    settings: Settings, results: Results, inputs: Inputs, shown: Shown, progress: "tqdm[None]"
) -> tuple[AnswerFigures, list[CallFigures]]:
    """As ``answer_all``, shard by shard on the nodes of a Ray cluster; returns what they asked, too."""
    shards = cut_in_shards(results, settings.shard)
    hand_out_queries(results, shards)
    answers, asked = AnswerFigures(), list[CallFigures]()
    async for shard, calls in on_nodes("step3_gen_a:answer_shard", settings, shards, lambda _: (inputs, shown)):
        of_shard = shard.results.figures_of("step 3", AnswerFigures)
        answers += of_shard
        asked += [calls] if calls else []
        progress.update(of_shard.queries)
    join_pairs(results, shards)
    return answers, asked


async def answer_shard(
    settings: Settings, results: Results, store: Store, inputs: Inputs, shown: Shown
) -> CallFigures | None:
    """What a node does: the recipe for one shard. Returns what it asked, or None where all had been done."""
    from augcon.llm.client import LLM, Endpoint

    started = time.monotonic()
    read = [file_digest(path) for path in (results.contexts, results.filtered_queries, results.scores) if path.exists()]
    examples = {of: list(map(dataclasses.astuple, some)) for of, some in shown.items()}
    inputs = {**inputs, "content of the shard": digest(read, examples)}
    made = [results.sft_origins, results.dropped_queries]
    done = results.record.done_with("step 3", inputs)
    if done is not None and all(path.exists() for path in [*made, *([results.sft_data] if done["pairs"] else [])]):
        return None
    async with LLM(pick(Endpoint, settings), store) as llm:
        await llm.connect(settings.model, str(inputs["model served"]))
        same = results.record.begin("step 3", inputs, (), redo=True)
        queries = list(each_query(results))
        with bar(len(queries), "answers", "calls") as progress:
            answers = await answer_all(settings, results, llm, shown, queries, progress)
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices))
        results.keep_figures("step 3", asked, same, of=vars(answers))
        results.record.finish("step 3", pairs=answers.kept)
    return asked


def each_query(results: Results) -> Iterator[Query]:
    """The queries that step 2 has kept; memory for those of one root context."""
    for _, queries in results.each_root(results.filtered_queries):
        for query in queries:
            # As the readers of the data take its texts; a question by hand may have white space around it.
            if text := clean(query.text).strip():
                yield dataclasses.replace(query, text=text)


async def answer_all(
    settings: Settings, results: Results, llm: "LLM", shown: Shown, queries: list[Query], progress: "tqdm[None]"
) -> AnswerFigures:
    """Answers every query with the examples for its language, leaves out what is answered alike, and writes the rest.

    ``shown`` are the examples by language.
    """
    roots = {root.root: root for root in results.read_contexts()} if results.contexts.exists() else {}
    rules = pick(AnswerRules, settings)

    async def answer(query: Query) -> Answer:
        prompts = prompts_for(query.text, settings.language)
        context, title = text_for(query, roots.get(query.root), settings.answer_from)
        answered = await answer_query(llm.ask, prompts, shown[prompts.language], query, context, rules, title)
        progress.set_postfix_str(llm.state, refresh=False)
        progress.update()
        if answered.text is not None:
            panel.show(query.text, answered.text, context)
        return answered

    with Panel("question", "answer", "from") as panel:
        answers = [answered async for _, answered in map_in_order(answer, queries, llm.servers.room)]
    articles = {number: root.article for number, root in roots.items()}
    if settings.alike_answers:
        answers = list(thin_out(answers, articles, settings.alike_answers))
    write_data(settings, results, roots, answers)
    return AnswerFigures.of(answers)


def write_data(settings: Settings, results: Results, roots: Roots, answers: list[Answer]) -> None:
    """Writes the pairs, where they came from and what was dropped."""
    kept = [answer for answer in answers if answer.text is not None]
    write_lines(results.dropped_queries, (dropped_row(answer) for answer in answers if answer.text is None))
    write_lines(results.sft_origins, origins(settings, results, roots, kept))
    write_dataset(results.sft_data, ({"question": answer.query.text, "answer": answer.text} for answer in kept))


def dropped_row(answer: Answer) -> dict[str, object]:
    """A line of dropped_queries.jsonl."""
    query = answer.query
    what = {"id": query.id, "root": query.root, "context": query.context, "question": query.text}
    return {**what, "reason": answer.reason, "tries": answer.tries, "reply": answer.reply}


def origins(settings: Settings, results: Results, roots: Roots, answers: list[Answer]) -> Iterator[dict[str, object]]:
    """The lines of sft_origins.jsonl; None where the files of steps 1 and 2 do not tell."""
    scored = read_lines(results.scores, Scored, STEP_2) if results.scores.exists() else ()
    scores = {row.id: row.score for row in scored}
    nodes = read_lines(results.nodes, Doubted, STEP_1) if results.nodes.exists() else ()
    doubts = {row.id: row.doubt for row in nodes if row.doubt}
    for answer in answers:
        query = answer.query
        yield {
            "id": query.id,
            "question": query.text,
            "article": roots[query.root].article if query.root in roots else None,
            "root": query.root,
            "pass": query.pass_number,
            "path": query.path,
            "depth": None if query.path is None else len(query.path),
            "score": scores.get(query.id),
            "tries": answer.tries,
            "doubt": doubts.get(query.id, ""),
            "language": prompts_for(query.text, settings.language).language,
        }


if __name__ == "__main__":
    main()
