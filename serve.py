"""Serves the model with vLLM on the GPUs, or with --demo the demonstration engine, until Ctrl-C.

    python serve.py --model results/sft_model
    python serve.py --model results/sft_model -- python inference.py
    python serve.py --dry-run

The first form listens on this machine only. Whoever has an account here may ask the model, unless AUGCON_API_KEY sets
the key to ask for. The second form serves only while the command after -- runs, at a free port and for a key made for
the run, which the command finds in AUGCON_API_BASE and AUGCON_API_KEY, and ends with the command's status. However it
ends, the server is stopped and the memory of the GPUs is free again. The server's log is server.log in the results
folder. The third form tells how the model would be spread over the GPUs; it starts nothing, and downloads no more than
the model's .json files. With a command, the demonstration engine answers it.
"""

import os
import secrets
import shlex
import sys
import time
from typing import NoReturn

from augcon.errors import UserError, stage
from augcon.hub import Model, find_model
from augcon.machine.gpus import gpu_memory_released, linked, require_driver, visible_gpus
from augcon.machine.processes import exit_status, start, stopping_children
from augcon.machine.server import LOOPBACK, Server, free_port, port_of, python_module
from augcon.machine.spread import Layout, busy, read_shape, spread
from augcon.machine.vllm import GUARD, require_vllm, vllm_command
from augcon.run.results import Results
from config import Settings, load_settings

LONG = 8192  # tokens of a long context with its examples and answer


@stage
def main() -> None:
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = sys.argv[end + 1 :]
    if sys.argv[end:] == ["--"]:
        raise UserError("there is no command after --; add one, or leave out --")
    del sys.argv[end:]
    settings = load_settings(__doc__, "serve.py and augcon.sh", "server")
    given, here = settings.api_key.get_secret_value(), settings.host == LOOPBACK
    own = given if given != "EMPTY" else os.environ.get("VLLM_API_KEY", "")
    key = secrets.token_urlsafe() if command and here else own
    if not key and not here:
        raise UserError(
            f"--host {settings.host}: whoever reaches it could ask the model; set a key with AUGCON_API_KEY"
        )
    if settings.ray and command and not settings.dry_run:
        serve_on_nodes(settings, key, command)
    port = free_port(0, settings.host) if command else port_of(settings.api_base, settings.host)
    if settings.demo:
        model, description = None, "the demonstration engine (rules, not an LLM)"
        serving = python_module("augcon.demo.engine", port, host=settings.host)
    else:
        require_vllm()
        model = find_model(settings.model)
        layout, description = plan(model, settings)
        name = settings.api_model or settings.model
        serving = vllm_command(model.folder, name, port, layout, settings.serve_arguments, settings.host)
        serving += GUARD * bool(key)
    if settings.dry_run and model:
        print(f"download: {model.to_download()}\ncommand: {shlex.join(serving)}")
        model, description = None, "the demonstration engine, whose replies are from rules, in its place for the trial"
        serving = python_module("augcon.demo.engine", port, host=settings.host)
    if settings.dry_run and not command:
        return
    if model:
        model.download()
    with gpu_memory_released(), stopping_children(stop_with_parent=bool(command)):
        server = Server(serving, port, Results(settings.results).server_log, key, settings.host)
        print(f"server:  starting {description}; its log is {server.log}", flush=True)
        server.wait_until_ready()
        who = "" if key else ", for whoever has an account here, as AUGCON_API_KEY sets no key"
        print(f"server:  ready at {server.api_base}{who}{'' if command else '; Ctrl-C stops it'}", flush=True)
        if 0 < (longest := server.longest_request()) < LONG:
            limit = "which is the model's limit or all that the memory holds"
            print(f"warning: prompt and reply have {longest:,} tokens in all, {limit}; long ones fail", file=sys.stderr)
        process = start(command, asking(server.api_base, key)) if command else None
        while process is None or process.poll() is None:
            server.check()
            time.sleep(0.1)
    sys.exit(exit_status(process))


def asking(api_base: str, key: str) -> dict[str, str]:
    """The environment of a command that asks the servers."""
    # They have one model. A name that was set for another server would not find it.
    return {**os.environ, "AUGCON_API_BASE": api_base, "AUGCON_API_KEY": key, "AUGCON_API_MODEL": ""}


def serve_on_nodes(settings: Settings, key: str, command: list[str]) -> NoReturn:
    """Serves the model on the nodes of a Ray cluster while a command runs, and ends with its status."""
    from augcon.cluster import servers

    with stopping_children(stop_with_parent=True), servers(settings, key) as addresses:
        sys.exit(exit_status(start(command, asking(",".join(addresses), key))))


def plan(model: Model, settings: Settings) -> tuple[Layout | None, str]:
    """How a model is spread over the GPUs, None where there are none, and what to call that.

    Raises UserError where it does not fit, before anything is downloaded.
    """
    gpus = visible_gpus()
    if not gpus:
        return None, f"vLLM with {model.name} on the CPU"
    require_driver(gpus)
    shape, nvlink = read_shape(model), linked(gpus)
    layout = spread(shape, gpus, nvlink, settings.tensor_parallel)
    if others := busy(gpus):
        print(f"warning: {others}; vLLM takes {layout.utilisation:.0%} of each GPU", file=sys.stderr)
    if settings.dry_run:
        link = "" if len(gpus) == 1 else ", NVLink" if nvlink else ", PCIe"
        print(f"GPUs:    {len(gpus)} × {gpus[0].name} of {gpus[0].total / 1024:.1f} GiB{link}")
        print(f"model:   {shape.weights / 1e9:.1f} GB of weights, {shape.token / 1e3:,.0f} kB a token in the cache")
        print(f"spread:  {layout}, {layout.utilisation:.0%} of the memory")
        print(f"room:    {layout.room:,} tokens a copy; {layout.data * layout.batch:,} usual requests at once in all")
    return layout, f"vLLM with {model.name}: {layout}"


if __name__ == "__main__":
    main()
