"""Peak memory of a process of fine-tuning before the first step: its pairs as tokens, and packed.

Beside lists in Python in each process, as it was. The pairs are random tokens, about 250 each: what is measured is
where they are kept. Pages of a file that is mapped count in each process, but the processes share them.

    python benchmarks/encoding.py --pairs 200000
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
from trl.data_utils import pack_dataset

sys.path[:0] = [str(Path(__file__).parent.parent)]

from augcon.data import Pair  # noqa: E402
from augcon.train import sft  # noqa: E402
from augcon.train.chat import TrainingExample  # noqa: E402

ROOM, SEED = 1000, 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--times", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--only", choices=["nothing", "lists", "first", "other"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        hold(options.only, options.pairs, options.folder)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    with tempfile.TemporaryDirectory() as folder:

        def peak(which: str) -> float:
            command = [sys.executable, __file__, "--pairs", str(options.pairs), "--only", which, "--folder", folder]
            runs = [
                subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(options.times)
            ]
            return statistics.median(float(done.stdout.splitlines()[-1]) for done in runs)

        nothing = peak("nothing")
        print(f"{options.pairs:,} pairs; GiB above the {nothing:.2f} of the imports\n")
        print("| | GiB | of the first |\n|---|---|---|")
        first = peak("lists") - nothing
        print(f"| lists in each process | {first:.2f} | 1.00 |")
        for which, name in (("first", "a file, the process that writes it"), ("other", "a file, each other process")):
            taken = peak(which) - nothing
            print(f"| {name} | {taken:.2f} | {taken / first:.2f} |", flush=True)


def hold(which: str, number: int, folder: Path) -> None:
    """Does what one process does with the pairs before it trains."""
    datasets.disable_progress_bars()
    path, packs = folder / "learnt.arrow", folder / "packs"
    if which == "lists":
        examples = [random_example(random.Random(place)) for place in range(number)]
        columns = {"input_ids": [row.input_ids for row in examples], "labels": [row.labels for row in examples]}
        pack_dataset(datasets.Dataset.from_dict(columns).shuffle(seed=SEED), ROOM)
    elif which == "first":
        sft.write_examples(random_encoder, [Pair("", "")] * number, path)  # type: ignore[arg-type]
        sft.pack(datasets.Dataset.from_file(str(path)), ROOM, SEED).save_to_disk(packs)
    elif which == "other":
        datasets.Dataset.from_file(str(path)).with_format("numpy")["length"][:].sum()
        sum(map(len, datasets.load_from_disk(packs)["seq_lengths"]))


def random_encoder(pairs: Sequence[Pair]) -> list[TrainingExample]:
    """In place of a ChatEncoder, whose time and memory for a thousand pairs are the same either way."""
    return [random_example(random.Random(place)) for place, _ in enumerate(pairs)]


def random_example(chance: random.Random) -> TrainingExample:
    """A pair of about 250 tokens."""
    start, length = chance.randrange(1000, 100_000), min(1000, max(30, round(chance.lognormvariate(5.3, 0.6))))
    ids = list(range(start, start + length))
    return TrainingExample(ids, [-100] * (length // 5) + ids[length // 5 :])


if __name__ == "__main__":
    main()
