"""Quantizes a checkpoint on disk: weight by weight, in memory that does not depend on its size, resumable after a kill.

Work lies beside the destination as `.NAME.quantizing` until all of it is written, checked and renamed. Weights that
share a global scale are read, quantized and written by one worker; several work at once, within a budget of memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tafkir.checkpoint.header import STORED_DTYPES, StoredTensor, layout, read_header
from tafkir.checkpoint.load import read_manifest
from tafkir.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorEntry
from tafkir.checkpoint.quantized import packed_method
from tafkir.checkpoint.read import INDEX_FILE, SINGLE_FILE, WeightFiles, fp8_block_size, open_weights, read_json
from tafkir.checkpoint.save import MAX_SHARD_BYTES, publish_folder, write_error
from tafkir.errors import CapacityError, CheckpointError
from tafkir.ops.nvfp4 import block_amax
from tafkir.quant.formats import NVFP4_FORMATS, Piece, encode_weight
from tafkir.quant.layouts import compressed_tensors_config, modelopt_configs
from tafkir.quant.plan import Job, QuantizePlan, plan_quantization
from tafkir.quant.validate import validate_checkpoint
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.runlog.atomic import write_json
from tafkir.runlog.progress import Progress

__all__ = ["QuantizeResult", "open_source", "quantize_checkpoint"]

QUANT_CONFIG_FILE = "hf_quant_config.json"
_JOURNAL = ".progress.json"
_LOCK = ".lock"
_MARGIN_BYTES = 64 << 20
_BUDGET_BYTES = 384 << 20
_COPY_BYTES = 4 << 20
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was done.

    Attributes:
        path: the new checkpoint.
        source_bytes: of the source's tensors.
        output_bytes: of the written ones.
        resumed_bytes: of them, those that an earlier process had written.
        rows: the table of `QuantizePlan.rows`.
    """

    path: Path
    source_bytes: int
    output_bytes: int
    resumed_bytes: int
    rows: list[dict[str, Any]]


@contextmanager
def open_source(name: Path | str) -> Iterator[tuple[WeightFiles, dict[str, Any]]]:
    """The weights and the config.json of a checkpoint that is to be quantized or compared."""
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    blocks, packed = fp8_block_size(hf_config, str(path / "config.json")), packed_method(hf_config, path)
    with open_weights(path, block_size=blocks, packed=packed, manifest=read_manifest(path)) as files:
        yield files, hf_config


@torch.no_grad()
def quantize_checkpoint(
    source: Path | str,
    path: Path | str,
    config: QuantizeConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    lineage: Mapping[str, Any] | None = None,
) -> QuantizeResult:
    """Write a quantized copy of a checkpoint.

    Memory stays within the budget of 384 MB or the largest group of weights that share a scale, whichever is more,
    besides the program itself. Equal sources and configs give equal bytes, whatever the number of workers.

    Args:
        source: a checkpoint folder, or the name of a bundled one: BF16, FP16, FP32, DeepSeek's FP8 blocks, or
            quantized, in which case the codes are first brought back to BF16.
        path: the new folder; must not be there. What a killed process left beside it is taken over.
        config: formats and layout.
        max_shard_bytes: of a file's tensors; also what is redone at most after a kill.
        workers: weights that are worked on at once, each by one thread.
        lineage: what the manifest says of where the weights come from.

    Raises:
        CheckpointError: the source is damaged, holds numbers that are not finite, changes during the work, or has
            tensors that no rule names; the destination exists; another process writes it.
        CapacityError: the disk has too little room.
        RecipeError: a rule matches nothing or asks for what a tensor cannot be.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError("is there already", where=str(path), fix="choose another folder, or remove it")
    with open_source(source) as (files, hf_config):
        plan = plan_quantization(files, hf_config, config, max_shard_bytes)
        before = _identity(files)
        try:
            with _staging(path) as staging:
                resumed = _write_shards(staging, files, plan, config, {"config": hf_config, "files": before}, workers)
                if _identity(files) != before:
                    raise CheckpointError(
                        "the source changed while it was read", where=str(files.listing.parent), fix="run it again"
                    )
                _write_rest(staging, files, plan, config, hf_config, dict(lineage or {}))
                validate_checkpoint(staging, plan.decisions, config)
                for name in (_JOURNAL, _LOCK):
                    (staging / name).unlink(missing_ok=True)
                publish_folder(staging, path)
        except OSError as error:
            raise write_error(path, error) from error
    return QuantizeResult(path, plan.source_bytes, plan.output_bytes, resumed, plan.rows())


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """The folder beside the destination in which an earlier process may have begun; held by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.quantizing"
    staging.mkdir(exist_ok=True)
    with (staging / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError("another process writes this checkpoint", where=str(staging)) from error
        yield staging


def _identity(files: WeightFiles) -> dict[str, list[int]]:
    """Size and time of change of every file of the source."""
    return {
        file.name: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in (*files.descriptors, files.listing)
    }


# ---- the journal ----------------------------------------------------------------------------------------------------


class _Journal:
    """Which shards are finished, with the hash of every tensor in them; on disk after each."""

    def __init__(self, staging: Path, plan: QuantizePlan, config: QuantizeConfig, source: Mapping[str, Any]) -> None:
        self.path = staging / _JOURNAL
        shards = {file: [[p.name, p.dtype, list(p.shape)] for p in pieces] for file, pieces in plan.shards.items()}
        said = json.dumps([shards, config.model_dump(mode="json"), source], sort_keys=True)
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()
        self.finished: dict[str, dict[str, str]] = {}
        self._guard = threading.Lock()
        try:
            content = read_json(self.path)
        except CheckpointError:
            content = {}
        if content.get("fingerprint") == self.fingerprint:
            self.finished = content["finished"]
        else:
            for file in staging.glob("*.safetensors"):
                file.unlink()

    def verify(self, staging: Path, plan: QuantizePlan) -> None:
        """Forget the shards whose bytes are not those that were written."""
        for file in list(self.finished):
            if not _is_whole(staging / file, plan.shards[file], self.finished[file]):
                del self.finished[file]

    def finish(self, file: str, hashes: dict[str, str]) -> None:
        with self._guard:
            self.finished[file] = hashes
            write_json(self.path, {"fingerprint": self.fingerprint, "finished": self.finished})


def _is_whole(file: Path, pieces: Sequence[Piece], hashes: Mapping[str, str]) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        stored = read_header(file, descriptor)
        if stored.keys() != {piece.name for piece in pieces}:
            return False
        return all(_hash_of(descriptor, tensor) == hashes.get(name) for name, tensor in stored.items())
    except CheckpointError:
        return False
    finally:
        os.close(descriptor)


def _hash_of(descriptor: int, stored: StoredTensor) -> str:
    digest = hashlib.sha256()
    for start in range(0, stored.num_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, stored.num_bytes - start)
        digest.update(os.pread(descriptor, size, stored.offset + start))
    return digest.hexdigest()


# ---- the work -------------------------------------------------------------------------------------------------------


class _Shard:
    """A file that is being written: where its tensors go, and how many are still to come."""

    def __init__(self, file: Path, pieces: Sequence[Piece]) -> None:
        header, self.placed = layout(file, ((p.name, p.dtype, p.shape) for p in pieces))
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        size = len(header) + sum(p.num_bytes for p in pieces)
        os.ftruncate(self.descriptor, size)
        _write_at(self.descriptor, memoryview(header), 0)
        self.hashes: dict[str, str] = {}
        self.missing = len(pieces)

    def write(self, name: str, content: memoryview) -> str:
        _write_at(self.descriptor, content, self.placed[name].offset)
        return hashlib.sha256(content).hexdigest()


def _write_shards(
    staging: Path,
    files: WeightFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    source: Mapping[str, Any],
    workers: int,
) -> int:
    """Write what is not there yet; returns the bytes that were."""
    journal = _Journal(staging, plan, config, source)
    journal.verify(staging, plan)
    jobs = [job for job in plan.jobs if job.file not in journal.finished]
    resumed = sum(p.num_bytes for file in journal.finished for p in plan.shards[file])
    _check_room(staging, plan.output_bytes - resumed)
    done = plan.source_bytes - sum(job.source_bytes for job in jobs)
    megabytes = max(1, plan.source_bytes >> 20)
    label = f"quantize {files.listing.parent.name} (MB)"
    with ExitStack() as stack, Progress(label, megabytes, start=done >> 20) as progress:
        shards: dict[str, _Shard] = {}
        stack.callback(_close, shards)
        for job, hashes in _run_all(jobs, files, plan, config, shards, staging, workers):
            shard = shards[job.file]
            shard.hashes |= hashes
            shard.missing -= len(hashes)
            if not shard.missing:
                os.fsync(shard.descriptor)
                os.close(shards.pop(job.file).descriptor)
                journal.finish(job.file, shard.hashes)
            done += job.source_bytes
            progress.update(min(megabytes, done >> 20), groups=len(job.decisions))
        progress.update(megabytes)
    return resumed


def _close(shards: Mapping[str, _Shard]) -> None:
    for shard in shards.values():
        os.close(shard.descriptor)


def _check_room(staging: Path, wanted: int) -> None:
    begun = sum(file.stat().st_blocks * 512 for file in staging.glob("*.safetensors"))
    free = shutil.disk_usage(staging).free + begun
    if free < wanted + _MARGIN_BYTES:
        raise CapacityError(
            f"the disk has {free / 1e9:.2f} GB free",
            where=str(staging.parent),
            expected=f"{(wanted + _MARGIN_BYTES) / 1e9:.2f} GB",
            fix="free space or choose another place, then run the same command again",
        )


def _run_all(
    jobs: Sequence[Job],
    files: WeightFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    shards: dict[str, _Shard],
    staging: Path,
    workers: int,
) -> Iterator[tuple[Job, dict[str, str]]]:
    """Every job with its tensors' hashes, as they are finished; at most a budget of memory is under way."""
    running: dict[Future[dict[str, str]], Job] = {}

    def collect() -> Iterator[tuple[Job, dict[str, str]]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                while running and (
                    len(running) >= 2 * workers
                    or sum(j.memory_bytes for j in running.values()) + job.memory_bytes > _BUDGET_BYTES
                ):
                    yield from collect()
                if job.file not in shards:
                    shards[job.file] = _Shard(staging / job.file, plan.shards[job.file])
                running[pool.submit(_run, job, files, plan, config, shards[job.file])] = job
            while running:
                yield from collect()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def _run(job: Job, files: WeightFiles, plan: QuantizePlan, config: QuantizeConfig, shard: _Shard) -> dict[str, str]:
    """Read, quantize and write the weights of a job; returns the hash of every tensor written."""
    if job.decisions[0].format == "keep":
        (piece,) = job.pieces[0]
        return {piece.name: _copy(files, job.decisions[0].name, piece, shard)}
    weights = [_read(files, d.name, d.format, plan.dtypes[d.name]) for d in job.decisions]
    amax = None
    if len(weights) > 1 and job.decisions[0].format in NVFP4_FORMATS:
        amax = torch.stack([block_amax(weight).amax() for weight in weights if isinstance(weight, Tensor)]).amax()
    hashes = {}
    for index, (decision, pieces) in enumerate(zip(job.decisions, job.pieces, strict=True)):
        weight = weights[index]
        try:
            made = weight if isinstance(weight, list) else encode_weight(weight, decision.format, config, amax=amax)
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


def _copy(files: WeightFiles, name: str, piece: Piece, shard: _Shard) -> str:
    """Write a tensor as it is, a few rows at a time; FP8 and codes become BF16."""
    dtype, shape = STORED_DTYPES[piece.dtype], piece.shape
    digest, offset = hashlib.sha256(), shard.placed[name].offset
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
        content = _content(part)
        _write_at(shard.descriptor, content, offset)
        digest.update(content)
        offset += len(content)
        if whole:
            break
    manifest, found = files.manifest, digest.hexdigest()
    entry = manifest.tensors.get(name) if manifest else None
    if entry is not None and entry.dtype == str(dtype).removeprefix("torch.") and entry.sha256 != found:
        raise CheckpointError(
            f"the tensor is not the one that {MANIFEST_NAME} describes",
            where=f"{files.listing.parent}: {name}",
            fix="take the checkpoint anew",
        )
    return found


def _content(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


# ---- what stands beside the weights ---------------------------------------------------------------------------------


def _write_rest(
    staging: Path,
    files: WeightFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    hf_config: Mapping[str, Any],
    lineage: dict[str, Any],
) -> None:
    """Index, configs, manifest, and whatever else is in the source's folder."""
    source = files.listing.parent
    for file in sorted(source.iterdir()):
        own = file.name in (INDEX_FILE, SINGLE_FILE, MANIFEST_NAME, "config.json", QUANT_CONFIG_FILE)
        if file.is_file() and not own and not file.name.startswith(".") and file.suffix not in _NOT_COPIED:
            shutil.copyfile(file, staging / file.name)
    if len(plan.shards) > 1:
        names = {piece.name: file for file, pieces in plan.shards.items() for piece in pieces}
        index = {"metadata": {"total_size": plan.output_bytes}, "weight_map": dict(sorted(names.items()))}
        write_json(staging / INDEX_FILE, index)
    if config.layout == "modelopt":
        nested, quantization = modelopt_configs(plan.decisions, config)
        write_json(staging / QUANT_CONFIG_FILE, nested)
    else:
        quantization = compressed_tensors_config(plan.decisions, config)
    plain = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    write_json(staging / "config.json", {**plain, "quantization_config": quantization})
    _write_manifest(staging, files, plan, config, plain, lineage)


def _write_manifest(
    staging: Path,
    files: WeightFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    hf_config: Mapping[str, Any],
    lineage: dict[str, Any],
) -> None:
    """The manifest, for the architectures whose parameters we can count."""
    try:
        shape = config_from_hf(dict(hf_config), str(staging / "config.json"))
    except CheckpointError:
        return
    finished = read_json(staging / _JOURNAL)["finished"]
    entries = {
        piece.name: TensorEntry(
            dtype=str(STORED_DTYPES[piece.dtype]).removeprefix("torch."), shape=piece.shape, sha256=hashes[piece.name]
        )
        for file, hashes in finished.items()
        for piece in plan.shards[file]
    }
    parent = files.manifest.lineage if files.manifest else {}
    lineage = {**parent, **lineage, "quantized_from": files.listing.parent.name, "quantize": config.model_dump()}
    manifest = Manifest(
        architecture=(hf_config.get("architectures") or ["unknown"])[0],
        num_parameters=shape.num_parameters(),
        num_active_parameters=shape.num_parameters(active=True),
        lineage=lineage,
        tensors=dict(sorted(entries.items())),
    )
    write_json(staging / MANIFEST_NAME, manifest.model_dump(mode="json"))
