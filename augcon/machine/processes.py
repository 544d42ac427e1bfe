"""Processes that never outlive the one that started them, however that one ends.

    python -m augcon.machine.processes COMMAND [ARGUMENT…]

runs a command in this way and then waits until it has released the memory of the GPUs.
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import psutil

from augcon.errors import UserError, one_line, stage
from augcon.machine.gpus import gpu_memory_released

TIMEOUT = 20  # seconds from SIGTERM to SIGKILL
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_libc = ctypes.CDLL(None)
Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def stopping_children(stop_with_parent: bool = False) -> Iterator[None]:
    """On exit, however it comes about, stops all processes that were started inside, and all that those started.

    SIGINT, SIGTERM and SIGHUP, and with ``stop_with_parent`` the end of the parent process, raise KeyboardInterrupt
    with the shell's status for the signal. Where SIGHUP is ignored (nohup), the end of the parent is ignored, too.
    """

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(128 + number)

    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (not nohup)
    handlers = {number: signal.signal(number, interrupt) for number in signals}
    try:
        _libc.prctl(_SUBREAPER, 1)  # adopt the grandchildren whose parent has ended
        if stop_with_parent and not nohup:
            _stop_with(os.getppid())
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        _stop_all()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(command: list[str], env: dict[str, str] | None = None, log: IO[str] | None = None) -> Process:
    """Starts a command in a session of its own, where Ctrl-C does not reach it.

    With ``log``, its output goes there and its input is empty. Raises UserError when it cannot be started.
    """
    follow = functools.partial(_stop_with, os.getpid())
    stdin = subprocess.DEVNULL if log else None
    try:
        return subprocess.Popen(
            command, env=env, stdin=stdin, stdout=log, stderr=log, start_new_session=True, preexec_fn=follow
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {one_line(error)}") from error


def exit_status(process: Process) -> int:
    """Waits for the end of a process; its status as a shell reports it."""
    status = process.wait()
    return 128 - status if status < 0 else status


def _stop_all() -> None:
    """Sends SIGTERM to all descendants, then SIGKILL to those that are still there after TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    terminated: set[psutil.Process] = set()
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > deadline:
                    child.kill()
                elif child not in terminated:
                    terminated.add(child)
                    child.terminate()
        psutil.wait_procs(children, timeout=0.2)


def _stop_with(parent: int) -> None:
    """Has the kernel send SIGTERM to this process when its parent ends."""
    _libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


@stage
def main() -> None:
    with gpu_memory_released(), stopping_children(stop_with_parent=True):
        status = exit_status(start(sys.argv[1:]))
    sys.exit(status)


if __name__ == "__main__":
    main()
