"""Says what the result of each stage depends on, as one hash: equal hashes, equal results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tafkir.recipe.lab import ResidualLabConfig
from tafkir.recipe.schema import Recipe
from tafkir.recipe.teacher import CheckpointTeacher
from tafkir.recipe.trm import TrmConfig
from tafkir.records import STAGES, StageName

__all__ = ["fingerprint_stages"]

# How often a state is saved changes nothing in what comes out; nor does where servers are, and how long to wait.
_WITHOUT_EFFECT: Any = {
    "save_every": True,
    "monitor": {"dump_tokens"},
    "keep_rollouts": True,
    "engine": {
        "urls", "timeout_s", "weight_timeout_s", "max_concurrency", "max_retries", "weight_dir", "weight_sync",
        "api_key_env",
    },
}  # fmt: skip
# Stages that read the preference pairs.
_FROM_PREFERENCES = ("reward", "dpo", "rlhf")
# Weights are known by the manifest's hashes; a foreign checkpoint without a manifest is hashed whole.
_MANIFEST = "tafkir.json"


def fingerprint_stages(recipe: Recipe, base: Path | None) -> dict[StageName, str]:
    """One sha256 per stage of the recipe: over its table, what all stages share, and the stage before.

    Args:
        recipe: resolved, so that `threads` is a number and `kernels` says which.
        base: folder of the checkpoint that the recipe starts from.
    """
    previous = _hash(
        {
            "seed": recipe.seed,
            "threads": recipe.threads,
            "kernels": recipe.kernels,
            "model": recipe.model.model_dump(mode="json"),
            "data": recipe.data.model_dump(mode="json"),
            "files": {source: _hash_file(Path(source)) for source in recipe.data.sources if Path(source).is_file()},
            "base": _hash_folder(base) if base else None,
        }
    )
    fingerprints: dict[StageName, str] = {}
    for kind in STAGES:
        table = getattr(recipe, kind)
        if table is not None:
            previous = _hash([previous, kind, _effective(table)])
            if kind in ("rlvr", "rlhf") and recipe.cluster:
                # How prompts are put together changes the last bits; who then computes them does not.
                previous = _hash([previous, recipe.cluster.prompts_per_call])
            if kind == "rlvr" and recipe.rlvr and recipe.rlvr.reward_file and Path(recipe.rlvr.reward_file).is_file():
                previous = _hash([previous, _hash_file(Path(recipe.rlvr.reward_file))])
            if kind in _FROM_PREFERENCES:
                sources = [Path(source) for source in recipe.preferences.sources]
                files = {str(path): _hash_file(path) for path in sources if path.is_file()}
                previous = _hash([previous, recipe.preferences.model_dump(mode="json"), files])
            if kind == "qat" and recipe.quantize:
                previous = _hash([previous, recipe.quantize.model_dump(mode="json")])
            if isinstance(table, ResidualLabConfig) and Path(table.text).is_file():
                previous = _hash([previous, _hash_file(Path(table.text))])
            if kind == "trm" and recipe.trm:
                for content in _trm_files(recipe.trm):
                    previous = _hash([previous, content])
            fingerprints[kind] = previous
    return fingerprints


def _effective(table: BaseModel) -> dict[str, Any]:
    """What a stage's table says about its result."""
    keys: dict[str, Any] = table.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    # A run that stops at the red light and one that goes on are the same run; one that protects itself is another.
    if (monitor := keys.get("monitor")) is not None and monitor["on_red"] != "protect":
        del monitor["on_red"], monitor["protection"]
    return keys


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _trm_files(table: TrmConfig) -> Iterator[Any]:
    """What stands in the files of a recursive model's teacher and of its puzzles."""
    teacher = table.teacher
    if isinstance(teacher, CheckpointTeacher):
        yield _hash_folder(teacher.folder())
    elif teacher is not None and Path(teacher.path).is_file():
        yield _hash_file(Path(teacher.path))
    for path in map(Path, table.puzzles.paths):
        if path.is_file():
            yield _hash_file(path)
        elif path.is_dir():
            yield _describe_folder(path)


def _describe_folder(path: Path) -> list[str]:
    """Of JSON files their content; arrays of gigabytes are known by their size."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return [
        f"{file.relative_to(path)} {_hash_file(file) if file.suffix == '.json' else file.stat().st_size}"
        for file in found
    ]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_folder(folder: Path) -> dict[str, str]:
    manifest = folder / _MANIFEST
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if manifest.exists():
        files = [path for path in files if path.suffix != ".safetensors"]
    return {path.name: _hash_file(path) for path in files}
