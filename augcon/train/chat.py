"""A question and its answer as tokens of the model's own chat template, with loss on the answer and its end only."""

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import transformers

from augcon.errors import UserError, one_line

IGNORED = -100  # the label of a token that carries no loss
_ENOUGH_GROUPS = 20  # of which whole ones can be held out: fewer would be too large a part of the data


@dataclasses.dataclass(frozen=True)
class Example:
    """Tokens and labels of one pair, of equal length; ``cut`` when the end of the answer did not fit."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes examples of pairs. ``ends`` are the tokens on which generation stops; unit of ``max_tokens``: tokens."""

    tokenizer: transformers.PreTrainedTokenizerBase
    ends: frozenset[int]
    max_tokens: int

    def __call__(self, question: str, answer: str) -> Example | None:
        """The pair's tokens; None where the question alone leaves no room for an answer.

        The loss begins where the conversation with the answer leaves the prompt that asks for one, and ends with
        the end token. What the template writes after it (a line break, say) the model is never asked for.
        """
        asked = [{"role": "user", "content": question}]
        prompt = self._tokens(asked, add_generation_prompt=True)
        tokens = self._tokens([*asked, {"role": "assistant", "content": answer}])
        same = (left == right for left, right in zip(prompt, tokens, strict=False))
        start = next((place for place, equal in enumerate(same) if not equal), min(len(prompt), len(tokens)))
        last = next((place for place in range(len(tokens) - 1, start, -1) if tokens[place] in self.ends), None)
        tokens = [*tokens, self.tokenizer.eos_token_id] if last is None else tokens[: last + 1]
        if start >= self.max_tokens:
            return None
        kept = tokens[: self.max_tokens]
        return Example(kept, [IGNORED] * start + kept[start:], cut=len(kept) < len(tokens))

    def _tokens(self, messages: list[dict[str, str]], **how: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **how)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def load_encoder(tokenizer: transformers.PreTrainedTokenizerBase, base: Path, max_tokens: int) -> tuple[Encoder, str]:
    """The encoder for a base model's tokenizer, for no more tokens than the model can hold; a warning or nothing.

    Raises UserError when the tokenizer has no chat template, or one that cannot hold a question and an answer.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {base} has no chat template, so this is no chat model; use its chat version, or put a "
            "chat_template.jinja in the folder"
        )
    question, answer = "What opens at seven?", "The bakery opens at seven."
    try:
        asked = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template in {base} fails on a question and its answer: {one_line(error)}") from error
    if question not in prompt or answer not in whole:
        raise UserError(f"the chat template in {base} leaves out the question or the answer; use another one")
    warning = ""
    if not whole.startswith(prompt):
        warning = (
            "the chat template opens an answer to come otherwise than one that is there; "
            "the model is trained on the latter"
        )
    config = transformers.AutoConfig.from_pretrained(base).get_text_config()
    ends = [tokenizer.eos_token_id]
    for stops in (config.eos_token_id, _stops_of_generation(base)):
        ends += stops if isinstance(stops, list) else [stops]
    known = frozenset(end for end in ends if end is not None)
    if not known:
        raise UserError(f"neither the tokenizer nor the model in {base} has an end token; set eos_token")
    positions = getattr(config, "max_position_embeddings", None) or max_tokens
    return Encoder(tokenizer, known, min(max_tokens, positions)), warning


def _stops_of_generation(base: Path) -> int | list[int] | None:
    try:
        return transformers.GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:  # there is no such file
        return None


def hold_out(number: int, share: float, origins: Sequence[dict[str, Any]], seed: int) -> tuple[list[int], str]:
    """Which of ``number`` pairs are kept from training, about ``share`` of them, and in words how they were chosen.

    By whole articles, else by whole root contexts, where ``origins`` names them and they are many: questions on
    one text have much in common. Of one pair alone nothing is held out.
    """
    if number < 2 or not share:
        return [], "none"
    order = list(range(number))
    group_of: list[Any] = order
    unit = ""
    for name in ("article", "root"):
        named = [row.get(name) for row in origins]
        if len(named) == number and None not in named and len(set(named)) >= _ENOUGH_GROUPS:
            group_of, unit = named, {"article": "articles", "root": "root contexts"}[name]
            break
    sizes = Counter(group_of)
    held: set[Any] = set()
    pairs = 0
    for group in random.Random(seed).sample(sorted(sizes), len(sizes)):
        if pairs + sizes[group] <= max(1, share * number):
            held.add(group)
            pairs += sizes[group]
    held = held or {min(sizes, key=lambda group: (sizes[group], group))}
    words = f"{len(held):,} of {len(sizes):,} {unit}" if unit else "single pairs, for they come from few texts"
    return [place for place in order if group_of[place] in held], words
