"""serve.py: what it starts, that it ends with everything it started, and what it says when the server dies."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, free_port, says_one_line
from hypothesis import given
from hypothesis import strategies as st
from standins import Mark, fake_gpus, fake_vllm, wait_for, with_path

from augcon.errors import UserError
from augcon.machine.gpus import require_gpu_numbers, visible_gpus
from augcon.machine.server import Server, port_of
from augcon.machine.vllm import attention_heads, gpus_per_copy

SERVE = [sys.executable, str(ROOT / "serve.py")]
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
address = os.environ["AUGCON_API_BASE"]
assert b"augcon-demo" in urllib.request.urlopen(address + "/models").read() and not os.environ["AUGCON_API_MODEL"]
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


def test_addresses_that_cannot_be_served():
    for address in ("https://127.0.0.1:8000/v1", "http://example.org/v1", "http://0.0.0.0:8000/v1"):
        with pytest.raises(UserError, match="on this machine only"):
            port_of(address)
    with pytest.raises(UserError, match="cannot listen"):
        port_of("http://127.0.0.1:99999/v1")
    free = free_port()
    assert port_of(f"http://localhost:{free}/v1/") == free


def test_vllm_over_the_gpus_that_may_be_used_and_their_memory_afterwards(tmp_path: Path, mark: Mark):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 28, "num_key_value_heads": 4}))
    mark.environment |= {"PATH": with_path(fake_gpus(tmp_path, 8)), "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,6"}
    mark.environment["PYTHONPATH"] = f"{fake_vllm(tmp_path)}:{ROOT}"
    flags = ["--model", tmp_path, "--results", tmp_path / "r", "--serve-arguments", "--dtype 'a b'"]
    done = ended(serve(mark, *flags, "--", "true"))
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    given = dict(itertools.pairwise(arguments))
    assert given["--model"] == given["--served-model-name"] == str(tmp_path)
    assert given["--tensor-parallel-size"] == "2" and given["--data-parallel-size"] == "3"
    assert given["--dtype"] == "a b" and given["--host"] == "127.0.0.1"
    assert given["--generation-config"] == "vllm"  # no sampling but AugCon's
    assert len((tmp_path / "questions").read_text()) == 4  # until the memory is free, and no longer
    refused = ended(serve(mark, *flags, "--tensor-parallel", 3, "--", "true"))
    assert says_one_line(refused, "28 attention heads", "1, 2, 4") and "server.log" not in refused.stdout


def test_vllm_that_cannot_start_tells_the_first_fault_of_its_log(tmp_path: Path, mark: Mark):
    mark.environment["PYTHONPATH"] = f"{fake_vllm(tmp_path)}:{ROOT}"
    (tmp_path / "error").write_text("CUDA out of memory")
    done = ended(serve(mark, "--model", "m", "--no-demo", "--results", tmp_path / "r", "--", "touch", tmp_path / "ran"))
    assert (
        says_one_line(done, "RuntimeError: CUDA out of memory", "server.log") and "loading the weights" in done.stderr
    )
    assert not (tmp_path / "ran").exists()


def test_a_warning_is_not_the_reason_why_a_server_ended(tmp_path: Path):
    said = "(APIServer pid=7) WARNING 11-24 [utils.py:255] a low limit can cause `OSError: too many`\nValueError: bad"
    server = Server(["echo", said], free_port(), tmp_path / "server.log")
    with pytest.raises(UserError, match="status 0: ValueError: bad; see its log"):
        server.wait_until_ready()


def test_commands_that_are_none(tmp_path: Path, mark: Mark):
    flags = ["--demo", "--results", tmp_path / "r"]
    assert says_one_line(ended(serve(mark, *flags, "--")), "no command after --")
    assert says_one_line(ended(serve(mark, *flags, "--", "no-such-command")), "no-such-command")
    assert not mark.alive()


@pytest.mark.parametrize(
    ("gpus", "heads", "kv_heads", "size"),
    [
        (1, 40, 8, 1),
        (8, 40, 8, 8),  # Qwen1.5-32B
        (8, 28, 4, 4),  # Qwen2.5-7B
        (6, 40, 8, 2),
        (5, 40, 8, 1),  # 5 divides the heads, but not the key-value heads
        (7, 64, 8, 1),
        (16, 64, 8, 16),  # two copies of the keys and values
    ],
)
def test_how_many_gpus_share_one_copy_of_a_model(gpus: int, heads: int, kv_heads: int, size: int):
    assert gpus_per_copy(gpus, heads, kv_heads) == size


def test_a_number_of_gpus_of_ones_own():
    assert gpus_per_copy(8, 40, 8, wanted=2) == 2
    assert gpus_per_copy(3, 40, 8, wanted=2) == 2
    for wanted, reason in ((3, "40 attention heads"), (5, "8 key-value heads"), (16, "8 GPUs")):
        with pytest.raises(UserError, match=reason):
            gpus_per_copy(8, 40, 8, wanted=wanted)


@given(st.integers(1, 32), st.integers(1, 16), st.integers(1, 8))
def test_every_model_can_be_served_on_all_gpus(gpus: int, kv_heads: int, groups: int):
    size = gpus_per_copy(gpus, kv_heads * groups, kv_heads)
    assert gpus % size == 0 and (kv_heads * groups) % size == 0


def test_the_heads_of_a_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 32}}))
    assert attention_heads(str(tmp_path)) == (32, 32)
    with pytest.raises(UserError, match="no-such-folder"):
        attention_heads(str(tmp_path / "no-such-folder"))


def test_the_gpus_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", with_path(fake_gpus(tmp_path, 3)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(visible_gpus()) == 3
    for chosen, count in {"": 0, "1": 1, "2,0": 2, "GPU-stand-in-1": 1, "0,9,1": 1, "-1": 0}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert len(visible_gpus()) == count, chosen
    for chosen in ("", "1", "2,0", "0, 1", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        require_gpu_numbers()
    for chosen, numbers in {"GPU-stand-in-2,GPU-stand-in-0": "2,0", "MIG-1": "0,1", "1,GPU-stand-in-0": "1,0"}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(UserError, match=f"such as {numbers}$"):
            require_gpu_numbers()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # a driver that does not answer
    assert visible_gpus() == []
