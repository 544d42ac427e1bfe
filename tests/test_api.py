"""AugCon from Python: three lines that do what the scripts do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from augcon import UserError, generate, read_pairs

TEXTS = [
    "The pump must be primed before it runs, because a dry seal burns within two minutes of running without water. "
    "Prime it by opening the upper valve until water runs out without bubbles, and close it again by hand.",
    "In frost the housing is drained, since ice would split the casting along the flange of the lower cover. "
    "A worn bearing is heard as a dull knock that grows faster with the speed of the motor.",
]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("AUGCON_"):
            monkeypatch.delenv(name)


@pytest.mark.slow
def test_rows_go_in_and_pairs_with_their_fields_come_out(tmp_path: Path, capfd: pytest.CaptureFixture[str], engine):
    rows = [{"article": text, "title": f"Pump {n}", "id": f"A-{n}"} for n, text in enumerate(TEXTS)]
    settings = {"results": tmp_path / "r", "negatives": 0, "api_base": engine.api, "api_key": "sk-secret"}
    pairs = generate(rows, **settings)
    said = capfd.readouterr().out
    assert "== Step 3" in said and "sk-secret" not in said
    assert {"question", "answer", "context", "id", "article", "file", "title"} <= set(pairs.column_names)
    assert all(pair["title"] == f"Pump {pair['article']}" for pair in pairs) and len(pairs) > 1
    assert all(pair["context"] == TEXTS[pair["article"]] for pair in pairs)
    assert pairs.to_list() == generate(rows, **settings).to_list() == read_pairs(tmp_path / "r").to_list()
    assert "== Step" not in capfd.readouterr().out, "a second call does nothing again"
    with pytest.raises(UserError, match="--redo"):
        generate(rows[:1], **settings)


@pytest.mark.parametrize(
    ("corpus", "settings", "said"),
    [
        ("no/such/folder", {}, "no such file"),
        ([], {}, "no article"),
        ([{"text": "no article in it"}], {}, "'article'"),
        (TEXTS, {"no_such_setting": 1}, "no-such-setting"),
        (TEXTS, {"quota_unit": 0}, "--quota-unit"),
        (["a", 3], {}, "3"),
    ],
)
def test_what_a_user_can_mend_is_an_error_of_one_line(tmp_path: Path, corpus, settings, said: str):
    with pytest.raises(UserError) as error:
        generate(corpus, results=tmp_path / "r", **settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_pairs_that_are_not_there_are_an_error_of_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="step3_gen_a"):
        read_pairs(tmp_path)


def test_the_import_takes_no_time_that_the_scripts_would_have_to_wait_for():
    command = "import sys, augcon.errors; print({'datasets', 'rensa', 'augcon.api'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_python_in_the_document_runs(tmp_path: Path, engine):
    """Block by block, with the demonstration engine in place of the service, and a folder that is there."""
    (tmp_path / "manuals").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "manuals" / f"{number}.txt").write_text(text)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace('"https://example.org/v1", api_model="NAME"', f'"{engine.api}", negatives=0')
    code = code.replace("quota_unit=20,", f'quota_unit=20, api_base="{engine.api}", negatives=0,')
    code = code.replace("The pump must be primed before it runs …", TEXTS[0])
    assert len(blocks) == 3 and code.count(engine.api) == 2
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no such file or folder" in done.stdout.splitlines()[-1]
