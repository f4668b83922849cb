"""Turns every `auto` of a recipe into a number, once, so that what is saved is what ran."""

from __future__ import annotations

import os
from dataclasses import replace

from tafkir.recipe.load import LoadedRecipe
from tafkir.runlog.rundir import physical_cores

__all__ = ["AUTO", "MAX_AUTO_THREADS", "resolve_recipe"]

AUTO = "auto"
MAX_AUTO_THREADS = 8


def resolve_recipe(loaded: LoadedRecipe, *, threads: int | None = None) -> LoadedRecipe:
    """Replace `threads = 0` by the physical cores (at most `MAX_AUTO_THREADS`), shared by a machine's processes.

    Args:
        loaded: a valid recipe.
        threads: what an earlier part of the same run resolved it to; results depend on the number of threads to the
            last bit, so a run keeps the one it began with.
    """
    if loaded.recipe.threads:
        return loaded
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = threads or max(1, min(physical_cores(), MAX_AUTO_THREADS) // processes)
    return replace(
        loaded,
        recipe=loaded.recipe.model_copy(update={"threads": chosen}),
        origins={**loaded.origins, "threads": AUTO},
    )
