"""Step 1: a corpus becomes trees of questions (paper section 3.2, Context-Split-Tree).

Reads the corpus. Writes into results/: contexts.jsonl (the root contexts), nodes.jsonl (every node and its
fate), queries.json (the queries), short_roots.jsonl (roots short of their quota, with the reason) and
scorer_pairs (good and worse queries, for step 2). Run it again and it goes on where it was; when step 2 has left
refills.json, it grows one more tree over each root context that is named there.

    python step1_gen_q.py --api-base http://127.0.0.1:8000/v1
"""

import asyncio
import gc
import math
import time
from collections import Counter

from augcon import progress
from augcon.errors import stage
from augcon.llm.client import LLM, Reply, Request
from augcon.llm.ordered import map_in_order
from augcon.llm.store import Store
from augcon.method import pairs
from augcon.method import tree as cst
from augcon.run.corpus import RootContext
from augcon.run.recipes import inputs, prompts_for, report_calls, root_contexts, say, server
from augcon.run.results import Results, context_row
from config import Settings, load_settings


@stage
def main() -> None:
    settings = load_settings(__doc__)
    print(settings.describe(), flush=True)
    results = Results(settings.results)
    gc.freeze()  # what the imports made stays; looking through it, and often, would cost a sixth of the time
    gc.set_threshold(100_000, 50, 100)
    with results.held(), Store(results.store) as store:
        asyncio.run(run(settings, results, store))


async def run(settings: Settings, results: Results, store: Store) -> None:
    """The recipe: root contexts, trees, scorer pairs, figures."""
    started = time.monotonic()
    roots, left_out = root_contexts(settings)
    articles = len({root.article for root in roots})
    wanted = sum(root.quota for root in roots)
    print(f"corpus:  {articles:,} articles{left_out}; {len(roots):,} root contexts, {wanted:,} pairs wanted")
    async with LLM(server(settings), store) as llm:
        model = await llm.connect(settings.model, settings.api_model)
        other = "" if model == settings.model else f" (the model setting, for the steps to come: {settings.model!r})"
        print(f"server:  {settings.api_base} serves {model!r}{other}")
        results.settle(1, {**settings.made_with(), **inputs(settings, roots), "model served": (1, model)})
        results.write_lines(results.contexts, map(context_row, roots))

        rounds = results.read_json(results.refills) if results.refills.exists() else []
        sample = await grow_trees(settings, results, llm, roots, Counter(root for short in rounds for root in short))
        made = await make_pairs(settings, results, llm, roots, sample)
        report_calls(llm, time.monotonic() - started)
        results.finish(1, refills=len(rounds), pairs=made)
        print("made:    " + ", ".join(str(made) for made in (results.queries, results.scorer_pairs) if made.exists()))


def rules(settings: Settings) -> cst.TreeRules:
    """The part of the settings that says how trees grow."""
    return cst.TreeRules(
        min_length=settings.min_length,
        rouge_threshold=settings.rouge_threshold,
        temperature=settings.query_temperature,
        max_tokens=settings.query_max_tokens,
        tries=settings.tries,
        oversample=settings.oversample,
        max_passes=settings.max_passes,
        pattern_length=settings.max_length if settings.structured_output else None,
    )


async def grow_trees(
    settings: Settings, results: Results, llm: LLM, roots: list[RootContext], refills: Counter[int]
) -> list[pairs.Query]:
    """Grows the trees of every root context and writes them; returns a random sample of their queries.

    ``refills`` counts the further trees that step 2 wants of a root context.
    """
    tally = Tally(settings)
    share = {root.root: math.ceil(settings.oversample * root.quota) for root in roots}  # of the progress
    with progress.bar(sum(share.values()), "trees", "queries") as bar, results.writing_trees() as write:

        async def fill(root: RootContext) -> cst.RootResult:
            left = share[root.root]

            async def ask(request: Request) -> Reply:
                nonlocal left
                reply = await llm.ask(request)
                tally.asked_again += request.sample % settings.tries > 0
                bar.set_postfix_str(f"{llm.counts['calls']:,} calls, {llm.in_flight} in flight", refresh=False)
                bar.update(min(left, 1))
                left = max(left - 1, 0)
                return reply

            result = await cst.fill_root(
                ask, prompts_for(settings, root.text), root, rules(settings), refills[root.root]
            )
            bar.update(left)
            return result

        async for result in map_in_order(fill, roots, 2 * settings.max_in_flight):
            write(result.root.root, result.nodes)
            tally.add(result)
    results.write_lines(results.short_roots, tally.short)
    tally.report(results)
    return tally.sample.kept


class Tally:
    """The figures of the trees as they come, and a sample of their queries for the scorer's pairs."""

    def __init__(self, settings: Settings) -> None:
        self.fates: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.short: list[dict[str, int | str]] = []
        self.roots = self.quota = self.passes = self.refills = self.queries = self.diverse = self.asked_again = 0
        # Twice what the pairs need: some negatives are thrown away.
        self.sample = pairs.Reservoir(2 * len(pairs.NEGATIVES) * settings.negatives, settings.seed)

    def add(self, result: cst.RootResult) -> None:
        """Counts the trees of one root context."""
        self.roots += 1
        self.quota += result.root.quota
        self.passes += result.passes
        self.refills += result.refills
        self.diverse += result.diverse
        for node in result.nodes:
            self.fates[node.outcome] += 1
            if node.query is not None:
                self.queries += 1
                if node.pass_number < result.passes - result.refills:  # a refill leaves the scorer's pairs as they are
                    self.sample.offer((node.root, node.context, node.query))
            elif node.detail:
                self.reasons[f"{node.outcome}: {node.detail}"] += 1
        if result.shortfall:
            self.short.append({"root": result.root.root, "quota": result.root.quota, "reason": result.shortfall})

    def report(self, results: Results) -> None:
        """Prints the figures."""
        print(
            f"trees:   {self.fates.total():,} nodes in {self.passes:,} passes: {say(self.fates)}"
            + (f"; {self.refills:,} of the passes to refill roots that step 2 left short" if self.refills else "")
            + (f"; asked again {self.asked_again:,} times for a reply that parses" if self.asked_again else "")
        )
        if self.reasons:
            print(f"lost:    {say(self.reasons)}")
        print(
            f"queries: {self.queries:,}, of which mutually diverse within their root {self.diverse:,} "
            f"({self.diverse / self.quota:.2f} of the quota)"
        )
        print(f"roots:   {self.roots - len(self.short):,} of {self.roots:,} have their quota", end="")
        print(f"; the others are listed with the reason in {results.short_roots}" if self.short else "")


async def make_pairs(
    settings: Settings, results: Results, llm: LLM, roots: list[RootContext], sample: list[pairs.Query]
) -> int:
    """Makes the scorer's pairs, as many of each type where they can be had, and writes them; returns their number."""
    made: dict[str, list[pairs.ScorerPair]] = {kind: [] for kind in pairs.NEGATIVES}
    lost: Counter[str] = Counter()
    outcomes = pairs.scorer_pairs(
        llm.ask,
        lambda root: prompts_for(settings, roots[root].text),
        sample,
        settings.negatives,
        rules(settings),
        settings.seed,
        2 * settings.max_in_flight,
    )
    expected = len(made) * min(settings.negatives, len(sample) // len(made))
    with progress.bar(expected, "scorer pairs", "pairs") as bar:
        async for outcome in outcomes:
            if isinstance(outcome, pairs.ScorerPair):
                made[outcome.type].append(outcome)
                bar.update()
            else:
                lost[outcome] += 1
    kept = pairs.balance(made)
    results.write_pairs(kept)
    lost["left out for balance"] = sum(map(len, made.values())) - len(kept)
    print(f"pairs:   {len(kept):,} for the scorer: {say(Counter(pair.type for pair in kept)) or 'none'}", end="")
    print(f"; thrown away: {say(+lost)}" if +lost else "")
    return len(kept)


if __name__ == "__main__":
    main()
