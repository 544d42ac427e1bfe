"""Base models: telling the content of one, loading it on this process's device, its tokenizer, LoRA and NF4."""

import json
import logging
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import torch.distributed as dist
import transformers

from augcon.errors import UserError, one_line
from augcon.files import digest
from augcon.hub import COMPANIONS
from augcon.train.ranks import is_main, print_main, rank, waiting_group, world_size

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for DeepSpeed, which is imported later

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed would run what a checkpoint says
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # or it asks, in mid-run, whether to run a model's own code

Quantization = Literal["auto", "nf4", "none"]
LORA_RANK = 32
# What lies beside a model and its companions.
_NOT_COMPANIONS = ("*.index.json", "adapter_config.json", "run.json")


def start_processes(gpus: int = 0) -> None:
    """Connects this process with the others of the run, each on a GPU of its own; call it before anything else here.

    Raises UserError where PyTorch cannot use the ``gpus`` of this machine: a large model would take forever on the CPU.
    """
    if gpus and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # an old driver; a build of PyTorch without CUDA
            raise UserError(
                f"there are {gpus} GPUs, but PyTorch {torch.__version__} cannot use them ({one_line(error, 120)}); "
                "update the NVIDIA driver, or PyTorch with bash install.sh, or train on the CPU with "
                "CUDA_VISIBLE_DEVICES= (empty)"
            ) from error
    print_main("loading: DeepSpeed and the libraries of the model")
    import deepspeed  # slow, and noisy where there is no GPU

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if "RANK" not in os.environ:  # no launcher
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local + 1} has no GPU: there are {torch.cuda.device_count()}; use --num_gpus")
        torch.cuda.set_device(local)
    else:
        here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))  # LOCAL_SIZE is set by the launcher
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it compiles C++ at once
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if os.environ["MASTER_ADDR"] == "127.0.0.1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        _connect_on_loopback(backend)
    deepspeed.init_distributed(backend, verbose=False)
    waiting_group()


def _connect_on_loopback(backend: str) -> None:
    """Connects the processes of this machine; PyTorch, by itself, would have them listen to the network."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    port, listener, long = int(os.environ["MASTER_PORT"]), None, timedelta(minutes=30)
    if is_main():
        listener = socket.create_server(("127.0.0.1", port))
        port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, world_size(), is_main(), long, master_listen_fd=listener.detach() if listener else None
    )
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=long)


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def gpu_memory(planned: float) -> int:
    """The bytes of this process's GPU to plan for: as many GiB as ``planned``, or all where that is 0."""
    return round(planned * 2**30) or torch.cuda.get_device_properties(device()).total_memory


def can_bf16() -> bool:
    """Whether the device computes in bf16 at full speed; a CPU trains a small model faster in fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def quantization(kind: Quantization) -> transformers.BitsAndBytesConfig | None:
    """NF4 with double quantisation and bf16 compute (QLoRA), or None; auto: NF4 on a GPU that computes in bf16."""
    if kind == "none" or (kind == "auto" and not can_bf16()):
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora(task_type: str) -> peft.LoraConfig:
    """r = 32, α = 32 on all linear layers (paper 4.1). ``task_type`` decides on a head that is trained in full."""
    return peft.LoraConfig(task_type=task_type, r=LORA_RANK, lora_alpha=32, target_modules="all-linear")


# A model on disk


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a model. Raises UserError when there are none."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"cannot read {index}: {one_line(error)}") from error
    if not (folder / "model.safetensors").exists():
        raise UserError(
            f"{folder} holds no model: there is no model.safetensors or {index.name}; "
            "save a model of .bin files as safetensors first"
        )
    return [folder / "model.safetensors"]


def weights_digest(folder: Path) -> str:
    """A digest that tells one model's weights from another's without reading them whole: sizes, heads and samples."""
    samples: list[object] = []
    try:
        for path in weight_files(folder):
            with path.open("rb") as file:
                samples += [file.read(1 << 20), size := file.seek(0, os.SEEK_END)]
                for part in range(64):
                    file.seek(part * size // 64)
                    samples.append(file.read(4096))
    except OSError as error:
        raise UserError(f"cannot read the weights in {folder}: {one_line(error)}") from error
    return digest(*samples)


def companions(folder: Path) -> list[Path]:
    """The files of a model that are not weights: configuration, tokenizer, chat template, licence."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern)}
    return sorted(path for path in found if not any(path.match(other) for other in _NOT_COMPANIONS))


def companions_digest(folder: Path) -> str:
    """A digest of all that a model needs besides its weights: its chat template, for one, shapes what is learnt."""
    return digest(*(part for path in companions(folder) for part in (path.name, path.read_bytes())))


# A model in memory


def read_config(folder: Path) -> Any:
    """The configuration of a model. Raises UserError where it is none, or where it needs code of the model's own."""
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        own = "it brings code of its own, which is not run; choose another"
        why = own if "trust_remote_code" in str(error) else one_line(error)
        raise UserError(f"model {str(folder)!r} cannot be loaded: {why}") from error


def load_base(kind: Any, model: str, quantize: Quantization = "auto", **arguments: Any) -> Any:
    """A base model on this process's device, in bf16 or, where the device cannot, fp32.

    ``kind`` is one of Transformers' auto classes. Raises UserError when the model cannot be loaded.
    """
    print_main(f"loading: the weights of {model!r}")
    try:
        loaded = kind.from_pretrained(
            model,
            dtype=torch.bfloat16 if can_bf16() else torch.float32,
            quantization_config=quantization(quantize),
            device_map={"": device()},
            use_safetensors=True,
            **arguments,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"model {model!r} does not fit in the GPU's memory; use a smaller one") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model {model!r} cannot be loaded: {one_line(error)}") from error
    return with_gradients(loaded)


def with_gradients(model: Any) -> Any:
    """The same model without bitsandbytes' CPU kernel for inference, which gives no gradients.

    At the first pass without gradients it would convert the weights for good: training would go wrong from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(model: str) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right with a token that is not the end token.

    The vocabulary never grows: where no pad token is set, another special token is, a reserved one if there is any.
    """
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer of model {model!r} cannot be loaded: {one_line(error)}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        known = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
        spare = [token for name in ("pad", "reserved", "unused") for token in known if name in token]
        tokenizer.pad_token = next((token for token in [*spare, *known] if token != tokenizer.eos_token), None)
        if tokenizer.pad_token is None:
            raise UserError(f"the tokenizer of model {model!r} has no token to pad with; set its pad_token")
    return tokenizer
