"""Killed at any moment, every script ends with the same results when the same command is run again.

Of an undisturbed run and of one that was killed, the same are: the files that hold what the script makes, to the last
digit, but for scores, adapters and losses, which may differ by what the order of sums makes of a training that goes on
from a checkpoint; the names of all files in the results folder; and the number of calls, but for those that were under
way. Times, and figures of calls and of speed, are a run's own.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from conftest import ROOT, Engine, demo_engine, outputs_in
from conftest import run as run_script
from kills import Script, kill_and_run_again, undisturbed
from standins import Mark

from augcon.demo.tiny_model import make_tiny_model
from augcon.train.base import lora

ASKING = ("step 1", "step 3", "inference", "judge")
TRAINING = ("step 2", "finetune")
SIGNALS = ("SIGKILL", "SIGTERM", "Ctrl-C")
OF_RANKS = (*SIGNALS, "SIGKILL of a rank")
TWO_RANKS = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "{port}"]
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
STEP_1 = ("contexts.jsonl", "articles.jsonl", "skipped.jsonl", "nodes.jsonl", "queries.json", "short_roots.jsonl")
STEP_3 = ("sft_data", "sft_origins.jsonl", "dropped_queries.jsonl", "example_search.json")
IN_FLIGHT = 8


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[[float], Engine]]:
    """Servers whose replies take so many seconds, so that requests are under way at most moments."""
    known: dict[float, Engine] = {}

    def engine(latency: float) -> Engine:
        known[latency] = known.get(latency) or demo_engine(latency=latency)
        return known[latency]

    yield engine
    for server in known.values():
        server.stop()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_model(folder, datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
    return folder


Scripts = Callable[[str], Script]


@pytest.fixture(scope="module")
def scripts(
    engines: Callable[[float], Engine], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scripts]:
    """Every script by its name, with what it makes when nothing happens to it; made when it is first asked for."""
    folder, mark, known = tmp_path_factory.mktemp("kills"), Mark(), dict[str, Script]()

    def script(name: str) -> Script:
        if name not in known:
            known[name] = undisturbed(MAKE[name](), folder / name, mark)
        return known[name]

    def asking(file: str, latency: float, prepared: Path | None, names: tuple[str, ...], *flags: object) -> Script:
        server = engines(latency)
        slowly = ["--api-base", server.api, "--max-in-flight", IN_FLIGHT, *flags]
        command = [sys.executable, file, "--results", "{}", *map(str, slowly)]
        return Script(command, prepared, names, asks=server, in_flight=IN_FLIGHT)

    def step_1() -> Script:
        corpus = folder / "two.jsonl"
        articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:3:2]
        corpus.write_text("".join(json.dumps({"article": article}) + "\n" for article in articles))
        names = (*STEP_1, "scorer_pairs", "run.json")
        return asking("step1_gen_q.py", 0.04, None, names, "--corpus", corpus, "--negatives", 20)

    def step_2() -> Script:
        command = [*TWO_RANKS, "step2_scorer.py", "--results", "{}", "--scorer-model", base, "--max-refills", 0]
        command += ["--scorer-epochs", 2, "--scorer-batch", 4, "--scorer-learning-rate", "3e-3"]
        names = ("scorer", "scores.jsonl", "filtered_queries.json", "run.json")
        ranks = "step2_scorer.py"
        prepared = folder / "for step 2"
        shutil.copytree(folder / "step 1", prepared) if script("step 1") else None
        return Script(list(map(str, command)), prepared, names, ranks, tolerance=1e-3, environment=ON_CPU)

    def step_3() -> Script:
        script("step 1")
        prepared = shutil.copytree(folder / "step 1", folder / "for step 3")
        kept = json.loads((prepared / "queries.json").read_text())
        kept = {root: queries[:20] for root, queries in kept.items()}
        (prepared / "filtered_queries.json").write_text(json.dumps(kept))
        return asking("step3_gen_a.py", 0.04, prepared, (*STEP_3, "run.json"))

    def inference() -> Script:
        return asking("inference.py", 0.25, None, ("outputs",))

    def judge() -> Script:
        questions = [f"第{n}个问题是什么？" for n in range(40)]
        outputs = [str(outputs_in(folder / name, questions, name)) for name in ("好", "更好")]
        names = ("judge.jsonl", "judge.json")
        return asking("judge.py", 0.25, None, names, "--outputs", ",".join(outputs))

    def finetune() -> Script:
        rows = [json.loads(line) for line in (ROOT / "qa_examples.jsonl").read_text().splitlines()]
        pairs = {name: [row[name] for row in rows] * 5 for name in ("question", "answer")}
        prepared = folder / "for finetune"
        datasets.Dataset.from_dict(pairs).save_to_disk(prepared / "sft_data")
        command = [*TWO_RANKS, "finetune.py", "--results", "{}", "--model", base, "--epochs", 3, "--held-out", 0.1]
        names = ("LoRA", "log.json", "run.json")
        return Script(
            list(map(str, command)), prepared, names, "finetune.py", tolerance=1e-3, environment=ON_CPU
        )

    def merge() -> Script:
        large, prepared = folder / "large", folder / "for merge"
        shutil.copytree(base, large)
        config = transformers.AutoConfig.from_pretrained(base)
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 8
        config.num_attention_heads = 16
        config.num_key_value_heads, config.layer_types = 8, ["full_attention"] * 8
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        (large / "model.safetensors").unlink()
        model.save_pretrained(large, max_shard_size="20MB")
        tuned = peft.get_peft_model(model, lora("CAUSAL_LM"))
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.01)
        tuned.save_pretrained(prepared / "LoRA")
        command = [sys.executable, "merge.py", "--results", "{}", "--base", str(large), "--quantize", "nf4"]
        return Script(command, prepared, ("sft_model",), environment=ON_CPU)

    def augcon() -> Script:
        script("step 1")
        command = ["bash", "augcon.sh", "--corpus", str(folder / "two.jsonl"), "--results", "{}", "--negatives", "30"]
        return Script(command, None, (*STEP_1, *STEP_3, "scores.jsonl", "filtered_queries.json"), tolerance=1e-3)

    MAKE = {
        "augcon": augcon,
        "step 1": step_1,
        "step 2": step_2,
        "step 3": step_3,
        "inference": inference,
        "judge": judge,
        "finetune": finetune,
        "merge": merge,
    }
    yield script
    mark.end()


def kills(names: tuple[str, ...], signals: tuple[str, ...], short: dict[str, int], long: int) -> list:
    """A case for each script, signal and seed; those of the ``short`` version have the seed given for the signal."""
    return [
        pytest.param(name, how, seed, id=f"{name}-{how}-{seed}", marks=() if short.get(how) == seed else pytest.mark.nightly)
        for name in names
        for how in signals
        for seed in range(long)
    ]


@pytest.mark.parametrize(("name", "how", "seed"), kills(ASKING, SIGNALS, {"SIGKILL": 3, "SIGTERM": 5, "Ctrl-C": 6}, 20))
def test_a_script_that_asks(scripts: Scripts, name: str, how: str, seed: int, tmp_path: Path, mark: Mark):
    check(scripts(name), how, seed, tmp_path, mark)


@pytest.mark.parametrize(("name", "how", "seed"), kills(("merge",), SIGNALS, {"SIGKILL": 5}, 20))
def test_merging(scripts: Scripts, name: str, how: str, seed: int, tmp_path: Path, mark: Mark):
    check(scripts(name), how, seed, tmp_path, mark)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "seed"), kills(TRAINING, OF_RANKS, {"SIGKILL": 5}, 5))
def test_a_training(scripts: Scripts, name: str, how: str, seed: int, tmp_path: Path, mark: Mark):
    check(scripts(name), how, seed, tmp_path, mark)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "seed"), kills(("augcon",), SIGNALS, {"SIGKILL": 0}, 3))
def test_the_whole_command(scripts: Scripts, name: str, how: str, seed: int, tmp_path: Path, mark: Mark):
    check(scripts(name), how, seed, tmp_path, mark)


def check(script: Script, how: str, seed: int, folder: Path, mark: Mark) -> None:
    outcome = kill_and_run_again(script, folder / "r", how, seed, mark)
    print(f"\nKILL {script.command[script.command.index('--results') - 1]}, {outcome.words}; {outcome.faults or 'all the same'}")
    assert not outcome.faults, outcome
