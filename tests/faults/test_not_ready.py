"""A server of ours that does not come up, comes up late, or goes: one line that tells why, and no wait for ever."""

import contextlib
import http.server
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from standins import Mark

from augcon.errors import UserError
from augcon.machine.server import Server, python_module

SERVES = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
BAR = "Loading safetensors checkpoint shards:  40% Completed | 2/5 [00:09<00:14,  4.71s/it]"


def python(code: str, port: int = 0) -> list[str]:
    return [sys.executable, "-c", code.format(port=port)]


@contextlib.contextmanager
def starting(command: list[str], port: int, log: Path, key: str = "") -> Iterator[Server]:
    """A server of which nothing is left afterwards; what other tests have started, such as the engine, goes on."""
    server = Server(command, port, log, key)
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def why(log: str, folder: Path, end: str = "exit 1") -> str:
    """Why a server that writes this into its log does not become ready."""
    server = Server(["sh", "-c", f"echo {shlex.quote(log)}; {end}"], free_port(), folder / "server.log")
    with pytest.raises(UserError) as raised:
        server.wait_until_ready()
    return (
        str(raised.value).removeprefix("the server has ended with status ").removesuffix(f"; see its log, {server.log}")
    )


def test_a_server_that_does_nothing_any_more_is_given_up_with_the_last_line_of_its_log(tmp_path: Path):
    command = ["sh", "-c", f"echo {BAR!r}; sleep 300"]
    with starting(command, free_port(), tmp_path / "log") as server, pytest.raises(UserError) as raised:
        server.wait_until_ready(patience=1)
    assert "has done nothing for" in str(raised.value) and str(raised.value).endswith(f"{tmp_path / 'log'}: {BAR}")
    assert "\n" not in str(raised.value)


def test_a_server_that_accepts_and_never_answers_is_given_up(tmp_path: Path):
    port = free_port()
    code = (
        "import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True); time.sleep(99)"
    )
    given_up = pytest.raises(UserError, match=r"has done nothing for .*log: up")
    with starting(python(code, port), port, tmp_path / "log") as server, given_up:
        server.wait_until_ready(patience=1)


@pytest.mark.parametrize(
    "work",
    [
        f"print({BAR!r}, flush=True); time.sleep(0.4)",
        "open('/dev/zero', 'rb').read(2**22); time.sleep(0.4)",  # silent, and reading weights from a slow disk
        "subprocess.run(['head', '-c4M'], stdin=open('/dev/zero'), stdout=subprocess.DEVNULL); time.sleep(0.4)",
    ],
    ids=["log", "reads", "a child reads"],
)
def test_a_slow_start_is_waited_for_as_long_as_something_goes_on(
    work: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    port = free_port()
    loads = f"import subprocess, sys, time\nend = time.monotonic() + 5\nwhile time.monotonic() < end:\n    {work}\n"
    with starting(python(loads + SERVES, port), port, tmp_path / "log") as server:
        server.wait_until_ready(patience=2.5)
    said = capsys.readouterr().out
    assert said.count("server: ") >= 3 and ("40% Completed" in said) == ("Loading" in work)


# As vLLM 0.32, PyTorch and Python write them.
API, ENGINE = (
    "(APIServer pid=7) ERROR 11-24 10:06:09 [utils.py:9]",
    "(EngineCore pid=6) ERROR 11-24 10:06:00 [core.py:1510]",
)
WARNINGS = [
    "(APIServer pid=7) WARNING 11-24 10:00:01 [utils.py:255] failed with error: OSError: too many open files",
    "WARNING 11-24 10:00:01 [interface.py:9] Failed to import from vllm._C with ImportError: libcudart.so.13",
    "[W1124 10:00:02.874020297 utils.cpp:68] Warning: NUMA: RuntimeError: cannot bind (function operator())",
    "/x/torch/cuda/__init__.py:180: UserWarning: CUDA initialization: RuntimeError: no driver",
    "  warnings.warn('ValueError: a deprecated value')",
    "WARNING:root:Could not fetch: ConnectionError: no network",
    "(APIServer pid=7) INFO 11-24 10:00:03 [launcher.py:9] retried after KeyError: 'x'",
]
POINTER = (
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
)
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
CACHE = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
ALLOCATOR = "RuntimeError: [enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried"
KILLED = ", killed (signal 9), as by a system that is out of memory"


def failing(fault: str) -> list[str]:
    """How the engine's end at the start looks in the log."""
    told = [
        f"{ENGINE} EngineCore failed to start.",
        f"{ENGINE} Traceback (most recent call last):",
        f"{ENGINE} {fault}",
    ]
    raw = ["(EngineCore pid=6) Process EngineCore:", f"(EngineCore pid=6) {fault.removeprefix('torch.')}"]
    return [*told, *raw, "(APIServer pid=7) Traceback (most recent call last):", POINTER + "{}"]


@pytest.mark.parametrize("fault", [MEMORY, CACHE, ALLOCATOR], ids=["on the GPU", "for the cache", "on the CPU"])
def test_out_of_memory_at_the_start_is_the_reason_and_no_warning_before_or_after_is(fault: str, tmp_path: Path):
    log = "\n".join([*WARNINGS, *failing(fault), *WARNINGS])
    assert why(log, tmp_path) == f"1: {fault.removeprefix('torch.')}"


@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_that_quotes_an_error_is_no_reason(warning: str, tmp_path: Path):
    assert why(f"{warning}\n(APIServer pid=7) KeyboardInterrupt: terminated", tmp_path) == "1"


@pytest.mark.parametrize(
    ("log", "end"),
    [
        ([], "kill -9 $$"),
        ([f"{POINTER}{{'EngineCore': -9}}"], "exit 1"),
        (
            [
                "(EngineCore pid=6) ERROR 11-24 10:06:00 [multiproc_executor.py:316] Worker proc VllmWorker-0 died "
                "unexpectedly (exit code: -9), shutting down executor.",
                f"{ENGINE} EngineCore encountered a fatal error.",
                f"{ENGINE} RuntimeError: Executor failed.",
                f"{API} vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
            ],
            "exit 1",
        ),
    ],
    ids=["the server", "its engine", "a worker"],
)
def test_a_kill_by_the_kernel_which_leaves_no_log_is_said(log: list[str], end: str, tmp_path: Path):
    said = why("\n".join([*WARNINGS, *log]), tmp_path, end)
    assert said == f"{-9 if end.startswith('kill') else 1}{KILLED}"


def test_a_port_that_another_took_meanwhile_is_neither_ready_nor_given_the_key(tmp_path: Path):
    asked = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        command = python_module("augcon.demo.engine", other.server_port)
        refused = pytest.raises(UserError, match=r"status 1: error: cannot listen there.*in use")
        with starting(command, other.server_port, tmp_path / "log", "the key") as server, refused:
            server.wait_until_ready()
        other.shutdown()
    assert asked and set(asked) == {("/health", None)}


def test_a_server_that_is_killed_in_mid_run_ends_the_step_in_one_line_and_no_wait(tmp_path: Path, mark: Mark):
    text = "The bread rises for two hours before it is baked in the oven of the old mill by the river. "
    (tmp_path / "a.txt").write_text("".join(f"{number}. {text}" for number in range(600)))
    flags = ["--corpus", tmp_path / "a.txt", "--results", tmp_path / "r"]
    step = [sys.executable, ROOT / "step1_gen_q.py", *flags]
    command = [sys.executable, ROOT / "serve.py", "--demo", *flags, "--", *step]
    process = subprocess.Popen(
        list(map(str, command)), env=mark.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "r" / "replies.sqlite").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(mark.pid("augcon.demo.engine"), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)  # and not the 600 seconds of --server-wait
    assert process.returncode == 1 and errors.splitlines()[-1].startswith("error: the server has ended with status -9")
    assert KILLED in errors and "Traceback" not in errors and not mark.alive()
