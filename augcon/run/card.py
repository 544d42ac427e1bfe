"""The dataset card of an export: what the hub reads at its top, and what people read below."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from augcon.files import digest, file_digest, new_file
from augcon.run.record import CHAIN
from augcon.run.report import format_counts
from augcon.run.results import Results

_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
_LARGEST = "1M<n<10M"


def write_card(
    path: Path, files: Sequence[tuple[str, str, int]], types: Any, languages: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Writes the card beside the files: of each its split, name and rows; ``types``: datasets.Features of all."""
    from datasets.info import DatasetInfo, DatasetInfosDict
    from huggingface_hub import DatasetCard, DatasetCardData

    rows = sum(number for _, _, number in files)
    data = DatasetCardData(
        license="other",
        language=list(languages),
        size_categories=[next((name for most, name in _SIZES.items() if rows < most), _LARGEST)],
        task_categories=["text-generation", "question-answering"],
        tags=["augcon", "synthetic", "sft"],
        pretty_name=facts["title"],
        # The datasets library keeps what it has read, and knows it again by this entry: without the digest, it would
        # take another export under the same name for this one.
        configs=[
            {
                "config_name": "default",
                "description": f"files {digest(*(file_digest(path.with_name(file)) for _, file, _ in files))}",
                "data_files": [{"split": split, "path": file} for split, file, _ in files],
            }
        ],
    )
    # Without the types, a column that is empty in one file would have another type there than in the other.
    DatasetInfosDict({"default": DatasetInfo(features=types)}).to_dataset_card_data(data)
    template = Path(__file__).with_name("card.md.jinja")
    with new_file(path) as file:
        file.write(
            str(DatasetCard.from_template(data, template_path=str(template), files=files, **facts)).rstrip() + "\n"
        )


def describe_run(results: Results, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The corpus, and a table of what the record and the figures tell: models, settings, what became of the queries."""
    stages = results.record.stages()
    made_with = {name: of for step in CHAIN if step in stages for name, of in stages[step].made_with.items()}
    served = [str(stages[step].made_with.get("model served") or "") for step in ("step 1", "step 3") if step in stages]
    changed = [f"{name}={of}" for name, of in made_with.items() if of != defaults.get(name, of) and "model" not in name]
    figures = results.read_figures()
    step_1, step_2, step_3 = (figures.get(f"step {number}", {}) for number in (1, 2, 3))
    fates, dropped = Counter(step_2.get("fates", {})), Counter(step_3.get("dropped", {}))
    table = {
        "model that asked and answered": ", ".join(dict.fromkeys(public_name(name) for name in served if name)),
        "base of the scorer": public_name(str(made_with.get("scorer_model") or "")),
        "settings that are not the default": ", ".join(changed),
        "root contexts": step_1.get("roots"),
        "queries": step_1.get("queries"),
        "of them kept": fates.pop("kept", None),
        "left out": format_counts(fates),
        "answers dropped": format_counts(dropped),
    }
    cut = stages["corpus as cut"].made_with if "corpus as cut" in stages else {}
    corpus = ", ".join(map(public_name, str(cut.get("corpus", "")).split(",")))
    demo = any("not-an-llm" in name for name in served)
    return {"corpus": corpus, "demo": demo, "table": {name: _as_text(of) for name, of in table.items() if of}}


def _as_text(value: object) -> str:
    """A value as text in a table: a server calls its model what it likes, and that is no link and no markup."""
    return re.sub(r"[\\`<>\[\]|*]", r"\\\g<0>", " ".join(str(value).split()))


def public_name(name: str) -> str:
    """What strangers may see of the name of a model or dataset: all of it on the hub, the last part of a path here."""
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if on_hub else Path(name).name
