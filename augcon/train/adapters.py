"""LoRA adapters: reading one, and how it was trained."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from augcon.errors import UserError, one_line
from augcon.files import digest
from augcon.train.base import weights_digest

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
    """The weights that an adapter was trained over: the base, the digest of its weights, and how it was loaded."""

    base: str
    weights: str
    quantize: Literal["nf4", "none"]
    dtype: str = "bfloat16"

    def inputs(self) -> dict[str, str]:
        """As they are on record."""
        return {
            "base": self.base,
            "content of the base model": self.weights,
            "quantize": self.quantize,
            "dtype": self.dtype,
        }

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "TrainedWith":
        """The inverse of ``inputs``; of other inputs on record nothing is taken."""
        return cls(inputs["base"], inputs["content of the base model"], inputs["quantize"], inputs["dtype"])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its configuration, and by module A (of shape rank × in) and B (of shape out × rank)."""

    folder: Path
    config: dict[str, Any]
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
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return torch.mul(up.to(device, torch.float32) @ down.to(device, torch.float32), scale)


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter. Raises UserError when it is not there or cannot be merged exactly."""
    try:
        settings = (folder / "adapter_config.json").read_bytes()
        config = json.loads(settings)
        tensors = load_file(folder / "adapter_model.safetensors")
        content = digest(settings, (folder / "adapter_model.safetensors").read_bytes())
    except FileNotFoundError as error:
        missing = Path(error.filename or str(error)).name
        raise UserError(f"{folder} holds no adapter: there is no {missing}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {one_line(error)}") from error
    _refuse_what_is_not_exact(folder, config)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or not name.startswith("base_model.model."):
            raise UserError(
                f"the adapter in {folder} cannot be merged: its tensor {name!r} is not a LoRA of a linear layer"
            )
        factors.setdefault(module, {})[factor[0]] = tensor
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"the adapter in {folder} is damaged: A and B of {module} do not fit")
    if not factors:
        raise UserError(f"the adapter in {folder} is empty")
    return Adapter(folder, config, {module: (pair["A"], pair["B"]) for module, pair in factors.items()}, content)


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


def trained_over(adapter: Adapter, known: TrainedWith | None, base: Path, quantize: str) -> TrainedWith:
    """The weights that the adapter was trained over: as ``known`` from a record, else as ``quantize`` says.

    ``quantize`` is nf4, none, or auto for the record's. Raises UserError when the adapter belongs to another base than
    the one in the folder ``base``, or when nothing says how it was trained.
    """
    here = weights_digest(base)
    if known is None:
        if quantize == "auto":
            raise UserError(
                f"the adapter in {adapter.folder} has no record of how it was trained; add --quantize nf4 (QLoRA with "
                "bitsandbytes' NF4, double quantisation) or --quantize none (plain weights)"
            )
        return TrainedWith(adapter.base, here, quantize)  # type: ignore[arg-type]
    if quantize not in ("auto", known.quantize):
        raise UserError(f"the adapter was trained with --quantize {known.quantize}, not {quantize}")
    if known.weights != here:
        raise UserError(
            f"the adapter in {adapter.folder} belongs to another base: it was trained over {known.base!r}, whose "
            f"weights differ from those in {base}"
        )
    return known
