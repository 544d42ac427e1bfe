"""Pairs as the rows that trainers read, and the user's own chat data, which comes in rows of the same kinds."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from augcon.method.pairs import Sample
from augcon.run.rows import Row, Unreadable, read_rows
from augcon.text.prompts import disarm, load_prompts
from augcon.text.units import Language, clean

Format = Literal["messages", "alpaca", "sharegpt", "pairs"]
_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}  # of the roles, in ShareGPT's form
_ROLES = {**{name: role for role, name in _NAMES.items()}, **{role: role for role in _NAMES}}

# What LLaMA-Factory is told of each format: its kind, and which column holds what; of lists of turns, the keys as well.
_ALPACA = {"formatting": "alpaca", "columns": {"prompt": "instruction", "query": "input", "response": "output"}}
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_NAMED = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
_FACTORY: dict[Format, dict[str, Any]] = {
    "messages": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _TAGS},
    "alpaca": _ALPACA,
    "sharegpt": {"formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": _NAMED},
    "pairs": {"formatting": "alpaca", "columns": {"prompt": "question", "response": "answer"}},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of the user and the assistant, one after the other, under a system prompt that may be empty.

    ``passage`` is a text that the first turn asks about in this ``language``, if any; ``origin`` the further columns
    of the format pairs.
    """

    turns: tuple[str, ...]
    system: str = ""
    passage: str = ""
    language: Language = "en"
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def told(self) -> list[tuple[str, str]]:
        """The role and the text of each turn, the system's first."""
        first = self.turns[0]
        if self.passage:
            first = load_prompts(self.language).reading(self.passage, first)
        system = [("system", self.system)] if self.system else []
        return [*system, *zip(itertools.cycle(("user", "assistant")), (first, *self.turns[1:]), strict=False)]

    def row(self, form: Format) -> dict[str, Any]:
        """The conversation in a format; of several turns, alpaca and pairs hold the first two."""
        if form == "messages":
            return {"messages": [{"role": role, "content": text} for role, text in self.told()]}
        if form == "sharegpt":
            return {"conversations": [{"from": _NAMES[role], "value": text} for role, text in self.told()]}
        question, answer = self.turns[:2]
        if form == "alpaca":
            row = {"instruction": question, "input": disarm(self.passage), "output": answer}
        else:
            row = {"question": question, "answer": answer, **self.origin}
        return row | ({"system": self.system} if self.system else {})


def rows_of(conversations: Iterable[Conversation], form: Format) -> list[dict[str, Any]]:
    """The rows in a format, all with the same columns: where one has no value, it is None, or "" as the system."""
    rows = [conversation.row(form) for conversation in conversations]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "" if name == "system" else None) for name in columns} for row in rows]


def factory_entry(form: Format, file: str, columns: Iterable[str], with_context: bool) -> dict[str, Any]:
    """The entry of a file with these columns in the dataset_info.json of LLaMA-Factory."""
    entry = {"file_name": file, **_FACTORY[form]}
    if "tags" in entry:
        return {**entry, "tags": {**entry["tags"], "system_tag": "system"}}
    system = {"system": "system"} if "system" in columns else {}
    passage = {"query": "context"} if form == "pairs" and with_context else {}
    return {**entry, "columns": {**entry["columns"], **passage, **system}}


def read_mix(source: str, wanted: int, seed: int, form: Format) -> tuple[list[Conversation], Counter[str]]:
    """A sample of the user's own conversations, as many as are wanted or there; what is skipped, by reason.

    The rows hold ``messages``, ShareGPT's ``conversations``, Alpaca's ``instruction``, ``input`` and ``output``, or
    ``question`` and ``answer``. Raises UserError when the source cannot be read.
    """
    sample, skipped = Sample[Conversation](wanted, seed), Counter[str]()
    for number, row in enumerate(read_rows(source, (), "train", "--mix", "")):
        read = read_row(row)
        if isinstance(read, str):
            skipped[read] += 1
        elif len(read.turns) > 2 and form in ("alpaca", "pairs"):
            skipped[f"more turns than {form} can hold"] += 1
        else:
            sample.offer(number, read)
    return sample.kept, skipped


def read_row(row: Row) -> Conversation | str:
    """A row of the user's own as a conversation, or why it is none."""
    if isinstance(row, Unreadable):
        return row.reason
    told = [(role, clean(text).strip() if isinstance(text, str) else "") for role, text in _turns(row)]
    if told and told[0][0] != "system" and isinstance(row.get("system"), str) and row["system"].strip():
        told = [("system", clean(row["system"]).strip()), *told]
    system = told.pop(0)[1] if told and told[0][0] == "system" else ""
    if not told:
        return "no conversation"
    if [role for role, _ in told] != ["user", "assistant"] * (len(told) // 2):
        return "not the user and the assistant in turn"
    texts = tuple(text for _, text in told)
    return Conversation(texts, system) if all(texts) else "a turn without text"


def _turns(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Roles and texts, whatever kind of row it is; none where it is of no known kind."""
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            turns = [turn if isinstance(turn, dict) else {} for turn in row[name]]
            roles = [str(turn.get("role") or turn.get("from")) for turn in turns]
            texts = [turn.get("content") or turn.get("value") for turn in turns]
            return [(_ROLES.get(role, role), text) for role, text in zip(roles, texts, strict=True)]
    if isinstance(row.get("instruction"), str):
        asked = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
        return [("user", asked), ("assistant", row.get("output"))]
    return [("user", row["question"]), ("assistant", row.get("answer"))] if row.get("question") else []
