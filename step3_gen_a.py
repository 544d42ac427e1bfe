"""Step 3: queries become SFT data (paper section 3.4, high-fidelity answers).

Reads results/filtered_queries.json and the example answers written by people. Searches for the examples with which the
model answers best, then answers every query. Writes into results/: example_search.json (the sets tried, with grades),
sft_data (dataset of question and answer), sft_origins.jsonl (where each pair came from) and dropped_queries.jsonl
(queries without a good answer, with the reason). Run it again and it goes on where it was.

    python step3_gen_a.py --api-base http://127.0.0.1:8000/v1
"""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from augcon.data import Answer, Query, RootContext
from augcon.errors import UserError, stage
from augcon.files import file_digest, read_lines, write_dataset, write_json, write_lines
from augcon.llm.store import Store
from augcon.method.answers import AnswerRules, Graded, Search, Trial, answer_query, plan_search, thin_out, try_examples
from augcon.ordered import map_in_order
from augcon.preflight import try_step_3
from augcon.progress import Panel, bar
from augcon.run.inputs import answer_inputs, prompts_for, read_examples, text_for
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.report import CallFigures, format_counts, print_answers, print_search
from augcon.run.results import STEP_1, STEP_2, Results
from augcon.text.prompts import load_prompts
from augcon.text.units import Language, clean
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from tqdm import tqdm

    from augcon.llm.client import LLM

Searches = dict[Language, Search]
Roots = dict[int, RootContext]  # by their number; empty where step 1 has left no list of them


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """What is read of a line of scores.jsonl."""

    id: str
    score: float


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
    listed = itertools.chain.from_iterable(queries for _, queries in results.each_root(results.filtered_queries))
    # As the readers of the data take its texts; a question by hand may have white space around it.
    queries = [dataclasses.replace(query, text=text) for query in listed if (text := clean(query.text).strip())]
    if not queries:
        raise UserError(f"{results.filtered_queries} has no query; see the figures of steps 1 and 2")
    roots = {root.root: root for root in results.read_contexts()} if results.contexts.exists() else {}
    examples = read_examples(settings.qa_examples)
    languages = Counter(prompts_for(query.text, settings.language).language for query in queries)
    print(f"queries: {len(queries):,} to answer ({format_counts(languages)}); {len(examples)} examples by people")
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

        calls = 2 * sum(len(search.trials()) for search in searches.values()) + len(queries)
        with bar(calls, "answers", "calls") as progress:
            for search in searches.values():
                await try_sets(settings, llm, search, progress)
            write_json(results.example_search, {of: search.table() for of, search in searches.items()})
            answers = await answer_all(settings, llm, searches, queries, roots, progress)
        for search in searches.values():
            print_search(search)
        print_answers(answers, results.dropped_queries)
        write_data(settings, results, roots, answers)
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices))
        asked.print()
        dropped = Counter(answer.reason for answer in answers if answer.text is None)
        results.keep_figures("step 3", asked, same, queries=len(queries), dropped=dropped)
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


async def answer_all(
    settings: Settings, llm: "LLM", searches: Searches, queries: list[Query], roots: Roots, progress: "tqdm[None]"
) -> list[Answer]:
    """Answers every query with the examples chosen for its language, and leaves out what is answered alike."""
    shown = {of: search.shown(search.winner) for of, search in searches.items()}
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
    return list(thin_out(answers, articles, settings.alike_answers)) if settings.alike_answers else answers


def write_data(settings: Settings, results: Results, roots: Roots, answers: list[Answer]) -> None:
    """Writes the pairs, where they came from and what was dropped. Raises UserError when no pair is left."""
    kept = [answer for answer in answers if answer.text is not None]
    write_lines(results.dropped_queries, (dropped_row(answer) for answer in answers if answer.text is None))
    write_lines(results.sft_origins, origins(settings, results, roots, kept))
    questions, texts = [answer.query.text for answer in kept], [answer.text for answer in kept]
    write_dataset(results.sft_data, {"question": questions, "answer": texts})
    if not kept:
        reasons = format_counts(Counter(answer.reason for answer in answers))
        raise UserError(f"none of the {len(answers):,} answers is usable ({reasons}); see {results.dropped_queries}")


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
