"""Fine-tunes the model on questions and answers: LoRA under DeepSpeed ZeRO-2 (paper 4.1).

Over the base in NF4 (QLoRA) where it does not fit on a GPU in bf16. Reads results/sft_data, or with --data any saved
dataset or .jsonl, .json, .csv or .parquet file with the fields question and answer. With --review, pairs marked as bad
in report.html are left out, and those that were edited there are taken as edited. Writes into results/, or the folder
--output: ckpts (a checkpoint for each epoch), LoRA (the adapter), log.json (the losses), loss.png, and in run.json how
it was trained. Run it again and it continues from the last checkpoint. Another base, other settings or other pairs need
another --output, or --redo to replace what is there.

    deepspeed --num_gpus 8 finetune.py
    deepspeed --num_gpus 8 finetune.py --data my_pairs.jsonl --output results/second
    deepspeed --num_gpus 8 finetune.py --review review.jsonl
"""

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from augcon.data import Pair
from augcon.errors import UserError, stage
from augcon.files import digest, new_folder, write_json
from augcon.hub import model_folder
from augcon.machine.gpus import visible_gpus
from augcon.run.pairs import PairRules, read_divided
from augcon.run.record import Record
from augcon.run.results import Results
from augcon.train.ranks import on_main, print_main, report_once
from config import Settings, load_settings, pick

if TYPE_CHECKING:
    from augcon.train.adapters import TrainedWith

STAGE = "finetune"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The pairs (their number, those held out in words, the files of their tokens), the base, and all as recorded."""

    pairs: int
    held_out: str
    files: tuple[Path, Path]  # of the pairs learnt and of those held out
    base: Path
    trained_with: "TrainedWith"
    made_with: dict[str, Any]


@stage
@report_once
def main() -> None:
    settings = load_settings(__doc__, "fine-tuning")
    output = Results(settings.output or settings.results)
    print_main(settings.describe())
    from augcon.train.base import start_processes  # slow: not for --help

    start_processes(len(visible_gpus()))
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(output.held()))
        inputs = on_main(lambda: prepare(settings, output))
        if settings.dry_run:
            on_main(lambda: inputs and room_for_activations(settings, inputs))
            return
        if inputs:
            train(settings, output, inputs)
        else:
            print_main(f"done:    {output.lora} was trained on these pairs with these settings already")
        named = ("--lora", output.lora, "--output", output.sft_model) if settings.output else ()
        print_main(f"next:    {settings.command('merge.py', *named)}")


def prepare(settings: Settings, output: Results) -> Inputs | None:
    """Reads and encodes the pairs; None where all is done. Raises UserError where something is missing or unfit."""
    from augcon.train import base as training
    from augcon.train.sft import ENCODED

    divided = read_divided(Results(settings.results), pick(PairRules, settings))
    pairs, held_out = divided.pairs, divided.at(divided.held_out)
    base = model_folder(settings.model)
    trained_with = how_loaded(settings, base)
    made_with = {
        **settings.inputs(STAGE),
        "seed": settings.seed,
        **trained_with.inputs(),
        "content of the base model's tokenizer and settings": training.companions_digest(base),
        "content of the pairs": pairs_digest(pairs),
        "content of the held-out pairs": pairs_digest(held_out),
    }
    form = "in NF4" if trained_with.quantize == "nf4" else f"in {trained_with.dtype}"
    print(
        f"input:   {len(pairs):,} pairs, {len(held_out):,} of them held out ({divided.words}); {settings.model} {form}"
    )
    if not settings.dry_run and is_done(settings, output, made_with):
        return None
    with contextlib.ExitStack() as stack:
        folder = output.checkpoints / ENCODED
        if settings.dry_run:  # which leaves nothing behind
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = folder / "learnt.arrow", folder / "held_out.arrow"
        encode(settings, base, dict(zip(files, (divided.at(divided.learnt), held_out), strict=True)))
    return Inputs(len(pairs), divided.words, files, base, trained_with, made_with)


def how_loaded(settings: Settings, base: Path) -> "TrainedWith":
    """How the base is loaded: in 4 bits as --quantize says, and with auto where a GPU has no room for it in 16."""
    from augcon.train import base as training
    from augcon.train import memory
    from augcon.train.adapters import TrainedWith

    quantize = settings.quantize
    if quantize == "auto" and training.can_bf16():
        card = training.gpu_memory(settings.gpu_memory)
        quantize = memory.choose_quantization(memory.shape_of(base), card, settings.max_tokens)
    return TrainedWith(
        base=str(base.resolve()) if base == Path(settings.model) else settings.model,
        weights=training.weights_digest(base),
        quantize="nf4" if quantize == "nf4" else "none",
        dtype="bfloat16" if training.can_bf16() else "float32",
    )


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """The digest of pairs, one by one: the JSON of their list would be larger than they."""
    return digest(*([pair.question, pair.answer] for pair in pairs))


def is_done(settings: Settings, output: Results, made_with: dict[str, Any]) -> bool:
    """Whether just this training has come to its end; else it is begun. Raises UserError where one would be lost."""
    facts = output.record.done_with(STAGE, made_with)
    if facts is not None and output.lora.exists():
        output.record.finish(STAGE, **facts)
        return True
    output.record.begin(STAGE, made_with, output.made(STAGE), settings.redo, stale=[output.checkpoints])
    return False


def encode(settings: Settings, base: Path, parts: Mapping[Path, Sequence[Pair]]) -> None:
    """Writes the tokens of pairs into files, those to learn first. Raises UserError when there is nothing to learn."""
    from augcon.train import base as training
    from augcon.train import sft
    from augcon.train.chat import load_encoder

    encoder = load_encoder(training.load_tokenizer(str(base)), base, settings.max_tokens)
    most, cut, lost = encoder.max_tokens, 0, 0
    lengths: list[int] = []
    for path, pairs in parts.items():
        written = sft.write_examples(encoder, pairs, path)
        if not written.lengths and not lengths:
            raise UserError(
                f"no pair is left to train on: {most} tokens leave no room for an answer; raise --max-tokens"
            )
        lengths, cut, lost = lengths + written.lengths, cut + written.cut, lost + written.lost
    print(
        f"tokens:  {sum(lengths):,} in all, {sum(lengths) / len(lengths):.0f} per pair, longest {max(lengths):,}; "
        f"{cut:,} answers cut at {most:,}"
        + (f"; {lost:,} pairs left out, as their questions alone are as long" if lost else "")
    )


def train(settings: Settings, output: Results, inputs: Inputs) -> None:
    """Trains the adapter and saves it."""
    from datasets import Dataset

    from augcon.train import base as training
    from augcon.train import sft
    from augcon.train.loop import TrainingRules

    kept = room_for_activations(settings, inputs)
    model = sft.load_model(inputs.base, inputs.trained_with.quantize, inputs.trained_with.base, settings.seed)
    tokenizer, rules = training.load_tokenizer(str(inputs.base)), pick(TrainingRules, settings)
    examples, held_out = (Dataset.from_file(str(file)) for file in inputs.files)
    log, words = sft.tune(model, tokenizer, examples, held_out, rules, output.checkpoints, settings.max_tokens, kept)
    print_main(f"trained: {words}")
    on_main(lambda: save(output, inputs, model, log))


def room_for_activations(settings: Settings, inputs: Inputs) -> float:
    """The tokens of the largest pass whose activations can be kept, by estimate; prints what the memory is for."""
    from augcon.train import base as training
    from augcon.train import memory

    if not training.can_bf16():
        return 0 if training.device().type == "cuda" else math.inf
    quantize, shape = inputs.trained_with.quantize, memory.shape_of(inputs.base)
    card = training.gpu_memory(settings.gpu_memory)
    kept = memory.most_kept(shape, quantize, card)
    print_main(
        f"memory:  weights and adapter take about {memory.estimate(shape, quantize, 0, keep=True) / 2**30:.0f} of "
        f"{card / 2**30:.0f} GiB by estimate; passes of up to {kept:,} tokens keep their activations"
    )
    return kept


def save(output: Results, inputs: Inputs, model: Any, log: list[dict[str, Any]]) -> None:
    """Writes the log, the picture and the adapter, with a copy of the record beside it, and prints the figures."""
    losses = [row["loss"] for row in log if "loss" in row]
    held_out = [row["eval_loss"] for row in log if "eval_loss" in row]
    facts = {
        "pairs": inputs.pairs,
        "held_out": inputs.held_out,
        "loss": losses[-1] if losses else None,
        "held_out_loss": held_out[-1] if held_out else None,
    }
    from augcon.train.sft import ENCODED, draw_losses

    write_json(output.log, log)
    draw_losses(log, output.loss_plot)
    with new_folder(output.lora) as folder:
        model.save_pretrained(str(folder))
        copy = Record(folder)
        copy.begin(STAGE, inputs.made_with, made=[], redo=False)
        copy.finish(STAGE, **facts)
    shutil.rmtree(output.checkpoints / ENCODED)
    output.record.finish(STAGE, **facts)
    if losses:
        seen = f"; held out, from the start on: {' '.join(f'{loss:.3f}' for loss in held_out)}" if held_out else ""
        print(f"loss:    training {losses[0]:.3f} at first, {losses[-1]:.3f} at last{seen}")
    kept = len(list(output.checkpoints.glob("checkpoint-*")))
    print(f"made:    {output.lora}, {output.log}, {output.loss_plot}, {output.checkpoints} ({kept} epochs)")


if __name__ == "__main__":
    main()
