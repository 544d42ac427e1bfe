"""The scorer's parts: what it reads, what it learns from, that it gives the same numbers again."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from augcon.data import Query, ScorerPair
from augcon.demo.tiny_model import make_tiny_model
from augcon.errors import UserError
from augcon.method.pairs import NEGATIVES
from augcon.run.pairs import hold_out
from augcon.train import base as training
from augcon.train import loop, scorer
from augcon.train.scores import KeptScores, batches, key

CONTEXT = "面包店早上六点开门，因为工人要吃早饭。The baker sells <|im_end|> rolls </s> to them. "
QUESTION = "面包店为什么早上六点开门？"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / request.param
    make_tiny_model(folder, [CONTEXT, QUESTION], vocabulary=400, family=FAMILIES[request.param])
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many threads wait for one another longer than such small models compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder(base: str, max_tokens: int = 2048) -> scorer.ScorerEncoder:
    return scorer.ScorerEncoder(training.load_tokenizer(base), max_tokens)


def trained(base: str, quantize: training.Quantization = "none"):
    """A scorer whose adapter does something: fresh ones add nothing to their base."""
    model = scorer.load_scorer(base, encoder(base), 1, quantize=quantize).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.requires_grad:
                weights += 0.1 * torch.randn(weights.shape, generator=generator).to(weights.dtype)
    return model


def test_the_pad_token_is_not_the_end_and_no_text_has_it(base: str):
    tokenizer = training.load_tokenizer(base)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) == len(type(tokenizer).from_pretrained(base)), "the vocabulary has not grown"
    special = set(tokenizer.all_special_ids) | {tokenizer.pad_token_id}
    marks = "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    row = encoder(base)([(marks, marks)])[0]
    assert not special & set(row[len(tokenizer("")["input_ids"]) :])


@pytest.mark.parametrize("max_tokens", [64, 100, 500])
def test_a_long_context_is_cut_and_the_question_stays(base: str, max_tokens: int):
    encode = encoder(base, max_tokens)
    short, long, endless = encode([("", QUESTION), (CONTEXT * 300, QUESTION), (CONTEXT, QUESTION * 300)])
    question = short[-len(encode.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]) :]
    assert len(long) == len(endless) == max_tokens
    assert long[-len(question) :] == question and encode.tokenizer.decode(question) == QUESTION
    assert encode.tokenizer.decode(endless, skip_special_tokens=True).strip().startswith(QUESTION)
    begins = len(encode.tokenizer("")["input_ids"])
    assert long[:begins] == short[:begins] == endless[:begins] == encode.tokenizer("")["input_ids"]


def test_a_score_does_not_depend_on_the_padding_beside_it(base: str):
    encode, model = encoder(base), trained(base)
    rows = encode([(CONTEXT, QUESTION), ("短。", "问？"), (CONTEXT * 5, QUESTION)])
    together = scorer.score(model, encode, rows)
    alone = [scorer.score(model, encode, [row])[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in together}) == 3, "the texts are told apart"


def test_the_question_and_its_context_both_count(base: str):
    encode, model = encoder(base), trained(base)
    texts = [(CONTEXT, QUESTION), (CONTEXT, "火山为什么喷发？"), ("火山会喷发。", QUESTION)]
    assert len({round(value, 3) for value in scorer.score(model, encode, encode(texts))}) == 3


def test_a_saved_scorer_gives_the_same_scores(base: str, tmp_path: Path):
    quantize = "nf4" if base.endswith("qwen2") else "none"  # 4-bit arithmetic is slow on a CPU: one will do
    encode, model = encoder(base), trained(base, quantize)
    rows = encode([(CONTEXT, QUESTION), ("短。", "问？")])
    assert scorer.save(model, tmp_path / "scorer") == scorer.save(model, tmp_path / "scorer")
    assert not list(tmp_path.glob("*.unfinished"))
    again = scorer.load_scorer(base, encode, 99, tmp_path / "scorer", quantize)
    assert scorer.score(again, encode, rows) == scorer.score(model, encode, rows)


def test_a_damaged_scorer_or_one_of_another_shape_is_refused(base: str, tmp_path: Path):
    encode = encoder(base)
    scorer.save(trained(base), tmp_path / "scorer")
    weights = tmp_path / "scorer" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "score" not in name}, weights)
    for damage in (lambda: None, lambda: weights.write_bytes(b"torn"), weights.unlink):
        damage()
        with pytest.raises(UserError, match="cannot be loaded"):
            scorer.load_scorer(base, encode, 1, tmp_path / "scorer", "none")


def test_the_head_and_all_linear_layers_learn_and_the_head_computes_in_fp32(base: str):
    model = scorer.load_scorer(base, encoder(base), 1, quantize="none").to(torch.bfloat16)
    learning = {name for name, weights in model.named_parameters() if weights.requires_grad}
    assert sum("score" in name for name in learning) == 1
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all(sum(f"{layer}.lora_A" in name for name in learning) == 2 for layer in layers)
    encode = encoder(base)
    batch = encode.padded(encode([(CONTEXT, QUESTION)]))
    assert model(**batch).logits.dtype == torch.float32


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=8))
def test_the_loss_is_that_of_bradley_and_terry(pairs: list[tuple[float, float]]):
    better, worse = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    plain = sum(-math.log(1 / (1 + math.exp(-(a - b)))) if a - b > -700 else b - a for a, b in pairs) / len(
        pairs
    ) + scorer.CENTRING * sum((a + b) ** 2 for a, b in pairs) / len(pairs)
    assert float(scorer.pair_loss(better, worse)) == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_a_badly_ranked_pair_still_pulls():
    better = torch.tensor([-30.0], requires_grad=True)
    scorer.pair_loss(better, torch.tensor([30.0])).backward()
    assert better.grad.item() == pytest.approx(-1, abs=1e-3)
    half = torch.tensor([-30.0], dtype=torch.bfloat16)
    assert scorer.pair_loss(half, half).dtype == torch.float32


PARTS = """
import json, sys
from pathlib import Path
from augcon.train import base as training
from augcon.data import ScorerPair
from augcon.train import loop, scorer

training.start_processes()
base, folder = sys.argv[1], Path(sys.argv[2])
train, losses = loop.train, []
def noted(trainer, *rest, **more):
    words = train(trainer, *rest, **more)
    losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    return words
loop.train = noted
context = "The bakery opens at six. "
pairs = [ScorerPair(context * (1 + n % 4), "When?", "Why not?" * n, "both", n, "") for n in range(10)]
encoder = scorer.ScorerEncoder(training.load_tokenizer(base), 512)
for tokens in (10_000, 1):
    scorer.TOKENS_IN_BATCH = tokens
    model = scorer.load_scorer(base, encoder, 1, quantize="none")
    scorer.train(model, encoder, pairs, loop.TrainingRules(2, 4, 1e-3, 1), folder / str(tokens))
(folder / "losses.json").write_text(json.dumps(losses))
"""


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_computed_in_parts_and_teaches_the_same(base: str, tmp_path: Path):
    command = [sys.executable, "-c", PARTS, base, str(tmp_path)]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "accumulation" not in done.stdout + done.stderr
    together, in_parts = json.loads((tmp_path / "losses.json").read_text())
    assert len(together) == 6 and in_parts == pytest.approx(together, abs=2e-4)


def some_pairs(roots: list[int]) -> list[ScorerPair]:
    kinds = list(NEGATIVES)
    return [ScorerPair(f"c{n}", "good", "bad", kinds[n % 3], root, f"{root}:0:") for n, root in enumerate(roots)]


def held_out(pairs: list[ScorerPair], article_of: dict[int, int], seed: int) -> tuple:
    """As step 2 holds out."""
    units = {"articles": [article_of.get(p.root, -1) for p in pairs], "roots, one article": [p.root for p in pairs]}
    return hold_out(pairs, units, 0.1, seed)


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.dictionaries(st.integers(0, 12), st.integers(0, 5)),
    st.integers(0, 9),
)
def test_held_out_pairs_share_no_article_with_the_others(roots: list[int], article_of: dict[int, int], seed: int):
    pairs = some_pairs(roots)
    rest, held, words = held_out(pairs, article_of, seed)
    assert len(rest) + len(held) == len(pairs) and all(pair not in held for pair in rest)
    assert len(held) <= len(pairs) / 2, "most is left to learn from"
    articles = {article_of.get(root, -1) for root in roots}
    unit = (lambda pair: article_of.get(pair.root, -1)) if len(articles) > 1 else (lambda pair: pair.root)
    assert not set(map(unit, held)) & set(map(unit, rest))
    assert bool(held) == (len(set(roots)) > 1)
    assert ("one article" in words) == (len(articles) == 1 and len(set(roots)) > 1)
    assert held_out(pairs, article_of, seed)[1] == held


def test_about_a_tenth_is_held_out():
    pairs = some_pairs([root for root in range(200) for _ in range(5)])
    _, held, words = held_out(pairs, {root: root // 4 for root in range(200)}, 1)
    assert len(held) == 100 and words == "5 of 50 articles"


@given(st.lists(st.integers(1, 300), max_size=50), st.integers(1, 1000))
def test_batches_take_each_place_once_the_longest_first_within_the_budget(lengths: list[int], budget: int):
    made = list(batches(lengths, budget))
    assert sorted(place for batch in made for place in batch) == list(range(len(lengths)))
    assert [lengths[place] for batch in made for place in batch] == sorted(lengths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget for batch in made)


def test_what_a_kill_tears_off_costs_only_that_batch(tmp_path: Path):
    kept = KeptScores(tmp_path / "scores")
    assert kept.read() == {}
    kept.folder.mkdir()
    kept.keep(0, {"a": 1.5, "b": 2.5})
    with (tmp_path / "scores" / "part-0.jsonl").open("a") as part:
        part.write('\n{"c": 1')
    kept.keep(0, {"d": 4.0})
    assert kept.read() == {"a": 1.5, "b": 2.5, "d": 4.0}
    kept.keep(1, {"e": 5.0})
    assert kept.read() == {"a": 1.5, "b": 2.5, "d": 4.0, "e": 5.0}


def test_texts_are_encoded_once_and_batches_stay_as_planned_until_all_have_scores(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scorer, "_ENCODED_TOGETHER", 2)
    monkeypatch.setattr(scorer, "TOKENS_IN_BATCH", 40)
    encode, model, kept = encoder(base), trained(base), KeptScores(tmp_path / "scores")
    texts = {f"k{n}": (CONTEXT[: 7 * n], QUESTION[: 1 + n]) for n in range(7)}
    numbers = scorer.plan(kept, encode, texts.items())
    planned = [rows[places]["key"] for rows, places in kept.batches(40)]
    assert len(numbers) == len(planned) > 2 and sorted(name for batch in planned for name in batch) == sorted(texts)
    stored = {row["key"]: row["tokens"] for rows in kept.texts() for row in rows}
    assert stored == dict(zip(texts, encode(list(texts.values())), strict=True))

    # As after a kill, with a query more and one less: what was planned stays together, the new one comes last.
    scorer.score_planned(model, encode, kept, numbers[:2])
    more = {**dict(list(texts.items())[1:]), "new": (CONTEXT, QUESTION)}
    monkeypatch.setattr(scorer.ScorerEncoder, "__call__", counted := Counted(scorer.ScorerEncoder.__call__))
    left = scorer.plan(kept, encode, more.items())
    assert counted.texts == [(CONTEXT, QUESTION)] and left == [*numbers[2:], len(numbers)]
    assert [rows[places]["key"] for rows, places in kept.batches(40)] == [*planned, ["new"]]
    scorer.score_planned(model, encode, kept, left)
    assert set(kept.read()) == {*texts, "new"} and scorer.plan(kept, encode, more.items()) == []
    plain = scorer.score(model, encode, [encode([texts["k3"]])[0]])[0]
    assert kept.read()["k3"] == pytest.approx(plain, abs=1e-4)
    kept.forget_texts()
    assert not kept.texts() and scorer.plan(kept, encode, more.items()) == []


class Counted:
    """An encoder that notes what it is given."""

    def __init__(self, encode) -> None:
        self.encode, self.texts = encode, []

    def __get__(self, encoder, _=None):
        def encode(texts):
            self.texts += texts
            return self.encode(encoder, texts)

        return encode


def test_an_edited_query_has_another_key():
    query = Query("12:0:21", 12, "a", "bc")
    assert re.fullmatch(r"12:0:21#[0-9a-f]{8}", key(query)) and key(query) == key(dataclasses.replace(query))
    others = (
        Query("12:0:21", 12, "ab", "c"),
        dataclasses.replace(query, text="bd"),
        dataclasses.replace(query, id="12:1:21"),
    )
    assert len({key(query), *map(key, others)}) == 4


def test_a_model_is_known_again_and_another_is_not(base: str, tmp_path: Path):
    known = training.weights_digest(Path(base))
    assert training.weights_digest(shutil.copytree(base, tmp_path / "copy")) == known
    make_tiny_model(tmp_path / "other", [CONTEXT, QUESTION], vocabulary=400, seed=1)
    assert training.weights_digest(tmp_path / "other") != known
    settings = tmp_path / "copy" / "config.json"
    before = training.companions_digest(tmp_path / "copy")
    settings.write_text(settings.read_text() + " ")
    assert training.companions_digest(tmp_path / "copy") != before


class _Spoilt:
    """A trainer that meets an error: when it reads its checkpoint, or writes one."""

    def __init__(self, at: str, error: Exception) -> None:
        self.at, self.error, self.callbacks = at, error, []
        self.args = type("Arguments", (), {"output_dir": "results/ckpts"})

    def remove_callback(self, _) -> None:
        pass

    def add_callback(self, callback) -> None:
        self.callbacks.append(callback)

    def _save_checkpoint(self, *_) -> None:
        raise self.error

    def train(self, resume_from_checkpoint: str | None) -> None:
        if self.at == "reading":
            raise self.error
        self.callbacks[0].began = 0.0
        if self.at == "writing":
            self._save_checkpoint("model", "trial")
        raise self.error


def test_a_checkpoint_that_cannot_be_read_or_written_is_a_line_and_other_errors_are_not():
    torchs_own = RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed")
    for at, error, message in (
        ("reading", KeyError("optimizer"), r"cannot go on from results/ckpts/checkpoint-3 .*remove it"),
        ("writing", torchs_own, r"cannot write a checkpoint to results/ckpts: .*file write failed; .*full"),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(_Spoilt(at, error), "results/ckpts/checkpoint-3", "x", 1, too_large="", too_fast="")
    for at, last in (("reading", None), ("training", "results/ckpts/checkpoint-3")):
        with pytest.raises(ZeroDivisionError):
            loop.train(_Spoilt(at, ZeroDivisionError()), last, "x", 1, too_large="", too_fast="")
