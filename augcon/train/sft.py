"""LoRA fine-tuning on packed examples (paper 4.1), from checkpoint to checkpoint."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel, get_peft_model
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from augcon.data import Pair
from augcon.errors import UserError
from augcon.files import new_picture, write_arrow
from augcon.progress import bar
from augcon.train import loop
from augcon.train.base import Quantization, can_bf16, load_base, lora, read_config
from augcon.train.chat import ChatEncoder, TrainingExample
from augcon.train.ranks import on_main, print_main, world_size

# Of the largest logit: the change that rounding to 16 bits may make where nothing leaks. A leak changes far more.
_ROUNDING = 0.02
_TOGETHER = 1000  # pairs encoded at once
ENCODED = "encoded"  # the folder of the tokens, beside the checkpoints, as long as the training lasts


def load_model(folder: Path, quantize: Quantization, name: str, seed: int) -> PeftModel:
    """The base with a new adapter on all its linear layers. Raises UserError when it cannot be trained or merged."""
    if getattr(read_config(folder), "quantization_config", None):
        raise UserError(f"model {name!r} is quantised on disk and takes no adapter; use the one it was made from")
    transformers.set_seed(seed)  # the adapter starts random
    model = load_base(transformers.AutoModelForCausalLM, str(folder), quantize)
    model.config.use_cache = False
    tuned = get_peft_model(model, lora("CAUSAL_LM"))
    config: Any = tuned.peft_config["default"]
    if config.target_parameters:  # merge.py would refuse the adapter after hours of training
        raise UserError(
            f"model {name!r} keeps the layers of its experts in one piece, and an adapter on those cannot be merged; "
            "use a model without a mixture of experts"
        )
    config.base_model_name_or_path = name
    return tuned


@dataclasses.dataclass
class Written:
    """The lengths of the examples in a file, how many answers are cut, and how many pairs have no room for one."""

    lengths: list[int]
    cut: int = 0
    lost: int = 0


def write_examples(encoder: ChatEncoder, pairs: Sequence[Pair], path: Path) -> Written:
    """Encodes pairs into a file that all processes map into their memory."""
    written = Written([])

    def encoded() -> Iterator[dict[str, list[Any]]]:
        with bar(len(pairs), "tokens", "pairs") as progress:
            for start in range(0, len(pairs), _TOGETHER):
                some = pairs[start : start + _TOGETHER]
                rows = [row for row in encoder(some) if row]
                written.lengths += [len(row.input_ids) for row in rows]
                written.cut += sum(row.cut for row in rows)
                written.lost += len(some) - len(rows)
                progress.update(len(some))
                yield as_columns(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # of all processes, only this one works now
    write_arrow(path, {"input_ids": ["int32"], "labels": ["int32"], "length": "int32"}, encoded())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return written


def as_columns(examples: Sequence[TrainingExample]) -> dict[str, list[Any]]:
    """Examples as the columns of a dataset."""
    tokens, labels = [row.input_ids for row in examples], [row.labels for row in examples]
    return {"input_ids": tokens, "labels": labels, "length": list(map(len, tokens))}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows of a training, how many of them are in a pass and how many passes in a step, and that in words.

    ``largest`` is the number of tokens in the largest pass, ``packed`` whether a row holds several pairs.
    """

    rows: datasets.Dataset
    packed: bool
    side: int
    passes: int
    largest: int
    words: str


def lay_out(examples: datasets.Dataset, packed: bool, rules: loop.TrainingRules, most: int, folder: Path) -> Layout:
    """Lays out the examples for training; packs are written into the ``folder``, where all processes read them."""
    lengths = examples.with_format("numpy")["length"][:]
    total, longest = int(lengths.sum()), int(lengths.max())
    if not packed:
        words = f"none, {rules.batch} pairs side by side, as this model's attention does not keep packed pairs apart"
        return Layout(examples.remove_columns("length"), False, rules.batch, 1, rules.batch * longest, words)
    # As long as the pairs of one step are together on average: the same number of tokens in every step.
    step = max(2, math.ceil(rules.batch * total / len(lengths)))
    passes = math.ceil(step / most)
    room = max(2, math.ceil(step / passes))
    on_main(lambda: pack(examples, room, rules.seed).save_to_disk(folder))
    rows = datasets.load_from_disk(folder)
    if passes > 1:  # as many as hold the pairs of a step, for packs are never quite full
        passes = max(1, round(rules.batch * len(rows) / len(examples)))
    full = total / sum(max(room, sum(parts)) for parts in rows["seq_lengths"])
    words = f"{len(examples):,} pairs in {len(rows):,} packs of at most {room:,} tokens, longer pairs alone, "
    words += f"{full:.0%} full" + (f"; {passes} packs a step" if passes > 1 else "")
    return Layout(rows, True, 1, passes, max(room, longest), words)


class _Trainer(SFTTrainer):
    """Checkpoints the gradients of large passes only: of more than ``kept`` tokens."""

    kept: float

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
        for layer in model.modules():  # which look at this in every pass
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = inputs["input_ids"].numel() > self.kept
        return super().training_step(model, inputs, *rest, **more)


def tune(
    model: PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: datasets.Dataset,
    held_out: datasets.Dataset,
    rules: loop.TrainingRules,
    checkpoints: Path,
    most: int,
    kept: float,
) -> tuple[list[dict[str, Any]], str]:
    """Trains the adapter in place, from the last of the ``checkpoints`` on; returns the losses, and figures in words.

    ``examples`` and ``held_out`` have the columns of ``as_columns``. A step of more than ``most`` tokens is divided
    into passes whose gradients are summed up. A pass of more than ``kept`` tokens computes its activations again in the
    backward pass, which takes less memory. Raises UserError when the training does not fit in memory or diverges.
    """
    datasets.disable_progress_bars()
    layout = lay_out(examples, stays_apart(model), rules, most, checkpoints / ENCODED / "packs")
    steps = rules.epochs * math.ceil(len(layout.rows) / (layout.side * layout.passes * world_size()))
    last = on_main(lambda: loop.last_checkpoint(checkpoints))
    arguments = loop.training_arguments(checkpoints, dataclasses.replace(rules, batch=layout.side), steps) | {
        "gradient_accumulation_steps": layout.passes,
        "gradient_checkpointing": layout.largest > kept,
        "max_length": layout.largest,
        "packing": layout.packed,
        "eval_packing": False,
        "save_total_limit": None,  # so that the epochs can be compared
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_eval_batch_size": 1,  # so that the mean over batches is the mean over pairs
        "prediction_loss_only": True,
        "eval_strategy": "epoch" if len(held_out) else "no",
        "eval_on_start": bool(len(held_out)) and not last,
    }
    trainer = _Trainer(
        model,
        SFTConfig(**arguments),
        train_dataset=layout.rows,
        eval_dataset=held_out.remove_columns("length") if len(held_out) else None,
        processing_class=tokenizer,
    )
    trainer.kept = kept
    if not can_bf16():  # SFTTrainer makes a QLoRA adapter bf16, but DeepSpeed keeps no fp32 copy here
        for weights in model.parameters():
            weights.data = weights.data.float() if weights.requires_grad else weights.data
    print_main(f"packing: {layout.words}")
    words = loop.train(
        trainer,
        last,
        "fine-tuning",
        rules.epochs * sum(examples["length"][:]),
        too_large="plan for less with --gpu-memory, lower --max-tokens, or use --quantize nf4",
        too_fast=f"lower --learning-rate {rules.learning_rate} and add --redo",
    )
    return trainer.state.log_history, words


def pack(examples: datasets.Dataset, room: int, seed: int) -> datasets.Dataset:
    """Examples in packs of at most ``room`` tokens. A longer example is a pack of its own: if all packs were as long as
    the longest example, a step would learn from many more pairs than it should.
    """
    lengths, tokens = examples.with_format("numpy")["length"][:], examples.remove_columns("length")
    packs = []
    if len(short := (lengths <= room).nonzero()[0]):
        packs.append(pack_dataset(tokens.select(short).shuffle(seed=seed), room))
    if len(long := (lengths > room).nonzero()[0]):
        packs.append(tokens.select(long).add_column("seq_lengths", [[length] for length in lengths[long].tolist()]))
    return datasets.concatenate_datasets([part.cast(packs[-1].features) for part in packs])


@torch.no_grad()
def stays_apart(model: torch.nn.Module) -> bool:
    """Whether an example in a pack does not see its neighbour: with another neighbour, its logits are the same.

    Transformers keeps packed examples apart by their positions, which start anew; not every model supports that.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    behind = []
    for neighbour in ([5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]):
        batch = collate([{"input_ids": neighbour}, {"input_ids": [17, 18, 19, 20, 21, 22]}])
        del batch["labels"]
        inputs = transformers.BatchEncoding(batch).to(next(model.parameters()).device)
        behind.append(model(**inputs, use_cache=False).logits[0, 6:].float())
    return float((behind[0] - behind[1]).abs().max()) <= _ROUNDING * float(behind[0].abs().max())


def draw_losses(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the training and held-out loss over the epochs. Raises UserError when the file cannot be written."""
    with new_picture(path, width=8) as axes:
        for name, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "held out")):
            if drawn := [(row["epoch"], row[name]) for row in log if name in row]:
                axes.plot(*zip(*drawn, strict=True), style, label=label)
                axes.legend()
        axes.set(xlabel="epoch", ylabel="loss, nats per token", ylim=(0, None))
        axes.grid(axis="x", color="0.85")
