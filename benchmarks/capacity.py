"""How long a run takes on servers of any capacity: the limit that follows the server, fixed limits, slow items.

The first table has the seconds for the same requests with the best fixed number in flight, with 256 (as it was fixed
before), and with the limit that follows the server by vLLM's figures, or by the replies alone. The second compares the
old way of keeping results in order, in which a slow item keeps others from beginning, with the present one, where 0.3%
of the replies never come and 1% take 40 times as long as the others: for answers, and for the trees of step 1.

The clock leaps from event to event (see tests/simulation.py): the client is the real one but for HTTP, the server is a
fake of known capacity. So every run gives the same figures, and hours take minutes.

    python benchmarks/capacity.py [--slots 4,32,256,1024,8192]
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import itertools
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from simulation import Fixed, SlotServer, now, replace_servers, simulate, spread  # noqa: E402

from augcon.data import Ask, Refused, Reply, Request, RootContext  # noqa: E402
from augcon.demo.rules import reply_to  # noqa: E402
from augcon.llm.client import LLM, Endpoint  # noqa: E402
from augcon.llm.store import Store  # noqa: E402
from augcon.method.tree import TreeRules, fill_root  # noqa: E402
from augcon.ordered import map_in_order  # noqa: E402
from augcon.run.cut import CorpusRules, read_corpus  # noqa: E402
from augcon.run.inputs import prompts_for  # noqa: E402

SECONDS = {4: 10.0, 32: 2.0, 256: 4.0, 1024: 8.0, 8192: 30.0}  # of a reply, by the slots of a server
NEVER = float("inf")
Work = Callable[[Ask], tuple[Callable[[Any], Awaitable[object]], Iterable[Any]]]  # what to do with each of some items


def quietly(work: "Coroutine[Any, Any, Run]") -> "Run":
    """The outcome of a simulation, without what the client says of servers that do not answer."""
    with contextlib.redirect_stdout(io.StringIO()):
        return simulate(work)


async def old_map(function: Callable[[Any], Awaitable[Any]], items: Iterable[Any], window: int) -> AsyncIterator[Any]:
    """The way that is replaced: what is begun and not yet handed on, finished or not, takes room."""
    begun: deque[asyncio.Task[Any]] = deque()
    source = iter(items)
    while True:
        begun.extend(asyncio.ensure_future(function(item)) for item in itertools.islice(source, window - len(begun)))
        if not begun:
            return
        yield await begun.popleft()


@dataclasses.dataclass
class Run:
    """When each request was answered or given up, and how many were given up."""

    ends: list[float]
    lost: int

    @property
    def seconds(self) -> float:
        return self.ends[-1]

    @property
    def most(self) -> float:
        """Seconds until 95% were answered: the last may be long ones, whatever one does."""
        return self.ends[int(0.95 * len(self.ends))]


async def run(fake: SlotServer, work: Work, fixed: int = 0, old: bool = False) -> Run:
    """Does some work with a server: with a limit that follows it, or a fixed one, or in the old way."""
    made = Run([], 0)
    with Store(Path(":memory:")) as store:
        async with LLM(Endpoint("http://stand-in/v1", request_timeout=300), store) as llm:
            replace_servers(llm, fake, start=not old)
            if fixed:
                Fixed.at(fixed, llm.servers.all[0])

            async def ask(request: Request) -> Reply:
                try:
                    return await llm.ask(request)
                except Refused:
                    made.lost += 1
                    raise
                finally:
                    made.ends.append(now())

            do, items = work(ask)
            room = (lambda: 2 * fixed) if fixed else llm.servers.room
            async for _ in old_map(do, items, 2 * fixed) if old else map_in_order(do, items, room):
                pass
    return made


def questions(number: int) -> Work:
    """One request for each item, as in step 3 and inference."""

    def work(ask: Ask) -> tuple[Callable[[Any], Awaitable[object]], Iterable[Any]]:
        async def answer(n: int) -> object:
            with contextlib.suppress(Refused):
                return await ask(Request([{"role": "user", "content": f"question {n}"}], 0.5, 4096))

        return answer, range(number)

    return work


def trees(ask: Ask) -> tuple[Callable[[Any], Awaitable[object]], Iterable[Any]]:
    """Step 1 on the bundled corpus, three times over."""
    roots = read_corpus(CorpusRules(str(ROOT / "DailyM"))).roots
    copies = [dataclasses.replace(root, root=n) for n, root in enumerate(roots * 3)]

    async def grow(root: RootContext) -> object:
        numbered = dataclasses.replace(root, text=f"{root.text}\n\n{root.root}")  # or it would share the calls
        return await fill_root(ask, prompts_for(root.text, "auto"), numbered, TreeRules())

    return grow, copies


def capacities(slots: Iterable[int]) -> None:
    print("| slots × seconds a reply | best fixed | 256 in flight | by vLLM's figures | by replies alone |")
    print("|---|---:|---:|---:|---:|")
    for each in slots:
        mean, number = SECONDS[each], max(800, min(60 * each, 120_000))

        def fake(tells: bool, each: int = each, mean: float = mean) -> SlotServer:
            return SlotServer(lambda _: each, lambda asked: spread(asked, mean), tells)

        best = quietly(run(fake(True), questions(number), fixed=each + each // 8 + 1)).seconds
        cells = [f"{best:,.0f} s"]
        for tells, fixed in ((True, 256), (True, 0), (False, 0)):
            made = quietly(run(fake(tells), questions(number), fixed))
            cells.append(f"{made.seconds:,.0f} s ({best / made.seconds:.2f})" + f", {made.lost} lost" * (made.lost > 0))
        print(f"| {each:,} × {mean:.0f} s | {' | '.join(cells)} |", flush=True)


def slow_items() -> None:
    """How long it takes where some replies never come, or are long, in the old way and now."""
    print("\n| seconds until 95% are there | old | now | ratio | of the slots busy, old | now |")
    print("|---|---:|---:|---:|---:|---:|")
    kinds = (("as they come", 0, 1), ("0.3% never come", 3, 1), ("and 1% take 40 times as long", 3, 40))
    for what, work, slots, mean in (("answers", questions(12_000), 128, 4.0), ("trees", trees, 32, 4.0)):
        for name, never, long in kinds:
            ends, busy = [], []
            for old in (True, False):
                fake = SlotServer(
                    lambda _, slots=slots: slots,
                    seconds_of(mean, never, long),
                    reply=(lambda body: reply_to(body["messages"], body["seed"])) if work is trees else None,
                )
                made = quietly(run(fake, work, fixed=slots if old else 0, old=old))
                ends.append(made.most)
                busy.append(fake.busy / slots / made.seconds)
            cells = [f"{ends[0]:,.0f} s", f"{ends[1]:,.0f} s", f"{ends[0] / ends[1]:.2f}", *(f"{b:.0%}" for b in busy)]
            print(f"| {what}, {slots} slots, {name} | {' | '.join(cells)} |", flush=True)


def seconds_of(mean: float, never: int, long: int) -> Callable[[str], float]:
    """Seconds of each reply; so many of 1,000 never come when asked first, and 10 take so many times as long."""
    tries: Counter[str] = Counter()

    def seconds(asked: str) -> float:
        tries[asked] += 1
        place = int(1000 * spread(f"place {asked}", 1) - 500)
        if place < never and tries[asked] == 1:
            return NEVER
        return spread(asked, mean) * (long if 10 <= place < 20 else 1)

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--slots", default=",".join(map(str, SECONDS)), help="servers of the first table, by slots")
    capacities(map(int, filter(None, parser.parse_args().slots.split(","))))
    slow_items()


if __name__ == "__main__":
    main()
