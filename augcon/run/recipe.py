"""How the scripts that ask the LLM are run."""

import asyncio
import gc
import importlib
from collections.abc import Callable, Coroutine
from typing import Any

from augcon.llm.store import Store
from augcon.run.results import Results

Recipe = Callable[..., Coroutine[Any, Any, Any]]  # given the settings, the results folder and its store


def run_recipe(recipe: Recipe, settings: Any) -> None:
    """Runs a recipe on the results folder and its replies, which no other run may use at the same time."""
    print(settings.describe(), flush=True)
    importlib.import_module("augcon.llm.client")  # slow: not for --help, but before what follows
    run_in(Results(settings.results), recipe, settings)


def run_in(results: Results, recipe: Recipe, settings: Any, *arguments: Any, patience: float = 0) -> Any:
    """What a recipe returns for further ``arguments``; ``patience`` as in ``Results.held``."""
    gc.freeze()  # what the imports made stays; looking through it, and often, would cost a sixth of the time
    gc.set_threshold(100_000, 50, 100)
    with results.held(patience), Store(results.store) as store:
        return asyncio.run(recipe(settings, results, store, *arguments))
