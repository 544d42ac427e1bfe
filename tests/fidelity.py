"""How far a merged model is from the network that was trained: the base as training loaded it, with the adapter."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from conftest import ROOT
from peft import PeftModel

from augcon.train.adapters import TrainedWith
from augcon.train.base import quantization, with_gradients

LARGEST_DIVERGENCE = 2e-3  # nats per token; rounding to 16 bits costs less than a tenth of it, wrong weights more
TOKENS = 128  # of each text


def divergence(merged: Path, base: Path, adapter: Path, trained: TrainedWith) -> float:
    """Mean KL divergence per token, in nats, of the merged model from the trained network."""
    files = (ROOT / "qa_examples.jsonl", ROOT / "qa_examples_en.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    texts = [row["question"] + row["answer"] for row in rows]
    inputs = [tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS] for text in texts]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, trained.dtype), quantization_config=quantization(trained.quantize)
    )
    wanted = list(_log_probabilities(PeftModel.from_pretrained(with_gradients(loaded), adapter), inputs))
    total = 0.0
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, trained.dtype))
    for trained_says, merged_says in zip(wanted, _log_probabilities(model, inputs), strict=True):
        total += float((trained_says.exp() * (trained_says - merged_says)).sum())
    return total / sum(ids.numel() for ids in inputs)


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    model.eval()
    for ids in inputs:
        yield model(ids.to(model.device)).logits[0].float().log_softmax(-1).cpu()
