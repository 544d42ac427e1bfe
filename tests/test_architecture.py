"""The layout: what each room of augcon/ may import, and that imports go one way."""

import ast
import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT

from augcon import data

BASE = {"data", "errors", "files", "ordered", "progress"}  # what any room may use
MAY_IMPORT = {
    **{room: {"data", "errors"} for room in BASE},
    "hub": {"errors"},
    "text": {"data", "errors"},
    "llm": {"data", "errors", "progress", "text"},
    "method": {"data", "errors", "ordered", "text"},
    "train": {"data", "errors", "files", "hub", "progress"},
    "run": {"data", "errors", "files", "llm", "method", "progress", "text"},
    "report": {"data", "errors", "files", "method", "run", "text"},
    "machine": {"errors", "hub"},
    "demo": {"data", "errors", "text"},
    "preflight": {"data", "method", "ordered", "plan", "llm", "progress", "run", "text"},
    "api": {"errors", "files", "run"},
    "cluster": {"errors", "llm", "machine", "ordered", "run"},
    "plan": {"errors", "files", "hub", "machine", "run"},  # scripts, though they live here: augcon.sh asks this one
}
SLOW = {"torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "bitsandbytes"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "augcon").parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "augcon":
            found |= {f"augcon.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = sorted(
    path for path in (ROOT / "augcon").rglob("*.py") if path.parent != ROOT / "augcon" or path.stem[0] != "_"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below_it(path: Path):
    room, imported = room_of(path), imports_of(path)
    rooms = {name.split(".")[1] for name in imported if name.startswith("augcon.")}
    assert rooms <= MAY_IMPORT[room] | {room}
    assert "config" not in imported or room in {"plan", "preflight"}  # only scripts read settings
    assert room in {"train", "demo"} or not SLOW & {name.partition(".")[0] for name in imported}


def test_every_room_says_what_lives_there():
    for folder in (ROOT / "augcon").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert folder.name in MAY_IMPORT
            doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert doc and len(doc) > 60, folder


def test_the_nouns_do_not_change_and_nothing_is_added_to_them():
    nouns = [noun for noun in vars(data).values() if dataclasses.is_dataclass(noun)]
    assert len(nouns) > 8
    for noun in nouns:
        assert noun.__dataclass_params__.frozen and "__slots__" in vars(noun), noun
