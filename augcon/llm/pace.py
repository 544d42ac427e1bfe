"""How fast a run goes: what was done by when, for the rate that is shown and for the report."""

from collections import Counter

_SAMPLES = 400  # kept at most, so that days take no more room than minutes
_WINDOW = 10.0  # seconds, at least, over which a rate is taken


class Pace:
    """Samples of (seconds since the start, calls, reply tokens), taken by whoever calls ``sample``."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int, int]] = []
        self._between = 1.0  # seconds

    def sample(self, seconds: float, counts: Counter[str]) -> None:
        """Takes a sample, unless the last is too fresh."""
        if self.samples and seconds - self.samples[-1][0] < self._between:
            return
        self.samples.append((round(seconds, 1), counts["calls"], counts["reply tokens"]))
        if len(self.samples) > _SAMPLES:
            self.samples = self.samples[::2]
            self._between *= 2

    def tokens_a_second(self) -> float:
        """Tokens that the model has written lately, a second."""
        if len(self.samples) < 2:
            return 0.0
        end, _, written = self.samples[-1]
        earlier = [sample for sample in self.samples[:-1] if end - sample[0] >= _WINDOW] or self.samples[:1]
        began, _, before = earlier[-1]
        return (written - before) / (end - began)
