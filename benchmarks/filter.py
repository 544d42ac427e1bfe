"""The filter of step 2 side by side with what it replaces: rouge-chinese, its words cut anew for every comparison.

    python benchmarks/filter.py RESULTS/queries.json [--roots 20]

Compares the choice within each root context on the first roots, which takes the plain way a while, and checks that
both keep the same queries; then filters and sweeps all of the file.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jieba  # noqa: E402
from rouge_chinese import Rouge  # noqa: E402

from augcon.method.diversity import Candidates, rank_and_filter  # noqa: E402

THRESHOLD = 0.7
QUOTA = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("queries", type=Path)
    parser.add_argument("--roots", type=int, default=20)
    options = parser.parse_args()
    roots = [[query for _, query in pairs] for pairs in json.loads(options.queries.read_text()).values()]
    jieba.initialize()

    first = roots[: options.roots]
    started = time.perf_counter()
    plain = [plainly(queries) for queries in first]
    plain_time = time.perf_counter() - started
    ours, our_time = chosen(first)  # words cut for the first time
    _, again = chosen(first)
    print(f"{sum(map(len, first)):,} queries of {len(first)} root contexts, the same kept: {plain == ours}")
    print(
        f"plain {plain_time:.2f} s, AugCon {our_time:.3f} s, with its words cut before {again:.3f} s: "
        f"ratio {plain_time / our_time:.0f}, {plain_time / again:.0f}"
    )
    kept, seconds = chosen(roots, 0.9)
    queries, left = sum(map(len, roots)), sum(map(len, kept))
    print(f"all {queries:,} queries, swept across the corpus: {left:,} kept, {seconds:.1f} s")


def chosen(roots: list[list[str]], sweep_threshold: float = 0) -> tuple[list[list[int]], float]:
    """What AugCon keeps of each root context, in the order given, and the seconds that it takes."""
    started = time.perf_counter()
    candidates = [Candidates(QUOTA, queries, [0.0] * len(queries)) for queries in roots]
    kept = [places for places, _ in rank_and_filter(candidates, THRESHOLD, sweep_threshold)]
    return kept, time.perf_counter() - started


def plainly(queries: list[str]) -> list[int]:
    """The places of the queries to keep, by the definition and the library."""
    rouge = Rouge(metrics=["rouge-l"])
    kept: list[int] = []
    for place, query in enumerate(queries):
        if len(kept) == QUOTA:
            break
        if all(
            rouge.get_scores(" ".join(jieba.lcut(query)), " ".join(jieba.lcut(queries[other])))[0]["rouge-l"]["p"]
            < THRESHOLD
            for other in kept
        ):
            kept.append(place)
    return kept


if __name__ == "__main__":
    main()
