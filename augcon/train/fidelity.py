"""How far a merged model is from the network that was trained: the base as training loaded it, with the adapter."""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from augcon.train.adapters import TrainedWith
from augcon.train.base import quantization, with_gradients

TOKENS = 128  # of each text


def divergence(merged: Path, base: Path, adapter: Path, trained: TrainedWith, texts: list[str]) -> tuple[float, int]:
    """Mean KL divergence per token, in nats, of the merged model from the trained network; the number of tokens.

    The two are in memory one after the other, on the GPUs where there are any.
    """
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    inputs = [tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS] for text in texts]
    where = {"device_map": "auto"} if torch.cuda.is_available() else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, trained.dtype), quantization_config=quantization(trained.quantize), **where
    )
    wanted = list(_log_probabilities(PeftModel.from_pretrained(with_gradients(loaded), adapter), inputs))
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    total = 0.0
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=getattr(torch, trained.dtype), **where)
    for trained_says, merged_says in zip(wanted, _log_probabilities(model, inputs), strict=True):
        total += float((trained_says.exp() * (trained_says - merged_says)).sum())
    tokens = sum(ids.numel() for ids in inputs)
    return total / tokens, tokens


@torch.no_grad()
def _log_probabilities(model: torch.nn.Module, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    model.eval()
    for ids in inputs:
        yield model(ids.to(model.device)).logits[0].float().log_softmax(-1).cpu()
