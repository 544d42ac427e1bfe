"""Prompts: their texts are data (``zh.toml``, ``en.toml``), the messages are made here (paper sections 3.2 and 3.4).

What varies comes last, so that a server's prefix cache serves the rest. The instruction goes into the first user turn,
because some chat templates have no system role. Text from a corpus is only ever concatenated, never formatted.
"""

import functools
import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo

from augcon.data import Example, Message
from augcon.errors import UserError, one_line
from augcon.text.units import Language

Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Labels(_Section):
    title: Text
    context: Text
    question: Text
    halves: tuple[Text, Text]
    focus: Text
    cut: Text
    answer: Text
    reference: Text
    grade: Text


class Instruction(_Section):
    instruction: Text


class WorkedExample(_Section):
    context: Text
    question: Text
    halves: tuple[str, str]


class Tree(Instruction):
    weak_instruction: Text
    question_instruction: Text
    examples: tuple[WorkedExample, ...] = Field(min_length=1)


class FocusExample(_Section):
    sentences: tuple[Text, ...]
    focus: tuple[int, int]  # the first and the last sentence that the question is about, from 1
    question: Text
    cut: int


class Focus(Instruction):
    weak_instruction: Text
    examples: tuple[FocusExample, ...] = Field(min_length=1)


class Judge(Instruction):
    scores: tuple[Text, Text, Text]
    compare_instruction: Text
    answers: tuple[Text, Text]
    verdict: Text
    verdicts: tuple[Text, Text, Text]  # the first is better, the second is, neither is


def _compile(pattern: str, info: ValidationInfo) -> re.Pattern[str]:
    """A pattern of the file, with its pieces in place. Raises ValueError if it does not compile."""
    try:
        whole = re.sub(r"\{([A-Z_]+)\}", lambda name: info.data["pieces"][name[1]], pattern)
        return re.compile(whole, re.IGNORECASE)
    except KeyError as error:
        raise ValueError(f"[checks.pieces] has no {error}") from error
    except (re.error, TypeError) as error:
        raise ValueError(f"not a regular expression: {error}") from error


Patterns = tuple[Annotated[re.Pattern[str], PlainValidator(_compile)], ...]


class Checks(_Section):
    model_config = ConfigDict(str_strip_whitespace=False)  # a space is part of a pattern

    pieces: dict[str, str]
    refusals: Patterns
    mentions: Patterns
    self_references: Patterns
    in_questions: Patterns
    subjects: tuple[Text, ...]


class Prompts(_Section):
    """The prompts of one language: the tables of its file, which says what each key means."""

    language: Language
    labels: Labels
    cst: Tree
    focus: Focus
    answer: Instruction
    checks: Checks
    grade: Instruction
    judge: Judge

    def line(self, label: str, content: str) -> str:
        """A labelled part of a prompt or reply."""
        return f"{label}{'：' if self.language == 'zh' else ': '}{content}"

    def cst_messages(
        self, context: str, title: str = "", *, weak: bool = False, examples: int | None = None
    ) -> list[Message]:
        """Asks for the query and the split of a context; the ``title`` of its article is shown above it.

        For the scorer's negatives, ``weak`` takes the weak instruction, ``examples`` only the first worked examples.
        """
        turns = []
        for example in self.cst.examples[:examples]:
            turns += [self._context(example.context), self.cst_reply(example.question, example.halves)]
        instruction = self.cst.weak_instruction if weak else self.cst.instruction
        return _turns(instruction, [*turns, self._context(context, title)])

    def question_messages(self, context: str, title: str = "") -> list[Message]:
        """Asks for the query alone, about a context that is too short to be split, after the shorter examples."""
        turns = []
        for example in self.cst.examples[-2:]:
            turns += [self._context(example.context), self.line(self.labels.question, example.question)]
        return _turns(self.cst.question_instruction, [*turns, self._context(context, title)])

    def cst_reply(self, question: str, halves: tuple[str, str]) -> str:
        """A reply in the form that the instruction asks for."""
        parts = zip((self.labels.question, *self.labels.halves), (question, *halves), strict=True)
        return "\n".join(self.line(label, content) for label, content in parts)

    def focus_messages(
        self,
        sentences: Sequence[str],
        first: int,
        end: int,
        title: str = "",
        *,
        weak: bool = False,
        examples: int | None = None,
    ) -> list[Message]:
        """Asks for the query about ``sentences[first:end]`` of a context and where to cut them; see ``cst_messages``.

        The context comes before what is asked of it, so that a prefix cache serves it for the whole tree.
        """
        turns = []
        for example in self.focus.examples[:examples]:
            begin, last = example.focus
            reply = (self.labels.question, example.question), (self.labels.cut, str(example.cut))
            turns += [self._numbered(example.sentences, begin - 1, last), "\n".join(self.line(*part) for part in reply)]
        instruction = self.focus.weak_instruction if weak else self.focus.instruction
        return _turns(instruction, [*turns, self._numbered(sentences, first, end, title)])

    def _numbered(self, sentences: Sequence[str], first: int, end: int, title: str = "") -> str:
        numbered = enumerate((re.sub(r"\n(?=\[\d+\])", "\n ", sentence.strip()) for sentence in sentences), 1)
        listed = "\n".join(f"[{number}] {sentence}" for number, sentence in numbered)
        focus = f"[{first + 1}]" if end - first == 1 else f"[{first + 1}]–[{end}]"
        return f"{self._context(listed, title)}\n\n{self.line(self.labels.focus, focus)}"

    def answer_messages(
        self, examples: Sequence[Example], context: str, question: str, focus: str = "", title: str = ""
    ) -> list[Message]:
        """Asks for an answer: the instruction, the examples, then the context and the question.

        ``focus`` is the part of the context that the question is about; it is left out where it is the whole.
        """
        turns = []
        for example in examples:
            turns += [self._ask(example.context, example.question), self._harmless(example.answer)]
        return _turns(self.answer.instruction, [*turns, self._ask(context, question, focus, title)])

    def reading(self, context: str, question: str) -> str:
        """A question under the passage that it is about, as the user's turn for a model that learns to read."""
        return self._ask(context, question)

    def grade_messages(self, context: str, question: str, reference: str, answer: str) -> list[Message]:
        """Asks for a grade of an answer against the reference answer."""
        answers = self._lines((self.labels.reference, reference), (self.labels.answer, answer))
        return _turns(self.grade.instruction, [f"{self._ask(context, question)}\n\n{answers}"])

    def judge_messages(self, question: str, answer: str) -> list[Message]:
        """Asks the judge for its three grades of an answer."""
        asked = self._lines((self.labels.question, question), (self.labels.answer, answer))
        return _turns(self.judge.instruction, [asked])

    def compare_messages(self, question: str, first: str, second: str) -> list[Message]:
        """Asks the judge which of two answers is better."""
        answers = zip(self.judge.answers, (first, second), strict=True)
        return _turns(self.judge.compare_instruction, [self._lines((self.labels.question, question), *answers)])

    def cst_pattern(self, max_length: int) -> str:
        """What replies to ``cst_messages`` match, for contexts of up to ``max_length`` units."""
        # A half has at most twice the characters of the longest context, ten to an English word.
        half = rf"[^\n].{{0,{2 * max_length * (1 if self.language == 'zh' else 10)}}}"
        first, second = map(_literal, self.labels.halves)
        return r"\n".join([self.question_pattern(), self.line(first, half), self.line(second, f"({half})?")])

    def question_pattern(self) -> str:
        """What such replies match if they end after the question."""
        longest = 120 if self.language == "zh" else 300
        return self.line(_literal(self.labels.question), rf"[^\n]{{5,{longest}}}")

    def focus_pattern(self) -> str:
        """What replies to ``focus_messages`` match."""
        return r"\n".join([self.question_pattern(), self.line(_literal(self.labels.cut), "[0-9]{1,3}")])

    def grade_pattern(self) -> str:
        """What replies to ``grade_messages`` match."""
        return self.line(_literal(self.labels.grade), "([1-9]|10)")

    def judge_pattern(self) -> str:
        """What replies to ``judge_messages`` match."""
        return r"\n".join(self.line(_literal(score), "[1-5]") for score in self.judge.scores)

    def compare_pattern(self) -> str:
        """What replies to ``compare_messages`` match."""
        return self.line(_literal(self.judge.verdict), f"({'|'.join(map(_literal, self.judge.verdicts))})")

    def end_of_question(self) -> tuple[str, ...]:
        """Stop strings after the question, for when what follows is not needed."""
        return tuple(f"\n{label}{colon}" for label in (self.labels.halves[0], self.labels.cut) for colon in "：:")

    def end_of_reply(self) -> tuple[str, ...]:
        """Stop strings for the completions endpoint, where a model goes on with another example."""
        return (f"\n\n{self._context('')}",)

    def tree_digest(self, split: Literal["rewrite", "focus"]) -> str:
        """A digest of what trees are asked with, and their questions checked."""
        return _digest(self.labels, self.focus if split == "focus" else self.cst, *all_checks())

    def answer_digest(self) -> str:
        """A digest of what answers are asked, checked and graded with."""
        return _digest(self.labels, self.answer, self.grade, *all_checks())

    def _context(self, context: str, title: str = "") -> str:
        """A text, below its title unless it holds that itself."""
        above = f"{self.line(self.labels.title, self._harmless(title))}\n\n" if title and title not in context else ""
        return f"{above}{self.line(self.labels.context, '').rstrip()}" + self._harmless("\n" + context)

    def _lines(self, *parts: tuple[str, str]) -> str:
        return "\n\n".join(self.line(label, self._harmless(content)) for label, content in parts)

    def _harmless(self, text: str) -> str:
        """A text that can be inserted: without control marks, and without paragraphs that begin as a part of a prompt.

        A base model would take those for the next example, and a judge for another answer. A space sets them off.
        """
        one_each = self.labels.model_dump(exclude={"halves"}).values()
        parts = "|".join(map(re.escape, (*one_each, *self.labels.halves, *self.judge.answers)))
        return re.sub(rf"(?:\A|(?<=\n\n))(?=(?:{parts})[:：])", " ", disarm(text))

    def _ask(self, context: str, question: str, focus: str = "", title: str = "") -> str:
        part = [(self.labels.focus, focus)] if focus.strip() not in ("", context.strip()) else []
        return f"{self._context(context, title)}\n\n{self._lines(*part, (self.labels.question, question))}"


def _turns(instruction: str, turns: list[str]) -> list[Message]:
    contents = [f"{instruction}\n\n{turns[0]}", *turns[1:]]
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _literal(label: str) -> str:
    """A label as a regular expression; unlike ``re.escape``, it leaves spaces alone, as grammars require."""
    return re.sub(r"([^\w\s])", r"\\\1", label)


def _digest(*sections: _Section) -> str:
    whole = "\n".join(section.model_dump_json() for section in sections)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def as_text(messages: list[Message]) -> str:
    """A prompt as one text, for the completions endpoint of a base model."""
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


# Servers take such marks in a message for the real ones: a text could end its own turn and speak as the system, or open
# a thinking block. A space inside makes them plain text. Marks that no turn, role or tool begins or ends with, such as
# [MASK] or <filename>, are left: texts use them for other things.
_TEMPLATE_MARK = re.compile(
    r"<(?=[|｜]|[a-z_]{1,30}\|>|</?SYS>>|/?(?:"
    r"s|bos|eo[adhps]|sop|pad|unk|think|thinking|tool_(?:call|response)s?|(?:start|end|begin(?:ning)?)_of_[a-z_]{1,30}"
    r"|fim_[a-z]{1,10}|file_sep|repo_name|(?:unused|reserved_|extra_id_|SPECIAL_)\d{1,4}|(?:BOS|EOS|EOP)_TOKEN"
    r"|(?:seed|minimax):[a-z_]{1,30})>)"
    r"|\[(?=/?(?:INST|THINK|TOOL_(?:CALLS|RESULTS|CONTENT)|AVAILABLE_TOOLS|SYSTEM_PROMPT|MODEL_SETTINGS|[gs]MASK"
    r"|BOS|EOS|EOT|unused\d{1,4}|\|[a-z]{1,20}\|)\]|e~\[)"
    r"|\](?=~!?b[\[\]]|<\])"
)


def disarm(text: str) -> str:
    """The text with the control marks of chat templates made harmless."""
    return _TEMPLATE_MARK.sub(lambda mark: f"{mark.group()} ", text)


_FOLDER = Path(__file__).parent


def prompts_file(language: Language) -> Path:
    """The file that holds the prompts of a language."""
    return _FOLDER / f"{language}.toml"


@functools.cache
def load_prompts(language: Language) -> Prompts:
    """The prompts of a language, read from its file. Raises UserError, with the key, if the file is faulty."""
    path = prompts_file(language)
    try:
        return Prompts.model_validate({**tomllib.loads(path.read_text("utf-8")), "language": language})
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as prompts: {one_line(error)}") from error


def all_checks() -> list[Checks]:
    """The checks of every language: an answer may be in any. Raises UserError like ``load_prompts``."""
    return [load_prompts(language).checks for language in get_args(Language)]
