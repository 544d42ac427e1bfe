"""Articles in, root contexts with their quota out (paper section 3.2; splitting rules are AugCon's own)."""

import dataclasses
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from augcon.errors import UserError, one_line
from augcon.text import units as text


@dataclasses.dataclass(frozen=True)
class RootContext:
    """A continuous chunk of an article.

    ``article`` is the row in the corpus; ``start`` and ``end`` are offsets in the article as
    ``text.clean`` leaves it, so that the contexts of an article, joined in order, give back its text.
    ``quota`` is the number of pairs wanted of it.
    """

    root: int
    article: int
    start: int
    end: int
    length: int
    quota: int
    text: str


# Reading


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for a row that cannot be had, with the reason in a few words, for counting."""

    reason: str


TEXT = {".txt", ".md"}
JSON_LINES = {".jsonl", ".ndjson"}
BUILDERS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def read_corpus(source: str, field: str, split: str = "train", flag: str = "--text-field") -> Iterator[Any]:
    """The values of ``field``, a row at a time, from anything that ``datasets`` opens.

    ``split`` is read where there are several; ``flag`` names the setting of the field in messages.
    ``source`` is a dataset saved to disk, a JSON Lines, JSON, CSV, TSV, Parquet or text file, a folder of
    ``.txt``/``.md`` files, or a dataset's name on the hub. A value that cannot be had comes as Unreadable.

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


# Splitting

SHORT = 20  # a context under this length would bear no query (the paper's λ): avoided where possible
CHARACTERS_PER_UNIT = 12  # in a run without spaces: a page of Thai must not pass for one word
_MID_PARAGRAPH = 1.0  # cost of a cut inside a paragraph, in units of one empty context
_TOO_SHORT = 2.0


def split_article(article: str, max_length: int) -> list[str]:
    """Cuts an article into contexts of at most ``max_length``; joined in order, they give it back exactly.

    Cuts fall at paragraph ends, else at sentence ends, else (one sentence alone too long) inside it. As a
    typesetter breaks a paragraph into lines, the cuts are chosen together: few and evenly filled contexts,
    whole paragraphs where that is possible, none too short to bear a query. Time is linear in the article.
    """
    pieces = _pieces(article, max_length)
    sizes = [_size(piece) for piece in pieces]
    best = [0.0] + [math.inf] * len(pieces)
    cut_before = [0] * (len(pieces) + 1)
    for end in range(1, len(pieces) + 1):
        inside = end < len(pieces) and not pieces[end - 1].endswith("\n")
        size = 0
        for start in range(end - 1, -1, -1):
            size += sizes[start]
            if size > max_length and start < end - 1:
                break
            cost = best[start] + (1 - size / max_length) ** 2
            cost += _MID_PARAGRAPH * inside + _TOO_SHORT * (size < SHORT)
            if cost < best[end]:
                best[end], cut_before[end] = cost, start
    contexts, end = [], len(pieces)
    while end:
        contexts.append("".join(pieces[cut_before[end] : end]))
        end = cut_before[end]
    return contexts[::-1]


def _size(piece: str) -> int:
    return text.size(piece, CHARACTERS_PER_UNIT)


def _pieces(article: str, max_length: int) -> list[str]:
    """What is not cut further: sentences, or parts of those that are too long; the tiniest glued together."""
    pieces: list[str] = []
    tiny = min(SHORT, max_length // 25)
    for paragraph in text.paragraphs(article):
        for sentence in text.sentences(paragraph):
            for part in [sentence] if _size(sentence) <= max_length else _hard_cut(sentence, max(1, max_length // 10)):
                if pieces and _size(pieces[-1]) < tiny and _size(pieces[-1] + part) <= max_length:
                    pieces[-1] += part
                else:
                    pieces.append(part)
    return pieces


def _hard_cut(sentence: str, limit: int) -> Iterator[str]:
    """Cuts a sentence between its units into parts of at most ``limit``, fine enough to choose the cuts among."""
    part, size = "", 0
    for unit in text.units(sentence):
        for piece in re.findall(rf"\s*\S{{1,{limit * CHARACTERS_PER_UNIT}}}\s*", unit):
            if part and size + _size(piece) > limit:
                yield part
                part, size = "", 0
            part += piece
            size += _size(piece)
    if part:
        yield part


def split_corpus(rows: Iterator[Any], max_length: int, quota_unit: int, skipped: Counter[str]) -> Iterator[RootContext]:
    """Root contexts of all articles, in corpus order; what is skipped is counted in ``skipped`` by reason.

    The quota of a root context is one pair per ``quota_unit`` of its length, rounded up.
    """
    root = 0
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            skipped[_why_skipped(row)] += 1
            continue
        article = text.clean(row)
        if not article.strip():
            skipped["empty"] += 1
            continue
        start = 0
        for context in split_article(article, max_length):
            end = start + len(context)
            size = text.length(context)
            yield RootContext(root, number, start, end, size, max(1, math.ceil(size / quota_unit)), context)
            root, start = root + 1, end


def _why_skipped(row: Any) -> str:
    if isinstance(row, Unreadable):
        return row.reason
    return "no text in the field" if row is None else "not a text"
