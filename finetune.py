"""Fine-tunes the model on questions and answers: QLoRA under DeepSpeed ZeRO-2 (paper 4.1).

Reads results/sft_data, or with --data any saved dataset or .jsonl, .json, .csv or .parquet file with the fields
question and answer. Writes into results/, or the folder --output: ckpts (a checkpoint for each epoch), LoRA (the
adapter), log.json (the losses), loss.png, and in run.json how it was trained. Run it again and it continues from the
last checkpoint. Another base, other settings or other pairs need another --output, or --redo to replace what is there.

    deepspeed --num_gpus 8 finetune.py
    deepspeed --num_gpus 8 finetune.py --data my_pairs.jsonl --output results/second
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from augcon.data import Pair
from augcon.errors import UserError, stage
from augcon.files import digest, new_folder, read_lines, write_json
from augcon.hub import model_folder
from augcon.machine.gpus import visible_gpus
from augcon.run.corpus import read_all
from augcon.run.record import Record
from augcon.run.results import Results
from augcon.train import base as training
from augcon.train import loop, sft
from augcon.train.adapters import TrainedWith
from augcon.train.chat import ChatEncoder, TrainingExample, load_encoder
from augcon.train.ranks import on_main, print_main, report_once
from config import Settings, load_settings, pick

STAGE = "finetune"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is read of a line of sft_origins.jsonl: the text that a question is about."""

    question: str
    article: int | None = None
    root: int | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The pairs to learn from and those held out, the base, and all inputs as they are recorded."""

    learnt: list[Pair]
    held_out: list[Pair]
    held_out_words: str
    base: Path
    trained_with: TrainedWith
    made_with: dict[str, Any]


@stage
@report_once
def main() -> None:
    settings = load_settings(__doc__, "fine-tuning")
    output = Results(settings.output or settings.results)
    print_main(settings.describe())
    training.start_processes(len(visible_gpus()))
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(output.held()))
        inputs = on_main(lambda: read_inputs(settings))
        if on_main(lambda: is_done(settings, output, inputs)):
            print_main(f"done:    {output.lora} was trained on these pairs with these settings already")
        else:
            train(settings, output, inputs)
        named = ("--lora", output.lora, "--output", output.sft_model) if settings.output else ()
        print_main(f"next:    {settings.command('merge.py', *named)}")


def read_inputs(settings: Settings) -> Inputs:
    """The pairs and the base. Raises UserError where something is missing or unfinished."""
    results = Results(settings.results)
    pairs = read_data(settings, results)
    base = model_folder(settings.model)
    trained_with = TrainedWith(
        base=str(base.resolve()) if base == Path(settings.model) else settings.model,
        weights=training.weights_digest(base),
        quantize="nf4" if training.quantization(settings.quantize) else "none",
        dtype="bfloat16" if training.can_bf16() else "float32",
    )
    # Questions about one text have much in common; of fewer than 20 texts, one would be too large a part of the data.
    units = {**texts_of(pairs, results), "single pairs, as their texts are few or not known": range(len(pairs))}
    learnt, held_out, words = loop.hold_out(pairs, units, settings.held_out, settings.seed, many=20)
    made_with = {
        **settings.inputs(STAGE),
        "seed": settings.seed,
        **trained_with.inputs(),
        "content of the base model's tokenizer and settings": training.companions_digest(base),
        "content of the pairs": digest([dataclasses.astuple(pair) for pair in pairs]),
        "content of the held-out pairs": digest([dataclasses.astuple(pair) for pair in held_out]),
    }
    form = "in NF4" if trained_with.quantize == "nf4" else f"in {trained_with.dtype}"
    print(f"input:   {len(pairs):,} pairs, {len(held_out):,} of them held out ({words}); {settings.model} {form}")
    return Inputs(learnt, held_out, words, base, trained_with, made_with)


def read_data(settings: Settings, results: Results) -> list[Pair]:
    """The pairs of --data or of the results folder. Raises UserError when they are not there or not complete."""
    source = Path(settings.data).expanduser() if settings.data else results.sft_data
    if not source.exists():
        raise UserError(f"there is no {source}; run bash augcon.sh first, or name the pairs with --data")
    unfinished = "step 3" in results.record.stages() and results.record.finished("step 3") is None
    if unfinished and source.resolve() == results.sft_data.resolve():
        raise UserError(f"step 3 in {results.folder} has not finished, so {source} is not up to date; run it first")
    return read_all(str(source), Pair, "--data")


def texts_of(pairs: list[Pair], results: Results) -> dict[str, Sequence[int | None]]:
    """The article and root context of every pair; None where sft_origins.jsonl of the results folder has none."""
    rows = read_lines(results.sft_origins, Origin, "step3_gen_a.py") if results.sft_origins.exists() else ()
    origins = {row.question: row for row in rows}
    mine = [origins.get(pair.question, Origin(pair.question)) for pair in pairs]
    return {"articles": [row.article for row in mine], "root contexts": [row.root for row in mine]}


def is_done(settings: Settings, output: Results, inputs: Inputs) -> bool:
    """Whether just this training has come to its end; else it is begun. Raises UserError where one would be lost."""
    facts = output.record.done_with(STAGE, inputs.made_with)
    if facts is not None and output.lora.exists():
        output.record.finish(STAGE, **facts)
        return True
    if not output.record.begin(STAGE, inputs.made_with, output.made(STAGE), settings.redo):
        shutil.rmtree(output.checkpoints, ignore_errors=True)  # of another training
    return False


def train(settings: Settings, output: Results, inputs: Inputs) -> None:
    """Trains the adapter and saves it."""
    tokenizer = training.load_tokenizer(str(inputs.base))
    encoder = load_encoder(tokenizer, inputs.base, settings.max_tokens)
    examples, held_out = encode(encoder, inputs)
    model = sft.load_model(inputs.base, inputs.trained_with.quantize, inputs.trained_with.base, settings.seed)
    rules = pick(loop.TrainingRules, settings)
    log, words = sft.tune(model, tokenizer, examples, held_out, rules, output.checkpoints)
    print_main(f"trained: {words}")
    on_main(lambda: save(output, inputs, model, log))


def encode(encoder: ChatEncoder, inputs: Inputs) -> list[list[TrainingExample]]:
    """The examples to train on and those held out. Raises UserError when there is nothing to train on."""
    encoded = [[row for pair in pairs if (row := encoder(pair))] for pairs in (inputs.learnt, inputs.held_out)]
    most, rows = encoder.max_tokens, [*encoded[0], *encoded[1]]
    if not encoded[0]:
        raise UserError(f"no pair is left to train on: {most} tokens leave no room for an answer; raise --max-tokens")
    lengths = [len(row.input_ids) for row in rows]
    lost = len(inputs.learnt) + len(inputs.held_out) - len(rows)
    print_main(
        f"tokens:  {sum(lengths):,} in all, {sum(lengths) / len(lengths):.0f} per pair, longest {max(lengths):,}; "
        f"{sum(row.cut for row in rows):,} answers cut at {most:,}"
        + (f"; {lost:,} pairs left out, as their questions alone are as long" if lost else "")
    )
    return encoded


def save(output: Results, inputs: Inputs, model: Any, log: list[dict[str, Any]]) -> None:
    """Writes the log, the picture and the adapter, with a copy of the record beside it, and prints the figures."""
    losses = [row["loss"] for row in log if "loss" in row]
    held_out = [row["eval_loss"] for row in log if "eval_loss" in row]
    facts = {
        "pairs": len(inputs.learnt) + len(inputs.held_out),
        "held_out": inputs.held_out_words,
        "loss": losses[-1] if losses else None,
        "held_out_loss": held_out[-1] if held_out else None,
    }
    write_json(output.log, log)
    sft.draw_losses(log, output.loss_plot)
    with new_folder(output.lora) as folder:
        model.save_pretrained(str(folder))
        copy = Record(folder)
        copy.begin(STAGE, inputs.made_with, made=[], redo=False)
        copy.finish(STAGE, **facts)
    output.record.finish(STAGE, **facts)
    if losses:
        seen = f"; held out, from the start on: {' '.join(f'{loss:.3f}' for loss in held_out)}" if held_out else ""
        print(f"loss:    training {losses[0]:.3f} at first, {losses[-1]:.3f} at last{seen}")
    kept = len(list(output.checkpoints.glob("checkpoint-*")))
    print(f"made:    {output.lora}, {output.log}, {output.loss_plot}, {output.checkpoints} ({kept} epochs)")


if __name__ == "__main__":
    main()
