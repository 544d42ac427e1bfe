"""The README's commands work, and the documents name what there is."""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, clean_environment

from augcon.run.results import Results
from config import Settings, as_markdown, load_settings

NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "results", "results-*", "__pycache__", ".*_cache", ".hypothesis")
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_in_a_bash_block_of_the_readme_works(tmp_path: Path):
    """All ``bash`` blocks in one shell, in a copy; ``console`` blocks need a GPU, a paid server or this test itself."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = "".join(blocks)
    typed = (
        "bash augcon.sh\n",
        "augcon.sh --corpus",
        "--dry-run",
        "deepspeed finetune.py",
        "merge.py",
        "inference.py",
        "report.py",
        "export.py",
        "--help",
    )
    assert all(command in commands for command in typed)
    # The environment of the tests stands for the one that install.sh would make: it has all, so nothing is installed.
    commands = commands.replace("source .venv/bin/activate", f"source {sys.prefix}/bin/activate")
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=NOT_COPIED)
    with (tmp_path / "output").open("w+") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=project,
            env={**clean_environment(), "VIRTUAL_ENV": sys.prefix},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=1100)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)
        output.seek(0)
        assert status == 0, output.read()[-8000:]
    results = project / "results"
    pairs = datasets.load_from_disk(results / "sft_data")
    fates = [json.loads(line)["fate"] for line in (results / "scores.jsonl").read_text().splitlines()]
    nodes = [json.loads(line)["query"] for line in (results / "nodes.jsonl").read_text().splitlines()]
    queries = json.loads((results / "queries.json").read_text())
    dropped = (results / "dropped_queries.jsonl").read_text().splitlines()
    assert len(fates) == sum(map(len, queries.values())) == sum(query is not None for query in nodes)
    assert fates.count("kept") == len(pairs) + len(dropped)
    quota = sum(json.loads(line)["quota"] for line in (results / "contexts.jsonl").read_text().splitlines())
    kept = sum(map(len, json.loads((results / "filtered_queries.json").read_text()).values()))
    assert 0.9 * quota <= len(pairs) <= kept <= quota and pairs.column_names == ["question", "answer"]
    assert all(map(str.strip, [*pairs["question"], *pairs["answer"]]))
    assert len(set(pairs["question"])) == len(pairs)
    assert (results / "report.html").stat().st_size > 100_000
    assert len(datasets.load_from_disk(project / "results-mine" / "sft_data")) > 10
    assert (results / "export" / "train.jsonl").exists()
    outputs = datasets.load_from_disk(results / "outputs")
    assert outputs["question"][:] == datasets.load_from_disk(ROOT / "DailyM")["test"]["question"][:]


def test_the_architecture_names_every_room_and_every_script():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {f"{path.parent.name}/" for path in (ROOT / "augcon").glob("*/__init__.py")}
    files = {path.name for path in [*(ROOT / "augcon").glob("*.py"), *ROOT.glob("*.py")]} - {"__init__.py"}
    assert rooms | files <= set(re.findall(r"`([\w./]+)`", text.replace("`augcon/", "`")))


def test_the_results_are_described_file_by_file():
    named = re.findall(r"`([\w./-]+?)/?`", (ROOT / "docs" / "results.md").read_text())
    assert {path.name for path in vars(Results("results")).values() if isinstance(path, Path)} <= {*named, "results"}
    assert "run.json" in named


def test_the_page_of_settings_is_that_of_the_schema():
    """Made by ``python config.py > docs/settings.md``."""
    assert (ROOT / "docs" / "settings.md").read_text() == as_markdown()


def test_both_readmes_have_the_same_commands_and_name_each_other():
    blocks = []
    for readme in READMES:
        text = readme.read_text()
        assert all(f"({other.name})" in text for other in READMES if other != readme)
        found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        blocks.append([(kind, re.sub(r" +# .*", "", block)) for kind, block in found])
    assert len(blocks[0]) > 10 and blocks[0] == blocks[1]


def test_the_readmes_link_to_every_page_of_the_docs():
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    for readme in READMES:
        assert pages <= set(re.findall(r"\]\((docs/[\w.]+\.md)\)", readme.read_text())), readme.name


def test_every_message_that_is_explained_is_one_of_the_programs():
    """The fixed parts of each message, between the ellipses, occur in this order in a text of the sources."""
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    said = "\n".join(texts_of_the_sources())
    for message in table:
        pattern = ".*".join(re.escape(part) for part in re.split(r"\s*…\s*", message))
        assert re.search(pattern, said), message
    assert len(table) > 30


def texts_of_the_sources() -> list[str]:
    """The texts of all scripts, each on one line, with an ellipsis for what is filled in."""
    texts = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "augcon").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        descriptions = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in (node for node in nodes if node not in descriptions):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value if isinstance(part, ast.Constant) else "…" for part in parts]
            if any(isinstance(part, str) and part != "…" for part in fixed):
                texts.append("".join(map(str, fixed)).replace("\n", " "))
    for script in ROOT.glob("*.sh"):
        texts += script.read_text().splitlines()
    return texts


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_paths_and_flags_in_the_documents_are_there(document: Path):
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    for path in re.findall(r"`((?:augcon|tests|benchmarks|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields} | {
        "--help",
        "--tests",
        "--num_gpus",
        "--no-demo",
        "--speculative-config",  # of vLLM
        "--generation-config",
        "--dataset",  # of ms-swift
        "--val_dataset",
        *("--head", "--port", "--address", "--block"),  # of Ray
        *("--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--overlap"),  # of Slurm
    }
    assert set(re.findall(r"(?<=[\s`])--[a-z][\w-]*", text)) <= flags


SCRIPTS = ("augcon.sh", *(path.name for path in ROOT.glob("*.py") if path.name != "config.py"))


def commands_of(document: Path) -> list[str]:
    """What is to be typed in the ``console`` and ``bash`` blocks of a document."""
    blocks = re.findall(r"^```(?:console|bash)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition("    #")[0] for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_script_takes_the_flags_that_the_documents_give_it(document: Path, monkeypatch: pytest.MonkeyPatch):
    for command in commands_of(document):
        if not any(script in command for script in SCRIPTS) or command.startswith(("git ", "sed ")):
            continue
        for part in re.split(r" -- |\|", command):
            words = [word for word in shlex.split(part, comments=True) if word not in ("...", "…")]
            at = next((place for place, word in enumerate(words) if Path(word).name in SCRIPTS), None)
            if at is not None and "--help" not in words:
                assert (ROOT / words[at]).exists(), command
                monkeypatch.setattr("sys.argv", words[at:])
                assert load_settings("").model_fields_set or len(words) == at + 1, command
