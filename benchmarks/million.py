"""Time and memory of steps 1 and 2 around the model, at a million nodes: what the main process does on one core.

    python benchmarks/million.py --nodes 1000000
    python benchmarks/million.py --nodes 100000 --before bdbd2bb --repeat 3

Trees are made up in the process: contexts from sentences of DailyM, questions of its words as Zipf has them, half of
them on three topics, a quarter nearly the same as another of their root context, some as one elsewhere. Step 1 writes
them and adds up its figures; the scorer's texts are encoded (with a tiny model's tokenizer); step 2 reads, ranks,
filters, sweeps and writes. Each is a process of its own with one thread: what counts is its processor time, so that
others on the machine do not, and its most memory. With --before, the same with the code of that commit. Prints a table
in Markdown, medians where runs are repeated.
"""

import argparse
import importlib
import io
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = {
    "step 1": "trees written, figures",
    "encode": "texts encoded for the scorer",
    "step 2": "read, ranked, filtered, swept, written",
}
NODES = 25  # of a root context
TEMPLATES = (
    "{a}在{t}的{b}中起了什么作用？",
    "为什么{t}的{a}会影响{b}？",
    "{t}如何通过{a}改善{b}？",
    "{a}和{b}在{t}方面有什么区别？",
    "{t}的{a}是什么？",
    "根据{a}的说法，{t}的{b}面临哪些{c}挑战？",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--work", default=",".join(WORK), help="what is measured, separated by commas")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--before", default="", help="a commit to compare with")
    parser.add_argument("--measure", nargs=2, metavar=("WORK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work, folder = options.measure
        seconds = MEASURES[work](Path(folder), options.nodes)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps([seconds, memory]))
        return
    works = options.work.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        codes = {"now": ROOT}
        if options.before:
            codes = {"before": Path(temporary) / "before", **codes}
            archive = subprocess.run(["git", "archive", options.before], cwd=ROOT, capture_output=True, check=True)
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
                packed.extractall(codes["before"], filter="data")
        figures: dict[tuple[str, str], list[list[float]]] = {}
        for number in range(options.repeat):
            for name, code in codes.items():
                folder = Path(temporary) / f"{name}{number}"
                for work in ("step 1", *(work for work in works if work != "step 1")):  # the others read what it makes
                    figures.setdefault((work, name), []).append(measured(work, folder, code, options.nodes))
    print(f"\n{options.nodes:,} nodes, {len(os.sched_getaffinity(0))} cores, median of {options.repeat}\n")
    print(
        "| | "
        + " | ".join(f"{name}, s | {name}, MiB" for name in codes)
        + (" | time | memory |" if options.before else " |")
    )
    print("|---|" + "---:|" * (2 * len(codes) + 2 * bool(options.before)))
    for work in works:
        medians = [[statistics.median(of) for of in zip(*figures[work, name], strict=True)] for name in codes]
        cells = [f"{seconds:,.1f} | {memory:,.0f}" for seconds, memory in medians]
        if options.before:
            cells += [f"{old / new:.1f} ×" for old, new in zip(*medians, strict=True)]
        print(f"| {WORK[work]} | " + " | ".join(cells) + " |")


def measured(work: str, folder: Path, code: Path, nodes: int) -> list[float]:
    """Seconds of processor time and MiB of a piece of work, done by the code of a folder in a process of its own."""
    command = [sys.executable, __file__, "--nodes", str(nodes), "--measure", work, str(folder)]
    one_core = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **one_core, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=code)
    figures: list[float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{work}, {code.name}: {figures[0]:,.1f} s, {figures[1]:,.0f} MiB", file=sys.stderr)
    return figures


# What a process measures. It imports the code of the folder that PYTHONPATH names.


def step_1(folder: Path, nodes: int) -> float:
    """Writes trees and adds up the figures, as step 1 does; then leaves what step 2 needs besides."""
    from augcon.method.pairs import Sample
    from augcon.method.tree import Grown
    from augcon.run.report import TreeFigures
    from augcon.run.results import Results
    from augcon.train.scores import key

    results, figures, sample = Results(folder), TreeFigures(), Sample(3000, 42)
    folder.mkdir()
    seconds, rng = 0.0, random.Random(2)
    kept = results.scores_parts / "scorer" / "part-0.jsonl"
    kept.parent.mkdir(parents=True)
    with results.contexts.open("w") as contexts, kept.open("w") as parts, results.writing_trees() as write:
        for root, tree in trees(nodes):
            started = time.process_time()
            write(root.root, tree)
            grown = Grown(root, tree, 1, root.quota)
            figures.add(grown)
            for query in grown.good_queries:
                sample.offer(query.id, query)
            seconds += time.process_time() - started
            contexts.write(json.dumps({name: getattr(root, name) for name in root.__slots__}) + "\n")
            queries = [query for node in tree for query in node.queries]
            parts.write(json.dumps({key(query): rng.gauss(0, 1) for query in queries}) + "\n")
    started = time.process_time()
    figures.print(results.short_roots)
    seconds += time.process_time() - started
    results.record.begin("step 1", {}, (), False)
    results.record.finish("step 1", refills=0, pairs=0)
    return seconds


def encode(folder: Path, nodes: int) -> float:
    """Encodes the texts as the first process of step 2 does, and finds the batches."""
    from augcon.demo.tiny_model import make_tiny_model
    from augcon.run.results import Results
    from augcon.train.base import load_tokenizer
    from augcon.train.scorer import ScorerEncoder, plan
    from augcon.train.scores import KeptScores, key

    base, results = folder / "tiny", Results(folder)
    make_tiny_model(base, sentences())
    encoder, kept = ScorerEncoder(load_tokenizer(str(base)), 2048), KeptScores(folder / "encoded")
    started = time.process_time()
    if hasattr(results, "each_root"):
        listed: Any = (query for _, queries in results.each_root(results.queries) for query in queries)
        plan(kept, encoder, ((key(query), (query.context, query.text)) for query in listed))
    else:
        listed = results.read_queries(results.queries).values()
        plan(kept, encoder, {key(query): (query.context, query.text) for queries in listed for query in queries})
    return time.process_time() - started


def step_2(folder: Path, nodes: int) -> float:
    """Reads what step 1 and the scorer have made, ranks, filters, sweeps and writes, as step 2 does."""
    step2, config = importlib.import_module("step2_scorer"), importlib.import_module("config")
    from augcon.run.results import Results
    from augcon.train.scores import KeptScores, key

    settings, results = config.Settings(results=str(folder)), Results(folder)
    started = time.process_time()
    roots, *queries, _ = step2.read_step_1(results)
    kept = KeptScores(results.scores_parts / "scorer")
    scores = kept.read()
    if queries:  # before: all queries at once, and the scores by their ids
        listed = [query for of in queries[0].values() for query in of]
        scores = {query.id: kept.scores[key(query)] for query in listed}
    step2.choose(settings, results, roots, *queries, scores)
    return time.process_time() - started


MEASURES = {"step 1": step_1, "encode": encode, "step 2": step_2}


def sentences() -> list[str]:
    """The sentences of DailyM."""
    import datasets

    from augcon.text.units import sentences

    articles = datasets.load_from_disk(str(ROOT / "DailyM"))["train"]["article"]
    return [sentence for article in articles for sentence in sentences(article)]


def trees(nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    """Root contexts and their nodes, the same in every run."""
    from augcon.data import Node, RootContext
    from augcon.text.units import length

    rng, known, asked = random.Random(1), sentences(), questions()
    earlier: list[str] = []
    for root in range(nodes // NODES):
        text = ""
        while len(text) < 480:
            text += rng.choice(known)
        tree: list[Any] = []
        for number in range(NODES):
            path = bin(number + 1)[3:].replace("1", "2").replace("0", "1")
            part = text
            for half in path:
                middle = len(part) // 2
                part = part[:middle] if half == "1" else part[middle:]
            draw = rng.random()
            if tree and draw < 0.25:
                query = rng.choice(tree).query.replace("什么", "哪些")
            else:
                query = rng.choice(earlier) if earlier and draw < 0.28 else next(asked)
            tree.append(Node(root, 0, path, part, query, "done", "", 1))
        earlier = [*earlier[-10_000:], tree[0].query]
        tree.sort(key=lambda node: node.path)
        long = length(text)
        yield RootContext(root, root // 8, 0, len(text), long, max(1, -(-long // 35)), text), tree


def questions() -> Iterator[str]:
    """Questions of the words of DailyM, frequent ones more often."""
    from augcon.text.units import words

    rng = random.Random(3)
    counted = Counter(word for sentence in sentences() for word in words(sentence) if len(word) > 1)
    vocabulary = [word for word, _ in counted.most_common()]
    vocabulary += [
        one + other
        for one, other in zip(rng.choices(vocabulary, k=300_000), rng.choices(vocabulary, k=300_000), strict=True)
    ]
    weights = list(itertools.accumulate(1 / (place + 20) for place in range(len(vocabulary))))
    while True:
        a, b, c, other = rng.choices(vocabulary, cum_weights=weights, k=4)
        topic = rng.choice(vocabulary[:3]) if rng.random() < 0.5 else other
        yield rng.choice(TEMPLATES).format(a=a, b=b, c=c, t=topic)


if __name__ == "__main__":
    main()
