"""What a run is given: the corpus as root contexts, the prompts for a text, and what the record keeps of all that."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from augcon.data import Example, RootContext
from augcon.errors import UserError
from augcon.files import digest
from augcon.method.contexts import split_corpus
from augcon.run.corpus import read_all, read_column, texts
from augcon.run.record import Inputs
from augcon.run.report import format_skipped
from augcon.text.prompts import Prompts, load_prompts
from augcon.text.units import Language, language

_PROJECT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class CorpusRules:
    """Which corpus, and how it is cut; see the settings of the same names."""

    corpus: str
    text_field: str
    max_length: int
    quota_unit: int


def read_roots(rules: CorpusRules, skipped: Counter[str]) -> list[RootContext]:
    """The corpus as root contexts; what is skipped is counted by reason. Raises UserError when there is no text."""
    articles = texts(read_column(corpus_path(rules.corpus), rules.text_field), skipped)
    roots = list(split_corpus(articles, rules.max_length, rules.quota_unit))
    if not roots:
        raise UserError(f"corpus {rules.corpus!r} has no article with text{format_skipped(skipped)}")
    return roots


def corpus_path(corpus: str) -> str:
    """Where a corpus is; the bundled one is found from any working directory that has none of its name."""
    return str(_PROJECT / corpus) if corpus == "DailyM" and not Path(corpus).exists() else corpus


def read_examples(names: str) -> list[Example]:
    """The examples of .jsonl files, whose names are separated by commas; those of AugCon are found from anywhere."""
    examples: list[Example] = []
    for name in filter(None, map(str.strip, names.split(","))):
        bundled = (_PROJECT / name).exists() and not Path(name).expanduser().exists()
        examples += read_all(str(_PROJECT / name) if bundled else name, Example, "--qa-examples")
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
    corpus = digest([dataclasses.astuple(root) for root in roots])
    return {**settings, **prompts, "content of the corpus as cut": corpus}


def answer_inputs(settings: Inputs, examples: Sequence[Example], languages: Iterable[Language]) -> dict[str, Any]:
    """What step 3 is made with, as far as it is known before a server answers."""
    prompts = {f"content of the answer prompts ({of})": load_prompts(of).answer_digest() for of in sorted(languages)}
    return {**settings, **prompts, "content of the examples": digest([dataclasses.astuple(row) for row in examples])}
