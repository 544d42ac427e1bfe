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
) -> AsyncIterator[Result]:
    """``function`` of each item, many at once, the results in the order of the items.

    At most ``window`` items are begun and not yet handed on, so that memory stays bounded however long
    the iterable is. The first exception, wherever it arises, ends all.
    """
    failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def notice(task: asyncio.Task[Result]) -> None:
        if not task.cancelled() and (error := task.exception()) and not failed.done():
            failed.set_result(error)

    begun: deque[asyncio.Task[Result]] = deque()
    source = iter(items)
    try:
        while True:
            for item in itertools.islice(source, window - len(begun)):
                begun.append(asyncio.ensure_future(function(item)))
                begun[-1].add_done_callback(notice)
            if not begun:
                return
            await asyncio.wait([begun[0], failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
            yield begun.popleft().result()
    finally:
        failed.cancel()
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
