"""The NVIDIA GPUs of this machine, as nvidia-smi reports them. Without a working driver there are none."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from augcon.errors import UserError

SLACK = 512  # MiB by which the memory in use may exceed what it was before


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that this process may use: all, or those in CUDA_VISIBLE_DEVICES."""
    gpus = _query("index", "uuid")
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [uuid for _, uuid in gpus]
    visible = []
    for name in map(str.strip, os.environ["CUDA_VISIBLE_DEVICES"].split(",")):
        matches = [uuid for index, uuid in gpus if name and (index == name or uuid.startswith(name))]
        if not matches:
            break  # CUDA, too, ignores everything from the first unknown name on
        visible.append(matches[0])
    return visible


def require_gpu_numbers() -> None:
    """Raises UserError if CUDA_VISIBLE_DEVICES has anything but numbers, which is all that deepspeed accepts."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if names and not all(name.strip().lstrip("-").isdigit() for name in names.split(",")):
        numbers = {uuid: index for index, uuid in _query("index", "uuid")}
        example = ",".join(numbers[uuid] for uuid in visible_gpus()) or "0,1"
        raise UserError(f"CUDA_VISIBLE_DEVICES={names}: deepspeed accepts only the numbers of GPUs, such as {example}")


@contextlib.contextmanager
def gpu_memory_released() -> Iterator[None]:
    """On exit, waits until the GPUs hold no more memory than on entry, for at most a minute."""
    gpus = visible_gpus()
    before = _memory_used(gpus)
    try:
        yield
    finally:
        deadline = time.monotonic() + 60
        while held := [uuid for uuid, used in _memory_used(gpus).items() if used > before.get(uuid, 0) + SLACK]:
            if time.monotonic() > deadline:
                print(f"warning: memory is still in use on {', '.join(held)}", file=sys.stderr)
                break
            time.sleep(0.5)


def _memory_used(gpus: list[str]) -> dict[str, int]:
    """MiB in use on each of the GPUs."""
    return {uuid: int(used) for uuid, used in _query("uuid", "memory.used") if uuid in gpus and used.isdigit()}


def _query(*fields: str) -> list[list[str]]:
    """A row of these fields for each GPU; no rows if the driver does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)]
