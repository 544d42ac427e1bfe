"""A server of the model on loopback: vLLM over all GPUs, or the demonstration engine."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_download

from augcon.errors import UserError, one_line
from augcon.machine.processes import start

_HOME = Path(__file__).parent.parent.parent
_MODULE = (sys.executable, "-P", "-m")  # -P: the working directory is the user's, and no place for modules
_FAULT = re.compile(r"\b(\w*(?:[Ee]rror|Exception): .+)")
_MESSAGE = re.compile(r"INFO \S+ \S+ \[\S+\]\s*(.+)|(.*\d%.*)")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """``tensor`` GPUs share one copy of the model; there are ``data`` copies."""

    tensor: int
    data: int


def parallel(gpus: int, heads: int, kv_heads: int, wanted: int = 0) -> Parallel:
    """How to spread a model over GPUs: the largest size that divides them and the model's attention heads.

    Raises UserError for a size (``wanted``) that the GPUs or the model do not allow.
    """

    def allowed(size: int) -> bool:
        return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    if wanted > gpus:
        raise UserError(f"--tensor-parallel {wanted}, but there are {gpus} GPUs")
    if wanted and not allowed(wanted):
        possible = ", ".join(str(size) for size in range(1, gpus + 1) if allowed(size))
        raise UserError(
            f"--tensor-parallel {wanted} does not divide the model's {heads} attention heads "
            f"({kv_heads} of keys and values); with {gpus} GPUs these do: {possible}"
        )
    size = wanted or max(size for size in range(1, gpus + 1) if gpus % size == 0 and allowed(size))
    return Parallel(size, gpus // size)


def attention_heads(model: str) -> tuple[int, int]:
    """A model's attention heads, and those of its keys and values. Raises UserError when they cannot be had."""
    try:
        file = Path(model, "config.json") if Path(model).is_dir() else Path(hf_hub_download(model, "config.json"))
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        heads = config.get("num_attention_heads") or config["n_head"]
        return heads, config.get("num_key_value_heads") or heads
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the model {model!r} tells no number of attention heads: {one_line(error)}") from error


def vllm_command(model: str, name: str, port: int, spread: Parallel | None, further: str) -> list[str]:
    """The command that serves ``model`` as ``name``; without ``spread`` for vLLM's CPU build."""
    command = [*_MODULE, "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "auto"]  # the model's own, or what the memory allows
    command += ["--disable-uvicorn-access-log"]  # one line a request else
    if spread is None:
        # The CPU build ends on a seeded request whose prompt is read in chunks: read it whole.
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    else:
        command += ["--tensor-parallel-size", str(spread.tensor), "--data-parallel-size", str(spread.data)]
    return command + shlex.split(further)


def demo_command(port: int) -> list[str]:
    """The command that serves the demonstration engine."""
    return [*_MODULE, "augcon.demo.engine", "--host", "127.0.0.1", "--port", str(port)]


def require_vllm() -> None:
    """Raises UserError where vLLM is not installed."""
    if not importlib.util.find_spec("vllm"):
        raise UserError(
            "vLLM is not installed; with NVIDIA GPUs `bash install.sh` installs it, without them "
            "`bash install.sh --tests` a third party's build for the CPU; or let --demo stand in"
        )


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def port_of(api_base: str) -> int:
    """The port that ``api_base`` names. Raises UserError where AugCon cannot serve at that address."""
    parts = urlsplit(api_base)
    if parts.scheme != "http" or parts.hostname not in {"127.0.0.1", "localhost"} or parts.path.rstrip("/") != "/v1":
        raise UserError(
            f"--api-base {api_base!r}: a server is started on this machine only, at http://127.0.0.1:PORT/v1"
        )
    try:
        port = parts.port or 80
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", port))
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"the port of {api_base} cannot be had ({one_line(error)}); stop what listens there, or name another "
            "with --api-base"
        ) from error
    return port


class Server:
    """A server process with a log of its own; to be used inside ``processes.in_charge``, which ends it."""

    def __init__(self, command: list[str], port: int, log: Path, environment: dict[str, str]) -> None:
        self.port = port
        self.log = log
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
                file.flush()
                self._begin = file.tell()
                places = os.pathsep.join(filter(None, [str(_HOME), os.environ.get("PYTHONPATH")]))
                environment = {**os.environ, **environment, "PYTHONPATH": places}
                self.process = start(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        except OSError as error:
            raise UserError(f"the server's log {log} cannot be written: {one_line(error)}") from error

    @property
    def api_base(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def wait_until_ready(self) -> Iterator[float]:
        """Seconds waited, now and then, until the server answers. Raises UserError when it ends before."""
        started = time.monotonic()
        while not self._answers():
            self.check()
            yield time.monotonic() - started
            time.sleep(0.2)
        self.check()  # else it is another that answers

    def check(self) -> None:
        """Raises UserError, after the last lines of the log, when the server has ended."""
        status = self.process.poll()
        if status is None:
            return
        said = self.said()
        for line in said[-8:]:
            print(f"  | {line[:200]}", file=sys.stderr)
        fault = next((f": {found[1][:300]}" for line in said if (found := _FAULT.search(line))), "")
        raise UserError(f"the server has ended (status {status}){fault}; its log is {self.log}")

    def said(self) -> list[str]:
        """The lines that this server has logged."""
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._begin)
            return [line.rstrip() for line in file if line.strip()]

    def last_word(self) -> str:
        """What the server says it is at: the last message of vLLM, or the last progress bar."""
        words = [found[1] or found[2] for line in self.said() if (found := _MESSAGE.search(line))]
        return words[-1][:140] if words else ""

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), direct.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
            return True
        return False
