"""What `tafkir plan` was asked: names of models, chips and formats, looked up."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tafkir.plan.hardware import Chip
    from tafkir.plan.layout import Layout
    from tafkir.plan.precision import Precision
    from tafkir.plan.serving import Deployment
    from tafkir.plan.shapes import ModelShape
    from tafkir.plan.workload import Workload

__all__ = ["Asked", "deployment_of", "look_up_chip", "look_up_model", "other_precisions"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line means, looked up."""

    name: str
    kind: str
    chips: int
    deployment: Deployment
    workload: Workload
    workload_name: str
    only: Layout | None


def look_up_model(name: str) -> tuple[str, str, ModelShape]:
    """A model of `tafkir model show`, or a published shape that only the planner knows.

    Raises:
        RecipeError: there is none of that name.
    """
    from tafkir.cli.model import find_model
    from tafkir.errors import RecipeError
    from tafkir.plan.references import find_shape
    from tafkir.plan.shapes import list_shapes, load_shape, shape_of

    if name in list_shapes():
        return name, "published shape", load_shape(name)
    plain = _plain_checkpoint(Path(name))
    if plain:
        return name, "checkpoint", plain
    try:
        found, kind, config = find_model(name)
    except RecipeError as error:
        if "/" in name and not Path(name).exists():
            return name, "published shape", find_shape(name)
        import difflib

        near = difflib.get_close_matches(name.lower(), list_shapes(), n=2, cutoff=0.5)
        if near:
            raise RecipeError(error.what, where=error.where, fix=f"did you mean {' or '.join(near)}?") from None
        raise
    if kind == "recipe":
        from tafkir.recipe.load import load_recipe

        recipe = load_recipe([name]).recipe
        if recipe.trm and not recipe.pretrain and not recipe.base:
            fix = f"`tafkir run {name} --dry-run` says what it takes"
            raise RecipeError("a recursive model is not planned here", where=name, fix=fix)
    return found, kind, shape_of(config, found)


def _plain_checkpoint(path: Path) -> ModelShape | None:
    """A checkpoint folder of a dense architecture that Tafkir counts and does not build.

    Raises:
        CheckpointError: a size is missing or no positive number.
    """
    from tafkir.errors import CheckpointError
    from tafkir.plan.shapes import PLAIN_ARCHITECTURES, shape_of_table

    config = path / "config.json" if path.is_dir() else path
    if config.name != "config.json" or not config.is_file():
        return None
    try:
        keys = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        # Whoever reads the families' files says what is wrong with it.
        return None
    if not isinstance(keys, dict) or not set(keys.get("architectures") or ()) & set(PLAIN_ARCHITECTURES):
        return None
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    wrong = [key for key in needed if not isinstance(keys.get(key), int) or keys[key] < 1]
    if wrong:
        raise CheckpointError(f"no sizes: {', '.join(wrong)}", where=str(config), fix="take the model's own file")
    heads = keys["num_attention_heads"]
    whole = {"head_dim": keys["hidden_size"] // heads, "num_key_value_heads": heads}
    return shape_of_table(str(path), whole | {key: value for key, value in keys.items() if value is not None})


def look_up_chip(text: str, files: list[Path], price: float | None) -> tuple[Chip, int]:
    """`NAME:COUNT`, with a price that replaces the table's."""
    from tafkir.errors import RecipeError
    from tafkir.plan.hardware import find_chip, load_chips

    name, _, number = text.partition(":")
    if number and not (number.isdigit() and int(number)):
        raise RecipeError(f"{number!r} is no count", where=f"--hardware {text}", expected="CHIP:COUNT, such as h20:4")
    if name == "cpu":
        from tafkir.plan.machine import measure_machine

        chip = measure_machine()
    else:
        chip = find_chip(name, load_chips(files))
    return chip if price is None else chip.with_price(price), int(number or 1)


def deployment_of(
    shape: ModelShape,
    chip: Chip,
    precision: str | None,
    engine: str,
    kv_bytes: float,
    speculate: str | None,
    skew: float,
    level: str,
) -> Deployment:
    """Everything that the options say of how the model is served."""
    from tafkir.errors import RecipeError
    from tafkir.plan.calibrate import load_coefficients
    from tafkir.plan.coefficients import ENGINES
    from tafkir.plan.layout import Layout
    from tafkir.plan.precision import find_precision
    from tafkir.plan.serving import Deployment, Speculation

    if engine not in ENGINES:
        raise RecipeError("no such engine", where=f"--engine {engine}", expected=f"one of {', '.join(ENGINES)}")
    chosen = find_precision(precision or ("fp32" if chip.key == "cpu" else "bf16"))
    for number_format in (chosen.computes, chosen.rest_computes):
        chip.peak(number_format)
    draft = Speculation()
    if speculate:
        number, _, acceptance = speculate.partition(":")
        try:
            draft = Speculation(int(number), float(acceptance or 0.85))
        except ValueError:
            raise RecipeError(f"{speculate!r} is not TOKENS[:ACCEPTANCE]", where="--speculate") from None
        if draft.tokens < 0 or not 0 <= draft.acceptance <= 1:
            raise RecipeError(f"{speculate!r} is out of range", where="--speculate", expected="as 1:0.85")
    deployment = Deployment(
        shape, chip, chosen, Layout(), load_coefficients("datasheet"), engine, kv_bytes, skew, draft
    )
    return replace(deployment, coefficients=load_coefficients(level, deployment))


def other_precisions(d: Deployment) -> list[Precision]:
    """Smaller formats that the chip computes in, largest first."""
    from tafkir.plan.precision import PRECISIONS

    return [
        other
        for other in PRECISIONS.values()
        if other.experts < d.precision.experts
        and other.computes in d.chip.flops
        and other.rest_computes in d.chip.flops
    ]
