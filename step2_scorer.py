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
from typing import TYPE_CHECKING

from augcon.data import Query, RootContext, ScorerPair
from augcon.errors import UserError, stage
from augcon.files import digest, read_json, write_json, write_lines
from augcon.method.diversity import Sweep, rank_and_filter
from augcon.method.pairs import NEGATIVES
from augcon.run.report import format_counts
from augcon.run.results import STEP_2, Results
from augcon.train.ranks import is_main, on_main, print_main, report_once
from augcon.train.scores import KeptScores, key
from config import Settings, load_settings, pick

if TYPE_CHECKING:  # what imports torch waits until the settings are known to be right
    import peft

    from augcon.train.scorer import ScorerEncoder


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What step 1 has made: root contexts, their queries, and pairs for the scorer."""

    roots: list[RootContext]
    queries: dict[int, list[Query]]
    pairs: list[ScorerPair]


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
        step_1 = None
        if is_main():  # what is wrong with the input is reported before anything slow
            stack.enter_context(results.held())
            step_1 = read_step_1(settings, results)
        from augcon.train.base import start_processes

        start_processes()
        inputs = on_main(lambda: step_1)
        assert inputs is not None
        scores: dict[str, float] = {}
        if inputs.pairs or settings.score_only:
            scores = train_and_score(settings, results, inputs)
        else:
            print_main("scorer:  no pairs to learn from: all scores are 0, and the order is that of the trees")
        on_main(lambda: choose(settings, results, inputs, scores))


def read_step_1(settings: Settings, results: Results) -> Inputs:
    """What step 1 has made. Raises UserError where something is missing, or would be replaced without consent."""
    roots, queries = results.read_contexts(), results.read_queries(results.queries)
    facts = results.record.finished("step 1")
    if facts is None:
        raise UserError(f"step 1 has not finished in {results.folder}; run step1_gen_q.py again")
    if [root.root for root in roots] != list(queries):
        raise UserError(f"{results.contexts} and {results.queries} do not belong together; run step1_gen_q.py again")
    pairs = results.read_pairs()
    if len(pairs) != facts.get("pairs", len(pairs)):
        raise UserError(f"{results.scorer_pairs} is not what step 1 has made; run step1_gen_q.py again")
    results.record.check("step 2", settings.inputs("step 2"), results.made("step 2"), settings.redo)
    number = sum(map(len, queries.values()))
    print(f"input:   {len(roots):,} root contexts, {number:,} queries, {len(pairs):,} pairs for the scorer")
    return Inputs(roots, queries, pairs)


def train_and_score(settings: Settings, results: Results, inputs: Inputs) -> dict[str, float]:
    """The score of every query by its id, from the scorer that is there or a new one."""
    from augcon.train import scorer
    from augcon.train.base import load_tokenizer

    base = settings.scorer_model or settings.model
    encoder = scorer.ScorerEncoder(load_tokenizer(base), settings.scorer_max_tokens)
    facts = on_main(lambda: known_scorer(settings, results, base, encoder, inputs.pairs))
    model = None
    if facts is None:
        model, facts = train(settings, results, base, encoder, inputs)
    else:
        print_main(f"scorer:  {results.scorer}, as trained before, on {facts.base!r}")
    print_accuracy(facts)
    kept = KeptScores(results.scores_parts / facts.digest)
    queries = {key(query): query for listed in inputs.queries.values() for query in listed}
    texts = {name: (query.context, query.text) for name, query in queries.items()}
    batches = on_main(lambda: scorer.plan(kept, encoder, texts))
    if batches:
        model = model or scorer.load_scorer(base, encoder, settings.seed, results.scorer)
        print_main(f"scored:  {scorer.score_planned(model, encoder, kept, texts, batches)}")
    kept.read()
    return {query.id: kept.scores[name] for name, query in queries.items()}


def known_scorer(
    settings: Settings, results: Results, base: str, encoder: "ScorerEncoder", pairs: list[ScorerPair]
) -> Facts | None:
    """What is on record of the scorer that is there, if it will do; else a new one is begun.

    Raises UserError where one that was made otherwise would be replaced without consent, or where there is none to use.
    """
    from augcon.train.base import companions_digest, model_folder, weights_digest

    folder = model_folder(base)
    content = {"content of the scorer's base model": weights_digest(folder)}
    made_with = {
        **settings.inputs("scorer"),
        **content,
        "content of that model's tokenizer and settings": companions_digest(folder),
        "content of the scorer's pairs": digest([dataclasses.asdict(pair) for pair in pairs]),
        "pad token": encoder.tokenizer.pad_token,
        "seed": settings.seed,
    }
    known = results.record.stages().get("scorer")
    if settings.score_only:
        if known is None or known.finished is None or not results.scorer.exists():
            raise UserError(f"there is no scorer in {results.scorer} to score with; leave out --score-only")
        if not content.items() <= known.made_with.items():
            raise UserError(
                f"the scorer in {results.scorer} belongs to another base, {known.finished['base']!r}; name it with "
                "--scorer-model, or leave out --score-only"
            )
        return Facts(**known.finished)
    facts = results.record.done_with("scorer", made_with)
    if facts is not None and results.scorer.exists():
        results.record.finish("scorer", **facts)  # up to date again, where step 1 has made the same pairs again
        return Facts(**facts)
    if not results.record.begin("scorer", made_with, results.made("scorer"), settings.redo):
        shutil.rmtree(results.scorer_checkpoints, ignore_errors=True)  # of another scorer
    return None


def train(
    settings: Settings, results: Results, base: str, encoder: "ScorerEncoder", inputs: Inputs
) -> "tuple[peft.PeftModel, Facts]":
    """Trains and saves the scorer."""
    from augcon.train import scorer
    from augcon.train.loop import TrainingRules

    article_of = {root.root: root.article for root in inputs.roots}
    learnt, held_out, words = scorer.hold_out(inputs.pairs, article_of, settings.seed)
    print_main(f"scorer:  learns from {len(learnt):,} pairs; held out {len(held_out):,}: {words}")
    model = scorer.load_scorer(base, encoder, settings.seed)
    before = scorer.accuracy(model, encoder, held_out)
    rules = pick(TrainingRules, settings, "scorer_")
    speed = scorer.train(model, encoder, learnt, rules, results.scorer_checkpoints)
    print_main(f"trained: {speed.words}")
    after = scorer.accuracy(model, encoder, held_out)
    weights = on_main(lambda: scorer.save(model, results.scorer))
    facts = Facts(base, weights, words, before, after, speed.words)
    on_main(lambda: results.record.finish("scorer", **dataclasses.asdict(facts)))
    if is_main():
        for done in (results.scorer_checkpoints, results.scores_parts):  # the scores are another scorer's
            shutil.rmtree(done, ignore_errors=True)
    return model, facts


def print_accuracy(facts: Facts) -> None:
    """Prints the pairwise accuracy of the scorer as a table."""
    if facts.accuracy_after:
        print_main("held-out pairs ranked right    pairs  before   after")
    for kind in ("all", *NEGATIVES):
        if kind in facts.accuracy_after:
            number, after = facts.accuracy_after[kind]
            print_main(f"  {kind:<26} {number:>7,} {facts.accuracy_before[kind][1]:>7.3f} {after:>7.3f}")


def choose(settings: Settings, results: Results, inputs: Inputs, scores: dict[str, float]) -> None:
    """Ranks and filters the queries of every root context, writes the outcome and orders refills."""
    results.record.begin("step 2", settings.inputs("step 2"), results.made("step 2"), settings.redo)
    sweep = Sweep(settings.sweep_threshold) if settings.sweep_threshold else None
    filtered: dict[int, list[Query]] = {}
    rows: list[dict[str, object]] = []
    fates: Counter[str] = Counter()
    short: list[RootContext] = []
    for root in inputs.roots:
        queries = inputs.queries[root.root]
        values = [scores.get(query.id, 0.0) for query in queries]
        kept, ends = rank_and_filter(
            [query.text for query in queries], values, root.quota, settings.rouge_threshold, sweep
        )
        filtered[root.root] = [queries[place] for place in kept]
        fates.update(ends)
        if len(kept) < root.quota:
            short.append(root)
        for query, value, fate in zip(queries, values, ends, strict=True):
            rows.append({"id": query.id, "root": root.root, "question": query.text, "score": value, "fate": fate})
    write_lines(results.scores, rows)
    results.write_queries(results.filtered_queries, filtered)
    print(f"kept:    {fates.pop('kept', 0):,} of {len(rows):,} queries; dropped: {format_counts(fates) or 'none'}")
    order_refills(settings, results, len(inputs.roots), short)
    print(f"made:    {results.filtered_queries}, {results.scores}")


def order_refills(settings: Settings, results: Results, number: int, short: list[RootContext]) -> None:
    """Sends root contexts short of their quota back to step 1, unless that has been done often enough."""
    rounds = read_json(results.refills, list[list[int]], STEP_2) if results.refills.exists() else []
    grown = (results.record.finished("step 1") or {}).get("refills", 0)
    hopeful = [root.root for root in short if root.length >= settings.min_length]
    if hopeful and len(rounds) == grown and len(rounds) < settings.max_refills:
        rounds.append(hopeful)
        write_json(results.refills, rounds)
    results.record.finish("step 2", refills=grown, ordered=len(rounds), queries=digest(results.queries.read_bytes()))
    full = f"roots:   {number - len(short):,} of {number:,} have their quota"
    if len(rounds) > grown:
        print(f"{full}; {len(rounds[-1]):,} go back to step 1 for one more tree: run step1_gen_q.py, then this again")
    elif short:
        print(f"{full}; {len(short):,} stay short of it after {grown:,} refills")
    else:
        print(full)


if __name__ == "__main__":
    main()
