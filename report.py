"""The report: what a run has made so far, as one HTML file to look at and to review.

Reads whatever is in results/, also while a run is using it, and writes report.html there: figures, the pairs beside
their passages, the trees, what was lost and why, and pictures. The file needs nothing else and opens offline. Marks
that you set in it are saved as review.jsonl, which finetune.py takes with --review.

    python report.py --results results
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping

from augcon.errors import stage
from augcon.files import digest, new_file, read_json, read_lines
from augcon.report.gather import gather
from augcon.report.page import Facts, SearchTable, write_page
from augcon.run.corpus import Skipped
from augcon.run.results import STEP_1, STEP_3, Results
from config import load_settings

VERSIONS = ("vllm", "openai", "torch", "transformers", "rapidfuzz", "jieba")  # they shape what is made


@stage
def main() -> None:
    settings = load_settings(__doc__, "every script")
    results = Results(settings.results)
    gathered = gather(results, settings.seed)
    with new_file(results.report) as file:
        write_page(file, gathered, facts_of(results))
    of = gathered.counts
    print(
        f"report:  {of['pairs']:,} pairs, {of['nodes']:,} nodes over {of['roots']:,} root contexts{unfinished(results)}"
    )
    print(f"made:    {results.report} ({results.report.stat().st_size / 2**20:.1f} MiB); open it in a browser")


def unfinished(results: Results) -> str:
    """Which steps have not come to their end, to be added to a line."""
    steps = [step for step in ("step 1", "step 2", "step 3") if results.record.finished(step) is None]
    return f"; not finished: {', '.join(steps)}" if steps else ""


def facts_of(results: Results) -> Facts:
    """What is known of the run. Raises UserError where a file is damaged."""
    stages = {name: dataclasses.asdict(of) for name, of in results.record.stages().items()}
    search = results.example_search
    made_with = [stages.get(name, {}).get("made_with") for name in ("step 1", "step 2", "step 3")]
    return Facts(
        folder=str(results.folder),
        run=digest(made_with),
        stages=stages,
        figures=results.read_figures(),
        search=read_json(search, dict[str, SearchTable], STEP_3) if search.exists() else {},
        short_roots=results.read_short_roots(),
        skipped=list(read_lines(results.skipped, Skipped, STEP_1)) if results.skipped.exists() else [],
        versions=versions(),
    )


def versions() -> Mapping[str, str]:
    """The versions of what the report was made with, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
