"""Step 2: the scorer learns from step 1's pairs and scores its queries; the best that differ are kept (paper 3.3).

Reads contexts.jsonl, queries.json and scorer_pairs of step 1. Writes into results/: scorer (adapter and head),
scores.jsonl (every query with its score and fate), filtered_queries.json and, where root contexts stay short of their
quota, refills.json (another tree for each, for step 1). Run it again and it continues where it was.

    deepspeed --num_gpus 8 step2_scorer.py
"""

import contextlib
import dataclasses
import math
import shutil
from array import array
from collections import Counter
from collections.abc import Sequence

from augcon.data import RootContext, ScorerPair
from augcon.errors import UserError, stage
from augcon.files import digest, file_digest, json_line, new_file, read_json, write_json
from augcon.machine.gpus import visible_gpus
from augcon.method.diversity import Candidates, last_tree_added, rank_and_filter
from augcon.method.pairs import NEGATIVES
from augcon.run.pairs import hold_out
from augcon.run.record import Inputs, ScorerFacts
from augcon.run.report import format_counts
from augcon.run.results import STEP_1, STEP_2, Results, ShortRoot
from augcon.train.ranks import is_main, on_main, print_main, report_once
from augcon.train.scores import KeptScores, key
from config import Settings, load_settings, pick

HELD_OUT = 0.1  # of the pairs, by whole articles
SURE = 1.64  # standard deviations above chance, which chance alone passes once in twenty times
CONTENT_OF_BASE = "content of the scorer's base model"


@dataclasses.dataclass(frozen=True, slots=True)
class Short:
    """A root context that lacks pairs of its quota; hopeful: another tree may bring some."""

    root: int
    missing: int
    hopeful: bool

    def listed(self, quota: int) -> ShortRoot:
        """Its line in ``short_roots.jsonl``."""
        return ShortRoot(self.root, quota, f"{quota - self.missing} of {quota} queries kept", filtered=True)


@stage
@report_once
def main() -> None:
    settings = load_settings(__doc__, "step 2")
    results = Results(settings.results)
    print_main(settings.describe())
    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(results.held())
            results.record.check("step 2", settings.inputs("step 2"), results.made("step 2"), settings.redo)
        roots, pairs = read_step_1(results)  # what is wrong with the input is reported before anything slow
        if settings.dry_run:
            learnt, epochs = round((1 - HELD_OUT) * len(pairs)), settings.scorer_epochs
            print_main(f"scorer:  would learn from about {learnt:,} pairs in {epochs:,} epochs, unless it is there")
            return
        from augcon.train.base import start_processes

        start_processes(len(visible_gpus()))
        kept = None
        if pairs or settings.score_only:
            kept = train_and_score(settings, results, roots, pairs)
        else:
            print_main("scorer:  no pairs to learn from: all scores are 0, and the order is that of the trees")
        on_main(lambda: choose(settings, results, roots, kept.read() if kept else {}))


def read_step_1(results: Results) -> tuple[Sequence[RootContext], list[ScorerPair]]:
    """What step 1 has made. Raises UserError where something is missing or does not belong together."""
    roots, pairs = results.read_contexts(), results.read_pairs()
    if is_main():
        numbers = results.count_queries()
        if [root.root for root in roots] != list(numbers):
            raise UserError(f"{results.contexts} and {results.queries} do not belong together; run {STEP_1} again")
        total = sum(numbers.values())
        print(f"input:   {len(roots):,} root contexts, {total:,} queries, {len(pairs):,} pairs for the scorer")
    facts = results.record.finished("step 1")
    if facts is None:
        raise UserError(f"step 1 has not finished in {results.folder}; run {STEP_1} again")
    if len(pairs) != facts.get("pairs", len(pairs)):
        raise UserError(f"{results.scorer_pairs} is not what step 1 has made; run {STEP_1} again")
    return roots, pairs


def train_and_score(
    settings: Settings, results: Results, roots: Sequence[RootContext], pairs: list[ScorerPair]
) -> KeptScores:
    """The scores of all queries, from the scorer that is there or a new one."""
    from augcon.hub import model_folder
    from augcon.train import loop, scorer
    from augcon.train.base import companions_digest, load_tokenizer, weights_digest

    base = settings.scorer_model or settings.model
    folder = on_main(lambda: model_folder(base))
    encoder = scorer.ScorerEncoder(load_tokenizer(base), settings.scorer_max_tokens)
    made_with = {
        **settings.inputs("scorer"),
        "seed": settings.seed,
        "pad token": encoder.tokenizer.pad_token,
        CONTENT_OF_BASE: weights_digest(folder),
        "content of that model's tokenizer and settings": companions_digest(folder),
        "content of the scorer's pairs": digest([dataclasses.asdict(pair) for pair in pairs]),
    }
    facts = on_main(lambda: known_scorer(settings, results, made_with))
    model = None
    if facts:
        print_main(f"scorer:  {results.scorer}, as trained before, on {facts.base!r}")
    else:
        article_of = {root.root: root.article for root in roots}
        units = {
            "articles": [article_of.get(pair.root, -1) for pair in pairs],
            "root contexts, as all are of one article": [pair.root for pair in pairs],
        }
        learnt, held_out, words = hold_out(pairs, units, HELD_OUT, settings.seed)
        print_main(f"scorer:  learns from {len(learnt):,} pairs; held out {len(held_out):,}: {words}")
        model = scorer.load_scorer(base, encoder, settings.seed)
        before = scorer.accuracy(model, encoder, held_out)
        rules = pick(loop.TrainingRules, settings, "scorer_")
        speed = scorer.train(model, encoder, learnt, rules, results.scorer_checkpoints)
        print_main(f"trained: {speed}")
        after = scorer.accuracy(model, encoder, held_out)
        weights = on_main(lambda: scorer.save(model, results.scorer))
        facts = ScorerFacts(base, weights, words, before, after, speed)
        on_main(lambda: record_scorer(results, facts))
    on_main(lambda: shutil.rmtree(results.scorer_checkpoints, ignore_errors=True))
    print_accuracy(facts)
    kept = KeptScores(results.scores_parts / facts.digest)
    listed = (query for _, queries in results.each_root(results.queries) for query in queries)
    texts = ((key(query), (query.context, query.text)) for query in listed)
    batches = on_main(lambda: scorer.plan(kept, encoder, texts))
    if batches:
        model = model or scorer.load_scorer(base, encoder, settings.seed, results.scorer)
        print_main(f"scored:  {scorer.score_planned(model, encoder, kept, batches)}")
    on_main(kept.forget_texts)
    return kept


def known_scorer(settings: Settings, results: Results, made_with: Inputs) -> ScorerFacts | None:
    """What is on record of the scorer, if it will do; else a new one is begun. Raises UserError if neither can be."""
    known = results.record.stages().get("scorer")
    if settings.score_only:
        if known is None or known.finished is None or not results.scorer.exists():
            raise UserError(f"there is no scorer in {results.scorer} to score with; leave out --score-only")
        if known.made_with[CONTENT_OF_BASE] != made_with[CONTENT_OF_BASE]:
            raise UserError(
                f"the scorer in {results.scorer} belongs to another base, {known.finished['base']!r}; name it with "
                "--scorer-model, or leave out --score-only"
            )
        return ScorerFacts(**known.finished)
    facts = results.record.done_with("scorer", made_with)
    if facts and results.scorer.exists():
        results.record.finish("scorer", **facts)  # up to date again, where step 1 has made the same pairs again
        return ScorerFacts(**facts)
    stale = [results.scorer_checkpoints]
    results.record.begin("scorer", made_with, results.made("scorer"), settings.redo, stale)
    return None


def record_scorer(results: Results, facts: ScorerFacts) -> None:
    """Records the new scorer, and removes the scores of another one."""
    results.record.finish("scorer", **dataclasses.asdict(facts))
    shutil.rmtree(results.scores_parts, ignore_errors=True)


def print_accuracy(facts: ScorerFacts) -> None:
    """Prints the pairwise accuracy of the scorer as a table."""
    if facts.accuracy_after:
        print_main("held-out pairs ranked right    pairs  before   after")
    for kind in ("all", *NEGATIVES):
        if kind in facts.accuracy_after:
            number, after = facts.accuracy_after[kind]
            print_main(f"  {kind:<26} {number:>7,} {facts.accuracy_before[kind][1]:>7.3f} {after:>7.3f}")
    number, after = facts.accuracy_after.get("all", (0, 1.0))
    if number and after < (needed := 0.5 + SURE * math.sqrt(0.25 / number)):
        print_main(
            f"warning: on {number:,} held-out pairs the scorer is no better than chance ({after:.3f}; it would take "
            f"{needed:.3f}), so the choice among queries is nearly random. Try a larger --scorer-model, more "
            "--scorer-epochs or --negatives; or see scorer_pairs: are the worse questions worse?"
        )


def choose(settings: Settings, results: Results, roots: Sequence[RootContext], scores: dict[str, float]) -> None:
    """Ranks and filters the queries of every root context, writes the outcome and orders refills."""
    results.record.begin("step 2", settings.inputs("step 2"), results.made("step 2"), settings.redo)
    candidates = []
    for root, (_, queries) in zip(roots, results.each_root(results.queries), strict=True):
        values = array("d", (scores.get(key(query), 0.0) for query in queries))
        candidates.append(Candidates(root.quota, [query.text for query in queries], values))
    chosen = rank_and_filter(candidates, settings.rouge_threshold, settings.sweep_threshold)
    counts: Counter[str] = Counter()
    short: list[Short] = []
    with new_file(results.scores) as scores_file, results.writing_queries(results.filtered_queries) as write:
        for root, (_, queries), of, (kept, fates) in zip(
            roots, results.each_root(results.queries), candidates, chosen, strict=True
        ):
            write(root.root, [queries[place] for place in kept])
            for query, score, fate in zip(queries, of.scores, fates, strict=True):
                row = {"id": query.id, "root": root.root, "question": query.text, "score": score, "fate": fate}
                scores_file.write(json_line(row))
            counts.update(fates)
            if missing := root.quota - len(kept):
                hopeful = root.length >= settings.min_length and last_tree_added(queries, settings.rouge_threshold)
                short.append(Short(root.root, missing, hopeful))
    quotas = {root.root: root.quota for root in roots}
    results.write_short_roots((of.listed(quotas[of.root]) for of in short), filtered=True)
    dropped = Counter({fate: number for fate, number in counts.items() if fate != "kept"})
    results.keep_figures("step 2", fates=counts)
    print(f"kept:    {counts['kept']:,} of {counts.total():,} queries; dropped: {format_counts(dropped) or 'none'}")
    order_refills(settings, results, roots, short)
    print(f"made:    {results.filtered_queries}, {results.scores}")


def order_refills(settings: Settings, results: Results, roots: Sequence[RootContext], short: list[Short]) -> None:
    """Sends root contexts short of their quota back to step 1, where that pays and has not been done too often."""
    rounds = read_json(results.refills, list[list[int]], STEP_2) if results.refills.exists() else []
    grown = (results.record.finished("step 1") or {}).get("refills", 0)
    hopeful = [of for of in short if of.hopeful]
    quota = sum(root.quota for root in roots)
    share = sum(of.missing for of in hopeful) / quota
    if share > settings.refill_threshold and len(rounds) == grown and len(rounds) < settings.max_refills:
        rounds.append([of.root for of in hopeful])
        write_json(results.refills, rounds)
    results.record.finish("step 2", refills=grown, ordered=len(rounds), queries=file_digest(results.queries))
    outcome = f"roots:   {len(roots) - len(short):,} of {len(roots):,} have their quota"
    if len(rounds) > grown:
        outcome += (
            f"; {len(rounds[-1]):,} go back to step 1 for one more tree: {STEP_1}, which augcon.sh runs next, and"
        )
        outcome += " then this again"
    elif short:
        missing = sum(of.missing for of in short)
        outcome += f"; {len(short):,} stay short of it, by {missing:,} pairs ({missing / quota:.1%} of the quota)"
        if len(rounds) >= settings.max_refills:
            outcome += f", after {grown:,} refills"
        elif not hopeful:
            outcome += ", as their last trees brought nothing new"
        else:
            outcome += ", too few for a refill; to have one for "
            outcome += f"{len(hopeful):,} of them, add --refill-threshold 0 --redo"
    print(outcome)


if __name__ == "__main__":
    main()
