"""Every script answers --help at once: it imports only what reading the settings takes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, clean_environment

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "config.py")
# Each takes a tenth of a second or more to import; torch and what is built on it, five seconds.
SLOW = {
    *("accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers", "trl", "vllm"),
    *("aiohttp", "datasets", "jieba", "matplotlib", "numpy", "openai", "pandas", "pyarrow"),
}
LOOK = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    "script", [[name, "--help"] for name in SCRIPTS] + [["augcon/plan.py", "way", "--help"]], ids=str
)
def test_help_imports_nothing_slow(script: list[str]):
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *script], cwd=ROOT, env=clean_environment(), text=True, capture_output=True
    )
    assert done.returncode == 0 and "SETTING" in done.stdout, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"augcon", "config", "pydantic"} <= imported  # so it was this process that answered
    assert not SLOW & imported
