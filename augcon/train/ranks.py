"""The processes of one training, one a GPU: who speaks, who works for all, who waits.

Scripts that train run under ``deepspeed --num_gpus N script.py``, or as one process under plain ``python``.
``training.start_processes`` brings the processes together; nothing here imports torch before that.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from augcon.errors import UserError

Result = TypeVar("Result")
_PATIENCE = timedelta(days=7)  # for the first process, which reads, filters and writes while the others wait


@functools.cache
def waiting_room() -> Any:
    """A group in which processes may wait for hours; NCCL would take that for a failure."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the first process, the one that prints and writes shared files."""
    return rank() == 0


def processes() -> int:
    """How many processes take part."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def tell(text: str) -> None:
    """Prints a line, in the first process only."""
    if is_main():
        print(text, flush=True)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if processes() == 1:
        return
    import torch.distributed as dist

    dist.barrier(group=waiting_room())


def on_main(work: Callable[[], Result]) -> Result:
    """What ``work`` returns in the first process, in all of them; a UserError there is one in all of them."""
    if processes() == 1:
        return work()
    import torch
    import torch.distributed as dist

    said: list[Any] = [None, None]
    if is_main():
        try:
            said[0] = work()
        except UserError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0, group=waiting_room(), device=torch.device("cpu"))
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def gather(mine: Result) -> list[Result]:
    """What each process has, in all of them, in the order of the processes."""
    if processes() == 1:
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * processes()
    dist.all_gather_object(everyone, mine, group=waiting_room())
    return everyone


def one_voice(main: Callable[[], None]) -> Callable[[], None]:
    """Under ``@stage``: only the first process tells of an error that all of them meet.

    The launcher ends all processes when one ends in failure, so the others give the first the time to speak.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except KeyboardInterrupt:
            if is_main():
                raise
            sys.exit(130)
        except Exception:
            if not is_main():
                time.sleep(20)  # if it still lives then, only this process met the error
            raise
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.modules["torch"].distributed.destroy_process_group()

    return run
