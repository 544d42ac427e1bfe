"""What a run is given: the corpus as root contexts, the prompts for a text, and what the record keeps of all that."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from augcon.data import Example, RootContext
from augcon.errors import UserError
from augcon.files import digest, file_digest, write_lines
from augcon.method.contexts import split_corpus
from augcon.run.corpus import read_all, read_column, texts
from augcon.run.record import Inputs
from augcon.run.report import format_skipped
from augcon.run.results import Results
from augcon.text.prompts import Prompts, load_prompts
from augcon.text.units import Language, language

_PROJECT = Path(__file__).parent.parent.parent
_CUT = "corpus as cut"  # in the record
_CUTTING = ("method/contexts.py", "run/corpus.py", "text/units.py")  # what decides on it


@dataclasses.dataclass(frozen=True)
class CorpusRules:
    """Which corpus, and how it is cut; see the settings of the same names."""

    corpus: str
    text_field: str
    max_length: int
    quota_unit: int

    def cut_from(self) -> Inputs:
        """What the root contexts follow from, of which a change is noticed; nothing for a corpus that is not here.

        The corpus by names, sizes and times of its files: the time of the last change to a file cannot be set.
        """
        stats = []
        try:
            source = Path(corpus_path(self.corpus)).expanduser().absolute()
            for path in filter(Path.is_file, sorted((source, *source.rglob("*")))):
                stat = path.stat()
                stats.append([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        except (OSError, RuntimeError):
            return {}  # what is wrong is told when the corpus is read
        code = digest(*((_PROJECT / "augcon" / name).read_bytes() for name in _CUTTING))
        return {**dataclasses.asdict(self), "files": digest(stats), "code": code} if stats else {}


def read_roots(rules: CorpusRules, skipped: Counter[str], results: Results | None = None) -> list[RootContext]:
    """The corpus as root contexts; what is skipped is counted by reason. Raises UserError when there is no text.

    Those that ``results`` already has of this very corpus are taken from there.
    """
    if results and (facts := _already_cut(results, rules.cut_from())):
        skipped.update(facts["skipped"])
        return results.read_contexts()
    articles = texts(read_column(corpus_path(rules.corpus), rules.text_field), skipped)
    roots = list(split_corpus(articles, rules.max_length, rules.quota_unit))
    if not roots:
        raise UserError(f"corpus {rules.corpus!r} has no article with text{format_skipped(skipped)}")
    return roots


def keep_roots(results: Results, cut_from: Inputs, roots: Sequence[RootContext], skipped: Counter[str]) -> None:
    """Leaves root contexts for the next ``read_roots``; ``cut_from`` is as it was before the corpus was read."""
    if cut_from and not _already_cut(results, cut_from):
        write_lines(results.contexts, map(dataclasses.asdict, roots))
        results.record.begin(_CUT, cut_from, (), redo=True)
        results.record.finish(_CUT, contexts=file_digest(results.contexts), skipped=dict(skipped))


def _already_cut(results: Results, cut_from: Inputs) -> dict[str, Any] | None:
    """What is on record of the root contexts that are there, if they were cut from this and stayed as they were."""
    facts = results.record.done_with(_CUT, cut_from)
    there = facts and results.contexts.exists() and file_digest(results.contexts) == facts["contexts"]
    return facts if there else None


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
