"""What stands in for a machine with GPUs, and how to find what a run has left behind."""

import contextlib
import os
import sys
import time
import uuid
from pathlib import Path

import psutil
from conftest import ROOT, clean_environment

# Not the real nvidia-smi: it tells of GPUs that are not there, and of memory that a server holds for as long as
# it runs, and for three more questions.
NVIDIA_SMI = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
used = 10
if (folder / "server.pid").exists():
    pid = (folder / "server.pid").read_text()
    questions = folder / "questions"
    asked = len(questions.read_text()) if questions.exists() else 0
    alive = pathlib.Path("/proc/" + pid).exists()
    if not alive:
        questions.write_text("x" * (asked + 1))
    used = 70_000 if alive or asked < 3 else 10
for index in range({gpus}):
    facts = {{"index": index, "uuid": f"GPU-stand-in-{{index}}", "memory.used": used}}
    print(", ".join(str(facts[field]) for field in fields))
"""

# Not the real vLLM: it notes how it was started and answers /health, or ends with the error that it is given.
VLLM = """import http.server, os, pathlib, sys
folder = pathlib.Path({folder!r})
(folder / "arguments").write_text("\\n".join(sys.argv[1:]))
(folder / "server.pid").write_text(str(os.getpid()))
if (folder / "error").exists():
    print("loading the weights")
    raise RuntimeError((folder / "error").read_text())
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def fake_gpus(folder: Path, gpus: int) -> Path:
    """A folder for PATH whose nvidia-smi tells of GPUs."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(NVIDIA_SMI.format(python=sys.executable, folder=str(folder), gpus=gpus))
    program.chmod(0o755)
    return program.parent


def fake_vllm(folder: Path) -> Path:
    """A folder for PYTHONPATH with a vLLM of a few lines."""
    module = folder / "lib" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    for package in list(module.parents)[:3]:
        (package / "__init__.py").touch()
    module.write_text(VLLM.format(folder=str(folder)))
    return folder / "lib"


class Mark:
    """An environment in which all that a run starts can be found again; the fixture ``mark`` makes one."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "MARK_OF_A_TEST": self.mark}

    def processes(self) -> list[psutil.Process]:
        """The living processes that bear this mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                mine = process.environ().get("MARK_OF_A_TEST") == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def alive(self) -> list[str]:
        """Their command lines."""
        return [" ".join(command) for command in self._commands().values()]

    def pid(self, word: str) -> int:
        """The one of them that runs this script or module."""
        (pid,) = [pid for pid, line in self._commands().items() if any(part.endswith(word) for part in line[:4])]
        return pid

    def _commands(self) -> dict[int, list[str]]:
        commands = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                commands[process.pid] = process.cmdline()
        return commands

    def end(self) -> None:
        """Kills what is left of them, for the tests after one that failed."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def all_end(self, patience: float = 15) -> bool:
        """Whether all of them come to their end."""
        end = time.monotonic() + patience
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


def wait_for(path: Path, patience: float = 60) -> str:
    """The content of a file, as soon as there is one."""
    end = time.monotonic() + patience
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
    return path.read_text()


def with_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
