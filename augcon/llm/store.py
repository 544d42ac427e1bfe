"""Replies on disk: what a server has answered once is never asked again.

SQLite in WAL mode with one writer thread; replies that arrive while a commit is under way go into the
next one together (group commit).
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from pathlib import Path

from augcon.errors import UserError, one_line

_Item = tuple[bytes, bytes, asyncio.Future[None], asyncio.AbstractEventLoop]


class Store:
    """Texts by key. Reads see every put that was awaited; use it as a context manager, from one thread.

    Raises UserError when the file cannot be opened, read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="store", daemon=True)

    def __enter__(self) -> "Store":
        try:
            self._writer = self._connect()
            self._writer.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
            )
            self._reader = self._connect()
            self._reader.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def get(self, key: bytes) -> str | None:
        """The reply kept under ``key``, if any."""
        try:
            row = self._reader.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        return row[0] if row else None

    async def put(self, key: bytes, reply: str) -> None:
        """Keeps a reply; returns once it is committed and would survive the process being killed."""
        if not self._thread.is_alive():
            raise RuntimeError("the store is closed")
        loop = asyncio.get_running_loop()
        committed: asyncio.Future[None] = loop.create_future()
        self._queue.put((key, reply.encode("utf-8", "surrogatepass"), committed, loop))
        await committed

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=30, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            batch = [item]
            while not self._queue.empty() and len(batch) < 1000:
                if (item := self._queue.get()) is None:
                    self._queue.put(None)
                    break
                batch.append(item)
            self._commit(batch)

    def _commit(self, batch: list[_Item]) -> None:
        error: Exception | None = None
        try:
            self._writer.execute("BEGIN")
            self._writer.executemany(
                "INSERT OR REPLACE INTO replies VALUES (?, CAST(? AS TEXT))", [item[:2] for item in batch]
            )
            self._writer.execute("COMMIT")
        except sqlite3.Error as failure:
            error = self._trouble(failure)
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
                self._writer.execute("ROLLBACK")
        for loop in {item[3] for item in batch}:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody waiting
                loop.call_soon_threadsafe(_settle, [item[2] for item in batch if item[3] is loop], error)

    def _trouble(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"the store of replies {self._path} cannot be used ({one_line(error)}); "
            "check the disk's free space and permissions, then run the same command again"
        )


def _settle(futures: list[asyncio.Future[None]], error: Exception | None) -> None:
    for future in futures:
        if future.done():  # the caller was cancelled meanwhile
            continue
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)
