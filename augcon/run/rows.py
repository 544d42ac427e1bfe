"""Rows of what users bring (articles, questions, pairs, example answers): of files, saved datasets or the hub."""

import dataclasses
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from augcon.errors import UserError, one_line
from augcon.text.units import clean

if TYPE_CHECKING:
    import datasets

Shape = TypeVar("Shape")
JSON_LINES = {".jsonl", ".ndjson"}
_NOT_UTF_8 = "not in UTF-8"
BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for a row or file that cannot be read: the reason in a few words, for counting, and what more is known."""

    reason: str
    detail: str = ""


Row = dict[str, Any] | Unreadable


def text_of(value: object) -> str | Unreadable:
    """The value of a field as clean text, or why there is none."""
    if isinstance(value, str):
        text = clean(value)
        return text if text.strip() else Unreadable("empty")
    if isinstance(value, Unreadable):
        return value
    return Unreadable("no text in the field" if value is None else "not a text")


def read_column(source: str, field: str, split: str = "train", flag: str = "--text-field") -> Iterator[Any]:
    """The values of one field, row by row; see ``read_rows``. ``flag`` is the setting that names the field."""
    for row in read_rows(source, (field,), split, "corpus", f"name one with {flag}"):
        yield row if isinstance(row, Unreadable) else row.get(field)


def read_all(source: str, shape: type[Shape], flag: str) -> list[Shape]:
    """All rows as ``shape``, a dataclass of texts. Raises UserError, with the row, where a field of it is no text."""
    fields = [field.name for field in dataclasses.fields(shape)]  # type: ignore[arg-type]
    found = []
    for number, row in enumerate(read_rows(source, fields, "train", flag, "add it"), 1):
        where = f"{flag} {source!r}, row {number}"
        if isinstance(row, Unreadable):
            raise UserError(f"{where} is not JSON in UTF-8 with the fields {', '.join(fields)} ({row.reason})")
        for field in fields:
            if not isinstance(row.get(field), str) or not clean(row[field]).strip():
                raise UserError(f"{where}: {field!r} must be a text, not {row.get(field)!r:.80}")
        found.append(shape(**{field: clean(row[field]).strip() for field in fields}))
    if not found:
        raise UserError(f"{flag} {source!r} has no rows")
    return found


def read_rows(
    source: str, fields: Iterable[str], split: str, what: str, advice: str, *, further: bool = False
) -> Iterator[Row]:
    """The rows of a file, of a saved dataset (of ``split``, where there are several), or of a dataset on the hub.

    They have at least the ``fields``, and with ``further`` other fields too that hold one value; without ``fields``,
    all that they hold. Raises UserError, about ``what``, when the source cannot be read, or, with ``advice``, when no
    row has one of the fields.
    """
    what = f"{what} {source!r}"
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a ~user who is not there
        raise UserError(f"{what} is not a path: {one_line(error)}") from error
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{what} is an empty file")
    if path.is_dir() and not is_dataset(path):
        raise UserError(f"{what} is a folder without a saved dataset")
    if path.is_file() and path.suffix.lower() in JSON_LINES:
        return _read_json_lines(what, fields, advice, path)
    dataset = _open_dataset(what, source, path, split)
    _check_fields(what, fields, dataset.column_names, advice)
    wanted = [*fields, *(_values(dataset, fields) if further else ())]
    return _rows(what, dataset.select_columns(wanted) if wanted else dataset)


def _rows(what: str, dataset: "datasets.Dataset") -> Iterator[Row]:
    try:
        yield from dataset
    except UnicodeDecodeError as error:  # found only when the text is looked at
        raise UserError(f"{what} is not in UTF-8; convert it first, for instance with iconv") from error


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a saved dataset."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _values(dataset: "datasets.Dataset", but: Iterable[str]) -> list[str]:
    """The columns that hold one text, number or date a row."""
    return [
        name
        for name, feature in dataset.features.items()
        if name not in but and getattr(feature, "dtype", "binary") not in {"binary", "large_binary"}
    ]


def _read_json_lines(what: str, fields: Iterable[str], advice: str, path: Path) -> Iterator[Row]:
    """Line by line rather than through ``datasets``, which gives up a whole file for one bad line."""
    seen: dict[str, None] = {}
    found: Counter[str] = Counter()  # rows by what is wrong with them
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {one_line(error)}") from error
    with lines:
        parts = (part for line in lines for part in line.split(b"\r"))  # some files have no other line end
        for row in map(_read_json_line, filter(bytes.strip, parts)):
            seen.update(dict.fromkeys(row if isinstance(row, dict) else ()))
            found[row.reason if isinstance(row, Unreadable) else ""] += 1
            yield row
    if not found[""]:
        ((reason, _),) = found.most_common(1) or [("", 0)]
        wrong = {"": "has no rows", _NOT_UTF_8: f"is {_NOT_UTF_8}; convert it first, for instance with iconv"}
        raise UserError(f"{what} {wrong.get(reason) or f'has no row that can be read ({reason})'}")
    _check_fields(what, fields, list(seen), advice)


def _read_json_line(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unreadable(_NOT_UTF_8)
    except (ValueError, RecursionError):
        return Unreadable(_NOT_UTF_8 if b"\0" in line else "broken line")  # zeros: UTF-16
    return row if isinstance(row, dict) else Unreadable("line without fields")


def _check_fields(what: str, fields: Iterable[str], there: list[str], advice: str) -> None:
    for field in fields:
        if field not in there:
            offered = ", ".join(f"{name!r:.40}" for name in there[:20]) or "none"
            raise UserError(f"{what} has no field {field!r}; its fields are: {offered}; {advice}")


def _open_dataset(what: str, source: str, path: Path, split: str) -> "datasets.Dataset":
    import datasets  # takes a second: not for --help, nor for what is no dataset

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error below
    suffix, known = path.suffix.lower(), {*BUILDERS, *JSON_LINES}
    if path.is_file() and suffix not in BUILDERS:
        raise UserError(f"{what}: files of this kind are not read; use {', '.join(sorted(known))} or a saved dataset")
    named_as_file = (
        source.count("/") > 1
        or source.startswith((".", "/", "~"))
        or source.endswith("/")
        or re.fullmatch(r"\.[a-z]{2,8}", suffix)
    )
    if not path.exists() and named_as_file:
        raise UserError(f"{what}: there is no such file or folder")
    try:
        if path.is_dir():
            opened = datasets.load_from_disk(str(path))
        elif path.is_file():
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            opened = datasets.load_dataset(BUILDERS[suffix], data_files=str(path), **options)
        else:
            print(f"{what} is not a file or folder here; asking the hub", file=sys.stderr)
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries, one by one
            opened = datasets.load_dataset(source)
    except Exception as error:  # datasets raises whatever its many back ends raise
        if isinstance(error.__cause__, UnicodeDecodeError) or isinstance(error, UnicodeDecodeError):
            raise UserError(f"{what} is not in UTF-8; convert it first, for instance with iconv") from error
        problem = "cannot be read" if path.exists() else "is neither a file or folder here nor a dataset on the hub"
        raise UserError(f"{what} {problem}: {one_line(error.__cause__ or error)}") from error
    if isinstance(opened, datasets.Dataset):
        return opened
    if split in opened or len(opened) == 1:
        return opened[split if split in opened else next(iter(opened))]
    raise UserError(f"{what} has no split {split!r}; its splits are: {', '.join(opened)}")
