"""Training states of many ranks: a folder from which any number of processes resumes.

Tensors have the names and the order of entries that a single process's state has, so both kinds can follow each other.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tafkir.errors import CheckpointError, RunDirError
from tafkir.models.decoder import Decoder
from tafkir.models.reward import RewardModel
from tafkir.runlog.atomic import fsync_dir, guard_disk, read_json, write_json
from tafkir.train.ema import WeightAverage
from tafkir.train.parallel.tensor import Order
from tafkir.train.state import MOMENTS, remove_older_states

__all__ = ["SHARDED_SUFFIX", "gather_decoder", "load_sharded", "load_whole", "save_sharded"]

SHARDED_SUFFIX = ".dcp"
_HEADER = "state.json"
_REDO = "delete this file to redo the stage"

Orders = Mapping[str, Order]
Optimizers = Sequence[torch.optim.Optimizer]


def save_sharded(
    folder: Path,
    decoder: Decoder,
    optimizers: Optimizers,
    average: WeightAverage | None,
    step: int,
    totals: Mapping[str, float],
    orders: Orders,
) -> Path:
    """Write `step-<n>.dcp` with every rank's part, then remove older states; called by all ranks.

    The folder appears under its name only when it is complete.
    """
    path = folder / f"step-{step:08d}{SHARDED_SUFFIX}"
    staging = folder / f".{path.name}.tmp"
    main = dist.get_rank() == 0
    if main:
        with guard_disk(folder):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    dist.barrier()
    tensors = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    updates = 0
    for name, param in decoder.named_parameters():
        state = _state_of(param, optimizers)
        updates = int(state.get("step", updates))
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    header: dict[str, Any] = {"step": step, "updates": updates, "totals": dict(totals)}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.tensors.items()}
        header["average_updates"] = average.num_updates
    stored = {name: _to_stored(value, _order_of(name, orders)) for name, value in tensors.items()}
    with guard_disk(folder):
        save(stored, storage_writer=FileSystemWriter(staging, sync_files=True))
        if main:
            write_json(staging / _HEADER, header)
            shutil.rmtree(path, ignore_errors=True)
            staging.rename(path)
            fsync_dir(folder)
            remove_older_states(path)
    dist.barrier()
    return path


def load_sharded(
    path: Path, decoder: Decoder, optimizers: Optimizers, average: WeightAverage | None, orders: Orders
) -> tuple[int, dict[str, float]]:
    """Restore weights and moments in place from a state of many ranks, on any number of them.

    Args:
        path: a folder that `save_sharded` wrote.
        decoder: sharded, or whole in a single process.
        optimizers: of its parameters.
        average: restored as well, where there is one.
        orders: of the sharded decoder's fused weights; empty for a whole one.

    Returns:
        The number of finished steps, and what they came to.

    Raises:
        CheckpointError: the state is damaged, or of another model.
    """
    alone = not dist.is_initialized()
    try:
        header: dict[str, Any] = read_json(path / _HEADER)
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        targets = _targets(decoder, optimizers, average, names, header)
        # What lies in another order in memory is read beside it; the rest is read in place.
        stored = {name: torch.empty_like(t) if _order_of(name, orders) else t.detach() for name, t in targets.items()}
        with warnings.catch_warnings():
            # torch says that it loads in a single process, as it was asked to.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(stored, storage_reader=FileSystemReader(path), no_dist=alone)
    except (OSError, RunDirError, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the training state ({' '.join(str(error).split())[:200]})", where=str(path), fix=_REDO
        ) from error
    for name, target in targets.items():
        if order := _order_of(name, orders):
            _local(target).copy_(_local(_reorder(cast(DTensor, stored[name]), order, order.apply)))
    return int(header["step"]), header["totals"]


def load_whole(
    path: Path, decoder: Decoder, optimizers: Optimizers, average: WeightAverage | None, orders: Orders
) -> tuple[int, dict[str, float]]:
    """As `load_sharded`, for a sharded decoder from a single process's state file."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        names = set(file.keys())
        targets = _targets(decoder, optimizers, average, names, header)
        if missing := targets.keys() - names:
            raise CheckpointError(f"{min(missing)} is missing", where=str(path), fix=_REDO)
        for name, target in targets.items():
            whole = file.get_tensor(name)
            order = _order_of(name, orders)
            whole = order.apply(whole) if order else whole
            if isinstance(target, DTensor):
                whole = whole.to(target.device)
                whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            _local(target).copy_(_local(whole))
    return int(header["step"]), json.loads(header.get("totals", "{}"))


def gather_decoder(decoder: Decoder, orders: Orders, *, keep: bool) -> Decoder | None:
    """The whole decoder on the CPU for those who keep it; called by all ranks, one weight in flight at a time."""
    weights: dict[str, Tensor] = {}
    for name, value in decoder.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            order = orders.get(name)
            weights[name] = (order.undo(whole) if order else whole).cpu()
    if not keep:
        return None
    with torch.device("meta"):
        gathered = RewardModel(decoder.config) if isinstance(decoder, RewardModel) else Decoder(decoder.config)
    gathered.load_state_dict(weights, strict=True, assign=True)
    return gathered


def _targets(
    decoder: Decoder,
    optimizers: Optimizers,
    average: WeightAverage | None,
    stored: Collection[str],
    header: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Where each stored tensor goes; moments that are not there yet are made."""
    targets: dict[str, Tensor] = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, param in decoder.named_parameters():
        state: dict[str, Tensor] = {m: torch.zeros_like(param) for m in MOMENTS if f"{m}.{name}" in stored}
        targets |= {f"{moment}.{name}": value for moment, value in state.items()}
        if "exp_avg_sq" in state:
            state["step"] = torch.tensor(float(header["updates"]))
        if state:
            owner[id(param)].state[param] = state
    if average is not None:
        targets |= {f"average.{name}": value for name, value in average.tensors.items()}
        average.num_updates = int(header["average_updates"])
    return targets


def _state_of(param: Tensor, optimizers: Optimizers) -> dict[str, Tensor]:
    return next((optimizer.state[param] for optimizer in optimizers if param in optimizer.state), {})


def _order_of(name: str, orders: Orders) -> Order | None:
    return orders.get(name.split(".", 1)[1])


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _to_stored(value: Tensor, order: Order | None) -> Tensor:
    return value if order is None else _reorder(cast(DTensor, value), order, order.undo)


def _reorder(value: DTensor, order: Order, change: Callable[[Tensor], Tensor]) -> DTensor:
    """Change the order of entries along a sharded dim: the ranks that split it see all of it for a moment."""
    whole = [Replicate() if isinstance(p, Shard) and p.dim == order.dim else p for p in value.placements]
    opened = cast(DTensor, value.detach()).redistribute(placements=whole)
    changed = DTensor.from_local(
        change(opened.to_local()), value.device_mesh, whole, run_check=False, shape=value.shape, stride=value.stride()
    )
    return changed.redistribute(placements=value.placements)
