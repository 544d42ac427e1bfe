"""Real vLLM servers (its CPU build), with a tiny model of random weights made on the spot, and step 1 against one."""

import importlib.util
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, Engine, free_port, run, says_one_line

from augcon.machine.spread import Layout
from augcon.machine.vllm import vllm_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
]

CORPUS = [
    "社区食堂在午间十二点开门，二十个座位常常坐满。老人刷卡，一荤两素八元钱。厨师说，菜价每周一调整。",
    "街口的修鞋摊摆了二十年。摊主说，换一次鞋跟十五元，等上半小时就能取走。",
    "The bread rises for two hours before baking. The baker turns each loaf once, so that the crust browns evenly.",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from augcon.demo.tiny_model import make_tiny_model

    model = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(model, datasets.load_from_disk(ROOT / "DailyM")["train"]["article"])
    return model


@pytest.fixture(scope="module")
def vllm(tiny: Path) -> Iterator[Engine]:
    port = free_port()
    server = Engine(vllm_command(tiny, "tiny", port, None, ""), port, patience=300)
    yield server
    server.stop()


def corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"article": text}) + "\n" for text in CORPUS))
    return path


def test_a_noise_that_never_parses_ends_every_node_after_its_tries(vllm: Engine, tmp_path: Path):
    flags = ["--corpus", corpus(tmp_path), "--results", tmp_path / "r", "--max-passes", 1, "--query-max-tokens", 32]
    done = run("step1_gen_q.py", *flags, "--api-base", vllm.api, timeout=500)
    assert done.returncode == 0, done.stderr
    nodes = [json.loads(line) for line in (tmp_path / "r" / "nodes.jsonl").read_text().splitlines()]
    asked = [node for node in nodes if node["outcome"] != "too short"]  # a root whose replies are cut off is cut
    assert len(asked) >= 3 and all(node["outcome"] == "not parseable" and node["query"] is None for node in asked)
    assert all(0 < node["tries"] <= 4 for node in asked)
    assert f"calls:   {sum(node['tries'] for node in asked)} in this run" in done.stdout
    assert f"not parseable {len(asked)}" in done.stdout and "0 of 3 have their quota" in done.stdout


def test_a_context_too_long_for_the_model_is_cut_until_it_fits(vllm: Engine, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"article": text}) + "\n" for text in ("面包店七点开门。" * 2000, CORPUS[0])))
    flags = ["--corpus", path, "--results", tmp_path / "r", "--max-length", 20_000, "--max-passes", 1, "--tries", 1]
    done = run("step1_gen_q.py", *flags, "--query-max-tokens", 32, "--api-base", vllm.api, timeout=500)
    assert done.returncode == 0, done.stderr
    nodes = [json.loads(line) for line in (tmp_path / "r" / "nodes.jsonl").read_text().splitlines()]
    first, *others = [node for node in nodes if node["root"] == 0]
    assert (first["outcome"], first["detail"]) == ("failed", "context too long for the model, cut in the middle")
    assert any(node["outcome"] == "not parseable" for node in others)  # those fit; the tiny model only makes noise


def test_a_model_that_vllm_does_not_serve_is_one_line(vllm: Engine, tmp_path: Path):
    result = run("step1_gen_q.py", "--api-base", vllm.api, "--api-model", "other", "--results", tmp_path / "r")
    assert says_one_line(result, "'other'", "'tiny'", "--api-model")


def test_the_command_for_gpus_is_one_that_vllm_takes_and_its_replies_tell_cached_tokens(tiny: Path, tmp_path: Path):
    # The entry asks for the version of a package vllm. Here it finds one, so that it runs without a GPU, too.
    package = tmp_path / "vllm-0.32.0+cpu.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    port, layout = free_port(), Layout(tensor=1, data=1, idle=0, room=0, utilisation=0.92, batch=1)
    on_cpu = "--enforce-eager --no-enable-chunked-prefill --kv-cache-memory-bytes 500000000 --max-num-seqs 4"
    command = vllm_command(tiny, "tiny", port, layout, on_cpu)
    server = Engine(["env", f"PYTHONPATH={tmp_path}", "VLLM_CPU_NUM_OF_RESERVED_CPU=0", *command], port, patience=300)
    try:
        body = {"model": "tiny", "messages": [{"role": "user", "content": CORPUS[2] * 4}], "max_tokens": 4}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.api}/chat/completions", json.dumps(body).encode(), headers)
        told = [json.load(urllib.request.urlopen(request))["usage"]["prompt_tokens_details"] for _ in range(2)]
        assert [details["cached_tokens"] > 100 for details in told] == [False, True]
        (model,) = json.load(urllib.request.urlopen(f"{server.api}/models"))["data"]
        assert model["id"] == "tiny" and model["max_model_len"] == 8192
    finally:
        server.stop()
