"""How a model is spread over the GPUs, told by serve.py --dry-run; and which GPUs there are.

Expected numbers are the rule by hand, for the memory that nvidia-smi tells of an RTX 4090 (24 GB), an H100 (80 GB), an
H200 (141 GB) and others. For a 14B over two H100: each has 0.92 · 81,559 MiB - 4 GiB = 74.384 GB for vLLM; less half of
29.540 GB of weights, 59.614 GB; half a token takes 2 · 2 · 48 · 4 · 128 = 98,304 bytes of it: room for 606,426 tokens.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment, says_one_line
from standins import Mark, fake_gpus, fake_model, with_path

import serve
from augcon.errors import UserError
from augcon.machine.gpus import linked, require_gpu_numbers, visible_gpus


def config(layers: int, heads: int, kv_heads: int, hidden: int, width: int, **more: object) -> dict[str, object]:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    return dict(zip(names, (layers, heads, kv_heads, hidden, width), strict=True)) | {"torch_dtype": "bfloat16"} | more


# Bytes of the weights, and the configuration.
QWEN = {
    "7B": (15_231_233_024, config(28, 28, 4, 3584, 18944)),
    "14B": (29_540_067_328, config(48, 40, 8, 5120, 13824)),
    "32B": (65_527_752_704, config(64, 40, 8, 5120, 27648)),
    "72B": (145_412_407_296, config(80, 64, 8, 8192, 29568)),
}
CARDS = {  # MiB, and how several of them are connected
    "24": (24_564, "NVIDIA GeForce RTX 4090", "PHB"),
    "48": (46_068, "NVIDIA L40S", "SYS"),
    "49": (49_140, "NVIDIA RTX 6000 Ada Generation", "SYS"),
    "80": (81_559, "NVIDIA H100 80GB HBM3", "NV18"),
    "81": (81_920, "NVIDIA A100-SXM4-80GB", "NV12"),
    "141": (143_771, "NVIDIA H200", "NV18"),
}
FOUR_BITS = {"torch_dtype": "float32", "quantization_config": {"bits": 4}}  # that is of what is not quantised
# Copies × GPUs of each, those that stay idle, thousand tokens of room in a copy; or how many would do.
TABLE = """
| GPUs | 7B | 14B | 32B | 72B |
| --- | --- | --- | --- | --- |
| 1×24 GB | 1×1, 110k | needs 2 | needs 4 | needs 8 |
| 2×24 GB | 2×1, 110k | 1×2, 68k | needs 4 | needs 8 |
| 1×80 GB | 1×1, 1031k | 1×1, 228k | 1×1, 33k | needs 2 |
| 3×80 GB | 3×1, 1031k | 3×1, 228k | 1×2 + 1 idle, 317k | 1×2 + 1 idle, 10k |
| 8×80 GB | 8×1, 1031k | 4×2, 606k | 4×2, 317k | 2×4, 464k |
| 8×141 GB | 8×1, 2078k | 8×1, 533k | 8×1, 262k | 4×2, 376k |
"""
ROWS = [line.strip("| ").split(" | ") for line in TABLE.strip().splitlines()[2:]]


DryRun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """serve.py --dry-run, in this process, on so many cards, "8×80 GB", with a model that only tells its shape."""
    for name in os.environ.keys() - clean_environment().keys() | {"CUDA_VISIBLE_DEVICES"}:
        monkeypatch.delenv(name, raising=False)
    search = os.environ["PATH"]

    def run(cards: str, weights: int | None, shape: dict[str, object], *flags: object, **facts: object):
        number, kind = re.fullmatch(r"(\d+)×(\d+) GB", cards).groups()
        memory, name, link = CARDS[kind]
        gpus = fake_gpus(tmp_path, int(number), **{"total": memory, "name": name, "link": link, **facts})
        monkeypatch.setenv("PATH", f"{gpus}{os.pathsep}{search}")
        model, results = fake_model(tmp_path / "model", weights, **shape), tmp_path / "results"
        command = [ROOT / "serve.py", "--dry-run", "--model", model, "--results", results, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        try:
            status, error = serve.main() or 0, ""
        except SystemExit as end:
            status, error = 1, str(end)
        assert not results.exists()  # it starts nothing
        said = capsys.readouterr()
        return subprocess.CompletedProcess(command, status, said.out, said.err + error)

    return run


def cell(done: "subprocess.CompletedProcess[str]") -> str:
    if needed := re.search(r"take (\d+) of these", done.stderr):
        assert done.returncode == 1 and says_one_line(done, "error: model", "smaller or quantised --model")
        return f"needs {needed[1]}"
    assert done.returncode == 0, done.stderr
    spread = re.search(r"^spread: +(\d+) cop.* on (\d+) GPUs?(?:.*; (\d+) GPUs? idle)?", done.stdout, re.MULTILINE)
    copies, size, idle = spread.groups()
    assert f"--tensor-parallel-size {size} --data-parallel-size {copies} " in done.stdout
    room = int(re.search(r"^room: +([\d,]+) ", done.stdout, re.M)[1].replace(",", ""))
    return f"{copies}×{size}{f' + {idle} idle' if idle else ''}, {room // 1000}k"


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_table_of_models_over_machines(dry_run: DryRun, row: list[str]):
    cells = [cell(dry_run(row[0], *model)) for model in QWEN.values()]
    assert cells == row[1:]


@pytest.mark.parametrize(
    ("cards", "weights", "shape", "expected"),
    [
        ("6×80 GB", *QWEN["72B"], "1×4 + 2 idle, 464k"),  # over two, only 10k
        ("3×24 GB", *QWEN["14B"], "1×2 + 1 idle, 68k"),
        ("8×48 GB", *QWEN["14B"], "4×2, 258k"),  # on one, 53k
        ("8×49 GB", *QWEN["14B"], "8×1, 69k"),  # over PCIe, a quarter of the room is enough
        ("2×80 GB", *QWEN["14B"], "1×2, 606k"),
        ("4×80 GB", 141_107_412_992, config(80, 64, 8, 8192, 28672), "1×4, 477k"),  # Llama 3 70B
        ("16×80 GB", 141_107_412_992, config(80, 64, 8, 8192, 28672), "4×4, 477k"),
        ("8×80 GB", 28_334_581_760, config(40, 40, 40, 5120, 13696), "2×4, 328k"),  # Qwen1.5 14B, a key for each head
        # Qwen3 235B, whose 4 key-value heads lie twice on 8 GPUs
        ("8×80 GB", 470_187_269_120, config(94, 64, 4, 4096, 12288, head_dim=128), "1×8, 324k"),
        ("8×80 GB", 65_024_245_760, config(64, 40, 8, 5120, 27392), "4×2, 319k"),  # Qwen1.5 32B
        ("1×24 GB", 2 * 15_231_233_024, config(28, 28, 4, 3584, 18944, torch_dtype="float32"), "1×1, 110k"),
        ("1×24 GB", 2 * 15_231_233_024, config(28, 28, 4, 3584, 18944, torch_dtype=None, dtype="float32"), "1×1, 110k"),
        ("8×80 GB", 41_602_000_000, config(80, 64, 8, 8192, 29568, **FOUR_BITS), "4×2, 327k"),  # AWQ
        ("1×80 GB", 41_602_000_000, config(80, 64, 8, 8192, 29568, **FOUR_BITS), "1×1, 100k"),
        # Gemma 2 9B, of heads that are wider than their share, beside a configuration for pictures
        ("1×24 GB", 18_483_411_968, {"text_config": config(42, 16, 8, 3584, 14336, head_dim=256)}, "1×1, 8k"),
    ],
)
def test_other_models_and_machines(dry_run: DryRun, cards: str, weights: int, shape: dict[str, object], expected: str):
    assert cell(dry_run(cards, weights, shape)) == expected


def test_what_a_dry_run_tells(dry_run: DryRun):
    done = dry_run("3×80 GB", *QWEN["32B"], "--serve-arguments", "--dtype half")
    assert done.stderr == ""
    *told, command = done.stdout.splitlines()
    assert told == [
        "GPUs:    3 × NVIDIA H100 80GB HBM3 of 79.6 GiB, NVLink",
        "model:   65.5 GB of weights, 262 kB a token in the cache",
        "spread:  1 copy on 2 GPUs; 1 GPU idle, 92% of the memory",
        "room:    317,537 tokens a copy; 317 usual requests at once in all",
        "download: nothing",
    ]
    assert command.startswith("command: env VLLM_ENGINE_READY_TIMEOUT_S=") and command.endswith(" --dtype half")


@pytest.mark.parametrize(("cards", "batch"), [("1×80 GB", 1024), ("1×81 GB", 256), ("1×48 GB", 256)])
def test_requests_at_once_are_vllms_own_limit_where_there_is_room(dry_run: DryRun, cards: str, batch: int):
    done = dry_run(cards, *QWEN["7B"])
    assert f"; {batch:,} usual requests at once in all" in done.stdout


def test_ones_own_number_of_gpus_a_copy(dry_run: DryRun):
    for wanted, expected in ((1, "3×1, 33k"), (2, "1×2 + 1 idle, 317k")):
        assert cell(dry_run("3×80 GB", *QWEN["32B"], "--tensor-parallel", wanted)) == expected
    assert cell(dry_run("1×24 GB", *QWEN["14B"], "--tensor-parallel", 1)) == "1×1, 0k"
    for wanted in (3, 4):
        done = dry_run("3×80 GB", *QWEN["32B"], "--tensor-parallel", wanted)
        assert says_one_line(done, f"--tensor-parallel {wanted} does not suit 3 GPUs", "40 attention heads", "1, 2")


def test_a_gpu_in_use_by_others_is_pointed_out_and_what_is_free_is_taken(dry_run: DryRun):
    done = dry_run("3×80 GB", *QWEN["7B"], others={1: 41_000})
    assert "other programs use 40.0 of the 79.6 GiB of GPU 1;" in done.stderr
    assert "CUDA_VISIBLE_DEVICES=0,2;" in done.stderr
    assert "vLLM takes 46% of each GPU" in done.stderr and " --gpu-memory-utilization 0.46 " in done.stdout
    assert cell(done) == "3×1, 345k"
    refused = dry_run("1×80 GB", *QWEN["14B"], others={0: 50_000})
    assert says_one_line(
        refused, "do not fit in the memory that is free: other programs use 48.8 of the 79.6 GiB of GPU 0"
    )
    assert "CUDA_VISIBLE_DEVICES" not in refused.stderr  # there is no other
    small = dry_run("1×24 GB", *QWEN["14B"], others={0: 24_000})
    assert says_one_line(small, "take 2 of these")  # it would not fit without the others, either
    assert dry_run("1×80 GB", *QWEN["7B"], others={0: 4000}).stderr == ""  # within what vLLM leaves


def test_a_part_is_not_one_that_the_layers_cannot_be_cut_into(dry_run: DryRun):
    qwen = 28_334_581_760, config(40, 40, 40, 5120, 13696)  # Qwen1.5 14B: 5 GPUs divide its heads, but not 13,696
    assert cell(dry_run("5×49 GB", *qwen, link="NV4")) == "1×4 + 1 idle, 175k"
    few = config(40, 40, 8, 5120, 13700)  # 5 divides these, but not the 8 key-value heads
    assert cell(dry_run("5×49 GB", 133_000_000_000, few, link="NV4")) == "1×4 + 1 idle, 240k"


def test_a_model_that_cannot_be_split_over_enough_of_these_gpus_needs_larger_ones(dry_run: DryRun):
    done = dry_run("8×24 GB", 145_412_407_296, config(28, 28, 4, 3584, 18944))
    assert says_one_line(done, "145.4 GB", "8 × NVIDIA GeForce RTX 4090 of 24 GiB", "take larger ones, or choose a")


def test_an_old_driver_is_one_line_unless_pytorch_can_use_it(
    dry_run: DryRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = dry_run("1×80 GB", *QWEN["7B"], driver="570.86.10")
    assert says_one_line(done, "the NVIDIA driver 570.86.10 is too old", "580 or newer")
    (tmp_path / "torch.py").write_text("class cuda:\n    init = dict\n")  # not the real PyTorch: it can use any
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert dry_run("1×80 GB", *QWEN["7B"], driver="570.86.10").returncode == 0


def test_a_model_that_does_not_tell_how_large_it_is_is_one_line(dry_run: DryRun):
    shape = config(28, 28, 4, 3584, 18944)
    for missing in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        done = dry_run("1×80 GB", 1, {name: shape[name] for name in shape if name != missing})
        assert says_one_line(done, "cannot tell how large model", "config.json")
    done = dry_run("1×80 GB", 1, {**shape, "num_attention_heads": "x"})
    assert says_one_line(done, "cannot tell how large model", "config.json")
    done = dry_run("1×80 GB", None, shape)
    assert says_one_line(done, "cannot tell how large model", "model.safetensors", "weights as .safetensors")


def test_a_model_in_one_file_and_no_gpu(tmp_path: Path, mark: Mark):
    model = fake_model(tmp_path / "model", None, **QWEN["7B"][1])
    (model / "model.safetensors").touch()
    os.truncate(model / "model.safetensors", 70_000_000)
    command = [sys.executable, str(ROOT / "serve.py"), "--dry-run", "--model", str(model), "--", "true"]
    for path, told in (
        (with_path(fake_gpus(tmp_path, 1)), "0.1 GB of weights"),
        (os.environ["PATH"], " -m vllm.entrypoints.openai.api_server --model "),
    ):
        environment = {**mark.environment, "PATH": path}
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=100)
        assert done.returncode == 0 and told in done.stdout, done.stderr


def test_the_gpus_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", with_path(fake_gpus(tmp_path, 3)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(visible_gpus()) == 3
    for chosen, count in {"": 0, "1": 1, "2,0": 2, "GPU-stand-in-1": 1, "0,9,1": 1, "-1": 0}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert len(visible_gpus()) == count, chosen
    for chosen in ("", "1", "2,0", "0, 1", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        require_gpu_numbers()
    for chosen, numbers in {"GPU-stand-in-2,GPU-stand-in-0": "2,0", "MIG-1": "0,1", "1,GPU-stand-in-0": "1,0"}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(UserError, match=f"such as {numbers}$"):
            require_gpu_numbers()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # a driver that does not answer
    assert visible_gpus() == []


def test_gpus_of_which_only_pairs_are_linked_are_not_taken_for_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", with_path(fake_gpus(tmp_path, 4)))
    program = tmp_path / "bin" / "nvidia-smi"
    assert linked(visible_gpus())
    program.write_text(program.read_text().replace("'NV18' for", "('NV4' if row // 2 == other // 2 else 'SYS') for"))
    assert not linked(visible_gpus())


def test_a_gpu_that_shares_the_memory_of_the_cpu_has_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", with_path(fake_gpus(tmp_path, 1, total="'[N/A]'.strip()")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text(program.read_text().replace("'[N/A]'.strip() - {}.get(index, used)", "'[N/A]'"))
    (gpu,) = visible_gpus()
    assert 100 < gpu.free < gpu.total
