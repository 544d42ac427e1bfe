"""Processes that never outlive the one that started them, on whichever way it goes out.

    python -m augcon.machine.processes COMMAND [ARGUMENT…]

runs a command like that, and then waits until the GPUs are free.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

from augcon.errors import UserError, one_line
from augcon.machine.gpus import memory_given_back

PATIENCE = 20  # seconds to end in after SIGTERM, before SIGKILL
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # of prctl(2)
_libc = ctypes.CDLL(None)


class Told(BaseException):
    """A signal told this process to stop."""


@contextlib.contextmanager
def in_charge(dies_with_parent: bool = False) -> Iterator[None]:
    """On leaving, on every way, stops all that was started inside, and all that came of it.

    SIGINT, SIGTERM and SIGHUP, and with ``dies_with_parent`` the end of the parent process, lead out too: to
    SystemExit with the shell's status for them. Where SIGHUP is ignored (nohup), so is the parent's end.
    """
    alone = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (not alone)
    before = {number: signal.getsignal(number) for number in signals}
    try:
        for number in signals:
            signal.signal(number, _tell)
        _libc.prctl(_SUBREAPER, 1)  # grandchildren whose parent has ended come to this process
        if dies_with_parent and not alone:
            _die_with(os.getppid())
        yield
    except Told as told:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + told.args[0]) from None
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)  # what follows is short and must not be cut shorter
        stop_all()
        for number in signals:
            signal.signal(number, before[number])


def start(command: list[str], **how: Any) -> "subprocess.Popen[bytes]":
    """Starts a command in a session of its own, out of reach of Ctrl-C. Raises UserError when it is none."""
    parent = os.getpid()
    try:
        return subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _die_with(parent), **how)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {one_line(error)}") from error


def stop_all() -> None:
    """Ends all that came of this process: SIGTERM, and SIGKILL for what is still there after a while."""
    end = time.monotonic() + PATIENCE
    told: set[psutil.Process] = set()
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > end:
                    child.kill()
                elif child not in told:
                    told.add(child)
                    child.terminate()
        psutil.wait_procs(children, timeout=0.2)


def exit_status(process: "subprocess.Popen[bytes]") -> int:
    """The status of an ended process, as the shell tells it."""
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _tell(number: int, _: FrameType | None) -> None:
    raise Told(number)


def _die_with(parent: int) -> None:
    _libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Runs the command; returns its status."""
    try:
        with memory_given_back(), in_charge(dies_with_parent=True):
            process = start(sys.argv[1:])
            process.wait()
            return exit_status(process)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
