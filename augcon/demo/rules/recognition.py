"""Which of AugCon's prompts a request is, and its parts."""

import dataclasses
import re
from typing import Literal

from augcon.errors import UserError
from augcon.text import units as text
from augcon.text.prompts import Message, Prompts, load_prompts, prompts_file
from augcon.text.units import Language

_LANGUAGES: tuple[Language, ...] = ("zh", "en")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a prompt asks for.

    ``last`` is its last turn, without the instruction; ``fixed`` all that comes before; ``examples`` are the
    replies shown in it.
    """

    kind: Literal["tree", "weak tree", "answer", "grade", "judge", "compare", "other"]
    prompts: Prompts
    fixed: str
    examples: tuple[str, ...]
    last: str


def recognise(messages: list[Message]) -> Task:
    """Finds out which of AugCon's prompts this is, and its parts."""
    turns = [message["content"] for message in messages if message["role"] not in ("system", "developer")] or [""]
    if len(turns) % 2 == 0:  # the last one is the assistant's own
        turns.pop()
    kind, prompts, instruction = _instruction(turns[0])
    if kind == "other":
        return Task(kind, prompts, "\n\n".join(turns[:-1]), (), turns[-1])
    if len(turns) == 1:
        return Task(kind, prompts, instruction, (), turns[0][len(instruction) :].removeprefix("\n\n"))
    return Task(kind, prompts, "\n\n".join(turns[:-1]), tuple(turns[1::2]), turns[-1])


def _instruction(prompt: str) -> tuple[str, Prompts, str]:
    """The instruction that a prompt begins with: its kind, language and text."""
    for language in _LANGUAGES:
        prompts = _prompts_now(language)
        instructions = {
            "tree": prompts.cst_instruction,
            "weak tree": prompts.weak_instruction,
            "answer": prompts.answer_instruction,
            "grade": prompts.grade_instruction,
            "judge": prompts.judge.instruction,
            "compare": prompts.judge.compare_instruction,
        }
        for kind, instruction in instructions.items():
            if prompt.startswith(instruction):
                return kind, prompts, instruction
    return "other", _prompts_now(text.language(prompt[:2000])), ""


_read: dict[Language, tuple[int, Prompts]] = {}


def _prompts_now(language: Language) -> Prompts:
    """The prompts as their file stands: users edit it while the engine runs. A broken edit leaves the old ones."""
    changed = prompts_file(language).stat().st_mtime_ns
    if language not in _read or _read[language][0] != changed:
        try:
            _read[language] = changed, load_prompts.__wrapped__(language)
        except UserError:
            if language not in _read:
                raise
    return _read[language][1]


def turns_of(prompt: str) -> list[Message]:
    """The turns of a prompt that was given as one text."""
    kind, prompts, instruction = _instruction(prompt)
    prompt = prompt.removesuffix("\n\n")
    if kind == "answer":
        turns = _answer_turns(prompt, prompts)
    elif kind in ("tree", "weak tree"):
        head, rest, turns = f"{instruction}\n\n", prompt[len(instruction) :].removeprefix("\n\n"), []
        for example in prompts.examples:
            reply = prompts.cst_reply(example.question, example.halves)
            shown = f"{context_label(prompts)}{example.context}"
            if not rest.startswith(f"{shown}\n\n{reply}\n\n"):
                break
            turns += [head + shown, reply]
            head, rest = "", rest[len(f"{shown}\n\n{reply}\n\n") :]
        turns.append(head + rest)
    else:
        turns = [prompt]
    return [{"role": "user", "content": turn} for turn in turns]


def _answer_turns(prompt: str, prompts: Prompts) -> list[str]:
    """Question turns and answers by turns. A piece without a question is part of the next one's context."""
    asks = f"\n\n{prompts.line(prompts.labels.question, '')}"
    turns, turn = [], ""
    for piece in re.split(f"\n\n(?={re.escape(context_label(prompts))})", prompt):
        turn += ("\n\n" if turn else "") + piece
        _before, mark, rest = piece.rpartition(asks)
        _question, _, answer = rest.partition("\n\n")
        if mark and answer:
            turns += [turn.removesuffix(f"\n\n{answer}"), answer]
            turn = ""
    return [*turns, turn]


def context_label(prompts: Prompts) -> str:
    """What stands before a context."""
    return prompts.line(prompts.labels.context, "").rstrip() + "\n"
