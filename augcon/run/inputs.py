"""What a run is given: files by name, example answers, prompts for a text, and what the record keeps of that."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from augcon.data import Example, Query, RootContext
from augcon.errors import UserError
from augcon.files import digest, digest_of_all
from augcon.run.record import Inputs
from augcon.run.rows import read_all
from augcon.text.prompts import Prompts, load_prompts
from augcon.text.units import Language, language

PROJECT = Path(__file__).parent.parent.parent
_OURS = {"DailyM", "qa_examples.jsonl", "qa_examples_en.jsonl"}


def names_in(setting: str) -> list[str]:
    """The files and folders in a setting, separated by commas, unless it is the name of one as it stands.

    Those of AugCon are found from any working directory that has none of their name.
    """
    names = list(filter(None, map(str.strip, setting.split(","))))
    with contextlib.suppress(OSError):  # a name too long
        names = [setting] if "," in setting and Path(setting).exists() else names
    return [str(PROJECT / name) if name in _OURS and not Path(name).exists() else name for name in names]


def text_for(query: Query, root: RootContext | None, answer_from: Literal["root", "node"]) -> tuple[str, str]:
    """What a query is answered from, and the title of its article."""
    context = root.text.strip() if root and answer_from == "root" else query.context
    return context, root.title if root else ""


def read_examples(names: str) -> list[Example]:
    """The examples of .jsonl files, whose names are separated by commas; those of AugCon are found from anywhere."""
    examples = [row for name in names_in(names) for row in read_all(name, Example, "--qa-examples")]
    if not examples:
        raise UserError(f"--qa-examples names no file: {names!r}")
    return examples


def prompts_for(text: str, chosen: Literal["auto"] | Language) -> Prompts:
    """The prompts in the language of a text, unless the language setting names one."""
    return load_prompts(language(text) if chosen == "auto" else chosen)


def tree_inputs(settings: Inputs, roots: Sequence[RootContext], chosen: Literal["auto"] | Language) -> dict[str, Any]:
    """What step 1 is made with, as far as it is known before a server answers."""
    languages = {prompts_for(root.text, chosen).language for root in roots}
    prompts = {
        f"content of the prompts ({of})": load_prompts(of).tree_digest(settings["split"]) for of in sorted(languages)
    }
    corpus = digest_of_all(map(dataclasses.astuple, roots))
    return {**settings, **prompts, "content of the corpus as cut": corpus}


def answer_inputs(settings: Inputs, examples: Sequence[Example], languages: Iterable[Language]) -> dict[str, Any]:
    """What step 3 is made with, as far as it is known before a server answers."""
    prompts = {f"content of the answer prompts ({of})": load_prompts(of).answer_digest() for of in sorted(languages)}
    return {**settings, **prompts, "content of the examples": digest([dataclasses.astuple(row) for row in examples])}
