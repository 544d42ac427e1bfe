"""Step 2: the scorer learns from step 1's pairs and scores its queries; the best that differ are kept (paper 3.3).

Reads contexts.jsonl, queries.json and scorer_pairs of step 1. Writes into results/: scorer (adapter and head),
scores.jsonl (every query with its score and fate), filtered_queries.json and, where root contexts stay short of their
quota, refills.json (another tree for each, for step 1). Run it again and it continues where it was.

    deepspeed --num_gpus 8 step2_scorer.py
"""

import contextlib
import dataclasses
import shutil
from collections import Counter

from augcon.data import Query, RootContext, ScorerPair
from augcon.errors import UserError, stage
from augcon.files import digest, read_json, write_json, write_lines
from augcon.machine.gpus import visible_gpus
from augcon.method.diversity import Sweep, rank_and_filter
from augcon.method.pairs import NEGATIVES
from augcon.run.record import Inputs
from augcon.run.report import format_counts
from augcon.run.results import STEP_2, Results
from augcon.train.ranks import is_main, on_main, print_main, report_once
from augcon.train.scores import KeptScores, key
from config import Settings, load_settings, pick

HELD_OUT = 0.1  # of the pairs, by whole articles
CONTENT_OF_BASE = "content of the scorer's base model"
Queries = dict[int, list[Query]]  # by root context


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is on record of a scorer; by type of negative the number of held-out pairs and the share ranked right."""

    base: str
    digest: str  # of its weights
    held_out: str  # in words
    accuracy_before: dict[str, tuple[int, float]]
    accuracy_after: dict[str, tuple[int, float]]
    speed: str


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
        roots, queries, pairs = read_step_1(results)  # what is wrong with the input is reported before anything slow
        from augcon.train.base import start_processes

        start_processes(len(visible_gpus()))
        scores: dict[str, float] = {}
        if pairs or settings.score_only:
            scores = train_and_score(settings, results, roots, queries, pairs)
        else:
            print_main("scorer:  no pairs to learn from: all scores are 0, and the order is that of the trees")
        on_main(lambda: choose(settings, results, roots, queries, scores))


def read_step_1(results: Results) -> tuple[list[RootContext], Queries, list[ScorerPair]]:
    """What step 1 has made. Raises UserError where something is missing or does not belong together."""
    roots, queries = results.read_contexts(), results.read_queries(results.queries)
    facts = results.record.finished("step 1")
    if facts is None:
        raise UserError(f"step 1 has not finished in {results.folder}; run step1_gen_q.py again")
    if [root.root for root in roots] != list(queries):
        raise UserError(f"{results.contexts} and {results.queries} do not belong together; run step1_gen_q.py again")
    pairs = results.read_pairs()
    if len(pairs) != facts.get("pairs", len(pairs)):
        raise UserError(f"{results.scorer_pairs} is not what step 1 has made; run step1_gen_q.py again")
    number = sum(map(len, queries.values()))
    print_main(f"input:   {len(roots):,} root contexts, {number:,} queries, {len(pairs):,} pairs for the scorer")
    return roots, queries, pairs


def train_and_score(
    settings: Settings, results: Results, roots: list[RootContext], queries: Queries, pairs: list[ScorerPair]
) -> dict[str, float]:
    """The score of every query by its id, from the scorer that is there or a new one."""
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
        learnt, held_out, words = loop.hold_out(pairs, units, HELD_OUT, settings.seed)
        print_main(f"scorer:  learns from {len(learnt):,} pairs; held out {len(held_out):,}: {words}")
        model = scorer.load_scorer(base, encoder, settings.seed)
        before = scorer.accuracy(model, encoder, held_out)
        rules = pick(loop.TrainingRules, settings, "scorer_")
        speed = scorer.train(model, encoder, learnt, rules, results.scorer_checkpoints)
        print_main(f"trained: {speed}")
        after = scorer.accuracy(model, encoder, held_out)
        weights = on_main(lambda: scorer.save(model, results.scorer))
        facts = Facts(base, weights, words, before, after, speed)
        on_main(lambda: record_scorer(results, facts))
    print_accuracy(facts)
    kept = KeptScores(results.scores_parts / facts.digest)
    keys = {query.id: key(query) for listed in queries.values() for query in listed}
    texts = {keys[query.id]: (query.context, query.text) for listed in queries.values() for query in listed}
    batches = on_main(lambda: scorer.plan(kept, encoder, texts))
    if batches:
        model = model or scorer.load_scorer(base, encoder, settings.seed, results.scorer)
        print_main(f"scored:  {scorer.score_planned(model, encoder, kept, texts, batches)}")
    kept.read()
    return {query_id: kept.scores[name] for query_id, name in keys.items()}


def known_scorer(settings: Settings, results: Results, made_with: Inputs) -> Facts | None:
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
        return Facts(**known.finished)
    facts = results.record.done_with("scorer", made_with)
    if facts and results.scorer.exists():
        results.record.finish("scorer", **facts)  # up to date again, where step 1 has made the same pairs again
        return Facts(**facts)
    if not results.record.begin("scorer", made_with, results.made("scorer"), settings.redo):
        shutil.rmtree(results.scorer_checkpoints, ignore_errors=True)  # of another scorer
    return None


def record_scorer(results: Results, facts: Facts) -> None:
    """Records the new scorer, and removes its checkpoints and the scores of another one."""
    results.record.finish("scorer", **dataclasses.asdict(facts))
    shutil.rmtree(results.scorer_checkpoints, ignore_errors=True)
    shutil.rmtree(results.scores_parts, ignore_errors=True)


def print_accuracy(facts: Facts) -> None:
    """Prints the pairwise accuracy of the scorer as a table."""
    if facts.accuracy_after:
        print_main("held-out pairs ranked right    pairs  before   after")
    for kind in ("all", *NEGATIVES):
        if kind in facts.accuracy_after:
            number, after = facts.accuracy_after[kind]
            print_main(f"  {kind:<26} {number:>7,} {facts.accuracy_before[kind][1]:>7.3f} {after:>7.3f}")


def choose(
    settings: Settings, results: Results, roots: list[RootContext], queries: Queries, scores: dict[str, float]
) -> None:
    """Ranks and filters the queries of every root context, writes the outcome and orders refills."""
    results.record.begin("step 2", settings.inputs("step 2"), results.made("step 2"), settings.redo)
    sweep = Sweep(settings.sweep_threshold) if settings.sweep_threshold else None
    filtered: Queries = {}
    rows: list[dict[str, object]] = []
    for root in roots:
        listed = queries[root.root]
        values = [scores.get(query.id, 0.0) for query in listed]
        texts = [query.text for query in listed]
        kept, fates = rank_and_filter(texts, values, root.quota, settings.rouge_threshold, sweep)
        filtered[root.root] = [listed[place] for place in kept]
        for query, value, fate in zip(listed, values, fates, strict=True):
            rows.append({"id": query.id, "root": root.root, "question": query.text, "score": value, "fate": fate})
    write_lines(results.scores, rows)
    results.write_queries(results.filtered_queries, filtered)
    dropped = Counter(str(row["fate"]) for row in rows if row["fate"] != "kept")
    number = len(rows) - dropped.total()
    print(f"kept:    {number:,} of {len(rows):,} queries; dropped: {format_counts(dropped) or 'none'}")
    order_refills(settings, results, roots, [root for root in roots if len(filtered[root.root]) < root.quota])
    print(f"made:    {results.filtered_queries}, {results.scores}")


def order_refills(settings: Settings, results: Results, roots: list[RootContext], short: list[RootContext]) -> None:
    """Sends root contexts short of their quota back to step 1, unless that has been done often enough."""
    rounds = read_json(results.refills, list[list[int]], STEP_2) if results.refills.exists() else []
    grown = (results.record.finished("step 1") or {}).get("refills", 0)
    hopeful = [root.root for root in short if root.length >= settings.min_length]
    if hopeful and len(rounds) == grown and len(rounds) < settings.max_refills:
        rounds.append(hopeful)
        write_json(results.refills, rounds)
    read = digest(results.queries.read_bytes())
    results.record.finish("step 2", refills=grown, ordered=len(rounds), queries=read)
    outcome = f"roots:   {len(roots) - len(short):,} of {len(roots):,} have their quota"
    if len(rounds) > grown:
        outcome += f"; {len(rounds[-1]):,} go back to step 1 for one more tree: run step1_gen_q.py, then this again"
    elif short:
        outcome += f"; {len(short):,} stay short of it after {grown:,} refills"
    print(outcome)


if __name__ == "__main__":
    main()
