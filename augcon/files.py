"""Files and folders that take their name only when they are whole; reading them by their shape; digests."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from augcon.errors import UserError, one_line

Shape = TypeVar("Shape")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces ``path`` once all of it is on disk. Raises UserError when it cannot be written."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        if error.filename is None and error.errno not in _DISK:
            raise  # what failed was not this file
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that replaces ``path`` once all in it is on disk; nothing is left of it after an error.

    Raises UserError when it cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.rglob("*"):
            with contextlib.suppress(IsADirectoryError), file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(path, ignore_errors=True)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Writes one JSON value, indented."""
    with new_file(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON Lines."""
    with new_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_dataset(path: Path, columns: Mapping[str, list[Any]]) -> None:
    """Writes a dataset. Without rows it only removes what is there, for an empty dataset cannot be loaded again."""
    if not any(columns.values()):
        shutil.rmtree(path, ignore_errors=True)
        return
    import datasets  # slow: only where it is needed

    datasets.disable_progress_bars()
    with new_folder(path) as folder:
        datasets.Dataset.from_dict(dict(columns)).save_to_disk(folder)


def read_json(path: Path, shape: type[Shape], made_by: str) -> Shape:
    """A JSON file as ``shape``. Raises UserError, with the script that makes it, when it is missing or damaged."""
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _unreadable(path, error, made_by) from error


def read_lines(path: Path, shape: type[Shape], made_by: str) -> Iterator[Shape]:
    """The rows of a JSON Lines file as ``shape``; raises as ``read_json``."""
    rows = TypeAdapter(shape)
    try:
        with path.open("rb") as lines:
            yield from map(rows.validate_json, lines)
    except (OSError, ValidationError) as error:
        raise _unreadable(path, error, made_by) from error


def read_dataset(path: Path, shape: type[Shape], made_by: str) -> list[Shape]:
    """The rows of a saved dataset as ``shape``, a dataclass; raises as ``read_json``."""
    import datasets

    names = [field.name for field in dataclasses.fields(shape)]  # type: ignore[arg-type]
    try:
        dataset = datasets.load_from_disk(path)
        if missing := [name for name in names if name not in dataset.column_names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        rows = TypeAdapter(shape)
        return [rows.validate_python(row) for row in dataset.select_columns(names).to_list()]
    except Exception as error:  # the library raises many kinds
        raise _unreadable(path, error, made_by) from error


def _unreadable(path: Path, error: Exception, made_by: str) -> UserError:
    if not path.exists():
        return UserError(f"there is no {path}; run {made_by} first")
    reason = one_line(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        reason = " ".join([*map(str, first["loc"]), first["msg"]])
    return UserError(f"cannot read {path} ({reason}); remove it and run {made_by} again")


def digest(*parts: object) -> str:
    """A short digest of bytes, or of what JSON can say."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return whole.hexdigest()[:16]
