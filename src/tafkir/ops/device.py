"""Which device torch computes on: the one place that knows their names."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Literal

import torch

from tafkir.errors import BackendUnavailable
from tafkir.native.compiled import OVERRIDE

__all__ = ["choose_device", "collective_backend", "device_kernels", "find_devices"]

_KINDS = ("cuda", "npu", "mps", "cpu")


def find_devices() -> list[str]:
    """Kinds of device that are there, best first; the last one is `cpu`.

    `cuda` is NVIDIA's or, in a ROCm build, AMD's. `npu` is Ascend's, and needs the package `torch_npu`.
    """
    if importlib.util.find_spec("torch_npu"):
        importlib.import_module("torch_npu")
    return [kind for kind in _KINDS if kind == "cpu" or _is_available(kind)]


def _is_available(kind: str) -> bool:
    module = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return module is not None and bool(module.is_available())


def choose_device(wanted: str = "auto", index: int = 0, where: str = "parallel.device") -> torch.device:
    """The device to compute on, made the current one where its kind has several.

    Args:
        wanted: `auto` for the best that is there, or a kind.
        index: which of them; under torchrun, the local rank.
        where: named in errors.

    Raises:
        BackendUnavailable: there is no such device here.
    """
    found = find_devices()
    kind = found[0] if wanted == "auto" else wanted
    if kind not in found:
        raise BackendUnavailable(f"torch finds no {kind} device", where=where, expected=", ".join(found))
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    module = getattr(torch, kind)
    if index >= module.device_count():
        raise BackendUnavailable(
            f"process {index} of this machine has no {kind} device: there are {module.device_count()}",
            fix=f"start at most {module.device_count()} processes per machine (torchrun --nproc-per-node)",
        )
    device = torch.device(kind, index)
    module.set_device(device)
    return device


def device_kernels(device: torch.device) -> Literal["triton", "torch"]:
    """What serves on a device: Triton's kernels on CUDA where the package is there (TAFKIR_KERNELS=torch: not even
    then), torch everywhere else.

    Raises:
        BackendUnavailable: TAFKIR_KERNELS=native asks for kernels on CUDA, and there is no Triton.
    """
    word = os.environ.get(OVERRIDE, "auto")
    if device.type != "cuda" or word == "torch":
        return "torch"
    if importlib.util.find_spec("triton"):
        return "triton"
    if word == "native":
        raise BackendUnavailable("the triton package is not installed", where=OVERRIDE, fix="pip install triton")
    return "torch"


def collective_backend(device: torch.device) -> str:
    """The process-group backend for a kind of device: its own library, and gloo for what lives in main memory."""
    own = {"cuda": "nccl", "npu": "hccl"}.get(device.type)
    return f"cpu:gloo,{device.type}:{own}" if own else "gloo"
