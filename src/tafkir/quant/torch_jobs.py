"""Weights from the files of one checkpoint to those of another by torch's arithmetic: every format, on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from tafkir.checkpoint.files import SCALE_SUFFIX, StoredFiles
from tafkir.checkpoint.manifest import MANIFEST_NAME
from tafkir.checkpoint.read import WeightFiles
from tafkir.checkpoint.tensors import STORED_DTYPES
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import dequantize_fp8_blocks
from tafkir.ops.nvfp4 import block_amax
from tafkir.quant.encode import encode_weight
from tafkir.quant.formats import NVFP4_FORMATS, Piece
from tafkir.quant.plan import Job, QuantizePlan
from tafkir.quant.policy import Decision
from tafkir.quant.shards import Shard
from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["Calibrated", "TorchJobs", "one_thread_each"]

_COPY_BYTES = 4 << 20


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within, torch uses one thread for an operation: the workers are as many as there are to be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Calibrated(Protocol):
    """What was found on data, and decides besides the settings; `quant.calibration.Calibration`."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, weight: Tensor, decision: Decision, config: QuantizeConfig, amax: Tensor | None) -> list[Tensor]:
        """As `encode_weight`."""
        ...

    def cache_scales(self, layer: int) -> tuple[float, float]:
        """Of a layer's keys and values: largest magnitude / 448, in FP8 and in NVFP4."""
        ...


class TorchJobs:
    """What torch does of a plan: all of it.

    Args:
        files: the source.
        plan: what becomes of it.
        config: formats and layout.
        calibration: what was found on data.
    """

    def __init__(
        self,
        files: StoredFiles,
        plan: QuantizePlan,
        config: QuantizeConfig,
        calibration: Calibrated | None = None,
    ) -> None:
        self._files, self._plan, self._config = WeightFiles.of(files), plan, config
        self._calibration = calibration

    def run(self, job: Job, shard: Shard) -> dict[str, str]:
        """As `NativeJobs.run`."""
        return _run(job, self._files, self._plan, self._config, shard, self._calibration)


@torch.no_grad()
def _run(
    job: Job,
    files: WeightFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    shard: Shard,
    calibration: Calibrated | None,
) -> dict[str, str]:
    """Read, quantize and write the weights of a job; returns the hash of every tensor written."""
    if job.decisions[0].format == "keep":
        (piece,), name = job.pieces[0], job.decisions[0].name
        copy = _copy_unchecked if name in plan.not_finite else _copy
        return {piece.name: copy(files, name, piece, shard)}
    weights = [_read(files, d.name, d.format, plan.dtypes[d.name]) for d in job.decisions]
    amax = None
    if len(weights) > 1 and job.decisions[0].format in NVFP4_FORMATS:
        amax = torch.stack([block_amax(weight).amax() for weight in weights if isinstance(weight, Tensor)]).amax()
    elif len(weights) > 1 and job.decisions[0].format == "fp8" and ".experts." in job.decisions[0].name:
        # ModelOpt lets an expert's two maps share this scale, and those of a dense layer not.
        amax = torch.stack([weight.abs().amax() for weight in weights if isinstance(weight, Tensor)]).amax()
    hashes = {}
    for index, (decision, pieces) in enumerate(zip(job.decisions, job.pieces, strict=True)):
        weight = weights[index]
        try:
            if isinstance(weight, list):
                made = weight
            elif calibration is not None:
                made = calibration.encode(weight, decision, config, amax)
            else:
                made = encode_weight(weight, decision.format, config, amax=amax)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=decision.name, expected=error.expected, fix=error.fix) from error
        weights[index] = []
        for piece, tensor in zip(pieces, made, strict=True):
            stored = tensor.reshape(piece.shape).to(STORED_DTYPES[piece.dtype]).contiguous()
            hashes[piece.name] = shard.write(piece.name, _content(stored))
    return hashes


def _read(files: WeightFiles, name: str, format: str, dtype: str) -> Tensor | list[Tensor]:
    """A weight in the dtype it is computed in; FP8 blocks that stay FP8 blocks as they are, codes and scales."""
    stored = files.tensors.get(name)
    if format == "fp8_block" and files.block_size == (128, 128) and stored and stored.dtype == "F8_E4M3":
        return [files.read_stored(name), files.read_stored(f"{name}_scale_inv").float()]
    weight = torch.empty(files.shape(name), dtype=STORED_DTYPES[dtype])
    files.read_into(name, weight)
    return weight


def _copy(files: WeightFiles, name: str, piece: Piece, shard: Shard) -> str:
    """Write a tensor as it is, a few rows at a time; FP8 and codes become BF16."""
    dtype, shape = STORED_DTYPES[piece.dtype], piece.shape
    tensor = shard.tensor(piece.name)
    width = torch.Size(shape[1:]).numel()
    whole = len(shape) not in (1, 2) or name in files.encoded or piece.num_bytes <= _COPY_BYTES
    rows = shape[0] if shape else 1
    step = rows if whole else max(1, _COPY_BYTES // max(1, width * dtype.itemsize))
    if files.block_size:
        step = max(step // files.block_size[0], 1) * files.block_size[0]
    scratch = None if whole else torch.empty(min(step, rows), *shape[1:], dtype=dtype)
    for start in range(0, max(rows, 1), max(step, 1)):
        if scratch is None:
            part = torch.empty(shape, dtype=dtype)
            files.read_into(name, part)
        else:
            part = scratch[: min(step, rows - start)]
            files.read_window(name, shape, range(start, start + len(part)), range(width), part)
        tensor.append(_content(part))
        if whole:
            break
    manifest, found = files.manifest, tensor.hash()
    entry = manifest.tensors.get(name) if manifest else None
    if entry is not None and entry.dtype == str(dtype).removeprefix("torch.") and entry.sha256 != found:
        raise CheckpointError(
            f"the tensor is not the one that {MANIFEST_NAME} describes",
            where=f"{files.listing.parent}: {name}",
            fix="take the checkpoint anew",
        )
    return found


def _copy_unchecked(files: WeightFiles, name: str, piece: Piece, shard: Shard) -> str:
    """Write a weight that is known not to be finite."""
    stored = files.read_stored(name)
    if files.block_size is not None and stored.dtype == torch.float8_e4m3fn:
        scale = files.read_stored(name + SCALE_SUFFIX)
        stored = dequantize_fp8_blocks(stored, scale, files.block_size, dtype=STORED_DTYPES[piece.dtype])
    return shard.write(piece.name, _content(stored))


def _content(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
