"""Progress of long work: done, rate and time left; a line now and then where the output is no terminal."""

import sys
import time
from types import TracebackType

from tqdm import std, tqdm

std.time = time.monotonic  # a clock that is set back would silence a bar
_SETTLED = 60.0  # seconds over which the rate is taken, so that the time left does not jump


def bar(total: int | None, what: str, unit: str, delay: float = 0) -> "tqdm[None]":
    """A progress bar on standard error; call ``update`` and ``set_postfix_str`` on it, and close it.

    Without a ``total`` there is no time left. It appears after ``delay`` seconds.
    """
    live = sys.stderr.isatty()
    least, most = (0.2, 1) if live else (15, 60)  # seconds between two lines
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        delay=delay,
        miniters=0,  # so that update(0) shows that something goes on
        mininterval=least,
        maxinterval=most,
        smoothing=least / _SETTLED,
        dynamic_ncols=live,
        ncols=110,
    )


def say(line: str) -> None:
    """Prints a line on standard output without breaking a bar that is there."""
    tqdm.write(line)


class Panel:
    """What was made last, below a bar; nothing where the output is no terminal."""

    def __init__(self, *names: str) -> None:
        self._lines = {
            name: tqdm(position=place, bar_format="{desc}", mininterval=1, dynamic_ncols=True, leave=False)
            for place, name in enumerate(names if sys.stderr.isatty() else (), 1)
        }

    def __enter__(self) -> "Panel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for line in self._lines.values():
            line.close()

    def show(self, *texts: str) -> None:
        """Shows a text beside each name, about once a second."""
        for (name, line), text in zip(self._lines.items(), texts, strict=False):
            line.set_description_str(f"  {name:<9}{' '.join(text.split())}", refresh=False)
            line.update()


class Share:
    """A part of a bar, of ``left`` steps, that fills step by step, the last one only at its end."""

    def __init__(self, bar: "tqdm[None]", left: int) -> None:
        self.bar, self.left = bar, left

    def step(self) -> None:
        """Fills one step, if it is not the last."""
        if self.left > 1:
            self.bar.update()
            self.left -= 1

    def end(self) -> None:
        """Fills what is left."""
        self.bar.update(self.left)
        self.left = 0
