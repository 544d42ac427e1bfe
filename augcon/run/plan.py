"""What augcon.sh asks before it acts. The flags are those of every script.

    python -m augcon.run.plan way [FLAGS…]

says who serves, what the scorer is made of, how many GPUs there are, and the results folder; ``next`` in place
of ``way`` the next step to run: 1, 2, 3 or done; and ``port`` a free port.
"""

import sys
from pathlib import Path
from typing import Any

from augcon.errors import UserError, stage
from augcon.machine.gpus import check_numbers, visible_gpus
from augcon.machine.server import free_port
from augcon.run.results import Results
from config import Settings, load_settings


@stage
def main() -> None:
    question = sys.argv.pop(1)
    if question == "port":
        print(free_port())
    elif question == "way":
        check_numbers()
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
    """The next step.

    Raises UserError for a corpus or examples that cannot be read, before hours are spent on the steps that come
    first, and for results that were made with other settings or from other texts.
    """
    from augcon.demo import engine as demo_engine
    from augcon.method import answers as alignment
    from augcon.run.recipes import inputs, qa_examples, root_contexts

    results = Results(settings.results)
    made_with = {
        **settings.made_with(),
        **inputs(settings, root_contexts(settings)[0]),
        "content of the examples": (3, alignment.examples_digest(qa_examples(settings))),
    }
    served = results.check(3, made_with).get("model served")
    if served and "api_base" not in settings.model_fields_set and (served == demo_engine.MODEL) != settings.demo:
        now = "the demonstration engine" if settings.demo else settings.model
        raise UserError(f"{results.folder} was made with {served!r}, not with {now}; use another folder with --results")
    finished = results.finished()
    done = {
        1: finished.get("step 1") if results.queries.exists() else None,
        2: finished.get("step 2") if results.filtered_queries.exists() else None,
        3: finished.get("step 3") if results.sft_data.exists() else None,
    }
    if done[2] and done[3] and done[3]["queries"] != results.digest(results.filtered_queries):
        done[3] = None  # step 2 has been run again since
    return next_step(done)


def next_step(done: dict[int, dict[str, Any] | None]) -> str:
    """The first step that has something to do, from the facts that each left when it ended, if it did.

    Step 2 orders refills from step 1: "ordered" rounds of them. "refills" is how many rounds what a step
    has made contains.
    """
    one, two, three = (done[step] for step in (1, 2, 3))
    if one is None or (two is not None and two["ordered"] > one["refills"]):
        return "1"
    if two is None or two["refills"] < one["refills"]:
        return "2"
    if three is None or three["refills"] < two["refills"]:
        return "3"
    return "done"


if __name__ == "__main__":
    main()
