"""What an article holds besides its text: front matter, tables of contents, navigation, links. Linear in the text."""

import dataclasses
import html
import itertools
import re
from collections import Counter
from collections.abc import Iterator

from augcon.text.units import length

# "---", then lines of "key: value" or their continuation, then "---" or "...", as YAML; TOML has "+++" instead.
_FRONT_MATTER = re.compile(
    r"\A\s*+(?:---[ \t]*\n(?P<yaml>(?:(?>[\w-]+[ \t]*:.*|[ \t]+\S.*|-[ \t].*|#.*|[ \t]*)\n){1,200}?)(?:---|\.\.\.)"
    r"|\+\+\+[ \t]*\n(?P<toml>(?:.*\n){1,200}?)\+\+\+)[ \t]*(?:\n|\Z)"
)
_TITLE = re.compile(r"^title[ \t]*[:=](.*)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t](.*)", re.MULTILINE)
_DOTS = re.compile(r"(?:[.·…][ \t|]*){5,}(?:\d+[ \t|]*|\|[ \t|]*)$|(?:…[ \t]*){2,}\d+[ \t]*$")  # Start . . . . . 5
_ENDS_IN_NUMBER = re.compile(r"\D[\s|.]*\d{1,4}[ \t|]*$")
_CONTENTS = re.compile(r"[\s#*|]*(?:table of contents|contents|目\s*[录錄次])[\s*:：|]*", re.IGNORECASE)
_IMAGE = re.compile(r"!\[[^\[\]\n]*\]\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"\n]*\")?\)")
_LINK = re.compile(r"\[(?P<text>[^\[\]\n]*)\]\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"\n]*\")?\)")
_PERMALINK = re.compile(r"\[(?:¶|#|§|🔗)?\]\([^()\s]*(?:\s+\"[^\"\n]*\")?\)")
_IN_LIST = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])?[ \t]*")
_LONGEST_ENTRY = 30  # units in a line of a table of contents
_END = 200  # characters at the end of a line in which its dots and page number are looked for
_MENU = 4  # lines of nothing but links, in a row, from which they are navigation


@dataclasses.dataclass(frozen=True, slots=True)
class Tidied:
    """A text with what is no text left out of it, the title that it gave itself, and the lines left out, by kind."""

    text: str
    title: str
    left_out: Counter[str]


def tidy(text: str, *, markdown: bool) -> Tidied:
    """Leaves out front matter and tables of contents and, of Markdown, menus and the targets of links, and images."""
    left_out: Counter[str] = Counter()
    title = ""
    if found := _FRONT_MATTER.match(text):
        front = found["yaml"] or found["toml"]
        title = given[1].strip(" \t\"'") if (given := _TITLE.search(front)) else ""
        left_out["front matter"] = front.count("\n") + 2
        text = text[found.end() :]
    lines = text.split("\n")
    if markdown:
        lines = list(_without_menus(lines, left_out))
    text = "\n".join(_without_contents(lines, left_out))
    if markdown:
        title = title or ((heading := _HEADING.search(text)) and _unlinked(heading[1]).strip(" \t#*")) or ""
        text = re.sub(r"\n{3,}", "\n\n", _unlinked(text))
    return Tidied(text, html.unescape(title), left_out)


def _unlinked(text: str) -> str:
    """The text with links as their words, without images and the marks that link to a heading."""
    return _LINK.sub(r"\g<text>", _PERMALINK.sub("", _IMAGE.sub("", text)))


def _without_menus(lines: list[str], left_out: Counter[str]) -> Iterator[str]:
    for only_links, group in itertools.groupby(lines, _only_links):
        run = list(group)
        links = sum(bool(_LINK.search(line)) for line in run) if only_links else 0
        if links < _MENU:
            yield from run
        else:
            left_out["navigation"] += links


def _only_links(line: str) -> bool:
    """Whether a line has nothing besides links; a blank line has not."""
    return not _LINK.sub("", _IMAGE.sub("", _IN_LIST.sub("", line))).strip(" \t|·»›>/")


def _without_contents(lines: list[str], left_out: Counter[str]) -> Iterator[str]:
    """Leaves out lines with dot leaders, those between them, and those below "Contents" that end in a page number."""
    at = 0
    while at < len(lines):
        line = lines[at]
        heading = _CONTENTS.fullmatch(line)
        if not heading and not _DOTS.search(line[-_END:]):
            yield line
            at += 1
            continue
        end = entries = 0
        for place in range(at, len(lines)):
            if place > at + end + 3:  # that far behind the last entry, the text has begun
                break
            tail = lines[place][-_END:]
            listed = place > at and not tail.startswith("#") and _ENDS_IN_NUMBER.search(tail)
            if _DOTS.search(tail) or (listed and ("|" in tail or length(tail) <= _LONGEST_ENTRY)):
                end, entries = place - at, entries + 1
        if entries >= (2 if heading else 3):
            left_out["table of contents"] += entries + bool(heading)
            at += end + 1
        else:
            yield line
            at += 1
