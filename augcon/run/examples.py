"""Reading the example answers that people have written."""

import json
from pathlib import Path

from augcon.data import Example
from augcon.errors import UserError, one_line
from augcon.text.units import clean

_FIELDS = ("context", "question", "answer")
_PROJECT = Path(__file__).parent.parent.parent


def read_examples(names: str) -> list[Example]:
    """The examples of .jsonl files, whose names are separated by commas; those of AugCon are found from anywhere.

    Raises UserError, with file and line, where something else is found.
    """
    examples = []
    for name in filter(None, map(str.strip, names.split(","))):
        path, bundled = Path(name).expanduser(), _PROJECT / name
        examples += _read_file(bundled if bundled.exists() and not path.exists() else path)
    if not examples:
        raise UserError(f"--qa-examples names no file: {names!r}")
    return examples


def _read_file(path: Path) -> list[Example]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"--qa-examples: cannot read {path}: {one_line(error)}") from error
    examples = [_example(line, f"--qa-examples: {path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise UserError(f"--qa-examples: {path} has no examples; write some, one a line")
    return examples


def _example(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON in UTF-8: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with the fields context, question, answer")
    for field in _FIELDS:
        if not isinstance(row.get(field), str) or not clean(row[field]).strip():
            raise UserError(f"{where}: {field!r} must be a text, not {row.get(field)!r:.80}")
    return Example(*(clean(row[field]).strip() for field in _FIELDS))
