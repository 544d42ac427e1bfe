"""The corpus as root contexts: read and cut once, kept in the results folder until it changes."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from augcon.data import Article, RootContext
from augcon.errors import UserError
from augcon.files import Lines, NewLines, digest, file_digest, write_lines
from augcon.method.contexts import split_corpus
from augcon.progress import bar
from augcon.run.corpus import Corpus, Skipped
from augcon.run.inputs import PROJECT, names_in
from augcon.run.record import Inputs
from augcon.run.report import format_counts, format_skipped
from augcon.run.results import STEP_1, Results

_CUT = "corpus as cut"  # in the record
_CUTTING = (  # what decides on it
    "method/contexts.py",
    "run/corpus.py",
    "run/documents.py",
    "run/rows.py",
    "text/tidy.py",
    "text/units.py",
)
_NAMED = 5  # skipped files that are named on the screen
_SOON = 2.0  # seconds of reading after which there is a progress bar


@dataclasses.dataclass(frozen=True)
class CorpusRules:
    """Which corpus, and how it is cut; see the settings of the same names."""

    corpus: str
    text_field: str = "article"
    title_field: str = "title"
    limit: int = 0
    alike_articles: float = 0.8
    max_length: int = 500
    quota_unit: int = 35

    @property
    def sources(self) -> list[str]:
        """The files, folders and datasets that are named."""
        return names_in(self.corpus)

    def cut_from(self) -> Inputs:
        """What the root contexts follow from, of which a change is noticed; nothing for a corpus that is not here.

        The corpus by names, sizes and times of its files: the time of the last change to a file cannot be set.
        """
        stats = []
        try:
            for source in map(Path, self.sources):
                whole = source.expanduser().absolute()
                if not whole.exists():
                    return {}  # what is wrong is told when the corpus is read
                for path in filter(Path.is_file, sorted((whole, *whole.rglob("*")))):
                    stat = path.stat()
                    stats.append([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
        except (OSError, RuntimeError):
            return {}
        code = digest(*((PROJECT / "augcon" / name).read_bytes() for name in _CUTTING))
        return {**dataclasses.asdict(self), "files": digest(stats), "code": code} if stats else {}


@dataclasses.dataclass(frozen=True, slots=True)
class ArticleRow:
    """A line of ``articles.jsonl``: what is known of an article."""

    article: int
    file: str = ""
    row: int | None = None
    title: str = ""
    fields: dict[str, str | int | float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Where it is from, in a few words."""
        row = () if self.row is None else (f"row {self.row}",)
        return ", ".join([self.file, *row, *(f"{name} {value}" for name, value in self.fields.items())])


@dataclasses.dataclass(frozen=True)
class Cut:
    """The corpus as root contexts, what is known of its articles, and what was skipped or left out of them.

    ``cut_from`` is as it was before the corpus was read.
    """

    roots: Lines[RootContext]
    articles: Lines[ArticleRow]
    skipped: Sequence[Skipped]
    left_out: dict[str, int]  # lines, by what they are
    cut_from: Inputs

    def print(self) -> None:
        """Prints the figures, and the first of what was skipped."""
        reasons = Counter(each.reason for each in self.skipped)
        wanted = sum(root.quota for root in self.roots)
        print(
            f"corpus:  {len(self.articles):,} articles{format_skipped(reasons)}; {len(self.roots):,} root contexts, "
            f"{wanted:,} pairs wanted"
        )
        for each in self.skipped[:_NAMED]:
            print(f"skipped: {each}")
        if more := len(self.skipped) - _NAMED > 0 and len(self.skipped) - _NAMED:
            print(f"skipped: {more:,} more, all of them in skipped.jsonl")
        if self.left_out:
            print(f"tidied:  lines left out: {format_counts(Counter(self.left_out))}")

    def write(self, results: Results) -> None:
        """Writes ``contexts.jsonl``, ``articles.jsonl`` and ``skipped.jsonl``."""
        self.articles.write(results.articles)
        write_lines(results.skipped, map(dataclasses.asdict, self.skipped))
        self.roots.write(results.contexts)

    def keep(self, results: Results) -> None:
        """Leaves it for the next ``read_corpus``."""
        if self.cut_from and not _already_cut(results, self.cut_from):
            self.write(results)
            results.record.begin(_CUT, self.cut_from, (), redo=True)
            results.record.finish(_CUT, contexts=file_digest(results.contexts), left_out=self.left_out)


def read_corpus(rules: CorpusRules, results: Results | None = None) -> Cut:
    """The corpus as root contexts. Raises UserError when there is no text.

    Those that ``results`` already has of this very corpus are taken from there.
    """
    cut_from = rules.cut_from()
    if results and (facts := _already_cut(results, cut_from)):
        roots = Lines(results.contexts, RootContext, STEP_1)
        articles = Lines(results.articles, ArticleRow, STEP_1)
        return Cut(roots, articles, Lines(results.skipped, Skipped, STEP_1), facts["left_out"], cut_from)
    corpus = Corpus(rules.sources, rules.text_field, rules.title_field, rules.limit, rules.alike_articles)
    folder = results.folder if results and results.folder.is_dir() else None
    known, roots = NewLines(ArticleRow, folder), NewLines(RootContext, folder)

    def articles_with_progress() -> Iterator[Article]:
        with bar(None, "reading", "articles", delay=_SOON) as progress:
            for article in corpus.articles():
                known.append(ArticleRow(article.number, article.file, article.row, article.title, article.fields))
                yield article
                progress.update()

    for root in split_corpus(articles_with_progress(), rules.max_length, rules.quota_unit):
        roots.append(root)
    if not roots:
        reasons = format_skipped(Counter(each.reason for each in corpus.skipped))
        raise UserError(f"corpus {rules.corpus!r} has no article with text{reasons}")
    return Cut(roots, known, corpus.skipped, dict(corpus.left_out), cut_from)


def _already_cut(results: Results, cut_from: Inputs) -> dict[str, Any] | None:
    """What is on record of the root contexts that are there, if they were cut from this and stayed as they were."""
    facts = results.record.done_with(_CUT, cut_from)
    there = facts and all(path.exists() for path in (results.contexts, results.articles, results.skipped))
    return facts if there and facts and file_digest(results.contexts) == facts["contexts"] else None
