"""A Ray cluster: shards of a results folder, worked on by its nodes.

Each shard is a task of its own, which asks the servers as one machine does, and keeps what it has in the shard's
folder. So a node, a task or the driver that is lost costs at most the calls under way: the shard goes on elsewhere.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from augcon.errors import UserError, one_line
from augcon.machine.processes import TIMEOUT
from augcon.ordered import map_in_order
from augcon.run.recipe import run_in
from augcon.run.results import Results
from augcon.run.shards import Shard

HOME = Path(__file__).parent.parent
_NOT_OURS = {"api_base", "api_key", "ray", "results", "host"}  # settings that servers of nodes have of their own
# What listens but is no Ray cluster, Ray would ask for ten minutes and more whether it is one.
_IMPATIENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_gcs_rpc_server_connect_timeout_s": "5"}
_REACHABLE = 10.0  # seconds
_LOSSES = 5  # of one shard, after which the fault is taken to be its own
_SERVERS = 2  # that one shard asks, so that it goes on without one
_PATIENCE = 60.0  # seconds for whoever worked on a shard before to be gone


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at an address. Raises UserError where there is none."""
    for name, value in _IMPATIENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray: pip install -r requirements-ray.txt, here and on every node") from error
    environment = {"env_vars": {"PYTHONPATH": str(HOME), "PYTHONUNBUFFERED": "1"}}
    host, _, port = address.rpartition(":")
    try:
        if host:
            socket.create_connection((host, int(port)), _REACHABLE).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    except Exception as error:  # whatever its parts raise
        raise UserError(f"--ray {address!r}: no Ray cluster answers there ({one_line(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def servers(settings: Any, key: str) -> Iterator[list[str]]:
    """Servers of the model, each on all GPUs of a node, or on every node where none has any; their addresses.

    They listen on the cluster's network, for a key. Raises UserError where one does not come up.
    """
    with _connected(settings.ray) as ray:
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in alive if node["Resources"].get("GPU")] or alive
        ours = {
            f"AUGCON_{name.upper()}": str(getattr(settings, name)) for name in settings.model_fields_set - _NOT_OURS
        }
        serving = []
        for number, node in enumerate(nodes):
            where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = 0 if settings.demo else node["Resources"].get("GPU", 0)
            actor = ray.remote(_Serving).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=where)
            folder = Results(settings.results).folder.absolute() / "servers" / str(number)
            given = {**ours, "AUGCON_API_KEY": key, "AUGCON_RESULTS": str(folder), "AUGCON_RAY": ""}
            serving.append(actor.remote(node["NodeManagerAddress"], given, str(Path.cwd())))
        print(f"server:  starting one on each of {len(nodes):,} nodes; their logs are in {folder.parent}", flush=True)
        try:
            addresses = _all(ray, [server.address.remote() for server in serving])
            print(f"server:  ready at {', '.join(addresses[:8])}{' …' if len(addresses) > 8 else ''}", flush=True)
            yield addresses
        finally:
            ray.wait([server.stop.remote() for server in serving], num_returns=len(serving), timeout=TIMEOUT + 10)


class _Serving:
    """A server on one node, in a process of serve.py that ends with this one."""

    def __init__(self, host: str, given: dict[str, str], folder: str) -> None:
        said = "import os, sys; print(os.environ['AUGCON_API_BASE'], flush=True); sys.stdin.read()"
        command = [sys.executable, str(HOME / "serve.py"), "--host", host, "--", sys.executable, "-c", said]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AUGCON_")}
        pipe, cwd = subprocess.PIPE, folder if Path(folder).is_dir() else None
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env={**environment, **given}, cwd=cwd, text=True
        )

    def address(self) -> str:
        """Waits until the server is ready. Raises UserError where it will not be."""
        lines: list[str] = []
        for line in self._process.stdout or ():
            if line.startswith("http://"):
                return line.strip()
            lines.append(line.strip())
        raise UserError(f"on {socket.gethostname()}: {next(reversed(lines), 'serve.py ended').removeprefix('error: ')}")

    def stop(self) -> None:
        """Stops the server and waits until the memory of its GPUs is free."""
        self._process.communicate()


def _all(ray: Any, references: list[Any]) -> list[Any]:
    """The results of tasks. Raises the UserError of one that has one."""
    try:
        return list(ray.get(references))
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from error


async def on_nodes(
    work: str, settings: Any, shards: Sequence[Shard], arguments: Callable[[Shard], tuple[Any, ...]]
) -> AsyncIterator[tuple[Shard, Any]]:
    """Has the nodes do the ``work``, "module:recipe", on every shard; the shards in order, with what it returns.

    The recipe is given the settings, the shard's results folder and store, and the ``arguments`` for the shard. Each
    shard asks those of the servers of which the fewest others ask. Raises UserError where a recipe does, or a shard
    is lost again and again.
    """
    asked: Counter[str] = Counter(dict.fromkeys(settings.api_base.split(","), 0))

    async def attempt(shard: Shard) -> Any:
        some = sorted(asked, key=lambda address: asked[address])[:_SERVERS]
        asked.update(some)
        given = settings.model_copy(update={"api_base": ",".join(some)})
        reference = task.remote(work, given, shard.results.folder, *arguments(shard))
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference, force=True)
            raise
        finally:
            asked.subtract(some)

    async def do(shard: Shard) -> Any:
        for lost in range(1, _LOSSES + 1):
            try:
                return await attempt(shard)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from error
            except ray.exceptions.RayError as error:  # the worker, its node or its memory is gone
                if lost == _LOSSES:
                    where = f"the shard {shard.results.folder} was lost {lost} times"
                    raise UserError(f"{where} ({one_line(error)}); see its log.txt") from error

    with _connected(settings.ray) as ray:
        task = ray.remote(num_cpus=1, max_retries=0)(_work_on)
        async for shard, made in map_in_order(do, shards, lambda: int(ray.cluster_resources().get("CPU", 0)) + 1):
            yield shard, made


def _work_on(work: str, settings: Any, folder: Path, *arguments: Any) -> Any:
    """What a task does, on whichever node it is."""
    results = Results(folder)
    if not results.contexts.exists():
        raise UserError(
            f"node {socket.gethostname()} does not see {folder}: --results must be a folder that all nodes share"
        )
    module, _, name = work.partition(":")
    recipe = getattr(importlib.import_module(module), name)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return run_in(results, recipe, settings, *arguments, patience=_PATIENCE)
