"""Full, read-only and odd disks, file systems without locks, torn stores, and clocks that jump: nothing is lost."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, Engine, clean_environment, outputs_in, says_one_line
from preloaded import Preloaded

from augcon.errors import UserError
from augcon.llm.store import Store
from augcon.run.results import Results

Finished = "subprocess.CompletedProcess[str]"
FEW = ("--scorer-epochs", 2, "--scorer-batch", 8, "--epochs", 2, "--answer-max-tokens", 64)
# What each script makes that an undisturbed run makes too.
MADE = {
    "step1_gen_q": ("contexts.jsonl", "articles.jsonl", "skipped.jsonl", "nodes.jsonl", "queries.json"),
    "step2_scorer": ("filtered_queries.json", "scores.jsonl"),
    "step3_gen_a": ("sft_origins.jsonl", "example_search.json", "dropped_queries.jsonl"),
    "finetune": ("LoRA/adapter_model.safetensors",),
    "merge": ("sft_model/model.safetensors",),
    "inference": ("outputs/data-00000-of-00001.arrow",),
    "judge": ("judge.jsonl", "judge.json"),
    "export": ("export/train.jsonl", "export/held_out.jsonl"),
    "report": (),
}


LIGHT = ("step1_gen_q", "step3_gen_a", "inference", "judge", "export", "report")  # the others import torch
ALL = [name if name in LIGHT else pytest.param(name, marks=pytest.mark.nightly) for name in MADE]


class Tools:
    """What all runs share: a corpus, questions, a tiny model, a server, and scripts in processes."""

    def __init__(self, folder: Path, api: str, training: bool) -> None:
        from augcon.demo.tiny_model import make_tiny_model

        self.preloaded, self.said = Preloaded(training), folder / "said"
        articles = [text[:1200] for text in datasets.load_from_disk(ROOT / "DailyM")["train"]["article"][:2]]
        corpus, questions, model = folder / "corpus.jsonl", folder / "questions.txt", folder / "tiny"
        corpus.write_text("".join(json.dumps({"article": text}) + "\n" for text in [*articles, None]))
        questions.write_text("What is it?\nWhy?\n")
        make_tiny_model(model, articles)
        self.flags = ["--corpus", corpus, "--questions", questions, "--scorer-model", model, "--model", model]
        self.flags += ["--api-base", api, "--negatives", 4 if training else 0, *FEW]

    def arguments(self, script: str, results: Path) -> list[object]:
        outputs = ["--outputs", results / "outputs"] if script == "judge" else []
        return ["--results", results, *outputs, *self.flags]

    def run(self, script: str, results: Path) -> Finished:
        return self.preloaded.run(self.said, script, *self.arguments(script, results))


@pytest.fixture(scope="module")
def tools(engine: Engine, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tools:
    nightly = request.config.getoption("markexpr") == "nightly"
    return Tools(tmp_path_factory.mktemp("tools"), engine.api, training=nightly)


@pytest.fixture(scope="module")
def before(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The results folder of an undisturbed chain, as it was before a script ran; "" for all of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    results, left = folder / "run" / "results", list(MADE)
    results.mkdir(parents=True)

    def state(script: str) -> Path:
        while left and not (folder / (script or "all") / "results").exists():
            shutil.copytree(results, folder / left[0] / "results", dirs_exist_ok=True)
            done = tools.run(left[0], results)
            assert done.returncode == 0, done.stderr
            left.pop(0)
            if not left:
                shutil.copytree(results, folder / "all" / "results")
        return folder / (script or "all") / "results"

    return state


class Disk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, *options: str, again: bool = False) -> None:
        root = [] if os.getuid() == 0 else ["sudo", "-n"]
        words = ["-o", ",".join([*options, *(["remount"] if again else [f"uid={os.getuid()}"])])]
        done = subprocess.run([*root, "mount", "-t", "tmpfs", *words, "tmpfs", self.folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")

    def resize(self, size: int) -> None:
        self.mount(f"size={size}", again=True)

    def hold(self, folder: Path) -> int:
        """Makes a copy of a folder all that is on the disk; the bytes that it takes."""
        self.resize(100 << 20)
        shutil.rmtree(self.folder / "results", ignore_errors=True)
        shutil.copytree(folder, self.folder / "results")
        about = os.statvfs(self.folder)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def close(self) -> None:
        subprocess.run([*([] if os.getuid() == 0 else ["sudo", "-n"]), "umount", "-l", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    made.mount("size=100m")
    yield made
    made.close()


# Full disks


def fill_and_go_on(script: str, shares: list[float], tools: Tools, before: Callable[[str], Path], disk: Disk) -> int:
    """A script on a disk with room for a share of what it writes, and again with room; how often it stopped."""
    stopped, results = 0, disk.folder / "results"
    start, end = before(script), before(next_after(script))
    whole = disk.hold(end)
    for share in shares:
        used = disk.hold(start)
        disk.resize(int(used + share * (whole - used)))
        done = tools.run(script, results)
        assert "Traceback" not in done.stderr, (share, done.stderr)
        assert done.returncode == 0 or says_one_line(done, str(results)), (share, done.stderr)
        stopped += done.returncode != 0
        disk.resize(100 << 20)
        again = tools.run(script, results)
        assert again.returncode == 0, (share, again.stderr)
        for name in MADE[script]:
            assert content(results, name) == content(end, name), (share, name)
        assert not list(results.rglob("*.unfinished")), share
    return stopped


def next_after(script: str) -> str:
    names = [*MADE, ""]
    return names[names.index(script) + 1]


def content(results: Path, name: str) -> bytes:
    """A file without the name of its folder."""
    return re.sub(rb'[^"]*/outputs"', b'outputs"', (results / name).read_bytes())


@pytest.mark.parametrize("script", ["step1_gen_q", "step3_gen_a"])
def test_a_full_disk_is_a_line_and_with_room_the_same_command_ends_as_undisturbed(
    script: str, tools: Tools, before: Callable[[str], Path], disk: Disk
):
    assert fill_and_go_on(script, [0.05, 0.5], tools, before, disk)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("script", MADE)
def test_a_disk_that_is_full_at_any_moment_loses_nothing(
    script: str, tools: Tools, before: Callable[[str], Path], disk: Disk
):
    chance = random.Random(script)
    shares = sorted(chance.uniform(0, 1) for _ in range(12))
    assert fill_and_go_on(script, shares, tools, before, disk) > 3


# Folders that cannot be written to, and two runs at once


@pytest.mark.parametrize("script", ALL)
def test_a_folder_that_cannot_be_written_to_is_a_line_that_names_it(
    script: str, tools: Tools, before: Callable[[str], Path], disk: Disk
):
    results = disk.folder / "results"
    shutil.copytree(before("step1_gen_q" if script in ("step1_gen_q", "inference") else "finetune"), results)
    (results / "LoRA").mkdir(exist_ok=True)
    if script == "judge":
        outputs_in(results / "outputs", ["Why?"], "So.")
    disk.mount("ro", again=True)
    assert says_one_line(tools.run(script, results), str(results), "Read-only file system")


@pytest.mark.parametrize("script", ALL)
def test_a_file_in_the_place_of_the_folder_is_a_line_that_names_it(script: str, tools: Tools, tmp_path: Path):
    (tmp_path / "results").write_text("notes")
    assert says_one_line(tools.run(script, tmp_path / "results"), str(tmp_path / "results"))
    assert (tmp_path / "results").read_text() == "notes"


@pytest.mark.parametrize("script", ALL[:-2])
def test_a_second_run_is_refused_and_told_which_process_the_first_is(script: str, tools: Tools, tmp_path: Path):
    """export.py and report.py write one thing, at once; they may run beside another."""
    results = tmp_path / "results"
    (results / "LoRA").mkdir(parents=True)
    with Results(results).held():
        done = tools.run(script, results)
    name = f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}"
    assert says_one_line(done, f"another run is using {results} ({name}); wait, or choose another --results")


@pytest.mark.parametrize("left", [b"", b"step1_gen_q.py, process 1 on elsewhere\n", b"\xff\0" * 500])
def test_what_a_dead_run_left_in_the_lock_refuses_nobody(left: bytes, tmp_path: Path):
    (tmp_path / ".lock").write_bytes(left)
    with Results(tmp_path).held():
        said = (tmp_path / ".lock").read_text()
    assert said == f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}\n"


# File systems without locks


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuses)
    monkeypatch.setattr("fcntl.lockf", refuses)
    path = tmp_path / "replies.sqlite"
    for number in range(2):
        with Results(tmp_path).held(), Store(path) as store:
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{tmp_path} cannot be locked ({OSError(code, os.strerror(code))})" in said
            store.put(bytes([number]), f"reply {number}")
            assert [store.get(bytes([n])) for n in range(number + 1)] == [f"reply {n}" for n in range(number + 1)]
            assert not path.with_name("replies.sqlite-shm").exists()  # which other machines would not share
            with sqlite3.connect(f"{path.as_uri()}?vfs=unix-none&mode=ro&immutable=1", uri=True) as other:
                assert other.execute("PRAGMA journal_mode").fetchone()


def test_a_store_that_is_written_without_locks_survives_a_kill_and_is_read_with_them(tmp_path: Path):
    code = """
import fcntl, os, signal, sys
from pathlib import Path
def refuses(*_):
    raise OSError(37, "No locks available")
fcntl.lockf = refuses
from augcon.llm.store import Store
with Store(Path(sys.argv[1])) as store:
    for n in range(300):
        store.put(bytes([n % 256, n // 256]), str(n))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "replies.sqlite"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with Store(path) as store:
        assert [store.get(bytes([n % 256, n // 256])) for n in range(300)] == list(map(str, range(300)))


# Torn stores


def torn(seed: int, folder: Path) -> str:
    """What comes of a store that is spoilt at a random place; a reply that was not put is an error."""
    chance = random.Random(seed)
    path, replies = folder / "replies.sqlite", {bytes([n]): f"reply {n} " * chance.randrange(400) for n in range(200)}
    with Store(path) as store:
        for n, item in enumerate(replies.items()):
            store.put(*item)
            if n == 150:
                store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for name in ("replies.sqlite", "replies.sqlite-wal"):  # as a crash leaves them
            shutil.copy(folder / name, folder / f"{name}.left")
    for name in ("replies.sqlite", "replies.sqlite-wal"):
        (folder / f"{name}.left").replace(folder / name)
    target = folder / chance.choice(["replies.sqlite", "replies.sqlite", "replies.sqlite-wal"])
    data = bytearray(target.read_bytes())
    at = chance.randrange(len(data)) if chance.random() < 0.8 else chance.randrange(200)
    if chance.random() < 0.3:
        del data[at:]
    else:
        noise = chance.randbytes(chance.choice([1, 1, 20, 5000]))
        data[at : at + len(noise)] = noise
    target.write_bytes(data)
    try:
        with Store(path) as store:
            found = {key: store.get(key) for key in replies}
            for key, reply in replies.items():
                store.put(key, reply)
    except UserError as error:
        return "a line" if str(path) in str(error) and "delete it" in str(error) else f"another line: {error}"
    assert all(reply in (None, replies[key]) for key, reply in found.items())
    return "all" if None not in found.values() else "some"


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.nightly)], ids=len)
def test_a_store_torn_at_any_byte_gives_no_wrong_reply(seeds: range, tmp_path: Path):
    outcomes = Counter()
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        outcomes[torn(seed, folder)] += 1
        shutil.rmtree(folder)
    print(outcomes)
    assert set(outcomes) == {"a line", "all", "some"}


@pytest.mark.parametrize("stored", ["[7]", '{"text": 7, "complete": true}'])
def test_what_is_stored_and_no_reply_is_asked_for_again(
    stored: str, tools: Tools, before: Callable[[str], Path], tmp_path: Path
):
    results = tmp_path / "results"
    shutil.copytree(before("step2_scorer"), results)
    with Store(results / "replies.sqlite") as store:
        keys = [key for (key,) in store._connection.execute("SELECT key FROM replies")]
        for key in keys:
            store.put(key, stored)
    done = tools.run("step1_gen_q", results)
    assert done.returncode == 0 and "0 replayed" in done.stdout, done.stderr
    for name in MADE["step1_gen_q"]:
        assert content(results, name) == content(before("step2_scorer"), name)


# Clocks

JUMPS = """
import random, sys, time
real, chance = time.time, random.Random(1)
time.time = lambda: real() + chance.choice([0, -3600, 3600, -3e8, 3e8, 0.5])
monotonic, slept = time.monotonic, [0.0]
def sleeps():  # the machine, for 20 minutes now and then
    slept[0] += 1200 * (chance.random() < 0.0005)
    return monotonic() + slept[0]
time.monotonic = sleeps
"""


@pytest.mark.parametrize("script", ["step1_gen_q", "step3_gen_a"])
def test_clocks_that_jump_and_a_machine_that_sleeps_change_nothing(
    script: str, tools: Tools, before: Callable[[str], Path], tmp_path: Path
):
    results = tmp_path / "results"
    shutil.copytree(before(script), results)
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    done = subprocess.run(
        list(map(str, [sys.executable, f"{script}.py", *tools.arguments(script, results)])),
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not re.search(r"-\d+[:.]\d|\bnan\b|\binf\b", done.stdout + done.stderr), done.stdout + done.stderr
    for name in MADE[script]:
        assert content(results, name) == content(before(next_after(script)), name)
