"""Families of models besides the demonstration's: their special tokens, and their chat templates in short."""

from augcon.demo.tiny_model import QWEN, Family

_INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_HEADERS = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_OLDER = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _INST}
FAMILIES = {  # Llama and the first Mistrals have no token to pad with
    "qwen2": QWEN,
    "llama2": Family("Llama", "<unk> <s> </s>", _OLDER),
    "llama3": Family(
        "Llama",
        "<|begin_of_text|> <|reserved_special_token_0|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": _HEADERS},
    ),
    "mistral": Family("Mistral", "<unk> <s> </s>", _OLDER),
}
