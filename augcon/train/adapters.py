"""LoRA adapters and the base models that they belong to: reading them, and telling them apart."""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from augcon.errors import UserError, one_line

TRAINED_WITH = "trained_with.json"  # beside an adapter: how it was trained
WEIGHTS_INDEX = "model.safetensors.index.json"
# What a model needs besides its weights: configuration, tokenizer, templates.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")
# Fields of LoraConfig that the merge takes into account, or that change nothing once the training is over. Any
# other one must be as it is by default.
_UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"),
}
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class TrainedWith:
    """The weights that an adapter was trained over: the base, its fingerprint, and how it was loaded."""

    base: str
    fingerprint: str
    quantize: Literal["nf4", "none"]
    dtype: str = "bfloat16"

    def save(self, folder: Path) -> None:
        """Writes the record beside an adapter, or above a folder of checkpoints."""
        (folder / TRAINED_WITH).write_text(json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: by module (A of shape rank × in, B of shape out × rank), and what it says of itself."""

    folder: Path
    config: dict[str, Any]
    trained_with: TrainedWith | None
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    digest: str

    @property
    def base(self) -> str:
        """The base that the adapter names itself; empty where it names none."""
        return self.config.get("base_model_name_or_path") or ""

    def change(self, module: str, device: torch.device) -> torch.Tensor:
        """What the adapter adds to a module's weight, in fp32, of shape out × in."""
        down, up = self.factors[module]
        rank = down.shape[0]
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, module), self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return scale * (up.to(device, torch.float32) @ down.to(device, torch.float32))


def model_folder(name: str) -> Path:
    """The folder of a base model, from the hub where it is no folder here. Raises UserError when there is none."""
    if Path(name).is_dir():
        return Path(name)
    try:
        wanted = ["*.safetensors", *COMPANIONS]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["consolidated*", "*/*"]))
    except (OSError, ValueError) as error:  # the hub's errors are of these kinds
        raise UserError(
            f"base model {name!r} is no folder here, and the hub does not give it ({one_line(error, 100)}); name "
            "a folder or another model with --model"
        ) from error


def base_shards(base: Path) -> dict[str, list[str]]:
    """The base's weight files with the names of their tensors. Raises UserError when they cannot be had."""
    index = base / WEIGHTS_INDEX
    try:
        if index.exists():
            shards: dict[str, list[str]] = {}
            for tensor, shard in json.loads(index.read_text())["weight_map"].items():
                shards.setdefault(shard, []).append(tensor)
            return shards
        with safe_open(base / "model.safetensors", "pt") as weights:
            return {"model.safetensors": list(weights.keys())}
    except FileNotFoundError as error:
        if list(base.glob("*.bin")):
            raise UserError(f"{base} has its weights as .bin only; save it as safetensors first") from error
        raise UserError(f"{base} holds no model (no {index.name} or model.safetensors)") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"the weights in {base} cannot be read: {one_line(error)}") from error


def fingerprint(base: Path) -> str:
    """Tells one set of weights from another without reading it whole: all headers, and samples of the data."""
    digest = hashlib.sha256()
    for shard in sorted(base_shards(base)):
        try:
            with (base / shard).open("rb") as file:
                digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
                size = file.seek(0, os.SEEK_END)
                for part in range(64):
                    file.seek(part * size // 64)
                    digest.update(file.read(4096))
        except OSError as error:
            raise UserError(f"the weights in {base} cannot be read: {one_line(error)}") from error
    return digest.hexdigest()[:16]


def companions_digest(folder: Path) -> str:
    """A digest of all that a model needs besides its weights: its chat template shapes what is learnt."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in COMPANIONS for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter. Raises UserError when it is not there or cannot be merged exactly."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        digest = hashlib.sha256((folder / "adapter_config.json").read_bytes())
        digest.update((folder / "adapter_model.safetensors").read_bytes())
        record = next((at for at in (folder, folder.parent) if (at / TRAINED_WITH).exists()), None)
        trained_with = TrainedWith(**json.loads((record / TRAINED_WITH).read_text())) if record else None
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no adapter: there is no {Path(error.filename or str(error)).name}") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {one_line(error)}") from error
    _refuse_what_is_not_exact(folder, config)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or not name.startswith("base_model.model."):
            raise UserError(
                f"the adapter in {folder} cannot be merged: its tensor {name!r} is no LoRA of a linear layer"
            )
        factors.setdefault(module, {})[factor[0]] = tensor
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"the adapter in {folder} is damaged: A and B of {module} do not fit")
    if not factors:
        raise UserError(f"the adapter in {folder} is empty")
    both = {module: (pair["A"], pair["B"]) for module, pair in factors.items()}
    return Adapter(folder, config, trained_with, both, digest.hexdigest()[:16])


def _refuse_what_is_not_exact(folder: Path, config: dict[str, Any]) -> None:
    default = LoraConfig().to_dict()
    odd = [
        f"{field}={value!r}"
        for field, value in config.items()
        if field not in _UNDERSTOOD and value != default.get(field) and value
    ]
    if config.get("peft_type") != "LORA":
        odd = [f"peft_type={config.get('peft_type')!r}"]
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        odd.append(f"task_type={config['task_type']!r}")
    if config.get("init_lora_weights", True) not in _INITS_THAT_KEEP_THE_BASE:
        odd.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if odd:
        raise UserError(f"the adapter in {folder} cannot be merged exactly: {', '.join(odd)}")


def weights_trained_over(adapter: Adapter, base: Path, quantize: str) -> TrainedWith:
    """How the weights looked that the adapter was trained over. ``quantize``: nf4, none, or auto, as recorded.

    Raises UserError when the adapter belongs to another base, or does not say and nobody else does.
    """
    known, here = adapter.trained_with, fingerprint(base)
    if known is None:
        if quantize == "auto":
            raise UserError(
                f"the adapter in {adapter.folder} does not say how it was trained; say --quantize nf4 (QLoRA with "
                "bitsandbytes' NF4, double quantisation) or --quantize none (plain weights)"
            )
        return TrainedWith(adapter.base, here, quantize)  # type: ignore[arg-type]
    if quantize not in ("auto", known.quantize):
        raise UserError(f"the adapter was trained with --quantize {known.quantize}, not {quantize}")
    if known.fingerprint != here:
        raise UserError(
            f"the adapter in {adapter.folder} belongs to another base: it was trained over {known.base!r} with other "
            f"weights than those in {base}"
        )
    return known
