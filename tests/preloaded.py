"""The scripts in processes that are forked from one in which all is imported: many runs in little time."""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT, clean_environment

SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if path.stem != "config"]
_SLOW = ["augcon.plan", "augcon.llm.client", "augcon.report.charts", "datasets"]
_TRAINING = ["augcon.train.sft", "augcon.train.scorer", "augcon.train.merge", "accelerate", "trl", "deepspeed"]


class Preloaded:
    """Runs the ``main`` of modules; ``said``.out and ``said``.err are files for what each says."""

    def __init__(self, training: bool = False) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*SCRIPTS, *_SLOW, *(_TRAINING if training else ())])

    def start(self, said: Path, script: str, *arguments: object) -> BaseProcess:
        process = self._context.Process(target=_play, args=(said, script, list(map(str, arguments))))
        process.start()
        return process

    def run(
        self, said: Path, script: str, *arguments: object, timeout: float = 300
    ) -> "subprocess.CompletedProcess[str]":
        """Runs it to its end, with the status -9 where it takes too long."""
        process = self.start(said, script, *arguments)
        process.join(timeout)
        process.kill()
        process.join()
        texts = (Path(f"{said}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
        return subprocess.CompletedProcess([script, *map(str, arguments)], process.exitcode or 0, *texts)


def _play(said: Path, script: str, arguments: list[str]) -> None:
    status: object = 1
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(clean_environment() | {"OMP_NUM_THREADS": "1"})
    for stream, kind in enumerate(("out", "err"), 1):
        with Path(f"{said}.{kind}").open("w") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = [f"{script}.py", *arguments]
    try:
        importlib.import_module(script).main()
        status = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
