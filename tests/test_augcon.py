"""The whole command, `bash augcon.sh`, as a process."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, demo_engine, says_one_line
from standins import Mark, wait_for

AUGCON = ["bash", str(ROOT / "augcon.sh")]
FEW = ["--negatives", 60]  # pairs for the scorer, so that it learns in seconds
NOTHING_TO_DO = "The SFT data is in "


def start(mark: Mark, folder: Path, *flags: object, output: Path | int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """The command in a working directory of its own, its errors in the same stream as its output."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(output.open("w")) if isinstance(output, Path) else output
        return subprocess.Popen(
            [*AUGCON, *map(str, flags)],
            cwd=folder,
            env=mark.environment,
            text=True,
            stdout=stream,
            stderr=subprocess.STDOUT if isinstance(output, Path) else subprocess.PIPE,
            start_new_session=True,
        )


def run(mark: Mark, folder: Path, *flags: object) -> "subprocess.CompletedProcess[str]":
    process = start(mark, folder, *flags)
    output, errors = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def calls_kept(results: Path) -> int:
    with contextlib.closing(sqlite3.connect(results / "replies.sqlite")) as store:
        return store.execute("SELECT count(*) FROM replies").fetchone()[0]


def made(results: Path) -> dict[str, float]:
    """When each file under results was written, but for the lock, which says who has it."""
    return {str(path): path.stat().st_mtime for path in results.rglob("*") if path.is_file() and path.name != ".lock"}


def data(results: Path) -> list[dict[str, str]]:
    return datasets.load_from_disk(results / "sft_data").to_list()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Chinese articles of the bundled corpus, in a folder whose name has a blank."""
    path = tmp_path_factory.mktemp("a corpus") / "two.jsonl"
    articles = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:3:2]
    path.write_text("".join(json.dumps({"article": article}) + "\n" for article in articles))
    return path


@pytest.fixture(scope="module")
def small(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of a run on that corpus, and what it said."""
    folder, mark = tmp_path_factory.mktemp("small run"), Mark()
    done = run(mark, folder, "--corpus", corpus, "--results", "my results", *FEW, "--api-key", "sk-on-no-line")
    left = mark.alive()
    mark.end()
    assert done.returncode == 0 and not left, done.stderr
    assert "sk-on-no-line" not in done.stdout + done.stderr
    return folder / "my results", done.stdout


@pytest.mark.slow
def test_a_second_run_does_nothing(small: tuple[Path, str], corpus: Path, mark: Mark):
    assert "DEMONSTRATION" in small[1] and "not from an LLM" in small[1]
    before, calls = made(small[0]), calls_kept(small[0])
    again = run(mark, small[0].parent, "--corpus", corpus, "--results", small[0].name, *FEW)
    assert again.returncode == 0, again.stderr
    assert "== Step" not in again.stdout and NOTHING_TO_DO in again.stdout
    assert made(small[0]) == before and calls_kept(small[0]) == calls


@pytest.mark.slow
def test_killed_in_every_step_with_a_given_server(corpus: Path, small: tuple[Path, str], tmp_path: Path, mark: Mark):
    engine = demo_engine(latency=0.1)
    flags = ["--corpus", corpus, "--results", "r", *FEW, "--api-base", engine.api, "--max-in-flight", 8]
    asked = 0
    for step, sign, kill in (
        ("== Step 1", "trees", lambda process, mark: process.kill()),
        ("== Step 2", "learns from", lambda process, mark: os.killpg(process.pid, signal.SIGINT)),  # as Ctrl-C does
        ("== Step 3", "queries:", lambda process, mark: os.kill(mark.pid("step3_gen_a.py"), signal.SIGKILL)),
    ):
        said = tmp_path / "said"
        process = start(mark, tmp_path, *flags, output=said)
        while step not in wait_for(said) or sign not in said.read_text().partition(step)[2]:
            assert process.poll() is None, said.read_text()
            time.sleep(0.05)
        time.sleep(1)
        kill(process, mark)
        assert process.wait(60) != 0
        assert mark.all_end(40), mark.alive()
        asked = max(asked, calls_kept(tmp_path / "r"))
    done = run(mark, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert "== Step 3" in done.stdout and "== Step 2" not in done.stdout
    assert "DEMONSTRATION" not in done.stdout and "scorer" in done.stderr  # no GPU: a warning
    # Replayed, not asked again: but for those under way at the two kills.
    requests = engine.metric("vllm:request_success_total")
    assert asked < calls_kept(tmp_path / "r") <= requests <= calls_kept(tmp_path / "r") + 2 * 8
    assert data(tmp_path / "r") == data(small[0])
    assert not mark.alive() and engine.process.poll() is None
    engine.stop()


@pytest.mark.slow
def test_a_step_whose_file_is_gone_is_run_again_alone(small: tuple[Path, str], corpus: Path, mark: Mark):
    results, pairs, calls = small[0], data(small[0]), calls_kept(small[0])
    shutil.rmtree(results / "sft_data")
    done = run(mark, results.parent, "--corpus", corpus, "--results", results.name, *FEW)
    assert done.returncode == 0, done.stderr
    assert "== Step 3" in done.stdout and done.stdout.count("== Step") == 1
    assert calls_kept(results) <= calls + 1, "what the server takes, which is at another port now, is kept too"
    assert data(results) == pairs


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_all_steps_with_a_real_vllm(tmp_path: Path, mark: Mark):
    """A model of random weights that ends often: its noise passes for questions, grades and answers."""
    from augcon.demo.tiny_model import make_tiny_model

    model = tmp_path / "tiny"
    make_tiny_model(model, datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], *range(600, 1000)]
    (model / "generation_config.json").write_text(json.dumps(generation))
    texts = [
        "社区食堂在午间十二点开门，二十个座位常常坐满。老人刷卡，一荤两素八元钱。厨师说，菜价每周一调整。",
        "街口的修鞋摊摆了二十年。摊主说，换一次鞋跟十五元，等上半小时就能取走。",
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"article": text}) + "\n" for text in texts))
    flags = ["--no-demo", "--model", model, "--corpus", "c.jsonl", "--structured-output", "--max-length", 40]
    flags += ["--max-passes", 2, "--negatives", 20, "--examples-shown", 2, "--candidates", 2, "--max-refills", 0]
    done = run(mark, tmp_path, *flags, "--answer-max-tokens", 200, "--scorer-epochs", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"starting vLLM with {model} on the CPU") == 2 and "DEMONSTRATION" not in done.stdout
    assert data(tmp_path / "results")
    assert not mark.alive()


def test_what_cannot_be_is_one_line(tmp_path: Path, mark: Mark):
    assert says_one_line(run(mark, tmp_path, "--corpsu", "x"), "--corpus")
    refused = run(mark, tmp_path, "--corpus", "no such file.jsonl")
    assert says_one_line(refused, "no such file.jsonl") and "== Step" not in refused.stdout
    assert not mark.alive()


def test_help_tells_the_settings(tmp_path: Path, mark: Mark):
    done = run(mark, tmp_path, "--max-length", 300, "--help")
    assert done.returncode == 0 and not done.stderr
    assert "AUGCON_API_BASE" in done.stdout and "--max-refills" in done.stdout and "Ctrl-C" not in done.stdout
