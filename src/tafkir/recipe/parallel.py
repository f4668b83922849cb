"""How many processes share a training stage, and in which way; checked before any of them starts to work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from tafkir.errors import RecipeError
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.rl import PolicyTable
from tafkir.recipe.schema import ParallelConfig, Recipe, TrainTable
from tafkir.recipe.trm import TrmConfig

__all__ = ["ParallelSizes", "check_parallel", "check_shapes", "resolve_sizes", "world_size"]

_SAMPLES = ("rlvr", "rlhf")
# What the others share out.
_SHARED_OUT = {
    "pretrain": "batch_problems",
    "sft": "batch_problems",
    "reward": "batch_pairs",
    "dpo": "batch_pairs",
}


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """Ranks along each dim; rank r is (data, expert, tensor) in row-major order.

    Data is split over `data * expert` ranks; the ranks of one tensor group see the same tokens.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def world(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def data_shards(self) -> int:
        """Parts into which the documents of a step are cut."""
        return self.data * self.expert


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Processes that `torchrun` started together; 1 without it."""
    return int(environ.get("WORLD_SIZE", "1"))


def resolve_sizes(config: ParallelConfig, world: int) -> ParallelSizes:
    """Fill in `data_parallel = -1` and check that the product is the number of processes.

    Raises:
        RecipeError: it is not; says how to launch.
    """
    rest = config.expert_parallel * config.tensor_parallel
    data = config.data_parallel if config.data_parallel > 0 else max(1, world // rest)
    sizes = ParallelSizes(data, config.expert_parallel, config.tensor_parallel)
    if sizes.world != world:
        open_ended = config.data_parallel < 0 and world > 1
        count = rest * max(1, world // rest) if open_ended else sizes.world
        raise RecipeError(
            f"data {sizes.data} x expert {sizes.expert} x tensor {sizes.tensor} is {sizes.world} processes, "
            f"but WORLD_SIZE is {world}",
            where="parallel",
            fix=f"start it with `torchrun --nproc-per-node {count} -m tafkir.cli.main run RECIPE`, "
            "or change the sizes with --set parallel.<name>=<n>",
        )
    return sizes


def check_shapes(model: ModelConfig, sizes: ParallelSizes) -> None:
    """Refuse sizes that do not divide what they have to cut.

    Raises:
        RecipeError: names the size and the model's key.
    """
    if sizes.expert > 1:
        _divides("expert_parallel", sizes.expert, num_experts=model.num_experts)
        if not model.num_experts:
            raise RecipeError("there are no experts to share out", where="parallel.expert_parallel", fix="set it to 1")
    if sizes.tensor > 1:
        _divides(
            "tensor_parallel",
            sizes.tensor,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            intermediate_size=model.intermediate_size,
            moe_intermediate_size=model.moe_intermediate_size,
        )
        # Rows belong to the tensor ranks, so the others cut the columns.
        latent = {"kv_lora_rank": model.kv_lora_rank, "q_lora_rank": model.q_lora_rank}
        widths = {name: width for name, width in latent.items() if width is not None}
        _divides("data_parallel x expert_parallel", sizes.data_shards, hidden_size=model.hidden_size, **widths)


def check_parallel(recipe: Recipe, sizes: ParallelSizes) -> None:
    """Refuse what many processes cannot do yet, before the first stage starts.

    Raises:
        RecipeError: names the key, and what to set instead.
    """
    for name in _SAMPLES:
        if recipe.parallel.device != "cpu" and getattr(recipe, name) is not None:
            raise RecipeError(
                f"{name} samples on the processor",
                where="parallel.device",
                fix=f"set it to cpu, or leave the [{name}] table to another run",
            )
    if sizes.world == 1:
        return
    if recipe.trm is not None:
        _check_replicas(recipe.trm, sizes)
    check_shapes(recipe.model, sizes)
    for name in _SAMPLES:
        sampling: PolicyTable | None = getattr(recipe, name)
        if sampling is not None:
            _check_copies(recipe, name, sampling, sizes)
    for name, key in _SHARED_OUT.items():
        table: TrainTable | None = getattr(recipe, name)
        if table is None:
            continue
        pieces = sizes.data_shards * table.micro_batches
        count: int = getattr(table, key)
        if count < pieces:
            raise RecipeError(
                f"{count} are too few for {sizes.data_shards} ranks x {table.micro_batches} micro-batches",
                where=f"{name}.{key}",
                expected=f"at least {pieces}",
                fix="make the batch larger or start fewer processes",
            )


def _check_copies(recipe: Recipe, stage: str, table: PolicyTable, sizes: ParallelSizes) -> None:
    """Reinforcement learning samples and trains a whole copy of the policy in every process."""
    apart = f"leave out [{stage}] here, then run it from a recipe with this run as its base"
    for name, size in (("expert_parallel", sizes.expert), ("tensor_parallel", sizes.tensor)):
        if size > 1:
            raise RecipeError(f"{stage} holds a whole copy in every process", where=f"parallel.{name}", fix=apart)
    if recipe.cluster is not None or table.engine.kind != "in_process":
        raise RecipeError(
            f"with torchrun, every process of {stage} samples with an engine of its own",
            where="cluster" if recipe.cluster is not None else f"{stage}.engine",
            fix="leave the table out, or start without torchrun",
        )
    if table.long_tail.token_budget:
        raise RecipeError(
            "a pool under a token budget is one process's", where=f"{stage}.long_tail.token_budget", fix="set it to 0"
        )
    if table.prompts_per_step < sizes.data:
        raise RecipeError(
            f"{table.prompts_per_step} are too few for {sizes.data} processes",
            where=f"{stage}.prompts_per_step",
            expected=f"at least {sizes.data}",
            fix="ask for more problems or start fewer processes",
        )


def _check_replicas(table: TrmConfig, sizes: ParallelSizes) -> None:
    """A recursive model is small: every process holds it whole, and its own rows of the batch."""
    for name, size in (("expert_parallel", sizes.expert), ("tensor_parallel", sizes.tensor)):
        if size > 1:
            raise RecipeError(
                "the recursive model is not split: every process holds it whole",
                where=f"parallel.{name}",
                fix="set it to 1; data_parallel splits the batch",
            )
    if table.batch_size < sizes.data:
        raise RecipeError(
            f"{table.batch_size} puzzles are too few for {sizes.data} processes",
            where="trm.batch_size",
            expected=f"at least {sizes.data}",
            fix="make the batch larger or start fewer processes",
        )


def _divides(key: str, size: int, **counts: int) -> None:
    for name, count in counts.items():
        if count % size:
            raise RecipeError(
                f"{size} does not divide model.{name} = {count}",
                where=f"parallel.{key}",
                fix=f"take a divisor, such as {gcd(size, count)}",
            )
