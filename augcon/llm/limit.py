"""How many requests a server gets at once: as many as keep its queue just non-empty (AugCon's own).

vLLM tells how many requests it runs and how many wait. From any other server, replies that take ever longer are the
sign of a queue, and status 429 that of a limit.
"""

import asyncio
import re
import statistics
from collections.abc import Mapping

START = 16  # a careful start: even of four slots with replies of 10 seconds, the last of these waits for half a minute
_FIGURE = re.compile(
    r"^vllm:(num_requests_(?:running|waiting)|num_preemptions|prefix_cache_hits|spec_decode_num_(?:draft|accepted)_tokens)"
    r"(?:_total)?(?:\{.*\})? (\S+)$",
    re.MULTILINE,
)
_QUEUE = 1 / 8  # of the requests that run: how many may wait, so that a slot that falls free is filled at once
_CALM = 60  # readings after a preemption in which a server is given hardly more
# Without figures: times that a reply takes longer than on an idle server, up to which more may come, and past which
# there are too many. Between the two lies a queue of one or two requests for each that runs.
_SHORT, _LONG = 2.0, 3.0
_FASTEST, _SLOWEST = 4, 0.25  # by how much the limit rises with a reply
_FEW = 4  # too few in flight to make a queue
_PATIENCE = 1 / 4  # of the time-out: replies that take longer are no reason to send more
_STRAY = 1 / 20  # share of requests that some servers refuse with status 429 however few there are
_LATELY = 200  # replies from which that share is taken


def now() -> float:
    """The time on the clock of the event loop, in seconds."""
    return asyncio.get_running_loop().time()


def figures(metrics: str) -> dict[str, float]:
    """The figures of use in the text of vLLM's ``/metrics``, by their names without "vllm:", summed over engines."""
    sums: dict[str, float] = {}
    for name, value in _FIGURE.findall(metrics):
        sums[name] = sums.get(name, 0) + float(value)
    return sums


class Limit:
    """The limit of one server, at most ``most``. Its ``value`` changes with what is reported here.

    ``wanted`` tells whether there are more requests than the limit lets through; without, there is no use in a higher
    one.
    """

    def __init__(self, most: int, timeout: float) -> None:
        self.most, self.timeout = most, timeout
        self.value = min(START, most)
        self.told = False  # whether the server tells of its queue
        self._ramp = True  # nothing has shown yet how much it can take
        self._preemptions: float | None = None  # so far
        self._calm = 0
        self._quickest: dict[int, float] = {}  # seconds, by the length of the reply in bits
        self._recent: list[tuple[float, float]] = []  # seconds, and those of the quickest of that length
        self._lowered = 0.0  # when, at last
        self._refused = self._not_refused = 0.0  # lately
        self._not_counted = 0  # replies to requests that were sent before that

    def follow(self, figures: Mapping[str, float], under_way: int, wanted: bool) -> None:
        """Takes a reading of vLLM's figures into account; without those of its queue, the replies count alone.

        ``under_way`` does not count requests that are probably lost.
        """
        self.told = {"num_requests_running", "num_requests_waiting"} <= figures.keys()
        if not self.told:
            return
        running, waiting = figures["num_requests_running"], figures["num_requests_waiting"]
        before, self._preemptions = self._preemptions, figures.get("num_preemptions", 0)
        preempted = before is not None and self._preemptions > before
        queue = 1 + running * _QUEUE
        if preempted:  # memory is short: it throws away the work of some to go on with others
            self._ramp, self._calm = False, _CALM
            self._set(0.9 * running)
        elif waiting > queue:
            self._ramp = False
            mine = min(1, under_way / (running + waiting))  # others may be asking, too
            self._set(under_way - mine * (waiting - queue))
        elif wanted and waiting <= queue / 2 and under_way - running - waiting <= max(START, queue):
            # Were there more that it does not tell of, its API would have a queue of its own.
            self._set(self.value * (2 if self._ramp else 1.02 if self._calm else 1.25) + 1)
        self._calm = max(0, self._calm - 1)

    def answered(self, seconds: float, size: int, under_way: int, wanted: bool) -> None:
        """Takes a reply of ``size`` characters into account."""
        self._not_refused += 1
        if self._not_refused > _LATELY:
            self._not_refused, self._refused = self._not_refused / 2, self._refused / 2
        kind = size.bit_length()
        quickest = self._quickest[kind] = min(seconds, self._quickest.get(kind, seconds))
        if self._not_counted:
            self._not_counted -= 1
            return
        self._recent.append((seconds, quickest))
        number = len(self._recent)
        if self.told or number < max(8, self.value / 4):
            return
        typical, idle = (statistics.median(values) for values in zip(*self._recent, strict=True))
        self._recent = []
        if typical > _LONG * idle and self.value <= _FEW:
            self._quickest = {}  # it is not their number: the server has become slower
        elif typical > _LONG * idle:
            wanted_stretch = (_SHORT + _LONG) / 2
            self._lower(self.value * max(0.5, wanted_stretch * idle / typical), under_way)
        elif typical < min(_SHORT * idle, _PATIENCE * self.timeout) and wanted:
            # At first, several more for each reply, but no more than could wait in a queue and still be in time.
            more = min(_FASTEST, _PATIENCE * self.timeout / typical) if self._ramp else _SLOWEST
            self._set(self.value + number * more)

    def refused(self, under_way: int) -> None:
        """Takes into account that the server has said that it is too much (status 429)."""
        self._refused += 1
        too_many = self._refused > 1 + _STRAY * self._not_refused
        if too_many and now() - self._lowered > 1:  # they come in bursts
            self._lower(0.75 * min(self.value, under_way), under_way)

    def timed_out(self, answered: int, under_way: int) -> None:
        """Takes a request into account that found no answer in time, while ``answered`` others did.

        Had it been in a queue, all that were sent before it would have been answered; so it was lost, unless these
        are fewer than there were.
        """
        if not self.told and answered < self.value:
            self._lower(max(1, answered / 2), under_way)

    def _lower(self, value: float, under_way: int) -> None:
        self._ramp, self._lowered, self._not_counted, self._recent = False, now(), under_way, []
        self._refused = self._not_refused = 0
        self._set(value)

    def _set(self, value: float) -> None:
        self.value = int(min(max(1, value), self.most))
