"""The scorer Sc(context, query) → one unbounded number (paper section 3.3): model, loss, training, scoring.

A sequence classifier with one output on a base model: LoRA on all linear layers, and a head on the last hidden
state of the last token that is trained in full. Bradley–Terry loss over pairs of a good and a worse query.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from augcon.data import ScorerPair
from augcon.errors import UserError, one_line
from augcon.files import file_digest, new_folder, write_arrow
from augcon.progress import bar
from augcon.train import loop
from augcon.train.base import Quantization, can_bf16, device, load_base, lora
from augcon.train.ranks import all_gather, barrier, is_main, on_main, rank, world_size
from augcon.train.scores import KeptScores, batches

CENTRING = 0.01  # weight of (s⁺ + s⁻)², which keeps the scores of all contexts around zero
logging.getLogger("accelerate").setLevel(logging.ERROR)  # warns of what is meant: DeepSpeed counts the parts of a batch
_WEIGHTS = "adapter_model.safetensors"
_ENCODED_TOGETHER = 1000  # texts

TOKENS_IN_BATCH = 16384 if torch.cuda.is_available() else 2048  # in one forward pass, with padding

Tokens = list[int]
Text = tuple[str, str]  # a context and a query


@dataclasses.dataclass(frozen=True)
class ScorerEncoder:
    """A context and a query → tokens: the context, an empty line, the query. Unit of ``max_tokens``: tokens.

    A context that is too long is cut and the query stays whole, unless it alone is too long: then its end is cut.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_tokens: int

    def __call__(self, texts: Sequence[Text]) -> list[Tokens]:
        """The tokens of some texts; control marks in them are text like any other."""
        if not texts:
            return []
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        contexts = self.tokenizer([context for context, _ in texts], **plain)["input_ids"]
        queries = self.tokenizer(["\n\n" + query for _, query in texts], **plain)["input_ids"]
        first = [token for token in self.tokenizer("")["input_ids"][:1] if token == self.tokenizer.bos_token_id]
        room = self.max_tokens - len(first)
        return [
            [*first, *context[: max(0, room - len(query))], *query[:room]]
            for context, query in zip(contexts, queries, strict=True)
        ]

    def padded(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """Rows of tokens as one batch, padded on the right."""
        return dict(self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt", verbose=False))


class _Head(torch.nn.Linear):
    """The head in fp32, whatever the rest computes in: a score in bf16 has three digits, and many would be equal."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float())


def load_scorer(
    base: str, encoder: ScorerEncoder, seed: int, saved: Path | None = None, quantize: Quantization = "auto"
) -> peft.PeftModel:
    """The scorer ``saved`` in a folder, or a new one on ``base`` whose head is random.

    Raises UserError when the base cannot be loaded, has no head of the kind wanted, or the folder is damaged.
    """
    transformers.set_seed(seed)  # the head starts random, the same in every process
    model = load_base(transformers.AutoModelForSequenceClassification, base, quantize, num_labels=1)
    if type(getattr(model, "score", None)) is not torch.nn.Linear or model.score.bias is not None:
        raise UserError(f"model {base!r} ({type(model).__name__}) has no scoring head; use a decoder as the base")
    try:
        return make_scorer(model, encoder, saved)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the scorer in {saved} cannot be loaded ({one_line(error)}); remove that folder") from error


def make_scorer(model: Any, encoder: ScorerEncoder, saved: Path | None = None) -> peft.PeftModel:
    """A sequence classifier of Transformers, with the adapter and head ``saved`` or new ones."""
    model.score.__class__ = _Head
    model.config.pad_token_id = encoder.tokenizer.pad_token_id  # where the last token of a row is found
    model.config.use_cache = False
    scorer = peft.get_peft_model(model, lora("SEQ_CLS"), autocast_adapter_dtype=False)
    for weights in scorer.parameters():
        if weights.requires_grad:  # as training keeps them, so that what is saved is restored to the last digit
            weights.data = weights.data.to(torch.bfloat16 if can_bf16() else torch.float32)
    if saved is not None:
        tensors = load_file(saved / _WEIGHTS)
        if set(tensors) != set(peft.get_peft_model_state_dict(scorer)):
            raise ValueError("its tensors are not those of this base's adapter")
        peft.set_peft_model_state_dict(scorer, tensors)
    return scorer


def pair_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """−E[log σ(s⁺ − s⁻)] in fp32, and the centring term; scores of shape (pairs,)."""
    better, worse = better.float(), worse.float()
    return -F.logsigmoid(better - worse).mean() + CENTRING * (better + worse).square().mean()


class _PairTrainer(transformers.Trainer):
    loss_is_scaled_for_ga = False  # the Trainer takes the mean over the parts of a batch

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        return pair_loss(*model(**inputs).logits.squeeze(-1).chunk(2))


def train(
    model: peft.PeftModel,
    encoder: ScorerEncoder,
    pairs: Sequence[ScorerPair],
    rules: loop.TrainingRules,
    checkpoints: Path,
) -> str:
    """Trains the scorer in place, from the last of the ``checkpoints`` on; returns the figures in words.

    Raises UserError when it does not fit in memory or diverges.
    """
    encoded = checkpoints / "pairs.arrow"
    on_main(lambda: _encode_pairs(encoder, pairs, encoded))
    rows = datasets.Dataset.from_file(str(encoded))
    lengths = rows["length"][:]  # of both texts
    steps = rules.epochs * math.ceil(len(pairs) / (rules.batch * world_size()))
    last = on_main(lambda: loop.last_checkpoint(checkpoints))

    # One pair after another where the batch does not fit: the mean over its pairs is the same, whatever their number.
    fits = 2 * rules.batch * max(rows["longer"][:]) <= TOKENS_IN_BATCH
    arguments = loop.training_arguments(checkpoints, rules, steps) | {"gradient_checkpointing": True}
    if not fits:
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rules.batch}
    trainer = _PairTrainer(
        model,
        transformers.TrainingArguments(
            **arguments, remove_unused_columns=False, train_sampling_strategy="group_by_length"
        ),
        # Good and worse queries in one forward pass.
        data_collator=lambda rows: encoder.padded([row[which] for which in ("better", "worse") for row in rows]),
        train_dataset=rows,
    )
    speed = loop.train(
        trainer,
        last,
        "scorer",
        rules.epochs * sum(lengths),
        too_large="lower --scorer-batch",
        too_fast=f"lower --scorer-learning-rate {rules.learning_rate} and add --redo",
    )
    del trainer  # and the optimizer's memory with it
    gc.collect()
    torch.cuda.empty_cache()
    model.eval()
    return speed


def _encode_pairs(encoder: ScorerEncoder, pairs: Sequence[ScorerPair], path: Path) -> None:
    """Encodes the pairs into a file that all processes map into memory."""

    def encoded() -> Iterator[dict[str, list[Any]]]:
        for start in range(0, len(pairs), _ENCODED_TOGETHER):
            some = pairs[start : start + _ENCODED_TOGETHER]
            better = encoder([(pair.context, pair.pos_query) for pair in some])
            worse = encoder([(pair.context, pair.neg_query) for pair in some])
            sizes = [(len(one), len(other)) for one, other in zip(better, worse, strict=True)]
            columns = {"better": better, "worse": worse}
            yield columns | {"length": list(map(sum, sizes)), "longer": list(map(max, sizes))}

    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"better": ["int32"], "worse": ["int32"], "length": "int32", "longer": "int32"}
    write_arrow(path, types, encoded())


@torch.inference_mode()
def score(model: peft.PeftModel, encoder: ScorerEncoder, rows: Sequence[Tokens]) -> list[float]:
    """The scores of one batch. Raises UserError where they are not finite, or the batch does not fit in memory."""
    model.eval()
    batch = {name: tensor.to(device()) for name, tensor in encoder.padded(rows).items()}
    try:
        scores: list[float] = model(**batch).logits.squeeze(-1).tolist()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("scoring needs more memory than the GPU has; use a smaller --scorer-model") from error
    if not all(map(math.isfinite, scores)):
        raise UserError("the scorer's scores are not finite; train it with a lower --scorer-learning-rate and --redo")
    return scores


def accuracy(
    model: peft.PeftModel, encoder: ScorerEncoder, pairs: Sequence[ScorerPair]
) -> dict[str, tuple[int, float]]:
    """How many pairs there are, and the share of them that is ranked right, a tie counting half.

    Of "all" pairs, and of each type of negative. All processes share the work and get the result.
    """
    rows = encoder([(pair.context, query) for pair in pairs for query in (pair.pos_query, pair.neg_query)])
    work = list(batches(list(map(len, rows)), TOKENS_IN_BATCH))
    mine: dict[int, float] = {}
    for batch in work[rank() :: world_size()]:
        mine |= dict(zip(batch, score(model, encoder, [rows[place] for place in batch]), strict=True))
    scores = {place: value for part in all_gather(mine) for place, value in part.items()}
    right: defaultdict[str, list[float]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        better, worse = scores[2 * number], scores[2 * number + 1]
        for kind in ("all", pair.type):
            right[kind].append((better > worse) / 2 + (better >= worse) / 2)
    return {kind: (len(won), sum(won) / len(won)) for kind, won in right.items()}


def plan(kept: KeptScores, encoder: ScorerEncoder, texts: Iterable[tuple[str, Text]]) -> list[int]:
    """Encodes the texts, with their keys, that are new to a file; returns the numbers of the batches to be scored."""
    scores = kept.read()
    planned = {name for rows in kept.texts() for name in rows["key"][:]}
    new = ((name, text) for name, text in texts if name not in scores and name not in planned)
    kept.add_texts(_encoded(encoder, new))
    return [
        number
        for number, (rows, places) in enumerate(kept.batches(TOKENS_IN_BATCH))
        if any(name not in scores for name in rows.select_columns(["key"])[places]["key"])
    ]


def _encoded(encoder: ScorerEncoder, texts: Iterator[tuple[str, Text]]) -> Iterator[dict[str, list[Any]]]:
    while some := list(itertools.islice(texts, _ENCODED_TOGETHER)):
        rows = encoder([text for _, text in some])
        yield {"key": [name for name, _ in some], "tokens": rows, "length": list(map(len, rows))}


def score_planned(model: peft.PeftModel, encoder: ScorerEncoder, kept: KeptScores, numbers: Sequence[int]) -> str:
    """Scores batches of the plan, shared by all processes, keeping each as it comes; returns the figures in words."""
    work = kept.batches(TOKENS_IN_BATCH)
    total = sum(len(work[number][1]) for number in numbers)
    tokens, started = 0, time.monotonic()
    with bar(total, "scores", "queries") if is_main() else contextlib.nullcontext() as progress:
        for number in numbers[rank() :: world_size()]:
            texts, places = work[number]
            batch = texts[places]
            kept.keep(rank(), dict(zip(batch["key"], score(model, encoder, batch["tokens"]), strict=True)))
            tokens += sum(batch["length"])
            if progress is not None:
                progress.update(min(len(places) * world_size(), progress.total - progress.n))
    seconds = max(time.monotonic() - started, 1e-9)
    barrier()
    return f"{total:,} queries in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s per process, {loop.peak_memory()}"


def save(model: peft.PeftModel, folder: Path) -> str:
    """Saves adapter and head; returns a digest of the weights. Raises UserError when the folder cannot be written."""
    with new_folder(folder) as unfinished:
        model.save_pretrained(str(unfinished), save_embedding_layers=False)
    return file_digest(folder / _WEIGHTS)
