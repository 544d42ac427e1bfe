"""Merges the fine-tuned adapter into its base model, into the very weights that training saw.

Reads results/LoRA, or any adapter in a folder or on the hub, and the base model. Writes results/sft_model, or the
folder --output, which vLLM or any other server can serve, one weight file at a time. An adapter without a record of
its training can be merged too: add --quantize nf4 if its base was in 4 bits, else --quantize none.

    python merge.py
    python merge.py --lora my-adapter --base Qwen/Qwen2.5-7B-Instruct --output my-model --quantize nf4
"""

import contextlib
import time
from pathlib import Path

from augcon.errors import UserError, stage
from augcon.files import new_folder, reading
from augcon.hub import model_folder
from augcon.run.record import Record
from augcon.run.results import Results
from config import load_settings

STAGE = "merge"


@stage
def main() -> None:
    settings = load_settings(__doc__, "merging", "fine-tuning")
    from augcon.train.adapters import TrainedWith, adapter_folder, read_adapter, trained_over  # slow: not for --help
    from augcon.train.base import companions_digest
    from augcon.train.merge import merge

    here = Path(settings.lora) if settings.lora else Results(settings.results).lora
    if not settings.lora and not here.exists():
        raise UserError(f"there is no {here}; run finetune.py first, or name an adapter with --lora")
    folder = adapter_folder(settings.lora) if settings.lora else here
    # A checkpoint of finetune.py has its record two folders up.
    run = folder.absolute().parent.parent if folder.absolute().match("ckpts/checkpoint-*") else None
    results = Results((run or folder.parent) if folder == here else settings.results)  # not in the hub's cache
    with contextlib.nullcontext() if settings.lora and settings.output else results.held():
        adapter = read_adapter(folder)
        record = Record(run or folder)
        made = record.stages().get("finetune")
        with reading(record.path, "finetune.py"):
            known = TrainedWith.from_inputs(made.made_with) if made else None
        name = settings.base or (known.base if known else adapter.base) or settings.model
        base = model_folder(name)
        trained = trained_over(adapter, known, base, settings.quantize)
        output = Path(settings.output) if settings.output else results.sft_model
        form = "in NF4" if trained.quantize == "nf4" else "as it is"
        print(f"adapter: {here}, {len(adapter.factors):,} layers, trained over {name!r} {form}")
        if adapter.base not in ("", name, str(base)):
            print(f"note:    the adapter itself names {adapter.base!r} as its base; {name!r} is used")
        inputs = {**trained.inputs(), "adapter": adapter.digest, "companions": companions_digest(base)}
        if is_done(output, inputs):
            print(f"merged:  {output} is made of this adapter already")
        else:
            started = time.monotonic()
            with new_folder(output) as unfinished:
                quantized, files = merge(adapter, base, trained, unfinished)
                copy = Record(unfinished)
                copy.begin(STAGE, inputs, made=[], redo=False)
                copy.finish(STAGE)
            through = f", over {quantized:,} layers dequantised from NF4" if quantized else ""
            seconds = time.monotonic() - started
            print(f"merged:  all {len(adapter.factors):,} layers of the adapter{through}; {seconds:.0f} s")
            print(f"made:    {output}, {files:,} weight file{'s' * (files > 1)}")
        print(f"next:    {settings.command('serve.py', '--model', output)}")


def is_done(output: Path, inputs: dict[str, str]) -> bool:
    """Whether the output is made of the same parts. Raises UserError when it is something else than a merged model."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    record = Record(output)
    if STAGE not in record.stages():
        raise UserError(f"{output} exists and was not made by merge.py; name another folder with --output")
    return record.done_with(STAGE, inputs) is not None


if __name__ == "__main__":
    main()
