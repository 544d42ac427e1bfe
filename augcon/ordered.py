"""Many async calls at once, their results in order."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def map_in_order(
    function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], window: int
) -> AsyncIterator[tuple[Item, Result]]:
    """Each item with what ``function`` makes of it, many at once, in the order of the items.

    At most ``window`` items are begun and not yet handed on, so that memory stays bounded however long the iterable
    is. The first exception, wherever it arises, ends all.
    """
    begun: deque[tuple[Item, asyncio.Task[Result]]] = deque()
    ended: asyncio.Queue[asyncio.Task[Result]] = asyncio.Queue()
    source = iter(items)
    try:
        while True:
            for item in itertools.islice(source, window - len(begun)):
                task = asyncio.ensure_future(function(item))
                task.add_done_callback(ended.put_nowait)
                begun.append((item, task))
            if not begun:
                return
            while not begun[0][1].done() or not ended.empty():
                (await ended.get()).result()  # raises what the call raised
            item, task = begun.popleft()
            yield item, task.result()
    finally:
        for _, task in begun:
            task.cancel()
        await asyncio.gather(*(task for _, task in begun), return_exceptions=True)
