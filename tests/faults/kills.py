"""Kills a script at a random moment, runs the same command again, and says what came of it."""

import dataclasses
import functools
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
from conftest import ROOT, Engine, free_port
from standins import Mark

from augcon.files import file_digest

Made = dict[str, Any]  # by name, the content of each result that is there
ANSWERED = "vllm:request_success_total"
TORN = "cannot be read"
OF_A_RUN = re.compile("speed|runtime|per_second|train_loss")  # figures that are a run's own; the last is its mean
IN_ORDER = ("queries.json", "filtered_queries.json")  # of other objects, the order of the keys says nothing
OF_RUNS = ("replies.sqlite-", "server.log")  # files that are there or not


@dataclasses.dataclass
class Script:
    """A command, what it starts from and makes; in it, {} is the results folder and {port} a port that is free.

    ``word`` tells its ranks from their launcher; ``asks`` is its server, which has at most ``in_flight`` requests under
    way. From ``whole`` on, what an undisturbed run comes to.
    """

    command: list[str]
    prepared: Path | None
    names: tuple[str, ...]
    word: str = ""
    asks: Engine | None = None
    in_flight: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    whole: Made = dataclasses.field(default_factory=dict)
    there: frozenset[str] = frozenset()
    calls: int = 0
    seconds: float = 0
    said: int = 0  # bytes

    def prepare(self, folder: Path) -> None:
        if self.prepared:
            shutil.copytree(self.prepared, folder)

    def start(self, folder: Path, mark: Mark) -> "Run":
        folder.mkdir(exist_ok=True)
        said = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.said")
        command = [part.replace("{}", str(folder)).replace("{port}", str(free_port())) for part in self.command]
        with said.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**mark.environment, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # if the tests ignore it
            )
        return Run(process, said)

    def calls_so_far(self) -> int:
        """How many requests the server has answered, once it has none under way."""
        if not self.asks:
            return 0
        while any(self.asks.metric(f"vllm:num_requests_{state}") for state in ("running", "waiting")):
            time.sleep(0.05)
        return int(self.asks.metric(ANSWERED))

    def undisturbed(self, folder: Path, mark: Mark) -> "Script":
        """Learns what the script makes, asks and takes when nothing happens to it."""
        self.prepare(folder)
        before, began = self.calls_so_far(), time.monotonic()
        run = self.start(folder, mark)
        assert run.process.wait(500) == 0, run.text()
        self.seconds = time.monotonic() - began
        self.calls, self.said = self.calls_so_far() - before, run.said.stat().st_size
        self.whole, self.there = self.made(folder), names_in(folder)
        assert self.whole.keys() == set(self.names) and TORN not in map(str, self.whole.values())
        return self

    def reach(self, run: "Run", share: float, by_progress: bool) -> None:
        """Waits for a moment: a share of the time that the script takes or, however busy the machine, of what it does.

        That is its calls or, where it makes none, what it says.
        """
        began, before = time.monotonic(), self.asks.metric(ANSWERED) if self.asks else 0
        while run.process.poll() is None:
            if not by_progress:
                done = (time.monotonic() - began) / self.seconds
            elif self.asks:
                done = (self.asks.metric(ANSWERED) - before) / self.calls
            else:
                done = run.said.stat().st_size / self.said
            if done >= share:
                return
            time.sleep(0.02)

    def made(self, folder: Path) -> Made:
        """The content of those results that are there."""
        return {name: _read(folder / name) for name in self.names if (folder / name).exists()}

    def others(self, made: Made, than: Made) -> list[str]:
        """The results that are other than those."""
        return [name for name, value in made.items() if not alike(value, than.get(name))]

    def torn(self, folder: Path) -> list[str]:
        """The results that are neither those of the undisturbed run nor those that were there before."""
        made = {name: of for name, of in self.made(folder).items() if name != "run.json"}
        others = self.others(made, self.whole)
        return self.others({name: made[name] for name in others}, self.made(self.prepared) if self.prepared else {})


@dataclasses.dataclass
class Run:
    """A run of a script, in a session of its own, with its output in a file that no orphan keeps open."""

    process: "subprocess.Popen[bytes]"
    said: Path

    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def kill(self, how: str, word: str, mark: Mark) -> None:
        """Sends the signal: Ctrl-C to the whole group, as a terminal does, the others to one process."""
        if how == "Ctrl-C":
            os.killpg(self.process.pid, signal.SIGINT)
        elif how == "SIGKILL of a rank":
            lines = {process: process.cmdline()[:4] for process in mark.processes()}
            ranks = [rank for rank, line in lines.items() if any(part == word for part in line)]
            for rank in ranks[-1:]:
                rank.kill()
        else:
            self.process.send_signal(getattr(signal, how))


def kill_and_run_again(script: Script, folder: Path, how: str, seed: int, mark: Mark) -> tuple[str, list[str]]:
    """What happened, in words, and what of it is not as promised.

    Odd seeds choose a moment by progress, even ones by time. Every fourth seed kills twice.
    """
    moments, faults, killed = random.Random(seed), [], []
    script.prepare(folder)
    before = script.calls_so_far()
    for _ in range(2 if seed % 4 == 3 else 1):
        run, share = script.start(folder, mark), moments.random()
        script.reach(run, share, by_progress=seed % 2 == 1)
        if run.process.poll() is None:
            run.kill(how, script.word, mark)
            began = time.monotonic()
            faults += left_behind(mark, 60)
            run.process.wait(30)
            faults += misbehaved(script, run, how)
            killed.append(f"{share:.0%} (status {run.process.returncode} after {time.monotonic() - began:.1f} s)")
        faults += [f"{name} is not whole" for name in script.torn(folder)]
    last = script.start(folder, mark)
    if last.process.wait(500) != 0:
        faults.append(f"the next run ends with {last.process.returncode}: …{last.text()[-2000:]}")
    faults += left_behind(mark, 20)
    repeated = script.calls_so_far() - before - script.calls
    if not 0 <= repeated <= len(killed) * script.in_flight:
        faults.append(f"{repeated} calls repeated, of {script.in_flight} in flight at each kill")
    made = script.made(folder)
    faults += [f"{name} is missing" for name in script.whole.keys() - made.keys()]
    faults += [f"{name} is another" for name in script.others(made, script.whole)]
    faults += [f"{name} is in one folder only" for name in names_in(folder) ^ script.there]
    at = ", ".join(killed) or "no moment"
    return f"{how}, seed {seed}: at {at} of {script.seconds:.0f} s, {script.calls} calls; {repeated} repeated", faults


def left_behind(mark: Mark, patience: float) -> list[str]:
    """The processes that are still there; they are ended."""
    left = [] if mark.all_end(patience) else mark.alive()
    mark.end()
    return [f"left behind: {line}" for line in left]


def misbehaved(script: Script, run: Run, how: str) -> list[str]:
    """What is wrong with how a script that was asked to stop has ended.

    At the first moment Python imports and prints a traceback of its own, and at the last one it ends without a word.
    DeepSpeed's command prints its own traceback and has its own status.
    """
    if how.startswith("SIGKILL") or script.word:
        return []
    said, status = run.text(), run.process.returncode
    if said.startswith("Traceback"):
        return []
    wanted = {"Ctrl-C": (0, 130, -signal.SIGINT), "SIGTERM": (0, -signal.SIGTERM, 143)}[how]
    one_line = status != 130 or said.count("run the same command again") == 1
    return [] if status in wanted and one_line and "Traceback" not in said else [f"status {status}: …{said[-2000:]}"]


def names_in(folder: Path) -> frozenset[str]:
    """All that lies in a results folder."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return frozenset(name for name in names if not name.startswith(OF_RUNS))


def _read(path: Path) -> Any:
    try:
        if path.is_dir() and (weights := sorted(path.glob("*.safetensors"))):
            return {file.name: file_digest(file) for file in weights}
        if path.is_dir():
            return datasets.load_from_disk(path).to_list()
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return list(map(json.loads, text.splitlines()))
        return json.loads(text, object_pairs_hook=list) if path.name in IN_ORDER else json.loads(text)
    except Exception:
        return TORN


def alike(one: Any, other: Any) -> bool:
    """Whether two results are the same, but for the figures of a run."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = {name for name in one.keys() | other.keys() if not OF_A_RUN.search(name)}
        return names <= one.keys() & other.keys() and all(alike(one[name], other[name]) for name in names)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)
