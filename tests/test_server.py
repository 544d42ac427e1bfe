"""serve.py: what it starts, that it ends with everything it started, and what it says when the server dies."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, free_port, says_one_line
from standins import Mark, fake_gpus, fake_model, fake_vllm, wait_for, with_path

from augcon.errors import UserError
from augcon.machine import server
from augcon.machine.server import Server, port_of

SERVE = [sys.executable, str(ROOT / "serve.py")]
QWEN_7B = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}
QWEN_72B = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
# A command that notes the server's address and goes on; a child of it leaves its group, and may heed no SIGTERM.
LASTING = """
import os, pathlib, subprocess, sys, time
if len(sys.argv) == 2:
    if "stubborn" in sys.argv[1]:
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(sys.argv[1] + ".child").write_text("there")
else:
    subprocess.Popen([sys.executable, __file__, sys.argv[1]], start_new_session=True)
    while not pathlib.Path(sys.argv[1] + ".child").exists():
        time.sleep(0.05)
    pathlib.Path(sys.argv[1]).write_text(os.environ["AUGCON_API_BASE"])
time.sleep(300)
"""


def serve(mark: Mark, *arguments: object) -> "subprocess.Popen[str]":
    command = [*SERVE, *map(str, arguments)]
    return subprocess.Popen(
        command, env=mark.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def ended(process: "subprocess.Popen[str]", timeout: float = 60) -> "subprocess.CompletedProcess[str]":
    output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def lasting(folder: Path, noted_as: str = "noted") -> tuple[list[str], Path]:
    """A command that lasts, and the file in which it notes the server's address."""
    (folder / "lasting.py").write_text(LASTING)
    noted = folder / noted_as
    return [sys.executable, str(folder / "lasting.py"), str(noted), "parent"], noted


def healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address.removesuffix('/v1')}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def test_a_command_has_a_server_while_it_runs_and_its_status_counts(tmp_path: Path, mark: Mark):
    mark.environment["AUGCON_API_MODEL"] = "a name for another server"
    check = f"""
import os, pathlib, urllib.request
address, headers = os.environ["AUGCON_API_BASE"], {{"Authorization": "Bearer " + os.environ["AUGCON_API_KEY"]}}
models = urllib.request.urlopen(urllib.request.Request(address + "/models", headers=headers)).read()
assert b"augcon-demo" in models and not os.environ["AUGCON_API_MODEL"]
pathlib.Path({str(tmp_path / "noted")!r}).write_text(address)
"""
    flags = ["--demo", "--results", tmp_path / "a folder"]
    for status in (0, 7):
        done = ended(serve(mark, *flags, "--", sys.executable, "-c", f"{check}exit({status})"))
        assert done.returncode == status, done.stderr
        assert not mark.alive() and not healthy((tmp_path / "noted").read_text())
    log = (tmp_path / "a folder" / "server.log").read_text().splitlines()
    assert sum(line.startswith("=== ") and "augcon.demo.engine" in line for line in log) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_command_and_server(tmp_path: Path, mark: Mark, number: signal.Signals):
    command, noted = lasting(tmp_path)
    process = serve(mark, "--demo", "--results", tmp_path / "r", "--", *command)
    address = wait_for(noted)
    assert healthy(address) and len(mark.alive()) == 4
    process.send_signal(number)
    done = ended(process)
    assert done.returncode == 128 + number and "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not mark.alive() and not healthy(address)


@pytest.mark.slow
def test_the_shell_that_waits_is_killed(tmp_path: Path, mark: Mark):
    command, noted = lasting(tmp_path, "stubborn")
    shell = ["bash", "-c", '"$@"; true', "bash", *SERVE, "--demo", "--results", str(tmp_path / "r"), "--", *command]
    process = subprocess.Popen(shell, env=mark.environment, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(noted)
    process.kill()
    process.wait()
    assert mark.all_end(40)


def test_a_server_that_dies_stops_the_command_and_tells(tmp_path: Path, mark: Mark):
    command, noted = lasting(tmp_path)
    process = serve(mark, "--demo", "--results", tmp_path / "r", "--", *command)
    wait_for(noted)
    os.kill(mark.pid("augcon.demo.engine"), signal.SIGKILL)
    done = ended(process)
    assert says_one_line(done, "the server has ended with status -9", "server.log")
    assert "  | " in done.stderr and "NOT a language model" in done.stderr  # the end of the log
    assert not mark.alive()


def test_in_the_foreground_at_the_address_of_the_settings(tmp_path: Path, mark: Mark):
    port = free_port()
    flags = ["--demo", "--results", tmp_path / "r", "--api-base", f"http://127.0.0.1:{port}/v1"]
    process = serve(mark, *flags)
    end = time.monotonic() + 30
    while not healthy(f"http://127.0.0.1:{port}"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert says_one_line(ended(serve(mark, *flags)), str(port), "--api-base")  # the port is taken
    process.send_signal(signal.SIGINT)
    assert ended(process).returncode == 130
    assert not mark.alive()


def test_the_server_ends_with_a_serve_py_that_is_killed(tmp_path: Path, mark: Mark):
    command, noted = lasting(tmp_path)
    process = serve(mark, "--demo", "--results", tmp_path / "r", "--", *command[:-1])
    wait_for(Path(f"{noted}.child"))
    process.kill()
    assert ended(process).returncode == -signal.SIGKILL
    assert mark.all_end()


def test_a_port_that_is_chosen_is_given_to_no_connection_before_a_server_listens_there():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(server.free_port() < first for _ in range(20)) or first < 32_768


def test_addresses_that_cannot_be_served():
    for address in ("https://127.0.0.1:8000/v1", "http://example.org/v1", "http://0.0.0.0:8000/v1"):
        with pytest.raises(UserError, match="on this machine only"):
            port_of(address)
    with pytest.raises(UserError, match="cannot listen"):
        port_of("http://127.0.0.1:99999/v1")
    free = free_port()
    assert port_of(f"http://localhost:{free}/v1/") == free


def test_vllm_over_the_gpus_that_may_be_used_and_their_memory_afterwards(tmp_path: Path, mark: Mark):
    model = fake_model(tmp_path / "model", 145_412_407_296, **QWEN_72B)
    mark.environment |= {"PATH": with_path(fake_gpus(tmp_path, 8)), "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,6"}
    mark.environment["PYTHONPATH"] = f"{fake_vllm(tmp_path)}:{ROOT}"
    flags = ["--model", model, "--results", tmp_path / "r", "--serve-arguments", "--dtype 'a b'"]
    done = ended(serve(mark, *flags, "--", "true"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"starting vLLM with {model}: 1 copy on 4 GPUs; 2 GPUs idle" in done.stdout
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[:4] == ["serve", str(model), "--host", "127.0.0.1"] and given[-4:-2] == ["--dtype", "a b"]
    options = dict(itertools.pairwise(given))
    assert options["--tensor-parallel-size"] == "4" and options["--data-parallel-size"] == "1"
    assert options["--served-model-name"] == str(model) and options["--gpu-memory-utilization"] == "0.92"
    assert options["--generation-config"] == "vllm"  # no sampling but AugCon's
    assert "--enable-prompt-tokens-details" in given  # the share of the prefix cache is told
    assert "VLLM_ENGINE_READY_TIMEOUT_S=7200" in (tmp_path / "environment").read_text().splitlines()
    assert len((tmp_path / "questions").read_text()) == 4  # until the memory is free, and no longer


def test_in_a_dry_run_with_a_command_rules_stand_in_for_the_model(tmp_path: Path, mark: Mark):
    model = fake_model(tmp_path / "model", 15_231_233_024, **QWEN_7B)
    mark.environment["PATH"] = with_path(fake_gpus(tmp_path, 2))
    flags = [
        "--results",
        tmp_path / "r",
        "--dry-run",
        "--corpus",
        ROOT / "qa_examples.jsonl",
        "--text-field",
        "context",
    ]
    trial = [sys.executable, ROOT / "step1_gen_q.py", *flags]
    done = ended(serve(mark, "--model", model, *flags, "--", *trial), 120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"spread: +2 copies on 1 GPU each", done.stdout) and "vllm" in done.stdout
    assert "rules, in its place for the trial" in done.stdout
    foretold = next(line for line in done.stdout.split("\n") if line.startswith("in all:"))
    assert (
        "calls" in foretold and "on disk" in foretold and not foretold.endswith(" s")
    )  # of the rules, the time is none


def test_a_server_that_takes_only_short_prompts_is_pointed_out(tmp_path: Path, mark: Mark):
    model = fake_model(tmp_path / "model", 15_231_233_024, **QWEN_7B)
    mark.environment["PATH"] = with_path(fake_gpus(tmp_path, 1))
    for longest, said in ((8191, "warning: prompt and reply have 8,191 tokens"), (8192, "")):
        mark.environment["PYTHONPATH"] = f"{fake_vllm(tmp_path / str(longest), longest)}:{ROOT}"
        done = ended(serve(mark, "--model", model, "--results", tmp_path / "r", "--", "true"))
        assert done.returncode == 0 and (said in done.stderr if said else done.stderr == ""), done.stderr


def test_vllm_that_cannot_start_tells_the_fault_in_its_log(tmp_path: Path, mark: Mark):
    mark.environment |= {"PYTHONPATH": f"{fake_vllm(tmp_path)}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "error").write_text("CUDA out of memory")
    flags = ["--model", fake_model(tmp_path / "m", 1), "--no-demo", "--results", tmp_path / "r"]
    done = ended(serve(mark, *flags, "--", "touch", tmp_path / "ran"))
    assert says_one_line(done, "RuntimeError: CUDA out of memory", "server.log")
    assert "loading the weights" in done.stderr  # the end of the log
    assert not (tmp_path / "ran").exists()


# As vLLM 0.32 writes them; of the tracebacks, only the last lines.
SURVIVED = "(APIServer pid=7) ERROR 11-24 09:00:00 [utils.py:9] OSError: no connection, trying again"
WARNED = "(APIServer pid=7) WARNING 11-24 09:00:01 [utils.py:255] a low limit can cause `OSError: too many open files`"
ALIVE = "(APIServer pid=7) INFO 11-24 09:00:00 [loggers.py:311] Engine 000: Avg generation throughput: 2000 tokens/s"
WORKER, ENGINE = (
    f"({name} pid={pid}) ERROR 11-24 10:00:0{pid} [{file}]"
    for name, pid, file in (("Worker_TP1", 5, "multiproc_executor.py:953"), ("EngineCore", 6, "core.py:1510"))
)
STARTS = [
    f"{WORKER} WorkerProc failed to start.",
    f"{WORKER} Traceback (most recent call last):",
    f"{WORKER} torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    f"{WORKER} During handling of the above exception, another exception occurred:",
    f"{WORKER} RuntimeError: no memory to warm up with 1024 requests",
    "(Worker_TP0 pid=4) RuntimeError: [gloo] Connection closed by peer",
    f"{ENGINE} EngineCore failed to start.",
    f"{ENGINE} Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause.",
    "(APIServer pid=7) INFO 11-24 10:00:09 [launcher.py:9] an error: shutting down",
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
]
RUNS = [
    f"{ENGINE} EngineCore encountered a fatal error.",
    f"{ENGINE} Traceback (most recent call last):",
    f"{ENGINE} torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    "(APIServer pid=7) ERROR 11-24 10:00:07 [async_llm.py:8] vllm.v1.engine.exceptions.EngineDeadError: EngineCore "
    "encountered an issue. See stack trace (above) for the root cause.",
    "(APIServer pid=7) ERROR 11-24 10:00:08 [serving.py:9] ConnectionError: a request was cut off",
]
CONFIGURED = ["ValidationError: 1 validation error for ModelConfig", "  Value error, the model type `m` is not known"]
POINTER = "RuntimeError: Engine core initialization failed. See root cause above."


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (STARTS, ": RuntimeError: no memory to warm up with 1024 requests"),
        (RUNS, ": AcceleratorError: CUDA error: an illegal memory access was encountered"),
        (CONFIGURED, ": Value error, the model type `m` is not known"),
        (["api_server.py: error: argument --dtype: invalid choice"], ": error: argument --dtype: invalid choice"),
        (["ValueError: no such thing", POINTER], ": ValueError: no such thing"),
        ([POINTER], f": {POINTER} (which is not told; the system may have killed it, out of memory)"),
        (["killed"], ""),
    ],
    ids=["a worker cannot start", "an engine fails", "refused settings", "an argument", "above", "a pointer", "none"],
)
def test_the_reason_why_a_server_ended_is_what_failed_first_of_what_it_did_not_survive(
    tmp_path: Path, log: list[str], reason: str
):
    said = "\n".join([SURVIVED, *60 * [ALIVE], WARNED, *log])
    server = Server(["sh", "-c", f"echo {shlex.quote(said)}; exit 3"], free_port(), tmp_path / "server.log")
    with pytest.raises(UserError) as raised:
        server.wait_until_ready()
    assert str(raised.value) == f"the server has ended with status 3{reason}; see its log, {server.log}"


def test_a_warning_is_no_reason(tmp_path: Path):
    server = Server(["echo", WARNED], free_port(), tmp_path / "server.log")
    with pytest.raises(UserError, match="has ended with status 0; see its log"):
        server.wait_until_ready()


def test_commands_that_are_none(tmp_path: Path, mark: Mark):
    flags = ["--demo", "--results", tmp_path / "r"]
    assert says_one_line(ended(serve(mark, *flags, "--")), "no command after --")
    assert says_one_line(ended(serve(mark, *flags, "--", "no-such-command")), "no-such-command")
    assert not mark.alive()
