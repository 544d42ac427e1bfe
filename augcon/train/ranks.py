"""The processes of one training, one for each GPU: which of them prints, works for all, or waits.

Scripts that train run under ``deepspeed --num_gpus N script.py``, or as one process under plain ``python``.
``base.start_processes`` connects the processes; nothing here imports torch before that.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import psutil

from augcon.errors import UserError

Result = TypeVar("Result")


@functools.cache
def waiting_group() -> Any:
    """A process group in which the others may wait for hours while the first one reads, filters and writes."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(days=7))  # NCCL would take that for a failure


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the first process, the one that prints and writes shared files."""
    return rank() == 0


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_main(text: str) -> None:
    """Prints a line, in the first process only."""
    if is_main():
        print(text, flush=True)


def on_main(work: Callable[[], Result]) -> Result:
    """Runs ``work`` in the first process and returns its result in all of them; so with a UserError that it raises."""
    result, error = None, None
    if is_main():
        try:
            result = work()
        except UserError as problem:
            error = str(problem)
    result, error = all_gather((result, error))[0]
    if error is not None:
        raise UserError(error)
    return cast(Result, result)


def all_gather(mine: Result) -> list[Result]:
    """The values of all processes, in all of them, in the order of the processes."""
    if world_size() == 1:
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=waiting_group())
    return everyone


def barrier() -> None:
    """Returns once every process has come here."""
    all_gather(None)


def _end_with_launcher() -> None:
    """Ends this process when the command ``deepspeed`` is gone, at whose end its helper would go on with the training.

    The helper is the parent, and the command the parent of that.
    """
    with contextlib.suppress(psutil.Error):
        while "deepspeed" in " ".join(psutil.Process(psutil.Process(os.getppid()).ppid()).cmdline()):
            time.sleep(1)
    os._exit(143)  # no exception would reach a process that waits for another one


def report_once(main: Callable[[], None]) -> Callable[[], None]:
    """Under ``@stage``: an error that all processes meet is reported by the first one only.

    The launcher ends all processes when one fails, so the others give the first one time to report.
    """

    @functools.wraps(main)
    def run() -> None:
        if "LOCAL_SIZE" in os.environ and os.environ["LOCAL_SIZE"] == os.environ["WORLD_SIZE"]:  # by deepspeed, here
            threading.Thread(target=_end_with_launcher, daemon=True).start()
        try:
            main()
        except KeyboardInterrupt:
            if is_main():
                raise
            sys.exit(130)
        except Exception:
            if not is_main():
                time.sleep(20)  # if this process still lives then, it alone met the error
            raise
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.modules["torch"].distributed.destroy_process_group()

    return run
