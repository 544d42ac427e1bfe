"""Step 2's training and scoring on random weights of a given shape, 4-bit NF4: tokens/s, peak memory, save and reload.

The weights are made on the device, layer by layer, and quantised there; nothing is downloaded. What is learnt means
nothing. Defaults to the shape of Qwen1.5-32B on a GPU, and to a tiny one elsewhere, which only shows that it runs.

    deepspeed --num_gpus 8 benchmarks/scorer.py [--shape qwen1.5-32b] [--pairs 256] [--batch 4]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from augcon.data import ScorerPair  # noqa: E402, I001
from augcon.demo.tiny_model import make_tiny_model  # noqa: E402
from augcon.method.contexts import split_article  # noqa: E402
from augcon.run.rows import read_column  # noqa: E402
from augcon.train import base as training  # noqa: E402
from augcon.train import loop, ranks, scorer  # noqa: E402

import bitsandbytes  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

# hidden, intermediate, layers, heads, heads of keys and values, vocabulary; from the models' config.json
SHAPES = {
    "qwen1.5-32b": (5120, 27392, 64, 40, 8, 152064),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "tiny": (128, 256, 2, 4, 2, 2000),
}


@ranks.report_once
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-32b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--pairs", type=int, default=256 if torch.cuda.is_available() else 16)
    parser.add_argument("--batch", type=int, default=4, help="pairs per GPU and step")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    training.start_processes()
    articles = [text for text in read_column(str(ROOT / "DailyM"), "article") if text]
    contexts = [context for article in articles for context in split_article(article, 500)]
    pairs = [
        ScorerPair(contexts[n % len(contexts)], f"{n}为什么？", f"{n}什么？", "both", n, f"{n}:0:")
        for n in range(options.pairs)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder / "tokens", articles)
        encoder = scorer.ScorerEncoder(training.load_tokenizer(str(folder / "tokens")), 2048)
        model = scorer.make_scorer(random_model(*SHAPES[options.shape]), encoder)
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        ranks.print_main(f"{options.shape}, {ranks.world_size()} processes, {where}: {loop.peak_memory()} when made")
        rules = loop.TrainingRules(epochs=1, batch=options.batch)
        checkpoints = ranks.on_main(lambda: folder / "checkpoints")
        ranks.print_main("training: " + scorer.train(model, encoder, pairs, rules, checkpoints))
        rows = encoder([(pair.context, pair.pos_query) for pair in pairs])
        work = list(scorer.batches(list(map(len, rows)), scorer.TOKENS_IN_BATCH))[ranks.rank() :: ranks.world_size()]
        started = time.monotonic()
        scores = [scorer.score(model, encoder, [rows[place] for place in batch]) for batch in work]
        seconds, tokens = time.monotonic() - started, sum(len(rows[place]) for batch in work for place in batch)
        ranks.print_main(
            f"scoring:  {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s a process, {loop.peak_memory()}"
        )
        scorer.save(model, folder / "scorer")
        del model
        again = scorer.make_scorer(random_model(*SHAPES[options.shape]), encoder, folder / "scorer")
        same = scorer.score(again, encoder, [rows[place] for place in work[0]]) == scores[0]
        size = sum(path.stat().st_size for path in (folder / "scorer").iterdir()) / 2**20
        ranks.print_main(f"saved:    {size:,.0f} MiB; reloaded, the scores are {'the same' if same else 'DIFFERENT'}")
        ranks.barrier()


def random_model(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int) -> Any:
    """A sequence classifier of Qwen2's architecture with random weights, its linear layers in NF4."""
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_labels=1,
        dtype="bfloat16",
    )
    kind = torch.bfloat16 if training.can_bf16() else torch.float32
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=kind)
    transformers.set_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "score":
            biased = module.bias is not None
            quantised = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, biased, torch.bfloat16, quant_type="nf4", device="meta"
            )
            weights = 0.02 * torch.randn(module.out_features, module.in_features, dtype=kind, device=training.device())
            quantised.weight = bitsandbytes.nn.Params4bit(weights, requires_grad=False, quant_type="nf4").to(
                training.device()
            )
            if biased:
                quantised.bias = torch.nn.Parameter(torch.zeros(module.out_features, dtype=kind, device=weights.device))
            model.set_submodule(name, quantised)
        elif isinstance(module, torch.nn.Embedding) or name == "score":
            shape = module.weight.shape
            module.weight = torch.nn.Parameter(0.02 * torch.randn(shape, dtype=kind, device=training.device()))
        elif hasattr(module, "weight"):
            ones = torch.ones(module.weight.shape, dtype=kind, device=training.device())
            module.weight = torch.nn.Parameter(ones)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(training.device())  # its buffers were on meta
    return training.with_gradients(model)


if __name__ == "__main__":
    main()
