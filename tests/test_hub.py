"""Models on the hub: what is downloaded of them and when, and what cannot be is one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, says_one_line
from standins import Hub, Mark, fake_gpus, fake_hub, with_path

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"w" * 3000, "README.md": b"r", "a.bin": b"b"}
FETCH = "import sys; from augcon.hub import model_folder; print(model_folder(sys.argv[1]))"


@pytest.fixture
def here(tmp_path: Path, mark: Mark) -> Mark:
    """An environment with an empty cache of the hub."""
    mark.environment |= {"HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return mark


def run(here: Mark, hub: Hub, *command: object) -> "subprocess.CompletedProcess[str]":
    environment = {**here.environment, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=100, check=False)


def dry_run(here: Mark, hub: Hub, model: str = "org/model") -> "subprocess.CompletedProcess[str]":
    return run(here, hub, ROOT / "serve.py", "--dry-run", "--model", model, "--api-base", "http://127.0.0.1:65000/v1")


def test_a_model_is_downloaded_once_without_what_it_does_not_need(here: Mark):
    with fake_hub(FILES) as hub:
        first = run(here, hub, "-c", FETCH, "org/model")
        assert first.returncode == 0, first.stderr
        assert "downloading 0.0 GB of model 'org/model'" in first.stdout and "GB are free in" in first.stdout
        folder = Path(first.stdout.splitlines()[-1])
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        again = run(here, hub, "-c", FETCH, "org/model")
        assert again.stdout.splitlines() == [str(folder)] and again.stderr == ""
        assert hub.downloads == {"config.json": 1, "model.safetensors": 1}
    gone = run(here, hub, "-c", FETCH, "org/model")  # the hub is not there any more
    assert gone.stdout.splitlines() == [str(folder)], gone.stderr
    here.environment["HF_HUB_OFFLINE"] = "1"
    assert run(here, hub, "-c", FETCH, "org/model").stdout.splitlines() == [str(folder)]


def test_a_dry_run_downloads_the_configuration_alone(here: Mark, tmp_path: Path):
    here.environment |= {"PATH": with_path(fake_gpus(tmp_path, 1)), "CUDA_VISIBLE_DEVICES": "0"}
    with fake_hub({**FILES, "model.safetensors": 5_000_000_000}) as hub:
        done = dry_run(here, hub)
        assert done.returncode == 0, done.stderr
        assert hub.downloads == {"config.json": 1}
    assert "5.0 GB of weights" in done.stdout and "download: 5.0 GB of model 'org/model'" in done.stdout
    assert done.stderr == ""


def test_a_disk_without_room_is_told_before_the_download(here: Mark):
    with fake_hub({**FILES, "model.safetensors": 10**16}) as hub:
        for done in (run(here, hub, ROOT / "serve.py", "--model", "org/model", "--", "true"), dry_run(here, hub)):
            assert says_one_line(done, "no room to download 10000000.0 GB", "HF_HOME", str(here.environment["HF_HOME"]))
        assert hub.downloads == {"config.json": 1}


def test_a_gated_model_an_unknown_one_and_no_hub_are_one_line(here: Mark):
    with fake_hub(FILES, gated=True) as hub:
        assert says_one_line(dry_run(here, hub), "'org/model' is gated: accept its terms", "HF_TOKEN")
        assert says_one_line(dry_run(here, hub, "org/other"), "'org/other' is neither a folder nor on the hub")
        assert says_one_line(dry_run(here, hub, "a/b/c"), "there is no folder a/b/c")
        assert says_one_line(dry_run(here, hub, "a--b"), "'a--b'", "check the name")
    assert says_one_line(dry_run(here, hub), "'org/model'", "check the name and the network", "HF_HUB_OFFLINE=1")


def test_a_model_that_does_not_fit_is_not_downloaded(here: Mark, tmp_path: Path):
    here.environment |= {"PATH": with_path(fake_gpus(tmp_path, 1)), "CUDA_VISIBLE_DEVICES": "0"}
    with fake_hub({**FILES, "model.safetensors": 145_000_000_000}) as hub:
        done = run(here, hub, ROOT / "serve.py", "--model", "org/model", "--", "true")
        assert says_one_line(done, "'org/model' has 145.0 GB of weights", "take 2 of these")
        assert hub.downloads == {"config.json": 1}
