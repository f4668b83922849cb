"""Quantizes a checkpoint on disk: weight by weight, in memory that does not depend on its size, resumable after a kill.

Work lies beside the destination as `.NAME.quantizing` until all of it is written, checked and renamed. Weights that
share a global scale are read, quantized and written by one worker; several work at once, within a budget of memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tafkir.checkpoint.files import StoredFiles, fp8_block_size, open_files, read_json, read_manifest
from tafkir.checkpoint.folder import MAX_SHARD_BYTES, publish_folder, refuse_present, write_error
from tafkir.checkpoint.quantized import packed_method
from tafkir.errors import CapacityError, CheckpointError
from tafkir.native.weights import weight_kernels
from tafkir.quant.formats import NVFP4_FORMATS
from tafkir.quant.native_jobs import NativeJobs
from tafkir.quant.plan import Job, QuantizePlan, plan_quantization, with_cache_scales
from tafkir.quant.shards import JOURNAL, Journal, Shard, fingerprint_of, written_by
from tafkir.quant.sidecars import write_sidecars
from tafkir.quant.validate import validate_checkpoint
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.runlog.atomic import remove_leftovers
from tafkir.runlog.progress import Progress

if TYPE_CHECKING:
    from tafkir.checkpoint.read import WeightFiles
    from tafkir.quant.torch_jobs import Calibrated

__all__ = [
    "QuantizeResult",
    "calibration_folder",
    "open_files_of_source",
    "open_source",
    "quantize_checkpoint",
    "refuse_finished",
]

_LOCK = ".lock"
_MARGIN_BYTES = 64 << 20
_BUDGET_BYTES = 384 << 20


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
def open_files_of_source(name: Path | str) -> Iterator[tuple[StoredFiles, dict[str, Any]]]:
    """The files and the config.json of a checkpoint that is to be quantized; without torch."""
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    blocks, packed = fp8_block_size(hf_config, str(path / "config.json")), packed_method(hf_config, path)
    with open_files(path, block_size=blocks, packed=packed, manifest=read_manifest(path)) as files:
        yield files, hf_config


@contextmanager
def open_source(name: Path | str) -> Iterator[tuple[WeightFiles, dict[str, Any]]]:
    """The weights and the config.json of a checkpoint that is to be quantized or compared."""
    from tafkir.checkpoint.read import WeightFiles  # imports torch, which quantizing itself may do without

    with open_files_of_source(name) as (files, hf_config):
        yield WeightFiles.of(files), hf_config


def quantize_checkpoint(
    source: Path | str,
    path: Path | str,
    config: QuantizeConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    lineage: Mapping[str, Any] | None = None,
    calibration: Calibrated | None = None,
) -> QuantizeResult:
    """Write a quantized copy of a checkpoint.

    Memory stays within the budget of 384 MB or the largest group of weights that share a scale, whichever is more,
    besides the program itself. Equal sources and configs give equal bytes, whatever the number of workers.

    Args:
        source: a checkpoint folder, or the name of a bundled one: BF16, FP16, FP32, DeepSeek's FP8 blocks, or
            quantized, in which case the codes are first brought back to BF16.
        path: the new folder; must not be there. What a killed process of the same work left, there or beside it, is
            taken over.
        config: formats and layout.
        max_shard_bytes: of a file's tensors; also what is redone at most after a kill.
        workers: weights that are worked on at once, each by one thread.
        lineage: what the manifest says of where the weights come from.
        calibration: scales of activations, and weights, that were chosen on data.

    Raises:
        CheckpointError: the source is damaged, holds numbers that are not finite, changes during the work, or has
            tensors that no rule names; the destination exists; another process writes it.
        CapacityError: the disk has too little room.
        RecipeError: a rule matches nothing or asks for what a tensor cannot be.
    """
    path = Path(path)
    refuse_finished(path)
    with open_files_of_source(source) as (files, hf_config):
        before = _identity(files)
        plan = plan_quantization(files, hf_config, config, max_shard_bytes, _not_finite(files, config))
        if calibration is not None and config.kv_cache != "none":
            plan = with_cache_scales(plan, config.layout, calibration.cache_scales)
        said: dict[str, Any] = {"config": hf_config, "files": before}
        said |= {"calibration": calibration.fingerprint} if calibration else {}
        fingerprint = fingerprint_of(plan, config, said)
        try:
            if path.exists():
                _take_over(path, fingerprint)
                return QuantizeResult(path, plan.source_bytes, plan.output_bytes, plan.output_bytes, plan.rows())
            with _staging(path) as staging:
                resumed = _write_shards(staging, files, plan, config, fingerprint, workers, calibration)
                if _identity(files) != before:
                    raise CheckpointError(
                        "the source changed while it was read", where=str(files.listing.parent), fix="run it again"
                    )
                write_sidecars(staging, files, plan, config, hf_config, dict(lineage or {}))
                validate_checkpoint(staging, plan.decisions, config, plan.numbers)
                # The journal goes last: a kill before the folder has its name loses nothing.
                publish_folder(staging, path)
                _tidy(path)
        except OSError as error:
            raise write_error(path, error) from error
    return QuantizeResult(path, plan.source_bytes, plan.output_bytes, resumed, plan.rows())


def refuse_finished(path: Path) -> None:
    """`refuse_present`, except where a process was killed between the folder's name and its own end."""
    if not (path / JOURNAL).exists():
        if (path / "config.json").exists():  # a calibration beside a finished one was left by a kill at the very end
            shutil.rmtree(calibration_folder(path), ignore_errors=True)
        refuse_present(path)


def calibration_folder(path: Path) -> Path:
    """Where a calibration stays until the checkpoint that it is for is finished."""
    return path.parent / f".{path.name}.calibration"


def _take_over(path: Path, fingerprint: str) -> None:
    """Tidy a folder that was whole when its process was killed; refuse it where that did other work."""
    theirs, _ = written_by(path)
    _tidy(path)
    if theirs != fingerprint:
        refuse_present(path)


def _tidy(path: Path) -> None:
    """Remove what only the work needed; the journal, which tells that this was not done yet, goes last."""
    for name in (_LOCK, JOURNAL):
        (path / name).unlink(missing_ok=True)


def _not_finite(files: StoredFiles, config: QuantizeConfig) -> frozenset[str]:
    """Weights that are to be kept because they are not finite; where that is not asked for, the first one ends all."""
    if config.non_finite == "refuse":
        return frozenset()
    from tafkir.quant.not_finite import find_not_finite  # imports numpy, which is needed for nothing else

    return find_not_finite(files)


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
        remove_leftovers(staging)
        yield staging


def _identity(files: StoredFiles) -> dict[str, list[int]]:
    """Size and time of change of every file of the source."""
    return {
        file.name: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in (*files.descriptors, files.listing)
    }


# ---- the work -------------------------------------------------------------------------------------------------------


def _write_shards(
    staging: Path,
    files: StoredFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    fingerprint: str,
    workers: int,
    calibration: Calibrated | None,
) -> int:
    """Write what is not there yet; returns the bytes that were."""
    journal = Journal(staging, fingerprint)
    journal.verify(staging, plan)
    jobs = [job for job in plan.jobs if job.file not in journal.finished]
    resumed = sum(p.num_bytes for file in journal.finished for p in plan.shards[file])
    _check_room(staging, plan.output_bytes - resumed)
    done = plan.source_bytes - sum(job.source_bytes for job in jobs)
    megabytes = max(1, plan.source_bytes >> 20)
    label = f"quantize {files.listing.parent.name} (MB)"
    with (
        ExitStack() as stack,
        _runners(files, plan, config, jobs, calibration) as work,
        Progress(label, megabytes, start=done >> 20) as progress,
    ):
        shards: dict[str, Shard] = {}
        stack.callback(_close, shards)
        for job, hashes in _run_all(work, plan, shards, staging, workers):
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


def _close(shards: Mapping[str, Shard]) -> None:
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


class _Runner(Protocol):
    """What turns the weights of a job into those that are written; returns the hash of each."""

    def run(self, job: Job, shard: Shard) -> dict[str, str]: ...


@contextmanager
def _runners(
    files: StoredFiles,
    plan: QuantizePlan,
    config: QuantizeConfig,
    jobs: Sequence[Job],
    calibration: Calibrated | None,
) -> Iterator[list[tuple[Job, _Runner, int]]]:
    """Each job, who does it, and how much of the budget it needs: the kernels what they can, torch the rest."""
    kernels = weight_kernels()
    native = NativeJobs(files, plan, config, kernels) if kernels else None
    chosen = {*NVFP4_FORMATS, "fp8"} if calibration else set[str]()
    mine = {id(job) for job in jobs if native and native.takes(job) and job.decisions[0].format not in chosen}
    if native and len(mine) == len(jobs):
        yield [(job, native, 0) for job in jobs]
        return
    # Not at the top of the file: importing torch costs more than quantizing a gigabyte.
    from tafkir.quant.torch_jobs import TorchJobs, one_thread_each

    rest = TorchJobs(files, plan, config, calibration)
    with one_thread_each():
        yield [(job, native, 0) if native and id(job) in mine else (job, rest, job.memory_bytes) for job in jobs]


def _run_all(
    work: Sequence[tuple[Job, _Runner, int]],
    plan: QuantizePlan,
    shards: dict[str, Shard],
    staging: Path,
    workers: int,
) -> Iterator[tuple[Job, dict[str, str]]]:
    """Every job with its tensors' hashes, as they are finished; at most a budget of memory is under way."""
    running: dict[Future[dict[str, str]], tuple[Job, int]] = {}

    def collect() -> Iterator[tuple[Job, dict[str, str]]]:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future)[0], future.result()

    with ThreadPoolExecutor(workers) as pool:
        try:
            for job, runner, memory in work:
                while running and (
                    len(running) >= 2 * workers or sum(m for _, m in running.values()) + memory > _BUDGET_BYTES
                ):
                    yield from collect()
                if job.file not in shards:
                    shards[job.file] = _begin(staging, job.file, plan)
                running[pool.submit(_run, job, runner, shards[job.file])] = job, memory
            while running:
                yield from collect()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin(staging: Path, file: str, plan: QuantizePlan) -> Shard:
    """A file, with the numbers in it that are known already."""
    shard = Shard(staging / file, plan.shards[file])
    for piece in plan.shards[file]:
        if piece.name in plan.numbers:
            shard.hashes[piece.name] = shard.write(piece.name, piece.content_of(plan.numbers[piece.name]))
            shard.missing -= 1
    return shard


def _run(job: Job, runner: _Runner, shard: Shard) -> dict[str, str]:
    return runner.run(job, shard)
