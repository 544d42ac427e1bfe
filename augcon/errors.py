"""Errors that a user can mend: one line that says what, which value, and what to do."""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable

from pydantic import ValidationError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_SECRET = 8  # characters of a key worth hiding; a shorter one would take other words with it
_secrets: set[str] = set()


class UserError(Exception):
    """The run cannot go on and the message tells the user why and what to do; no traceback is needed."""


def conceal(secret: str) -> None:
    """From here on, ``one_line`` leaves this text out of the messages of others: a server may quote its key."""
    if len(secret) >= _SECRET:
        _secrets.add(secret)


def of_disk(error: Exception) -> bool:
    """Whether a disk is what failed: it is full, broken or read-only, as libraries of all kinds may put it."""
    return any(os.strerror(code) in str(error) for code in _DISK)


def one_line(error: object, limit: int = 300) -> str:
    """The text of an exception (of pydantic's, the first fault) in one line of at most ``limit`` characters."""
    text = str(error)
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        value = f" = {fault['input']!r:.80}" if where and fault["type"] != "missing" else ""
        text = f"{where}{value}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    for secret in _secrets:
        text = text.replace(secret, "…")
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def stage(main: Callable[[], None]) -> Callable[[], None]:
    """Makes a script's ``main`` end with one line and a non-zero status on what a user can mend, and when stopped."""

    @functools.wraps(main)
    def run() -> None:
        with contextlib.suppress(AttributeError):  # in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # a terminal in Latin-1
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt as stop:
            print("\nstopped; run the same command again to continue", file=sys.stderr)
            sys.exit(stop.args[0] if stop.args else 130)
        except BrokenPipeError:
            sys.exit(141)
        except OSError as error:
            if error.filename is None and not of_disk(error):
                raise
            sys.exit(f"error: {one_line(error)}")

    return run
