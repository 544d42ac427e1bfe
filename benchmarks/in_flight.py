"""How busy step 1 keeps a server: mean requests that it runs, and the client's CPU time a call.

Starts the demonstration engine with so many slots and a fixed latency as the stand-in for a server, runs
step1_gen_q.py on a corpus against it, and samples vllm:num_requests_running over the whole run and while there is work
for every slot (from the first time that all are busy to the last).

    python benchmarks/in_flight.py [--corpus DailyM] [--latency 4] [--slots 256]
"""

import argparse
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", default="DailyM")
    parser.add_argument("--latency", type=float, default=4.0, help="seconds that every reply takes")
    parser.add_argument("--slots", type=int, default=256, help="replies that the server makes at once")
    options = parser.parse_args()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    serving = ["--latency", str(options.latency), "--slots", str(options.slots)]
    engine = subprocess.Popen(
        [sys.executable, "-m", "augcon.demo.engine", "--port", str(port), *serving],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(address)
        with tempfile.TemporaryDirectory() as results:
            command = [sys.executable, "step1_gen_q.py", "--corpus", options.corpus, "--results", results]
            command += ["--api-base", f"{address}/v1"]
            running, seconds, cpu, output = watch(command, address)
    finally:
        engine.terminate()
    report(options, running, seconds, cpu, output)


def wait_for(address: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit("error: the demonstration engine did not start")


def watch(command: list[str], address: str) -> tuple[list[float], float, float, str]:
    """Runs step 1; returns the requests running at the server, ten times a second, its time, CPU time and output."""
    started = time.monotonic()
    step = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    running = []
    while step.poll() is None:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as metrics:
            figure = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics.read().decode(), re.MULTILINE)
        running.append(float(figure[1]))
        time.sleep(0.1)
    if step.returncode:
        sys.exit(f"error: step 1 ended with status {step.returncode}")
    # The engine is not among the children that have ended: this is the client alone.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return running, time.monotonic() - started, used.ru_utime + used.ru_stime, step.stdout.read()


def report(options: argparse.Namespace, running: list[float], seconds: float, cpu: float, output: str) -> None:
    limit = options.slots
    full = [i for i, n in enumerate(running) if n >= 0.99 * limit]
    if not full:
        sys.exit(f"error: never {limit} at once (at most {max(running):.0f}): the corpus is too small for so many")
    busy = running[full[0] : full[-1] + 1]
    calls = int(re.search(r"^calls: +([\d,]+)", output, re.MULTILINE)[1].replace(",", ""))
    print(output)
    mean = statistics.mean(busy)
    whole = statistics.mean(running)
    print("| slots | latency | busy while there is work | of all | over the whole run | calls/s | ideal |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {limit} | {options.latency} s | {mean:.1f} | {mean / limit:.1%} | {whole / limit:.1%} "
        f"| {calls / seconds:.0f} | {limit / options.latency:.0f} |"
    )
    print(f"\nclient, all of step 1 included: {1000 * cpu / calls:.2f} ms of CPU a call")


if __name__ == "__main__":
    main()
