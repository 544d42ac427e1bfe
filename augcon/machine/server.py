"""A server process on this machine: its port, its log, and whether it is ready."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from augcon.errors import UserError, one_line
from augcon.machine.processes import start

LOOPBACK = "127.0.0.1"
# Ports that Linux gives to no connection: who listens there may take a minute to start, and none must be sooner.
_QUIET = range(20_000, 32_768)
# A fault, in a line that is neither vLLM's news nor a warning of anyone, which may quote one.
_FAULT = re.compile(r"(?:(?!INFO |WARN|[Ww]arning|\[W\d).)*?\b(\w*(?:[Ee]rror|Exception): .+|Value error, .+)")
# With what each line of vLLM's record begins that tells why one of its processes ended.
_RECORD = re.compile(r"(.* ERROR .*\]) \w+ (?:failed to start|encountered a fatal error)")
# What vLLM says of a process of its own that the kernel has killed.
_KILLED = re.compile(r"exit code:? -9\b|proc\(s\): \{[^}]*: -9\b")
_KILLER = ", killed (signal 9), as by a system that is out of memory"
_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_PROGRESS = re.compile(r"INFO \S+ \S+ \[\S+\]\s*(.+)|(.*\d%.*)")  # a message of vLLM, or a progress bar


def python_module(module: str, port: int, *arguments: str, host: str = LOOPBACK) -> list[str]:
    """The command that serves a Python module. With -P, nothing in the working directory shadows it."""
    return [sys.executable, "-P", "-m", module, *arguments, "--host", host, "--port", str(port)]


def free_port(wanted: int = 0, host: str = LOOPBACK) -> int:
    """A port at which nothing listens. Raises OSError or OverflowError if it cannot be the one wanted."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for port in () if wanted else random.sample(_QUIET, 9):
            with contextlib.suppress(OSError):
                listener.bind((host, port))
                return port
        listener.bind((host, wanted))
        return int(listener.getsockname()[1])


def port_of(api_base: str, host: str = LOOPBACK) -> int:
    """The port in ``api_base``. Raises UserError if no server can be started at that address."""
    address = re.fullmatch(rf"http://(?:127\.0\.0\.1|localhost|{re.escape(host)})(?::(\d+))?/v1/?", api_base)
    if not address:
        raise UserError(f"--api-base {api_base!r}: servers start on this machine only, at http://{host}:PORT/v1")
    try:
        return free_port(int(address[1] or 80), host)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {api_base} ({one_line(error)}); choose another --api-base") from error


def _reason(lines: list[str]) -> str:
    """The fault in a log that ended the server.

    It is the last of the record about the first process that failed, since the others fail because of it, or else the
    last near the end: what came before was survived. A fault that only points at the root cause is not it.
    """
    first = next((line for line in lines if _RECORD.match(line) or _KILLED.search(line)), "")
    if _KILLED.search(first):
        return _KILLER
    record = match[1] if (match := _RECORD.match(first)) else ""
    end = lines if record else lines[-50:]
    faults = [match[1] for line in end if line.startswith(record) and (match := _FAULT.match(line))]
    named = [fault for fault in faults if "root cause" not in fault]
    untold = "" if named else " (which is not told; the system may have killed it, out of memory)"
    return "".join(f": {fault[:300]}{untold}" for fault in (named or faults)[-1:])


class Server:
    """A server process with its own log. Start it inside ``processes.stopping_children``, which stops it."""

    def __init__(self, command: list[str], port: int, log: Path, key: str = "", host: str = LOOPBACK) -> None:
        self.port, self.log, self.key = port, log, key
        self.api_base = f"http://{host}:{port}/v1"
        modules = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}  # or its processes meet on the network
        ours = {"PYTHONPATH": modules, "VLLM_API_KEY": key, "AUGCON_API_KEY": ""}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
                file.flush()
                self._log_start = file.tell()
                self.process = start(command, {**loopback, **os.environ, **ours}, log=file)
        except OSError as error:
            raise UserError(f"cannot write the server's log {log}: {one_line(error)}") from error

    def wait_until_ready(self, patience: float = 1800) -> None:
        """Waits until the server answers; prints every 15 seconds what it is doing.

        Raises as ``check``, and UserError when for ``patience`` seconds it has neither written to its log nor read the
        least of a model: from a slow disk, a large one takes an hour or more.
        """
        started = told = alive = time.monotonic()
        progress = self._progress()
        while True:
            self.check()
            with (
                contextlib.suppress(OSError),
                _without_proxy.open(self.api_base.removesuffix("v1") + "health", timeout=5),
            ):
                if self._listens():  # and not another program that came to the port first
                    return
            now = time.monotonic()
            if now - told >= min(15, patience / 2):
                before, progress = progress, self._progress()
                told, alive = now, alive if progress == before else now
                lines = self._log_lines()
                if now - alive >= patience:
                    last = lines[-1][:200] if lines else "nothing"
                    raise UserError(
                        f"the server has not become ready, and has done nothing for {(now - alive) / 60:.0f} minutes; "
                        f"the last line of its log, {self.log}: {last}"
                    )
                messages = [match[1] or match[2] for line in lines if (match := _PROGRESS.search(line))]
                print(f"server:  {now - started:.0f} s: {messages[-1][:140] if messages else ''}", flush=True)
            time.sleep(0.2)

    def longest_request(self) -> int:
        """Tokens of the longest prompt and reply, as vLLM tells them; 0 where the server does not."""
        models = urllib.request.Request(f"{self.api_base}/models", headers={"Authorization": f"Bearer {self.key}"})
        with (
            contextlib.suppress(OSError, ValueError, LookupError),
            _without_proxy.open(models, timeout=30) as reply,
        ):
            return int(json.load(reply)["data"][0]["max_model_len"])
        return 0

    def check(self) -> None:
        """If the server has ended, prints the end of its log and raises UserError."""
        status = self.process.poll()
        if status is None:
            return
        lines = self._log_lines()
        print(*(f"  | {line[:200]}" for line in lines[-8:]), sep="\n", file=sys.stderr)
        reason = _KILLER if status == -signal.SIGKILL else _reason(lines)
        raise UserError(f"the server has ended with status {status}{reason}; see its log, {self.log}")

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def _progress(self) -> tuple[int, int]:
        """What changes while a server starts: the size of its log, and the MiB that its processes have read."""
        read = 0
        with contextlib.suppress(psutil.Error):
            for process in self._processes():
                figures = process.io_counters()
                read += figures.read_chars + figures.read_bytes
        return self.log.stat().st_size, read >> 20

    def _listens(self) -> bool:
        """Whether it is one of the server's processes that listens at its port."""
        with contextlib.suppress(psutil.Error):
            sockets = (one for process in self._processes() for one in process.net_connections("tcp"))
            return any(one.status == psutil.CONN_LISTEN and one.laddr.port == self.port for one in sockets)
        return False

    def _log_lines(self) -> list[str]:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._log_start)
            return [line.rstrip() for line in file if line.strip()]
