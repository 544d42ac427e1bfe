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
from typing import NoReturn

from augcon.errors import UserError, stage
from augcon.machine.gpus import gpu_memory_released, visible_gpus
from augcon.machine.processes import exit_status, start, stopping_children
from augcon.machine.server import Program, Server, free_port, port_of, python_module
from augcon.machine.vllm import vllm_program
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
    program = program_of(settings, port)
    with gpu_memory_released(), stopping_children(stop_with_parent=bool(command)):
        server = Server(program, port, Results(settings.results).server_log)
        print(f"server:  starting {program.description}; its log is {server.log}", flush=True)
        wait_until_ready(server)
        status = run_beside(server, command) if command else serve_until_stopped(server)
    sys.exit(status)


def program_of(settings: Settings, port: int) -> Program:
    """What serves the model that the settings name."""
    if settings.demo:
        return Program(python_module("augcon.demo.engine", port), "the demonstration engine (rules, not an LLM)")
    name = settings.api_model or settings.model
    gpus = len(visible_gpus())
    return vllm_program(settings.model, name, port, gpus, settings.tensor_parallel, settings.serve_arguments)


def wait_until_ready(server: Server) -> None:
    """Waits until the server answers; prints every 15 seconds what it is doing. Raises UserError if it ends before."""
    started = printed = time.monotonic()
    while not server.is_healthy():
        server.check()
        if time.monotonic() - printed >= 15:
            printed = time.monotonic()
            print(f"server:  {printed - started:.0f} s: {server.progress()}", flush=True)
        time.sleep(0.2)
    server.check()  # it may be another server that answers


def serve_until_stopped(server: Server) -> NoReturn:
    """Waits for a signal, which ends this process. Raises UserError when the server ends before."""
    print(f"server:  ready at {server.api_base}; stop it with Ctrl-C", flush=True)
    while True:
        server.check()
        time.sleep(0.2)


def run_beside(server: Server, command: list[str]) -> int:
    """Runs the command while the server runs; returns its status. Raises UserError when the server ends before."""
    # The server has one model. A name that was set for another server would not find it.
    process = start(command, {**os.environ, "AUGCON_API_BASE": server.api_base, "AUGCON_API_MODEL": ""})
    while process.poll() is None:
        server.check()
        time.sleep(0.1)
    return exit_status(process)


if __name__ == "__main__":
    main()
