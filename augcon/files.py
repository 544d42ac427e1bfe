"""Files and folders that take their name only when they are whole; reading them by their shape; digests."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from pydantic import TypeAdapter

from augcon.errors import UserError, of_disk, one_line

Shape = TypeVar("Shape")
_CHUNK = 1 << 20  # characters


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces ``path`` once all of it is on disk. Raises UserError when it cannot be written.

    What UTF-8 cannot say, as in a file's name that is none, becomes "?".
    """
    with (
        _unfinished(path) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        yield file


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that replaces ``path`` as ``new_file`` does; nothing is left of it after an error."""
    with _unfinished(path) as unfinished:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    unfinished, replaced = (path.with_name(path.name + end) for end in (".unfinished", ".replaced.unfinished"))
    try:
        yield unfinished
        for file in (unfinished, *unfinished.rglob("*")):
            with contextlib.suppress(IsADirectoryError), file.open("rb") as written:
                os.fsync(written.fileno())
        if unfinished.is_dir() and path.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)  # removing it takes time, and a kill would leave a part of it under its name
        unfinished.replace(path)
    except UserError:
        raise
    except Exception as error:  # libraries raise their own
        if not of_disk(error) and getattr(error, "filename", None) is None:
            raise  # what failed was not this file
        raise UserError(f"cannot write {path}: {one_line(error)}") from error
    finally:
        for folder in (unfinished, replaced):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_picture(path: Path, width: float) -> Iterator[Any]:
    """The axes of a PNG, ``width`` inches wide, that replaces ``path`` once it is drawn; raises as ``new_file``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, 4.5), layout="constrained")
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    with _unfinished(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")
    pyplot.close(figure)


def write_json(path: Path, value: object) -> None:
    """Writes one JSON value, indented."""
    with new_file(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON Lines."""
    with new_file(path) as file:
        file.writelines(map(json_line, rows))


def join_lines(path: Path, parts: Iterable[Path]) -> None:
    """Writes what is in several files of lines as one."""
    with new_file(path) as file:
        for part in parts:
            with part.open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, file, _CHUNK)


def json_line(row: Mapping[str, object]) -> str:
    """A line of a JSON Lines file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_dataset(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a dataset row by row: memory for a thousand, and the same bytes for the same rows.

    Without rows it only removes what is there, for an empty dataset cannot be loaded again.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        shutil.rmtree(path, ignore_errors=True)
        return
    import datasets  # slow: only where it is needed
    from datasets.arrow_writer import ArrowWriter

    datasets.disable_progress_bars()
    with new_folder(path) as folder:
        whole = folder / "whole" / "rows.arrow"
        whole.parent.mkdir()
        with ArrowWriter(path=str(whole), writer_batch_size=1000) as writer:
            for row in itertools.chain([first], rows):
                writer.write(dict(row))
            writer.finalize()
        read = datasets.Dataset.from_file(str(whole))
        # The fingerprint that it comes with depends on the time.
        datasets.Dataset(read.data, info=read.info, fingerprint=file_digest(whole)).save_to_disk(folder)
        shutil.rmtree(whole.parent)


def write_arrow(
    path: Path, types: Mapping[str, str | Sequence[str]], batches: Iterable[Mapping[str, list[Any]]]
) -> None:
    """Writes a dataset batch by batch as one file, for ``datasets.Dataset.from_file``, which keeps it out of memory.

    ``types``: the type of each column, such as "int32", or ["int32"] for lists of them.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    values = {
        name: datasets.Value(of) if isinstance(of, str) else list(map(datasets.Value, of)) for name, of in types.items()
    }
    features = datasets.Features(values)
    with _unfinished(path) as unfinished, ArrowWriter(path=str(unfinished), features=features) as writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.finalize()


def read_json(path: Path, shape: type[Shape], made_by: str) -> Shape:
    """A JSON file as ``shape``. Raises UserError, with the script that makes it, when it is missing or damaged."""
    with reading(path, made_by):
        return TypeAdapter(shape).validate_json(path.read_bytes())


def read_entries(path: Path, shape: type[Shape], made_by: str) -> Iterator[Shape]:
    """The entries of a JSON object, one after another, each a pair of key and value as ``shape``; raises as above.

    The file may be larger than memory, and written by hand: how it is laid out makes no difference.
    """
    with reading(path, made_by), path.open(encoding="utf-8") as file:
        yield from map(TypeAdapter(shape).validate_python, _entries(file))


_ENTRY = re.compile(r"""\s*([{,])\s*(?=")""")
_END = re.compile(r"\s*(?:\{\s*)?\}\s*")


def _entries(file: IO[str]) -> Iterator[tuple[str, Any]]:
    decode, colon = json.JSONDecoder().raw_decode, re.compile(r"\s*:\s*")
    text, start, opening = "", 0, "{"
    while True:
        try:
            opened = _ENTRY.match(text, start)
            key, end = decode(text, opened.end() if opened and opened[1] == opening else len(text))
            named = colon.match(text, end)
            value, end = decode(text, named.end() if named else len(text))
        except ValueError:  # as a rule, the entry goes on behind what has been read; read as much again
            more = file.read(max(_CHUNK, len(text) - start))
            if not more:
                break
            text, start = text[start:] + more, 0
        else:
            yield key, value
            start, opening = end, ","
    end_of_file = _END.fullmatch(text, start)
    if not end_of_file or ("{" in end_of_file[0]) != (opening == "{"):
        raise ValueError(f"no JSON object, or damaged near {text[start : start + 60]!r}")


def read_lines(path: Path, shape: type[Shape], made_by: str) -> Iterator[Shape]:
    """The rows of a JSON Lines file as ``shape``; raises as ``read_json``."""
    read, number = TypeAdapter(shape).validate_json, 0
    with reading(path, made_by, lambda: f", line {number}" if number else ""), path.open("rb") as lines:
        for number, line in enumerate(lines, 1):  # noqa: B007 - where it ended, for the error
            yield read(line)


class Lines(Sequence[Shape]):
    """The rows of a JSON Lines file as ``shape``, each read when it is asked for: memory for eight bytes of a row.

    They stay as they were found, also if the file is replaced. Raises as ``read_json``.
    """

    def __init__(self, path: Path, shape: type[Shape], made_by: str) -> None:
        self._path, self._made_by, self._read = path, made_by, TypeAdapter(shape).validate_json
        with reading(path, made_by):
            self._file: IO[bytes] = path.open("rb")
            self._starts = array("Q", itertools.accumulate(map(len, self._file), initial=0))

    def write(self, path: Path) -> None:
        """Writes them to a file of their own."""
        with new_file(path) as file:
            file.writelines(self._line(number).decode("utf-8", "replace") for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Shape: ...
    @overload
    def __getitem__(self, place: slice) -> list[Shape]: ...
    def __getitem__(self, place: int | slice) -> Shape | list[Shape]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        with reading(self._path, self._made_by, lambda: f", line {number + 1}"):
            return self._read(self._line(number))

    def _line(self, number: int) -> bytes:
        start, end = self._starts[number], self._starts[number + 1]
        return os.pread(self._file.fileno(), end - start, start)


class NewLines(Lines[Shape]):
    """Rows that are added one by one, in a file without a name in a folder, or where such files usually are."""

    def __init__(self, shape: type[Shape], folder: Path | None) -> None:
        self._path, self._made_by = folder or Path(tempfile.gettempdir()), "bash augcon.sh"
        self._read, self._starts = TypeAdapter(shape).validate_json, array("Q", [0])
        with self._telling():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open while its rows are read

    def append(self, row: Any) -> None:
        """Adds a row, a dataclass. Raises UserError when the disk is full."""
        line = json_line(dataclasses.asdict(row)).encode("utf-8", "replace")
        with self._telling():
            self._file.write(line)
            self._file.flush()  # it is read by its descriptor
        self._starts.append(self._starts[-1] + len(line))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self._path}: {one_line(error)}") from error


def read_dataset(path: Path, shape: type[Shape], made_by: str) -> list[Shape]:
    """The rows of a saved dataset as ``shape``; raises as ``read_json``."""
    return list(each_row(path, shape, made_by))


def each_row(path: Path, shape: type[Shape], made_by: str) -> Iterator[Shape]:
    """As ``read_dataset``, but a thousand rows at a time, for a dataset that may be large."""
    import datasets

    with reading(path, made_by):
        for rows in datasets.load_from_disk(path).with_format(None).iter(1000):  # all columns, as they are
            values = (dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True))
            yield from map(TypeAdapter(shape).validate_python, values)


@contextlib.contextmanager
def reading(path: Path, made_by: str, where: Callable[[], str] = str) -> Iterator[None]:
    """Turns what goes wrong into a UserError that says which file is missing or damaged, and what makes it."""
    try:
        yield
    except Exception as error:  # the datasets library raises many kinds
        if not path.exists():
            raise UserError(f"there is no {path}; run {made_by} first") from error
        advice = f"remove it and run {made_by} again"
        raise UserError(f"cannot read {path}{where()} ({one_line(error)}); {advice}") from error


def digest(*parts: object) -> str:
    """A short digest of bytes, or of what JSON can say."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return whole.hexdigest()[:16]


def digest_of_all(rows: Iterable[object]) -> str:
    """The ``digest`` of a list of these rows; memory for one."""
    whole, before = hashlib.sha256(b"["), ""
    for row in rows:
        whole.update((before + json.dumps(row, sort_keys=True)).encode())
        before = ", "
    whole.update(b"]")
    return whole.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """The digest of a file's bytes, read piece by piece. Raises UserError when it cannot be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
