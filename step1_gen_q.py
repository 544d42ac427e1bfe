"""Step 1: a corpus becomes trees of queries (paper section 3.2, Context-Split-Tree).

Reads the corpus. Writes into results/: contexts.jsonl (the root contexts), articles.jsonl (what is known of each
article), skipped.jsonl (what gave no article, with the reason), nodes.jsonl (every node of every tree), queries.json
(the queries), short_roots.jsonl (roots short of their quota, with the reason) and scorer_pairs (good and worse queries,
for step 2). Run it again and it goes on where it was. When step 2 has left refills.json, it grows one
more tree over each root context named there.

    python step1_gen_q.py --api-base http://127.0.0.1:8000/v1
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from augcon.cluster import on_nodes
from augcon.data import Query, Reply, Request, RootContext, ScorerPair
from augcon.errors import stage
from augcon.files import file_digest, read_json, read_lines, write_lines
from augcon.llm.store import Store
from augcon.method import pairs
from augcon.method.pairs import Sample
from augcon.method.tree import Grown, TreeRules, fill_root
from augcon.ordered import map_in_order
from augcon.preflight import try_step_1
from augcon.progress import Panel, Share, bar
from augcon.run.cut import CorpusRules, read_corpus
from augcon.run.inputs import prompts_for, tree_inputs
from augcon.run.prices import Prices
from augcon.run.recipe import run_recipe
from augcon.run.record import Inputs
from augcon.run.report import CallFigures, TreeFigures, print_pairs
from augcon.run.results import STEP_1, STEP_2, Results, ShortRoot
from augcon.run.shards import Shard, cut_in_shards, join_trees
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
        if settings.ray:
            trees, sample, by_nodes = await grow_on_nodes(settings, results, inputs, refills)
        else:
            trees, sample = await grow_trees(settings, results, llm, roots, refills)
            by_nodes = []
        trees.print(results.short_roots)
        if same and results.scorer_pairs.exists():  # further queries are no reason to train another scorer
            made = len(results.read_pairs())
            print(f"pairs:   {made:,} for the scorer, as made before")
        else:
            made = await make_pairs(settings, results, llm, roots, sample.kept)
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices)).beside(by_nodes)
        asked.print()
        results.keep_figures("step 1", asked, same, pairs=made, **trees.table())
        results.record.finish("step 1", refills=len(rounds), pairs=made)
        print("made:    " + ", ".join(str(made) for made in (results.queries, results.scorer_pairs) if made.exists()))


async def grow_on_nodes(
    settings: Settings, results: Results, inputs: Inputs, refills: Counter[int]
) -> tuple[TreeFigures, Sample[Query], list[CallFigures]]:
    """As ``grow_trees``, shard by shard on the nodes of a Ray cluster; returns what they asked, too."""
    shards = cut_in_shards(results, settings.shard)
    trees, sample, asked = TreeFigures(), new_sample(settings), list[CallFigures]()

    def given(shard: Shard) -> tuple[Inputs, Counter[int]]:
        return inputs, Counter({root: number for root, number in refills.items() if shard.first <= root < shard.end})

    with bar(shards[-1].end, "trees", "root contexts") as progress:
        async for shard, calls in on_nodes("step1_gen_q:grow_shard", settings, shards, given):
            progress.update(shard.end - shard.first)
            trees += shard.results.figures_of("step 1", TreeFigures)
            asked += [calls] if calls else []
            drawn = read_lines(shard.results.sample, Query, STEP_1)
            for _ in itertools.takewhile(lambda query: sample.offer(query.id, query), drawn):
                pass  # the others of the shard were drawn later
    join_trees(results, shards)
    return trees, sample, asked


async def grow_shard(
    settings: Settings, results: Results, store: Store, inputs: Inputs, refills: Counter[int]
) -> CallFigures | None:
    """What a node does: the recipe for one shard. Returns what it asked, or None where all had been done."""
    from augcon.llm.client import LLM, Endpoint

    started = time.monotonic()
    inputs = {**inputs, "content of the shard": file_digest(results.contexts), "refills": sorted(refills.elements())}
    made = (results.nodes, results.queries, results.short_roots, results.sample)
    if results.record.done_with("step 1", inputs) is not None and all(path.exists() for path in made):
        return None
    async with LLM(pick(Endpoint, settings), store) as llm:
        await llm.connect(settings.model, str(inputs["model served"]))
        same = results.record.begin("step 1", inputs, (), redo=True)
        trees, sample = await grow_trees(settings, results, llm, results.read_contexts(), refills)
        write_lines(results.sample, map(dataclasses.asdict, sample.kept))
        asked = CallFigures.of(llm, time.monotonic() - started, Prices.read(settings.prices))
        results.keep_figures("step 1", asked, same, of=vars(trees))
        results.record.finish("step 1", refills=refills.total(), pairs=0)
    return asked


def new_sample(settings: Settings) -> Sample[Query]:
    """For the queries from which the scorer's pairs are made: twice as many as pairs, as some come to nothing."""
    return Sample(2 * len(pairs.NEGATIVES) * settings.negatives, settings.seed)


async def grow_trees(
    settings: Settings, results: Results, llm: "LLM", roots: Sequence[RootContext], refills: Counter[int]
) -> tuple[TreeFigures, Sample[Query]]:
    """Grows the trees of every root context and writes them; returns a random sample of their good queries, too.

    ``refills`` counts the further trees that step 2 wants from a root context.
    """
    rules = pick(TreeRules, settings)
    shares = {root.root: math.ceil(settings.oversample * root.quota) for root in roots}  # of the progress
    sample, figures, short = new_sample(settings), TreeFigures(), list[ShortRoot]()
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
            if grown.shortfall:
                short.append(ShortRoot(root.root, root.quota, grown.shortfall))
            for query in grown.good_queries:
                sample.offer(query.id, query)
                panel.show(query.text, query.context)
    results.write_short_roots(short, filtered=False)
    return figures, sample


async def make_pairs(
    settings: Settings, results: Results, llm: "LLM", roots: Sequence[RootContext], sample: list[Query]
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
