"""Kills a script at a random moment, runs the same command again, and says what came of it."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from conftest import ROOT, Engine, free_port
from safetensors.torch import load_file
from standins import Mark

Made = dict[str, Any]  # by name, the content of each result that is there
TORN = "cannot be read"
_OF_A_RUN = re.compile("speed|runtime|per_second")  # what a kill may change


@dataclasses.dataclass
class Script:
    """A command, what it starts from, and what it makes; ``{}`` in the command is the results folder.

    ``word`` is how its processes are told from their launcher's; ``asks`` is the server, and ``in_flight`` the most
    requests that it has under way there. Numbers of two runs may differ by the ``tolerance``.
    """

    command: list[str]
    prepared: Path | None
    names: tuple[str, ...]
    word: str = ""
    asks: Engine | None = None
    in_flight: int = 0
    tolerance: float = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    whole: Made = dataclasses.field(default_factory=dict)
    there: frozenset[str] = frozenset()
    calls: int = 0
    seconds: float = 0


@dataclasses.dataclass
class Run:
    """One run of a script, in a session of its own, with its output in a file that no orphan keeps open."""

    process: "subprocess.Popen[bytes]"
    said: Path

    def text(self) -> str:
        return self.said.read_text(errors="replace")


def start(script: Script, folder: Path, mark: Mark) -> Run:
    folder.mkdir(exist_ok=True)
    said = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.said")
    command = [part.replace("{}", str(folder)).replace("{port}", str(free_port())) for part in script.command]
    with said.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**mark.environment, **script.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Run(process, said)


def prepare(script: Script, folder: Path) -> Path:
    if script.prepared:
        shutil.copytree(script.prepared, folder)
    return folder


def calls_of(script: Script) -> int:
    """How many requests the server has answered, once it has none under way."""
    if not script.asks:
        return 0
    while script.asks.metric("vllm:num_requests_running") + script.asks.metric("vllm:num_requests_waiting"):
        time.sleep(0.05)
    return int(script.asks.metric("vllm:request_success_total"))


def undisturbed(script: Script, folder: Path, mark: Mark) -> Script:
    """The same script, with what it makes, asks and takes when nothing happens to it."""
    before, began = calls_of(script), time.monotonic()
    run = start(script, prepare(script, folder), mark)
    assert run.process.wait(500) == 0, run.text()
    script.seconds = time.monotonic() - began
    script.calls = calls_of(script) - before
    script.whole, script.there = made(folder, script.names), names_in(folder)
    assert script.whole and not any(value is TORN for value in script.whole.values())
    return script


def kill(run: Run, how: str, word: str, mark: Mark) -> None:
    """Sends the signal: Ctrl-C to the whole group, as a terminal does, the others to one process."""
    if how == "Ctrl-C":
        os.killpg(run.process.pid, signal.SIGINT)
    elif how == "SIGKILL of a rank":
        ranks = [
            process for process in mark.processes() if "deepspeed" not in " ".join(process.cmdline()[:6])
            and any(part.endswith(word) for part in process.cmdline()[:4])
        ]
        for rank in ranks[-1:]:
            rank.kill()
    else:
        run.process.send_signal(getattr(signal, how))


@dataclasses.dataclass
class Outcome:
    """What a kill and the run after it came to; ``faults`` is empty where all is as promised."""

    words: str
    faults: list[str]


def kill_and_run_again(script: Script, folder: Path, how: str, seed: int, mark: Mark) -> Outcome:
    """One round. Every fourth seed kills twice."""
    moments, faults, kills, moment_of = random.Random(seed), [], 0, []
    prepare(script, folder)
    before = calls_of(script)
    statuses = []
    for _ in range(2 if seed % 4 == 3 else 1):
        moment = moments.uniform(0, script.seconds)
        run = start(script, folder, mark)
        try:
            run.process.wait(moment)
        except subprocess.TimeoutExpired:
            kill(run, how, script.word, mark)
            kills += 1
            began = time.monotonic()
            run.process.wait(90)
            took = time.monotonic() - began
            if not mark.all_end(30):
                faults.append(f"orphans: {mark.alive()}")
                mark.end()
            moment_of.append(f"{moment:.2f} s (ended in {took:.1f} s)")
            statuses.append(run.process.returncode)
            faults += misbehaved(script, run, how)
        torn = {
            name: value for name, value in made(folder, script.names).items()
            if name != "run.json" and not alike(value, script.whole[name], script.tolerance)
        }
        if torn:
            faults.append(f"not whole: {sorted(torn)}")
    last = start(script, folder, mark)
    try:
        status = last.process.wait(500)
    except subprocess.TimeoutExpired:
        status = "none in 500 s"
    if status != 0:
        faults.append(f"the next run ended with {status}: {last.text()[-1500:]}")
    if not mark.all_end(20):
        faults.append(f"orphans of the next run: {mark.alive()}")
        mark.end()
    repeated = calls_of(script) - before - script.calls
    if repeated > kills * script.in_flight:
        faults.append(f"{repeated} calls repeated after {kills} kills with {script.in_flight} in flight")
    if repeated < 0:
        faults.append(f"{-repeated} calls fewer than undisturbed")
    again = made(folder, script.names)
    different = [name for name in script.whole if not alike(again.get(name), script.whole[name], script.tolerance)]
    if different:
        faults.append(f"other results: {different}")
    if names_in(folder) != script.there:
        faults.append(f"other files: {sorted(names_in(folder) ^ script.there)}")
    words = f"{how}, seed {seed}: at {', '.join(moment_of) or 'no moment'} of {script.seconds:.1f} s, status {statuses}, {repeated} calls repeated"
    return Outcome(words, faults)


def misbehaved(script: Script, run: Run, how: str) -> list[str]:
    """What is wrong with how a script that was asked to stop has ended.

    Python's own traceback is not, of the first moment, in which it imports. DeepSpeed's command prints one of its own,
    and its status is its own, too.
    """
    if how.startswith("SIGKILL") or script.word:
        return []
    said, status = run.text(), run.process.returncode
    if said.startswith("Traceback"):
        return []
    wanted = {"Ctrl-C": (0, 130), "SIGTERM": (0, -signal.SIGTERM, 143)}[how]
    one_line = how != "Ctrl-C" or status == 0 or said.count("run the same command again") == 1
    return [] if status in wanted and one_line and "Traceback" not in said else [f"status {status}: …{said[-2000:]}"]


def names_in(folder: Path) -> frozenset[str]:
    """What lies in the results folder, but for SQLite's own files."""
    left_out = ("replies.sqlite-", "server.log")
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return frozenset(name for name in names if not name.startswith(left_out))


def made(folder: Path, names: tuple[str, ...]) -> Made:
    """The content of those results that are there; TORN where one cannot be read."""
    found = {}
    for name in names:
        path = folder / name
        if path.exists():
            try:
                found[name] = _read(path)
            except Exception:
                found[name] = TORN
    return found


def _read(path: Path) -> Any:
    if path.is_dir() and list(path.glob("*.safetensors")):
        return {file.name: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    if path.is_dir():
        return datasets.load_from_disk(path).to_list()
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))


def alike(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two results are the same, but for what a kill may change."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0, atol=tolerance)
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in one if not _OF_A_RUN.search(name)]
        rest = [name for name in other if not _OF_A_RUN.search(name)]
        return names == rest and all(alike(one[name], other[name], tolerance) for name in names)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other, itertools.repeat(tolerance)))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    return bool(one == other)
