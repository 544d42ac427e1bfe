"""AugCon from Python: the whole method in one call, and the pairs with where each came from."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from augcon.errors import UserError
from augcon.files import new_file
from augcon.run.pairs import PairRules, origin_columns, passages_of, read_divided
from augcon.run.results import Results

if TYPE_CHECKING:
    import datasets

_PROJECT = Path(__file__).parent.parent
Corpus = str | Path | Iterable[str | Mapping[str, Any]]


def generate(corpus: Corpus, results: str | Path = "results", **settings: Any) -> "datasets.Dataset":
    """Makes SFT data of a corpus, as ``bash augcon.sh`` does, and returns it as ``read_pairs`` does.

    ``corpus`` is what ``--corpus`` takes or else the articles themselves: texts, or rows such as ``{"article": …,
    "title": …, "id": …}``. ``settings`` are those of ``config.py``, such as ``api_base="http://…/v1"``. What is printed
    is what the scripts print. Call it again and it goes on where it was. Raises UserError, in one line, as they end.
    """
    folder = Path(results)
    if not isinstance(corpus, (str, Path)):
        corpus = _keep_rows(corpus, folder)
    key = settings.pop("api_key", None)
    flags = [_flag(name, value) for name, value in {"corpus": corpus, "results": folder, **settings}.items()]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, **({"AUGCON_API_KEY": str(key)} if key else {})}
    command = ["bash", str(_PROJECT / "augcon.sh"), *flags]
    said = ""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as running:
        assert running.stdout
        for line in running.stdout:  # through Python, so that a notebook shows it
            print(line, end="")
            said = line.removeprefix("error: ").strip() if line.startswith("error: ") else said
    if running.returncode:
        raise UserError(said or f"augcon.sh ended with status {running.returncode}; see above")
    return read_pairs(folder)


def read_pairs(results: str | Path = "results") -> "datasets.Dataset":
    """The pairs in a results folder, a row each: question, answer, context (the passage that it was answered from), and
    where it is from: id, article, root, score, language, file, title, and the further fields of the corpus.

    Raises UserError where there are none.
    """
    import datasets  # slow: only where it is needed

    folder = Results(results)
    found = read_divided(folder, PairRules(data="", review="", held_out=0, seed=0))
    columns = {
        "question": [pair.question for pair in found.pairs],
        "answer": [pair.answer for pair in found.pairs],
        "context": passages_of(folder, found.origins),
        **origin_columns(folder, found.origins),
    }
    return datasets.Dataset.from_dict(columns)


def _keep_rows(articles: Iterable[str | Mapping[str, Any]], folder: Path) -> Path:
    """Articles in a file of the results folder. Raises UserError for what is neither a text nor a row."""
    rows: list[Mapping[str, Any]] = []
    for article in articles:
        if not isinstance(article, (str, Mapping)):
            raise UserError(f"an article is a text or a row such as {{'article': …}}, not {article!r:.80}")
        rows.append({"article": article} if isinstance(article, str) else article)
    if not rows:
        raise UserError("there is no article in the list")
    path = folder / "corpus.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != lines:  # what is the same need not be cut anew
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(lines)
    return path


def _flag(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"--no-{flag[2:]}" if value is False else f"{flag}={value}"
