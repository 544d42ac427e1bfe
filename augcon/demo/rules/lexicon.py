"""What the rules are made of: word lists and templates from ``lexicon.toml``, and what was read with them."""

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

from augcon.text.units import Language

Slots = dict[str, list[str]]
Terms = list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What questions can be made of: terms with their weights, and what fits the other slots of templates."""

    terms: Terms
    slots: Slots


@functools.cache
def rules(language: Language) -> dict[str, Any]:
    """The word lists and templates of a language; lists of words as sets."""
    path = Path(__file__).with_name("lexicon.toml")
    data = tomllib.loads(path.read_text(encoding="utf-8"))[language]
    return data | {name: frozenset(words.split()) for name, words in data["words"].items()}
