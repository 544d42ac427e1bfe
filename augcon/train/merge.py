"""A LoRA adapter merged into the weights that it was trained over, one weight file at a time."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from augcon.errors import UserError, one_line
from augcon.progress import bar
from augcon.train.adapters import Adapter, TrainedWith
from augcon.train.base import Quantization, companions, device, quantization, read_config, weight_files

# How the files of a tokenizer begin.
_TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")


def merge(adapter: Adapter, base: Path, trained: TrainedWith, output: Path) -> tuple[int, int]:
    """Writes the merged model into the folder ``output``; returns how many layers were quantised and files written.

    Every weight becomes what training saw of it (for NF4 each quantised layer is quantised as when it is loaded, and
    dequantised), plus the adapter's change, all in fp32; each tensor keeps its place and type. At most one weight file
    is in memory. Raises UserError when the parts do not fit.
    """
    files = weight_files(base)
    names = {name for path in files for name in _names(path)}
    quantized = _check_fit(adapter, base, names, trained.quantize)
    with bar(len(names), "merge", "tensors") as progress:
        for path in files:
            tensors = load_file(path)
            for name, tensor in tensors.items():
                module = name.removesuffix(".weight")
                if module in quantized or module in adapter.factors:
                    seen = _seen_in_training(tensor, module in quantized, getattr(torch, trained.dtype))
                    if module in adapter.factors:
                        seen += adapter.change(module, device())
                    tensors[name] = seen.to(tensor.dtype).cpu()
                    if not tensors[name].isfinite().all():
                        raise UserError(f"merging {module} gives numbers that are not finite; the adapter is damaged")
                progress.update()
            try:
                save_file(tensors, output / path.name, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"cannot write {output / path.name}: {one_line(error)}") from error
            del tensors  # before the next file is read
    _copy_companions(adapter, base, output)
    return len(quantized), len(files)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _seen_in_training(weight: torch.Tensor, quantized: bool, dtype: torch.dtype) -> torch.Tensor:
    weight = weight.to(device(), dtype)
    if quantized:
        packed: Any = Params4bit(weight, compress_statistics=True, quant_type="nf4").to(device())
        weight = dequantize_4bit(packed.data, packed.quant_state)
    return weight.float()


def _check_fit(adapter: Adapter, base: Path, names: set[str], quantize: Quantization) -> set[str]:
    """The modules that loading in NF4 would quantise. Raises UserError when adapter and base do not fit."""
    try:
        config = read_config(base)
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{base} is not a model that can be merged: {one_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{base} is quantised on disk; merge into the model that it was made from")
    linear = {name: tuple(m.weight.shape) for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    for module, (down, up) in adapter.factors.items():
        wanted, found = (up.shape[0], down.shape[1]), linear.get(module, "no linear layer")
        if wanted != found:
            raise UserError(
                f"the adapter in {adapter.folder} belongs to another base: its {module} is {wanted}, "
                f"that of {base} is {found}"
            )
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if tied := [name for name in adapter.factors if model.get_submodule(name) in ends]:
            raise UserError(f"the adapter cannot be merged exactly into {base}: {tied[0]} shares its weights")
    quantized: set[str] = set()
    if quantize == "nf4":
        keep = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        replace_with_bnb_linear(model, keep, quantization("nf4"))
        quantized = {name for name, m in model.named_modules() if hasattr(m, "source_cls")}
    if elsewhere := {*quantized, *adapter.factors} - {name.removesuffix(".weight") for name in names}:
        raise UserError(f"cannot merge exactly into {base}: {min(elsewhere)} has another name or form on disk")
    return quantized


def _copy_companions(adapter: Adapter, base: Path, output: Path) -> None:
    """Copies what is not weights, byte for byte; the tokenizer is the adapter's where it has another one."""
    files = {path.name: path for path in [*companions(base), *base.glob("model.safetensors.index.json")]}
    if _has_another_tokenizer(adapter.folder, base):
        files = {name: path for name, path in files.items() if not name.startswith(_TOKENIZER)}
        files |= {path.name: path for path in companions(adapter.folder) if path.name.startswith(_TOKENIZER)}
    for name, path in files.items():
        shutil.copyfile(path, output / name)


def _has_another_tokenizer(folder: Path, base: Path) -> bool:
    if not (folder / "tokenizer_config.json").exists():
        return False
    theirs, bases = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, base))
    return theirs.get_vocab() != bases.get_vocab() or theirs.chat_template != bases.chat_template
