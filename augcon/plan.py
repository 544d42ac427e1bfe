"""What augcon.sh asks before it acts. The flags are those of every script.

    python -m augcon.plan way [FLAGS…]

prints who serves, what the scorer is made of, the number of GPUs, whether it is a dry run and the results folder;
``check`` in place of
``way`` refuses what could not be run to its end, and leaves the root contexts for step 1; ``next`` prints the number of
the first step that has something to do, or none.
"""

import sys
from pathlib import Path

from augcon.errors import stage
from augcon.files import file_digest, read_json
from augcon.machine.gpus import require_gpu_numbers, visible_gpus
from augcon.run.results import STEP_2, Results
from config import Settings, load_settings, pick

DEMO_MODEL = "augcon-demo-not-an-llm"


@stage
def main() -> None:
    question = sys.argv.pop(1)
    if question == "way":
        require_gpu_numbers()
        print(way(load_settings(__doc__), len(visible_gpus())))
    elif question == "check":
        check(load_settings(__doc__), len(visible_gpus()))
    else:
        results = Results(load_settings(__doc__).results)
        print(next((step for step in (1, 2, 3) if needed(step, results)), "none"))


def way(settings: Settings, gpus: int) -> str:
    """Who serves, the scorer's base, the number of GPUs, whether it is a "dry" run, and the results folder.

    The scorer is "tiny" where the model cannot be trained, else the settings' "own".
    """
    server = server_of(settings, gpus)
    trains = settings.scorer_model or (server != "demo" and gpus) or (server == "vllm" and not settings.ray)
    run = "dry" if settings.dry_run else "real"
    return f"{server} {'own' if trains else 'tiny'} {gpus} {run} {Path(settings.results)}"


def server_of(settings: Settings, gpus: int) -> str:
    """Who serves: the server that is "given", or one that is started, "vllm" or "demo"."""
    if "api_base" in settings.model_fields_set:
        return "given"
    demo = settings.demo if "demo" in settings.model_fields_set else not (gpus or settings.ray)
    return "demo" if demo else "vllm"


def check(settings: Settings, gpus: int) -> None:
    """Raises UserError for inputs that cannot be read, and for results that would be replaced without --redo."""
    # This takes seconds to import, and `next` does without.
    from augcon.hub import find_model
    from augcon.run.cut import CorpusRules, read_corpus
    from augcon.run.inputs import answer_inputs, read_examples, tree_inputs

    results, rules = Results(settings.results), pick(CorpusRules, settings)
    cut = read_corpus(rules, results)
    examples = read_examples(settings.qa_examples)
    tiny = Path(settings.scorer_model).name == "tiny_model"  # which augcon.sh makes when its turn comes
    if settings.scorer_model and not tiny and not results.scorer.exists():
        find_model(settings.scorer_model)  # rather than to miss it after step 1
    served = {"demo": DEMO_MODEL, "vllm": settings.api_model or settings.model}.get(server_of(settings, gpus))
    model = {"model served": served} if served else {}
    stages = (
        ("step 1", tree_inputs(settings.inputs("step 1"), cut.roots, settings.language) | model),
        ("scorer", settings.inputs("scorer")),
        ("step 2", settings.inputs("step 2")),
        ("step 3", answer_inputs(settings.inputs("step 3"), examples, ("zh", "en")) | model),
    )
    with results.held():
        for stage_, inputs in () if settings.dry_run and settings.redo else stages:  # a dry run outdates nothing
            results.record.check(stage_, inputs, results.made(stage_), settings.redo)
        cut.keep(results)


def needed(step: int, results: Results) -> bool:
    """Whether a step has something to do: it has not come to its end, or what it reads has changed since."""
    finished = results.record.finished(f"step {step}")
    made = {1: results.queries, 2: results.filtered_queries, 3: results.sft_data}[step]
    if finished is None or not made.exists():
        return True
    if step == 1:  # step 2 sends root contexts back, round by round
        rounds = read_json(results.refills, list[list[int]], STEP_2) if results.refills.exists() else []
        return len(rounds) > int(finished.get("refills", 0))
    read = results.queries if step == 2 else results.filtered_queries
    return not read.exists() or file_digest(read) != finished.get("queries")


if __name__ == "__main__":
    main()
