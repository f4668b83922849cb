"""Weights from the files of one checkpoint to those of another by the compiled kernels alone, without torch.

A weight is read in chunks that fit a processor's cache, and so is what becomes of it. Weights that share a global scale
are held between finding it and using it, or read a second time where they are large: memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from array import array
from collections.abc import Iterator, Sequence

from tafkir.checkpoint.files import SCALE_SUFFIX, StoredFiles
from tafkir.errors import CheckpointError
from tafkir.native.weights import KINDS, Buffer, Rule, WeightKernels
from tafkir.ops.blocks import FP8_BLOCK_SIZE, NVFP4_BLOCK_SIZE
from tafkir.quant.formats import NVFP4_FORMATS, Piece
from tafkir.quant.plan import Job, QuantizePlan
from tafkir.quant.policy import Decision
from tafkir.quant.shards import Shard
from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["NativeJobs"]

CHUNK_BYTES = 1 << 20
"""Of values that are worked on at once: they and their codes stay in the processor's own cache."""

HELD_BYTES = 64 << 20
"""Weights that share a scale are held in memory up to this size."""

_FLOAT_BYTES = {"BF16": 2, "F32": 4}
_RULES: dict[str, Rule] = {"max": "max", "four_over_six": "four_over_six", "mse": "mse"}


class _Workspace(threading.local):
    """The buffers of one thread."""

    def __init__(self) -> None:
        self.values, self.stored, self.codes, self.scale = (Buffer() for _ in range(4))


class NativeJobs:
    """What the kernels do of a plan.

    Args:
        files: the source.
        plan: what becomes of it.
        config: formats and layout.
        kernels: compiled.
    """

    def __init__(self, files: StoredFiles, plan: QuantizePlan, config: QuantizeConfig, kernels: WeightKernels) -> None:
        self._files, self._plan, self._config, self._kernels = files, plan, config, kernels
        self._workspace = _Workspace()

    def takes(self, job: Job) -> bool:
        """Whether the kernels know its formats; all others are torch's business."""
        return all(self._takes(decision) for decision in job.decisions)

    def _takes(self, decision: Decision) -> bool:
        config, files, name, format = self._config, self._files, decision.name, decision.format
        if name in files.encoded or self._plan.dtypes[name] not in _FLOAT_BYTES or not decision.numel:
            return False
        if _is_fp8(files, name) and files.tensors[name + SCALE_SUFFIX].dtype not in KINDS:
            return False
        if format in NVFP4_FORMATS:
            return config.scale_choice in _RULES
        if format == "fp8_channel":
            return config.layout == "modelopt"
        return format in ("keep", "fp8_block")

    def run(self, job: Job, shard: Shard) -> dict[str, str]:
        """Read, quantize and write the weights of a job; returns the hash of every tensor written.

        Raises:
            CheckpointError: a weight is not finite, or not what the source's manifest says.
        """
        if job.decisions[0].format in NVFP4_FORMATS:
            return self._nvfp4(job, shard)
        hashes: dict[str, str] = {}
        for decision, pieces in zip(job.decisions, job.pieces, strict=True):
            if decision.format == "keep":
                hashes |= self._keep(decision.name, pieces[0], shard)
            elif (
                self._files.block_size == FP8_BLOCK_SIZE
                and decision.format == "fp8_block"
                and _is_fp8(self._files, decision.name)
            ):
                hashes |= self._copy_fp8(decision.name, pieces, shard)
            else:
                hashes |= self._fp8(decision, pieces, shard)
        return hashes

    def _keep(self, name: str, piece: Piece, shard: Shard) -> dict[str, str]:
        """As it is; FP8 as BF16."""
        weight, tensor, buffer = self._open(name), shard.tensor(piece.name), self._workspace.values
        for rows in weight.chunks():
            tensor.append(weight.read(rows, buffer))
        weight.finish()
        return {piece.name: tensor.hash()}

    def _copy_fp8(self, name: str, pieces: Sequence[Piece], shard: Shard) -> dict[str, str]:
        """FP8 blocks that stay FP8 blocks: the codes bit for bit, the scales as float32."""
        stored, buffer, digest = self._files.tensors[name], self._workspace.stored, hashlib.sha256()
        codes = shard.tensor(pieces[0].name)
        for start in range(0, stored.num_bytes, CHUNK_BYTES):
            content = buffer.view(min(CHUNK_BYTES, stored.num_bytes - start))
            self._files.read_at(stored, stored.offset + start, content)
            chunk = bytes(content)
            if 0x7F in chunk or 0xFF in chunk:
                raise _not_finite(self._files, name)
            digest.update(chunk)
            codes.append(content)
        _check_hash(self._files, name, digest)
        scales = memoryview(self._open(name).scales).cast("B")
        return {pieces[0].name: codes.hash(), pieces[1].name: shard.write(pieces[1].name, scales)}

    def _fp8(self, decision: Decision, pieces: Sequence[Piece], shard: Shard) -> dict[str, str]:
        """To E4M3 in blocks or by rows."""
        weight, space = self._open(decision.name), self._workspace
        tile = FP8_BLOCK_SIZE if decision.format == "fp8_block" else (1, weight.width)
        columns = -(-weight.width // tile[1])
        codes, scale = shard.tensor(pieces[0].name), shard.tensor(pieces[1].name)
        for rows in weight.chunks(tile[0]):
            weight.read(rows, space.values)
            made = space.codes.view(len(rows) * weight.width)
            scales = space.scale.view(-(-len(rows) // tile[0]) * columns * 4)
            shape = (len(rows), weight.width)
            self._kernels.quantize_fp8(
                space.values.address, weight.dtype, shape, tile, space.codes.address, space.scale.address
            )
            codes.append(made)
            scale.append(scales)
        weight.finish()
        return {pieces[0].name: codes.hash(), pieces[1].name: scale.hash()}

    def _nvfp4(self, job: Job, shard: Shard) -> dict[str, str]:
        """First the largest magnitude of all weights of the job, then each of them."""
        space, config = self._workspace, self._config
        peer = config.layout == "compressed-tensors"
        rule: Rule = "inverse" if peer and config.scale_choice == "max" else _RULES[config.scale_choice]
        weights = [self._open(decision.name) for decision in job.decisions]
        held = sum(weight.num_bytes for weight in weights) <= HELD_BYTES
        buffer = space.values
        buffer.view(sum(weight.num_bytes for weight in weights) if held else 0)
        amax, start = 0.0, 0
        for weight in weights:
            for rows in weight.chunks():
                weight.read(rows, buffer, start)
                start = start + len(rows) * weight.row_bytes if held else 0
            amax = max(amax, weight.finish())
        total = self._kernels.global_scale(weights[0].dtype, rule, amax)
        if peer and rule != "inverse":
            total = 1.0 / total
        hashes: dict[str, str] = {}
        start = 0
        for weight, pieces in zip(weights, job.pieces, strict=True):
            packed, scale = shard.tensor(pieces[0].name), shard.tensor(pieces[1].name)
            weight.rewind()
            for rows in weight.chunks():
                if not held:
                    weight.read(rows, buffer)
                values, start = buffer.address + start, start + len(rows) * weight.row_bytes if held else 0
                blocks = len(rows) * weight.width // NVFP4_BLOCK_SIZE
                codes, scales = space.codes.view(blocks * NVFP4_BLOCK_SIZE // 2), space.scale.view(blocks)
                self._kernels.quantize_nvfp4(
                    values, weight.dtype, blocks, rule, amax, space.scale.address, space.codes.address
                )
                packed.append(codes)
                scale.append(scales)
            hashes |= {pieces[0].name: packed.hash(), pieces[1].name: scale.hash()}
            numbers = [total, 1.0 / config.input_scale if peer else config.input_scale]
            for piece, number in zip(pieces[2:], numbers, strict=False):
                hashes[piece.name] = shard.write(piece.name, memoryview(struct.pack("<f", number)))
        return hashes

    def _open(self, name: str) -> _Weight:
        checked = name not in self._plan.not_finite
        return _Weight(self._files, name, self._plan.dtypes[name], self._kernels, self._workspace, checked)


class _Weight:
    """A weight of the source, read by rows as the numbers it is worth; FP8 becomes bfloat16.

    A tensor of other than two dims counts as one column.

    Attributes:
        dtype: of the numbers.
        width: numbers a row.
        row_bytes: their bytes.
        num_bytes: of all numbers.
        scales: float32, of FP8 blocks.
    """

    def __init__(
        self,
        files: StoredFiles,
        name: str,
        dtype: str,
        kernels: WeightKernels,
        workspace: _Workspace,
        checked: bool,
    ) -> None:
        self._files, self._name, self._kernels, self._codes = files, name, kernels, workspace.stored
        self._checked = checked
        self._stored = files.tensors[name]
        self.dtype, shape = dtype, self._stored.shape
        self._rows, self.width = shape if len(shape) == 2 else (math.prod(shape), 1)
        self.row_bytes = self.width * _FLOAT_BYTES[dtype]
        self.num_bytes = self._rows * self.row_bytes
        self._amax, self._digest = 0.0, hashlib.sha256() if files.check_entry(name) else None
        self._fp8 = _is_fp8(files, name)
        self.scales = self._read_scales() if self._fp8 else array("f")

    def _read_scales(self) -> array[float]:
        name = self._name + SCALE_SUFFIX
        stored = self._files.tensors[name]
        content, count = self._codes.view(stored.num_bytes), math.prod(stored.shape)
        self._files.read_at(stored, stored.offset, content)
        if self._files.check_entry(name):
            _check_hash(self._files, name, hashlib.sha256(content))
        scales = array("f", bytes(4 * count))
        finite = self._kernels.widen_scales(self._codes.address, stored.dtype, count, scales.buffer_info()[0])
        if self._checked and not finite:
            where = f"{stored.file}: {name}"
            raise CheckpointError("the scales are not finite and positive", where=where, fix="save the weights again")
        return scales

    def chunks(self, multiple: int = 1) -> Iterator[range]:
        """The rows in parts of about `CHUNK_BYTES`, but the last a multiple of some number of rows."""
        step = max(1, CHUNK_BYTES // max(1, self.row_bytes * multiple)) * multiple
        for first in range(0, self._rows, step):
            yield range(first, min(first + step, self._rows))

    def read(self, rows: range, buffer: Buffer, start: int = 0) -> memoryview:
        """Fill a buffer from `start` on with some rows, which are read in their order, and checked to be finite unless
        they are known not to be."""
        size, count = len(rows) * self.row_bytes, len(rows) * self.width
        place = buffer.view(start + size)[start:]
        content = self._codes.view(count) if self._fp8 else place
        offset = rows.start * (self.width if self._fp8 else self.row_bytes)
        self._files.read_at(self._stored, self._stored.offset + offset, content)
        if self._digest is not None:
            self._digest.update(content)
        address = buffer.address + start
        if self._fp8:
            assert self._files.block_size is not None  # `open_files` refuses FP8 without it
            scales, block = self.scales.buffer_info()[0], self._files.block_size
            finite = self._kernels.dequantize_fp8(self._codes.address, scales, rows, self.width, block, address)
            if self._checked and not finite:
                raise _not_finite(self._files, self._name)
        self._amax = self._kernels.amax(address, self.dtype, count, self._amax)
        if self._checked and not math.isfinite(self._amax):
            raise _not_finite(self._files, self._name)
        return place

    def finish(self) -> float:
        """All rows were read: compare them with the source's manifest; returns the largest magnitude."""
        if self._digest is not None:
            _check_hash(self._files, self._name, self._digest)
        return self._amax

    def rewind(self) -> None:
        """From here on rows are read a second time."""
        self._digest = None


def _is_fp8(files: StoredFiles, name: str) -> bool:
    return files.tensors[name].dtype == "F8_E4M3"


def _check_hash(files: StoredFiles, name: str, digest: hashlib._Hash) -> None:
    expected = files.check_entry(name)
    if expected is not None and files.verify_hashes and expected != digest.hexdigest():
        raise files.unlike_manifest(name)


def _not_finite(files: StoredFiles, name: str) -> CheckpointError:
    where = f"{files.tensors[name].file}: {name}"
    return CheckpointError(
        "the weights are not finite", where=where, fix="use an earlier checkpoint, or --non-finite keep"
    )
