"""The commands of the README, as a newcomer types them."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, clean_environment, free_port

NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "results", "results-*", "__pycache__", ".*_cache", ".hypothesis")


def test_every_command_that_a_newcomer_can_type_works(tmp_path: Path):
    """All ``bash`` blocks in one shell, in a copy; ``console`` blocks need a GPU, a paid server or this test itself."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = "".join(blocks)
    assert len(blocks) == 3 and "step1_gen_q.py" in commands
    # The environment of the tests stands for the one that install.sh would make: it has all, so nothing is installed.
    port = free_port()  # 8000 may be somebody's
    commands = commands.replace("source .venv/bin/activate", f"source {sys.prefix}/bin/activate")
    commands = commands.replace("python -m augcon.demo_engine &", f"python -m augcon.demo_engine --port {port} &")
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=NOT_COPIED)
    with (tmp_path / "output").open("w+") as output:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=project,
            env={
                **clean_environment(),
                "VIRTUAL_ENV": sys.prefix,
                "AUGCON_API_BASE": f"http://127.0.0.1:{port}/v1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGTERM)  # the engine in the background too
        output.seek(0)
        assert status == 0, output.read()
    assert (project / "results-demo" / "queries.json").exists() and (project / "results-mine" / "scorer_pairs").exists()


def test_the_table_of_files_names_what_there_is():
    table = (ROOT / "README.md").read_text().split("## The files")[1]
    for name in re.findall(r"`([\w/.*]+)`", table):
        assert any((ROOT / folder).glob(name.rstrip("/")) for folder in ("", "augcon")), name
