"""How the scripts that ask the LLM are run."""

import asyncio
import gc
import importlib
from collections.abc import Callable, Coroutine
from typing import Any

from augcon.llm.store import Store
from augcon.run.results import Results


def run_recipe(recipe: Callable[[Any, Results, Store], Coroutine[Any, Any, None]], settings: Any) -> None:
    """Runs a recipe on the results folder and its replies, which no other run may use at the same time."""
    print(settings.describe(), flush=True)
    importlib.import_module("augcon.llm.client")  # slow: not for --help, but before what follows
    gc.freeze()  # what the imports made stays; looking through it, and often, would cost a sixth of the time
    gc.set_threshold(100_000, 50, 100)
    results = Results(settings.results)
    with results.held(), Store(results.store) as store:
        asyncio.run(recipe(settings, results, store))
