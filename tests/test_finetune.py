"""finetune.py trains on the answer and its end only, in packs whose examples do not see each other."""

import csv
import json
import random
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from conftest import run, says_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from augcon.data import Pair
from augcon.demo.tiny_model import make_tiny_model
from augcon.errors import UserError
from augcon.run.pairs import hold_out
from augcon.run.rows import read_all
from augcon.train import base as training
from augcon.train import loop
from augcon.train import sft as tuning
from augcon.train.chat import IGNORED, ChatEncoder, TrainingExample, load_encoder

torch.set_num_threads(1)

# Templates as the families have them, written anew: with a system turn of the template's own or from the messages,
# with and without the marks that tell the assistant's words apart.
CHATML = """{%- if messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATML_MARKED = """{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message.role }}<|end|>\n\n"
    "{{ message.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "ChatML, a system turn of its own": (CHATML, "<|im_end|>"),
    "ChatML, marked": (CHATML_MARKED, "<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|eot|>"),
    "Mistral": (MISTRAL, "</s>"),
}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
PAIR = Pair("面包店几点开门？", "面包店早上七点开门。\n\nIt sells out by eight.")
QUESTION, ANSWER = PAIR.question, PAIR.answer
TEXTS = [QUESTION + ANSWER, "The bakery opens at seven, 先到先得。"] * 30


def make_tokenizer(template: str | None, end: str = "<|im_end|>") -> transformers.PreTrainedTokenizerBase:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token=end, pad_token="<pad>", chat_template=template
    )


def make_encoder(family: str, max_tokens: int = 1000) -> ChatEncoder:
    tokenizer = make_tokenizer(*FAMILIES[family])
    return ChatEncoder(tokenizer, frozenset([tokenizer.eos_token_id]), max_tokens)


def encode(encoder: ChatEncoder, pair: Pair) -> TrainingExample:
    (example,) = encoder([pair])
    assert example
    return example


def as_dataset(examples: list[TrainingExample]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(tuning.as_columns(examples))


def learnt(encoder: ChatEncoder, example: TrainingExample) -> str:
    """What carries loss, as text."""
    kept = [label for label in example.labels if label != IGNORED]
    assert len(example.labels) == len(example.input_ids) and example.labels[-len(kept) :] == kept
    assert kept == example.input_ids[-len(kept) :]
    return encoder.tokenizer.decode(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answer_and_its_end_token_carry_loss(family: str):
    encoder = make_encoder(family)
    example = encode(encoder, PAIR)
    lead = " " if family == "Mistral" else ""  # which the model is to say itself
    assert learnt(encoder, example) == lead + ANSWER + FAMILIES[family][1] and not example.cut
    asked = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert example.input_ids[: len(asked)] == asked  # what the server will put before the answer
    assert example.labels[: len(asked)] == [IGNORED] * len(asked)


ENCODERS = {family: make_encoder(family) for family in FAMILIES}


@given(
    question=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_of_any_text_the_answer_and_its_end_carry_loss(question: str, answer: str, family: str):
    encoder = ENCODERS[family]
    assert learnt(encoder, encode(encoder, Pair(question, answer))).strip() == answer + FAMILIES[family][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_answer_too_long_the_start_stays_and_nothing_says_that_it_ends(family: str):
    encoder = make_encoder(family)
    whole = encode(encoder, PAIR)
    start = whole.labels.index(next(label for label in whole.labels if label != IGNORED))
    for room in (1, 3):
        short = ChatEncoder(encoder.tokenizer, encoder.ends, start + room)([PAIR])[0]
        assert short.cut and short.input_ids == whole.input_ids[: start + room]
        assert short.labels == whole.labels[: start + room]
    assert ChatEncoder(encoder.tokenizer, encoder.ends, start)([PAIR]) == [None]
    assert not ChatEncoder(encoder.tokenizer, encoder.ends, len(whole.input_ids))([PAIR])[0].cut


def base_with(folder: Path, **generation: object) -> Path:
    transformers.LlamaConfig(vocab_size=600, eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    if generation:
        transformers.GenerationConfig(**generation).save_pretrained(folder)
    return folder


def test_the_end_may_be_one_that_only_the_model_knows_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = make_tokenizer(LLAMA_3, "</s>")  # as Gemma: turns end with another token than texts do
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    encoder = load_encoder(tokenizer, base_with(tmp_path, eos_token_id=[2, eot]), 1000)
    assert encode(encoder, PAIR).input_ids[-1] == eot and not capsys.readouterr().out


def test_no_pair_is_longer_than_the_model_can_hold(tmp_path: Path):
    transformers.LlamaConfig(vocab_size=600, max_position_embeddings=40).save_pretrained(tmp_path)
    encoder = load_encoder(make_tokenizer(CHATML), tmp_path, 1000)
    assert len(encode(encoder, Pair(QUESTION, ANSWER * 9)).input_ids) == 40
    assert load_encoder(make_tokenizer(CHATML), tmp_path, 30).max_tokens == 30


def test_where_the_template_has_no_end_the_end_token_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}bot:"
    encoder = load_encoder(make_tokenizer(template, "</s>"), base_with(tmp_path), 1000)
    assert encode(encoder, PAIR).input_ids[-1] == encoder.tokenizer.eos_token_id
    assert "starts an answer differently" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% if %}", "fails on a question"),
        ("{% for message in messages %}{{ message.content[:9] }}{% endfor %}", "leaves out"),
        ("{{ messages[0].content }}", "leaves out"),
    ],
)
def test_a_template_that_will_not_do_is_an_error_that_says_so(template: str | None, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        load_encoder(make_tokenizer(template), base_with(tmp_path), 1000)


KINDS = {
    "Qwen2": transformers.Qwen2Config,
    "Llama": transformers.LlamaConfig,
    "Mistral, sliding window": lambda **small: transformers.MistralConfig(**small, sliding_window=8),
    "Gemma 2": lambda **small: transformers.Gemma2Config(**small, head_dim=16),
}


def make_model(kind: str, attention: str = "sdpa") -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    small = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = KINDS[kind](**small, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_in_a_pack_gives_the_logits_it_gives_alone(kind: str, attention: str):
    model, encoder = make_model(kind, attention), make_encoder("ChatML, marked")
    examples = [encode(encoder, Pair(QUESTION * (n + 1), ANSWER[:n])) for n in (1, 9, 4, 12, 7)]
    room = sum(len(example.input_ids) for example in examples)
    packed = tuning.pack(as_dataset(examples), room, seed=1)
    assert len(packed) == 1 and len(packed[0]["seq_lengths"]) == 5
    batch = tuning.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed[0]])
    labels = batch.pop("labels")[0].tolist()
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        start = 0
        by_length = sorted(examples, key=lambda example: -len(example.input_ids))
        for example in by_length:
            end = start + len(example.input_ids)
            alone = model(torch.tensor([example.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(together[start:end], alone, rtol=1e-3, atol=1e-3)
            assert labels[start:end] == example.labels
            start = end
    assert tuning.stays_apart(model)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 30))
@settings(max_examples=20)
def test_a_long_pair_is_a_pack_alone_and_does_not_make_the_others_longer(lengths: list[int], room: int):
    examples = [TrainingExample([n] * length, [n] * length) for n, length in enumerate(lengths)]
    packs = tuning.pack(as_dataset(examples), room, seed=1)
    assert sorted(n for row in packs["input_ids"] for n in row) == sorted(n for e in examples for n in e.input_ids)
    assert list(packs["labels"]) == list(packs["input_ids"])
    for row, parts in zip(packs["input_ids"], packs["seq_lengths"], strict=True):
        assert sum(parts) == len(row) and (len(row) <= room or len(parts) == 1)
        assert [lengths[n] for n in dict.fromkeys(row)] == parts


def test_a_model_that_looks_across_packs_is_found_out():
    class Leaky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model("Qwen2")

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            return self.model(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)

    assert not tuning.stays_apart(Leaky())


def test_four_bit_layers_give_the_same_gradients_after_an_evaluation(tmp_path: Path):
    make_model("Llama").save_pretrained(tmp_path)
    model = tuning.load_model(tmp_path, "nf4", "tiny", seed=1)
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def gradient() -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return next(
            w.grad.clone() for name, w in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name
        )

    before = gradient()
    with torch.no_grad():
        model.eval()(ids)
    assert before.abs().sum() > 0 and torch.allclose(gradient(), before, rtol=1e-3, atol=1e-6)
    assert model.peft_config["default"].base_model_name_or_path == "tiny"


def test_a_mixture_of_experts_that_could_not_be_merged_is_refused_at_once(tmp_path: Path):
    small = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**small, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="experts"):
        tuning.load_model(tmp_path, "none", "moe", seed=1)


def test_a_base_that_is_quantised_on_disk_is_refused_at_once(tmp_path: Path):
    make_model("Llama").save_pretrained(tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "plain", quantization_config=training.quantization("nf4")).save_pretrained(tmp_path / "nf4")
    with pytest.raises(UserError, match="quantised on disk"):
        tuning.load_model(tmp_path / "nf4", "nf4", "nf4", seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use the GPUs here")
def test_gpus_that_pytorch_cannot_use_are_not_passed_over():
    with pytest.raises(UserError, match=r"2 GPUs, but PyTorch .* cannot use them \(.+\)"):
        training.start_processes(2)


def groups_of(sizes: list[int]) -> list[int]:
    return [group for group, size in enumerate(sizes) for _ in range(size)]


def held_out_of(number: int, units: dict[str, list[int | None]], share: float = 0.05, seed: int = 1) -> tuple:
    """The places of the pairs held out, and how they were chosen."""
    pairs = [Pair(str(place), "") for place in range(number)]
    units = {**units, "single pairs": range(number)}
    learnt, held, words = hold_out(pairs, units, share, seed, many=20)
    assert sorted(learnt + held, key=lambda pair: int(pair.question)) == pairs
    return [int(pair.question) for pair in held], words


def test_whole_articles_are_held_out_where_there_are_many():
    articles = groups_of([random.Random(n).randint(1, 9) for n in range(200)])
    held, words = held_out_of(len(articles), {"articles": articles})
    chosen = {articles[place] for place in held}
    assert 0.03 * len(articles) < len(held) <= 0.05 * len(articles) and f"{len(chosen)} of 200 articles" in words
    assert all((article in chosen) == (place in held) for place, article in enumerate(articles))
    again, other = (held_out_of(len(articles), {"articles": articles}, seed=seed)[0] for seed in (1, 2))
    assert again == held != other


def test_few_articles_are_not_held_out_whole():
    units = {"articles": [n % 3 for n in range(600)], "root contexts": [n % 30 for n in range(600)]}
    held, words = held_out_of(600, units)
    assert len(held) == 20 and "1 of 30 root contexts" in words
    assert "single pairs" in held_out_of(600, {"articles": groups_of([300, 300])})[1]
    assert len(held_out_of(600, {})[0]) == 30
    assert "single pairs" in held_out_of(100, {"articles": [None] * 100})[1]
    assert len(held_out_of(119, {"articles": groups_of([100] + [1] * 19)})[0]) < 20  # never the one that is most of it


def test_of_few_pairs_one_is_held_out_and_of_one_none():
    assert len(held_out_of(2, {})[0]) == 1
    assert held_out_of(1, {})[0] == [] and held_out_of(9, {}, share=0)[0] == []


def test_the_picture_is_drawn_of_any_log(tmp_path: Path):
    logs: Iterator[list[dict[str, float]]] = iter(
        [
            [],
            [{"step": 1, "epoch": 0.5, "loss": 2.0}],
            [{"step": 0, "epoch": 0, "eval_loss": 3.0}, {"step": 4, "epoch": 1.0, "loss": 2.0}],
        ]
    )
    for number, log in enumerate(logs):
        tuning.draw_losses(log, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_pad_is_never_the_end_token(tmp_path: Path):
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    assert (loaded := training.load_tokenizer(str(tmp_path))).pad_token_id not in (None, loaded.eos_token_id)


def test_without_pairs_it_is_one_line_from_the_front_door(tmp_path: Path):
    assert says_one_line(run("finetune.py", "--results", tmp_path / "r"), "sft_data", "augcon.sh")


ROWS = [{"question": "Who bakes?", "answer": 'The "baker",\nat night.'}, {"question": "几点？", "answer": "42"}]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8-sig")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["saved", "a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_pairs_come_from_a_dataset_or_a_file_of_any_kind(name: str, tmp_path: Path):
    def read(name: str, rows: list[dict[str, object]]) -> list[Pair]:
        return read_all(str(write_rows(tmp_path / name, rows)), Pair, "--data")

    assert read(name, [{**row, "more": 1} for row in ROWS]) == [Pair(**row) for row in ROWS]
    with pytest.raises(UserError, match=r"--data .*b.*row 3.*'answer' must be a text"):
        read(f"b{Path(name).suffix}", [*ROWS, {"question": "Why?", "answer": " "}])
    with pytest.raises(UserError, match="'question'"):
        read(f"c{Path(name).suffix}", [{"prompt": "Why?", "answer": "So."}])


def test_checkpoints_of_another_number_of_processes_are_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "ckpts"
    assert loop.last_checkpoint(folder) is None
    state = folder / "checkpoint-3" / "global_step3"
    state.mkdir(parents=True)
    (folder / "checkpoint-3" / "whole").touch()
    (state / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (folder / "checkpoint-5").mkdir()  # as a kill amid saving leaves it
    assert loop.last_checkpoint(folder) == str(folder / "checkpoint-3")
    assert not (folder / "checkpoint-5").exists()
    monkeypatch.setattr(loop, "world_size", lambda: 4)
    with pytest.raises(UserError, match="begun by 1 processes, and this run has 4"):
        loop.last_checkpoint(folder)
    assert (folder / "checkpoint-3" / "whole").exists()


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path):
    make_tiny_model(tmp_path / "tiny", ["Why so?"])
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"question": f"Why {n}?", "answer": f"So {n}."} for n in range(30)])
    flags = ("--data", pairs, "--model", tmp_path / "tiny", "--output", tmp_path / "out", "--dry-run")
    done = run("finetune.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "30 pairs" in done.stdout and "tokens:" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_training_that_does_not_fit_or_diverges_says_what_to_do():
    """With a stand-in for the Trainer: no GPU here can run out of memory."""

    def out_of_memory(**_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no more")

    advice = {"too_large": "take less", "too_fast": "go slower"}
    ignore = lambda *_, **__: None  # noqa: E731
    callbacks: list[Any] = []
    trainer = types.SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        state=types.SimpleNamespace(global_step=4, max_steps=4),
        train=lambda **_: callbacks[-1].on_train_begin(None, trainer.state, None),
        add_callback=callbacks.append,
        _save_checkpoint=ignore,
        remove_callback=ignore,
    )
    figures = loop.train(trainer, "c/checkpoint-2", "training", 60, **advice)
    assert re.match(r"2 steps in 0 s from checkpoint-2 on, [\d,]+ tokens/s per process", figures)
    torch.nn.init.constant_(trainer.model.weight, torch.nan)
    with pytest.raises(UserError, match=r"diverged: .*; go slower"):
        loop.train(trainer, None, "training", 10, **advice)
    trainer.train = out_of_memory
    with pytest.raises(UserError, match="more memory than the GPU has; take less"):
        loop.train(trainer, None, "training", 10, **advice)
