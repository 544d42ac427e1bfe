"""From pairs to served answers for real: DeepSpeed with two processes, NF4, the merge, and vLLM's CPU build.

A tiny model of random weights learns some pairs by heart. If template, loss, packing, merge and serving all fit, it
answers the questions with the very answers that it was trained on, and stops where they end.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import ROOT, clean_environment, free_port, run, says_one_line
from fidelity import divergence

from augcon.demo.tiny_model import make_tiny_model
from augcon.train.adapters import TrainedWith

pytestmark = pytest.mark.slow

EXAMPLES = [
    json.loads(line)
    for name in ("qa_examples.jsonl", "qa_examples_en.jsonl")
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
]
PAIRS = [(row["question"], row["answer"]) for row in EXAMPLES[6:14]]  # of both languages
FLAGS = ("--quantize", "nf4", "--learning-rate", "5e-3", "--epochs", 12, "--held-out", 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_model(folder, [row["context"] + row["question"] + row["answer"] for row in EXAMPLES])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.data *= 10  # or no hidden state could make it sure of a word
    model.save_pretrained(folder)
    return folder


def write_pairs(results: Path, pairs: list[tuple[str, str]]) -> Path:
    questions, answers = zip(*pairs, strict=True)
    datasets.Dataset.from_dict({"question": questions, "answer": answers}).save_to_disk(results / "sft_data")
    return results


def start_two_processes(*arguments: object) -> "subprocess.Popen[str]":
    """finetune.py under DeepSpeed, in a process group of its own."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["finetune.py", *map(str, arguments)]
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, start_new_session=True, **pipes)


def finetune(*arguments: object) -> str:
    """finetune.py under DeepSpeed to its end; what it says."""
    process = start_two_processes(*arguments)
    try:
        said, _ = process.communicate(timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


def losses(results: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in json.loads((results / "log.json").read_text()) if name in row]


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    results = write_pairs(tmp_path_factory.mktemp("chain") / "results", PAIRS * 16)
    return results, finetune("--results", results, "--model", base, *FLAGS)


def test_fine_tuning_leaves_adapter_checkpoints_log_and_picture(tuned: tuple[Path, str]):
    results, said = tuned
    assert losses(results)[0] > 5 and losses(results)[-1] < 0.5
    assert len(list((results / "ckpts").glob("checkpoint-*/adapter_model.safetensors"))) == 12
    assert not (results / "ckpts" / "encoded").exists()  # the tokens of the pairs, as large as these
    assert (results / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((results / "run.json").read_text())["finetune"]
    assert json.loads((results / "LoRA" / "run.json").read_text()) == {"finetune": record}
    assert record["made_with"]["quantize"] == "nf4" and record["finished"]["loss"] == losses(results)[-1]
    assert said.count(f"next:    python merge.py --results {results}") == 1
    for figure in ("tokens/s per process", "peak memory", "0 answers cut", "packs of at most", "(12 epochs)"):
        assert said.count(figure) == 1, said  # from one of the two processes


def test_a_finished_run_does_nothing_again_and_one_with_other_settings_is_refused(tuned: tuple[Path, str], base: Path):
    results, _ = tuned
    made = (results / "LoRA" / "adapter_model.safetensors").stat().st_mtime_ns
    flags = ("--results", results, "--model", base)
    again = run("finetune.py", *flags, *FLAGS)
    assert again.returncode == 0 and "done:" in again.stdout and "fine-tuning:" not in again.stderr
    other = run("finetune.py", *flags, *FLAGS, "--epochs", 3)
    assert says_one_line(other, "epochs was 12 and is now 3", "--redo to replace LoRA, checkpoint-")
    assert (results / "LoRA" / "adapter_model.safetensors").stat().st_mtime_ns == made


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_the_served_model_gives_the_trained_answers(tuned: tuple[Path, str], base: Path, tmp_path: Path):
    results, _ = tuned
    merged = run("merge.py", "--results", results)
    assert merged.returncode == 0, merged.stderr
    trained = TrainedWith.from_inputs(json.loads((results / "run.json").read_text())["finetune"]["made_with"])
    assert divergence(results / "sft_model", base, results / "LoRA", trained) < 1e-4
    last = max((results / "ckpts").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert run("merge.py", "--lora", last, "--output", tmp_path / "last").returncode == 0  # the same weights
    for file in (results / "sft_model").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "last" / file.name).read_bytes()
    asked = [PAIRS[place][0] for place in (5, 2, 7, 0, 1, 6, 3, 4)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": question}) + "\n" for question in asked))
    inference = [sys.executable, "inference.py", "--results", results, "--questions", questions]
    inference += ["--answer-temperature", "0", "--answer-max-tokens", "400"]
    served = run("serve.py", "--model", results / "sft_model", "--results", results, "--", *inference, timeout=400)
    assert served.returncode == 0, served.stdout + served.stderr
    outputs = datasets.load_from_disk(results / "outputs")
    answers = dict(PAIRS)
    assert outputs["question"][:] == asked
    assert outputs["answer"][:] == [answers[question] for question in asked]


def test_killed_between_checkpoints_it_ends_with_the_same_losses(base: Path, tmp_path: Path):
    flags = ("--model", base, *FLAGS[:4], "--epochs", 2, "--held-out", 0.1)
    whole = write_pairs(tmp_path / "whole", PAIRS * 6)
    finetune("--results", whole, *flags)
    killed = write_pairs(tmp_path / "killed", PAIRS * 6)
    process = start_two_processes("--results", killed, *flags)
    deadline = time.monotonic() + 300
    try:
        while not list((killed / "ckpts").glob("checkpoint-*/whole")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (killed / "LoRA").exists() and not (killed / "log.json").exists()
    assert "from checkpoint-" in finetune("--results", killed, *flags)
    assert losses(killed)[-1] == pytest.approx(losses(whole)[-1], abs=1e-4)
    assert losses(killed, "eval_loss")[-1] == pytest.approx(losses(whole, "eval_loss")[-1], abs=1e-4)
    assert len(losses(killed, "eval_loss")) == 3  # before the training, and at the end of each epoch


def test_a_single_pair_will_do_and_its_end_is_cut_where_there_is_no_room(base: Path, tmp_path: Path):
    results = write_pairs(tmp_path, PAIRS[:1])
    too_short = run("finetune.py", "--results", results, "--model", base, "--epochs", 2, "--max-tokens", 16)
    assert says_one_line(too_short, "no pair is left")  # and nobody is bound to these settings
    done = run("finetune.py", "--results", results, "--model", base, "--epochs", 2, "--max-tokens", 60)
    assert done.returncode == 0, done.stderr
    assert "1 pairs, 0 of them held out" in done.stdout and "1 answers cut at 60" in done.stdout
    assert json.loads((results / "LoRA" / "run.json").read_text())["finetune"]["made_with"]["quantize"] == "none"
    assert len(losses(results)) == 2


def test_another_learning_rate_takes_consent_or_a_folder_of_its_own(base: Path, tmp_path: Path):
    results = write_pairs(tmp_path / "r", PAIRS[:2])
    flags = ("--results", results, "--model", base, "--epochs", 1, "--held-out", 0)
    assert run("finetune.py", *flags).returncode == 0
    weights = (results / "LoRA" / "adapter_model.safetensors").read_bytes()
    faster = (*flags, "--learning-rate", "1e-3")
    refused = run("finetune.py", *faster)
    assert says_one_line(refused, "learning_rate was 5e-05 and is now 0.001", "--redo to replace LoRA, checkpoint-1")

    edited = tmp_path / "edited.jsonl"
    edited.write_text("".join(json.dumps({"question": q, "answer": f"{a}！"}) + "\n" for q, a in PAIRS[:2]))
    second = run("finetune.py", *faster, "--data", edited, "--output", tmp_path / "the second")
    assert second.returncode == 0, second.stderr
    command = f"next:    python merge.py --lora '{tmp_path}/the second/LoRA' --output '{tmp_path}/the second/sft_model'"
    assert second.stdout.splitlines()[-1] == f"{command} --results {results}"
    assert {path.name for path in (tmp_path / "the second").iterdir()} == {
        *(".lock", "run.json", "ckpts", "LoRA", "log.json", "loss.png")
    }
    assert (results / "LoRA" / "adapter_model.safetensors").read_bytes() == weights

    again = run("finetune.py", *faster, "--redo")
    assert again.returncode == 0 and "trained:" in again.stdout and "from checkpoint-" not in again.stdout, again.stderr
    assert (results / "LoRA" / "adapter_model.safetensors").read_bytes() != weights


def test_data_of_a_step_3_that_was_stopped_is_not_trained_on(base: Path, tmp_path: Path):
    results = write_pairs(tmp_path / "r", PAIRS[:2])
    record = {"step 3": {"made_with": {}, "finished": None, "outdated": False}}
    (results / "run.json").write_text(json.dumps(record))
    assert says_one_line(run("finetune.py", "--results", results, "--model", base), "step 3", "has not finished")
