"""How vLLM is started: the command line, and how many GPUs share one copy of the model."""

import importlib.util
import json
import shlex
from pathlib import Path

from huggingface_hub import hf_hub_download

from augcon.errors import UserError, one_line
from augcon.machine.server import python_module


def vllm_command(model: str, name: str, port: int, gpus: int, wanted: int, arguments: str) -> tuple[list[str], str]:
    """The command that serves ``model`` on all GPUs, or with vLLM's CPU build if there are none; what to call it.

    ``wanted`` GPUs share one copy of the model, as in ``gpus_per_copy``. ``arguments`` are passed to vLLM.
    Raises UserError when vLLM is not installed or the model cannot be split in this way.
    """
    if not importlib.util.find_spec("vllm"):
        raise UserError(
            "vLLM is not installed; run `bash install.sh` with NVIDIA GPUs or `bash install.sh --tests` without, "
            "or use the demonstration engine with --demo"
        )
    command = python_module("vllm.entrypoints.openai.api_server", port)
    command += ["--model", model, "--served-model-name", name]
    command += ["--max-model-len", "auto"]  # the model's own limit, or what fits in memory
    command += ["--generation-config", "vllm"]  # or the model's own top_k and penalties are added to each request
    command += ["--disable-uvicorn-access-log"]  # which has a line for each request
    if gpus:
        heads, kv_heads = attention_heads(model) if gpus > 1 else (1, 1)
        size = gpus_per_copy(gpus, heads, kv_heads, wanted)
        command += ["--tensor-parallel-size", str(size), "--data-parallel-size", str(gpus // size)]
        description = f"vLLM with {model}: {gpus // size} × {size} of {gpus} GPUs"
    else:
        # The CPU build crashes on seeded requests with chunked prefill. So a step reads whole prompts, at some hundred
        # tokens a second, and it may take longer than vLLM allows by itself. The cache would take nearly all memory.
        command = ["env", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=3600", "VLLM_CPU_NUM_OF_RESERVED_CPU=0", *command]
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-seqs", "16"]
        command += ["--kv-cache-memory-bytes", str(2 * 2**30)]
        description = f"vLLM with {model} on the CPU"
    return command + shlex.split(arguments), description


def gpus_per_copy(gpus: int, heads: int, kv_heads: int, wanted: int = 0) -> int:
    """How many GPUs share one copy of a model: ``wanted``, or the largest number that divides GPUs and heads.

    Raises UserError if the model cannot be split into ``wanted`` parts.
    """
    possible = [
        size for size in range(1, gpus + 1) if heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    ]
    if wanted and wanted not in possible:
        raise UserError(
            f"--tensor-parallel {wanted} does not suit {gpus} GPUs and a model with {heads} attention heads "
            f"({kv_heads} key-value heads); choose from {', '.join(map(str, possible))}"
        )
    return wanted or max(size for size in possible if gpus % size == 0)


def attention_heads(model: str) -> tuple[int, int]:
    """The numbers of a model's attention heads and key-value heads. Raises UserError if its config has none."""
    try:
        file = Path(model, "config.json") if Path(model).is_dir() else Path(hf_hub_download(model, "config.json"))
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        heads = config.get("num_attention_heads") or config["n_head"]
        return heads, config.get("num_key_value_heads") or heads
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the attention heads of {model!r} ({one_line(error)}); check --model") from error
