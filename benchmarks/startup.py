"""Seconds of CPU that each script takes to answer --help, beside an earlier state of the project.

It computes all the while, so on an idle machine these are the seconds that a user waits.

git worktree add /somewhere/before bdbd2bb
python benchmarks/startup.py --before /somewhere/before
"""

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="folder with the earlier state")
    parser.add_argument("--times", type=int, default=3, help="runs, of which the median counts")
    options = parser.parse_args()
    print("| --help of | before, s | now, s | ratio |\n|---|---|---|---|")
    for path in sorted(HERE.glob("*.py")):
        if path.name != "config.py" and (options.before / path.name).exists():
            before, now = (seconds(folder / path.name, options.times) for folder in (options.before, HERE))
            print(f"| {path.name} | {before:.2f} | {now:.2f} | {before / now:.1f} |", flush=True)


def seconds(script: Path, times: int) -> float:
    """The median over some runs, after one that leaves the files in memory."""
    taken = []
    for _ in range(1 + times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, script, "--help"], cwd=script.parent, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    main()
