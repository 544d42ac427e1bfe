"""Tokens a second and peak memory of QLoRA fine-tuning, beside SFTTrainer as it comes (no packing) on the same machine.

Random weights in NF4 of the shape of a published model, random pairs of about 250 tokens of very different length,
the same number of pairs a step. Without a GPU only the tiny shape can run, and its figures say little.

    python benchmarks/finetune.py --shape qwen2.5-7b
    python benchmarks/finetune.py --shape qwen1.5-32b --pairs 128
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl import SFTConfig, SFTTrainer

sys.path[:0] = [str(Path(__file__).parent.parent)]

from augcon.train import base as training  # noqa: E402
from augcon.train import loop  # noqa: E402
from augcon.train import sft as tuning  # noqa: E402
from augcon.train.chat import IGNORED, TrainingExample  # noqa: E402

SHAPES = {  # width, inner width, layers, heads, key and value heads, words
    "qwen1.5-32b": (5120, 27392, 64, 40, 8, 152064),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "tiny": (128, 256, 2, 4, 2, 2000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    default = "qwen2.5-7b" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--shape", choices=SHAPES, default=default)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step; 8 is SFTTrainer's default")
    parser.add_argument("--only", choices=["augcon", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.shape, options.pairs, options.batch)))
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, no GPU at hand"
    print(f"{options.shape}, NF4, {options.pairs} pairs, {options.batch} a step; {machine}\n")
    print("| | tokens/s | of the first | peak memory |\n|---|---|---|---|")
    first = None
    for which, name in (("plain", "SFTTrainer as it comes, no packing"), ("augcon", "AugCon")):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which]  # each in a process of its own
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        speed, memory = json.loads(done.stdout.splitlines()[-1])
        first = first or speed
        print(f"| {name} | {speed:,.0f} | {speed / first:.2f} | {memory.partition('peak ')[2]} |", flush=True)


def measure(which: str, shape: str, number: int, batch: int) -> tuple[float, str]:
    """Tokens a second, padding not counted, and the peak memory in words."""
    if which == "augcon":
        training.start_processes()
    transformers.set_seed(0)
    model = tuning.get_peft_model(random_nf4(shape), training.lora("CAUSAL_LM"))
    tokenizer = tiny_tokenizer()
    examples = random_pairs(number, SHAPES[shape][-1])
    with tempfile.TemporaryDirectory() as folder:
        if which == "augcon":
            rules = loop.TrainingRules(epochs=1, batch=batch)
            _, words = tuning.tune(model, tokenizer, examples, [], rules, Path(folder) / "ckpts")
            speed = words.partition(" tokens/s")[0].rpartition(" ")[2]
            return float(speed.replace(",", "")), loop.peak_memory()
        config = SFTConfig(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            bf16=training.can_bf16(),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = tuning.as_dataset(examples)
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        seconds = trainer.train().metrics["train_runtime"]
        return sum(len(example.input_ids) for example in examples) / seconds, loop.peak_memory()


def random_nf4(shape: str) -> transformers.PreTrainedModel:
    """A model of random weights, each layer quantised as it is made: never whole in 16 bits."""
    width, inner, layers, heads, kv_heads, words = SHAPES[shape]
    config = transformers.Qwen2Config(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    dtype = torch.bfloat16 if training.can_bf16() else torch.float32
    quantization = training.quantization("nf4")
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = replace_with_bnb_linear(model, ["lm_head"], quantization)
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            made = torch.randn(empty.shape, dtype=dtype, device=training.device()) * 0.02
            if isinstance(empty, Params4bit):
                made = Params4bit(made, compress_statistics=True, quant_type="nf4").to(training.device())
            else:
                made = torch.nn.Parameter(made + (1 if "norm" in type(module).__name__.lower() else 0))
            setattr(module, name, made.requires_grad_(False))
    model.is_loaded_in_4bit = True
    model.config.quantization_config = quantization
    return training.with_gradients(model.to(training.device()))


def tiny_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Any tokenizer: the pairs are tokens already, only the pad token is asked for."""
    from augcon.demo.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder) / "tiny", ["any text"], vocabulary=300)
        return training.load_tokenizer(str(Path(folder) / "tiny"))


def random_pairs(number: int, words: int) -> list[TrainingExample]:
    """Pairs of about 250 tokens, a fifth of them the question, some ten times as long as others."""
    chance = random.Random(0)
    examples = []
    for _ in range(number):
        length = min(1000, max(30, round(chance.lognormvariate(5.3, 0.6))))
        ids = [chance.randrange(10, words) for _ in range(length)]
        examples.append(TrainingExample(ids, [IGNORED] * (length // 5) + ids[length // 5 :]))
    return examples


if __name__ == "__main__":
    main()
