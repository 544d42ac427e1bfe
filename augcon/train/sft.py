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
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from augcon.errors import UserError
from augcon.train import base as training
from augcon.train import ranks
from augcon.train.chat import Example

# Of the largest logit: what rounding in 16 bits may change when nothing leaks. A leak changes far more.
_ROUNDING = 0.02


@dataclasses.dataclass(frozen=True)
class TuningRules:
    """How long and how fast the model learns; see the settings of the same names."""

    epochs: int = 4
    batch: int = 4  # pairs per process and step
    learning_rate: float = 5e-5
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What came out of it: the Trainer's log history, and the figures of this run, in words too."""

    log: list[dict[str, Any]]
    tokens_per_second: float  # of one process
    packing: str
    speed: str


def load_model(base: Path, quantize: training.Quantization, name: str, seed: int) -> PeftModel:
    """The base with a new adapter on all its linear layers. Raises UserError when it cannot be trained."""
    if getattr(transformers.AutoConfig.from_pretrained(base), "quantization_config", None):
        raise UserError(f"model {name!r} is quantised on disk, and no adapter can be merged; use what it was made from")
    transformers.set_seed(seed)  # the adapter starts random
    model = training.load_base(transformers.AutoModelForCausalLM, str(base), quantize)
    model.config.use_cache = False
    tuned = get_peft_model(model, training.lora("CAUSAL_LM"))
    config = tuned.peft_config["default"]
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
    examples: Sequence[Example],
    held_out: Sequence[Example],
    rules: TuningRules,
    checkpoints: Path,
    made_of: dict[str, Any],
) -> Tuned:
    """Trains the adapter in place, all processes together, from the last checkpoint on.

    ``made_of`` says what the training is of: checkpoints of another one are not taken up. Raises UserError
    when it does not fit in memory or its numbers run away.
    """
    datasets.disable_progress_bars()
    apart = stays_apart(model)
    lengths = [len(example.input_ids) for example in examples]
    # As long as the pairs of one step are together on average: the same number of tokens in every step.
    length = max(2, math.ceil(rules.batch * sum(lengths) / len(lengths)))
    packed = pack(examples, length, rules.seed) if apart else as_dataset(examples)
    batch = 1 if apart else rules.batch
    steps_an_epoch = math.ceil(len(packed) / (batch * ranks.processes()))
    last = training.last_checkpoint(checkpoints, made_of)
    arguments = training.common_arguments(
        checkpoints,
        epochs=rules.epochs,
        batch=batch,
        learning_rate=rules.learning_rate,
        steps=rules.epochs * steps_an_epoch,
        seed=rules.seed,
    )
    arguments |= {"max_length": max(length, *lengths), "packing": apart, "eval_on_start": bool(held_out) and not last}
    trainer = _trainer(model, tokenizer, packed, held_out, arguments)
    watch = training.watch(trainer, "fine-tuning")
    training.run(
        trainer,
        last,
        too_large="lower --max-tokens or --batch, or use --quantize nf4",
        too_fast=f"remove {checkpoints} and lower --learning-rate {rules.learning_rate}",
    )
    tokens_per_second = sum(lengths) * watch.steps / steps_an_epoch / ranks.processes() / max(watch.seconds, 1e-9)
    return Tuned(
        log=trainer.state.log_history,
        tokens_per_second=tokens_per_second,
        packing=(
            f"{len(examples):,} pairs in {len(packed):,} packs of at most {length:,} tokens, longer pairs alone, "
            f"{sum(lengths) / sum(max(length, sum(parts)) for parts in packed['seq_lengths']):.0%} full"
            if apart
            else f"none, {rules.batch} pairs side by side, for this model's attention looks across packs"
        ),
        speed=(
            f"{watch.steps:,} steps in {watch.seconds:.0f} s{f' from {Path(last).name} on' if last else ''}, "
            f"{tokens_per_second:,.0f} tokens/s a process, {training.peak_memory()}"
        ),
    )


def _trainer(
    model: PeftModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    packed: datasets.Dataset,
    held_out: Sequence[Example],
    arguments: dict[str, Any],
) -> SFTTrainer:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **{**arguments, "save_total_limit": None},  # so that the epochs can be compared
            eval_packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_eval_batch_size=1,  # so that the mean over batches is the mean over pairs
            prediction_loss_only=True,
            eval_strategy="epoch" if held_out else "no",
        ),
        train_dataset=packed,
        eval_dataset=as_dataset(held_out) if held_out else None,
        processing_class=tokenizer,
    )
    if not training.can_bf16():  # SFTTrainer makes a QLoRA adapter bf16, but DeepSpeed keeps no fp32 copy here
        for weights in model.parameters():
            weights.data = weights.data.float() if weights.requires_grad else weights.data
    return trainer


def pack(examples: Sequence[Example], room: int, seed: int) -> datasets.Dataset:
    """Examples in packs of at most ``room`` tokens. A longer one is a pack alone: were all packs as long as the longest
    example, a step would learn from many more pairs than it should.
    """
    packs = []
    if short := [example for example in examples if len(example.input_ids) <= room]:
        packs.append(pack_dataset(as_dataset(short).shuffle(seed=seed), room))
    if long := [example for example in examples if len(example.input_ids) > room]:
        packs.append(as_dataset(long).add_column("seq_lengths", [[len(example.input_ids)] for example in long]))
    return datasets.concatenate_datasets([part.cast(packs[-1].features) for part in packs])


def as_dataset(examples: Sequence[Example]) -> datasets.Dataset:
    """Examples as SFTTrainer wants them, in their order."""
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in examples], "labels": [row.labels for row in examples]}
    )


@torch.no_grad()
def stays_apart(model: torch.nn.Module) -> bool:
    """Whether an example in a pack is blind to its neighbour: with another neighbour, its logits are the same.

    Transformers keeps packs apart by their positions, which start anew, and not every model takes part in that.
    """
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    where = next(model.parameters()).device
    behind = []
    for neighbour in ([5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]):
        batch = collate([{"input_ids": neighbour}, {"input_ids": [17, 18, 19, 20, 21, 22]}])
        inputs = {
            name: value.to(where) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }
        behind.append(model(**inputs, use_cache=False).logits[0, 6:].float())
    return float((behind[0] - behind[1]).abs().max()) <= _ROUNDING * float(behind[0].abs().max())


def draw_losses(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the training and held-out loss over the steps, with the ends of the epochs marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = [(row["step"], row["loss"]) for row in log if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in log if "eval_loss" in row]
    last = max((row["step"] for row in log), default=0)
    epochs = round(max((row["epoch"] for row in log), default=0))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for epoch in range(1, epochs + 1):
        axes.axvline(epoch * last / epochs, color="0.85", linewidth=1, zorder=0)
    axes.plot(*zip(*trained, strict=True), label="training") if trained else None
    axes.plot(*zip(*held_out, strict=True), "o-", label="held out") if held_out else None
    axes.set(xlabel=f"step (vertical lines: ends of the {epochs} epochs)", ylabel="loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend() if trained or held_out else None
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
