"""The loop that both trainings share: rules, arguments, progress, checkpoints, figures."""

import dataclasses
import pickle
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from augcon.errors import UserError, one_line
from augcon.progress import bar
from augcon.train.base import can_bf16
from augcon.train.ranks import barrier, is_main, world_size

DEEPSPEED = Path(__file__).parent.parent.parent / "deepspeed.json"
_WHOLE = "whole"  # a file in a checkpoint that all processes have written their part of


@dataclasses.dataclass(frozen=True)
class TrainingRules:
    """How long and how fast a model learns; see the settings of the same names."""

    epochs: int = 4
    batch: int = 4  # pairs per process and step
    learning_rate: float = 5e-5
    seed: int = 42


def training_arguments(output: Path, rules: TrainingRules, steps: int) -> dict[str, Any]:
    """Arguments for TrainingArguments or a subclass of it; ``steps`` is their number in the whole training."""
    return {
        "output_dir": str(output),
        "num_train_epochs": rules.epochs,
        "per_device_train_batch_size": rules.batch,
        "learning_rate": rules.learning_rate,
        "warmup_steps": min(50, steps // 10),  # 50 (paper 4.1), except in a short training
        "weight_decay": 0.01,
        "bf16": can_bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),  # saves memory, of which a CPU has enough
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": torch.cuda.is_available(),
        "deepspeed": str(DEEPSPEED),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, steps // 20)),
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "seed": rules.seed,
    }


class _Progress(transformers.TrainerCallback):
    """The progress of a Trainer in AugCon's own bar; marks each checkpoint once all processes have written it."""

    def __init__(self, what: str, tokens: int) -> None:
        self.what, self.tokens = what, tokens  # in the whole training
        self.bar: Any = None
        self.began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        if is_main():
            self.bar = bar(state.max_steps, self.what, "steps")
            self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.bar and "loss" in logs:
            speed = (self.bar.format_dict["rate"] or 0) * self.tokens / self.bar.total
            shown = f"epoch {logs['epoch']:.1f}, loss {float(logs['loss']):.3f}, {speed:,.0f} tokens/s"
            self.bar.set_postfix_str(shown, refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        barrier()
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()

    def close(self) -> None:
        """Ends the line of the bar."""
        if self.bar:
            self.bar.close()


def train(trainer: Any, last: str | None, what: str, tokens: int, *, too_large: str, too_fast: str) -> str:
    """Trains, from the checkpoint ``last`` on if there is one; returns the figures of this run in words.

    ``tokens`` is their number in the whole training. Raises UserError, with what to do, when the training does not fit
    in memory or diverges, or a checkpoint cannot be written or read, or is not one of AugCon's.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    trainer.remove_callback(transformers.PrinterCallback)
    progress = _Progress(what, tokens)
    trainer.add_callback(progress)
    save = trainer._save_checkpoint

    def save_or_say(*arguments: Any, **more: Any) -> None:
        try:
            save(*arguments, **more)
        except Exception as error:  # torch has errors of its own for a full disk
            raise UserError(
                f"cannot write a checkpoint to {trainer.args.output_dir}: {one_line(error)}; see whether its disk is "
                "full, then run the same command again"
            ) from error

    trainer._save_checkpoint = save_or_say
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])  # all that a checkpoint names
    try:
        trainer.train(resume_from_checkpoint=last)
    except pickle.UnpicklingError as error:
        raise UserError(f"{last} holds more than the state of a training; remove it to go on without it") from error
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the training needs more memory than the GPU has; {too_large}") from error
    except Exception as error:
        if not last or progress.began is not None:
            raise
        raise UserError(f"cannot go on from {last} ({one_line(error)}); remove it, and run the same again") from error
    finally:
        progress.close()
    seconds = max(time.monotonic() - (progress.began or 0), 1e-9)
    if not all(weights.isfinite().all() for weights in trainer.model.parameters() if weights.requires_grad):
        raise UserError(f"the training diverged: weights are no longer finite; {too_fast}")
    steps, resumed = trainer.state.global_step, ""
    if last:
        resumed = f" from {Path(last).name} on"
        steps -= int(last.rpartition("-")[2])
    speed = tokens * steps / max(trainer.state.max_steps, 1) / world_size() / seconds
    return f"{steps:,} steps in {seconds:.0f} s{resumed}, {speed:,.0f} tokens/s per process, {peak_memory()}"


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in ``folder``, if any; those that are not whole are removed.

    Raises UserError when another number of processes has written it: each of them keeps its part of the optimizer.
    """
    for path in folder.glob("checkpoint-*"):
        if not (path / _WHOLE).exists():
            shutil.rmtree(path)
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    if last is None:
        return None
    writers = len(list(Path(last).glob("global_step*/*_optim_states.pt")))  # DeepSpeed writes one for each process
    if writers != world_size():
        raise UserError(
            f"the training in {folder} was begun by {writers} processes, and this run has {world_size()}; use "
            f"--num_gpus {writers}, or remove that folder to train anew"
        )
    return last


def peak_memory() -> str:
    """The most memory that this process has used, in words."""
    if torch.cuda.is_available():
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB per process (no GPU)"
