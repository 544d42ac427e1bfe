"""Serves the model: vLLM over all GPUs, or with --demo the demonstration engine, until Ctrl-C.

    python serve.py --model results/sft_model
    python serve.py --model results/sft_model -- python inference.py

The second form serves only while the command after -- runs, on a port of its own that it tells the command
(AUGCON_API_BASE), and ends with the command's status. On every way out the server is stopped, and the GPUs are
free again. Its log goes to server.log in the results folder.
"""

import os
import sys
import time

from augcon.errors import UserError, stage
from augcon.machine import server
from augcon.machine.gpus import memory_given_back, visible_gpus
from augcon.machine.processes import exit_status, in_charge, start
from augcon.run.results import Results
from config import Settings, load_settings


@stage
def main() -> None:
    flags, command = sys.argv[1:], None
    if "--" in flags:
        flags, command = flags[: flags.index("--")], flags[flags.index("--") + 1 :]
        if not command:
            raise UserError("there is no command after --")
    sys.argv[1:] = flags
    settings = load_settings(__doc__)
    port = server.free_port() if command else server.port_of(settings.api_base)
    line, environment, words = engine(settings, port)
    with memory_given_back(), in_charge(dies_with_parent=command is not None):
        running = server.Server(line, port, Results(settings.results).server_log, environment)
        print(f"server:  starting {words}; log in {running.log}", flush=True)
        wait(running)
        status = follow(running, command) if command else serve(running)
    sys.exit(status)


def engine(settings: Settings, port: int) -> tuple[list[str], dict[str, str], str]:
    """The command line that serves what the settings say, its further environment, and what it is in words."""
    if settings.demo:
        return server.demo_command(port), {}, "the demonstration engine (rules, not an LLM)"
    server.require_vllm()
    name = settings.api_model or settings.model
    gpus = len(visible_gpus())
    if not gpus:
        line = server.vllm_command(settings.model, name, port, None, settings.serve_arguments)
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        return line, {"VLLM_CPU_KVCACHE_SPACE": space}, f"vLLM with {settings.model} on the CPU"
    heads = server.attention_heads(settings.model) if gpus > 1 else (1, 1)
    spread = server.parallel(gpus, *heads, wanted=settings.tensor_parallel)
    line = server.vllm_command(settings.model, name, port, spread, settings.serve_arguments)
    return line, {}, f"vLLM with {settings.model}: {spread.data} × {spread.tensor} of {gpus} GPUs"


def wait(running: server.Server) -> None:
    """Waits for the server to answer, and tells every 15 seconds what it is at."""
    told = 0.0
    for seconds in running.wait_until_ready():
        if seconds - told >= 15:
            told = seconds
            print(f"server:  {seconds:.0f} s: {running.last_word()}", flush=True)


def serve(running: server.Server) -> int:
    """Until the server ends or a signal comes."""
    print(f"server:  ready at {running.api_base}; Ctrl-C stops it", flush=True)
    while True:
        running.check()
        time.sleep(0.2)


def follow(running: server.Server, command: list[str]) -> int:
    """Runs the command beside the server; returns its status."""
    # The server has one name for its model, which a setting made for another server would miss.
    process = start(command, env={**os.environ, "AUGCON_API_BASE": running.api_base, "AUGCON_API_MODEL": ""})
    while process.poll() is None:
        running.check()
        time.sleep(0.1)
    return exit_status(process)


if __name__ == "__main__":
    main()
