"""Steps 1 and 3 on a Ray cluster: a real one, of three nodes on this machine."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from conftest import Engine, demo_engine, run, says_one_line, start
from hypothesis import given
from hypothesis import strategies as st

from augcon.data import RootContext
from augcon.errors import UserError
from augcon.files import read_lines, write_dataset, write_json, write_lines
from augcon.run.results import Results, Scored, ShortRoot
from augcon.run.shards import cut_in_shards, hand_out_queries, join_pairs, join_trees

STEP_1 = ("nodes.jsonl", "queries.json", "short_roots.jsonl", "contexts.jsonl", "scorer_pairs")
STEP_3 = ("sft_origins.jsonl", "dropped_queries.jsonl", "example_search.json", "sft_data")
IN_FLIGHT = 8
FEW = ("--limit", 9, "--negatives", 20, "--max-passes", 1)


def write_roots(folder: Path, articles: list[int]) -> Results:
    """Root contexts of these articles, one for each number."""
    results = Results(folder)
    folder.mkdir(exist_ok=True)
    roots = [RootContext(n, article, 0, 1, 30, 1, f"text {n}") for n, article in enumerate(articles)]
    write_lines(results.contexts, map(dataclasses.asdict, roots))
    return results


@given(size=st.integers(1, 9), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_shards_are_whole_articles_of_so_many_root_contexts_at_least(
    size: int, lengths: list[int], tmp_path_factory: pytest.TempPathFactory
):
    articles = [article for article, length in enumerate(lengths) for _ in range(length)]
    results = write_roots(tmp_path_factory.mktemp("roots"), articles)
    shards = cut_in_shards(results, size)
    assert [n for shard in shards for n in range(shard.first, shard.end)] == list(range(len(articles)))
    parts = [[articles[n] for n in range(shard.first, shard.end)] for shard in shards]
    assert all(one[-1] != other[0] for one, other in itertools.pairwise(parts))
    assert all(size <= len(part) < size + 5 for part in parts[:-1])
    whole = results.contexts.read_bytes()
    assert b"".join(shard.results.contexts.read_bytes() for shard in shards) == whole


def test_shards_stay_as_they_were_cut_until_the_root_contexts_change(tmp_path: Path):
    results = write_roots(tmp_path, [0, 1, 2, 3])
    before = cut_in_shards(results, 2)
    assert [(shard.first, shard.end) for shard in before] == [(0, 2), (2, 4)]
    assert [shard.end for shard in cut_in_shards(results, 1)] == [2, 4]
    write_roots(tmp_path, [0, 1, 2])
    assert [shard.end for shard in cut_in_shards(results, 1)] == [1, 2, 3]


def test_what_is_handed_out_and_made_comes_together_in_order(tmp_path: Path):
    results = write_roots(tmp_path, [0, 0, 1, 1, 2])
    shards = cut_in_shards(results, 1)
    entries = {"0": [["c", "q0"], ["c", "“é” \U0002a6d6"]], "2": [], "4": [["c\n", "q4"]]}
    write_json(results.filtered_queries, entries)
    write_lines(results.scores, (dataclasses.asdict(Scored(f"{n}:0:", n, "q", 0.5, "kept")) for n in (0, 0, 3, 4)))
    write_lines(results.nodes, ({"root": n, "context": "c"} for n in (0, 1, 2, 4)))
    hand_out_queries(results, shards)
    assert [json.loads(shard.results.filtered_queries.read_text()) for shard in shards] == [
        {"0": entries["0"]},
        {"2": []},
        {"4": entries["4"]},
    ]
    for path in (results.scores, results.nodes):
        parts = [(shard.results.folder / path.name).read_bytes() for shard in shards]
        assert [part.count(b"\n") for part in parts] == [2, 1, 1] and b"".join(parts) == path.read_bytes()
    for shard in shards:
        made = shard.results
        shutil.copy(made.filtered_queries, made.queries)
        for path in (made.nodes, made.sft_origins, made.dropped_queries):
            path.write_text(f"{path.name} {shard.first}\n")
        made.write_short_roots([ShortRoot(shard.first, 1, "none")], filtered=False)
        if shard.first != 2:  # a shard all of whose queries were dropped
            write_dataset(made.sft_data, [{"question": f"q{shard.first}", "answer": "a"}])
    join_trees(results, shards)
    join_pairs(results, shards)
    assert json.loads(results.queries.read_text()) == entries
    assert results.nodes.read_text() == "nodes.jsonl 0\nnodes.jsonl 2\nnodes.jsonl 4\n"
    assert results.dropped_queries.read_text().count("\n") == 3
    assert [row.root for row in read_lines(results.short_roots, ShortRoot, "")] == [0, 2, 4]
    assert datasets.load_from_disk(results.sft_data)["question"][:] == ["q0", "q4"]


@pytest.mark.parametrize("roots", [["1", "0"], ["0", "7"]], ids=["out of order", "of no root context"])
def test_queries_that_belong_to_no_shard_are_not_lost_in_silence(roots: list[str], tmp_path: Path):
    results = write_roots(tmp_path, [0, 1])
    write_json(results.filtered_queries, {root: [["c", "q"]] for root in roots})
    with pytest.raises(UserError, match=f"names root context {roots[1]} out of order, or it is none of"):
        hand_out_queries(results, cut_in_shards(results, 1))


def test_a_dataset_has_the_same_bytes_however_its_rows_come(tmp_path: Path):
    rows = [{"question": f"q{n}" * 9, "answer": "é" * n} for n in range(2500)]
    write_dataset(tmp_path / "one", rows)
    write_dataset(tmp_path / "other", iter(rows))
    assert same(tmp_path / "one", tmp_path / "other") and datasets.load_from_disk(tmp_path / "one").to_list() == rows


def same(one: Path, other: Path) -> bool:
    """Whether two files, or all files in two folders, have the same bytes."""
    if one.is_dir():
        names = sorted(path.name for path in one.iterdir())
        return names == sorted(path.name for path in other.iterdir()) and all(
            same(one / name, other / name) for name in names
        )
    return one.read_bytes() == other.read_bytes()


def all_the_same(one: Path, other: Path, names: tuple[str, ...]) -> bool:
    return not [name for name in names if not same(one / name, other / name)]


class Nodes:
    """A Ray cluster of three nodes."""

    def __init__(self) -> None:
        pipe, here = subprocess.PIPE, Path(__file__).with_name("ray_nodes.py")
        self.process = subprocess.Popen(
            [sys.executable, str(here)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        while not (line := self.process.stdout.readline().strip())[:1].isdigit():
            assert line or self.process.poll() is None
        self.address = line

    def tell(self, what: str) -> None:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        while self.process.stdout.readline().strip() != "done":
            assert self.process.poll() is None


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if not importlib.util.find_spec("ray"):
        pytest.skip("Ray is not installed")
    made = Nodes()
    yield made
    made.process.communicate(timeout=60)


@pytest.fixture
def slow_engine() -> Iterator[Engine]:
    server = demo_engine(latency=0.1)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def alone(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine makes in steps 1 and 3."""
    folder = tmp_path_factory.mktemp("alone") / "results"
    for script in ("step1_gen_q.py", "step3_gen_a.py"):
        made = run(script, "--results", folder, "--api-base", engine.api, *FEW)
        assert not made.returncode, made.stderr
        stand_in_for_step_2(folder)
    return folder


def stand_in_for_step_2(folder: Path) -> None:
    """All queries are kept, with scores that are of no use."""
    results = Results(folder)
    if not results.filtered_queries.exists():
        shutil.copy(results.queries, results.filtered_queries)
        scored = [
            dataclasses.asdict(Scored(query.id, query.root, query.text, len(query.text) / 7, "kept"))
            for _, queries in results.each_root(results.queries)
            for query in queries
        ]
        write_lines(results.scores, scored)


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.nightly), 12])
def test_the_files_are_those_of_one_machine(nodes: Nodes, alone: Path, engine: Engine, size: int, tmp_path: Path):
    folder = tmp_path / "results"
    shared = ("--results", folder, "--api-base", engine.api, "--ray", nodes.address, "--shard", size, *FEW)
    for script, files in (("step1_gen_q.py", STEP_1), ("step3_gen_a.py", STEP_3)):
        made = run(script, *shared)
        assert not made.returncode, made.stderr
        assert all_the_same(alone, folder, files)
        stand_in_for_step_2(folder)
    figures, expected = (json.loads((of / "figures.json").read_text()) for of in (folder, alone))
    for step, differ in (("step 1", {"finished", "asked"}), ("step 3", {"finished", "asked"})):
        assert {name: value for name, value in figures[step].items() if name not in differ} == {
            name: value for name, value in expected[step].items() if name not in differ
        }
    again = run("step3_gen_a.py", *shared)
    assert not again.returncode and "calls:   0 in this run" in again.stdout
    if size == 12:
        (folder / "shards" / "000000000" / "sample.jsonl").unlink()
        again = run("step1_gen_q.py", *shared)
        assert not again.returncode and "calls:   0 in this run" in again.stdout
        assert all_the_same(alone, folder, STEP_1)


def calls(engine: Engine) -> float:
    return engine.metric("vllm:request_success_total")


def kept(folder: Path) -> int:
    """The number of replies in all stores."""
    total = 0
    for path in folder.rglob("replies.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as store:
            total += store.execute("SELECT count(*) FROM replies").fetchone()[0]
    return total


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step1_gen_q.py", pytest.param("step3_gen_a.py", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("lost", ["a node", "the driver"])
def test_what_is_lost_costs_the_calls_under_way(
    nodes: Nodes, alone: Path, slow_engine: Engine, script: str, lost: str, tmp_path: Path
):
    folder = tmp_path / "results"
    if script == "step3_gen_a.py":
        made = shutil.ignore_patterns("sft*", "drop*", "example*", "replies*")
        shutil.copytree(alone, folder, ignore=made)
    shared = ("--results", folder, "--api-base", slow_engine.api, "--ray", nodes.address, "--shard", 8, *FEW)
    running = start(script, *shared, "--max-in-flight", IN_FLIGHT)
    end = time.monotonic() + 120
    while len(list(folder.glob("shards/*/log.txt"))) < 2 or calls(slow_engine) < 300:
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    if lost == "a node":
        nodes.tell("kill")
        _, errors = running.communicate(timeout=300)
        nodes.tell("add")
    else:
        running.kill()
        running.communicate()
        running = start(script, *shared, "--max-in-flight", IN_FLIGHT)
        _, errors = running.communicate(timeout=300)
    assert not running.returncode, errors
    assert all_the_same(alone, folder, STEP_1 if script == "step1_gen_q.py" else STEP_3)
    assert 0 <= calls(slow_engine) - kept(folder) <= IN_FLIGHT * (1 if lost == "a node" else 4)


@pytest.mark.slow
def test_servers_on_the_nodes_are_there_for_a_command_alone(nodes: Nodes, alone: Path, tmp_path: Path):
    folder = tmp_path / "results"
    flags = ("--results", folder, "--ray", nodes.address, "--shard", 12, *FEW)
    tell = "import os; print('told', os.environ['AUGCON_API_BASE'], os.environ['AUGCON_API_KEY'])"
    made = run("serve.py", *flags, "--demo", "--", sys.executable, "-c", tell)
    assert not made.returncode, made.stderr
    _, addresses, key = next(line.split() for line in made.stdout.splitlines() if line.startswith("told"))
    assert len(addresses.split(",")) == 3 and len(key) > 20
    for address in addresses.split(","):
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{address}/models", timeout=5)
    made = run("serve.py", *flags, "--demo", "--", sys.executable, "step1_gen_q.py", *flags)
    assert not made.returncode, made.stderr
    assert all_the_same(alone, folder, STEP_1)
    assert key not in made.stdout + made.stderr


def test_without_a_cluster_there_is_one_line(engine: Engine, tmp_path: Path):
    made = run("step1_gen_q.py", "--results", tmp_path / "r", "--api-base", engine.api, "--ray", "127.0.0.1:9", *FEW)
    assert says_one_line(made, "--ray '127.0.0.1:9'", "no Ray cluster answers there")
