"""A chat model of a few hundred thousand random parameters, made on the spot, where no real one can run.

It knows nothing and writes noise; the code that serves, scores, trains and merges it is the real one.

    python -m augcon.tiny_model FOLDER
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from augcon.errors import UserError, one_line

# The turns of ChatML, as Qwen has them.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, texts: Iterable[str], vocabulary: int = 2000, seed: int = 0) -> None:
    """Writes a Qwen2 model with random weights, and a BPE tokenizer trained on ``texts``, to ``folder``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT_TEMPLATE
    )

    transformers.set_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(wrapped),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
        dtype="bfloat16",
    )
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = wrapped.eos_token_id
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m augcon.tiny_model FOLDER")
    from augcon.corpus import read_corpus

    bundled = Path(__file__).parent.parent / "DailyM"
    try:
        make_tiny_model(Path(sys.argv[1]), (text for text in read_corpus(str(bundled), "article") if text))
    except (UserError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
