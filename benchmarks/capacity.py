"""How long a run takes on servers of any capacity: the limit that follows the server, fixed limits, slow items.

The first table has the seconds for the same requests with the best fixed number in flight, with 256 (as it was fixed
before), and with the limit that follows the server by vLLM's figures, or by the replies alone. The second compares the
old way of keeping results in order, in which a slow item keeps others from beginning, with the present one, where 0.3%
of the replies never come and 1% take 40 times as long as the others.

The clock leaps from event to event (see tests/simulation.py): the client is the real one but for HTTP, the server is a
fake of known capacity. So every run gives the same figures, and hours take minutes.

    python benchmarks/capacity.py [--slots 4,32,256,1024,8192]
"""

import argparse
import asyncio
import itertools
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from simulation import Fixed, SlotServer, now, replace_servers, simulate, spread  # noqa: E402

from augcon.data import Refused, Reply, Request  # noqa: E402
from augcon.llm.client import LLM, Endpoint  # noqa: E402
from augcon.llm.store import Store  # noqa: E402
from augcon.ordered import map_in_order  # noqa: E402

SECONDS = {4: 10.0, 32: 2.0, 256: 4.0, 1024: 8.0, 8192: 30.0}  # of a reply, by the slots of a server
NEVER = float("inf")


async def old_map(function: Callable[[Any], Awaitable[Any]], items: Iterable[Any], window: int) -> AsyncIterator[Any]:
    """The way that is replaced: what is begun and not yet handed on, finished or not, takes room."""
    begun: deque[asyncio.Task[Any]] = deque()
    source = iter(items)
    while True:
        begun.extend(asyncio.ensure_future(function(item)) for item in itertools.islice(source, window - len(begun)))
        if not begun:
            return
        yield await begun.popleft()


async def run(fake: SlotServer, number: int, fixed: int = 0, old: bool = False) -> tuple[float, float, int]:
    """Seconds until all replies are there, until 95% of them are, and how many requests were given up."""
    ends: list[float] = []
    lost = 0
    with Store(Path(":memory:")) as store:
        async with LLM(Endpoint("http://stand-in/v1", request_timeout=300), store) as llm:
            replace_servers(llm, fake, start=not old)
            if fixed:
                Fixed.at(fixed, llm.servers.all[0])

            async def ask(request: Request) -> Reply | None:
                nonlocal lost
                try:
                    return await llm.ask(request)
                except Refused:
                    lost += 1
                    return None
                finally:
                    ends.append(now())

            asked = (Request([{"role": "user", "content": f"question {n}"}], 0.5, 4096) for n in range(number))
            if old:
                async for _ in old_map(ask, asked, 2 * fixed):
                    pass
            else:
                async for _ in map_in_order(ask, asked, (lambda: 2 * fixed) if fixed else llm.servers.room):
                    pass
    return ends[-1], ends[int(0.95 * len(ends))], lost


def capacities(slots: Iterable[int]) -> None:
    print("| slots × seconds a reply | best fixed | 256 in flight | by vLLM's figures | by replies alone |")
    print("|---|---:|---:|---:|---:|")
    for each in slots:
        mean, number = SECONDS[each], max(800, min(60 * each, max(10_000, 8 * each)))

        def fake(tells: bool, each: int = each, mean: float = mean) -> SlotServer:
            return SlotServer(lambda _: each, lambda asked: spread(asked, mean), tells)

        best, *_ = simulate(run(fake(True), number, fixed=each + each // 8 + 1))
        cells = [f"{best:,.0f} s"]
        for tells, fixed in ((True, 256), (True, 0), (False, 0)):
            seconds, _, lost = simulate(run(fake(tells), number, fixed))
            cells.append(f"{seconds:,.0f} s ({best / seconds:.2f})" + (f", {lost} lost" if lost else ""))
        print(f"| {each:,} × {mean:.0f} s | {' | '.join(cells)} |", flush=True)


def slow_items(number: int = 12_000, slots: int = 128) -> None:
    """Seconds for 95% of the replies; what begins last and takes longest is the same either way."""
    print(f"\n| {number:,} requests, {slots} slots, 4 s a reply | results in order, old | now | ratio |")
    print("|---|---:|---:|---:|")
    for name, never, long in (("as they come", 0, 1), ("0.3% never come", 3, 1), ("and 1% take 40 times", 3, 40)):
        until = []
        for old in (True, False):
            tries: Counter[str] = Counter()

            def seconds(asked: str, never: int = never, long: int = long, tries: Counter[str] = tries) -> float:
                tries[asked] += 1
                place = int(1000 * spread(f"place {asked}", 1) - 500)
                if place < never and tries[asked] == 1:
                    return NEVER
                return spread(asked, 4) * (long if 10 <= place < 20 else 1)

            fake = SlotServer(lambda _: slots, seconds)
            until.append(simulate(run(fake, number, fixed=slots if old else 0, old=old))[1])
        print(f"| {name} | {until[0]:,.0f} s | {until[1]:,.0f} s | {until[0] / until[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--slots", default=",".join(map(str, SECONDS)), help="servers of the first table, by slots")
    capacities(map(int, filter(None, parser.parse_args().slots.split(","))))
    slow_items()


if __name__ == "__main__":
    main()
