"""Articles from what users bring: files, folders, archives, datasets, addresses. Each text is taken once, and what is
skipped is listed with its reason."""

import dataclasses
import datetime
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import rensa

from augcon.data import Article
from augcon.errors import UserError, one_line
from augcon.run.documents import MIME, Converter
from augcon.run.rows import BUILDERS, JSON_LINES, Unreadable, is_dataset, read_rows, text_of
from augcon.text.tidy import Tidied, tidy
from augcon.text.units import clean, units

TEXT = {".txt": False, ".md": True, ".markdown": True}  # and whether it is Markdown
ROWS = {*JSON_LINES, *BUILDERS}
ARCHIVE = ".zip"
TITLE = "title"  # the field that is taken for one where it is there
KINDS = sorted({*TEXT, *MIME, *ROWS, ARCHIVE})
LARGEST = 256 << 20  # bytes of a file that is one article
_SWELLING, _DEEPEST = 100, 3  # times that a large file in an archive may be as long as packed; archives in archives
_LONGEST_FIELD, _LONGEST_TITLE = 1000, 200  # characters of what goes with the article
_RUN = 5  # units; articles are compared by the runs of so many that they share
_PERMUTATIONS, _BANDS = 128, 32

Place = Any  # a Path, a zipfile.Path, or a UPath, which have the same methods


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or a ``row`` of one (from 0), that gives no article, and why; ``detail`` says more."""

    file: str
    row: int | None
    reason: str
    detail: str = ""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return _named(self.file, self.row)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A text, or why there is none, and where it is from."""

    text: Any
    file: str
    row: int | None = None
    title: str = ""
    fields: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    markdown: bool = False

    @property
    def name(self) -> str:
        """What a person calls it."""
        return _named(self.file, self.row)


Read = Callable[[], Iterable[_Found]]  # of a place, once its turn has come


class Corpus:
    """The articles of several sources, in their order; ``skipped`` and ``left_out`` fill while they are read.

    ``alike``: share of their runs of words from which an article is left out as the same as an earlier one; 0: only
    what is the very same. ``limit``: the number of articles wanted; 0: all. ``left_out`` counts lines by what they are,
    such as navigation.
    """

    def __init__(self, sources: Iterable[str], text_field: str, title_field: str, limit: int, alike: float) -> None:
        self.skipped: list[Skipped] = []
        self.left_out: Counter[str] = Counter()
        self._sources, self._text, self._title, self._limit = list(sources), text_field, title_field, limit
        self._earlier = _Earlier(alike)
        self._converter = Converter()

    def articles(self) -> Iterator[Article]:
        """The articles. Raises UserError where a source cannot be read at all."""
        taken = 0
        for number, found in enumerate(self._texts()):
            text = text_of(found.text)
            tidied = tidy(text, markdown=found.markdown) if isinstance(text, str) else text
            if isinstance(tidied, Tidied) and not tidied.text.strip():
                tidied = Unreadable("empty")
            if isinstance(tidied, Tidied):
                tidied = self._earlier.same_as(tidied.text, found.name) or tidied
            if isinstance(tidied, Unreadable):
                self.skipped.append(Skipped(found.file, found.row, tidied.reason, tidied.detail))
                continue
            self.left_out += tidied.left_out
            title = " ".join(clean(found.title or tidied.title).split())[:_LONGEST_TITLE]
            yield Article(number, tidied.text, title, found.file, found.row, found.fields)
            taken += 1
            if taken == self._limit:
                return

    def _texts(self) -> Iterator[_Found]:
        """All texts in order, with as many documents under way as the converter likes."""
        waiting: deque[Read] = deque()
        with self._converter:
            for source in self._sources:
                for read in self._open(source):
                    waiting.append(read)
                    while len(waiting) > self._converter.ahead:
                        yield from waiting.popleft()()
            for read in waiting:
                yield from read()

    def _open(self, source: str) -> Iterator[Read]:
        try:
            place = _place(source)
            there = place.exists()
        except Exception as error:  # a name too long, a ~user who is not there, whatever a store raises
            raise UserError(f"corpus {source!r} cannot be opened: {one_line(error)}") from error
        if "://" in source and not there:
            raise UserError(f"corpus {source!r}: there is no such file or folder, or it cannot be reached")
        folder, suffix = there and _is_folder(place), place.suffix.lower()
        if there and not folder and suffix not in KINDS and not _is_dataset(place):
            raise UserError(f"corpus {source!r}: files of this kind are not read; use {', '.join(KINDS)}")
        if there and not folder and (odd := _unfit(place)):
            raise UserError(f"corpus {source!r} cannot be read: {odd}")
        if not folder and not (there and suffix in {*TEXT, *MIME, ARCHIVE}):
            yield lambda: self._rows(place if there else source, place.name if there else source)
            return
        if not folder and not _read(place, 1):
            raise UserError(f"corpus {source!r} is an empty file")
        found = False
        for each in self._find(place, place.name or place.resolve().name, ()):
            found = found or not isinstance(each, Skipped)
            yield partial(self._pass_over, each) if isinstance(each, Skipped) else each
        if not found:
            kinds = ", ".join(KINDS)
            raise UserError(f"corpus {source!r} holds no saved dataset and no file of a kind that is read: {kinds}")

    def _pass_over(self, skipped: Skipped) -> Iterable[_Found]:
        self.skipped.append(skipped)
        return ()

    def _find(self, place: Place, name: str, above: tuple[str, ...]) -> Iterator[Read | Skipped]:
        """What is to be read of a file, or of a folder or archive and all in it, in the order of the names."""
        suffix = PurePosixPath(name).suffix.lower()
        try:
            if _is_folder(place):
                real = os.path.realpath(place) if isinstance(place, Path) else name
                inside = sorted(place.iterdir(), key=lambda each: str(each.name))
                for each in inside if real not in above else ():  # a link to a folder above would go on for ever
                    if not each.name.startswith((".", "~$", "__MACOSX")):
                        yield from self._find(each, f"{name}/{each.name}", (*above, real))
            elif suffix in KINDS and (odd := _unfit(place)):
                raise ValueError(odd)
            elif suffix == ARCHIVE and name.lower().count(f"{ARCHIVE}/") >= _DEEPEST:
                raise ValueError(f"more than {_DEEPEST} archives in each other")
            elif suffix == ARCHIVE:
                yield from self._find(zipfile.Path(zipfile.ZipFile(place.open("rb"))), name, above)
            elif suffix in ROWS or _is_dataset(place):
                yield lambda: self._rows_if_any(place, name)
            elif suffix in TEXT:
                text = _decoded(_read(place))
                yield lambda: [_Found(text, name, markdown=TEXT[suffix])]
            elif suffix in MIME:
                wait = self._converter.start(_read(place), suffix)
                yield lambda: [_document(wait, name)]
            else:
                yield Skipped(name, None, "files of this kind are not read")
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            unreadable = Unreadable("cannot be read", one_line(error, 120))
            yield lambda: [_Found(unreadable, name)]

    def _rows_if_any(self, place: Place, name: str) -> Iterator[_Found]:
        """The rows of a file in a folder, which may hold other files of rows too."""
        try:
            yield from self._rows(place, name)
        except UserError as error:
            self.skipped.append(Skipped(name, None, "no articles in it", one_line(error, 200)))

    def _rows(self, place: Place | str, name: str) -> Iterator[_Found]:
        with tempfile.TemporaryDirectory() as folder:
            source = place
            if not isinstance(place, (Path, str)):  # what is in an archive or a store; datasets reads files
                source = Path(folder) / place.name
                with place.open("rb") as packed, source.open("wb") as copy:
                    shutil.copyfileobj(packed, copy)
            named = (self._text, self._title) if self._title not in ("", TITLE) else (self._text,)
            advice = "name one with --text-field or --title-field"
            rows = read_rows(str(source), named, "train", "corpus", advice, further=True)
            for number, row in enumerate(rows):
                yield _Found(row, name, number) if isinstance(row, Unreadable) else self._found(row, name, number)

    def _found(self, row: dict[str, Any], name: str, number: int) -> _Found:
        title, values = row.get(self._title), {key: _value(value) for key, value in row.items()}
        fields = {
            key: value for key, value in values.items() if value is not None and key not in (self._text, self._title)
        }
        return _Found(row.get(self._text), name, number, title if isinstance(title, str) else "", fields)


class _Earlier:
    """The articles so far, by their texts."""

    def __init__(self, alike: float) -> None:
        self._alike = alike
        self._names: dict[bytes, str] = {}
        self._compared: list[tuple[str, rensa.RMinHash]] = []
        self._index = rensa.RMinHashLSH(threshold=alike, num_perm=_PERMUTATIONS, num_bands=_BANDS)

    def same_as(self, text: str, name: str) -> Unreadable | None:
        """Why a text is left out, with the earlier one; None where it is new, and then it is kept in mind."""
        digest = hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()
        if earlier := self._names.get(digest):
            return Unreadable("the same as an earlier one", earlier)
        self._names[digest] = name
        if self._alike:
            words = list(filter(None, (re.sub(r"[\W_]+", "", unit) for unit in units(text.lower()))))
            runs = [" ".join(words[at : at + _RUN]) for at in range(max(1, len(words) - _RUN + 1))]
            signature = rensa.RMinHash(num_perm=_PERMUTATIONS, seed=0)
            signature.update(runs)
            for number in self._index.query(signature):
                earlier, other = self._compared[number]
                if signature.jaccard(other) >= self._alike:
                    return Unreadable("nearly the same as an earlier one", earlier)
            self._index.insert(len(self._compared), signature)
            self._compared.append((name, signature))
        return None


def is_of_rows(source: str) -> bool:
    """Whether a source is a file of rows, a saved dataset or on the hub, and so may have a field of questions."""
    try:
        place = Path(source).expanduser()
        return not (_is_folder(place) or place.suffix.lower() in {*TEXT, *MIME, ARCHIVE})
    except (OSError, RuntimeError):
        return True  # why it is no path is told when it is read


def _named(file: str, row: int | None) -> str:
    return file if row is None else f"{file}, row {row}"


def _is_folder(place: Place) -> bool:
    """Whether a place holds others; a page on the web does not, even if it links to some."""
    return not str(place).startswith(("http://", "https://")) and place.is_dir() and not _is_dataset(place)


def _is_dataset(place: Place) -> bool:
    return isinstance(place, Path) and is_dataset(place)


def _unfit(place: Place) -> str:
    """Why a file is not to be read, in a few words: it is none that ends, or it is packed to swell; or nothing."""
    if isinstance(place, zipfile.Path):
        about = place.root.getinfo(place.at)
        swells = about.file_size > max(LARGEST, _SWELLING * about.compress_size)
        return f"unpacks to {about.file_size >> 20:,} MiB, {_SWELLING:,} times its size or more" if swells else ""
    special = isinstance(place, Path) and place.exists() and not place.is_file() and not _is_dataset(place)
    return "a pipe, a socket or a device" if special else ""


def _place(source: str) -> Place:
    if "://" not in source:
        return Path(source).expanduser()
    import upath  # takes a while: only for an address

    return upath.UPath(source)


def _read(place: Place, most: int = LARGEST) -> bytes:
    """The bytes of a file, of a larger one ``most`` of them. Raises ValueError where it is larger than all may be."""
    with place.open("rb") as file:
        data: bytes = file.read(most + 1)
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    return data


def _decoded(data: bytes) -> str | Unreadable:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Unreadable("not in UTF-8")


def _document(wait: Callable[[], tuple[str, str]], name: str) -> _Found:
    try:
        text, title = wait()
    except ValueError as error:
        return _Found(Unreadable("cannot be converted", str(error)), name)
    return _Found(text, name, title=title, markdown=True)


def _value(value: object) -> str | int | float | None:
    """A value that goes with the article into its pairs; None for what is no single value, or a long text."""
    if isinstance(value, datetime.date):
        return value.isoformat()
    short = isinstance(value, str) and len(value) <= _LONGEST_FIELD
    return clean(value) if isinstance(value, str) and short else value if isinstance(value, (int, float)) else None
