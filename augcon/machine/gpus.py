"""The NVIDIA GPUs of this machine, as nvidia-smi tells of them; no driver, no GPU."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from augcon.errors import UserError

SLACK = 512  # MiB by which the memory in use may differ from before


def visible_gpus() -> list[str]:
    """The identifiers of the GPUs that this process may use: all, or those in CUDA_VISIBLE_DEVICES."""
    rows = _query("index", "uuid")
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [uuid for _, uuid in rows]
    chosen = []
    for name in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        found = [
            uuid for index, uuid in rows if name.strip() and (index == name.strip() or uuid.startswith(name.strip()))
        ]
        if not found:
            break  # CUDA too goes no further than the first name it does not know
        chosen.append(found[0])
    return chosen


def check_numbers() -> None:
    """Raises UserError where CUDA_VISIBLE_DEVICES has other names than numbers: deepspeed's launcher reads no other."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if names and not all(name.strip().lstrip("-").isdigit() for name in names.split(",")):
        number = {uuid: index for index, uuid in _query("index", "uuid")}
        here = ",".join(number[uuid] for uuid in visible_gpus()) or "0,1"
        raise UserError(f"CUDA_VISIBLE_DEVICES={names}: deepspeed wants the numbers of the GPUs, such as {here}")


@contextlib.contextmanager
def memory_given_back(patience: float = 60) -> Iterator[None]:
    """On leaving, waits until the GPUs hold no more memory than on entering, ``patience`` seconds at most."""
    gpus = visible_gpus()
    before = _memory_used(gpus)
    try:
        yield
    finally:
        end = time.monotonic() + patience
        while held := [uuid for uuid, used in _memory_used(gpus).items() if used > before.get(uuid, 0) + SLACK]:
            if time.monotonic() > end:
                print(f"warning: the memory of {', '.join(held)} is still in use", file=sys.stderr)
                break
            time.sleep(0.5)


def _memory_used(gpus: list[str]) -> dict[str, int]:
    """MiB in use on each of the GPUs."""
    if not gpus:
        return {}
    return {uuid: int(used) for uuid, used in _query("uuid", "memory.used") if uuid in gpus and used.isdigit()}


def _query(*fields: str) -> list[list[str]]:
    """One row a GPU. A driver that does not answer has none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)]
