"""Replies on disk: a request that was answered once is never sent again.

SQLite in WAL mode with one writer thread. Replies that arrive during a commit are written together in the next one
(group commit).
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from augcon.errors import UserError, one_line

BATCH = 1000  # most replies in one commit


class _Put(NamedTuple):
    key: bytes
    reply: bytes
    committed: Future[None]


class Store:
    """Replies by key; a context manager, to be used from one thread.

    A put that was awaited is visible to every later get. Raises UserError when the file cannot be opened, read or
    written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Put | None] = queue.SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)

    def __enter__(self) -> "Store":
        try:
            self._writer = self._open()
            self._writer.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
            )
            self._reader = self._open()
            self._reader.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def get(self, key: bytes) -> str | None:
        """The reply stored under ``key``, or None."""
        try:
            row = self._reader.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return row[0] if row else None

    async def put(self, key: bytes, reply: str) -> None:
        """Stores a reply. Returns once it is committed, that is, once it would survive a kill of this process."""
        if not self._thread.is_alive():
            raise RuntimeError("the store is closed")
        put = _Put(key, reply.encode("utf-8", "surrogatepass"), Future())
        self._queue.put(put)
        await asyncio.wrap_future(put.committed)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=30, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _write(self) -> None:
        puts: list[_Put | None] = []
        while None not in puts:
            puts = [self._queue.get()]
            while not self._queue.empty() and len(puts) < BATCH:
                puts.append(self._queue.get())
            self._commit([put for put in puts if put])

    def _commit(self, batch: list[_Put]) -> None:
        error: UserError | None = None
        try:
            self._writer.execute("BEGIN")
            self._writer.executemany(
                "INSERT OR REPLACE INTO replies VALUES (?, CAST(? AS TEXT))", [(put.key, put.reply) for put in batch]
            )
            self._writer.execute("COMMIT")
        except sqlite3.Error as failure:
            error = self._unusable(failure)
            with contextlib.suppress(sqlite3.Error):  # after a full disk, SQLite has rolled back already
                self._writer.execute("ROLLBACK")
        for put in batch:
            if not put.committed.set_running_or_notify_cancel():
                continue  # the caller was cancelled in the meantime
            if error:
                put.committed.set_exception(error)
            else:
                put.committed.set_result(None)

    def _unusable(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"the reply store {self._path} cannot be used ({one_line(error)}); "
            "check the free space and the permissions on its disk, then run the same command again"
        )
