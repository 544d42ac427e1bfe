"""Export: the pairs as files that other trainers read, with a dataset card, and on the hub if you like.

Reads results/sft_data, or the pairs of --data, and where they came from. Bad pairs of --review are left out, and edits
taken; the pairs held out are those that finetune.py holds out with the same settings. Writes the folder results/export,
or --output: train.jsonl and held_out.jsonl (or .parquet), dataset_info.json for LLaMA-Factory and README.md, the card.

    python export.py
    python export.py --format pairs --file-type parquet
    python export.py --with-context --mix chat.jsonl --push-to-hub owner/name
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from augcon.errors import UserError, stage
from augcon.files import new_folder, write_json, write_lines
from augcon.run.card import describe_run, public_name, write_card
from augcon.run.formats import Conversation, factory_entry, read_mix, rows_of
from augcon.run.pairs import Divided, PairRules, origin_columns, passages_of, read_divided
from augcon.run.report import format_skipped
from augcon.run.results import Results
from augcon.text.units import clean, language
from config import Settings, load_settings, pick

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = {TRAIN: "train", HELD_OUT: "validation"}  # as trainers call them
CARD, FACTORY = "README.md", "dataset_info.json"


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: the rows of each file, and the types of their columns."""

    rows: dict[str, int]
    types: Any


@stage
def main() -> None:
    settings = load_settings(__doc__, "export", "fine-tuning")
    if settings.push_to_hub:
        from augcon.hub import check_login, upload_dataset  # slow: not for --help

        check_login()
    results = Results(settings.results)
    folder = export_folder(settings, results)
    print(settings.describe())
    divided = read_divided(results, pick(PairRules, settings))
    of_pairs = conversations(settings, results, divided)
    print(f"input:   {len(of_pairs):,} pairs, {len(divided.held_out):,} of them held out ({divided.words})")
    learnt = [of_pairs[place] for place in divided.learnt]
    mixed = mix_in(settings, len(learnt))
    learnt += mixed
    if mixed:
        Random(settings.seed).shuffle(learnt)
    parts = {TRAIN: learnt, HELD_OUT: [of_pairs[place] for place in divided.held_out]}
    lengths = [sum(len(text) for _, text in talk.told()) for part in parts.values() for talk in part]
    print(f"length:  {sum(lengths):,} characters, {sum(lengths) / len(lengths):.0f} per row, longest {max(lengths):,}")
    languages = sorted({talk.language for talk in of_pairs})
    with new_folder(folder) as unfinished:
        written = write_parts(settings, unfinished, parts)
        files = [(SPLITS[Path(file).stem], file, rows) for file, rows in written.rows.items()]
        facts = card_facts(settings, results, divided, len(mixed), folder)
        write_card(unfinished / CARD, files, written.types, languages, facts)
    print(f"made:    {folder} ({', '.join(f'{file} {rows:,}' for _, file, rows in files)}, {FACTORY}, {CARD})")
    if settings.push_to_hub:
        print(f"pushed:  {upload_dataset(folder, settings.push_to_hub)}")


def export_folder(settings: Settings, results: Results) -> Path:
    """Where the export goes. Raises UserError when something other than an export would be replaced there."""
    folder = Path(settings.output).expanduser().resolve() if settings.output else results.export
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name} if folder.exists() else set()
    made = {CARD, FACTORY, *(f"{part}.{kind}" for part in SPLITS for kind in ("jsonl", "parquet"))}
    if there and not {CARD, FACTORY} <= there <= made:
        other = min(there - made, default=min(there))
        raise UserError(f"{folder} holds something other than an export ({other}); choose another folder with --output")
    return folder


def conversations(settings: Settings, results: Results, divided: Divided) -> list[Conversation]:
    """The pairs as conversations. Raises UserError where --with-context wants a passage that is not known."""
    passages = passages_of(results, divided.origins)
    if settings.with_context and (unknown := passages.count(None)):
        raise UserError(
            f"--with-context: {results.folder} does not know the passages of {unknown:,} of {len(passages):,} pairs; "
            "leave it out, or name the results folder that the pairs came from with --results"
        )
    columns = {"context": passages, **origin_columns(results, divided.origins)} if settings.format == "pairs" else {}
    return [
        Conversation(
            turns=(pair.question, pair.answer),
            system=clean(settings.system),
            passage=(passages[place] or "") if settings.with_context else "",
            language=divided.origins[place].language or language(pair.question),
            origin={name: values[place] for name, values in columns.items()},
        )
        for place, pair in enumerate(divided.pairs)
    ]


def mix_in(settings: Settings, learnt: int) -> list[Conversation]:
    """Conversations of the user's own, so many that they are --mix-share of the rows to train on, or all there are."""
    if not settings.mix:
        return []
    wanted = round(learnt * settings.mix_share / (1 - settings.mix_share))
    mixed, skipped = read_mix(settings.mix, wanted, settings.seed, settings.format)
    short = "" if len(mixed) == wanted else f"; {wanted:,} were wanted for {settings.mix_share:.0%}"
    share = len(mixed) / max(learnt + len(mixed), 1)
    print(f"mixed:   {len(mixed):,} rows of {settings.mix}, {share:.0%} of {TRAIN}{short}{format_skipped(skipped)}")
    return mixed


def write_parts(settings: Settings, folder: Path, parts: Mapping[str, Sequence[Conversation]]) -> Written:
    """Writes a file for each part that is not empty, and what LLaMA-Factory needs to know."""
    import datasets

    rows = rows_of([talk for part in parts.values() for talk in part], settings.format)
    types = datasets.Dataset.from_list(rows).features
    empty = datasets.Value("null")
    types = {name: datasets.Value("string") if of == empty else of for name, of in types.items()}
    written = Written({}, datasets.Features(types))
    for name, part in zip(parts, (rows[: len(parts[TRAIN])], rows[len(parts[TRAIN]) :]), strict=True):
        file = folder / f"{name}.{settings.file_type}"
        if part:
            written.rows[file.name] = len(part)
            if settings.file_type == "jsonl":
                write_lines(file, part)
            else:
                datasets.Dataset.from_list(part, features=written.types).to_parquet(str(file))
    names = {Path(file).stem: file for file in written.rows}
    entries = {
        f"augcon_{name}": factory_entry(settings.format, file, types, settings.with_context)
        for name, file in names.items()
    }
    write_json(folder / FACTORY, entries)
    return written


def card_facts(settings: Settings, results: Results, divided: Divided, mixed: int, folder: Path) -> dict[str, Any]:
    """What the card tells of the dataset, under the names of its template."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    known = any(origin.id for origin in divided.origins)
    return {
        **(describe_run(results, defaults) if known else {"corpus": "", "table": {}}),
        "title": settings.push_to_hub.rpartition("/")[2] or "Question–answer pairs made with AugCon",
        "name": settings.push_to_hub or folder.name,
        "folder": folder.name,
        "form": settings.format,
        "with_context": settings.with_context,
        "system": settings.system,
        "own": public_name(settings.data),
        "reviewed": bool(settings.review),
        "mix": public_name(settings.mix),
        "mixed": mixed,
        "pairs": len(divided.pairs),
        "held_out": len(divided.held_out),
        "words": divided.words,
        "seed": settings.seed,
    }


if __name__ == "__main__":
    main()
