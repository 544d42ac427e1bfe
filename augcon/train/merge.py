"""A LoRA adapter merged into the weights that it was trained over, one weight file at a time."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from augcon.errors import UserError, one_line
from augcon.train.adapters import (
    COMPANIONS,
    TRAINED_WITH,
    WEIGHTS_INDEX,
    Adapter,
    TrainedWith,
    base_shards,
    companions_digest,
)
from augcon.train.base import quantization

MERGED_FROM = "merged_from.json"  # in a merged model: what it was made of
_NOT_COMPANIONS = ("*.index.json", "adapter_config.json", TRAINED_WITH, MERGED_FROM)
_TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


def merge(
    adapter: Adapter, base: Path, trained: TrainedWith, output: Path, device: torch.device, tick: Callable[[int], Any]
) -> tuple[int, int]:
    """Writes the merged model to ``output``, which takes its name when it is complete.

    Every weight becomes what training saw of it (for NF4 each quantised layer is quantised as at loading and taken
    back), plus the adapter's change, all in fp32; each tensor keeps its place and type. ``tick`` hears of each
    tensor. At most one weight file is in memory. Returns how many layers were quantised and how many files written.
    Raises UserError, and leaves no output, when the parts do not fit.
    """
    shards = base_shards(base)
    quantized = _check_fit(adapter, base, shards, trained.quantize)
    unfinished = output.with_name(output.name + ".unfinished")
    left = set(adapter.factors)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for shard in shards:
            merged = {}
            for name, tensor in _tensors(base / shard):
                module = name.removesuffix(".weight")
                if module in quantized or module in adapter.factors:
                    seen = _seen_in_training(tensor, module in quantized, getattr(torch, trained.dtype), device)
                    if module in adapter.factors:
                        seen += adapter.change(module, device)
                        left.remove(module)
                    tensor = seen.to(tensor.dtype).cpu()
                    if not tensor.isfinite().all():
                        raise UserError(f"merging {module} gives numbers that are not finite; the adapter is damaged")
                merged[name] = tensor
                tick(1)
            save_file(merged, unfinished / shard, metadata={"format": "pt"})
            del merged
        if left:
            raise UserError(f"{len(left)} layers of the adapter were not used, {min(left)} for one")
        _copy_companions(adapter, base, unfinished)
        record = made_of(adapter, base, trained)
        (unfinished / MERGED_FROM).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        for file in unfinished.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(output, ignore_errors=True)
        unfinished.replace(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(quantized), len(shards)


def made_of(adapter: Adapter, base: Path, trained: TrainedWith) -> dict[str, str]:
    """What a merged model records of its parts."""
    return {**dataclasses.asdict(trained), "digest": adapter.digest, "companions": companions_digest(base)}


def _tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(shard, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                yield name, weights.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{shard} cannot be read: {one_line(error)}") from error


def _seen_in_training(weight: torch.Tensor, quantized: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A weight as training saw it, in fp32 on ``device``."""
    weight = weight.to(device, dtype)
    if quantized:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Params4bit

        packed = Params4bit(weight, compress_statistics=True, quant_type="nf4").to(device)
        weight = dequantize_4bit(packed.data, packed.quant_state)
    return weight.float()


def _check_fit(adapter: Adapter, base: Path, shards: dict[str, list[str]], quantize: str) -> set[str]:
    """The modules that loading in NF4 would quantise. Raises UserError when adapter and base do not fit."""
    try:
        config = transformers.AutoConfig.from_pretrained(base)
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{base} is no model that can be merged: {one_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{base} is quantised on disk; merge into the model that it was made from")
    missing = [shard for shard in shards if not (base / shard).is_file()]
    if missing:
        raise UserError(f"{base} lacks {missing[0]}, which its index names")
    on_disk = {name for names in shards.values() for name in names}
    linear = {name: m.weight.shape for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    for module, (down, up) in adapter.factors.items():
        if module not in linear or linear[module] != (up.shape[0], down.shape[1]):
            found = "×".join(map(str, linear[module])) if module in linear else "no linear layer"
            raise UserError(
                f"the adapter in {adapter.folder} belongs to another base: it wants {module} of "
                f"{up.shape[0]}×{down.shape[1]}, {base} has {found}"
            )
    quantized: set[str] = set()
    if quantize == "nf4":
        keep = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        replace_with_bnb_linear(model, keep, quantization("nf4"))
        quantized = {name for name, m in model.named_modules() if hasattr(m, "source_cls")}
    elsewhere = [name for name in {*quantized, *adapter.factors} if f"{name}.weight" not in on_disk]
    tied = [name for name in adapter.factors if name in set(_tied(model))]
    if elsewhere or tied:
        why = f"{min(tied)} shares its weights" if tied else f"{min(elsewhere)} has another name or form on disk"
        raise UserError(f"the adapter cannot be merged exactly into {base}: {why}")
    return quantized


def _tied(model: transformers.PreTrainedModel) -> Iterator[str]:
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        both = (model.get_input_embeddings(), model.get_output_embeddings())
        yield from (name for name, module in model.named_modules() if any(module is end for end in both))


def _copy_companions(adapter: Adapter, base: Path, output: Path) -> None:
    """Copies what is not weights, byte for byte; the tokenizer is the adapter's where it has another one."""
    own = _has_another_tokenizer(adapter.folder, base)
    for folder, wanted in ((base, lambda name: not (own and _of_tokenizer(name))), (adapter.folder, _of_tokenizer)):
        if folder == adapter.folder and not own:
            continue
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                if wanted(file.name) and not any(file.match(skip) for skip in _NOT_COMPANIONS):
                    shutil.copyfile(file, output / file.name)
    if (base / WEIGHTS_INDEX).exists():
        shutil.copyfile(base / WEIGHTS_INDEX, output / WEIGHTS_INDEX)


def _of_tokenizer(name: str) -> bool:
    return name.startswith(_TOKENIZER)


def _has_another_tokenizer(folder: Path, base: Path) -> bool:
    """Whether the adapter brings a tokenizer with other words or another template than the base's."""
    if not (folder / "tokenizer_config.json").exists():
        return False
    theirs, bases = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, base))
    return theirs.get_vocab() != bases.get_vocab() or theirs.chat_template != bases.chat_template
