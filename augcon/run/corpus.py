"""Reading articles and questions from any corpus."""

import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from augcon.data import Article
from augcon.errors import UserError, one_line
from augcon.text.units import clean


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for a row that cannot be read, with the reason in a few words, for counting."""

    reason: str


TEXT = {".txt", ".md"}
JSON_LINES = {".jsonl", ".ndjson"}
BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def read_corpus(source: str, field: str, split: str = "train", flag: str = "--text-field") -> Iterator[Any]:
    """The values of ``field``, a row at a time, from anything that ``datasets`` opens.

    ``split`` is read where there are several; ``flag`` names the setting of the field in messages.
    ``source`` is a dataset saved to disk, a JSON Lines, JSON, CSV, TSV, Parquet or text file, a folder of
    ``.txt``/``.md`` files, or a dataset's name on the hub. A value that cannot be read comes as Unreadable.

    Raises UserError when there is no such corpus, it cannot be read, or none of its rows has the field.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a ~user who is not there
        raise UserError(f"corpus {source!r} is no path: {one_line(error)}") from error
    suffix = path.suffix.lower()
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"corpus {source!r} is an empty file")
    if path.is_dir() and not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT and not file.is_dir())
        if not files:
            raise UserError(f"corpus {source!r} is a folder without a saved dataset or .txt or .md files")
        return map(_read_file, files)
    if path.is_file() and suffix in TEXT:
        return iter([_read_file(path)])
    if path.is_file() and suffix in JSON_LINES:
        return _read_json_lines(path, field, flag)
    return _column(_open_dataset(source, path, suffix, split), source, field, flag)


def _read_file(path: Path) -> str | Unreadable:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return Unreadable(f"not in UTF-8: {path.name}")
    except OSError:
        return Unreadable(f"cannot be read: {path.name}")


def _read_json_lines(path: Path, field: str, flag: str) -> Iterator[Any]:
    """Line by line rather than through ``datasets``, which gives up a whole file for one bad line."""
    seen: Counter[str] = Counter()
    try:
        lines = path.open("rb")
    except OSError as error:
        raise UserError(f"corpus {str(path)!r} cannot be read: {one_line(error)}") from error
    with lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                yield Unreadable("broken line")
                continue
            if isinstance(row, dict):
                seen.update(map(str, row))
                yield row.get(field)
            else:
                yield Unreadable("line without fields")
    if not seen[field]:
        raise UserError(_no_field(str(path), field, list(seen), flag))


def _open_dataset(source: str, path: Path, suffix: str, split: str) -> datasets.Dataset:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error below
    try:
        if path.is_dir():
            opened = datasets.load_from_disk(str(path))
        elif path.is_file() and suffix in BUILDERS:
            options = {"sep": "\t"} if suffix == ".tsv" else {}
            opened = datasets.load_dataset(BUILDERS[suffix], data_files=str(path), **options)
        elif path.is_file():
            raise UserError(
                f"corpus {source!r}: files of this kind are not read; use .jsonl, .json, .csv, .tsv, "
                ".parquet, .txt, .md or a dataset saved to disk"
            )
        elif source.count("/") > 1 or source.startswith((".", "/", "~")) or suffix in {*BUILDERS, *JSON_LINES, *TEXT}:
            raise UserError(f"corpus {source!r}: there is no such file or folder")
        else:
            print(f"corpus {source!r} is no file or folder here; asking the hub", file=sys.stderr)
            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries, one by one
            opened = datasets.load_dataset(source)
    except UserError:
        raise
    except Exception as error:  # datasets raises whatever its many back ends raise
        if isinstance(error.__cause__, UnicodeDecodeError) or isinstance(error, UnicodeDecodeError):
            raise UserError(f"corpus {source!r} is not in UTF-8; convert it first, for instance with iconv") from error
        problem = "cannot be read" if path.exists() else "is neither a file or folder here nor a dataset to be had"
        raise UserError(f"corpus {source!r} {problem}: {one_line(error.__cause__ or error)}") from error
    if isinstance(opened, datasets.Dataset):
        return opened
    if split in opened:
        return opened[split]
    if len(opened) == 1:
        return next(iter(opened.values()))
    raise UserError(f"corpus {source!r} has no split {split!r}; its splits are: {', '.join(opened)}")


def _column(dataset: datasets.Dataset, source: str, field: str, flag: str) -> Iterator[Any]:
    if field not in dataset.column_names:
        raise UserError(_no_field(source, field, dataset.column_names, flag))
    return iter(dataset[field])


def _no_field(source: str, field: str, fields: list[str], flag: str) -> str:
    offered = ", ".join(repr(name) for name in fields[:20]) or "none"
    return f"corpus {source!r} has no field {field!r}; its fields are: {offered}; name one with {flag}"


def texts(rows: Iterable[Any], skipped: Counter[str]) -> Iterator[Article]:
    """The rows that are texts, cleaned, with their numbers. What is skipped is counted in ``skipped`` by reason."""
    for number, row in enumerate(rows):
        text = clean(row) if isinstance(row, str) else ""
        if text.strip():
            yield Article(number, text)
        elif isinstance(row, Unreadable):
            skipped[row.reason] += 1
        elif isinstance(row, str):
            skipped["empty"] += 1
        else:
            skipped["no text in the field" if row is None else "not a text"] += 1
