"""Tokens a second and peak memory of LoRA fine-tuning, beside SFTTrainer with its defaults, on the same machine.

Random weights of the shape of a published model, random pairs of about 250 tokens of very different length, padding not
counted. Both learn from the same number of pairs a step, with the same adapter, quantised or not as AugCon chooses for
the GPU. SFTTrainer's defaults: no packing, gradient checkpointing. Without a GPU only the small shape can be run, which
shows the gain of packs and of kept activations, but not the speed of a GPU.

    python benchmarks/finetune.py --shape qwen2.5-7b
    python benchmarks/finetune.py --shape qwen1.5-32b --pairs 128
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl import SFTConfig, SFTTrainer

sys.path[:0] = [str(Path(__file__).parent.parent)]

from augcon.train import base as training  # noqa: E402
from augcon.train import loop, memory  # noqa: E402
from augcon.train import sft as tuning  # noqa: E402
from augcon.train.chat import IGNORED, TrainingExample  # noqa: E402

SHAPES = {  # width, inner width, layers, heads, key and value heads, words
    "qwen1.5-32b": (5120, 27392, 64, 40, 8, 152064),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "small": (384, 1024, 8, 6, 2, 8000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    default = "qwen2.5-7b" if torch.cuda.is_available() else "small"
    parser.add_argument("--shape", choices=SHAPES, default=default)
    parser.add_argument("--pairs", type=int, default=256 if torch.cuda.is_available() else 24)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step; 4 is the paper's, 8 SFTTrainer's default")
    parser.add_argument("--times", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--only", choices=["augcon", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.shape, options.pairs, options.batch)))
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, no GPU at hand"
    print(f"{options.shape}, {options.pairs} pairs, {options.batch} a step; {machine}\n")
    print("| | tokens/s | of the first | peak memory, GiB | of the first |\n|---|---|---|---|---|")
    runs: dict[str, list[tuple[float, float]]] = {"plain": [], "augcon": []}
    for _ in range(options.times):
        for which, figures in runs.items():  # in turn, each in a process of its own
            command = [sys.executable, __file__, *sys.argv[1:], "--only", which]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {which: [statistics.median(column) for column in zip(*runs[which], strict=True)] for which in runs}
    first = medians["plain"]
    for which, name in (("plain", "SFTTrainer's defaults"), ("augcon", "AugCon")):
        speed, peak = medians[which]
        print(f"| {name} | {speed:,.0f} | {speed / first[0]:.2f} | {peak:.2f} | {peak / first[1]:.2f} |")


def measure(which: str, shape: str, number: int, batch: int) -> tuple[float, float]:
    """Tokens a second, padding not counted, and the peak memory in GiB."""
    if which == "augcon":
        training.start_processes()
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base, kept = Path(folder) / "base", math.inf
        config_of(shape).save_pretrained(base)
        quantize = "none"
        if torch.cuda.is_available():
            card, sizes = training.gpu_memory(0), memory.shape_of(base)
            quantize = memory.choose_quantization(sizes, card, 4096)
            kept = memory.most_kept(sizes, quantize, card)
        model = tuning.get_peft_model(random_model(shape, quantize), training.lora("CAUSAL_LM"))
        tokenizer = tiny_tokenizer()
        examples = datasets.Dataset.from_dict(tuning.as_columns(random_pairs(number, SHAPES[shape][-1])))
        total = sum(examples["length"])
        if which == "augcon":
            rules = loop.TrainingRules(epochs=1, batch=batch)
            none = examples.select([])
            _, words = tuning.tune(model, tokenizer, examples, none, rules, Path(folder) / "ckpts", 4096, kept)
            speed = float(words.partition(" tokens/s")[0].rpartition(" ")[2].replace(",", ""))
        else:
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
            rows = examples.remove_columns("length")
            trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
            speed = total / trainer.train().metrics["train_runtime"]
    return speed, float(loop.peak_memory().partition("memory ")[2].split()[0])


def config_of(shape: str) -> transformers.Qwen2Config:
    """The settings of a model of the shape."""
    width, inner, layers, heads, kv_heads, words = SHAPES[shape]
    return transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        use_cache=False,
    )


def random_model(shape: str, quantize: str) -> transformers.PreTrainedModel:
    """A model of random weights, each layer quantised as it is made: never whole in 16 bits where that is asked."""
    dtype = torch.bfloat16 if training.can_bf16() else torch.float32
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    if quantize == "nf4":
        quantization = training.quantization("nf4")
        model = replace_with_bnb_linear(model, ["lm_head"], quantization)
        model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            made = torch.randn(empty.shape, dtype=dtype, device=training.device()) * 0.02
            if isinstance(empty, Params4bit):
                made = Params4bit(made, compress_statistics=True, quant_type="nf4").to(training.device())
            else:
                made = torch.nn.Parameter(made + (1 if "norm" in type(module).__name__.lower() else 0))
            setattr(module, name, made.requires_grad_(False))
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
