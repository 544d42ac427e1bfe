"""A server process on this machine: its port, its log, and whether it is ready."""

import contextlib
import dataclasses
import os
import re
import shlex
import socket
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from augcon.errors import UserError, one_line
from augcon.machine.processes import start

_HOME = Path(__file__).parent.parent.parent
_ERROR = re.compile(r"\b(\w*(?:[Ee]rror|Exception): .+)")
_PROGRESS = re.compile(r"INFO \S+ \S+ \[\S+\]\s*(.+)|(.*\d%.*)")  # a message of vLLM, or a progress bar


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """What a server runs: the command line, what to call it, and environment variables to add."""

    command: list[str]
    description: str
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def python_module(module: str, port: int) -> list[str]:
    """The command line of a Python module that serves on loopback."""
    # -P: nothing in the user's working directory shadows a module
    return [sys.executable, "-P", "-m", module, "--host", "127.0.0.1", "--port", str(port)]


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def port_of(api_base: str) -> int:
    """The port in ``api_base``. Raises UserError if no server can be started at that address."""
    parts = urlsplit(api_base)
    if parts.scheme != "http" or parts.hostname not in {"127.0.0.1", "localhost"} or parts.path.rstrip("/") != "/v1":
        raise UserError(
            f"--api-base {api_base!r}: a server can be started on this machine only, at http://127.0.0.1:PORT/v1"
        )
    try:
        port = parts.port or 80
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"cannot listen at {api_base} ({one_line(error)}); stop what listens there, or choose another port with "
            "--api-base"
        ) from error
    return port


class Server:
    """A server process with its own log. Start it inside ``processes.stopping_children``, which stops it."""

    def __init__(self, program: Program, port: int, log: Path) -> None:
        self.api_base = f"http://127.0.0.1:{port}/v1"
        self.log = log
        self._health = f"http://127.0.0.1:{port}/health"
        modules = os.pathsep.join(filter(None, [str(_HOME), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **program.environment, "PYTHONPATH": modules}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(program.command)}\n")
                file.flush()
                self._log_start = file.tell()
                self._process = start(program.command, environment, log=file)
        except OSError as error:
            raise UserError(f"cannot write the server's log {log}: {one_line(error)}") from error

    def is_healthy(self) -> bool:
        """Whether a server answers at the port."""
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), without_proxy.open(self._health, timeout=5):
            return True
        return False

    def check(self) -> None:
        """If the server has ended, prints the end of its log and raises UserError."""
        status = self._process.poll()
        if status is None:
            return
        lines = self._log_lines()
        for line in lines[-8:]:
            print(f"  | {line[:200]}", file=sys.stderr)
        reason = next((f": {match[1][:300]}" for line in lines if (match := _ERROR.search(line))), "")
        raise UserError(f"the server has ended with status {status}{reason}; see its log, {self.log}")

    def progress(self) -> str:
        """The last line of the log that tells what the server is doing."""
        messages = [match[1] or match[2] for line in self._log_lines() if (match := _PROGRESS.search(line))]
        return messages[-1][:140] if messages else ""

    def _log_lines(self) -> list[str]:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self._log_start)
            return [line.rstrip() for line in file if line.strip()]
