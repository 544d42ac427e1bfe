"""The estimate of GPU memory, against what autograd keeps and what published models are; no GPU is needed for that."""

import math
from pathlib import Path

import pytest
import torch
import transformers

import finetune
from augcon.data import Pair
from augcon.errors import UserError
from augcon.train import base as training
from augcon.train import memory
from augcon.train import sft as tuning
from augcon.train.base import load_base, lora
from config import Settings

torch.set_num_threads(1)

SMALL = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 768, "pad_token_id": 0}
KINDS = {
    "Qwen2": lambda **more: transformers.Qwen2Config(**SMALL, num_key_value_heads=1, **more),
    "Llama": lambda **more: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more),
    "Gemma 2": lambda **more: transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=64, **more),
    "Phi 3": lambda **more: transformers.Phi3Config(**SMALL, num_key_value_heads=4, eos_token_id=1, **more),
}


def shape(layers: int, width: int, inner: int, kv: int, words: int) -> memory.Shape:
    """Of a published model: its layers, width, inner width, the width of keys and values, and its words."""
    sizes = [(width, width), (width, kv), (width, kv), (width, width), (width, inner), (width, inner), (inner, width)]
    linear, edges = sum(a * b for a, b in sizes), sum(a + b for a, b in sizes)
    return memory.Shape(layers * linear, 2 * words * width, layers * edges, layers, width)


QWEN_7B = shape(28, 3584, 18944, 512, 152064)
QWEN_14B = shape(48, 5120, 13824, 1024, 152064)
QWEN_32B = shape(64, 5120, 27392, 1024, 152064)  # Qwen1.5-32B-Chat, the paper's
QWEN_72B = shape(80, 8192, 29568, 1024, 152064)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_no_more_activations_are_kept_than_estimated_and_not_much_fewer(kind: str, quantize: str, tmp_path: Path):
    tokens, kept = 200, {}
    for layers in (1, 3):
        config = KINDS[kind](num_hidden_layers=layers, num_attention_heads=4)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(layers))
        model = load_base(transformers.AutoModelForCausalLM, str(tmp_path / str(layers)), quantize)
        model = tuning.get_peft_model(model.bfloat16() if quantize == "none" else model, lora("CAUSAL_LM")).train()
        for weights in model.parameters():  # as DeepSpeed has them on a GPU
            weights.data = weights.data.bfloat16() if weights.is_floating_point() else weights.data
        own = {weights.untyped_storage().data_ptr() for weights in (*model.parameters(), *model.buffers())}
        seen: dict[int, torch.Tensor] = {}

        def see(tensor: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            model(torch.randint(2, 400, (1, tokens)), use_cache=False).logits.sum()
        kept[layers] = sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in own)
    shapes = [memory.shape_of(tmp_path / str(layers)) for layers in (3, 1)]
    many, few = (
        memory.estimate(shape, "none", tokens, keep=True) - memory.estimate(shape, "none", 0, keep=True)
        for shape in shapes
    )
    assert 0.65 * (many - few) < kept[3] - kept[1] <= many - few


def test_the_shape_is_that_of_the_weights(tmp_path: Path):
    config = KINDS["Qwen2"](num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    found = memory.shape_of(tmp_path)
    assert found.linear + found.other == model.num_parameters() and (found.layers, found.width) == (2, 256)
    adapted = tuning.get_peft_model(model, lora("CAUSAL_LM"))
    assert sum(w.numel() for w in adapted.parameters() if w.requires_grad) == 32 * found.edges
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        memory.shape_of(tmp_path)


def test_the_weights_of_published_models_are_about_as_large_as_their_names_say():
    for model, billions in ((QWEN_7B, 7.6), (QWEN_14B, 14.8), (QWEN_32B, 32.5), (QWEN_72B, 72.7)):
        assert math.isclose(model.linear + model.other, billions * 1e9, rel_tol=0.02)
    assert memory.estimate(QWEN_32B, "nf4", 0, True) < 0.4 * memory.estimate(QWEN_32B, "none", 0, True)


@pytest.mark.parametrize(
    ("model", "gib", "quantize"),
    [
        (QWEN_7B, 22, "nf4"),
        (QWEN_7B, 24, "none"),
        (QWEN_14B, 40, "nf4"),
        (QWEN_14B, 48, "none"),
        (QWEN_14B, 79, "none"),
        (QWEN_32B, 79, "nf4"),  # an H100, as in the paper
        (QWEN_32B, 140, "none"),  # an H200
        (QWEN_72B, 140, "nf4"),
    ],
)
def test_four_bits_are_used_only_where_sixteen_do_not_fit(model: memory.Shape, gib: float, quantize: str):
    """With pretended cards: none is here."""
    assert memory.choose_quantization(model, round(gib * memory.GIB), 4096) == quantize


def test_the_activations_of_passes_are_kept_as_far_as_they_fit():
    """With pretended cards: none is here."""
    for model, quantize, gib, least, most in (
        (QWEN_7B, "none", 79, 6000, 7000),
        (QWEN_14B, "none", 79, 2500, 3000),
        (QWEN_32B, "nf4", 79, 1500, 2000),
        (QWEN_32B, "none", 79, 0, 100),
        (QWEN_72B, "nf4", 24, 0, 0),
    ):
        card = gib * memory.GIB
        kept = memory.most_kept(model, quantize, card)
        assert least <= kept <= most
        for tokens in (kept, kept + 1):
            fits = memory.estimate(model, quantize, tokens, keep=True) <= memory.room(card)
            assert fits == (tokens == kept > 0)


def test_the_base_is_quantised_as_asked_or_else_where_the_gpu_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a pretended GPU of --gpu-memory: none is here."""
    config = KINDS["Qwen2"](num_hidden_layers=2, num_attention_heads=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    def loaded(**more: object) -> tuple[str, str]:
        found = finetune.how_loaded(Settings(model=str(tmp_path), **more), tmp_path)
        return found.quantize, found.dtype

    assert loaded() == ("none", "float32") and loaded(quantize="nf4")[0] == "nf4"
    monkeypatch.setattr(training, "can_bf16", lambda: True)
    assert loaded(gpu_memory=24) == ("none", "bfloat16") and loaded(gpu_memory=2.38)[0] == "nf4"
    assert loaded(gpu_memory=2.38, max_tokens=16)[0] == "none"  # room for fewer tokens
    assert loaded(gpu_memory=2.38, quantize="none")[0] == "none"


def test_the_digest_of_pairs_tells_their_texts_and_their_order():
    pairs = [Pair("几点？", "七点。"), Pair("When?", 'At "seven".')]
    others = [[], pairs[:1], pairs[::-1], [pairs[0], Pair("When", '?At "seven".')]]
    assert finetune.pairs_digest(pairs) == finetune.pairs_digest(list(pairs))
    assert len({finetune.pairs_digest(some) for some in [pairs, *others]}) == 5
