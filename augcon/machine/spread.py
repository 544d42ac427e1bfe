"""How a model is spread over GPUs: tensor parallel within a copy by need, data parallel over the rest.

A GPU that is not needed to hold the model serves more as another copy than as a part of a larger one, because the parts
have to wait for each other in every layer.
"""

import json
import math
from dataclasses import dataclass, replace

from augcon.errors import UserError, one_line
from augcon.hub import Model
from augcon.machine.gpus import Gpu

UTILISATION = 0.92  # of a GPU's memory for vLLM; its own default
MARGIN = 0.03  # of a GPU's memory that is left free of it besides what others use, for CUDA itself
REQUEST = 8_000  # tokens of the longest request that should fit
TOKENS = 1_000  # that a usual request has to itself: its text and the reply; the rest of the prompt is shared
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """What of a model takes memory, and what its parts have to divide."""

    name: str
    weights: int  # bytes in memory, where those of 32 bits become 16
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int  # of a feed-forward layer; 0: unknown

    @property
    def token(self) -> int:
        """Bytes of one token's keys and values in 16 bits; fewer where a layer only looks back so far."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def sizes(self, most: int) -> list[int]:
        """The numbers of GPUs, up to ``most``, over which vLLM can split the model."""
        return [
            size
            for size in range(1, most + 1)
            if self.heads % size == 0
            and self.width % size == 0
            and (self.kv_heads % size == 0 or size % self.kv_heads == 0)
        ]


@dataclass(frozen=True)
class Layout:
    """Copies of a model over GPUs."""

    tensor: int  # GPUs that share a copy
    data: int  # copies
    idle: int  # GPUs that are left over
    room: int  # tokens that the cache of one copy has room for
    utilisation: float  # share of each GPU's memory that vLLM takes
    batch: int  # requests that one copy answers at once

    def __str__(self) -> str:
        copies = f"{self.data} {'copy' if self.data == 1 else 'copies'} on {self.tensor} GPU{'s' * (self.tensor > 1)}"
        idle = f"; {self.idle} GPU{'s' * (self.idle > 1)} idle" if self.idle else ""
        return f"{copies}{' each' * (self.data > 1)}{idle}"


def read_shape(model: Model) -> Shape:
    """The shape of a model, from its .json files alone. Raises UserError when they do not tell it."""
    file, index = model.folder / "config.json", model.folder / "model.safetensors.index.json"
    names = ("hidden_layers", "n_layer"), ("attention_heads", "n_head")  # of most models, and of GPT-2
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        config = whole | whole.get("text_config", {})
        layers, heads = (config.get(f"num_{name}") or config[other] for name, other in names)
        head_dim = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // heads
        if index.exists():
            file = index
            weights = int(json.loads(index.read_text(encoding="utf-8"))["metadata"]["total_size"])
        else:
            file = model.folder / "model.safetensors"
            weights = model.missing.get(file.name) or file.stat().st_size
        single_precision = "float32" in (config.get("dtype"), config.get("torch_dtype"))
        return Shape(
            model.name,
            weights // 2 if single_precision and "quantization_config" not in config else weights,
            layers,
            heads,
            config.get("num_key_value_heads") or heads,
            head_dim,
            config.get("intermediate_size") or 0,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot tell how large model {model.name!r} is from {file} ({one_line(error)}); "
            "a model has a config.json, and its weights as .safetensors"
        ) from error


def spread(shape: Shape, gpus: list[Gpu], linked: bool, wanted: int = 0) -> Layout:
    """The layout of a model over GPUs, which are ``linked`` if there is NVLink between all of them.

    Parts are added to a copy until its cache has room for a full batch; of the layouts up to that one, it is the one
    with the most room in all copies. ``wanted`` GPUs share a copy whatever room that leaves. Raises UserError when the
    model does not fit.
    """
    layouts = _layouts(shape, gpus)
    if wanted:
        chosen = [layout for layout in layouts if layout.tensor == wanted]
        if not chosen:
            raise UserError(
                f"--tensor-parallel {wanted} does not suit {len(gpus)} GPUs and a model with {shape.heads} attention "
                f"heads ({shape.kv_heads} key-value heads); choose from "
                f"{', '.join(str(layout.tensor) for layout in layouts)}"
            )
        return chosen[0]
    fitting = [layout for layout in layouts if layout.room >= REQUEST]
    if not fitting:
        raise UserError(_too_small(shape, gpus))
    full = 256_000 if linked else 64_000  # large parts are slow over PCIe, where vLLM's own all-reduce is off
    enough = next((number for number, layout in enumerate(fitting, 1) if layout.room >= full), len(fitting))
    return max(fitting[:enough], key=lambda layout: layout.data * layout.room)


def busy(gpus: list[Gpu]) -> str:
    """Which GPUs have not enough free for vLLM's usual share, and what to do; empty if all have."""
    short = [gpu for gpu in gpus if _utilisation([gpu]) < UTILISATION]
    if not short:
        return ""
    gpu = min(short, key=lambda gpu: gpu.free / gpu.total)
    used = f"{(gpu.total - gpu.free) / 1024:.1f} of the {gpu.total / 1024:.1f} GiB of GPU {gpu.index}"
    others = ",".join(gpu.index for gpu in gpus if gpu not in short)
    leave = f", or leave out what is busy with CUDA_VISIBLE_DEVICES={others}" if others else ""
    return f"other programs use {used}; end them{leave}"


def _utilisation(gpus: list[Gpu]) -> float:
    """The share of every GPU's memory that vLLM can have: it wants the same of each."""
    free = min(gpu.free / gpu.total for gpu in gpus) - MARGIN
    return max(0.01, min(UTILISATION, math.floor(free * 100) / 100))


def _layouts(shape: Shape, gpus: list[Gpu], most: int = 0) -> list[Layout]:
    """Every way to split the model over these GPUs, or ``most`` that are like them."""
    share, most = _utilisation(gpus), most or len(gpus)
    # Besides weights and cache: activations, CUDA graphs, buffers. Small GPUs are used with smaller batches.
    usable = min(share * gpu.total - (2048 if gpu.total <= 24 * 1024 else 4096) for gpu in gpus) * MIB
    batch = min(1024 if gpu.total >= 70 * 1024 and "A100" not in gpu.name else 256 for gpu in gpus)  # vLLM's default
    layouts = []
    for size in shape.sizes(most):
        room = int((usable - shape.weights / size) * min(size, shape.kv_heads) / shape.token)
        at_once = max(1, min(batch, room // TOKENS))
        layouts.append(Layout(size, most // size, most % size, max(room, 0), share, at_once))
    return layouts


def _too_small(shape: Shape, gpus: list[Gpu]) -> str:
    """Why the model does not fit, and what would do."""
    what = f"model {shape.name!r} has {shape.weights / 1e9:.1f} GB of weights, which do not fit"
    empty = [replace(gpu, free=gpu.total) for gpu in gpus]
    needed = next((layout.tensor for layout in _layouts(shape, empty, 64) if layout.room >= REQUEST), 0)
    if 0 < needed <= len(gpus):
        return f"{what} in the memory that is free: {busy(gpus)}"
    more = f"take {needed} of these" if needed else "take larger ones"
    return (
        f"{what} on {len(gpus)} × {gpus[0].name} of {gpus[0].total / 1024:.0f} GiB with room for a request; "
        f"{more}, or choose a smaller or quantised --model"
    )
