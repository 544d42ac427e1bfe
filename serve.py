"""Serves the model with vLLM on all GPUs, or with --demo the demonstration engine, until Ctrl-C.

    python serve.py --model results/sft_model
    python serve.py --model results/sft_model -- python inference.py

The second form serves only while the command after -- runs, at a free port that the command finds in
AUGCON_API_BASE, and ends with the command's status. However it ends, the server is stopped and the memory of the GPUs
is free again. The server's log is server.log in the results folder.
"""

import os
import sys
import time

from augcon.errors import UserError, stage
from augcon.machine.gpus import gpu_memory_released, visible_gpus
from augcon.machine.processes import exit_status, start, stopping_children
from augcon.machine.server import Server, free_port, port_of, python_module
from augcon.machine.vllm import vllm_command
from augcon.run.results import Results
from config import Settings, load_settings


@stage
def main() -> None:
    command: list[str] = []
    if "--" in sys.argv:
        end = sys.argv.index("--")
        command = sys.argv[end + 1 :]
        del sys.argv[end:]
        if not command:
            raise UserError("there is no command after --; add one, or leave out --")
    settings = load_settings(__doc__, "serve.py and augcon.sh", "server")
    port = free_port() if command else port_of(settings.api_base)
    serving, description = server_command(settings, port)
    with gpu_memory_released(), stopping_children(stop_with_parent=bool(command)):
        server = Server(serving, port, Results(settings.results).server_log)
        print(f"server:  starting {description}; its log is {server.log}", flush=True)
        server.wait_until_ready()
        if command:
            status = run_beside(server, command)
        else:
            print(f"server:  ready at {server.address}/v1; stop it with Ctrl-C", flush=True)
            status = server.process.wait()  # unless a signal comes first
            server.check()
    sys.exit(status)


def server_command(settings: Settings, port: int) -> tuple[list[str], str]:
    """The command that serves the model of the settings, and what to call it."""
    if settings.demo:
        return python_module("augcon.demo.engine", port), "the demonstration engine (rules, not an LLM)"
    name = settings.api_model or settings.model
    gpus = len(visible_gpus())
    return vllm_command(settings.model, name, port, gpus, settings.tensor_parallel, settings.serve_arguments)


def run_beside(server: Server, command: list[str]) -> int:
    """Runs the command while the server runs; returns its status. Raises UserError when the server ends before."""
    # The server has one model. A name that was set for another server would not find it.
    process = start(command, {**os.environ, "AUGCON_API_BASE": f"{server.address}/v1", "AUGCON_API_MODEL": ""})
    while process.poll() is None:
        server.check()
        time.sleep(0.1)
    return exit_status(process)


if __name__ == "__main__":
    main()
