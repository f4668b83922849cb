"""The processes that `torchrun` started: joining them, and what rank 0 tells the others between stages."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from tafkir.errors import TrainingError
from tafkir.ops.device import choose_device, collective_backend
from tafkir.recipe.parallel import ParallelSizes

__all__ = ["Followers", "Meshes", "join_world", "leave_world"]

# Rank 0 may evaluate for hours while the others wait to hear of the next stage.
_PATIENCE = timedelta(days=30)


def join_world(device: str) -> torch.device:
    """Join the default process group, once per process; returns this process's device."""
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        store, rank, world = next(rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # On one machine, torchrun's default rendezvous keeps its store over restarts, dead addresses included.
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]  # public all the same
        dist.init_process_group(collective_backend(chosen), store=store, rank=rank, world_size=world)
    return chosen


def leave_world() -> None:
    """Close the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Followers:
    """How rank 0 leads the others through the stages of a recipe."""

    def __init__(self, device: str) -> None:
        join_world(device)
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def tell(self, shared: bool) -> None:
        """Rank 0: say whether the stage that comes now is for everyone."""
        dist.broadcast(torch.tensor(int(shared)), src=0, group=self._group)

    def hear(self) -> bool:
        """The others: wait for what rank 0 says.

        Raises:
            TrainingError: rank 0 has ended.
        """
        said = torch.tensor(0)
        try:
            dist.broadcast(said, src=0, group=self._group)
        except RuntimeError as error:
            raise TrainingError("rank 0 has ended", where=f"rank {dist.get_rank()}", fix="see its message") from error
        return bool(said)


class Meshes:
    """The same ranks as two grids: `dense` for most weights, `expert` for the experts where they are shared out.

    Rank r is (data, expert, tensor) in row-major order; `fsdp` is data and expert taken together.
    """

    def __init__(self, sizes: ParallelSizes, device_type: str) -> None:
        self.sizes = sizes
        self.dense: DeviceMesh = init_device_mesh(
            device_type, (sizes.data_shards, sizes.tensor), mesh_dim_names=("fsdp", "tensor")
        )
        self.expert: DeviceMesh = init_device_mesh(
            device_type, (sizes.data, sizes.expert, sizes.tensor), mesh_dim_names=("data", "expert", "tensor")
        )
