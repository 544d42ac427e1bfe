"""Many async calls at once, their results in order."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_TICK = 0.2  # seconds


async def map_in_order(
    function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], room: Callable[[], int]
) -> AsyncIterator[tuple[Item, Result]]:
    """Each item with what ``function`` makes of it, many at once, in the order of the items.

    At most ``room()`` items are under way. What is finished waits for its turn and takes no room, so that a slow item
    keeps none from beginning. The first exception, wherever it arises, ends all.
    """
    under_way: dict[asyncio.Task[Result], int] = {}
    ended: asyncio.Queue[asyncio.Task[Result] | None] = asyncio.Queue()
    begun: dict[int, Item] = {}  # and not yet handed on
    results: dict[int, Result] = {}
    source = enumerate(items)
    turn = 0
    clock = asyncio.create_task(_ticks(ended))
    try:
        while True:
            for number, item in itertools.islice(source, max(0, room() - len(under_way))):
                task = asyncio.ensure_future(function(item))
                task.add_done_callback(ended.put_nowait)
                under_way[task], begun[number] = number, item
            if not begun:
                return
            while True:
                if ended_task := await ended.get():
                    results[under_way.pop(ended_task)] = ended_task.result()  # raises what the call raised
                if ended.empty():
                    break
            while turn in results:
                yield begun.pop(turn), results.pop(turn)
                turn += 1
    finally:
        for each in (clock, *under_way):
            each.cancel()
        await asyncio.gather(clock, *under_way, return_exceptions=True)


async def _ticks(ended: asyncio.Queue[asyncio.Task[Result] | None]) -> None:
    """Wakes who waits for something to end, as there may be more room meanwhile."""
    while True:
        await asyncio.sleep(_TICK)
        ended.put_nowait(None)
