"""A question and its answer as tokens of the model's own chat template, with loss on the answer and its end only."""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import transformers

from augcon.data import Pair
from augcon.errors import UserError, one_line
from augcon.train.base import read_config
from augcon.train.ranks import print_main

IGNORED = -100  # the label of a token that carries no loss


@dataclasses.dataclass(frozen=True)
class TrainingExample:
    """Tokens and labels of one pair, of equal length; ``cut`` when the end of the answer did not fit."""

    input_ids: list[int]
    labels: list[int]
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class ChatEncoder:
    """Pairs → training examples. ``ends`` are the tokens on which generation stops; unit of ``max_tokens``: tokens."""

    tokenizer: transformers.PreTrainedTokenizerBase
    ends: frozenset[int]
    max_tokens: int

    def __call__(self, pairs: Sequence[Pair]) -> list[TrainingExample | None]:
        """The tokens of each pair, or None where the question alone leaves no room for an answer.

        The loss begins where the conversation with the answer departs from the prompt that asks for one, and ends
        with the end token. What the template writes after that (a line break, say) is never asked of the model.
        """
        texts = [text for pair in pairs for text in self.rendered(pair)]
        tokens = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        rows: list[list[int]] = tokens["input_ids"]  # together, so that the tokenizer can use all cores
        return list(map(self._example, rows[::2], rows[1::2]))

    def _example(self, prompt: list[int], tokens: list[int]) -> TrainingExample | None:
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(prompt, tokens, strict=False))
        start = len(list(same))
        last = next((place for place in range(len(tokens) - 1, start, -1) if tokens[place] in self.ends), None)
        tokens = [*tokens, self.tokenizer.eos_token_id] if last is None else tokens[: last + 1]
        if start >= self.max_tokens:
            return None
        kept = tokens[: self.max_tokens]
        return TrainingExample(kept, [IGNORED] * start + kept[start:], cut=len(kept) < len(tokens))

    def rendered(self, pair: Pair) -> tuple[str, str]:
        """The text that asks for the answer, and the text with the answer."""
        asked = [{"role": "user", "content": self._marks.sub(r"\g<0> ", pair.question)}]
        whole = [*asked, {"role": "assistant", "content": self._marks.sub(r"\g<0> ", pair.answer)}]
        prompt: str = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return prompt, self.tokenizer.apply_chat_template(whole, tokenize=False)

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """The first character of each control mark of the tokenizer. A space behind it makes the mark plain text."""
        known = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        grouped = itertools.groupby(sorted(mark for mark in known if len(mark) > 1), lambda mark: mark[0])
        rest = ((first, "|".join(re.escape(mark[1:]) for mark in marks)) for first, marks in grouped)
        return re.compile("|".join(f"{re.escape(first)}(?={marks})" for first, marks in rest) or "(?!)")


def load_encoder(tokenizer: transformers.PreTrainedTokenizerBase, base: Path, max_tokens: int) -> ChatEncoder:
    """The encoder for a base model's tokenizer, for no more tokens than the model can hold.

    Raises UserError when the tokenizer has no chat template, or one that cannot hold a question and an answer.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {base} has no chat template, so this is not a chat model; use its chat version, or "
            "put a chat_template.jinja into the folder"
        )
    config = read_config(base).get_text_config()
    stops = [tokenizer.eos_token_id, config.eos_token_id]
    with contextlib.suppress(OSError):  # where there is no such file
        stops.append(transformers.GenerationConfig.from_pretrained(base).eos_token_id)
    ends = frozenset(end for stop in stops for end in (stop if isinstance(stop, list) else [stop]) if end is not None)
    if not ends:
        raise UserError(f"neither the tokenizer nor the model in {base} has an end token; set eos_token")
    positions = getattr(config, "max_position_embeddings", None) or max_tokens
    encoder = ChatEncoder(tokenizer, ends, min(max_tokens, positions))
    pair = Pair("What opens at seven?", "The bakery opens at seven.")
    try:
        prompt, whole = encoder.rendered(pair)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template in {base} fails on a question and its answer: {one_line(error)}") from error
    if pair.question not in prompt or pair.answer not in whole:
        raise UserError(f"the chat template in {base} leaves out the question or the answer; use another one")
    if not whole.startswith(prompt):
        print_main(
            "note:    the chat template starts an answer differently when it asks for one and when it contains one; "
            "training follows the latter"
        )
    return encoder
