"""The whole way with a real language model of 135 million parameters, trained and served on the CPU."""

import importlib.util
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, free_port, run

from augcon.machine.vllm import vllm_command

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")

# The beginnings of the four English ones.
ARTICLES = [text[:1200] for text in datasets.load_from_disk(ROOT / "DailyM")["train"]["article"] if text[:9].isascii()]


def corpus(folder: Path, articles: list[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"article": text}) + "\n" for text in articles))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def asked(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 1 of the demonstration engine over the English articles."""
    folder = tmp_path_factory.mktemp("asked")
    flags = ("--corpus", corpus(folder, ARTICLES), "--max-length", 40, "--api-base", engine.api)
    done = run("step1_gen_q.py", *flags, "--results", folder / "results")
    assert done.returncode == 0, done.stderr
    return folder / "results"


@pytest.fixture(scope="module")
def scored(asked: Path, smollm2: Path) -> Path:
    """Step 2 on pairs of the test's own: a question about the context, and one about another context."""
    rows = [(root, *query) for root, queries in read(asked / "queries.json").items() for query in queries]
    chance = random.Random(1)
    pairs = datasets.load_from_disk(asked / "scorer_pairs").to_list()
    for pair in pairs:
        others = [query for root, _, query in rows if int(root) != pair["root"]]
        pair["neg_query"] = chance.choice(others)
    shutil.rmtree(asked / "scorer_pairs")
    datasets.Dataset.from_list(pairs).save_to_disk(asked / "scorer_pairs")
    flags = ("--scorer-epochs", 1, "--scorer-learning-rate", "5e-4", "--max-refills", 0)
    done = run("step2_scorer.py", "--results", asked, "--scorer-model", smollm2, *flags, timeout=550)
    assert done.returncode == 0, done.stderr
    return asked


def test_a_scorer_learns_which_questions_belong_to_contexts_that_it_has_not_seen(scored: Path):
    facts = read(scored / "run.json")["scorer"]["finished"]
    pairs, right = facts["accuracy_after"]["all"]
    assert pairs >= 15 and right >= 0.8


@needs_vllm
def test_the_model_is_tuned_merged_served_and_answers(scored: Path, engine: Engine, smollm2: Path):
    done = run("step3_gen_a.py", "--results", scored, "--api-base", engine.api, "--candidates", 2)
    assert done.returncode == 0, done.stderr
    flags = ("--epochs", 2, "--batch", 2, "--learning-rate", "5e-4", "--held-out", 0.2)
    done = run("finetune.py", "--results", scored, "--model", smollm2, *flags, timeout=550)
    assert done.returncode == 0, done.stderr
    losses = [row["eval_loss"] for row in read(scored / "log.json") if "eval_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    done = run("merge.py", "--results", scored)
    assert done.returncode == 0, done.stderr

    questions = scored / "questions.txt"
    questions.write_text("What is a kettle?\nWhere does a bus stop?\n")
    inference = [sys.executable, "inference.py", "--questions", questions, "--answer-max-tokens", 64]
    done = run("serve.py", "--results", scored, "--model", scored / "sft_model", "--", *inference, "--results", scored)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = datasets.load_from_disk(scored / "outputs")["answer"][:]
    assert len(answers) == 2 and all(re.search("[a-z]{3} [a-z]", answer) for answer in answers)


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[Engine]:
    port = free_port()
    server = Engine(vllm_command(smollm2, "smollm2", port, None, ""), port, patience=300)
    yield server
    server.stop()


@needs_vllm
@pytest.mark.parametrize("structured", ["--no-structured-output", "--structured-output"])
def test_it_asks_and_answers_and_every_node_is_accounted_for(served: Engine, tmp_path: Path, structured: str):
    results = tmp_path / "results"
    flags = ("--results", results, "--api-base", served.api, structured, "--max-in-flight", 8)
    articles = corpus(tmp_path, [text[:600] for text in ARTICLES[:1]])
    small = ("--corpus", articles, "--max-passes", 1, "--negatives", 4, "--query-max-tokens", 300)
    done = run("step1_gen_q.py", *flags, *small, timeout=550)
    assert done.returncode == 0, done.stderr
    nodes = (results / "nodes.jsonl").read_text().splitlines()
    figures = re.search(r"^trees: +(\d+) nodes in .*? passes: (.*?)(;|$)", done.stdout, re.MULTILINE)
    assert int(figures[1]) == sum(map(int, re.findall(r"\d+", figures[2]))) == len(nodes)
    queries = read(results / "queries.json")
    assert any(queries.values())

    filtered = {root: listed[:3] for root, listed in queries.items()}
    (results / "filtered_queries.json").write_text(json.dumps(filtered))
    done = run("step3_gen_a.py", *flags, "--candidates", 1, "--answer-max-tokens", 200, timeout=550)
    assert done.returncode == 0, done.stderr
    assert len(datasets.load_from_disk(results / "sft_data")) > 0
