"""Progress of long work: done, rate and time left; a line now and then where the output is no terminal."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str) -> "tqdm[None]":
    """A progress bar on standard error; call ``update`` and ``set_postfix_str`` on it, and close it."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        mininterval=0.2 if live else 15,
        maxinterval=1 if live else 60,
        dynamic_ncols=live,
        ncols=None if live else 110,
    )


class Share:
    """A part of a bar that fills step by step, never beyond ``size``."""

    def __init__(self, bar: "tqdm[None]", size: int) -> None:
        self.bar, self.left = bar, size

    def step(self) -> None:
        """Fills one more, if there is room."""
        self.bar.update(min(self.left, 1))
        self.left = max(self.left - 1, 0)

    def finish(self) -> None:
        """Fills what is left."""
        self.bar.update(self.left)
        self.left = 0
