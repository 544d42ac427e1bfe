"""Documents (PDF, DOCX, HTML, EPUB) as Markdown, each converted in another process, which may crash or hang."""

import concurrent.futures
import html
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from augcon.errors import one_line
from augcon.text.units import length

MIME = {
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".epub": "application/epub+zip",
}
_MOST_SECONDS = 300.0  # for one document
# What the converter writes above the text of an HTML page, with its last line as a heading, or of a chapter of an EPUB.
_HEAD = re.compile(r"\A---\n(?:[\w-]+: .*\n)*\n*## [\w-]+: .*\n|^---\n(?:[\w-]+: .*\n)+---\n", re.MULTILINE)
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])|(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)  # code has none
# What the converter takes for ligatures of a damaged font, in PDFs where it is none; its plain text has them right.
_MISREAD = {"#": "fi", "*": "tt", ":": "ti", "!": "fi", "M": "tti"}
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
_PAGE_NUMBER = re.compile(r"[\s|*#]*(?:\d{1,4}|[ivxlc]{1,6})[\s|*]*", re.IGNORECASE)
_WITH_PAGE = re.compile(r"[\s*#]*\d{1,4}\s+\D|.*\D\s+\d{1,4}[\s*]*$")
_HEADER, _LONGEST = 15, 200  # most units and characters of a line at the top or the bottom of a page
_NO_TITLE = re.compile(r"untitled.*|.*\.(?:docx?|tex|indd|pdf|html?)|microsoft .*|\W*", re.IGNORECASE)


class Converter:
    """Converts documents side by side; a context manager. ``ahead`` is how many should be under way."""

    def __init__(self) -> None:
        self.ahead = 2 * (os.cpu_count() or 1)
        self._pool: Any = None

    def __enter__(self) -> "Converter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.stop()
            self._pool.join()

    def start(self, data: bytes, suffix: str) -> Callable[[], tuple[str, str]]:
        """Begins to convert a document; the function returned waits for its text and title.

        It raises ValueError, with the reason in a few words, where that cannot be done.
        """
        import pebble  # only for those who have documents

        if self._pool is None:  # a process that is forked would share the locks of this one's threads
            context = multiprocessing.get_context("spawn")
            self._pool = pebble.ProcessPool(max_workers=os.cpu_count() or 1, context=context)
        future = self._pool.schedule(convert, args=(data, suffix), timeout=_MOST_SECONDS)

        def wait() -> tuple[str, str]:
            try:
                text, title = future.result()
                return str(text), str(title)
            except concurrent.futures.TimeoutError as error:
                raise ValueError(f"not converted in {_MOST_SECONDS:.0f} s") from error
            except pebble.ProcessExpired as error:
                raise ValueError("crashes the converter") from error

        return wait


def convert(data: bytes, suffix: str) -> tuple[str, str]:
    """The text of a document in Markdown and its title, "" where it has none. Raises ValueError as ``Converter``."""
    import kreuzberg

    config: dict[str, Any] = {
        "use_cache": False,
        "disable_ocr": True,  # it would download models
        "output_format": "markdown",
        "content_filter": kreuzberg.ContentFilterConfig(),  # no headers, footers and watermarks
        "html_options": {"preprocessing": {"enabled": True, "preset": "aggressive", "remove_navigation": True}},
    }
    try:
        found = kreuzberg.extract_bytes_sync(data, MIME[suffix], config=kreuzberg.ExtractionConfig(**config))
    except kreuzberg.KreuzbergError as error:
        encrypted = "password" in str(error).lower()
        raise ValueError("needs a password" if encrypted else f"damaged: {one_line(error, 80)}") from error
    text = found.content
    if suffix not in {".pdf", ".docx"}:
        text = _HEAD.sub("", text)
    text = _ESCAPE.sub(lambda found: found[1] or found[2], text)
    if suffix == ".pdf":
        config["output_format"] = "plain"
        plain = kreuzberg.extract_bytes_sync(data, MIME[suffix], config=kreuzberg.ExtractionConfig(**config))
        text = without_page_lines(with_marks(text, plain.content))
        if not text.strip():
            raise ValueError("no text in it, perhaps scanned")
    title = html.unescape(str(found.metadata.get("title") or "")).strip()
    return text, "" if _NO_TITLE.fullmatch(title) else title


def with_marks(text: str, plain: str) -> str:
    """The text of a PDF with the marks that were taken for ligatures, found by the words of its ``plain`` text."""
    words = set(plain.translate(_STRAIGHT).split())
    marked: dict[str, str] = {}
    for word in words:
        for mark in _MISREAD.keys() & set(word):
            marked.setdefault(word.replace(mark, _MISREAD[mark]), word)
    return re.sub(r"\S+", lambda found: found[0] if found[0] in words else marked.get(found[0], found[0]), text)


def without_page_lines(text: str) -> str:
    """The text of a PDF without lines that are page numbers, and without headings repeated with a page number."""
    lines = text.split("\n")
    short = [line if line.strip() and len(line) <= _LONGEST and length(line) <= _HEADER else "" for line in lines]
    repeated = Counter(map(_letters, short))
    return "\n".join(
        line
        for line, header in zip(lines, short, strict=True)
        if not header
        or not (_PAGE_NUMBER.fullmatch(header) or (_WITH_PAGE.match(header) and repeated[_letters(header)] > 1))
    )


def _letters(line: str) -> str:
    return re.sub(r"[\W\d_]+", "", line).lower()
