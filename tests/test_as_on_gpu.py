"""What training does only on a GPU, done on the CPU: bf16 under DeepSpeed, an NF4 base, gradient checkpointing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_environment

from augcon.demo.tiny_model import make_tiny_model

CONTEXT, QUESTION, ANSWER = "面包店早上七点开门，因为工人要吃早饭。", "面包店几点开门？", "七点开门。"
TRAIN = """
import collections, json, sys
from pathlib import Path
from augcon.train import base as training

training.can_bf16 = lambda: True
from augcon.train import loop

arguments = loop.training_arguments
loop.training_arguments = lambda *a: arguments(*a) | {"logging_steps": 1}
training.start_processes()
from augcon.data import Pair, ScorerPair
from augcon.method.pairs import NEGATIVES
from augcon.train import scorer
from augcon.train import sft as tuning
from augcon.train.chat import load_encoder
from augcon.train.sft import ENCODED
import datasets

base, folder, context, question, answer = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
tokenizer = training.load_tokenizer(str(base))
rules = loop.TrainingRules(2, 4, 3e-3, 1)
said = {}

def kinds(model):
    return sorted({
        f"{'trained' if w.requires_grad else type(w).__name__} {w.dtype}" for n, w in model.named_parameters()
        if "lora" in n or "score" in n or "proj.base_layer.weight" in n
    })

encoder = scorer.ScorerEncoder(tokenizer, 512)
kind = next(iter(NEGATIVES))
pairs = [ScorerPair(context * (1 + n % 3), question, "好吗？", kind, n, f"{n}:0:") for n in range(16)]
model = scorer.load_scorer(str(base), encoder, 1, quantize="nf4")
before = scorer.accuracy(model, encoder, pairs)  # a pass without gradients must not spoil those to come
scorer.train(model, encoder, pairs, rules, folder / "scorer")
said["scorer"] = kinds(model)
said["accuracy"] = scorer.accuracy(model, encoder, pairs)["all"]
scorer.save(model, folder / "saved")
rows = encoder([(pair.context, pair.pos_query) for pair in pairs[:3]])
again = scorer.load_scorer(str(base), encoder, 2, folder / "saved", "nf4")
said["scores"] = [scorer.score(which, encoder, rows) for which in (model, again)]

encode = load_encoder(tokenizer, base, 512)
pairs = [Pair(question, answer * (20 if n == 3 else 1 + n % 3)) for n in range(16)]


def tune(name, quantize, learnt, held_out, most, kept):
    # the model, its log, and how often a layer computed each number of tokens
    rows = []
    for part in (learnt, held_out):
        path = folder / name / ENCODED / f"{len(rows)}.arrow"
        tuning.write_examples(encode, part, path)
        rows.append(datasets.Dataset.from_file(str(path)))
    model = tuning.load_model(base, quantize, "tiny", 1)
    computed = collections.Counter()
    layer = next(module for path, module in model.named_modules() if path.endswith("layers.0.mlp"))
    count = lambda module, given: computed.update([given[0].shape[1]] if module.training else [])
    layer.register_forward_pre_hook(count)
    log, _ = tuning.tune(model, tokenizer, *rows, rules, folder / name, most, kept)
    return model, log, sorted(computed.items())


for quantize, kept in (("nf4", 0), ("none", 100)):
    model, log, computed = tune(quantize, quantize, pairs[2:], pairs[:2], 512, kept)
    said[quantize] = {
        "kinds": kinds(model),
        "held out": [row["eval_loss"] for row in log if "eval_loss" in row],
        "computed": computed,
    }
same = [pairs[0]] * 4
for most in (512, 40):
    _, log, computed = tune(f"at most {most}", "none", same, [], most, 512)
    said[f"at most {most}"] = [[row["loss"] for row in log if "loss" in row], computed]
(folder / "said.json").write_text(json.dumps(said))
"""


@pytest.mark.slow
def test_scorer_and_tuning_learn_in_bf16_over_nf4_with_checkpointed_gradients(tmp_path: Path):
    make_tiny_model(tmp_path / "base", [CONTEXT, QUESTION, ANSWER])
    command = [sys.executable, "-c", TRAIN, tmp_path / "base", tmp_path, CONTEXT, QUESTION, ANSWER]
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["scorer"] == ["Parameter torch.bfloat16", "Params4bit torch.uint8", "trained torch.bfloat16"]
    assert said["nf4"]["kinds"] == ["Params4bit torch.uint8", "trained torch.bfloat16"]
    assert said["none"]["kinds"] == ["Parameter torch.bfloat16", "trained torch.bfloat16"]
    assert said["accuracy"] == [16, 1] and said["scores"][0] == said["scores"][1]
    for kind in ("nf4", "none"):
        assert said[kind]["held out"][-1] < 0.9 * said[kind]["held out"][0]
    for (tokens, often), (same_tokens, once) in zip(said["nf4"]["computed"], said["none"]["computed"], strict=True):
        assert tokens == same_tokens and often == (2 * once if tokens <= 100 else once), "again in the backward pass"
    assert said["none"]["computed"][0][0] <= 100 < said["none"]["computed"][-1][0]
    (whole, in_one), (divided, in_four) = said["at most 512"], said["at most 40"]
    assert divided == pytest.approx(whole, rel=0.01), "a step in four passes is the same step"
    assert [[tokens / 4, 4 * often] for tokens, often in in_one] == in_four
    kept = [torch.load(path, weights_only=False)["module"] for path in tmp_path.glob("*/checkpoint-*/*/mp_rank*")]
    assert len(kept) == 10, "an epoch each"
    whole = [name for names in kept for name in names if name.endswith(".weight") and "lora_" not in name]
    assert all("score" in name for name in whole), "no weight of the base is in a checkpoint"
