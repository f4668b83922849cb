"""The resumable state of a training stage: weights, router biases, moments and averages in one safetensors file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tafkir.errors import CheckpointError
from tafkir.runlog.atomic import guard_disk, write_bytes
from tafkir.train.ema import WeightAverage

__all__ = [
    "MOMENTS",
    "Carried",
    "latest_state",
    "load_carried",
    "load_state",
    "load_totals",
    "remove_older_states",
    "save_state",
]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What an optimiser keeps per weight, by torch's names."""


class Carried(Protocol):
    """What a step function takes from one step to the next besides weights, such as unfinished rollouts."""

    def state(self) -> Any:
        """Everything that the next step depends on, as JSON; None where there is nothing."""
        ...

    def load_state(self, state: Any) -> None:
        """Go on from what `state` returned."""
        ...


def latest_state(folder: Path) -> Path | None:
    """The newest complete state in `folder`, or None: a file, or a folder that many ranks wrote."""
    return max(folder.glob("step-*"), default=None)


def remove_older_states(newest: Path) -> None:
    """Remove every other state beside the newest one."""
    with guard_disk(newest.parent):
        for other in newest.parent.glob("step-*"):
            if other.is_dir() and other != newest:
                shutil.rmtree(other)
            elif other != newest:
                other.unlink()


def save_state(
    folder: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    totals: Mapping[str, float] | None = None,
    average: WeightAverage | None = None,
    carried: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after `step` steps, then remove older ones. A kill leaves the older one in place.

    Args:
        average: saved with the weights, where there is one.
        totals: what the steps so far came to, such as tokens and seconds; `load_totals` reads them.
        carried: what else the next step needs, as JSON, by the name of its owner; `load_carried` reads it.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in module.state_dict().items()}
    updates = 0
    for name, param in module.named_parameters():
        found = (optimizer.state[param] for optimizer in optimizers if param in optimizer.state)
        state: dict[str, Tensor] = next(found, {})
        updates = int(state.get("step", updates))
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.tensors.items()}
    if carried:
        text = json.dumps(carried, ensure_ascii=False).encode("utf-8")
        tensors["carried"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    path = folder / f"step-{step:08d}.safetensors"
    metadata = {"step": str(step), "updates": str(updates), "totals": json.dumps(dict(totals or {}))}
    if average is not None:
        metadata["average_updates"] = str(average.num_updates)
    write_bytes(path, save({name: value.detach().contiguous() for name, value in tensors.items()}, metadata))
    remove_older_states(path)
    return path


def load_state(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    average: WeightAverage | None = None,
) -> int:
    """Restore weights, moments and the weights' average in place; returns the number of finished steps.

    Older states, which a kill has kept from being removed, go.

    Raises:
        CheckpointError: the file is damaged, or an average is wanted that it does not hold.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read the training state ({error})", where=str(path), fix="delete this file to redo the stage"
        ) from error
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    module.load_state_dict(weights, strict=True)
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, param in module.named_parameters():
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
        if "exp_avg_sq" in state:
            state["step"] = torch.tensor(float(metadata["updates"]))
        if state:
            owner[id(param)].state[param] = state
    if average is not None:
        if "average_updates" not in metadata:
            raise CheckpointError(
                "the training state has no average of the weights", where=str(path), fix="delete it to redo the stage"
            )
        for name, value in average.tensors.items():
            value.copy_(tensors[f"average.{name}"])
        average.num_updates = int(metadata["average_updates"])
    remove_older_states(path)
    return int(metadata["step"])


def load_totals(path: Path) -> dict[str, float]:
    """What `save_state` was told that the steps so far came to. The file is one that `load_state` has read."""
    with safe_open(path, framework="pt") as file:
        totals: dict[str, float] = json.loads(file.metadata().get("totals", "{}"))
    return totals


def load_carried(path: Path) -> dict[str, Any]:
    """What `save_state` was given to carry; empty where it was given nothing. `load_state` has read the file."""
    with safe_open(path, framework="pt") as file:
        if "carried" not in file.keys():  # noqa: SIM118 (not a dict)
            return {}
        carried: dict[str, Any] = json.loads(bytes(file.get_tensor("carried").tolist()))
    return carried
