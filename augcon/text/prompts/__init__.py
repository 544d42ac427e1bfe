"""Prompts: the text is data (``zh.toml``, ``en.toml``), the messages are made here (paper section 3.2, 3.4).

In every prompt the fixed part comes first and what varies comes last, so that a server's prefix cache
serves the fixed part. Instructions go into the first user turn, because some chat templates have no
system role. What comes from a corpus is only ever concatenated, never formatted.
"""

import dataclasses
import functools
import hashlib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from augcon.errors import UserError
from augcon.text.units import Language

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Labels:
    """The words that name the parts of prompts and replies."""

    context: str
    question: str
    halves: tuple[str, str]
    answer: str
    reference: str
    grade: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A worked example of the Context-Split-Tree: a context, its question and its two halves."""

    context: str
    question: str
    halves: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Judge:
    """The prompts of the judge, and the words of its replies."""

    instruction: str
    scores: tuple[str, str, str]
    compare_instruction: str
    answers: tuple[str, str]
    verdict: str
    verdicts: tuple[str, str, str]  # the first is better, the second, neither


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one language."""

    language: Language
    colon: str
    labels: Labels
    cst_instruction: str
    weak_instruction: str
    examples: tuple[Example, ...]
    answer_instruction: str
    grade_instruction: str
    judge: Judge

    def line(self, label: str, content: str) -> str:
        """A labelled part of a prompt or reply."""
        return f"{label}{self.colon}{content}"

    def cst_messages(self, context: str, *, weak: bool = False, examples: int | None = None) -> list[Message]:
        """Asks for the query and the split of a context: I_CST, E_CST, then the context.

        ``weak`` puts the weaker instruction in the instruction's place and ``examples`` keeps only the
        first ones: the variants that the scorer's negatives come from.
        """
        return [*_cst_fixed_part(self, weak, examples), {"role": "user", "content": self._context(context)}]

    def cst_reply(self, question: str, halves: tuple[str, str]) -> str:
        """A reply in the form that the instruction asks for."""
        parts = zip((self.labels.question, *self.labels.halves), (question, *halves), strict=True)
        return "\n".join(self.line(label, content) for label, content in parts)

    def answer_messages(self, examples: list[tuple[str, str, str]], context: str, question: str) -> list[Message]:
        """Asks for an answer: I_R with its principles, (context, question, answer) examples, (C, q)."""
        turns = []
        for example_context, example_question, answer in examples:
            turns += [self._ask(example_context, example_question), answer]
        return _turns(self.answer_instruction, [*turns, self._ask(context, question)])

    def grade_messages(self, context: str, question: str, reference: str, answer: str) -> list[Message]:
        """Asks for a grade of an answer against the reference answer."""
        answers = self._lines([(self.labels.reference, reference), (self.labels.answer, answer)])
        return _turns(self.grade_instruction, [f"{self._ask(context, question)}\n\n{answers}"])

    def judge_messages(self, question: str, answer: str) -> list[Message]:
        """Asks the judge for its three grades of an answer."""
        parts = (self.labels.question, question), (self.labels.answer, answer)
        return _turns(self.judge.instruction, [self._lines(parts)])

    def compare_messages(self, question: str, first: str, second: str) -> list[Message]:
        """Asks the judge which of two answers is better."""
        parts = (self.labels.question, question), *zip(self.judge.answers, (first, second), strict=True)
        return _turns(self.judge.compare_instruction, [self._lines(parts)])

    def judge_pattern(self) -> str:
        """A regular expression of well-formed replies to ``judge_messages``."""
        return r"\n".join(self.line(_literal(score), "[1-5]") for score in self.judge.scores)

    def compare_pattern(self) -> str:
        """The same for ``compare_messages``."""
        return self.line(_literal(self.judge.verdict), f"({'|'.join(map(_literal, self.judge.verdicts))})")

    def cst_pattern(self, max_length: int) -> str:
        """A regular expression of well-formed replies, for servers that can be held to one.

        Halves are bounded at twice the longest context (in characters; ten to an English word); the second
        may be empty.
        """
        half = rf"[^\n].{{0,{2 * max_length * (1 if self.language == 'zh' else 10)}}}"
        first, second = map(_literal, self.labels.halves)
        return r"\n".join([self.question_pattern(), self.line(first, half), self.line(second, f"({half})?")])

    def question_pattern(self) -> str:
        """The same for a reply that ends after the question."""
        longest = 120 if self.language == "zh" else 300
        return self.line(_literal(self.labels.question), rf"[^\n]{{5,{longest}}}")

    def grade_pattern(self) -> str:
        """The same for a grade from 1 to 10."""
        return self.line(_literal(self.labels.grade), "([1-9]|10)")

    def end_of_question(self) -> tuple[str, ...]:
        """Stop strings after the question, where the halves are not needed."""
        return tuple(f"\n{self.labels.halves[0]}{colon}" for colon in "：:")

    def end_of_reply(self) -> tuple[str, ...]:
        """Stop strings of the completions endpoint, where a model goes on with a further example."""
        return (f"\n\n{self._context('')}",)

    def cst_digest(self) -> str:
        """A digest of what the Context-Split-Tree asks with, so that results of other prompts are not mixed."""
        parts = (self.labels, self.cst_instruction, self.weak_instruction, self.examples)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def answer_digest(self) -> str:
        """The same of what answers are asked and graded with."""
        parts = (self.labels, self.answer_instruction, self.grade_instruction)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _context(self, context: str) -> str:
        return f"{self.labels.context}{self.colon.strip()}\n{disarm(context)}"

    def _lines(self, parts: Iterable[tuple[str, str]]) -> str:
        return "\n\n".join(self.line(label, disarm(content)) for label, content in parts)

    def _ask(self, context: str, question: str) -> str:
        return f"{self._context(context)}\n\n{self.line(self.labels.question, disarm(question))}"


def _turns(instruction: str, turns: list[str]) -> list[Message]:
    """Turns of user and assistant by turns, the instruction at the head of the first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[0]["content"] = f"{instruction}\n\n{turns[0]}"
    return messages


@functools.cache
def _cst_fixed_part(prompts: Prompts, weak: bool, examples: int | None) -> list[Message]:
    turns = []
    for example in prompts.examples[:examples]:
        turns += [prompts._context(example.context), prompts.cst_reply(example.question, example.halves)]
    return _turns(prompts.weak_instruction if weak else prompts.cst_instruction, turns)


def _literal(label: str) -> str:
    """A label as a regular expression; unlike ``re.escape`` it leaves spaces alone, as grammars need."""
    return re.sub(r"([^\w\s])", r"\\\1", label)


def as_text(messages: list[Message]) -> str:
    """The same prompt as one text, for the completions endpoint of a base model."""
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


# Servers turn special tokens that stand in a message into the real ones: a text that contains them could
# end its own turn and speak as the system, or open a thinking block. A space inside makes them plain text.
_TEMPLATE_MARK = re.compile(
    r"<(?=[|｜]|<SYS>>|/?(?:s|bos|eos|pad|unk|think|thinking|start_of_turn|end_of_turn|tool_call)>)"
    r"|\[(?=/?(?:INST|THINK|TOOL_CALLS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\])"
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
    """The prompts of a language, read from its file. Raises UserError where the file was edited amiss."""
    path = prompts_file(language)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        _check_texts(data, "")
        cst = data["cst"]
        prompts = Prompts(
            language=language,
            colon="：" if language == "zh" else ": ",
            labels=Labels(**{**data["labels"], "halves": _texts(data["labels"], "halves", 2)}),
            cst_instruction=cst["instruction"].strip(),
            weak_instruction=cst["weak_instruction"].strip(),
            examples=tuple(
                Example(example["context"].strip(), example["question"].strip(), _texts(example, "halves", 2))
                for example in cst["examples"]
            ),
            answer_instruction=data["answer"]["instruction"].strip(),
            grade_instruction=data["grade"]["instruction"].strip(),
            judge=Judge(
                instruction=data["judge"]["instruction"].strip(),
                scores=_texts(data["judge"], "scores", 3),
                compare_instruction=data["judge"]["compare_instruction"].strip(),
                answers=_texts(data["judge"], "answers", 2),
                verdict=data["judge"]["verdict"],
                verdicts=_texts(data["judge"], "verdicts", 3),
            ),
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing; restore it") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as prompts: {error}") from error
    if not prompts.examples:
        raise UserError(f"{path}: [[cst.examples]] is empty; give at least one")
    return prompts


def _check_texts(value: object, key: str) -> None:
    """Raises ValueError, with the key, where a text is missing or is none; the half of an example may be empty."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _check_texts(inner, key)
    elif not isinstance(value, str) or not (value.strip() or key == "cst.examples.halves"):
        raise ValueError(f"{key} must be a text, not {value!r}")


def _texts(section: dict[str, list[str]], key: str, number: int) -> tuple[str, ...]:
    texts = section[key]
    if not isinstance(texts, list) or len(texts) != number:
        raise ValueError(f"{key} must be a list of {number} texts, not {texts!r}")
    return tuple(text.strip() for text in texts)
