"""Step 2: the scorer learns from step 1's pairs, scores its queries, and the best that differ are kept (paper 3.3).

Reads contexts.jsonl, queries.json and scorer_pairs of step 1. Writes into results/: scorer (adapter and head, with
what it was made of and its accuracy), scores.jsonl (every query with its score and fate), filtered_queries.json and,
where root contexts stay short of their quota, refills.json (another tree for each, for step 1). Run it again and it
goes on where it was.

    deepspeed --num_gpus 8 step2_scorer.py
"""

import contextlib
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from augcon import progress
from augcon.errors import UserError, stage
from augcon.method.diversity import Sweep, rank_and_filter
from augcon.method.pairs import NEGATIVES, ScorerPair
from augcon.run.corpus import RootContext
from augcon.run.recipes import say
from augcon.run.results import Results
from augcon.train.ranks import is_main, on_main, one_voice, processes, rank, tell, wait_for_all
from augcon.train.scores import KeptScores, key
from config import Settings, load_settings

if TYPE_CHECKING:  # what imports torch waits until the settings are known to be right
    import peft

    from augcon.train.scorer import Encoder

Queries = dict[int, list[tuple[str, str]]]


@stage
@one_voice
def main() -> None:
    settings = load_settings(__doc__)
    results = Results(settings.results)
    tell(settings.describe())
    with contextlib.ExitStack() as held:
        step_1 = None
        if is_main():  # what is wrong with the input is said before anything slow
            held.enter_context(results.held())
            step_1 = read_step_1(settings, results)
        from augcon.train import base as training

        training.start_processes()
        roots, queries, pairs = on_main(lambda: step_1)
        if pairs or settings.score_only:
            scores = train_and_score(settings, results, roots, queries, pairs)
        else:
            tell("scorer:  no pairs to learn from: all scores are 0, and the order is that of the trees")
            scores = {}
        on_main(lambda: choose(settings, results, roots, queries, scores))


def read_step_1(settings: Settings, results: Results) -> tuple[list[RootContext], Queries, list[ScorerPair]]:
    """What step 1 has made. Raises UserError where something is missing or was made with other settings."""
    roots, queries = results.read_contexts(), results.read_queries(results.queries)
    if "step 1" not in results.finished():
        raise UserError(f"step 1 has not come to its end in {results.folder}; run step1_gen_q.py again")
    if [root.root for root in roots] != list(queries):
        raise UserError(f"{results.contexts} and {results.queries} do not belong together; run step1_gen_q.py again")
    results.settle(2, settings.made_with())
    pairs = results.read_pairs()
    if len(pairs) != results.finished()["step 1"].get("pairs", len(pairs)):
        raise UserError(f"{results.scorer_pairs} is not what step 1 has made; run step1_gen_q.py again")
    number = sum(map(len, queries.values()))
    tell(f"input:   {len(roots):,} root contexts, {number:,} queries, {len(pairs):,} pairs for the scorer")
    return roots, queries, pairs


def train_and_score(
    settings: Settings, results: Results, roots: list[RootContext], queries: Queries, pairs: list[ScorerPair]
) -> dict[str, float]:
    """The score of every query by its key, from the scorer that is there or a new one."""
    from augcon.train import base as training
    from augcon.train import scorer

    base = settings.scorer_model or settings.model
    base_digest = on_main(lambda: training.check_base(base))
    encoder = scorer.Encoder(training.load_tokenizer(base), settings.scorer_max_tokens)
    rules = scorer.TrainingRules(
        settings.scorer_epochs, settings.scorer_batch, settings.scorer_learning_rate, settings.seed
    )
    made_of = {
        "base": base,
        "base digest": base_digest,
        "max tokens": settings.scorer_max_tokens,
        "pad token": encoder.tokenizer.pad_token,
        "rules": vars(rules),
        "pairs digest": scorer.digest([vars(pair) for pair in pairs]),
    }

    def known() -> dict[str, Any] | None:
        """What is known of the scorer that is there, if it will do."""
        if not results.scorer.exists():
            if settings.score_only:
                raise UserError(f"there is no scorer in {results.scorer} to score with; leave out --score-only")
            return None
        facts = results.read_json(results.scorer / "scorer.json", "step2_scorer.py")
        if settings.score_only and facts["made of"]["base digest"] != base_digest:
            raise UserError(
                f"the scorer in {results.scorer} belongs to another base, {facts['made of']['base']!r}; name it "
                "with --scorer-model, or leave out --score-only"
            )
        if settings.score_only or facts["made of"] == made_of:
            return facts
        tell(f"scorer:  {results.scorer} was made of other pairs or another base; a new one is trained")
        return None

    facts = on_main(known)
    model = None
    if facts is None:
        model = scorer.load_scorer(base, encoder, settings.seed)
        facts = train(results, model, encoder, roots, pairs, rules, made_of)
    else:
        tell(f"scorer:  {results.scorer}, as trained before, on {facts['made of']['base']!r}")
    report(facts)

    kept = KeptScores(results.scores_parts / facts["digest"])
    texts = {key(*text): text for listed in queries.values() for text in listed}
    missing = on_main(lambda: plan(kept, encoder, texts))  # one list for all, whoever is first to add to it
    kept.read()
    if missing:
        model = model or scorer.load_scorer(base, encoder, settings.seed, results.scorer)
        score(kept, model, encoder, texts, missing)
    wait_for_all()
    if is_main():
        kept.read()
    return kept.scores


def train(
    results: Results,
    model: "peft.PeftModel",
    encoder: "Encoder",
    roots: list[RootContext],
    pairs: list[ScorerPair],
    rules: Any,
    made_of: dict[str, Any],
) -> dict[str, Any]:
    """Trains and saves the scorer; returns what is known of it."""
    from augcon.train import scorer

    held, words = scorer.hold_out(pairs, {root.root: root.article for root in roots}, rules.seed)
    unseen = set(map(id, held))
    learnt = [pair for pair in pairs if id(pair) not in unseen]
    tell(f"scorer:  learns from {len(learnt):,} pairs; held out {len(held):,}: {words}")
    before = scorer.accuracy(model, encoder, held)
    figures = scorer.train(model, encoder, learnt, rules, results.scorer_checkpoints, made_of)
    tell(f"trained: {figures}")
    facts = {
        "made of": made_of,
        "held out": words,
        "held-out pairs": dict(Counter(["all"] * len(held) + [pair.type for pair in held])),
        "accuracy before": before,
        "accuracy after": scorer.accuracy(model, encoder, held),
        "trained": figures,
    }

    def keep() -> dict[str, Any]:
        saved = scorer.save(model, results.scorer, facts)
        shutil.rmtree(results.scorer_checkpoints, ignore_errors=True)
        shutil.rmtree(results.scores_parts, ignore_errors=True)  # another scorer's
        return saved

    return on_main(keep)


def report(facts: dict[str, Any]) -> None:
    """The pairwise accuracy of the scorer as a table."""
    if not facts["held-out pairs"]:
        return
    tell("held-out pairs ranked right    pairs  before   after")
    for kind in ["all", *NEGATIVES]:
        if number := facts["held-out pairs"].get(kind):
            before, after = facts["accuracy before"][kind], facts["accuracy after"][kind]
            tell(f"  {kind:<26} {number:>7,} {before:>7.3f} {after:>7.3f}")


def plan(kept: KeptScores, encoder: "Encoder", texts: dict[str, tuple[str, str]]) -> list[int]:
    """Puts every (context, question) that is in no batch yet into one; returns which batches are to be scored."""
    from augcon.train import scorer

    kept.read()
    planned = {name for batch in kept.plan for name in batch}
    new = [name for name in texts if name not in planned]
    lengths = list(map(len, encoder([texts[name] for name in new])))
    kept.add_to_plan([[new[n] for n in batch] for batch in scorer.batches(lengths, scorer.token_budget())])
    return [n for n, batch in enumerate(kept.plan) if any(name in texts and name not in kept.scores for name in batch)]


def score(
    kept: KeptScores,
    model: "peft.PeftModel",
    encoder: "Encoder",
    texts: dict[str, tuple[str, str]],
    missing: list[int],
) -> None:
    """Scores this process's share of the batches, keeping each as it comes."""
    from augcon.train import base as training
    from augcon.train import scorer

    mine = missing[rank() :: processes()]
    tokens, started = 0, time.monotonic()
    bar = progress.bar(sum(len(kept.plan[n]) for n in missing), "scores", "queries") if is_main() else None
    with kept.part(rank()) as part:
        for number in mine:
            # A query of an older queries.json has no text any more; an empty one keeps its place.
            rows = encoder([texts.get(name, ("", "")) for name in kept.plan[number]])
            kept.keep(part, number, scorer.score(model, encoder, rows))
            tokens += sum(map(len, rows))
            if bar is not None:
                bar.update(min(len(rows) * processes(), bar.total - bar.n))
    if bar is not None:
        bar.close()
    seconds = time.monotonic() - started
    tell(
        f"scored:  {sum(len(kept.plan[n]) for n in missing):,} queries in {seconds:.0f} s, "
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s a process, {training.peak_memory()}"
    )


def choose(
    settings: Settings, results: Results, roots: list[RootContext], queries: Queries, scores: dict[str, float]
) -> None:
    """Ranks and filters the queries of every root context, writes the outcome and orders refills."""
    sweep = Sweep(settings.sweep_threshold) if settings.sweep_threshold else None
    filtered: Queries = {}
    rows: list[dict[str, Any]] = []
    fates: Counter[str] = Counter()
    short: list[int] = []
    for root in roots:
        listed = queries[root.root]
        values = [scores[key(*text)] if scores else 0.0 for text in listed]
        kept, ends = rank_and_filter(
            [query for _, query in listed], values, root.quota, settings.rouge_threshold, sweep
        )
        filtered[root.root] = [listed[place] for place in kept]
        fates.update(ends)
        if len(kept) < root.quota:
            short.append(root.root)
        for index, (query, value, end) in enumerate(zip(listed, values, ends, strict=True)):
            rows.append({"root": root.root, "index": index, "question": query[1], "score": value, "fate": end})
    results.write_lines(results.scores, rows)
    results.write_queries(results.filtered_queries, filtered)
    print(f"kept:    {fates.pop('kept', 0):,} of {len(rows):,} queries; dropped: {say(fates) or 'none'}")
    order_refills(settings, results, roots, short)
    print(f"made:    {results.filtered_queries}, {results.scores}")


def order_refills(settings: Settings, results: Results, roots: list[RootContext], short: list[int]) -> None:
    """Sends root contexts short of their quota back to step 1, unless that has been done often enough."""
    rounds = results.read_json(results.refills, "step2_scorer.py") if results.refills.exists() else []
    grown = results.finished()["step 1"].get("refills", 0)
    hopeful = [root.root for root in roots if root.root in set(short) and root.length >= settings.min_length]
    order = hopeful and len(rounds) == grown and len(rounds) < settings.max_refills
    if order:
        results.write_json(results.refills, [*rounds, hopeful])
        rounds = [*rounds, hopeful]
    results.finish(2, refills=grown, ordered=len(rounds))
    full = f"roots:   {len(roots) - len(short):,} of {len(roots):,} have their quota"
    if len(rounds) > grown:
        print(f"{full}; {len(rounds[-1]):,} go back to step 1 for one more tree: run step1_gen_q.py, then this again")
    elif short:
        print(f"{full}; {len(short):,} stay short of it after {grown:,} refills")
    else:
        print(full)


if __name__ == "__main__":
    main()
