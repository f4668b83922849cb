"""Strings the stages together: what is finished is skipped, what was killed goes on, what changed is redone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tafkir.cli.rollouts import grading_sharer, rollout_builder
from tafkir.errors import RecipeError, RunDirError
from tafkir.native.compiled import kernels_path
from tafkir.recipe.advice import advise
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import LoadedRecipe
from tafkir.recipe.parallel import check_parallel, resolve_sizes, world_size
from tafkir.recipe.schema import Recipe
from tafkir.recipe.show import dump_toml
from tafkir.recipe.stage import StageContext, StageFunction
from tafkir.records import STAGES, StageName
from tafkir.runlog.atomic import read_json, write_json, write_text
from tafkir.runlog.logging import is_main_rank, log_to
from tafkir.runlog.progress import format_duration
from tafkir.runlog.rundir import RunDir, StageDir
from tafkir.runlog.trackers import check_trackers

if TYPE_CHECKING:
    from tafkir.train.parallel.world import Followers

__all__ = ["Selection", "run_recipe", "select_stages", "stage_function"]

_logger = logging.getLogger(__name__)

# What a stage was started on, written before it runs; its result repeats the fingerprint.
_INPUTS = "inputs.json"
_FORCED = "forced.json"
# Stages that leave no policy to go on with: they look at what is there or copy it, or train what judges it.
_WITHOUT_POLICY: tuple[StageName, ...] = ("reward", "quantize", "eval", "lab", "trm", "report")
# What all processes of torchrun do together; the other stages are rank 0's.
_SHARED: tuple[StageName, ...] = ("pretrain", "sft", "reward", "dpo", "rlvr", "rlhf", "mtp", "trm")


@dataclass(frozen=True, slots=True)
class Selection:
    """Stages that a command is about: `run` those to go through, `forced` those to do again even if finished."""

    run: tuple[StageName, ...]
    forced: tuple[StageName, ...] = ()


def select_stages(recipe: Recipe, *, only: str | None = None, start: str | None = None) -> Selection:
    """Turn `--only` and `--from` into stages.

    Raises:
        RecipeError: the stage is unknown or not in the recipe, or both options are given.
    """
    present = tuple(kind for kind in STAGES if getattr(recipe, kind) is not None)
    chosen = only or start
    if only and start:
        raise RecipeError("--only and --from exclude each other", fix="give one of them")
    if chosen is None:
        return Selection(present)
    if chosen not in present:
        option = "--only" if only else "--from"
        raise RecipeError(f"the recipe has no stage {chosen!r}", where=option, expected=f"one of {', '.join(present)}")
    index = present.index(chosen)
    if only:
        return Selection(present[index : index + 1], present[index : index + 1])
    return Selection(present[index:], present[index:])


def stage_function(kind: StageName) -> StageFunction:
    """The function that runs a stage; this is where torch is first imported."""
    if kind == "eval":
        from tafkir.eval.stage import run_eval

        return run_eval
    if kind == "report":
        from tafkir.report.stage import run_report

        return run_report
    if kind == "quantize":
        from tafkir.quant.stage import run_quantize

        return run_quantize
    if kind == "qat":
        from tafkir.quant.fake import fake_quantize
        from tafkir.train.qat import run_qat

        return partial(run_qat, build_quantizer=fake_quantize)
    if kind == "lab":
        from tafkir.train.lab_stage import run_lab

        return run_lab
    if kind == "trm":
        from tafkir.train.trm_stage import run_trm

        return run_trm
    from tafkir.train import preference_stages, stages

    return {
        "tokenizer": stages.run_tokenizer,
        "pretrain": stages.run_pretrain,
        "sft": stages.run_sft,
        "reward": preference_stages.run_reward,
        "dpo": preference_stages.run_dpo,
        "rlvr": stages.run_rlvr,
        "rlhf": preference_stages.run_rlhf,
        "mtp": stages.run_mtp,
    }[kind]


def run_recipe(
    loaded: LoadedRecipe,
    run: RunDir,
    selection: Selection,
    *,
    find_function: Callable[[StageName], StageFunction] = stage_function,
) -> dict[StageName, dict[str, Any]]:
    """Run the selected stages in order and return their results.

    Args:
        loaded: a resolved recipe.
        run: its run directory, made where it is missing.
        selection: which stages, see `select_stages`.
        find_function: what runs a stage.

    Raises:
        RunDirError: another process writes this run, or an earlier stage that is needed is not finished.
        CheckpointError: the recipe's base is not there.
        RecipeError: the recipe and the number of processes do not fit.
        BackendUnavailable: a tracker that the recipe names is not installed.
    """
    recipe = loaded.recipe
    sizes = resolve_sizes(recipe.parallel, world_size())
    check_parallel(recipe, sizes)
    if sizes.world == 1:
        return _lead(loaded, run, selection, find_function, None)
    from tafkir.train.parallel.world import Followers, leave_world

    followers = Followers(recipe.parallel.device)
    try:
        if is_main_rank():
            return _lead(loaded, run, selection, find_function, followers)
        return _follow(loaded, run, selection, find_function, followers)
    finally:
        leave_world()


def _follow(
    loaded: LoadedRecipe,
    run: RunDir,
    selection: Selection,
    find_function: Callable[[StageName], StageFunction],
    followers: Followers,
) -> dict[StageName, dict[str, Any]]:
    """What ranks other than 0 do: their part of the shared stages, when rank 0 says so; they write nothing else."""
    recipe = loaded.recipe
    base = find_checkpoint(recipe.base) if recipe.base else None
    present = [kind for kind in STAGES if getattr(recipe, kind) is not None]
    for kind in selection.run:
        if followers.hear():
            previous = _previous_checkpoint(run, kind, present, base)
            context = _context(recipe, run, kind, previous)
            find_function(kind)(context)
    return {}


def _lead(
    loaded: LoadedRecipe,
    run: RunDir,
    selection: Selection,
    find_function: Callable[[StageName], StageFunction],
    followers: Followers | None,
) -> dict[StageName, dict[str, Any]]:
    recipe = loaded.recipe
    base = find_checkpoint(recipe.base) if recipe.base else None
    check_trackers(recipe.track)
    fingerprints = fingerprint_stages(recipe, base)
    RunDir.create(run.path)
    with run.lock(), log_to(run.log_path):
        for line in advise(recipe):
            _logger.warning("%s", line)
        _check_earlier(run, fingerprints, selection)
        _set_aside(run, fingerprints, selection)
        write_text(run.recipe_path, dump_toml(recipe, loaded.origins))
        if not all(_is_finished(run.stage(kind), fingerprints[kind]) for kind in selection.run):
            run.write_env(**_describe_kernels(recipe))
        results = {}
        for kind in selection.run:
            previous = _previous_checkpoint(run, kind, list(fingerprints), base)
            context = _context(recipe, run, kind, previous)
            context.stage.track = recipe.track
            results[kind] = _run_stage(context, fingerprints[kind], find_function, followers)
        (run.path / _FORCED).unlink(missing_ok=True)
    return results


def _context(recipe: Recipe, run: RunDir, kind: StageName, previous: Path | None) -> StageContext:
    stage = run.stage(kind)
    build = rollout_builder(recipe, kind, stage.path)
    return StageContext(recipe, run, stage, previous, recipe.seed, build, grading_sharer(recipe))


def _describe_kernels(recipe: Recipe) -> dict[str, str | None]:
    """For `env.json`: which arithmetic the run uses, and the name of the library, which tells source and processor."""
    return {"kernels": recipe.kernels, "library": kernels_path().name if recipe.kernels == "native" else None}


def _check_earlier(run: RunDir, fingerprints: dict[StageName, str], selection: Selection) -> None:
    """Stages before the first selected one must be finished on the same inputs."""
    for kind in fingerprints:
        if kind == selection.run[0]:
            return
        if not _is_finished(run.stage(kind), fingerprints[kind]):
            raise RunDirError(
                f"stage {kind} is not finished with these settings",
                where=str(run.stage(kind).path),
                fix=f"run the recipe without --only/--from, or with --from {kind}",
            )


def _set_aside(run: RunDir, fingerprints: dict[StageName, str], selection: Selection) -> None:
    """Move away what has to be redone: stages whose inputs changed, and forced ones that are finished.

    A forced run that was killed is recognised by the mark it left, so that the same command goes on with it.
    """
    mark = {"forced": {kind: fingerprints[kind] for kind in selection.forced}}
    marked = (run.path / _FORCED).exists() and read_json(run.path / _FORCED) == mark
    for kind in selection.run:
        stage = run.stage(kind)
        # A kill between making the directory and naming its inputs leaves an empty one: nothing to keep.
        if not list(stage.path.glob("[!.]*")):
            continue
        same = _started_on(stage) == fingerprints[kind]
        force = kind in selection.forced and not marked and stage.read_result() is not None
        if not same or force:
            aside = stage.set_aside()
            reason = "asked for again" if same else "its inputs changed"
            _logger.info("%s: %s; the old one is kept as %s", kind, reason, aside)
    if selection.forced and not marked:
        write_json(run.path / _FORCED, mark)


def _run_stage(
    context: StageContext,
    fingerprint: str,
    find_function: Callable[[StageName], StageFunction],
    followers: Followers | None,
) -> dict[str, Any]:
    stage, kind = context.stage, context.stage.kind
    finished = _is_finished(stage, fingerprint)
    if followers is not None and (finished or kind not in _SHARED):
        followers.tell(False)
    if finished:
        _logger.info("%s: already finished", kind)
        return stage.read_result() or {}
    _logger.info("%s: %s", kind, "goes on" if stage.path.exists() else "starts")
    stage.make()
    stage.write_json(_INPUTS, {"stage": kind, "fingerprint": fingerprint})
    _reset_peak_memory()
    if followers is not None and kind in _SHARED:
        followers.tell(True)
    began = time.monotonic()
    returned = find_function(kind)(context)
    result = {
        "stage": kind,
        "finished": True,
        "fingerprint": fingerprint,
        "kernels": context.recipe.kernels,
        **returned,
        **_describe_rollouts(context.recipe, kind),
    }
    stage.write_result(result)
    _logger.info("%s: finished in %s", kind, format_duration(time.monotonic() - began))
    return result


def _describe_rollouts(recipe: Recipe, kind: StageName) -> dict[str, Any]:
    """For the result of a stage whose rollouts are not exact: the number format of every tensor that sampled."""
    rollout = getattr(getattr(recipe, kind), "rollout", None)
    if rollout is None or rollout.is_exact:
        return {}
    from tafkir.quant.rollout import describe_rollouts

    return {"rollout": describe_rollouts(recipe.model, rollout)}


def _previous_checkpoint(run: RunDir, kind: StageName, present: Sequence[StageName], base: Path | None) -> Path | None:
    """The checkpoint of the nearest earlier stage that makes a policy, else the base."""
    earlier = [name for name in present[: present.index(kind)] if name not in _WITHOUT_POLICY]
    return run.stage(earlier[-1]).checkpoint_dir if earlier else base


def _started_on(stage: StageDir) -> str | None:
    """Fingerprint that a stage directory was started on."""
    path = stage.path / _INPUTS
    if not path.exists():
        return None
    fingerprint: str | None = read_json(path).get("fingerprint")
    return fingerprint


def _is_finished(stage: StageDir, fingerprint: str) -> bool:
    result = stage.read_result()
    return result is not None and result.get("finished") is True and result.get("fingerprint") == fingerprint


def _reset_peak_memory() -> None:
    """Let the kernel measure the peak of this stage alone, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        _logger.debug("this system keeps one peak of memory for the whole process")
