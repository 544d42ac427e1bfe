"""A soak: steps 1 and 3 over a large corpus, against a server in trouble, killed again and again.

    python tests/faults/soak.py [--articles 2000] [--share 60] [--seed 1] [--into soak]

The same corpus is first done undisturbed, and at the end the files have to be the same. A picture of the memory of each
process and a table come with it. The engine is the demonstration's, through the server of faulty.py.
"""

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import ROOT, clean_environment, free_port  # noqa: E402

from augcon.files import new_picture  # noqa: E402

NEVER = 1e9  # seconds
MADE = {
    "step1_gen_q.py": ("nodes.jsonl", "queries.json"),
    "step3_gen_a.py": ("sft_origins.jsonl", "dropped_queries.jsonl"),
}


def write_corpus(path: Path, number: int) -> Path:
    """Articles made of sentences of DailyM in a random order, each a different one."""
    texts = datasets.load_from_disk(ROOT / "DailyM")["train"]["article"]
    sentences = [sentence + "。" for text in texts for sentence in text.split("。") if sentence.strip()]
    chance = random.Random(0)
    rows = ({"article": "".join(chance.sample(sentences, 12))} for _ in range(number))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Soak:
    """Runs scripts to their end, killing them now and then. ``memory``: (seconds, MiB) of each process."""

    def __init__(self, api: str, folder: Path, corpus: Path, seed: int, between: float) -> None:
        self.api, self.folder, self.corpus = api, folder, corpus
        self.chance, self.between = random.Random(seed), between
        self.began = time.monotonic()
        self.memory: list[list[tuple[float, float]]] = []
        self.kills: list[float] = []

    def run(self, script: str) -> None:
        """One script, until it ends by itself."""
        command = [sys.executable, script, "--api-base", self.api, "--results", str(self.folder), "--negatives", "0"]
        command += ["--request-timeout", "20", "--corpus", str(self.corpus), "--max-passes", "2"]
        with (self.folder.parent / "log").open("a") as log:
            while True:
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=clean_environment())
                if self._ends(process):
                    break
        if process.returncode:
            raise RuntimeError(f"{script} ended with {process.returncode}; see {self.folder.parent / 'log'}")

    def _ends(self, process: "subprocess.Popen[bytes]") -> bool:
        samples: list[tuple[float, float]] = []
        self.memory.append(samples)
        kill = time.monotonic() + self.chance.expovariate(1 / self.between)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                samples.append((self.seconds, psutil.Process(process.pid).memory_info().rss / 2**20))
            if time.monotonic() > kill:
                process.send_signal(self.chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                process.wait(60)
                self.kills.append(self.seconds)
                return False
            time.sleep(0.5)
        return True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def soak(folder: Path, name: str, corpus: Path, share: int, seed: int, between: float) -> tuple[Soak, dict[str, Any]]:
    """Both steps, and what the server counted."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("faulty.py")), "--port", str(port), "--latency", "0.05"]
    server = subprocess.Popen([*command, "--share", str(share)], stdout=subprocess.PIPE, text=True)
    run = Soak(f"http://127.0.0.1:{port}/v1", folder / name, corpus, seed, between)
    try:
        for script in MADE:
            run.run(script)
            if script == "step1_gen_q.py":
                (run.folder / "filtered_queries.json").write_bytes((run.folder / "queries.json").read_bytes())
            print(f"{name}: {script} done after {run.seconds:.0f} s, {len(run.kills)} kills", flush=True)
    finally:
        server.terminate()
        counts = json.loads(server.communicate()[0] or "{}")
    return run, counts


def plot(run: Soak, path: Path) -> None:
    with new_picture(path, 10) as axes:
        for samples in filter(None, run.memory):
            axes.plot(*zip(*samples, strict=True), color="tab:blue", linewidth=1)
        for kill in run.kills:
            axes.axvline(kill, color="tab:red", alpha=0.2, linewidth=0.8)
        axes.set(xlabel="seconds; a red line is a kill", ylabel="memory of the process, MiB", ylim=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--articles", type=int, default=2000)
    parser.add_argument("--share", type=int, default=60, help="of a thousand requests, those that meet trouble")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--between", type=float, default=30, help="mean seconds between two kills")
    parser.add_argument("--into", type=Path, default=Path("soak"))
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
    corpus = write_corpus(options.into / "corpus.jsonl", options.articles)
    good, expected = soak(options.into, "undisturbed", corpus, 0, options.seed, NEVER)
    bad, counts = soak(options.into, "disturbed", corpus, options.share, options.seed, options.between)
    plot(bad, options.into / "memory.png")
    same = {
        name: (good.folder / name).read_bytes() == (bad.folder / name).read_bytes()
        for names in MADE.values()
        for name in names
    }
    print(f"undisturbed: {good.seconds:.0f} s, {expected}")
    print(f"disturbed:   {bad.seconds:.0f} s, {len(bad.kills)} kills, {counts}")
    lost = expected["distinct"] - counts["distinct"]
    repeated = counts["calls"] - counts["distinct"] - counts["troubles"]
    print(f"requests never made: {lost}; asked again though nothing had failed: {repeated}")
    print(f"files: {same}")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
