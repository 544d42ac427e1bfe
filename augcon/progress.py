"""Progress of long work: done, rate and time left; a line now and then where the output is no terminal."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str) -> "tqdm[None]":
    """A progress bar on standard error; call ``update`` and ``set_postfix_str`` on it, and close it."""
    live = sys.stderr.isatty()
    least, most = (0.2, 1) if live else (15, 60)  # seconds between two lines
    return tqdm(
        total=total, desc=what, unit=f" {unit}", mininterval=least, maxinterval=most, dynamic_ncols=live, ncols=110
    )


def say(line: str) -> None:
    """Prints a line on standard output without breaking a bar that is there."""
    tqdm.write(line)


class Share:
    """A part of a bar that fills step by step, never beyond ``left`` steps."""

    def __init__(self, bar: "tqdm[None]", left: int) -> None:
        self.bar, self.left = bar, left

    def fill(self, steps: int) -> None:
        """Fills as many of the steps as there is room for."""
        self.bar.update(min(steps, self.left))
        self.left = max(self.left - steps, 0)
