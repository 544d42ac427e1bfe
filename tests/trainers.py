"""How other trainers read an export: each function is given its folder and a tokenizer's, and runs in a process.

They are not among the requirements of the tests, so a test of one is skipped where it is not installed.
"""

import importlib.machinery
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

Turns = list[dict[str, str]]


def llamafactory(folder: Path, _: Path) -> tuple[list[Turns], list[Turns]]:
    stub = types.ModuleType("torchaudio")  # it wants this for sound alone
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stub
    from llamafactory.data.loader import _get_merged_dataset

    unset = dict.fromkeys(("max_samples", "tokenized_path", "interleave_probs", "cache_dir", "hf_hub_token"))
    given = {"streaming": False, "preprocessing_num_workers": 1, "overwrite_cache": True, "mix_strategy": "concat"}
    arguments = types.SimpleNamespace(
        **unset, **given, dataset_dir=str(folder), media_dir="", local_process_index=0, should_log=False, seed=1
    )

    def read(name: str) -> list[Turns]:
        rows = _get_merged_dataset([name], arguments, arguments, arguments, "sft")
        systems = [[{"role": "system", "content": row["_system"]}] if row["_system"] else [] for row in rows]
        return [system + row["_prompt"] + row["_response"] for system, row in zip(systems, rows, strict=True)]

    return read("augcon_train"), read("augcon_held_out")


def swift(folder: Path, _: Path) -> tuple[list[Turns], list[Turns]]:
    from swift.dataset import load_dataset

    files = [next(folder.glob(f"{name}.*")) for name in ("train", "held_out")]
    train, test = (load_dataset([str(file)], split_dataset_ratio=0.0, shuffle=False)[0] for file in files)
    return [row["messages"] for row in train], [row["messages"] for row in test]


def unsloth(folder: Path, _: Path) -> tuple[list[Turns], list[Turns]]:
    from unsloth.chat_templates import standardize_sharegpt  # isort: skip, as it comes before what it patches
    from datasets import load_dataset

    data = load_dataset(str(folder))
    parts = [standardize_sharegpt(data[split], num_proc=1) for split in ("train", "validation")]
    train, test = ([row.get("messages") or row["conversations"] for row in part] for part in parts)
    return train, test


def axolotl(folder: Path, tokenizer: Path) -> tuple[list[Turns], list[Turns]]:
    """With the lines that the card tells. It gives tokens: what carries loss is the answer."""
    import yaml
    from axolotl.utils.data.sft import _load_and_process_single_dataset
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    card = (folder / "README.md").read_text(encoding="utf-8")
    told = yaml.safe_load(re.search(r"Axolotl:\n\n```yaml\n(.*?)```", card, re.DOTALL)[1])
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = DictDefault({**told, "sequence_len": 9999, "chat_template": "tokenizer_default", "dataset_num_proc": 1})
    os.chdir(folder.parent)

    def turns(row: dict[str, list[int]]) -> Turns:
        answer = words.decode([label for label in row["labels"] if label != -100])
        whole = words.decode(row["input_ids"])
        assert whole.rstrip().endswith(answer.rstrip())
        asked = re.findall(r"<\|im_start\|>(system|user)\n(.*?)<\|im_end\|>\n(?=<\|im_start\|>)", whole, re.DOTALL)
        said = [*asked, ("assistant", answer.removesuffix("<|im_end|>"))]
        return [{"role": role, "content": text} for role, text in said]

    def read(entry: Any) -> list[Turns]:
        return list(map(turns, _load_and_process_single_dataset(entry, config, words, "train", 42)[0]))

    return read(config.datasets[0]), read(config.test_datasets[0])


if __name__ == "__main__":
    name, folder, tokenizer, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(globals()[name](Path(folder), Path(tokenizer))))
