"""The scorer Sc(context, question) → one unbounded number (paper section 3.3): model, loss, training, scoring.

A sequence classifier with one output on a base model: LoRA on all linear layers, and a head on the last hidden
state of the last token that is trained in full. Loss of Bradley and Terry over pairs of a good and a worse question.
"""

import dataclasses
import gc
import hashlib
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from augcon.errors import UserError, one_line
from augcon.method.pairs import ScorerPair
from augcon.train import base as training
from augcon.train import ranks

CENTRING = 0.01  # weight of (s⁺ + s⁻)², which keeps the scores of all contexts around zero
HELD_OUT = 0.1  # of the pairs, by whole articles

Tokens = list[int]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """(context, question) → tokens: the context, an empty line, the question. A context too long is cut, the
    question stays; of a question that is too long alone its head stays. Unit of ``max_tokens``: tokens.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    max_tokens: int

    def __call__(self, texts: Sequence[tuple[str, str]]) -> list[Tokens]:
        """The tokens of some (context, question); marks of control in the texts are text like any other."""
        if not texts:
            return []
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        contexts = self.tokenizer([context for context, _ in texts], **plain)["input_ids"]
        questions = self.tokenizer(["\n\n" + question for _, question in texts], **plain)["input_ids"]
        whole = self.tokenizer("")["input_ids"]  # of no text: what begins every text of this model, if anything
        first = whole[:1] if whole and whole[0] == self.tokenizer.bos_token_id else []
        encoded = []
        for context, question in zip(contexts, questions, strict=True):
            question = question[: self.max_tokens - len(first)]
            encoded.append([*first, *context[: self.max_tokens - len(first) - len(question)], *question])
        return encoded

    def padded(self, rows: Sequence[Tokens]) -> dict[str, torch.Tensor]:
        """Rows of tokens as one batch, padded on the right."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }


class _Head(torch.nn.Linear):
    """The head in fp32, whatever the rest computes in: a score in bf16 has three digits, and many would be equal."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight.float())


def load_scorer(
    base: str, encoder: Encoder, seed: int, saved: Path | None = None, quantize: training.Quantization = "auto"
) -> peft.PeftModel:
    """The scorer ``saved`` in a folder, or a new one on ``base`` whose head is random.

    Raises UserError when the base cannot be loaded, has no head of the kind wanted, or the folder is damaged.
    """
    transformers.set_seed(seed)  # the head starts random, the same in every process
    kind = transformers.AutoModelForSequenceClassification
    model = training.load_base(kind, base, quantize, num_labels=1)
    if type(getattr(model, "score", None)) is not torch.nn.Linear or model.score.bias is not None:
        raise UserError(f"model {base!r} ({type(model).__name__}) is no decoder with a scoring head; use another base")
    try:
        return make_scorer(model, encoder, saved)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the scorer in {saved} cannot be loaded ({one_line(error)}); remove it and train anew"
        ) from error


def make_scorer(model: Any, encoder: Encoder, saved: Path | None = None) -> peft.PeftModel:
    """A sequence classifier of Transformers, with the adapter and head ``saved`` or new ones."""
    model.score.__class__ = _Head
    model.config.pad_token_id = encoder.tokenizer.pad_token_id  # where the last token of a row is found
    model.config.use_cache = False
    scorer = peft.get_peft_model(model, training.lora("SEQ_CLS"), autocast_adapter_dtype=False)
    for weights in scorer.parameters():
        if weights.requires_grad:  # as the training keeps them, so that what is saved comes back to the last digit
            weights.data = weights.data.to(torch.bfloat16 if training.can_bf16() else torch.float32)
    if saved is not None:
        tensors = load_file(saved / "adapter_model.safetensors")
        if set(tensors) != set(peft.get_peft_model_state_dict(scorer)):
            raise ValueError("its tensors are not those of this base's adapter")
        peft.set_peft_model_state_dict(scorer, tensors)
    return scorer


def pair_loss(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """−E[log σ(s⁺ − s⁻)] in fp32, and the centring term; scores of shape (pairs,)."""
    better, worse = better.float(), worse.float()
    return -F.logsigmoid(better - worse).mean() + CENTRING * (better + worse).square().mean()


def hold_out(pairs: Sequence[ScorerPair], article_of: dict[int, int], seed: int) -> tuple[list[ScorerPair], str]:
    """About a tenth of the pairs to test on, by whole articles, and in words what they are.

    Never more than half of the pairs. Where all are of one article, by root context; where all are of one root
    context, none.
    """
    for unit, of in (("article", lambda pair: article_of.get(pair.root, -1)), ("root context", lambda pair: pair.root)):
        sizes = Counter(map(of, pairs))
        if len(sizes) < 2:
            continue
        held: set[int] = set()
        number = 0
        for group in random.Random(seed).sample(sorted(sizes), len(sizes)):
            if number < HELD_OUT * len(pairs) and number + sizes[group] <= len(pairs) / 2:
                held.add(group)
                number += sizes[group]
        held = held or {min(sizes, key=lambda group: (sizes[group], group))}
        few = "" if unit == "article" else ", for all are of one article"
        return [pair for pair in pairs if of(pair) in held], f"{len(held):,} of {len(sizes):,} {unit}s{few}"
    return [], "none, for all are of one root context"


class _PairTrainer(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        return pair_loss(*model(**inputs).logits.squeeze(-1).chunk(2))


@dataclasses.dataclass(frozen=True)
class TrainingRules:
    """How long and how fast the scorer learns; see the settings of the same names."""

    epochs: int = 4
    batch: int = 4  # pairs per process and step
    learning_rate: float = 5e-5
    seed: int = 42


def train(
    model: peft.PeftModel,
    encoder: Encoder,
    pairs: Sequence[ScorerPair],
    rules: TrainingRules,
    checkpoints: Path,
    made_of: dict[str, Any],
) -> str:
    """Trains the scorer in place, all processes together, from the last checkpoint on; returns the figures.

    ``made_of`` says what the training is of: checkpoints of another one are not taken up. Raises UserError
    when it does not fit in memory or its numbers run away.
    """
    columns = {
        "better": encoder([(pair.context, pair.pos_query) for pair in pairs]),
        "worse": encoder([(pair.context, pair.neg_query) for pair in pairs]),
    }
    columns["length"] = list(map(len, columns["better"]))
    steps = rules.epochs * math.ceil(len(pairs) / (rules.batch * ranks.processes()))
    arguments = training.common_arguments(
        checkpoints,
        epochs=rules.epochs,
        batch=rules.batch,
        learning_rate=rules.learning_rate,
        steps=steps,
        seed=rules.seed,
    )
    tokens = 0

    def collate(rows: list[dict[str, Tokens]]) -> dict[str, torch.Tensor]:
        nonlocal tokens
        both = [row[which] for which in ("better", "worse") for row in rows]  # one forward pass for both
        tokens += sum(map(len, both))
        return encoder.padded(both)

    last = training.last_checkpoint(checkpoints, made_of)
    trainer = _PairTrainer(
        model,
        transformers.TrainingArguments(
            **arguments, remove_unused_columns=False, train_sampling_strategy="group_by_length"
        ),
        data_collator=collate,
        train_dataset=datasets.Dataset.from_dict(columns),
    )
    watch = training.watch(trainer, "scorer")
    training.run(
        trainer,
        last,
        too_large="lower --scorer-batch",
        too_fast=f"remove {checkpoints} and lower --scorer-learning-rate {rules.learning_rate}",
    )
    del trainer  # with the optimizer's memory
    gc.collect()
    torch.cuda.empty_cache()
    model.eval()
    return (
        f"{len(pairs):,} pairs, {watch.steps:,} steps in {watch.seconds:.0f} s"
        f"{f' from {Path(last).name} on' if last else ''}, "
        f"{tokens / max(watch.seconds, 1e-9):,.0f} tokens/s a process, {training.peak_memory()}"
    )


@torch.inference_mode()
def score(model: peft.PeftModel, encoder: Encoder, rows: Sequence[Tokens]) -> list[float]:
    """The scores of one batch. Raises UserError where they are no numbers, or the batch does not fit in memory."""
    model.eval()
    batch = {name: tensor.to(training.device()) for name, tensor in encoder.padded(rows).items()}
    try:
        scores = model(**batch).logits.squeeze(-1).tolist()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("scoring needs more memory than the GPU has; use a smaller --scorer-model") from error
    if not all(map(math.isfinite, scores)):
        raise UserError("the scorer gives what is no number; remove its folder and train it with a lower learning rate")
    return scores


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places in batches, the longest first, each of at most ``budget`` tokens with padding (or of one place)."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def token_budget() -> int:
    """Tokens in one batch of scoring."""
    return 16384 if torch.cuda.is_available() else 2048


def accuracy(model: peft.PeftModel, encoder: Encoder, pairs: Sequence[ScorerPair]) -> dict[str, float]:
    """Share of the pairs that are ranked right, a tie counting half: "all", and for each type of negative.

    All processes share the work and get the result.
    """
    texts = [text for pair in pairs for text in ((pair.context, pair.pos_query), (pair.context, pair.neg_query))]
    rows = encoder(texts)
    work = list(batches(list(map(len, rows)), token_budget()))
    mine = {
        place: value
        for batch in work[ranks.rank() :: ranks.processes()]
        for place, value in zip(batch, score(model, encoder, [rows[place] for place in batch]), strict=True)
    }
    scores = {place: value for part in ranks.gather(mine) for place, value in part.items()}
    right: defaultdict[str, list[float]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        difference = scores[2 * number] - scores[2 * number + 1]
        won = 0.5 if difference == 0 else float(difference > 0)
        right["all"].append(won)
        right[pair.type].append(won)
    return {kind: sum(won) / len(won) for kind, won in right.items()}


def save(model: peft.PeftModel, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Saves adapter and head with what is known of them, and returns that with the digest of the weights.

    The folder is there only when it is whole.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished, save_embedding_layers=False)
        weights = hashlib.sha256((unfinished / "adapter_model.safetensors").read_bytes())
        facts = {"digest": weights.hexdigest()[:16], **facts}
        (unfinished / "scorer.json").write_text(
            json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    except OSError as error:
        raise UserError(f"the scorer cannot be saved to {folder}: {one_line(error)}") from error
    return facts


def digest(*parts: Any) -> str:
    """A short digest of anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
