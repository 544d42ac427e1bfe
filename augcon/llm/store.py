"""Replies on disk, in SQLite: a request that was answered once is never sent again."""

import contextlib
import fcntl
import mmap
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from augcon.errors import UserError, one_line

_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class Store:
    """Replies by key; a context manager. Raises UserError when the file cannot be opened, read or written.

    A reply whose bytes have changed since it was put does not count.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "Store":
        # Where a file cannot be locked, or not be shared in memory, as on some network file systems, SQLite has to do
        # without. No other process uses the store: the results folder is held. The speed is the same.
        alone = not _can_share(self._path.parent)
        with self._one_line():
            address = f"{self._path.absolute().as_uri()}?vfs=unix-none" if alone else self._path
            self._connection = sqlite3.connect(address, uri=alone, isolation_level=None, timeout=30)
            self._connection.text_factory = bytes
            self._connection.executescript(f"""
                PRAGMA locking_mode = {"EXCLUSIVE" if alone else "NORMAL"};
                PRAGMA journal_mode = WAL;
                PRAGMA synchronous = NORMAL;
                CREATE TABLE IF NOT EXISTS replies
                    (key BLOB PRIMARY KEY, reply TEXT NOT NULL, checksum INTEGER) WITHOUT ROWID;
            """)
            columns = [name for _, name, *_ in self._connection.execute("PRAGMA table_info(replies)")]
            if b"checksum" not in columns:  # of an earlier version
                self._connection.execute("ALTER TABLE replies ADD COLUMN checksum INTEGER")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, key: bytes) -> str | None:
        """The reply stored under ``key``, or None."""
        with self._one_line():
            found = self._connection.execute("SELECT reply, checksum FROM replies WHERE key = ?", (key,)).fetchone()
        if found and isinstance(found[0], bytes) and found[1] in (None, zlib.crc32(key + found[0])):
            with contextlib.suppress(UnicodeDecodeError):
                return found[0].decode("utf-8", "surrogatepass")
        return None

    def put(self, key: bytes, reply: str) -> None:
        """Commits a reply, which then survives a kill of this process. In WAL mode that takes 50 microseconds."""
        data = reply.encode("utf-8", "surrogatepass")
        row = (key, data, zlib.crc32(key + data))
        with self._one_line():
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, CAST(? AS TEXT), ?)", row)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Removes replies."""
        with self._one_line():
            self._connection.executemany("DELETE FROM replies WHERE key = ?", ((key,) for key in keys))

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            advice = "the file is damaged; restore a copy, or delete it, and its replies will be asked for again"
            if code in _DISK:
                advice = "check the free space and the permissions on its disk, then run the same command again"
            if code in _BUSY:
                advice = "another program has it open; end that, then run the same command again"
            raise UserError(f"the reply store {self._path} cannot be used ({one_line(error)}); {advice}") from error


def _can_share(folder: Path) -> bool:
    """Whether files there can be locked, and shared in memory; also where that cannot be tried."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(mmap.PAGESIZE)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mmap.mmap(file.fileno(), mmap.PAGESIZE).close()
        except OSError:
            return False
    return True
