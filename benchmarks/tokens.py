"""What step 1 costs: prompt tokens, those that the server's prefix cache has, and written tokens, for each kept query.

    VLLM_SERVER_DEV_MODE=1 python serve.py --no-demo --model MODEL -- python benchmarks/tokens.py --corpus corpus.jsonl

Runs step1_gen_q.py over the middle root context of each article, without pairs for the scorer, for each way to split;
with --before also as it was at that commit. The tokens are the server's own counters'. With VLLM_SERVER_DEV_MODE, vLLM
forgets its prefix cache between the columns, or the next would profit from it. With --answers, step 3 answers that many
queries. Prints a table in Markdown. Nothing else may use the server meanwhile.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402

from augcon.method.diversity import DiverseQueries  # noqa: E402
from benchmarks.quality import choose_roots  # noqa: E402

API = os.environ.get("AUGCON_API_BASE", "http://127.0.0.1:8000/v1")
COUNTERS = {"prompt": "prompt_tokens", "cached": "prefix_cache_hits", "written": "generation_tokens"}


@dataclasses.dataclass(frozen=True)
class Column:
    """A way to run step 1: the folder of the code, and the flags."""

    name: str
    code: Path
    flags: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", default="DailyM")
    parser.add_argument("--text-field", default="article")
    parser.add_argument("--languages", default="zh,en")
    parser.add_argument("--roots", type=int, default=6, help="root contexts of each language")
    parser.add_argument("--max-length", type=int, default=300)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--ways", default="rewrite,focus")
    parser.add_argument("--leaf-lengths", default="", help="a column for each, in place of the default")
    parser.add_argument("--before", default="", help="a commit, or a folder with AugCon, to compare with")
    parser.add_argument("--answers", type=int, default=0, help="queries that step 3 answers for each column")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        roots = [root for of in options.languages.split(",") for root in choose_roots(options, of)]
        corpus.write_text("".join(json.dumps({"article": root.text}) + "\n" for root in roots), "utf-8")
        columns = [column for way in options.ways.split(",") for column in columns_of(options, way, Path(folder))]
        figures = [figures_of(column, corpus, Path(folder) / column.name, options) for column in columns]
        print(f"{len(roots)} root contexts, {sum(root.length for root in roots) // len(roots)} long\n")
        print("| | " + " | ".join(column.name for column in columns) + " |\n|---|" + "---:|" * len(columns))
        for name in figures[0]:
            print(f"| {name} | " + " | ".join(of_column.get(name, "–") for of_column in figures) + " |")


def columns_of(options: argparse.Namespace, way: str, folder: Path) -> list[Column]:
    """The columns of a way to split: as it was, and as it is with each leaf length."""
    columns = [Column(f"{way} before", code_of(options.before, folder), ("--split", way))] if options.before else []
    for leaf in options.leaf_lengths.split(","):
        flags = ("--leaf-length", leaf) if leaf else ()
        columns.append(Column(" ".join([way, *flags]), ROOT, ("--split", way, *flags)))
    return columns


def code_of(commit: str, folder: Path) -> Path:
    """The folder that holds AugCon as of a commit."""
    if Path(commit).is_dir():
        return Path(commit)
    code = folder / "before"
    if not code.exists():
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(code, filter="data")
    return code


def figures_of(column: Column, corpus: Path, results: Path, options: argparse.Namespace) -> dict[str, str]:
    """Runs a column and returns its figures by their names."""
    shared = ("--results", results, "--corpus", corpus, "--max-length", options.max_length, *column.flags)
    spent, seconds = run(column, "step1_gen_q.py", *shared, "--max-passes", options.passes, "--negatives", 0)
    nodes = [json.loads(line) for line in (results / "nodes.jsonl").read_text("utf-8").splitlines()]
    contexts = [json.loads(line) for line in (results / "contexts.jsonl").read_text("utf-8").splitlines()]
    queries = json.loads((results / "queries.json").read_text("utf-8"))
    diverse = {}
    for root, listed in queries.items():
        of_root = DiverseQueries(0.7)
        diverse[root] = [query for query in listed if of_root.offer(query[1])]
    kept = {str(root["root"]): diverse[str(root["root"])][: root["quota"]] for root in contexts}
    number, asked = sum(map(len, kept.values())), [node for node in nodes if node["tries"]]
    outcomes = Counter(node["outcome"] for node in asked)
    figures = {
        "replies": f"{sum(node['tries'] for node in asked)}",
        "replies for a context asked": f"{sum(node['tries'] for node in asked) / len(asked):.2f}",
        "contexts asked that end badly": ", ".join(f"{kind} {n}" for kind, n in outcomes.items() if kind != "done"),
        "questions with a doubt": f"{sum(bool(node['doubt']) for node in nodes)}",
        "queries a root context": f"{sum(map(len, queries.values())) / len(contexts):.1f}",
        "mutually diverse": f"{sum(map(len, diverse.values())) / len(contexts):.1f}",
        "kept (a quota at most)": f"{number / len(contexts):.1f}",
        **tokens(spent, number, "a kept query"),
        "seconds": f"{seconds:.0f}",
    }
    if options.answers:
        chosen: dict[str, list[list[str]]] = {root: [] for root in kept}
        for root, listed in kept.items():
            chosen[root] = listed[: max(0, options.answers - sum(map(len, chosen.values())))]
        (results / "filtered_queries.json").write_text(json.dumps(chosen), "utf-8")
        flags = ("--candidates", 1, "--answer-max-tokens", 512)
        answering, _ = run(column, "step3_gen_a.py", "--results", results, *flags)
        pairs = len(datasets.load_from_disk(results / "sft_data"))
        figures["pairs of queries answered"] = f"{pairs} of {sum(map(len, chosen.values()))}"
        share = sum(map(len, chosen.values())) / max(1, number)
        figures |= tokens(answering + Counter({k: round(n * share) for k, n in spent.items()}), pairs, "a kept pair")
    return figures


def tokens(spent: Counter[str], number: int, of: str) -> dict[str, str]:
    """What the server counted, for each of a number of things."""
    if not spent.total():
        return {}
    return {
        f"prompt tokens {of}": f"{spent['prompt'] / max(1, number):,.0f}",
        f"cached of these, {of}": f"{100 * spent['cached'] / spent['prompt']:.1f}%",
        f"not cached {of}": f"{(spent['prompt'] - spent['cached']) / max(1, number):,.0f}",
        f"written {of}": f"{spent['written'] / max(1, number):,.0f}",
    }


def run(column: Column, script: str, *flags: object) -> tuple[Counter[str], float]:
    """Runs a script of a column's code; returns the tokens that the server counted meanwhile, and the seconds."""
    server = API.removesuffix("/v1")
    httpx.post(f"{server}/reset_prefix_cache")
    before, started = counted(server), time.monotonic()
    done = subprocess.run(
        [sys.executable, script, *map(str, flags)], cwd=column.code, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{column.name}: {script} ended with {done.returncode}: {done.stderr[-2000:]}")
    print(f"{column.name}: {script}\n{done.stdout}", file=sys.stderr, flush=True)
    return counted(server) - before, time.monotonic() - started


def counted(server: str) -> Counter[str]:
    """The tokens that a server has counted since its start; nothing for a server without such counters."""
    metrics = httpx.get(f"{server}/metrics").text
    sums = Counter[str]()
    for name, key in COUNTERS.items():
        values = re.findall(rf"^vllm:{key}_total\{{.*\}} (\S+)$", metrics, re.MULTILINE)
        sums[name] = round(sum(map(float, values)))
    return sums


if __name__ == "__main__":
    main()
