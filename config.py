"""Every setting of AugCon: default, bounds, unit and reason; the defaults are the paper's.

A setting is taken from the command line (``--min-length 30``), else from the environment
(``AUGCON_MIN_LENGTH=30``), else from this file. All scripts share this one schema.
"""

import difflib
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from augcon.errors import UserError

PREFIX = "AUGCON_"
_LOOKS_LIKE_A_KEY = re.compile(r"(--[^\s=]*(?:api|key|token)[^\s=]*[\s=]+)(?!--)\S+", re.IGNORECASE)


def operational(default: Any, description: str, **bounds: Any) -> Any:
    """A setting that changes how a run goes, not what comes out of it."""
    return Field(default, description=description, json_schema_extra={"step": 0}, **bounds)


def outcome(step: int, default: Any, description: str, **bounds: Any) -> Any:
    """A setting that changes the outcome of ``step`` and of every step after it."""
    return Field(default, description=description, json_schema_extra={"step": step}, **bounds)


class Settings(BaseSettings):
    """One object for all scripts; see the module's docstring."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        cli_prog_name=Path(sys.argv[0]).name,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        str_strip_whitespace=True,
    )

    # Where things are
    results: str = operational("results", "folder for everything that is made; one folder a corpus", min_length=1)
    corpus: str = operational(
        "DailyM",
        "articles: a dataset saved to disk, a hub name, a .jsonl, .json, .csv, .tsv or .parquet file, "
        "or a folder of .txt and .md files",
        min_length=1,
    )
    text_field: str = operational("article", "the field of the corpus that holds the text", min_length=1)

    # The LLM and its server
    model: str = outcome(
        2,
        "Qwen/Qwen1.5-32B-Chat",
        "base model, a hub name or folder: asks, is asked, scores and is tuned",
        min_length=1,
    )
    api_base: str = operational(
        "http://127.0.0.1:8000/v1", "address of an OpenAI-compatible server", pattern=r"^https?://\S+$"
    )
    api_key: SecretStr = operational(SecretStr("EMPTY"), "key for the server; never printed or saved")
    api_model: str = operational(
        "", "name by which the server knows the model; empty: the only one it serves, or the model setting"
    )
    completions: bool = outcome(1, False, "use the completions endpoint, for a base model that has no chat template")
    structured_output: bool = outcome(
        1,
        False,
        "hold the server to the form of the reply (vLLM's structured_outputs); for models that stray from it",
    )
    max_in_flight: int = operational(256, "requests under way at once; vLLM's own default batch", ge=1, le=65536)
    request_timeout: float = operational(
        300, "seconds for one request; 4,096 tokens at a full batch take about 200", gt=0, le=86400
    )
    server_wait: float = operational(
        600,
        "seconds to wait for a server that went away before the run stops, everything kept",
        ge=0,
        le=604800,
    )

    # The server that AugCon starts itself
    demo: bool = operational(False, "in place of the model, the demonstration engine: rules, not an LLM")
    tensor_parallel: int = operational(
        0, "GPUs that share one copy of the model; 0: as many as there are and its heads allow", ge=0
    )
    serve_arguments: str = operational("", "further arguments for vLLM, in one string")

    # Root contexts
    max_length: int = outcome(
        1,
        500,
        "longest root context; unit: one per CJK character or other word (paper 4.1)",
        ge=20,
        le=100_000,
    )
    language: Literal["auto", "zh", "en"] = outcome(
        1, "auto", "language of the prompts; auto: that of each root context"
    )
    quota_unit: int = outcome(1, 35, "one pair wanted per this much length of a root context (paper 4.2)", ge=1)

    # Step 1: Context-Split-Tree
    min_length: int = outcome(1, 20, "λ: a shorter context is asked nothing (paper 3.2); unit as max-length", ge=1)
    rouge_threshold: float = outcome(
        1,
        0.7,
        "ROUGE-L precision: halves below it are hallucinated, queries at or above it are too alike (paper 3.2, 3.3)",
        gt=0,
        le=1,
    )
    query_temperature: float = outcome(1, 0.85, "sampling temperature for queries (paper 4.1)", ge=0, le=2)
    query_max_tokens: int = outcome(1, 1024, "most tokens of a reply with a query and two halves", ge=16)
    tries: int = outcome(1, 4, "times a node is asked until its reply parses", ge=1, le=100)
    oversample: float = outcome(
        1, 1.15, "mutually diverse queries to gather, in quotas, for step 2 to choose from", ge=1, le=100
    )
    max_passes: int = outcome(1, 6, "most trees grown over one root context to fill its quota", ge=1, le=1000)
    negatives: int = outcome(1, 500, "scorer pairs per type of negative (paper 4.1)", ge=0)

    # Step 2: scorer, rank, filter, refill
    scorer_model: str = outcome(
        2, "", "base of the scorer, a hub name or folder; empty: the model setting. A small one does for most people"
    )
    scorer_epochs: int = outcome(2, 4, "passes over the scorer's pairs (paper 4.1)", ge=1, le=1000)
    scorer_batch: int = outcome(2, 4, "scorer pairs per GPU and step (paper 4.1)", ge=1)
    scorer_learning_rate: float = outcome(2, 5e-5, "peak learning rate of the scorer (paper 4.1)", gt=0, le=1)
    scorer_max_tokens: int = outcome(
        2, 2048, "longest context and question in tokens; a longer context is cut, the question stays", ge=64
    )
    score_only: bool = operational(False, "step 2: train nothing, use the scorer that is there")
    sweep_threshold: float = outcome(
        2,
        0.9,
        "a question whose ROUGE-L precision with one of another root context is at least this, both ways, is a "
        "duplicate and goes; 0: no such sweep. Higher than within a root: the same question about another thing stays",
        ge=0,
        le=1,
    )
    max_refills: int = outcome(
        2,
        1,
        "times that root contexts short of their quota after step 2 go back to step 1 for one more tree",
        ge=0,
        le=100,
    )

    # Step 3: answers
    qa_examples: str = operational(
        "qa_examples.jsonl,qa_examples_en.jsonl",
        "example answers written by people: .jsonl files of context, question, answer, separated by commas; "
        "each question gets examples of its own language where there are some",
        min_length=1,
    )
    answer_temperature: float = outcome(3, 0.2, "sampling temperature for answers (paper 4.1)", ge=0, le=2)
    answer_max_tokens: int = outcome(3, 4096, "most tokens of an answer (paper 4.1)", ge=16)
    demonstrations: int = outcome(3, 3, "examples shown with each question", ge=1, le=20)
    candidates: int = outcome(3, 16, "sets of examples that the search tries (paper 3.4)", ge=1, le=10_000)
    answer_tries: int = outcome(3, 3, "times an answer is asked for until nothing is wrong with it", ge=1, le=100)

    # Fine-tuning
    epochs: int = outcome(4, 4, "passes over the pairs (paper 4.1)", ge=1, le=1000)
    batch: int = outcome(
        4, 4, "pairs per GPU and step, on average, for they are packed by length (paper 4.1); more is faster", ge=1
    )
    learning_rate: float = outcome(4, 5e-5, "peak learning rate (paper 4.1)", gt=0, le=1)
    max_tokens: int = outcome(4, 4096, "longest question and answer in tokens; the end of a longer one is cut", ge=16)
    held_out: float = outcome(
        4, 0.05, "share of the pairs that is not trained on and gives the held-out loss", ge=0, le=0.5
    )
    quantize: Literal["auto", "nf4", "none"] = outcome(
        4,
        "auto",
        "the base in training: 4-bit NF4 or plain; auto: nf4 on a GPU with bf16. merge.py reads what it was",
    )

    # Merging
    lora: str = operational("", "adapter to merge, a folder; empty: LoRA in the results folder")
    base: str = operational("", "the adapter's base model, a hub name or folder; empty: the one that the adapter names")
    output: str = operational("", "folder for the merged model; empty: sft_model in the results folder")
    check: bool = operational(False, "compare the merged model's next words with those of base and adapter")

    # Inference and its judge
    questions: str = operational(
        "",
        "questions for the tuned model: a file or dataset as for the corpus, or .txt with one a line; "
        "empty: the test split of the corpus",
    )
    question_field: str = operational("question", "the field that holds the question", min_length=1)
    outputs: str = operational("", "folder for the answers; empty: outputs in the results folder")
    judge: str = operational(
        "", "answer nothing, but let the server's model grade the answers in these folders, separated by commas"
    )

    # Any random choice
    seed: int = outcome(1, 42, "seed of every random choice and of the server's sampling", ge=0, lt=2**31)

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        if self.min_length > self.max_length:
            raise ValueError(f"--min-length {self.min_length} is above --max-length {self.max_length}")
        return self

    def made_with(self) -> dict[str, tuple[int, Any]]:
        """What changes the outcome: name → (first step that it changes, value)."""
        steps = {name: field.json_schema_extra["step"] for name, field in type(self).model_fields.items()}
        return {name: (step, getattr(self, name)) for name, step in steps.items() if step}

    def describe(self) -> str:
        """The settings that are not the default, on a few lines; the key is masked."""
        values = ((name, getattr(self, name), field.default) for name, field in type(self).model_fields.items())
        changed = [f"{name}={value}" for name, value, default in values if value != default]
        rest = "the others as in --help" if changed else "all as in --help"
        return textwrap.fill(", ".join([*changed, rest]), 110, initial_indent="settings: ", subsequent_indent="  ")


def load_settings(doc: str) -> Settings:
    """Settings from the command line and the environment; ``doc`` opens the text of ``--help``.

    Raises UserError, in one line, for an unknown name or an impossible value.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise UserError(f"the environment sets {name}, which is no setting{_meant(name, known)}; see --help")
    Settings.__doc__ = doc
    # The deepspeed launcher tells each of its processes its number, in the environment too.
    flags = [flag for flag in sys.argv[1:] if not re.match(r"--local[_-]rank(=|$)", flag)]
    try:
        return Settings(_cli_settings_source=CliSettingsSource(Settings, cli_parse_args=flags))
    except ValidationError as error:
        raise UserError("; ".join(map(_say, error.errors()))) from error
    except SettingsError as error:
        said = _LOOKS_LIKE_A_KEY.sub(r"\1***", str(error).removeprefix("error parsing CLI: "))
        names = {"--" + name.replace("_", "-") for name in Settings.model_fields}
        unknown = said.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        raise UserError(f"{said}{_meant(unknown, names)}; see --help for all settings") from None


def _meant(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (do you mean {close[0]}?)" if close else ""


def _say(problem: dict[str, Any]) -> str:
    if not problem["loc"]:
        return problem["msg"].removeprefix("Value error, ")
    name = "--" + str(problem["loc"][0]).replace("_", "-")
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"
