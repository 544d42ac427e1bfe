"""Step 1: a corpus becomes trees of queries (paper section 3.2, Context-Split-Tree).

Reads the corpus. Writes into results/: contexts.jsonl (the root contexts), articles.jsonl (what is known of each
article), skipped.jsonl (what gave no article, with the reason), nodes.jsonl (every node of every tree), queries.json
(the queries), short_roots.jsonl (roots short of their quota, with the reason) and scorer_pairs (good and worse queries,
for step 2). Run it again and it goes on where it was. When step 2 has left refills.json, it grows one
more tree over each root context named there.

    python step1_gen_q.py --api-base http://127.0.0.1:8000/v1
"""

import math
import time
from collections import Counter
from typing import TYPE_CHECKING

from augcon.data import Query, Reply, Request, RootContext, ScorerPair
from augcon.errors import stage
from augcon.files import read_json
from augcon.llm.store import Store
from augcon.method import pairs
from augcon.method.tree import Grown, TreeRules, fill_root
from augcon.ordered import map_in_order
from augcon.preflight import try_step_1
from augcon.progress import Panel, Share, bar
from augcon.run.cut import CorpusRules, read_corpus
from augcon.run.inputs import prompts_for, tree_inputs
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.report import CallFigures, TreeFigures, print_pairs
from augcon.run.results import STEP_2, Results
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from augcon.llm.client import LLM


@stage
def main() -> None:
    settings = load_settings(__doc__, "step 1", "corpus", "server")
    run_recipe(try_step_1 if settings.dry_run else make_queries, settings)


async def make_queries(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: root contexts, trees, scorer pairs, figures."""
    from augcon.llm.client import LLM, Endpoint  # slow: not for --help

    started = time.monotonic()
    cut = read_corpus(pick(CorpusRules, settings), results)
    cut.print()
    roots = cut.roots
    async with LLM(pick(Endpoint, settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        print(f"server:  {settings.api_base} serves {model!r}")
        inputs = {
            **tree_inputs(settings.inputs("step 1"), roots, settings.language),
            "model served": model,
            "sampling": llm.sampling,
        }
        stale = [results.refills, results.scorer_pairs]  # of other trees
        same = results.record.begin("step 1", inputs, results.made("step 1"), settings.redo, stale)
        cut.write(results)

        rounds = read_json(results.refills, list[list[int]], STEP_2) if results.refills.exists() else []
        refills = Counter(root for short in rounds for root in short)
        trees, sample = await grow_trees(settings, results, llm, roots, refills)
        if same and results.scorer_pairs.exists():  # further queries are no reason to train another scorer
            made = len(results.read_pairs())
            print(f"pairs:   {made:,} for the scorer, as made before")
        else:
            made = await make_pairs(settings, results, llm, roots, sample)
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices))
        asked.print()
        results.keep_figures("step 1", asked, same, pairs=made, **trees.table())
        results.record.finish("step 1", refills=len(rounds), pairs=made)
        print("made:    " + ", ".join(str(made) for made in (results.queries, results.scorer_pairs) if made.exists()))


async def grow_trees(
    settings: Settings, results: Results, llm: "LLM", roots: list[RootContext], refills: Counter[int]
) -> tuple[TreeFigures, list[Query]]:
    """Grows the trees of every root context and writes them; returns a random sample of their good queries, too.

    ``refills`` counts the further trees that step 2 wants from a root context.
    """
    rules = pick(TreeRules, settings)
    shares = {root.root: math.ceil(settings.oversample * root.quota) for root in roots}  # of the progress
    sample = pairs.Reservoir[Query](
        2 * len(pairs.NEGATIVES) * settings.negatives, settings.seed
    )  # twice: some come to nothing
    figures = TreeFigures()
    with (
        bar(sum(shares.values()), "trees", "queries") as progress,
        Panel("question", "about") as panel,
        results.writing_trees() as write,
    ):

        async def fill(root: RootContext) -> Grown:
            share = Share(progress, shares[root.root])

            async def ask(request: Request) -> Reply:
                reply = await llm.ask(request)
                progress.set_postfix_str(llm.state, refresh=False)
                share.step()
                return reply

            grown = await fill_root(ask, prompts_for(root.text, settings.language), root, rules, refills[root.root])
            share.end()
            return grown

        async for root, grown in map_in_order(fill, roots, llm.servers.room):
            write(root.root, grown.nodes)
            figures.add(grown)
            for query in grown.good_queries:
                sample.offer(query)
                panel.show(query.text, query.context)
    results.write_short_roots(figures.short, filtered=False)
    figures.print(results.short_roots)
    return figures, sample.kept


async def make_pairs(
    settings: Settings, results: Results, llm: "LLM", roots: list[RootContext], sample: list[Query]
) -> int:
    """Makes the scorer's pairs, as many of each kind where that is possible, and writes them; returns their number."""
    made: dict[str, list[ScorerPair]] = {kind: [] for kind in pairs.NEGATIVES}
    lost: Counter[str] = Counter()
    outcomes = pairs.make_pairs(
        llm.ask,
        lambda root: prompts_for(roots[root].text, settings.language),
        roots,
        sample,
        settings.negatives,
        pick(TreeRules, settings),
        settings.seed,
        llm.servers.room,
    )
    expected = len(made) * min(settings.negatives, len(sample) // len(made))
    with bar(expected, "scorer pairs", "pairs") as progress:
        async for outcome in outcomes:
            if isinstance(outcome, ScorerPair):
                made[outcome.type].append(outcome)
                progress.update()
            else:
                lost[outcome] += 1
    kept = pairs.balance(made)
    results.write_pairs(kept)
    lost["left out for balance"] = sum(map(len, made.values())) - len(kept)
    print_pairs(kept, +lost)
    return len(kept)


if __name__ == "__main__":
    main()
