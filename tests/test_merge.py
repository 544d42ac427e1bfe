"""merge.py gives the network that was trained, or says in one line why it cannot."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from conftest import run, says_one_line
from fidelity import LARGEST_DIVERGENCE, divergence
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file

import augcon.hub
import augcon.train.merge
from augcon.demo.tiny_model import make_tiny_model
from augcon.run.record import Record
from augcon.train import base as training
from augcon.train.adapters import TrainedWith

torch.set_num_threads(1)  # the tensors are tiny, and threads that wait for each other cost more

Merged = tuple[int, str, str]
TEXTS = ["面包店七点开门，八点卖完。", "The baker turns each loaf once."] * 20


class Parts(NamedTuple):
    base: Path
    lora: Path
    trained: TrainedWith
    changes: dict[str, torch.Tensor]  # what PEFT itself says that the adapter adds, by module
    seen: dict[str, torch.Tensor]  # the weights in training, by module


def make_base(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    """A tiny model that is sure of what it says, in several weight files."""
    make_tiny_model(folder, TEXTS, vocabulary=300, seed=seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.data *= 8 if "embed" in name or "head" in name else 2 if "proj" in name else 1
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=7) + "\n\n")  # nobody writes it so
    return folder


def make_adapter(base: Path, folder: Path, quantize: str, record: bool = True, **config: object) -> Parts:
    """An adapter with random factors over a base as training loads it."""
    model = training.load_base(transformers.AutoModelForCausalLM, str(base), quantize)
    torch.manual_seed(1)
    wanted = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**wanted))
    layers = {name: m for name, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    for layer in layers.values():
        for factor in (*layer.lora_B.values(), *layer.lora_embedding_B.values()):
            torch.nn.init.normal_(getattr(factor, "weight", factor), std=0.1)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    trained = TrainedWith(str(base), training.weights_digest(base), quantize, "float32")
    if record:
        Record(folder).begin("finetune", trained.inputs(), made=[], redo=False)
    changes, seen = {}, {}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        module = name.removeprefix("base_model.model.")
        changes[module] = layer.get_delta_weight("default").detach()
        packed = hasattr(weight, "quant_state")
        seen[module] = (dequantize_bnb_weight(weight) if packed else weight).detach().float()
    return Parts(base, folder, trained, changes, seen)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tied") / "tied", tied=True)


@pytest.fixture(scope="module")
def nf4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_adapter(base, tmp_path_factory.mktemp("lora") / "nf4", "nf4")


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Merged]:
    """merge.py in this process: status, output, error."""
    import merge as script

    def call(*flags: object) -> Merged:
        monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, flags)])
        capsys.readouterr()
        try:
            script.main()
        except SystemExit as stop:
            return 1, capsys.readouterr().out, str(stop.code)
        return 0, capsys.readouterr().out, ""

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def copied(parts: Parts, folder: Path) -> Parts:
    return parts._replace(lora=Path(shutil.copytree(parts.lora, folder)))


@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["base", "tied"])
def test_every_weight_is_what_training_saw_plus_what_peft_adds(
    kind: str, quantize: str, request: pytest.FixtureRequest, merge: Callable[..., Merged], tmp_path: Path
):
    parts = make_adapter(request.getfixturevalue(kind), tmp_path / "lora", quantize)
    status, said, error = merge("--lora", parts.lora, "--output", tmp_path / "out")
    assert (status, error) == (0, "") and f"serve.py --model {tmp_path / 'out'}" in said
    before, after = weights(parts.base), weights(tmp_path / "out")
    assert after.keys() == before.keys() and len(parts.changes) == 14
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        wanted = (parts.seen[module] + parts.changes[module]).bfloat16() if module in parts.changes else before[name]
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted), name
    assert divergence(tmp_path / "out", parts.base, parts.lora, parts.trained) < 1e-4


def test_layers_without_an_adapter_are_quantised_too(base: Path, merge: Callable[..., Merged], tmp_path: Path):
    parts = make_adapter(base, tmp_path / "lora", "nf4", target_modules=["q_proj"])
    assert merge("--lora", parts.lora, "--output", tmp_path / "out")[0] == 0
    trained = training.load_base(transformers.AutoModelForCausalLM, str(base), "nf4")
    layer = trained.model.layers[1].mlp.up_proj.weight
    wanted = dequantize_bnb_weight(layer).bfloat16()
    assert torch.equal(weights(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"o_proj": 24, r"layers\.0\.mlp\.up_proj": 2}, "rank_pattern": {"down_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_scales_ranks_and_choices_of_layers_are_those_of_peft(
    config: dict[str, object], base: Path, merge: Callable[..., Merged], tmp_path: Path
):
    parts = make_adapter(base, tmp_path / "lora", "none", **config)
    assert merge("--lora", parts.lora, "--output", tmp_path / "out")[0] == 0
    after = weights(tmp_path / "out")
    for module, change in parts.changes.items():
        assert torch.equal(after[f"{module}.weight"], (parts.seen[module] + change).bfloat16()), module


def test_all_but_the_weights_is_the_bases_byte_for_byte(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    parts = copied(nf4, tmp_path / "lora")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.base)
    tokenizer.save_pretrained(parts.lora)  # as a Trainer does: the same tokenizer in other bytes
    assert merge("--lora", parts.lora, "--output", tmp_path / "out")[0] == 0
    names = {path.name for path in parts.base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"run.json"}
    for name in names:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (parts.base / name).read_bytes(), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_template_of_the_adapters_own_goes_with_it(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    parts = copied(nf4, tmp_path / "lora")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(parts.lora)
    assert merge("--lora", parts.lora, "--output", tmp_path / "out")[0] == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_merge_into_the_plain_weights_would_be_found_out(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    merge("--lora", nf4.lora, "--output", tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        plain = load_file(nf4.base / file.name)
        for name in plain.keys() & {f"{module}.weight" for module in nf4.changes}:
            plain[name] = (plain[name].float() + nf4.changes[name.removesuffix(".weight")]).bfloat16()
        save_file(plain, file, metadata={"format": "pt"})
    assert divergence(tmp_path / "out", nf4.base, nf4.lora, nf4.trained) > LARGEST_DIVERGENCE


def test_a_second_run_does_nothing_and_another_adapter_takes_the_place(
    nf4: Parts, merge: Callable[..., Merged], tmp_path: Path
):
    flags = ("--lora", nf4.lora, "--output", tmp_path / "out")
    merge(*flags)
    made = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert "is made of this adapter already" in merge(*flags)[1]
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == made
    other = make_adapter(nf4.base, tmp_path / "other", "none")
    old = weights(tmp_path / "out")
    assert merge("--lora", other.lora, "--output", tmp_path / "out")[0] == 0
    assert not torch.equal(weights(tmp_path / "out")[(name := f"{min(nf4.changes)}.weight")], old[name])


def test_what_merge_did_not_make_is_never_overwritten(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    status, _, error = merge("--lora", nf4.lora, "--output", tmp_path)
    assert status == 1 and "not made by merge.py" in error and (tmp_path / "thesis.txt").exists()


def test_a_full_disk_leaves_the_old_model_and_nothing_half_done(
    nf4: Parts, merge: Callable[..., Merged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    merge("--lora", nf4.lora, "--output", out)
    old = weights(out)
    other = make_adapter(nf4.base, tmp_path / "other", "none")
    written = []

    def save(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        assert out.exists() and file.parent != out
        written.append(file)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr(augcon.train.merge, "save_file", save)
    status, _, error = merge("--lora", other.lora, "--output", out)
    assert status == 1 and "cannot write" in error and "No space left" in error
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}
    assert all(torch.equal(tensor, old[name]) for name, tensor in weights(out).items())


def test_an_adapter_of_another_base_is_refused(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    other = make_base(tmp_path / "other", seed=5)
    status, _, error = merge("--lora", nf4.lora, "--base", other, "--output", tmp_path / "out")
    assert status == 1 and "belongs to another base" in error and str(nf4.base) in error
    parts = copied(nf4, tmp_path / "lora")  # without the record only the shapes can tell
    (parts.lora / "run.json").unlink()
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "intermediate_size": 128}))
    status, _, error = merge("--lora", parts.lora, "--base", other, "--quantize", "nf4", "--output", tmp_path / "out")
    assert status == 1 and "belongs to another base" in error and "256" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_not_say_how_it_was_trained(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    parts = copied(nf4, tmp_path / "lora")
    (parts.lora / "run.json").unlink()
    status, _, error = merge("--lora", parts.lora, "--output", tmp_path / "out")
    assert status == 1 and "--quantize nf4" in error and "--quantize none" in error
    assert merge("--lora", parts.lora, "--quantize", "nf4", "--output", tmp_path / "out")[0] == 0
    status, _, error = merge("--lora", nf4.lora, "--quantize", "none", "--output", tmp_path / "out")
    assert status == 1 and "trained with --quantize nf4" in error


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_exactly_is_refused(
    config: dict[str, object], named: str, base: Path, merge: Callable[..., Merged], tmp_path: Path
):
    parts = make_adapter(base, tmp_path / "lora", "none", **config)
    status, _, error = merge("--lora", parts.lora, "--output", tmp_path / "out")
    assert status == 1 and "cannot be merged" in error and named in error and not (tmp_path / "out").exists()


def test_an_adapter_on_weights_that_two_layers_share_is_refused(
    tied: Path, merge: Callable[..., Merged], tmp_path: Path
):
    parts = make_adapter(tied, tmp_path / "lora", "none", target_modules=["q_proj", "lm_head"])
    status, _, error = merge("--lora", parts.lora, "--output", tmp_path / "out")
    assert status == 1 and "lm_head shares its weights" in error


def test_damaged_adapters_are_one_line(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    parts = copied(nf4, tmp_path / "lora")
    file = parts.lora / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    for change, said in (
        ({name: None}, "do not fit"),
        ({name: tensors[name] * float("nan")}, "not finite"),
        ({"base_model.model.model.norm.weight": torch.ones(128)}, "not a LoRA of a linear layer"),
    ):
        save_file({key: value for key, value in {**tensors, **change}.items() if value is not None}, file)
        status, _, error = merge("--lora", parts.lora, "--output", tmp_path / "out")
        assert status == 1 and said in error and not (tmp_path / "out").exists()
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in merge("--lora", parts.lora, "--output", tmp_path / "out")[2]
    file.unlink()
    assert "there is no adapter_model.safetensors" in merge("--lora", parts.lora, "--output", tmp_path / "out")[2]


def test_damaged_bases_are_one_line(nf4: Parts, merge: Callable[..., Merged], tmp_path: Path):
    parts = copied(nf4, tmp_path / "lora")
    (parts.lora / "run.json").unlink()

    def refused(base: Path) -> str:
        status, _, error = merge("--lora", parts.lora, "--base", base, "--quantize", "none", "--output", tmp_path / "o")
        assert status == 1 and not (tmp_path / "o").exists()
        return error

    shards = sorted(nf4.base.glob("*.safetensors"))
    base = Path(shutil.copytree(nf4.base, tmp_path / "base"))
    (base / shards[2].name).unlink()
    assert shards[2].name in refused(base)
    (base / shards[2].name).write_bytes(shards[2].read_bytes()[:-1000])
    assert "cannot read" in refused(base)
    shutil.copy(shards[2], base)
    settings = json.loads((base / "config.json").read_text())
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": four_bits}))
    assert "quantised on disk" in refused(base)
    for file in base.glob("model*"):
        file.unlink()
    assert "holds no model" in (said := refused(base)) and ".bin" in said
    assert "no/such" in refused(Path("no/such"))


def test_the_model_is_written_beside_its_adapter_and_the_command_that_serves_it_is_complete(
    nf4: Parts, merge: Callable[..., Merged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    second = copied(nf4, tmp_path / "my results" / "second" / "LoRA").lora.parent
    shutil.copytree(nf4.lora, second / "ckpts" / "checkpoint-8")
    (second / "ckpts" / "checkpoint-8" / "run.json").rename(second / "run.json")
    said = merge("--lora", "my results/second/LoRA")[1]
    assert said.splitlines()[-1] == "next:    python serve.py --model 'my results/second/sft_model'"
    by_default = merge("--results", "my results/second")[1]
    assert "made of this adapter already" in by_default
    assert by_default.splitlines()[-1].endswith("--model 'my results/second/sft_model' --results 'my results/second'")
    shutil.rmtree(second / "sft_model")
    assert merge("--lora", "my results/second/ckpts/checkpoint-8")[0] == 0
    assert (second / "sft_model" / "run.json").exists()
    (second / "run.json").unlink()
    assert "no record of how it was trained" in merge("--lora", second / "ckpts" / "checkpoint-8")[2]


def test_an_adapter_may_come_from_the_hub(
    nf4: Parts, merge: Callable[..., Merged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def download(name: str, dry_run: bool, **_: object) -> str | list[object]:
        if name != "someone/adapter":
            raise OSError(f"404: {name}\nnot found")
        return [] if dry_run else str(nf4.lora)  # of a dry run, what would be downloaded

    monkeypatch.setattr(augcon.hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    status, said, error = merge("--lora", "someone/adapter", "--results", "r")
    assert (status, error) == (0, "") and "adapter: someone/adapter, 14 layers" in said
    assert weights(tmp_path / "r" / "sft_model").keys() == weights(nf4.base).keys()
    for name in ("someone/other", "./other", "a/b/c"):
        status, _, error = merge("--lora", name, "--results", "r")
        assert status == 1 and f"--lora '{name}' names no adapter" in error and "\n" not in error


def test_no_adapter_is_one_line_from_the_front_door(tmp_path: Path):
    assert says_one_line(run("merge.py", "--results", tmp_path / "r"), "LoRA", "finetune.py")
