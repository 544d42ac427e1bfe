"""LoRA adapters: reading one, and how it was trained."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import TypedDict

from augcon.errors import UserError, one_line
from augcon.files import digest
from augcon.hub import model_folder
from augcon.train.base import weights_digest

# Fields of LoraConfig that the merge takes into account, or that change nothing once the training is over. Any
# other one must be as it is by default.
_UNDERSTOOD = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules"),
    *("exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    "eva_config",
}
_ON_RECORD = {"weights": "content of the base model"}  # names that differ there


class _Config(TypedDict):
    """What is read of an adapter's configuration; there is more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    lora_alpha: float
    alpha_pattern: NotRequired[dict[str, float] | None]
    use_rslora: NotRequired[bool]
    base_model_name_or_path: NotRequired[str | None]


@dataclasses.dataclass(frozen=True)
class TrainedWith:
    """The weights that an adapter was trained over: the base, the digest of its weights, and how it was loaded."""

    base: str
    weights: str
    quantize: Literal["nf4", "none"]
    dtype: str = "bfloat16"

    def inputs(self) -> dict[str, str]:
        """As they are on record."""
        return {_ON_RECORD.get(name, name): value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "TrainedWith":
        """The inverse of ``inputs``; of other inputs on record nothing is taken."""
        known = {name: inputs[_ON_RECORD.get(name, name)] for name in cls.__dataclass_fields__}
        return TypeAdapter(cls).validate_python(known)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its configuration, and by module A (of shape rank × in) and B (of shape out × rank)."""

    folder: Path
    base: str  # the one that it names itself, if any
    config: _Config
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    digest: str

    def change(self, module: str, device: torch.device) -> torch.Tensor:
        """What the adapter adds to a module's weight, in fp32, of shape out × in."""
        down, up = self.factors[module]
        rank = down.shape[0]
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return torch.mul(up.to(device, torch.float32) @ down.to(device, torch.float32), scale)


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, downloaded from the hub unless it is a folder here. Raises UserError without one."""
    try:
        return model_folder(name)  # the files of either kind have the same endings
    except UserError as error:
        raise UserError(f"--lora {name!r} names no adapter: {error}") from error


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter. Raises UserError when it is not there or cannot be merged exactly."""
    weights = folder / "adapter_model.safetensors"
    try:
        settings = (folder / "adapter_config.json").read_bytes()
        config = TypeAdapter(_Config).validate_json(settings)
        tensors = load_file(weights)
        content = digest(settings, weights.read_bytes())
    except FileNotFoundError as error:
        missing = Path(error.filename or str(error)).name
        raise UserError(f"{folder} holds no adapter: there is no {missing}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read: {one_line(error)}") from error
    if odd := list(_inexact(config)):
        raise UserError(f"the adapter in {folder} cannot be merged exactly: {', '.join(odd)}")
    pairs: defaultdict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)):
            raise UserError(f"the adapter in {folder} cannot be merged: {name!r} is not a LoRA of a linear layer")
        pairs[match[1]][match[2]] = tensor
    for module, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"the adapter in {folder} is damaged: A and B of {module} do not fit")
    if not pairs:
        raise UserError(f"the adapter in {folder} is empty")
    factors = {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}
    return Adapter(folder, config.get("base_model_name_or_path") or "", config, factors, content)


def _inexact(config: Mapping[str, object]) -> Iterator[str]:
    default = LoraConfig().to_dict()
    known = {
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # those that keep the base as it is
    }
    for field, value in {"peft_type": None, **config}.items():
        understood = field in _UNDERSTOOD or not value or value == default.get(field)
        if value not in known[field] if field in known else not understood:
            yield f"{field}={value!r}"


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
