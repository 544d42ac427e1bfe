"""Corpus folders of many and of odd files, archives made to swell, and terminals that cannot say all."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, Engine, clean_environment, run, says_one_line

from augcon.run import corpus
from augcon.run.cut import CorpusRules, read_corpus

TEXT = "The mill by the river was built in 1850. It ground the corn of the whole valley for a hundred years. {}"


def cut(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files that gave articles, and those that were skipped, each with the reason."""
    found = read_corpus(CorpusRules(str(folder), alike_articles=0))
    return [row.file for row in found.articles], {each.file: f"{each.reason}: {each.detail}" for each in found.skipped}


def test_pipes_sockets_devices_and_loops_in_a_folder_are_skipped_with_a_reason(tmp_path: Path):
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXT.format("a"))
    (folder / "inner" / "b.txt").write_text(TEXT.format("b"))
    for name in ("pipe.txt", "pipe.jsonl", "pipe.pdf", "pipe.zip", "pipe.csv"):
        os.mkfifo(folder / name)
    (folder / "device.txt").symlink_to("/dev/zero")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "above").symlink_to(folder)
    (folder / "inner" / "above").symlink_to(folder / "inner")
    os.chdir(folder)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.md")
        os.chdir(ROOT)
        articles, skipped = cut(folder)
    assert articles == ["corpus/a.txt", "corpus/inner/b.txt"]
    special = ["device.txt", "pipe.csv", "pipe.jsonl", "pipe.pdf", "pipe.txt", "pipe.zip", "socket.md"]
    for name in special:
        assert skipped.pop(f"corpus/{name}") == "cannot be read: a pipe, a socket or a device"
    assert [*skipped] == ["corpus/loop.txt"] and "cannot be read" in skipped["corpus/loop.txt"]
    refused = run("step1_gen_q.py", "--corpus", folder / "pipe.txt", "--results", tmp_path / "r", timeout=100)
    assert says_one_line(refused, "pipe.txt", "a pipe, a socket or a device")


@pytest.mark.parametrize("number", [1_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_a_folder_of_many_small_files_is_read_in_time_and_memory_that_grow_as_it_does(number: int, tmp_path: Path):
    for n in range(number):
        folder = tmp_path / "corpus" / str(n // 1000)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.txt").write_text(TEXT.format(f"Its owner was number {n} of {n * 7919 % number}."))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    articles, skipped = cut(tmp_path / "corpus")
    seconds = time.monotonic() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{number:,} files: {seconds:.1f} s, {grown / 1024:.0f} MiB more")
    assert len(articles) == number and not skipped
    assert seconds < 30 + number / 200 and grown < 100_000 + 10 * number  # KiB


# Names that are no UTF-8, terminals that are none


def environment(kind: str) -> dict[str, str]:
    of = {
        "Latin-1": {"PYTHONIOENCODING": "latin-1"},
        "ASCII": {"PYTHONIOENCODING": "ascii:strict"},
        "C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "POSIX": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }
    return {**clean_environment(), **of[kind]}


@pytest.mark.parametrize(
    "kind", ["Latin-1", "C", *(pytest.param(of, marks=pytest.mark.nightly) for of in ("ASCII", "POSIX"))]
)
def test_chinese_names_and_texts_do_not_need_a_terminal_that_can_say_them(kind: str, engine: Engine, tmp_path: Path):
    says_all = "PYTHONUTF8" not in environment(kind)  # or an argument in Chinese is not understood, and refused
    folder, results = tmp_path / ("语料" if says_all else "corpus"), tmp_path / ("结果" if says_all else "results")
    folder.mkdir()
    (folder / "黄河.txt").write_text("黄河发源于青海，流经九个省区，最后注入渤海。" * 3, encoding="utf-8")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xe9.txt")).write_text(TEXT, encoding="utf-8")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.txt")).write_text("", encoding="utf-8")
    flags = ["--corpus", folder, "--results", results, "--api-base", engine.api, "--negatives", "0"]
    for script in ("step1_gen_q.py", "report.py"):
        done = subprocess.run(
            [sys.executable, script, *flags], cwd=ROOT, env=environment(kind), capture_output=True, timeout=200
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    files = [json.loads(line)["file"] for line in (results / "articles.jsonl").read_text("utf-8").splitlines()]
    assert len(files) == 2 and all("/" in file for file in files)
    assert len((results / "skipped.jsonl").read_text("utf-8").splitlines()) == 1
    assert "黄河发源于青海" in (results / "nodes.jsonl").read_text("utf-8")


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "config.py")


@pytest.mark.parametrize(
    "script", [name if name == "export.py" else pytest.param(name, marks=pytest.mark.nightly) for name in SCRIPTS]
)
def test_help_and_errors_can_be_said_in_ascii(script: str, tmp_path: Path):
    for flags in (["--help"], ["--results", "结果", "--corpus", "没有", "--lora", "没有", "--api-base", "http://没有"]):
        done = subprocess.run(
            [sys.executable, ROOT / script, *flags],
            cwd=tmp_path,
            env=environment("ASCII"),
            capture_output=True,
            timeout=200,
        )
        assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr, done.stderr


# Archives that swell


def bomb(path: Path, name: str, mebibytes: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive, archive.open(name, "w") as file:
        for _ in range(mebibytes):
            file.write(b'{"article": "' + b"a" * ((1 << 20) - 16) + b'"}\n')


def test_a_file_that_swells_when_unpacked_is_skipped_before_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "LARGEST", 1 << 20)
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: pytest.fail("something is unpacked"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    for name in ("rows.jsonl", "rows.csv", "text.txt", "inner.zip", "page.html"):
        bomb(folder / f"{name}.zip", name, 8)
    articles, skipped = cut(folder)
    assert articles == ["corpus/a.txt"]
    assert len(skipped) == 5 and all("unpacks to 8 MiB" in why for why in skipped.values())


def test_large_rows_in_an_archive_that_are_packed_as_texts_are_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        rows = [json.dumps({"article": TEXT.format(os.urandom(200).hex())}) for _ in range(20)]
        archive.writestr("rows.jsonl", "\n".join(rows))
    articles, skipped = cut(tmp_path / "a.zip")
    assert len(articles) == 20 and not skipped


def test_archives_in_archives_come_to_an_end(tmp_path: Path):
    inner = tmp_path / "0.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("deep.txt", TEXT)
    for n in range(1, 6):
        with zipfile.ZipFile(tmp_path / f"{n}.zip", "w") as archive:
            archive.writestr(f"{n}.txt", TEXT.format(n))
            archive.write(tmp_path / f"{n - 1}.zip", f"{n - 1}.zip")
    articles, skipped = cut(tmp_path / "5.zip")
    assert len(articles) == 3
    assert list(skipped.values()) == ["cannot be read: more than 3 archives in each other"]
