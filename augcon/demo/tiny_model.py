"""A chat model of a few hundred thousand random parameters, made on the spot, where no real one can run.

It knows nothing and writes noise; the code that serves, scores, trains and merges it is the real one.

    python -m augcon.demo.tiny_model FOLDER
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Family(NamedTuple):
    """A family of models: its architecture in Transformers, its special tokens and their roles, its chat template."""

    architecture: str
    special: str
    roles: dict[str, str]


QWEN = Family(
    "Qwen2",
    "<|endoftext|> <|im_start|> <|im_end|>",
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": _CHATML},
)


def make_tiny_model(
    folder: Path, texts: Iterable[str], vocabulary: int = 2000, seed: int = 0, family: Family = QWEN
) -> None:
    """Writes a model with random weights, and a BPE tokenizer trained on ``texts``, to ``folder``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    architecture, special, roles = family
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special.split(), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if first := roles.get("bos_token"):
        start = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=start)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)

    transformers.set_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(wrapped)}
    marks = {name: getattr(wrapped, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {**sizes, **marks, "tie_word_embeddings": False, "dtype": "bfloat16"}
    config = getattr(transformers, f"{architecture}Config")(**settings)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = wrapped.eos_token_id
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its kernels are no concern of the user
    from datasets import load_from_disk

    bundled = load_from_disk(Path(__file__).parents[2] / "DailyM")["train"]
    make_tiny_model(Path(sys.argv[1]), filter(None, bundled["article"]))
