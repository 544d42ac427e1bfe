"""Killed at any moment, every script ends with the same results when the same command is run again.

Of an undisturbed run and of one that was killed, the same are: what the script makes, to the last digit, scores and
weights too, for a training goes on from its checkpoint with the same random numbers; the names of all files in the
results folder; and the number of calls, but for those under way at the kill. Times and speeds are a run's own.
"""

import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, demo_engine, outputs_in
from kills import Script, kill_and_run_again
from standins import Mark

from augcon.demo.tiny_model import make_tiny_model
from augcon.run.record import Record

ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
STEP_1 = ("contexts.jsonl", "articles.jsonl", "skipped.jsonl", "nodes.jsonl", "queries.json", "short_roots.jsonl")
STEP_3 = ("sft_data", "sft_origins.jsonl", "dropped_queries.jsonl", "example_search.json")
IN_FLIGHT = 8


class Scripts:
    """Every script by its name, with what it makes when nothing happens to it; made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, Mark()
        self._known: dict[str, Script] = {}
        self._engines: dict[float, Engine] = {}

    def close(self) -> None:
        """Ends what was started."""
        self.mark.end()
        for server in self._engines.values():
            server.stop()

    def script(self, name: str) -> Script:
        """One of them."""
        if name not in self._known:
            self._known[name] = getattr(self, name.replace(" ", "_"))().undisturbed(self.folder / name, self.mark)
        return self._known[name]

    def _engine(self, latency: float) -> Engine:
        """A server whose replies take so many seconds, so that requests are under way at most moments."""
        self._engines[latency] = self._engines.get(latency) or demo_engine(latency=latency)
        return self._engines[latency]

    @functools.cached_property
    def _base(self) -> Path:
        make_tiny_model(self.folder / "tiny", datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
        return self.folder / "tiny"

    def _asking(
        self, file: str, latency: float, prepared: Path | None, names: tuple[str, ...], *flags: object
    ) -> Script:
        server = self._engine(latency)
        slowly = ["--api-base", server.api, "--max-in-flight", IN_FLIGHT, *flags]
        command = [sys.executable, file, "--results", "{}", *map(str, slowly)]
        return Script(command, prepared, names, asks=server, in_flight=IN_FLIGHT)

    def _ranks(self, file: str, prepared: Path, names: tuple[str, ...], *flags: object) -> Script:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "{port}"]
        command = [*launcher, file, "--results", "{}", *map(str, flags)]
        return Script(command, prepared, names, file, environment=ON_CPU)

    def _after_step_1(self, name: str) -> Path:
        self.script("step 1")
        return shutil.copytree(self.folder / "step 1", self.folder / name)

    def step_1(self) -> Script:
        corpus = self.folder / "two.jsonl"
        articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:3:2]
        corpus.write_text("".join(json.dumps({"article": article}) + "\n" for article in articles))
        names = (*STEP_1, "scorer_pairs", "run.json")
        return self._asking("step1_gen_q.py", 0.04, None, names, "--corpus", corpus, "--negatives", 20)

    def step_1_anew(self) -> Script:
        names, prepared = (*STEP_1, "scorer_pairs", "run.json"), self._after_step_1("for step 1")
        flags = ("--corpus", self.folder / "two.jsonl", "--negatives", 20, "--max-length", 200, "--redo")
        return self._asking("step1_gen_q.py", 0.04, prepared, names, *flags)

    def step_2(self) -> Script:
        command = ["--scorer-model", self._base, "--max-refills", 0, "--scorer-epochs", 2]
        command += ["--scorer-batch", 4, "--scorer-learning-rate", "3e-3"]
        names = ("scorer", "scores.jsonl", "filtered_queries.json", "run.json")
        return self._ranks("step2_scorer.py", self._after_step_1("for step 2"), names, *command)

    def step_3(self) -> Script:
        prepared = self._after_step_1("for step 3")
        kept = json.loads((prepared / "queries.json").read_text())
        kept = {root: queries[:20] for root, queries in kept.items()}
        (prepared / "filtered_queries.json").write_text(json.dumps(kept))
        return self._asking("step3_gen_a.py", 0.04, prepared, (*STEP_3, "run.json"))

    def inference(self) -> Script:
        return self._asking("inference.py", 0.25, None, ("outputs",))

    def judge(self) -> Script:
        questions = [f"第{n}个问题是什么？" for n in range(40)]
        outputs = [str(outputs_in(self.folder / name, questions, name)) for name in ("好", "更好")]
        names = ("judge.jsonl", "judge.json")
        return self._asking("judge.py", 0.25, None, names, "--outputs", ",".join(outputs))

    def finetune(self) -> Script:
        rows = [json.loads(line) for line in (ROOT / "qa_examples.jsonl").read_text().splitlines()]
        pairs = {name: [row[name] for row in rows] * 5 for name in ("question", "answer")}
        prepared = self.folder / "for finetune"
        datasets.Dataset.from_dict(pairs).save_to_disk(prepared / "sft_data")
        flags = ("--model", self._base, "--epochs", 3, "--held-out", 0.1)
        return self._ranks("finetune.py", prepared, ("LoRA", "log.json", "run.json"), *flags)

    def merge(self) -> Script:
        """A model that takes some seconds, with an adapter of some changes."""
        import peft
        import torch
        import transformers

        from augcon.train.base import lora

        large, prepared = shutil.copytree(self._base, self.folder / "large"), self.folder / "for merge"
        (large / "model.safetensors").unlink()
        config = transformers.AutoConfig.from_pretrained(self._base)
        config.update({"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256})
        config.update({"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(large, max_shard_size="20MB")
        tuned = peft.get_peft_model(model, lora("CAUSAL_LM"))
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights, std=0.01)
        tuned.save_pretrained(prepared / "LoRA")
        command = [sys.executable, "merge.py", "--results", "{}", "--base", str(large), "--quantize", "nf4"]
        return Script(command, prepared, ("sft_model",))

    def augcon(self) -> Script:
        self.script("step 1")
        command = [
            "bash",
            "augcon.sh",
            "--corpus",
            str(self.folder / "two.jsonl"),
            "--results",
            "{}",
            "--negatives",
            "30",
        ]
        return Script(command, None, (*STEP_1, *STEP_3, "scores.jsonl", "filtered_queries.json"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    made = Scripts(tmp_path_factory.mktemp("kills"))
    yield made
    made.close()


SIGNALS = ("SIGKILL", "SIGTERM", "Ctrl-C")
OF_RANKS = (*SIGNALS, "SIGKILL of a rank")
# A script, its signals, the number of seeds; of the short version, the signals and the seed; whether it is slow.
ROUNDS = [
    ("step 1", SIGNALS, 20, SIGNALS, 3, False),
    ("step 1 anew", SIGNALS, 6, SIGNALS[:1], 5, False),
    ("step 2", OF_RANKS, 6, (), 0, True),
    ("step 3", SIGNALS, 20, SIGNALS[:1], 3, False),
    ("inference", SIGNALS, 20, SIGNALS[1:2], 5, False),
    ("judge", SIGNALS, 20, SIGNALS[2:], 5, False),
    ("finetune", OF_RANKS, 6, SIGNALS[:1], 5, True),
    ("merge", SIGNALS, 10, SIGNALS[:1], 5, True),
    ("augcon", SIGNALS, 4, (), 3, True),  # tests/test_augcon.py kills it in every step
]


def rounds() -> Iterator[Any]:
    for name, signals, seeds, short, seed_of_short, slow in ROUNDS:
        for seed, how in itertools.product(range(seeds), signals):
            marks = [pytest.mark.slow] * slow
            if seed != seed_of_short or how not in short:
                marks.append(pytest.mark.nightly)
            yield pytest.param(name, how, seed, id=f"{name}-{how}-{seed}", marks=marks)


@pytest.mark.parametrize(("name", "how", "seed"), rounds())
def test_killed_and_run_again_it_ends_with_the_same_results(
    scripts: Scripts, name: str, how: str, seed: int, tmp_path: Path, mark: Mark
):
    words, faults = kill_and_run_again(scripts.script(name), tmp_path / "r", how, seed, mark)
    print(f"\n{name}, {words}; {faults or 'the same'}")
    assert not faults, words


def test_what_a_kill_leaves_of_stale_results_is_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def begin(**inputs: int) -> bool:
        return Record(tmp_path).begin("finetune", inputs, made=[], redo=False, stale=[tmp_path / "ckpts"])

    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    begin(epochs=4)
    (tmp_path / "ckpts" / "checkpoint-9").mkdir(parents=True)
    assert begin(epochs=4) and (tmp_path / "ckpts").exists()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(epochs=2)
    monkeypatch.undo()
    assert not begin(epochs=2) and not (tmp_path / "ckpts").exists()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_no_rank_outlives_the_deepspeed_command(tmp_path: Path, mark: Mark, how: str):
    """In DeepSpeed's place, a command and a helper that start each other and the rank in the same way."""
    rank = """
import time
from augcon.train.ranks import report_once
print("here", flush=True)
report_once(lambda: time.sleep(100))()
"""
    starts = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())"
    for name, code in {"deepspeed": starts, "helper": starts, "rank": rank}.items():
        (tmp_path / name).write_text(code)
    chain = [sys.executable, *(str(tmp_path / name) for name in ("deepspeed", "helper", "rank"))]
    environment = {**mark.environment, "LOCAL_SIZE": "2", "WORLD_SIZE": "2"}
    process = subprocess.Popen(chain, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"here\n"
    assert not mark.all_end(2)
    process.send_signal(getattr(signal, how))
    process.wait()
    assert mark.all_end(20), mark.alive()
