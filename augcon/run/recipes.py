"""What the scripts share: how settings become the arguments of the parts, and how figures are told."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import config
from augcon.errors import UserError
from augcon.llm.client import LLM, Endpoint
from augcon.method.answers import Example, read_examples
from augcon.run.corpus import RootContext, read_corpus, split_corpus
from augcon.text import prompts
from augcon.text.units import language
from config import Settings


def root_contexts(settings: Settings) -> tuple[list[RootContext], str]:
    """The corpus cut into root contexts, and in words what was left out. Raises UserError when there is no text."""
    skipped: Counter[str] = Counter()
    rows = read_corpus(corpus_source(settings), settings.text_field)
    roots = list(split_corpus(rows, settings.max_length, settings.quota_unit, skipped))
    left_out = f", {skipped.total()} skipped ({say(skipped)})" if skipped else ""
    if not roots:
        raise UserError(f"corpus {settings.corpus!r} has no article with text{left_out}")
    return roots, left_out


def corpus_source(settings: Settings) -> str:
    """Where the corpus is; the bundled one is found from any working directory."""
    bundled = Path(config.__file__).with_name("DailyM")
    return str(bundled) if settings.corpus == bundled.name else settings.corpus


def qa_examples(settings: Settings) -> list[Example]:
    """The example answers of all files that the settings name; those that come with AugCon are found from anywhere."""
    examples = []
    for name in filter(None, map(str.strip, settings.qa_examples.split(","))):
        path, bundled = Path(name).expanduser(), Path(config.__file__).parent / name
        examples += read_examples(bundled if bundled.exists() and not path.exists() else path)
    if not examples:
        raise UserError(f"--qa-examples names no file: {settings.qa_examples!r}")
    return examples


def inputs(settings: Settings, roots: list[RootContext]) -> dict[str, tuple[int, Any]]:
    """What shapes the outcome besides the settings: the corpus as cut, the prompts."""
    digest = hashlib.sha256()
    for root in roots:
        digest.update(f"{root.article} {root.start} {root.quota} {root.text}\n".encode())
    asked_with = sorted({prompts_for(settings, root.text) for root in roots}, key=lambda of: of.language)
    return {
        "content of the corpus as cut": (1, digest.hexdigest()[:16]),
        "content of the prompts": (1, {of.language: of.cst_digest() for of in asked_with}),
    }


def server(settings: Settings) -> Endpoint:
    """The part of the settings that says how to ask."""
    return Endpoint(
        api_base=settings.api_base,
        api_key=settings.api_key,
        completions=settings.completions,
        max_in_flight=settings.max_in_flight,
        request_timeout=settings.request_timeout,
        server_wait=settings.server_wait,
        seed=settings.seed,
    )


def prompts_for(settings: Settings, text: str) -> prompts.Prompts:
    """The prompts in the language of a text, unless the settings name one."""
    return prompts.load_prompts(language(text) if settings.language == "auto" else settings.language)


def report_calls(llm: LLM, seconds: float) -> None:
    """The figures of the client."""
    retries = Counter({kind: n for kind, n in llm.counts.items() if kind.startswith("retries")})
    calls = llm.counts["calls"]
    print(
        f"calls:   {calls:,} in this run ({calls / seconds:.0f}/s), {llm.counts['replayed']:,} replayed from the "
        f"store, {llm.counts['shared']:,} shared by equal requests, "
        f"{llm.counts['prompt tokens']:,} prompt and {llm.counts['reply tokens']:,} reply tokens"
        + (f", {say(retries)}" if retries else "")
        + f"; {seconds:.0f} s"
    )


def say(counts: Counter[str]) -> str:
    """Counts in words, the largest first; of many, the first eight."""
    words = [f"{name} {number:,}" for name, number in counts.most_common()]
    return ", ".join(words[:8] + [f"and {len(words) - 8:,} more"] * (len(words) > 8))
