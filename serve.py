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
from config import load_settings


@stage
def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[end + 1 :]
    if sys.argv[end:] == ["--"]:
        raise UserError("there is no command after --; add one, or leave out --")
    del sys.argv[end:]
    settings = load_settings(__doc__, "serve.py and augcon.sh", "server")
    port = free_port() if command else port_of(settings.api_base)
    if settings.demo:
        serving, description = python_module("augcon.demo.engine", port), "the demonstration engine (rules, not an LLM)"
    else:
        name, gpus = settings.api_model or settings.model, len(visible_gpus())
        serving, description = vllm_command(
            settings.model, name, port, gpus, settings.tensor_parallel, settings.serve_arguments
        )
    with gpu_memory_released(), stopping_children(stop_with_parent=bool(command)):
        server = Server(serving, port, Results(settings.results).server_log)
        print(f"server:  starting {description}; its log is {server.log}", flush=True)
        server.wait_until_ready()
        print(f"server:  ready at {server.api_base}{'' if command else '; Ctrl-C stops it'}", flush=True)
        # The server has one model. A name that was set for another server would not find it.
        environment = {**os.environ, "AUGCON_API_BASE": server.api_base, "AUGCON_API_MODEL": ""}
        process = start(command, environment) if command else None
        while process is None or process.poll() is None:
            server.check()
            time.sleep(0.1)
    sys.exit(exit_status(process))


if __name__ == "__main__":
    main()
