"""Every setting of AugCon: default, bounds, unit and reason. The defaults are the paper's.

A setting comes from the command line (``--min-length 30``), else from the environment (``AUGCON_MIN_LENGTH=30``),
else from this file. All scripts take all settings.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import shlex
import sys
import textwrap
import urllib.parse
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from augcon.errors import UserError, conceal

PREFIX = "AUGCON_"
_PATHS = ("results", "corpus", "qa_examples", "data", "review", "output", "mix", "lora", "base", "questions", "outputs")
_SEVERAL = ("--corpus=", "--qa-examples=", "--api-base=")  # flags that may be repeated
Part = TypeVar("Part")


def _setting(group: str, stage: str, default: Any, description: str, **bounds: Any) -> Any:
    """A setting: its group in --help, the first stage whose outcome it changes, and what pydantic's Field takes."""
    return Field(default, description=description, json_schema_extra={"group": group, "stage": stage}, **bounds)


# By the group of --help that shows a setting, and the first stage whose outcome it changes ("" for none).
_shared, _seed = partial(_setting, "every script", ""), partial(_setting, "every script", "step 1")
_corpus, _cut = partial(_setting, "corpus", ""), partial(_setting, "corpus", "step 1")
_server, _protocol = partial(_setting, "server", ""), partial(_setting, "server", "step 1")
_serving = partial(_setting, "serve.py and augcon.sh", "")
_trees = partial(_setting, "step 1", "step 1")
_scoring, _scorer, _filter = (partial(_setting, "step 2", stage) for stage in ("", "scorer", "step 2"))
_examples, _answers = partial(_setting, "step 3", ""), partial(_setting, "step 3", "step 3")
_files, _tuning = partial(_setting, "fine-tuning", ""), partial(_setting, "fine-tuning", "finetune")
_export = partial(_setting, "export", "")
_merging = partial(_setting, "merging", "")
_inference = partial(_setting, "inference and judging", "")


class Settings(BaseSettings):
    """One object for all scripts; see the module's docstring."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        str_strip_whitespace=True,
    )

    results: str = _shared("results", "folder for the results; one folder for each corpus and model", min_length=1)
    model: str = _shared("Qwen/Qwen1.5-32B-Chat", "base model to serve and tune, a hub name or folder", min_length=1)
    dry_run: bool = _shared(False, "tell what it would take, from a trial of a minute or two where a model is asked")
    redo: bool = _shared(False, "agree that results made with other settings, examples or texts are replaced")
    seed: int = _seed(42, "seed of every random choice and of the server's sampling", ge=0, lt=2**31)

    corpus: str = _corpus(
        "DailyM",
        "articles: files (.pdf, .docx, .html, .epub, .md, .txt, .jsonl, .json, .csv, .tsv, .parquet), folders and .zip "
        "archives of them, saved datasets, hub names, addresses such as s3://…; several are separated by commas",
        min_length=1,
    )
    text_field: str = _corpus("article", "the field of the corpus that holds the text", min_length=1)
    title_field: str = _corpus("title", "the field with the title, if there is one; it is shown with each context")
    limit: int = _corpus(0, "use only so many articles, from the first on; 0: all", ge=0)
    alike_articles: float = _corpus(
        0.8,
        "share of their runs of five words that two articles have in common from which the later one is left out; "
        "0: only those that are the same",
        ge=0,
        le=1,
    )
    max_length: int = _cut(500, "longest root context in CJK characters and other words (paper 4.1)", ge=20, le=100_000)
    quota_unit: int = _cut(35, "length of a root context for each pair wanted of it (paper 4.2)", ge=1)
    language: Literal["auto", "zh", "en"] = _cut("auto", "language of the prompts; auto: that of each root context")

    api_base: str = _server(
        "http://127.0.0.1:8000/v1",
        "address of the OpenAI API, or of several servers with the same model, separated by commas",
        pattern=r"^https?://[^\s,]+(,https?://[^\s,]+)*$",
    )
    api_key: SecretStr = _server(SecretStr("EMPTY"), "key for the server; never printed or saved")
    api_model: str = _server("", "the server's name for the model; empty: its only one, or the model setting")
    completions: bool = _protocol(False, "use the completions endpoint, for a base model without a chat template")
    structured_output: bool = _protocol(False, "have the server enforce the form of replies, as vLLM can")
    extra_body: str = _protocol(
        "",
        "further parameters of every request, as a JSON object, such as those by which a router chooses a provider; "
        "one that AugCon sets itself is replaced",
    )
    max_in_flight: int = _server(
        8192, "most requests under way at once; how many there are follows what the servers can take", ge=1, le=65536
    )
    request_timeout: float = _server(300, "seconds for one request; 4,096 tokens take about 200", gt=0, le=86400)
    prices: str = _server(
        "",
        "money for a million tokens: in prompts, in prompts from the server's cache, written; such as 0.5,0.05,1.5",
        pattern=r"^(\d+(\.\d+)?(,\d+(\.\d+)?){2})?$",
    )
    speed: float = _server(0, "tokens written a second, for the times of --dry-run; 0: as in its trial", ge=0)
    ray: str = _server(
        "",
        "address of a Ray cluster whose nodes share steps 1 and 3, HOST:PORT or auto; see docs/cluster.md",
        pattern=r"^(auto|[^\s/:]+:\d{1,5})?$",
    )
    shard: int = _server(1000, "root contexts that a node of the cluster works on at a time", ge=1)
    server_wait: float = _server(600, "seconds to wait for a server that stopped answering", ge=0, le=604800)

    demo: bool = _serving(False, "serve the demonstration engine, which answers by rules and is not an LLM")
    host: str = _serving(
        "127.0.0.1", "this machine's address to listen at; at another than loopback's, AUGCON_API_KEY has to set a key"
    )
    tensor_parallel: int = _serving(0, "GPUs that share a copy of the model; 0: as few as leave room to batch", ge=0)
    serve_arguments: str = _serving("", "further arguments for vLLM, in one string")

    split: Literal["rewrite", "focus"] = _trees(
        "rewrite",
        "how a context is split: the model rewrites it in two halves (paper), or is shown the root context with its "
        "sentences numbered and names the one to cut after",
    )
    bad_split: Literal["end", "cut"] = _trees(
        "end", "a rewriting whose halves will not do in any try: ends the branch (paper), or is cut in the middle"
    )
    coverage_threshold: float = _trees(
        0.75, "ROUGE-L recall of a context in its halves below which they have lost too much of it", ge=0, le=1
    )
    min_length: int = _trees(20, "λ: no query for a shorter context (paper 3.2); unit as max-length", ge=1)
    leaf_length: int = _trees(
        40,
        "a shorter context is asked for its question alone, as hardly a half of it could be asked; 0: all are split",
        ge=0,
    )
    rouge_threshold: float = _trees(
        0.7,
        "ROUGE-L precision below which a half is hallucinated, and from which queries are too alike (paper 3.2, 3.3)",
        gt=0,
        le=1,
    )
    query_temperature: float = _trees(0.85, "sampling temperature for queries (paper 4.1)", ge=0, le=2)
    query_max_tokens: int = _trees(1024, "most tokens of a reply with a query and two halves", ge=16)
    tries: int = _trees(4, "replies asked for until nothing is wrong with one", ge=1, le=100)
    oversample: float = _trees(1.15, "mutually diverse queries to gather for step 2, in quotas", ge=1, le=100)
    max_passes: int = _trees(6, "most trees grown over a root context to fill its quota", ge=1, le=1000)
    negatives: int = _trees(500, "scorer pairs for each type of negative (paper 4.1)", ge=0)

    scorer_model: str = _scorer("", "base of the scorer, often a small model; empty: the model setting")
    scorer_epochs: int = _scorer(4, "epochs over the scorer's pairs (paper 4.1)", ge=1, le=1000)
    scorer_batch: int = _scorer(4, "scorer pairs per GPU and step (paper 4.1)", ge=1)
    scorer_learning_rate: float = _scorer(5e-5, "peak learning rate of the scorer (paper 4.1)", gt=0, le=1)
    scorer_max_tokens: int = _scorer(2048, "longest context and query in tokens; a longer context is cut", ge=64)
    score_only: bool = _scoring(False, "train nothing and use the scorer that is there")
    sweep_threshold: float = _filter(
        0.9,
        "ROUGE-L precision, both ways, from which a query is a duplicate of one of another root context; 0: look for "
        "none. Higher than within a root, where the same question about another thing may stay",
        ge=0,
        le=1,
    )
    refill_threshold: float = _filter(
        0.05,
        "share of the corpus' quota up to which what is missing is left at that: a refill starts two servers, about "
        "10 to 15 minutes, in which a run like the paper's makes a twentieth of its pairs; 0: refill for any",
        ge=0,
        le=1,
    )
    max_refills: int = _filter(1, "times that step 1 grows another tree for roots short of their quota", ge=0, le=100)

    qa_examples: str = _examples(
        "qa_examples.jsonl,qa_examples_en.jsonl",
        "example answers written by people: .jsonl files of context, question, answer, separated by commas; "
        "a query gets examples in its own language where there are any",
        min_length=1,
    )
    answer_from: Literal["root", "node"] = _answers(
        "root",
        "the text to answer from: the root context, with the node's as the part in question, or the node's alone",
    )
    alike_answers: float = _answers(
        0.9, "ROUGE-L precision, both ways, from which two answers on one article say the same; 0: keep all", ge=0, le=1
    )
    answer_temperature: float = _answers(0.2, "sampling temperature for answers (paper 4.1)", ge=0, le=2)
    answer_max_tokens: int = _answers(4096, "most tokens of an answer (paper 4.1)", ge=16)
    answer_tries: int = _answers(3, "answers asked for until nothing is wrong with one", ge=1, le=100)
    examples_shown: int = _answers(3, "examples shown with each query", ge=1, le=20)
    candidates: int = _answers(16, "sets of examples that the search tries (paper 3.4)", ge=1, le=10_000)

    data: str = _files("", "pairs to train on: a saved dataset or file of question and answer; empty: sft_data")
    review: str = _files(
        "", "review.jsonl, saved from report.html: its bad pairs are left out, its edits taken; empty: none"
    )
    output: str = _files(
        "", "folder for what finetune.py (else --results), merge.py (else sft_model) or export.py (else export) makes"
    )
    epochs: int = _tuning(4, "epochs over the pairs (paper 4.1)", ge=1, le=1000)
    batch: int = _tuning(4, "pairs per GPU and step on average, as they are packed by length (paper 4.1)", ge=1)
    learning_rate: float = _tuning(5e-5, "peak learning rate (paper 4.1)", gt=0, le=1)
    max_tokens: int = _tuning(
        4096,
        "longest question and answer in tokens; a longer answer loses its end. A batch of more tokens is divided into "
        "several passes",
        ge=16,
    )
    held_out: float = _tuning(0.05, "share of the pairs that is held out from training for a loss", ge=0, le=0.5)
    quantize: Literal["auto", "nf4", "none"] = _tuning(
        "auto", "the base in training; auto: nf4 where it does not fit on the GPU in bf16, by estimate"
    )
    gpu_memory: float = _files(0, "GiB of a GPU that fine-tuning may plan for; 0: all that it has", ge=0)

    format: Literal["messages", "alpaca", "sharegpt", "pairs"] = _export(
        "messages", "form of the exported rows: chat messages, which most trainers read; pairs: with all that is known"
    )
    file_type: Literal["jsonl", "parquet"] = _export("jsonl", "kind of the exported files")
    with_context: bool = _export(False, "ask each question under its passage: to learn to read rather than to know")
    system: str = _export("", "system prompt of the exported pairs; empty: none")
    mix: str = _export(
        "", "chat data to mix in: a file or dataset of messages, conversations, Alpaca rows or pairs; empty: none"
    )
    mix_share: float = _export(0.2, "share of the exported training rows that is mixed in", ge=0, lt=1)
    push_to_hub: str = _export(
        "", "upload the export as a private dataset, such as owner/name; empty: no", pattern=r"^([\w.-]+/[\w.-]+)?$"
    )

    lora: str = _merging("", "adapter to merge, a folder or hub name; empty: LoRA in the results folder")
    base: str = _merging("", "base model of the adapter, a hub name or folder; empty: the one that it names")

    questions: str = _inference("", "questions: a file or dataset, or .txt with one a line; empty: the test split")
    question_field: str = _inference("question", "the field that holds the question", min_length=1)
    outputs: str = _inference("", "folder for answers, or, for judge.py, folders to grade; empty: results/outputs")

    @field_validator("api_key")
    @classmethod
    def _fits_in_a_header(cls, api_key: SecretStr) -> SecretStr:
        if not re.fullmatch("[!-~]+", api_key.get_secret_value()):
            raise ValueError("must be one word of ASCII characters; leave it out where the server needs none")
        return api_key

    @field_validator("api_base")
    @classmethod
    def _is_an_address(cls, api_base: str) -> str:
        for address in api_base.split(","):
            try:
                parts = urllib.parse.urlsplit(address)
                (parts.hostname or "").encode("idna")
                possible = parts.hostname and re.search(r"\w", parts.hostname) and parts.port != 0
            except ValueError as error:
                raise ValueError(f"is no address ({error})") from error
            if not possible:
                raise ValueError("is no address: its host or port is not possible")
            if parts.username is not None:
                raise ValueError("must not hold a name or key; set AUGCON_API_KEY")
        return api_base

    @field_validator("serve_arguments")
    @classmethod
    def _can_be_split(cls, arguments: str) -> str:
        shlex.split(arguments)
        return arguments

    @field_validator(*_PATHS)
    @classmethod
    def _has_a_home(cls, names: str) -> str:
        for name in map(str.strip, names.split(",")):
            try:
                _ = name.startswith("~") and Path(name).expanduser()
            except RuntimeError as error:
                raise ValueError(f"there is no user {name.partition('/')[0]}") from error
        return names

    @field_validator("extra_body")
    @classmethod
    def _is_an_object(cls, extra_body: str) -> str:
        try:
            named = json.loads(extra_body or "{}")
        except ValueError:
            named = None
        if not isinstance(named, dict):
            raise ValueError('must be a JSON object such as {"reasoning_effort": "low"}')
        if ours := {"model", "messages", "prompt", "n", "stream"} & named.keys():
            raise ValueError(f"cannot set {', '.join(sorted(ours))}, without which AugCon reads no reply")
        return extra_body

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        if self.min_length > self.max_length:
            raise ValueError(f"--min-length {self.min_length} is above --max-length {self.max_length}")
        return self

    @classmethod
    def meta(cls, name: str, key: Literal["group", "stage"]) -> str:
        """The group or stage of a setting."""
        extra = cls.model_fields[name].json_schema_extra
        return str(extra[key]) if isinstance(extra, dict) else ""

    def inputs(self, stage: str) -> dict[str, Any]:
        """The settings that shape a stage and none before it: name → value."""
        return {name: getattr(self, name) for name in type(self).model_fields if self.meta(name, "stage") == stage}

    def command(self, script: str, *flags: object) -> str:
        """The command that goes on with a script in the same results folder, from the same working directory."""
        same = () if self.results == type(self).model_fields["results"].default else ("--results", self.results)
        return shlex.join(["python", str(Path(sys.argv[0]).with_name(script)), *map(str, (*flags, *same))])

    def describe(self) -> str:
        """The settings that are not the default, on a few lines; the key is masked."""
        values = ((name, getattr(self, name), field.default) for name, field in type(self).model_fields.items())
        changed = [f"{name}={value}" for name, value, default in values if value != default]
        rest = "the others as in --help" if changed else "all as in --help"
        return textwrap.fill(", ".join([*changed, rest]), 110, initial_indent="settings: ", subsequent_indent="  ")


def pick(part: type[Part], settings: Settings, prefix: str = "") -> Part:
    """The settings that a part takes: each field of the dataclass from the setting ``prefix`` + name, or else name."""
    names = [field.name for field in dataclasses.fields(part)]  # type: ignore[arg-type]
    return part(**{name: getattr(settings, prefix + name, getattr(settings, name, None)) for name in names})


class _Parser(argparse.ArgumentParser):
    """Takes the flags of all settings, and shows those of some groups in --help."""

    def __init__(self, doc: str, groups: tuple[str, ...]) -> None:
        super().__init__(
            prog=Path(sys.argv[0]).name,
            usage="%(prog)s [SETTING …]",
            description=doc.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        every = dict.fromkeys(Settings.meta(name, "group") for name in Settings.model_fields)
        shown = [*(groups or list(every)[1:]), "every script"]
        self.groups = {name: self.add_argument_group(name) for name in shown}
        if hidden := [name for name in every if name not in shown]:
            self.epilog = f"The settings of {', '.join(hidden)} are taken too; bash augcon.sh --help shows them all."

    def add_setting(self, _: Any, *flags: str, **how: Any) -> Any:
        """Adds a flag to the group of its setting."""
        group = Settings.meta(how["dest"], "group")
        if group not in self.groups:
            how["help"] = argparse.SUPPRESS
        return self.groups.get(group, self).add_argument(*flags, **how)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def load_settings(doc: str, *groups: str) -> Settings:
    """Settings from the command line and the environment.

    ``doc`` opens the text of --help, which shows ``groups`` first, and all of them where none is named. Raises
    UserError, in one line, for an unknown name or an impossible value.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise UserError(f"the environment sets {name}, which is not a setting{_meant(name, known)}; see --help")
    # The deepspeed launcher tells each of its processes its number, in the environment too.
    flags = [flag for flag in sys.argv[1:] if not re.match(r"--local[_-]rank(=|$)", flag)]
    flags = _joined(flags)
    parser = _Parser(doc, groups)
    try:
        source = CliSettingsSource[Any](
            Settings, cli_parse_args=flags, root_parser=parser, add_argument_method=parser.add_setting
        )
        settings = Settings(_cli_settings_source=source)  # type: ignore[call-arg]
        conceal(settings.api_key.get_secret_value())
        return settings
    except ValidationError as error:
        raise UserError("; ".join(map(_format_problem, error.errors()))) from error
    except SettingsError as error:
        said = str(error).removeprefix("error parsing CLI: ")
        if not said.startswith("unrecognized arguments: "):
            raise UserError(f"{said}; see --help") from None
        unknown = said.split()[2].partition("=")[0]  # without its value, which may be a key
        names = {"--" + name.replace("_", "-") for name in Settings.model_fields}
        raise UserError(f"there is no setting {unknown}{_meant(unknown, names)}; see --help for all of them") from None


def _joined(flags: list[str]) -> list[str]:
    """The flags, with the values of a repeated one that takes several names in one, separated by commas."""
    pairs = [each for flag in flags for each in (flag.split("=", 1) if flag.startswith(_SEVERAL) else [flag])]
    joined: list[str] = []
    for at, flag in enumerate(pairs):
        before = pairs[at - 1] if at else ""
        if before + "=" in _SEVERAL and before in joined[:-1]:
            joined.pop()
            joined[joined.index(before) + 1] += f",{flag}"
        else:
            joined.append(flag)
    return joined


def _meant(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (do you mean {close[0]}?)" if close else ""


def _format_problem(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = "--" + str(problem["loc"][0]).replace("_", "-")
    said = f"{name}: {message[0].lower()}{message[1:]}"
    if name == "--api-key":
        return said
    return f"{said}, not {re.sub('//[^/,]*@', '//…@', str(problem['input']))!r}"


def as_markdown() -> str:
    """All settings as tables, by group: docs/settings.md, which ``python config.py > docs/settings.md`` makes."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    tables: dict[str, list[str]] = {}
    for name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        limits = ((sign, getattr(of, key, None)) for of in field.metadata for key, sign in signs.items())
        bounds = [f"{sign} {limit:,}" for sign, limit in limits if limit is not None]
        choices = get_args(field.annotation) or ["on, off"] * (field.annotation is bool)
        values = ", ".join(map(str, choices or bounds))
        flag, shown = "--" + name.replace("_", "-"), f"`{default}`" if default != "" else "empty"
        shown = ("off", "on")[default] if isinstance(default, bool) else shown
        cells = (f"`{flag}`", shown, values, field.description, Settings.meta(name, "stage"))
        tables.setdefault(Settings.meta(name, "group"), []).append(f"| {' | '.join(map(str, cells))} |")
    head = "| flag | default | values | what it is | changes |\n|---|---|---|---|---|\n"
    return "\n".join([_SETTINGS_PAGE, *(f"## {of}\n\n{head}" + "\n".join(rows) + "\n" for of, rows in tables.items())])


_SETTINGS_PAGE = """\
# Settings

All scripts take all settings: as a flag (`--max-length 300`), or in the environment (`AUGCON_MAX_LENGTH=300`). A flag
wins. `--demo` and other settings that are on or off are switched off by `--no-demo`. The defaults are the paper's where
it gives a value.

The last column names the first stage whose outcome a setting changes. A results folder remembers its settings: change
one, and that stage and those after it up to step 3 have to be made again, which AugCon does only with `--redo`. Stages
before it stay. A setting without a stage either changes no result, or names files whose content is compared instead, as
`--corpus` does.

This page is made by `python config.py > docs/settings.md`.
"""

if __name__ == "__main__":
    print(as_markdown(), end="")
