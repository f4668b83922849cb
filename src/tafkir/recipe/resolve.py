"""Turns every `auto` of a recipe into what it means here, once, so that what is saved is what ran."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from tafkir.native.compiled import KernelChoice, resolve_kernels
from tafkir.recipe.load import LoadedRecipe
from tafkir.recipe.schema import Recipe
from tafkir.recipe.trm import Precision
from tafkir.runlog.rundir import has_bfloat16_units, physical_cores

__all__ = ["AUTO", "MAX_AUTO_THREADS", "resolve_recipe"]

AUTO = "auto"
MAX_AUTO_THREADS = 8


def resolve_recipe(
    loaded: LoadedRecipe,
    *,
    threads: int | None = None,
    kernels: KernelChoice | None = None,
    precision: Precision | None = None,
) -> LoadedRecipe:
    """Replace `threads = 0` by the physical cores (at most `MAX_AUTO_THREADS`), shared by a machine's processes,
    `kernels = "auto"` by "native" where they are built, else by "torch", and `trm.precision = "auto"` by "bfloat16"
    where the device has units for it, else by "float32".

    Args:
        loaded: a valid recipe.
        threads: what an earlier part of the same run resolved it to; results depend on the number of threads to the
            last bit, so a run keeps the one it began with.
        kernels: the same for the kernels.
        precision: the same for `trm.precision`.

    Raises:
        BackendUnavailable: the native kernels are asked for, or the run began with them, and they are not built.
    """
    recipe = loaded.recipe
    found: dict[str, Any] = {}
    if not recipe.threads:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found["threads"] = threads or max(1, min(physical_cores(), MAX_AUTO_THREADS) // processes)
    chosen = resolve_kernels(recipe.kernels if recipe.kernels != "auto" else kernels or "auto")
    if recipe.kernels == "auto":
        found["kernels"] = chosen
    origins = {**loaded.origins, **dict.fromkeys(found, AUTO)}
    if recipe.trm is not None and recipe.trm.precision == "auto":
        here: Precision = "bfloat16" if _has_bfloat16(recipe) else "float32"
        chosen_precision = here if precision in (None, "auto") else precision
        found["trm"] = recipe.trm.model_copy(update={"precision": chosen_precision})
        origins["trm.precision"] = AUTO
    if not found:
        return loaded
    return replace(loaded, recipe=recipe.model_copy(update=found), origins=origins)


def _has_bfloat16(recipe: Recipe) -> bool:
    return recipe.parallel.device in ("cuda", "npu") or has_bfloat16_units()
