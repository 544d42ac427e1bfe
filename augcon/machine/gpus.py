"""The NVIDIA GPUs of this machine, as nvidia-smi reports them. Without a working driver there are none."""

import contextlib
import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from augcon.errors import UserError

SLACK = 512  # MiB by which the memory in use may exceed what it was before
DRIVER = 580  # the oldest for CUDA 13, for which the PyTorch of requirements.txt is built


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine; its memory in MiB."""

    index: str
    uuid: str
    name: str
    total: int
    free: int
    driver: str


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use: all, or those in CUDA_VISIBLE_DEVICES."""
    gpus = _all_gpus()
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return gpus
    visible = []
    for name in map(str.strip, os.environ["CUDA_VISIBLE_DEVICES"].split(",")):
        matches = [gpu for gpu in gpus if name and (gpu.index == name or gpu.uuid.startswith(name))]
        if not matches:
            break  # CUDA, too, ignores everything from the first unknown name on
        visible.append(matches[0])
    return visible


def require_gpu_numbers() -> None:
    """Raises UserError if CUDA_VISIBLE_DEVICES has anything but numbers, which is all that deepspeed accepts."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if names and not all(name.strip().lstrip("-").isdigit() for name in names.split(",")):
        example = ",".join(gpu.index for gpu in visible_gpus()) or "0,1"
        raise UserError(f"CUDA_VISIBLE_DEVICES={names}: deepspeed accepts only the numbers of GPUs, such as {example}")


def require_driver(gpus: list[Gpu]) -> None:
    """Raises UserError where the driver is too old for the PyTorch that is installed."""
    driver = gpus[0].driver
    if not driver.split(".")[0].isdigit() or int(driver.split(".")[0]) >= DRIVER:
        return
    # It may do all the same: with NVIDIA's package for compatibility, or another build of PyTorch.
    probe = [sys.executable, "-c", "import torch; torch.cuda.init()"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise UserError(f"the NVIDIA driver {driver} is too old for the PyTorch here; update it to {DRIVER} or newer")


def linked(gpus: list[Gpu]) -> bool:
    """Whether every two GPUs of this machine are connected by NVLink; if not, it is PCIe between some."""
    if len(gpus) < 2:
        return False
    count = len(_all_gpus())
    return len(re.findall(r"\bNV\d+\b", _ask("topo", "-m"))) >= count * (count - 1)


@contextlib.contextmanager
def gpu_memory_released() -> Iterator[None]:
    """On exit, waits until the GPUs hold no more memory than on entry, for at most a minute."""
    before = _memory_used()
    try:
        yield
    finally:
        deadline = time.monotonic() + 60
        while held := [uuid for uuid, used in _memory_used().items() if used > before.get(uuid, 0) + SLACK]:
            if time.monotonic() > deadline:
                print(f"warning: memory is still in use on {', '.join(held)}", file=sys.stderr)
                break
            time.sleep(0.5)


def _memory_used() -> dict[str, int]:
    """MiB in use on each of the visible GPUs."""
    return {gpu.uuid: gpu.total - gpu.free for gpu in visible_gpus()}


def _all_gpus() -> list[Gpu]:
    """The GPUs of this machine. One that shares the memory of the CPU tells none of its own."""
    shared = psutil.virtual_memory()
    fields = "index,uuid,name,memory.total,memory.free,driver_version"
    answer = _ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    gpus = []
    for index, uuid, name, total, free, driver in csv.reader(answer.splitlines(), skipinitialspace=True):
        mib = (int(total), int(free)) if total.isdigit() else (shared.total >> 20, shared.available >> 20)
        gpus.append(Gpu(index, uuid, name, mib[0], mib[1], driver))
    return gpus


def _ask(*arguments: str) -> str:
    """What nvidia-smi answers; nothing if there is none, or its driver does not answer."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
