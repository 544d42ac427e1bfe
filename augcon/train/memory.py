"""How much GPU memory fine-tuning takes, by estimate, and what follows: 16 or 4 bits, and which activations are kept.

All of this is arithmetic on the shapes of the weights, so that it is known before a model is loaded.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import init_empty_weights

from augcon.errors import UserError, one_line
from augcon.train.base import LORA_RANK, read_config

GIB = 2**30
# Bytes a weight. NF4: 4 bits, and a scale of 8 bits for 64 of them, and one of 32 for 256 of those (arXiv 2305.14314).
_BITS_16, _NF4 = 2.0, 0.516
# Bytes for each weight of the adapter: itself and its gradient in bf16, itself and two moments of AdamW in fp32. With
# more GPUs, ZeRO-2 divides the latter; that is left out.
_TRAINED = 2 + 2 + 12
# Bytes that autograd keeps of a token for each input and output of a linear layer, in bf16. Counted with
# torch.autograd.graph.saved_tensors_hooks: 2.3 to 3.1 in Qwen, Llama, Gemma and Phi; see tests/test_memory.py.
_KEPT = 3.2
# What is planned for: the rest is for the CUDA context, NCCL, the loss, a layer out of NF4, and gaps in between.
_USABLE, _RESERVED = 0.85, 2 * GIB


@dataclasses.dataclass(frozen=True)
class Shape:
    """A base by its numbers of weights, the inputs and outputs of its linear layers summed up, its layers, its width.

    ``linear`` are the weights that an adapter changes and NF4 packs: those of all linear layers but the last.
    """

    linear: int
    other: int
    edges: int
    layers: int
    width: int


def shape_of(base: Path) -> Shape:
    """The shape of a model in a folder; its weights are not read. Raises UserError where it is no model."""
    try:
        config = read_config(base)
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{base} is not a model that can be trained: {one_line(error)}") from error
    head, text = model.get_output_embeddings(), config.get_text_config()
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer is not head]
    linear = sum(layer.weight.numel() for layer in layers)
    edges = sum(layer.in_features + layer.out_features for layer in layers)
    other = sum(weights.numel() for weights in model.parameters()) - linear
    return Shape(linear, other, edges, text.num_hidden_layers, text.hidden_size)


def estimate(shape: Shape, quantize: Literal["nf4", "none"], tokens: int, keep: bool) -> int:
    """Bytes that training takes on a GPU, with at most ``tokens`` in one pass.

    ``keep``: the activations of all layers are kept. Else the inputs of the layers are, and each layer is computed
    again in the backward pass (gradient checkpointing).
    """
    weights = shape.linear * (_NF4 if quantize == "nf4" else _BITS_16) + shape.other * _BITS_16
    adapter = LORA_RANK * shape.edges * _TRAINED
    kept, layer = _KEPT * shape.edges, _KEPT * shape.edges / shape.layers
    token = kept if keep else _BITS_16 * shape.layers * shape.width + layer
    return round(weights + adapter + tokens * token)


def room(card: int) -> float:
    """The bytes of a GPU of ``card`` bytes that may be planned for."""
    return _USABLE * card - _RESERVED


def choose_quantization(shape: Shape, card: int, tokens: int) -> Literal["nf4", "none"]:
    """4 bits only where 16 do not fit (even with gradient checkpointing): taking weights out of NF4 costs time."""
    return "none" if estimate(shape, "none", tokens, keep=False) <= room(card) else "nf4"


def most_kept(shape: Shape, quantize: Literal["nf4", "none"], card: int) -> int:
    """The tokens of the largest pass whose activations can be kept, which saves a third of the work."""
    return max(0, int((room(card) - estimate(shape, quantize, 0, keep=True)) / (_KEPT * shape.edges)))
