"""Turns every `auto` of a recipe into what it means here, once, so that what is saved is what ran."""

from __future__ import annotations

import os
from dataclasses import replace

from tafkir.native.compiled import KernelChoice, resolve_kernels
from tafkir.recipe.load import LoadedRecipe
from tafkir.runlog.rundir import physical_cores

__all__ = ["AUTO", "MAX_AUTO_THREADS", "resolve_recipe"]

AUTO = "auto"
MAX_AUTO_THREADS = 8


def resolve_recipe(
    loaded: LoadedRecipe, *, threads: int | None = None, kernels: KernelChoice | None = None
) -> LoadedRecipe:
    """Replace `threads = 0` by the physical cores (at most `MAX_AUTO_THREADS`), shared by a machine's processes, and
    `kernels = "auto"` by "native" where they are built, else by "torch".

    Args:
        loaded: a valid recipe.
        threads: what an earlier part of the same run resolved it to; results depend on the number of threads to the
            last bit, so a run keeps the one it began with.
        kernels: the same for the kernels.

    Raises:
        BackendUnavailable: the native kernels are asked for, or the run began with them, and they are not built.
    """
    recipe = loaded.recipe
    found: dict[str, int | str] = {}
    if not recipe.threads:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found["threads"] = threads or max(1, min(physical_cores(), MAX_AUTO_THREADS) // processes)
    chosen = resolve_kernels(recipe.kernels if recipe.kernels != "auto" else kernels or "auto")
    if recipe.kernels == "auto":
        found["kernels"] = chosen
    if not found:
        return loaded
    origins = {**loaded.origins, **dict.fromkeys(found, AUTO)}
    return replace(loaded, recipe=recipe.model_copy(update=found), origins=origins)
