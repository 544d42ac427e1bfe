"""Merges the fine-tuned adapter into its base model, into the very weights that the training saw.

Reads results/LoRA and the base model. Writes results/sft_model, which vLLM or any other server can serve. Goes
through the model one weight file at a time. Another adapter can be merged too; if it does not say how it was
trained, say whether its base was in 4 bits (--quantize nf4) or not (--quantize none).

    python merge.py
    python merge.py --lora my-adapter --base Qwen/Qwen2.5-7B-Instruct --output my-model --quantize nf4
"""

import contextlib
import json
import time
from pathlib import Path

import config
from augcon import progress
from augcon.errors import UserError, stage
from augcon.run.results import Results
from augcon.train import base as training
from augcon.train.adapters import Adapter, TrainedWith, base_shards, model_folder, read_adapter, weights_trained_over
from augcon.train.fidelity import divergence
from augcon.train.merge import MERGED_FROM, made_of, merge
from config import load_settings

# Nats per token. Rounding to 16 bits costs less than a tenth of it; an adapter over the wrong weights, more.
LARGEST_DIVERGENCE = 2e-3


@stage
def main() -> None:
    settings = load_settings(__doc__)
    results = Results(settings.results)
    if not settings.lora and not results.lora.exists():
        raise UserError(f"there is no {results.lora}; run finetune.py first, or name an adapter with --lora")
    with contextlib.nullcontext() if settings.lora and settings.output else results.held():
        adapter = read_adapter(Path(settings.lora) if settings.lora else results.lora)
        name = settings.base or (adapter.trained_with.base if adapter.trained_with else adapter.base) or settings.model
        base = model_folder(name)
        trained = weights_trained_over(adapter, base, settings.quantize)
        output = Path(settings.output) if settings.output else results.sft_model
        form = "in NF4" if trained.quantize == "nf4" else "as it is"
        print(f"adapter: {adapter.folder}, {len(adapter.factors):,} layers, trained over {name!r} {form}")
        if adapter.base not in ("", name, str(base)):
            print(f"note:    the adapter itself names {adapter.base!r} as its base; {name!r} is used")
        if made_already(output, adapter, base, trained):
            print(f"merged:  {output} is made of this adapter already")
        else:
            write(adapter, base, trained, output)
        if settings.check:
            check(adapter, base, trained, output)


def made_already(output: Path, adapter: Adapter, base: Path, trained: TrainedWith) -> bool:
    """Whether the output is made of the same parts. Raises UserError when it is something else than a merged model."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        recorded = json.loads((output / MERGED_FROM).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{output} exists and was not made by merge.py; name another folder with --output") from error
    return recorded == made_of(adapter, base, trained)


def write(adapter: Adapter, base: Path, trained: TrainedWith, output: Path) -> None:
    """Merges, and tells the figures."""
    started = time.monotonic()
    with progress.bar(sum(map(len, base_shards(base).values())), "merge", "tensors") as bar:
        quantized, files = merge(adapter, base, trained, output, training.device(), bar.update)
    through = f", over {quantized:,} layers as NF4 gives them back" if quantized else ""
    print(f"merged:  all {len(adapter.factors):,} layers of the adapter{through}; {time.monotonic() - started:.0f} s")
    print(f"made:    {output}, {files:,} weight file{'s' * (files > 1)}")


def check(adapter: Adapter, base: Path, trained: TrainedWith, output: Path) -> None:
    """Compares what the merged model says next with what the trained network says. Raises UserError when it differs."""
    examples = [Path(config.__file__).with_name(name) for name in ("qa_examples.jsonl", "qa_examples_en.jsonl")]
    rows = [json.loads(line) for file in examples for line in file.read_text(encoding="utf-8").splitlines()]
    nats, tokens = divergence(output, base, adapter.folder, trained, [row["question"] + row["answer"] for row in rows])
    print(f"check:   KL divergence from base and adapter {nats:.1e} nats per token, over {tokens:,} tokens")
    if not nats < LARGEST_DIVERGENCE:
        raise UserError(
            f"{output} is not what was trained: KL {nats:.1e} is above {LARGEST_DIVERGENCE:.0e} nats per token. Was "
            f"the adapter trained over this base, with --quantize {trained.quantize}?"
        )


if __name__ == "__main__":
    main()
