"""Files read piece by piece, and the results folder's own: what is in them comes back, however they are laid out."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from augcon import files
from augcon.data import Node, Pair, Query
from augcon.errors import UserError
from augcon.files import Lines, NewLines, file_digest, new_folder, read_entries
from augcon.run.results import Results

PAIRS = st.lists(st.tuples(st.text(max_size=6), st.text(st.sampled_from('a"\\{}[],: \n黄😀'), max_size=8)), max_size=3)
LAYOUTS = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"separators": (" , ", " :\n")}])


@given(st.dictionaries(st.integers(0, 99), PAIRS, max_size=4), LAYOUTS, st.booleans(), st.integers(1, 40))
def test_the_entries_of_an_object_are_read_however_it_is_laid_out(
    tmp_path_factory: pytest.TempPathFactory, whole: dict, layout: dict, escaped: bool, chunk: int
):
    path = tmp_path_factory.getbasetemp() / "whole.json"
    path.write_text(" \n" + json.dumps(whole, ensure_ascii=escaped, **layout) + "\n\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        assert dict(read_entries(path, tuple[int, list[tuple[str, str]]], "x.py")) == whole


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{",
        "}",
        "{}{}",
        '{"0": []',
        '{"0": [}',
        '{"0": [], }',
        '{, "0": []}',
        '{"0" []}',
        '{"0": []} x',
        '{"0": [] "1": []}',
        '{"0": [["a", "b"]], "1": [["a"]]}',
        '{"0": [["a", "b"]], "1": [["a", 1]]}',
        '{"zero": []}',
        '{"0": {}}',
    ],
)
def test_what_is_no_object_of_that_shape_is_one_line(tmp_path: Path, damaged: str):
    path = tmp_path / "damaged.json"
    path.write_text(damaged)
    with pytest.raises(UserError, match=r"cannot read .*damaged\.json .*run x\.py again") as refused:
        list(read_entries(path, tuple[int, list[tuple[str, str]]], "x.py"))
    assert "\n" not in str(refused.value)
    path.write_bytes(b'{"0": [["\xff", "b"]]}')
    with pytest.raises(UserError, match="cannot read"):
        list(read_entries(path, tuple[int, list[tuple[str, str]]], "x.py"))
    with pytest.raises(UserError, match=r"there is no .*; run x\.py first"):
        list(read_entries(tmp_path / "nowhere.json", tuple[int, list[str]], "x.py"))


def test_a_kill_amid_the_replacing_of_a_folder_leaves_no_part_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def torn(folder: Path, ignore_errors: bool = False) -> None:
        for name in sorted(Path(folder).glob("*"))[:1]:
            name.unlink()
            raise KeyboardInterrupt

    def write(content: str) -> None:
        with new_folder(tmp_path / "model") as folder:
            for name in "abc":
                (folder / name).write_text(content)

    write("old")
    monkeypatch.setattr(files.shutil, "rmtree", torn)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in (tmp_path / "model").iterdir()} == dict.fromkeys("abc", "new")
    write("newer")  # over what the kill has left
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"\x00" * 3_000_000)
    assert file_digest(tmp_path / "f") == files.digest(b"\x00" * 3_000_000)


def trees(root: int) -> list[Node]:
    """Two trees over a root context. Two of their nodes ask the same of the same, and one has no query."""
    asked = [("", f"text {root}", f"what is {root}?"), ("1", "half", "what?"), ("2", "half", None)]
    return [Node(root, n, path, context, query, "done") for n in (0, 1) for path, context, query in asked]


@pytest.fixture
def grown(tmp_path: Path) -> Results:
    results = Results(tmp_path)
    with results.writing_trees() as write:
        for root in range(5):
            write(root, trees(root))
    return results


def queries_of(root: int) -> list[Query]:
    return [query for node in trees(root) for query in node.queries]


def test_queries_come_back_with_their_ids_in_whatever_order_the_files_are(grown: Results):
    whole = {root: queries_of(root) for root in range(5)}
    assert dict(grown.each_root(grown.queries)) == whole
    lines = grown.nodes.read_text().splitlines(keepends=True)
    by_root = [lines[6 * root : 6 * root + 6] for root in range(5)]
    random.Random(1).shuffle(by_root)
    grown.nodes.write_text("".join(line for tree in by_root for line in tree))
    assert dict(grown.each_root(grown.queries)) == whole
    with grown.writing_queries(grown.filtered_queries) as write:
        for root in (3, 1):
            write(root, whole[root][::-1])
    by_path = {root: {query.id for query in listed} for root, listed in grown.each_root(grown.filtered_queries)}
    assert by_path == {root: {query.id for query in whole[root]} for root in (3, 1)} and list(by_path) == [3, 1]


def test_a_query_added_by_hand_says_so_and_the_others_keep_their_ids(grown: Results):
    listed = json.loads(grown.queries.read_text())
    listed["2"].insert(0, ["half", "who?"])
    listed["2"].append(["half", "what?"])  # a third time
    grown.queries.write_text(json.dumps(listed, indent=2))
    queries = dict(grown.each_root(grown.queries))[2]
    assert [query for query in queries if query.pass_number is not None] == queries_of(2)
    assert [query.id.rpartition(":")[0] for query in (queries[0], queries[-1])] == ["2:added"] * 2
    grown.nodes.unlink()
    assert all(query.pass_number is None for query in dict(grown.each_root(grown.queries))[3])


def test_a_file_without_a_root_context_is_an_empty_object(tmp_path: Path):
    results = Results(tmp_path)
    with results.writing_queries(results.filtered_queries):
        pass
    assert json.loads(results.filtered_queries.read_text()) == {}
    assert dict(results.each_root(results.filtered_queries)) == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("queries.json", "[]", "step1_gen_q.py"),
        ("queries.json", '{"0": [["a"]]}', "step1_gen_q.py"),
        ("nodes.jsonl", '{"id": "0:1:", "context": "a", "query": "b"}\n[]\n', "line 2.*step1_gen_q.py"),
        ("nodes.jsonl", '{"id": "x", "context": "a", "query": "b"}\n', "line 1.*step1_gen_q.py"),
        ("contexts.jsonl", "{}\n", "line 1.*step1_gen_q.py"),
        ("figures.json", '{"step 1": 5}', "bash augcon.sh"),
        ("run.json", '{"step 1": 5}', "bash augcon.sh"),
    ],
)
def test_a_result_of_another_shape_is_one_line_with_its_place_and_what_makes_it(
    tmp_path: Path, name: str, content: str, said: str
):
    results = Results(tmp_path)
    results.queries.write_text('{"0": [["a", "b"]], "1": [["a", "b"]]}')
    results.contexts.write_text("")
    (tmp_path / name).write_text(content)

    def read_all() -> None:
        list(results.each_root(results.queries))
        list(results.read_contexts())
        results.record.stages()
        results.keep_figures("step 1", same=True)

    with pytest.raises(UserError, match=rf"{name}.*{said}") as caught:
        read_all()
    assert "\n" not in str(caught.value)


PAIRS = st.lists(st.builds(Pair, st.text(), st.text()), max_size=9)


@given(pairs=PAIRS, places=st.lists(st.integers(-12, 12), max_size=5))
def test_lines_are_the_rows_in_memory(pairs: list[Pair], places: list[int], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("lines")
    new = NewLines(Pair, folder)
    for number, pair in enumerate(pairs):
        new.append(pair)
        assert new[number] == pair
    new.write(folder / "p.jsonl")
    lines = Lines(folder / "p.jsonl", Pair, "x")
    (folder / "p.jsonl").unlink()  # those that were found stay
    for rows in (new, lines):
        assert list(rows) == pairs and len(rows) == len(pairs) and rows[-3:2] == pairs[-3:2]
        for place in places:
            if -len(pairs) <= place < len(pairs):
                assert rows[place] == pairs[place]
            else:
                with pytest.raises(IndexError):
                    rows[place]
    assert [path.name for path in folder.iterdir()] == []


def test_rows_for_which_there_is_no_room_are_told_in_a_line(tmp_path: Path):
    lines = NewLines(Pair, tmp_path)
    with Path("/dev/full").open("wb", buffering=0) as full:
        lines._file = full
        with pytest.raises(UserError, match=f"cannot write to {tmp_path}: .*No space left"):
            lines.append(Pair("q", "a"))
    with pytest.raises(UserError, match=r"cannot write to .*nowhere"):
        NewLines(Pair, tmp_path / "nowhere")
