"""What a valid recipe should make one think twice about: choices that others saw fail. Imports without torch."""

from __future__ import annotations

from collections.abc import Iterator

from tafkir.recipe.rl import IcePop, PolicyTable
from tafkir.recipe.schema import Recipe

__all__ = ["advise"]


def advise(recipe: Recipe) -> list[str]:
    """Warnings, one line each: what is set, and what is known of it. None of them is an error."""
    tables = {kind: getattr(recipe, kind) for kind in ("rlvr", "rlhf")}
    return [
        f"{kind}.{line}"
        for kind, table in tables.items()
        if isinstance(table, PolicyTable)
        for line in _advise_policy(table)
    ]


def _advise_policy(table: PolicyTable) -> Iterator[str]:
    region = table.acceptance
    if isinstance(region, IcePop) and region.beta < 2.5:
        yield (
            f"acceptance.beta = {region.beta:g}: Ring's authors saw the band [0.5, 2] destabilise training at once, "
            "and chose [0.5, 5] (arXiv 2510.18855, figure 13)"
        )
    if table.surrogate == "gspo" and max(table.clip_eps_low, table.clip_eps_high) > 0.05:
        yield (
            f"clip_eps_high = {table.clip_eps_high:g} hardly clips GSPO's ratio, a mean over the completion: its "
            "authors take 3e-4 and 4e-4 (arXiv 2507.18071)"
        )
    if table.surrogate == "cispo" and table.clip_eps_high < 1:
        yield (
            f"clip_eps_high = {table.clip_eps_high:g} caps CISPO's weights at {1 + table.clip_eps_high:g}: it was "
            "made for wide bounds, such as clip_eps_low = 1 and clip_eps_high = 4 (arXiv 2506.13585)"
        )
    if table.surrogate == "reinforce" and table.updates_per_rollout > 1:
        yield f"updates_per_rollout = {table.updates_per_rollout}: REINFORCE takes every update for the first"
    if table.max_resamples and not table.drop_zero_variance:
        yield "max_resamples draws new problems, yet drop_zero_variance = false keeps those without a signal"
