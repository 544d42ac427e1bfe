"""The pairs of a question and its answer to train on, from a saved dataset or a file."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets

from augcon.data import Pair
from augcon.errors import UserError, one_line


def read_pairs(source: Path) -> list[Pair]:
    """The pairs of a saved dataset or of a .jsonl, .json, .csv or .parquet file with the fields question and answer.

    Raises UserError, which names the row (from 1), when there is none, or when one lacks its question or answer.
    """
    try:
        rows = _read_rows(source)
    except Exception as error:  # each kind of file has its own errors
        raise UserError(f"cannot read the pairs in {source}: {one_line(error)}") from error
    for number, row in enumerate(rows, 1):
        for field in ("question", "answer"):
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"row {number} of {source} has no text in the field {field!r}: {str(row)[:80]!r}")
    if not rows:
        raise UserError(f"{source} has no pairs")
    return [Pair(row["question"], row["answer"]) for row in rows]


def _read_rows(source: Path) -> list[Any]:
    if source.is_dir():
        dataset = datasets.load_from_disk(str(source))
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"it has several splits; name the folder of one: {', '.join(dataset)}")
        return dataset.to_list()
    kind = source.suffix.lower()
    if kind == ".parquet":
        datasets.disable_progress_bars()
        return datasets.Dataset.from_parquet(str(source), keep_in_memory=True).to_list()
    text = source.read_text(encoding="utf-8-sig")
    if kind == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if kind == ".jsonl":
        return [_parsed(line) for line in text.split("\n") if line.strip()]
    if kind == ".json":
        return list(json.loads(text))
    raise ValueError("it is not a saved dataset, .jsonl, .json, .csv or .parquet")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line  # which is shown in the error of its row
