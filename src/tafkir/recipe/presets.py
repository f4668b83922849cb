"""Published model shapes by name, as the config.json of their checkpoints; nothing is downloaded. Torch-free."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from tafkir.errors import RecipeError
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.model import ModelConfig

__all__ = ["list_presets", "load_preset"]

_FOLDER = Path(__file__).resolve().parents[1] / "presets"
_NOTE = "description"


def list_presets() -> dict[str, str]:
    """What every preset is, by its name."""
    return {path.stem: str(_read(path)[_NOTE]) for path in sorted(_FOLDER.glob("*.json"))}


def load_preset(name: str) -> ModelConfig:
    """The shape of a published model.

    Raises:
        RecipeError: there is no preset of that name; the message names the nearest one.
    """
    path = _FOLDER / f"{name}.json"
    known = [other.stem for other in sorted(_FOLDER.glob("*.json"))]
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        raise RecipeError(
            "no such preset",
            where=name,
            expected=f"one of {', '.join(known)}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    keys = _read(path)
    del keys[_NOTE]
    return config_from_hf(keys, str(path))


def _read(path: Path) -> dict[str, Any]:
    keys: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return keys
