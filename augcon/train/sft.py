"""QLoRA fine-tuning on packed examples (paper 4.1), from checkpoint to checkpoint."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel, get_peft_model
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from augcon.errors import UserError
from augcon.files import new_picture
from augcon.train import loop
from augcon.train.base import Quantization, can_bf16, load_base, lora
from augcon.train.chat import TrainingExample
from augcon.train.ranks import on_main, print_main, world_size

# Of the largest logit: the change that rounding to 16 bits may make where nothing leaks. A leak changes far more.
_ROUNDING = 0.02


def load_model(folder: Path, quantize: Quantization, name: str, seed: int) -> PeftModel:
    """The base with a new adapter on all its linear layers. Raises UserError when it cannot be trained or merged."""
    if getattr(transformers.AutoConfig.from_pretrained(folder), "quantization_config", None):
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


def tune(
    model: PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    held_out: Sequence[TrainingExample],
    rules: loop.TrainingRules,
    checkpoints: Path,
) -> tuple[list[dict[str, Any]], str]:
    """Trains the adapter in place, from the last of the ``checkpoints`` on; returns the losses, and figures in words.

    Raises UserError when the training does not fit in memory or diverges.
    """
    datasets.disable_progress_bars()
    lengths = [len(example.input_ids) for example in examples]
    # As long as the pairs of one step are together on average: the same number of tokens in every step.
    length = max(2, math.ceil(rules.batch * sum(lengths) / len(lengths)))
    rows, batch, packed = as_dataset(examples), rules.batch, stays_apart(model)
    packing = f"none, {batch} pairs side by side, as this model's attention does not keep packed pairs apart"
    if packed:
        rows, batch = pack(examples, length, rules.seed), 1
        full = sum(lengths) / sum(max(length, sum(parts)) for parts in rows["seq_lengths"])
        packing = f"{len(examples):,} pairs in {len(rows):,} packs of at most {length:,} tokens, longer pairs alone, "
        packing += f"{full:.0%} full"
    steps = rules.epochs * math.ceil(len(rows) / (batch * world_size()))
    last = on_main(lambda: loop.last_checkpoint(checkpoints))
    arguments = loop.training_arguments(checkpoints, dataclasses.replace(rules, batch=batch), steps) | {
        "max_length": max(length, *lengths),
        "packing": packed,
        "eval_packing": False,
        "save_total_limit": None,  # so that the epochs can be compared
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_eval_batch_size": 1,  # so that the mean over batches is the mean over pairs
        "prediction_loss_only": True,
        "eval_strategy": "epoch" if held_out else "no",
        "eval_on_start": bool(held_out) and not last,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments),
        train_dataset=rows,
        eval_dataset=as_dataset(held_out) if held_out else None,
        processing_class=tokenizer,
    )
    if not can_bf16():  # SFTTrainer makes a QLoRA adapter bf16, but DeepSpeed keeps no fp32 copy here
        for weights in model.parameters():
            weights.data = weights.data.float() if weights.requires_grad else weights.data
    print_main(f"packing: {packing}")
    words = loop.train(
        trainer,
        last,
        "fine-tuning",
        rules.epochs * sum(lengths),
        too_large="lower --max-tokens or --batch, or use --quantize nf4",
        too_fast=f"lower --learning-rate {rules.learning_rate} and add --redo",
    )
    return trainer.state.log_history, words


def pack(examples: Sequence[TrainingExample], room: int, seed: int) -> datasets.Dataset:
    """Examples in packs of at most ``room`` tokens. A longer example is a pack of its own: if all packs were as long as
    the longest example, a step would learn from many more pairs than it should.
    """
    packs = []
    if short := [example for example in examples if len(example.input_ids) <= room]:
        packs.append(pack_dataset(as_dataset(short).shuffle(seed=seed), room))
    if long := [example for example in examples if len(example.input_ids) > room]:
        packs.append(as_dataset(long).add_column("seq_lengths", [[len(example.input_ids)] for example in long]))
    return datasets.concatenate_datasets([part.cast(packs[-1].features) for part in packs])


def as_dataset(examples: Sequence[TrainingExample]) -> datasets.Dataset:
    """Examples as SFTTrainer wants them, in their order."""
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in examples], "labels": [row.labels for row in examples]}
    )


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
