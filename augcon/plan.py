"""What augcon.sh asks before it acts. The flags are those of every script.

    python -m augcon.plan way [FLAGS…]

says who serves, what the scorer is made of, how many GPUs there are, and the results folder; ``next`` in place
of ``way`` the next step to run: 1, 2, 3 or done; and ``port`` a free port.
"""

import sys
from pathlib import Path
from typing import Any

from augcon.errors import UserError, stage
from augcon.gpus import visible_gpus
from augcon.results import Results
from augcon.server import free_port
from config import Settings, load_settings


@stage
def main() -> None:
    question = sys.argv.pop(1)
    if question == "port":
        print(free_port())
    elif question == "way":
        print(way(load_settings(__doc__), len(visible_gpus())))
    else:
        print(check_and_plan(load_settings(__doc__)))


def way(settings: Settings, gpus: int) -> str:
    """The server that the settings mean, the scorer's base, the number of GPUs, and the results folder.

    The server is given, vllm or demo; the scorer tiny where the model cannot be trained, else the settings'.
    """
    if "api_base" in settings.model_fields_set:
        server = "given"
    else:
        demo = settings.demo if "demo" in settings.model_fields_set else not gpus
        server = "demo" if demo else "vllm"
    trains = settings.scorer_model or server == "vllm" or (server == "given" and gpus)
    return f"{server} {'own' if trains else 'tiny'} {gpus} {Path(settings.results)}"


def check_and_plan(settings: Settings) -> str:
    """The next step. Raises UserError for results that were made with other settings or another corpus."""
    results = Results(settings.results)
    if results.record.exists():
        from augcon import demo_engine
        from augcon.recipes import inputs, root_contexts

        made_with = {**settings.made_with(), **inputs(settings, root_contexts(settings)[0])}
        mine = {name: value for name, (step, value) in made_with.items() if step <= 3}
        served = results.check(mine).get("model served")
        if served and "api_base" not in settings.model_fields_set and (served == demo_engine.MODEL) != settings.demo:
            now = "the demonstration engine" if settings.demo else settings.model
            raise UserError(
                f"{results.folder} was made with {served!r}, not with {now}; use another folder with --results"
            )
    there = {1: results.queries.exists(), 2: results.filtered_queries.exists(), 3: results.sft_data.exists()}
    return next_step(results.finished(), there)


def next_step(finished: dict[str, dict[str, Any]], there: dict[int, bool]) -> str:
    """The first step that has something to do, of steps that have ``finished`` and whose files are ``there``.

    Step 2 orders refills from step 1: "ordered" rounds of them. "refills" is how many rounds what a step
    has made contains.
    """
    done = {step: finished.get(f"step {step}", {}) if there[step] else {} for step in (1, 2, 3)}
    if not done[1] or done[2].get("ordered", 0) > done[1]["refills"]:
        return "1"
    if not done[2] or done[2]["refills"] < done[1]["refills"]:
        return "2"
    if not done[3] or done[3]["refills"] < done[2]["refills"]:
        return "3"
    return "done"


if __name__ == "__main__":
    main()
