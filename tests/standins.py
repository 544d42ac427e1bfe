"""What stands in for a machine with GPUs, and how to find what a run has left behind."""

import contextlib
import http.server
import json
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from conftest import ROOT, clean_environment

# Not the real nvidia-smi: it tells of GPUs that are not there, of links between them, and of memory that a server holds
# for as long as it runs, and for three more questions.
NVIDIA_SMI = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
gpus = range({gpus})
if sys.argv[1] == "topo":
    for row in gpus:
        print(f"GPU{{row}}", *(" X " if row == other else {link!r} for other in gpus), "0-51", "0", "N/A", sep="\t")
    sys.exit(print("  NV#  = Connection traversing a bonded set of # NVLinks"))
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
for index in gpus:
    facts = {{"index": index, "uuid": f"GPU-stand-in-{{index}}", "name": {name!r}, "driver_version": {driver!r}}}
    facts |= {{"memory.total": {total}, "memory.free": {total} - {others}.get(index, used)}}
    print(", ".join(str(facts[field]) for field in fields))
"""

# Not the real vLLM: it notes how it was started and answers /health and /v1/models, or ends with the error that it is
# given.
VLLM = """import http.server, os, pathlib, sys
folder = pathlib.Path({folder!r})
(folder / "arguments").write_text("\\n".join(sys.argv[1:]))
(folder / "environment").write_text("\\n".join("=".join(item) for item in os.environ.items()))
(folder / "server.pid").write_text(str(os.getpid()))
if (folder / "error").exists():
    print("loading the weights")
    raise RuntimeError((folder / "error").read_text())
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": [{{"id": "m", "max_model_len": {longest}}}]}}')
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def fake_gpus(
    folder: Path,
    gpus: int,
    total: int = 81_559,
    name: str = "NVIDIA H100 80GB HBM3",
    link: str = "NV18",
    driver: str = "580.95.05",
    others: dict[int, int] | None = None,
) -> Path:
    """A folder for PATH whose nvidia-smi tells of GPUs, of ``total`` MiB each; ``others`` use that much of some."""
    facts = {"gpus": gpus, "total": total, "name": name, "link": link, "driver": driver, "others": others or {}}
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(NVIDIA_SMI.format(python=sys.executable, folder=str(folder), **facts))
    program.chmod(0o755)
    return program.parent


def fake_vllm(folder: Path, longest: int = 32_768) -> Path:
    """A folder for PYTHONPATH with a vLLM of a few lines, whose model takes ``longest`` tokens."""
    for entry in ("openai/api_server.py", "cli/main.py"):  # the one for the CPU, and the one for GPUs
        module = folder / "lib" / "vllm" / "entrypoints" / entry
        module.parent.mkdir(parents=True)
        for package in list(module.parents)[:3]:
            (package / "__init__.py").touch()
        module.write_text(VLLM.format(folder=str(folder), longest=longest))
    return folder / "lib"


def fake_model(folder: Path, weights: int | None, **config: object) -> Path:
    """A model without weights, which only says how large they are, as one of several files does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index = folder / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    if weights is not None:
        index.write_text(json.dumps({"metadata": {"total_size": weights}}))
    return folder


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


class Hub(http.server.ThreadingHTTPServer):
    """Not the real hub: it has one model, "org/model", and counts how often each file of that is downloaded.

    Of a file for which it has a number in place of the content, it only tells that size.
    """

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes | int], gated: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files, self.gated, self.downloads = files, gated, Counter[str]()

    def size(self, name: str) -> int:
        content = self.files[name]
        return content if isinstance(content, int) else len(content)


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        path = self.path.partition("?")[0]
        if not path.removeprefix("/api/models").startswith("/org/model"):
            self._answer(401, **{"X-Error-Code": "RepoNotFound"})  # as for a private one
        elif path.startswith("/api/models/org/model/tree/"):
            listed = [{"type": "file", "path": file, "size": self.server.size(file)} for file in self.server.files]
            self._answer(200, json.dumps([{**file, "oid": file["path"]} for file in listed]).encode())
        elif path.startswith("/api/"):
            self._answer(200, json.dumps({"id": "org/model", "sha": Hub.COMMIT, "siblings": []}).encode())
        elif self.server.gated:
            self._answer(403, **{"X-Error-Code": "GatedRepo"})
        else:
            name = path.rpartition("/")[2]
            self.server.downloads.update([name] * (self.command == "GET"))
            self._answer(200, self.server.files[name], ETag=f'"{name}"', **{"X-Repo-Commit": Hub.COMMIT})

    do_GET = do_HEAD

    def _answer(self, status: int, content: bytes | int = b"", **headers: str) -> None:
        self.send_response(status)
        size = content if isinstance(content, int) else len(content)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and isinstance(content, bytes):
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def fake_hub(files: dict[str, bytes | int], gated: bool = False) -> Iterator[Hub]:
    """A hub, as long as it is needed; its address goes into HF_ENDPOINT."""
    with Hub(files, gated) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
