"""Fine-tunes the model on the pairs of results/sft_data: QLoRA under DeepSpeed ZeRO-2 (paper 4.1).

Reads results/sft_data. Writes into results/: ckpts (a checkpoint an epoch), LoRA (the adapter, and how it was
trained, for merge.py), log.json (the losses) and loss.png. Run it again and it goes on at the last checkpoint.

    deepspeed --num_gpus 8 finetune.py
"""

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import datasets

from augcon.errors import UserError, one_line, stage
from augcon.run.results import Results
from augcon.train import base as training
from augcon.train import sft as tuning
from augcon.train.adapters import TrainedWith, companions_digest, fingerprint, model_folder
from augcon.train.chat import Encoder, Example, hold_out, load_encoder
from augcon.train.ranks import on_main, one_voice, processes, tell
from config import Settings, load_settings


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What there is to train, and on what: the pairs, which of them are held out, the base and what it is called."""

    pairs: list[tuple[str, str]]
    held_out: list[int]
    base: Path
    trained_with: TrainedWith
    made_of: dict[str, Any]
    finished: bool


@stage
@one_voice
def main() -> None:
    settings = load_settings(__doc__)
    results = Results(settings.results)
    tell(settings.describe())
    training.start_processes()
    with contextlib.ExitStack() as held:

        def read() -> Inputs:
            held.enter_context(results.held())
            return read_inputs(settings, results)

        inputs = on_main(read)
        if inputs.finished:
            tell(f"done:    {results.lora} is made of these pairs already; merge.py comes next")
            return
        tokenizer = training.load_tokenizer(str(inputs.base))
        encoder, warning = load_encoder(tokenizer, inputs.base, settings.max_tokens)
        tell(f"note:    {warning}") if warning else None
        examples, held_out = encode(encoder, inputs)
        model = tuning.load_model(inputs.base, inputs.trained_with.quantize, inputs.trained_with.base, settings.seed)
        rules = tuning.TuningRules(settings.epochs, settings.batch, settings.learning_rate, settings.seed)
        tuned = tuning.tune(model, tokenizer, examples, held_out, rules, results.checkpoints, inputs.made_of)
        on_main(lambda: save(results, inputs, model, tuned))


def read_inputs(settings: Settings, results: Results) -> Inputs:
    """The pairs and the base, on record. Raises UserError where something is missing or has changed."""
    pairs = read_sft_data(results)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
    base = model_folder(settings.model)
    trained_with = TrainedWith(
        base=str(base.resolve()) if base == Path(settings.model) else settings.model,
        fingerprint=fingerprint(base),
        quantize="nf4" if training.quantization(settings.quantize) else "none",
        dtype="bfloat16" if training.can_bf16() else "float32",
    )
    origins = list(results.read_lines(results.sft_origins, "step3_gen_a.py")) if results.sft_origins.exists() else []
    if [row.get("question") for row in origins] != [question for question, _ in pairs]:
        origins = []  # of other pairs
    held_out, how = hold_out(len(pairs), settings.held_out, origins, settings.seed)
    made_of = {name: value for name, (step, value) in settings.made_with().items() if step == 4} | {
        "quantize": trained_with.quantize,
        "seed of the fine-tuning": settings.seed,
        "content of sft_data": digest,
        "content of the base model": trained_with.fingerprint,
        "content of the base model's tokenizer and settings": companions_digest(base),
        "content of the held-out pairs": hashlib.sha256(repr(held_out).encode()).hexdigest()[:16],
    }
    finished = results.lora.exists() and results.finished().get("step 4") == made_of
    if not finished:
        of_this_run = {**made_of, "processes of the fine-tuning": processes()}
        results.settle(4, {name: (4, value) for name, value in of_this_run.items()}, since=4)
    form = "in NF4" if trained_with.quantize == "nf4" else f"in {trained_with.dtype}"
    print(f"input:   {len(pairs):,} pairs, {len(held_out):,} of them held out ({how}); {settings.model} {form}")
    return Inputs(pairs, held_out, base, trained_with, made_of, finished)


def read_sft_data(results: Results) -> list[tuple[str, str]]:
    """The questions and answers. Raises UserError when they are not there or not of that shape."""
    if not results.sft_data.exists():
        raise UserError(f"there is no {results.sft_data}; run the steps before first (bash augcon.sh)")
    try:
        rows = datasets.load_from_disk(results.sft_data)
        pairs = list(zip(rows["question"], rows["answer"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{results.sft_data} is no dataset of question and answer that can be read: {one_line(error)}"
        ) from error
    for number, pair in enumerate(pairs):
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise UserError(f"row {number} of {results.sft_data} has no question or no answer; remove it")
    if not pairs:
        raise UserError(f"{results.sft_data} is empty")
    return pairs


def encode(encoder: Encoder, inputs: Inputs) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those held out. Raises UserError when there is nothing to train on."""
    encoded = [encoder(question, answer) for question, answer in inputs.pairs]
    held = set(inputs.held_out)
    examples = [example for place, example in enumerate(encoded) if example and place not in held]
    held_out = [example for place, example in enumerate(encoded) if example and place in held]
    lengths = [len(example.input_ids) for example in examples + held_out]
    cut, lost = sum(example.cut for example in examples + held_out), encoded.count(None)
    if not examples:
        raise UserError(f"no pair is left to train on: {encoder.max_tokens} tokens have no room for an answer")
    tell(
        f"tokens:  {sum(lengths):,} in all, {sum(lengths) / len(lengths):.0f} a pair, longest {max(lengths):,}; "
        f"{cut:,} answers cut at {encoder.max_tokens:,}"
        + (f"; {lost:,} pairs left out, whose questions alone are as long" if lost else "")
    )
    return examples, held_out


def save(results: Results, inputs: Inputs, model: tuning.PeftModel, tuned: tuning.Tuned) -> None:
    """Writes the adapter, the log and the picture, and tells the figures."""
    results.write_json(results.log, tuned.log)
    unfinished = results.lora.with_name(results.lora.name + ".unfinished")
    try:
        inputs.trained_with.save(results.checkpoints)
        tuning.draw_losses(tuned.log, results.loss_plot)
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        inputs.trained_with.save(unfinished)
        shutil.rmtree(results.lora, ignore_errors=True)
        unfinished.replace(results.lora)
    except OSError as error:
        raise UserError(f"{results.lora} cannot be written: {one_line(error)}") from error
    results.finish(4, **inputs.made_of)
    losses = [row["loss"] for row in tuned.log if "loss" in row]
    held_out = [row["eval_loss"] for row in tuned.log if "eval_loss" in row]
    print(f"packing: {tuned.packing}")
    print(f"trained: {tuned.speed}")
    if losses:
        print(f"loss:    training {losses[0]:.3f} at first, {losses[-1]:.3f} at last", end="")
        print("; held out, from the start on: " + " ".join(f"{loss:.3f}" for loss in held_out) if held_out else "")
    kept = len(list(results.checkpoints.glob("checkpoint-*")))
    print(f"made:    {results.lora}, {results.log}, {results.loss_plot}, {results.checkpoints} ({kept} epochs)")


if __name__ == "__main__":
    main()
