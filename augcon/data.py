"""The nouns of AugCon, named as in the paper: what goes from one part to the next.

Lengths are in AugCon's unit: one per CJK character, one per run of other non-space characters.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Literal

Message = dict[str, str]  # "role" and "content"
Outcome = Literal["done", "too short", "not shorter", "hallucinated", "loses text", "not parseable", "failed"]
Fate = Literal["kept", "alike", "alike elsewhere", "over quota"]


@dataclasses.dataclass(frozen=True, slots=True)
class Article:
    """A text of the corpus, cleaned; ``number`` is its place among all rows and files, from 0.

    ``title`` may be empty. ``file`` is where it is from, ``row`` its number there, from 0, if it has several;
    ``fields`` are what else the row holds, for its pairs.
    """

    number: int
    text: str
    title: str = ""
    file: str = ""
    row: int | None = None
    fields: dict[str, str | int | float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class RootContext:
    """A continuous chunk of an article, from which trees grow.

    ``article`` is the row in the corpus; ``start`` and ``end`` are offsets in characters in the cleaned article, so
    that the contexts of an article, joined in order, give back its text. ``quota`` is the number of pairs wanted.
    ``title`` is the article's, which goes with the context wherever a model is asked about it.
    """

    root: int
    article: int
    start: int
    end: int
    length: int
    quota: int
    text: str
    title: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """A question about a context. ``id`` is ``root:pass:path``, made by the tree, and stays with the query.

    ``path`` leads from the root context to the node: "" is the root itself, "12" the second half of the first.
    A query that a person added to a file of queries has the id ``root:added:digest``.
    """

    id: str
    root: int
    context: str
    text: str

    @property
    def pass_number(self) -> int | None:
        """Which tree over the root context it came from, from 0; None for one added by hand."""
        pass_number = self.id.split(":")[1]
        return int(pass_number) if pass_number.isdecimal() else None

    @property
    def path(self) -> str | None:
        """The path of its node; None for one added by hand."""
        return None if self.pass_number is None else self.id.rpartition(":")[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A reply about a context: the query, and the context in two halves, of which the second may be empty."""

    query: str
    halves: tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node of a tree and what became of it.

    ``query`` is None where the context was not asked (too short), where no query could be had (not parseable, failed)
    or where it is a copy of the one above. "done": there is nothing wrong with the halves, which are nodes too, or
    nothing to split. "not shorter", "hallucinated", "loses text": the query is kept, the halves are not. ``detail``
    gives the reason, ``tries`` the number of replies, ``doubt`` what is wrong with the query, such as names that the
    context lacks.
    """

    root: int
    pass_number: int
    path: str
    context: str
    query: str | None
    outcome: Outcome
    detail: str = ""
    tries: int = 0
    doubt: str = ""

    @property
    def id(self) -> str:
        """The id of the node and of its query."""
        return f"{self.root}:{self.pass_number}:{self.path}"

    @property
    def queries(self) -> list[Query]:
        """The query of this node, or none."""
        return [] if self.query is None else [Query(self.id, self.root, self.context, self.query)]


@dataclasses.dataclass(frozen=True, slots=True)
class ScorerPair:
    """A query of a tree and a worse one for the same context; ``type`` says how the worse one was made.

    ``id`` and ``root`` are those of the better query.
    """

    context: str
    pos_query: str
    neg_query: str
    type: str
    root: int
    id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A context, a question and its answer, written by a person."""

    context: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What came of a query: the answer, or None with the reason and the last reply; ``tries`` counts replies."""

    query: Query
    text: str | None
    tries: int
    reason: str = ""
    reply: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer: a row of SFT data or of a model's outputs."""

    question: str
    answer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Grades:
    """What a judge thinks of an answer; each from 1 to 5."""

    relevance: int
    accuracy: int
    satisfaction: int


# Asking the LLM


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is asked: messages, sampling parameters, and ``sample``, the number of this draw of them.

    ``max_tokens`` limits the reply. ``end`` are stop strings, ``text_end`` further ones for the completions endpoint,
    where a model would go on with a turn of its own. ``pattern`` is a regular expression that the reply should
    match; the server may hold it to that. ``root`` is the root context that it is about: earlier ones are asked about
    first, and requests about the same one go to the same server. ``unusable`` are the replies so far that were of no
    use, each after the reason.
    """

    messages: list[Message]
    temperature: float
    max_tokens: int
    sample: int = 0
    end: tuple[str, ...] = ()
    text_end: tuple[str, ...] = ()
    pattern: str | None = None
    root: int | None = None
    unusable: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What came back, and what it took: the tokens of the prompt, those of them in the server's cache, those written.

    ``complete`` is false when the server cut it off (``finish_reason`` "length").
    """

    text: str
    complete: bool
    prompt_tokens: int = dataclasses.field(default=0, compare=False)
    cached_tokens: int = dataclasses.field(default=0, compare=False)
    written_tokens: int = dataclasses.field(default=0, compare=False)


Ask = Callable[[Request], Awaitable[Reply]]
TOO_LONG = "context too long for the model"  # why a request is refused


class Refused(Exception):
    """The server will never answer this one request; the message says why. Other requests go on."""
