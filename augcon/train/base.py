"""What the scorer's training and fine-tuning share: base model, tokenizer, Trainer, checkpoints, figures."""

import hashlib
import json
import logging
import os
import resource
import shutil
import socket
import time
import warnings
from pathlib import Path
from typing import Any, Literal

# Before the libraries below look around for themselves.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait are slow beside other work
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
for _name in ("bitsandbytes", "huggingface_hub", "torch.distributed", "torch.utils.checkpoint"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")  # a user sees our lines

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import peft  # noqa: E402
import transformers  # noqa: E402

from augcon import progress  # noqa: E402
from augcon.errors import UserError, one_line  # noqa: E402
from augcon.machine.gpus import visible_gpus  # noqa: E402
from augcon.train.ranks import is_main, on_main, processes, wait_for_all, waiting_room  # noqa: E402

Quantization = Literal["auto", "nf4", "none"]
DEEPSPEED = Path(__file__).parent.parent.parent / "deepspeed.json"
_WEIGHTS = ("*.safetensors", "*.bin")


def start_processes() -> None:
    """Joins the other processes of this run, if any, each on a GPU of its own; call it before anything else here.

    Raises UserError where there are GPUs that PyTorch cannot use: on the CPU a large model would take for ever.
    """
    if not torch.cuda.is_available() and (gpus := visible_gpus()):
        raise UserError(
            f"there are {len(gpus)} GPUs, but PyTorch {torch.__version__} cannot use them ({_why_no_gpu()}); update "
            "the NVIDIA driver, or PyTorch with bash install.sh, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
        )
    import deepspeed  # slow, and noisy where there is no GPU

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "RANK" not in os.environ:  # no launcher
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local + 1} has no GPU: there are {torch.cuda.device_count()}; use --num_gpus")
        torch.cuda.set_device(local)
    else:
        here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))  # LOCAL_SIZE: the launcher's
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would compile C++ on the spot
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    waiting_room()


def _why_no_gpu() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an old driver; a build of PyTorch without CUDA
        return one_line(error, 120)
    return "it does not say why"


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def can_bf16() -> bool:
    """Whether the device computes in bf16 at full speed; a CPU trains a small model faster in fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def quantization(kind: Quantization) -> transformers.BitsAndBytesConfig | None:
    """NF4 with double quantisation and bf16 compute (QLoRA), or none; auto: NF4 on a GPU that computes in bf16."""
    if kind == "none" or (kind == "auto" and not can_bf16()):
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora(task_type: str) -> peft.LoraConfig:
    """r = 32, α = 32 on all linear layers (paper 4.1). ``task_type`` keeps a head that is trained in full."""
    return peft.LoraConfig(task_type=task_type, r=32, lora_alpha=32, target_modules="all-linear")


def check_base(model: str) -> str:
    """A short digest of which model this is, to know it again. Raises UserError when it is not there.

    Of a folder: its settings, and size, head and tail of its weights; of a name on the hub: the revision.
    """
    folder = Path(model)
    if folder.is_dir():
        weights = sorted(path for kind in _WEIGHTS for path in folder.glob(kind))
        if not (folder / "config.json").is_file() or not weights:
            raise UserError(f"the folder {model} holds no model: config.json and *.safetensors are wanted")
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for path in weights:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{path.name} {size}".encode() + file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
        return digest.hexdigest()[:16]
    if folder.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise UserError(f"there is no folder {model}; give a model's folder or its name on the hub")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {model!r} is no folder and cannot be had from the hub ({one_line(error, 160)}); give a model's "
            "folder, check the name and the network, or use what is downloaded already with HF_HUB_OFFLINE=1"
        ) from error
    return str(getattr(config, "_commit_hash", None) or model)


def load_base(kind: Any, model: str, quantize: Quantization = "auto", **arguments: Any) -> Any:
    """A base model on this process's device, in bf16 or, where the device cannot, fp32.

    ``kind`` is one of Transformers' auto classes. Raises UserError when the model cannot be loaded.
    """
    try:
        loaded = kind.from_pretrained(
            model,
            dtype=torch.bfloat16 if can_bf16() else torch.float32,
            quantization_config=quantization(quantize),
            device_map={"": device()},
            **arguments,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"model {model!r} does not fit in the GPU's memory; use a smaller one") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {one_line(error)}") from error
    return with_gradients(loaded)


def with_gradients(model: Any) -> Any:
    """The same model, kept from bitsandbytes' CPU kernel for inference.

    The first pass without gradients would change its 4-bit weights for that kernel, for good, and the kernel gives
    no gradients: what was trained before an evaluation would be trained wrongly after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(model: str) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right with a token that is not the end token.

    The vocabulary never grows: where no pad token is set, one that texts cannot have stands in (a reserved
    one; the one for unknown words where bytes stand in for those; the one that begins a text).
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer of model {model!r} cannot be loaded: {one_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
        spare = [token for name in ("pad", "reserved", "unused") for token in known if name in token]
        candidates = [*spare, tokenizer.unk_token, tokenizer.bos_token, *known]
        usable = [token for token in candidates if token and token != tokenizer.eos_token]
        if not usable:
            raise UserError(f"the tokenizer of model {model!r} has no token to pad with; set its pad_token")
        tokenizer.pad_token = usable[0]
    return tokenizer


def common_arguments(
    output: Path, *, epochs: float, batch: int, learning_rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Arguments for TrainingArguments or one of its kind; ``steps`` in all set the warm-up."""
    return {
        "output_dir": str(output),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "warmup_steps": warm_up(steps),
        "weight_decay": 0.01,
        "bf16": can_bf16(),
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),  # saves memory, which a CPU has
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": torch.cuda.is_available(),
        "deepspeed": str(DEEPSPEED),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": max(1, min(10, steps // 20)),
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "seed": seed,
    }


def warm_up(steps: int) -> int:
    """50 steps (paper 4.1), but never more than a tenth of all."""
    return min(50, steps // 10)


class Watch(transformers.TrainerCallback):
    """The progress of a Trainer in our own bar; checkpoints that count once they are whole."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None
        self.started = self.seconds = 0.0
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.monotonic()
        self.steps = -state.global_step
        if is_main():
            self.bar = progress.bar(state.max_steps, self.what, "steps")
            self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix_str(f"epoch {logs['epoch']:.1f}, loss {float(logs['loss']):.3f}", refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_all()
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "whole").touch()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.monotonic() - self.started
        self.steps += state.global_step
        if self.bar is not None:
            self.bar.close()


def watch(trainer: transformers.Trainer, what: str) -> Watch:
    """Makes a Trainer tell of its progress in our bar alone, and mark its checkpoints."""
    trainer.remove_callback(transformers.PrinterCallback)
    watching = Watch(what)
    trainer.add_callback(watching)
    return watching


def run(trainer: transformers.Trainer, last: str | None, *, too_large: str, too_fast: str) -> None:
    """Trains, from the checkpoint ``last`` on if there is one.

    Raises UserError, with what to do, when it does not fit in memory or its numbers run away.
    """
    try:
        trainer.train(resume_from_checkpoint=last)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the training needs more memory than the GPU has; {too_large}") from error
    if not all(weights.isfinite().all() for weights in trainer.model.parameters() if weights.requires_grad):
        raise UserError(f"the model's numbers ran away; {too_fast}")


def last_checkpoint(folder: Path, made_of: dict[str, Any]) -> str | None:
    """The newest whole checkpoint in ``folder`` to go on from, if any.

    What belongs to another training (other ``made_of``) is removed, as are the checkpoints that are not whole.
    Raises UserError when it was begun by another number of processes, for its checkpoints are made of their parts.
    """

    def prepare() -> str | None:
        record = folder / "made_of.json"
        wanted = {"of": json.dumps(made_of, ensure_ascii=False, sort_keys=True), "processes": processes()}
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or torn by a kill before there was a checkpoint
            known = {}
        if known.get("of") == wanted["of"] and known != wanted and any(folder.glob("checkpoint-*/whole")):
            raise UserError(
                f"the training in {folder} was begun by {known['processes']} processes, and this run has "
                f"{processes()}; use as many as then, or remove that folder to train anew"
            )
        if known != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(wanted, ensure_ascii=False), encoding="utf-8")
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in found:
            if not (path / "whole").exists():
                shutil.rmtree(path)
        return next((str(path) for path in reversed(found) if path.exists()), None)

    return on_main(prepare)


def peak_memory() -> str:
    """The most memory that this process has used, in words."""
    if torch.cuda.is_available():
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB a process (no GPU)"
