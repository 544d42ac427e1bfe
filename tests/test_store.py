"""The store of replies: what was put is there, whatever happens next; trouble is one line."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from augcon.errors import UserError
from augcon.llm.store import Store

ROOT = Path(__file__).parents[1]
EXAMPLES = ["", "黄河之水天上来\n😀", "a\0b", "\ud800 lone \udfff", "</s>'\";--"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replies.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store


def key(number: int) -> bytes:
    return number.to_bytes(32)


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Code that uses a store, in a process of its own."""
    head = (
        "import os, resource, signal, sys\nfrom pathlib import Path\n"
        "from augcon.errors import UserError\nfrom augcon.llm.store import Store\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# What was put is there


def test_get_sees_what_was_put_and_nothing_else(store: Store):
    for number, text in enumerate(EXAMPLES):
        assert store.get(key(number)) is None
        store.put(key(number), text)
        assert store.get(key(number)) == text
    store.put(key(0), "another")
    assert store.get(key(0)) == "another"


def test_any_text_comes_back_as_it_was_also_after_reopening(path: Path):
    numbers = iter(range(10**6))

    @example(EXAMPLES)
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.text(max_size=50), max_size=20))
    def holds(texts: list[str]) -> None:
        kept = {key(next(numbers)): text for text in texts}
        with Store(path) as store:
            for item in kept.items():
                store.put(*item)
        with Store(path) as store:
            assert {key: store.get(key) for key in kept} == kept

    holds()


def test_a_reply_of_20_million_characters_is_kept(store: Store):
    text = "长" * 20_000_000
    store.put(key(1), text)
    assert store.get(key(1)) == text


def test_replies_can_be_read_with_any_sqlite_tool(path: Path):
    with Store(path) as store:
        store.put(key(1), "黄河")
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT reply, typeof(reply) FROM replies").fetchall() == [("黄河", "text")]
    connection.close()


@pytest.mark.parametrize("puts", [1, 300])
def test_what_put_returned_for_survives_a_kill(path: Path, puts: int):
    code = """
with Store(Path(sys.argv[1])) as store:
    for n in range(int(sys.argv[2])):
        store.put(n.to_bytes(32), str(n))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, path, puts).returncode == -signal.SIGKILL
    with Store(path) as store:
        assert [store.get(key(n)) for n in range(puts)] == [str(n) for n in range(puts)]


# Trouble


@pytest.mark.parametrize("spoil", ["no database", "another table", "a folder", "no such folder"])
def test_what_is_no_store_is_one_line_for_the_user(path: Path, spoil: str):
    if spoil == "no database":
        path.write_bytes(b"these are notes, not replies\n" * 100)
    elif spoil == "another table":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE replies (something TEXT)")
        connection.close()
    elif spoil == "a folder":
        path.mkdir()
    else:
        path = path / "deeper" / "replies.sqlite"

    def use() -> None:
        with Store(path) as store:
            store.put(key(1), "x")

    with pytest.raises(UserError) as caught:
        use()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert ("damaged" in str(caught.value)) == (spoil in ("no database", "another table"))
    if spoil == "no database":
        assert path.read_bytes().startswith(b"these are notes")


def test_a_damaged_store_is_one_line_on_reading_too(path: Path):
    with Store(path) as store:
        store.put(key(1), "x" * 100_000)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with Store(path) as store, pytest.raises(UserError, match=r"cannot be used.*damaged.*delete it"):
        store.get(key(1))


@pytest.mark.parametrize("kept", [10, 100, 5_000, 200_000])
def test_a_torn_store_is_called_damaged(path: Path, kept: int):
    with Store(path) as store:
        for number in range(300):
            store.put(key(number), "x" * 1000)
    path.write_bytes(path.read_bytes()[:kept])

    def use() -> None:
        with Store(path) as store:
            for number in range(300):
                store.get(key(number))

    with pytest.raises(UserError, match="damaged"):
        use()


def test_a_read_only_folder_is_one_line_and_harms_no_earlier_reply(tmp_path: Path):
    code = """
folder = Path(sys.argv[1])
path = folder / "replies.sqlite"
if sys.argv[2] == "old":
    with Store(path) as store:
        store.put(b"1", "earlier")
    path.chmod(0o444)
folder.chmod(0o555)
os.chdir(folder)
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    with Store(Path(path.name)) as store:
        store.put(b"2", "later")
except UserError as error:
    print(error)
"""
    for case in ("new", "old"):
        folder = tmp_path / case
        folder.mkdir()
        done = run(code, folder, case)
        folder.chmod(0o755)
        assert done.stdout.count("\n") == 1 and "replies.sqlite" in done.stdout, done.stderr
    path = tmp_path / "old" / "replies.sqlite"
    path.chmod(0o644)
    with Store(path) as store:
        assert store.get(b"1") == "earlier" and store.get(b"2") is None


def test_a_full_disk_is_one_line_keeps_what_was_there_and_the_store_recovers(path: Path):
    code = """
with Store(Path(sys.argv[1])) as store:
    store.put(b"1", "earlier")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, free[1]))  # as a full disk does, writes fail
    for n in range(5):
        try:
            store.put(b"big%d" % n, "x" * 1_000_000)
            sys.exit("it was written")
        except UserError as error:
            message = error
    print(message)
    assert store.get(b"1") == "earlier" and store.get(b"big0") is None
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    store.put(b"2", "later")
"""
    done = run(code, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "free space" in done.stdout
    with Store(path) as store:
        assert (store.get(b"1"), store.get(b"2")) == ("earlier", "later")


def test_another_process_may_write_the_same_store(store: Store, path: Path):
    code = "with Store(Path(sys.argv[1])) as store: store.put(b'theirs', 'x')"
    store.put(b"ours", "x")
    assert run(code, path).returncode == 0
    assert store.get(b"theirs") == store.get(b"ours") == "x"
