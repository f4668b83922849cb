"""`tafkir quantize --auto`: chooses a mixture of formats, shows why, and leaves the rules that reproduce it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tafkir.quant.auto import AutoResult
    from tafkir.recipe.quantize import QuantizeConfig

__all__ = ["auto_table", "choose_formats", "read_rules", "read_toml", "with_auto"]


def with_auto(
    given: dict[str, Any], rules: list[str], rules_file: Path | None, auto: str | None, sensitivity: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Settings and rules of the command line, with those of a rules file behind them, and the budget of `--auto`.

    Raises:
        RecipeError: the file or the budget is not valid, or both are given.
    """
    from tafkir.errors import RecipeError
    from tafkir.recipe.auto import parse_auto

    if auto and rules_file:
        raise RecipeError("--auto writes rules, and --rules has them already", fix="give one of them")
    if sensitivity and not auto:
        raise RecipeError("--sensitivity belongs to --auto", fix="add --auto bits=5.0, or what is wanted")
    if auto:
        return {**given, "auto": {**parse_auto(auto), **({"sensitivity": sensitivity} if sensitivity else {})}}, rules
    if rules_file is None:
        return given, rules
    table = read_rules(rules_file)
    theirs = [f"{rule['tensors']}={rule['format']}" for rule in table.pop("rules")]
    return {**table, **given}, [*rules, *theirs]


def choose_formats(source: Path, name: str, out: Path, config: QuantizeConfig, *, quiet: bool) -> QuantizeConfig:
    """Resolve `config.auto` into rules; writes `OUT.auto.toml`, `.json` and `.svg` beside the destination.

    Args:
        source: checkpoint folder.
        name: what a person called it.
        out: the destination, which need not be made.
        quiet: print no table.
    """
    from tafkir.quant.auto import auto_quantize, read_auto_text
    from tafkir.report.allocation import render_allocation
    from tafkir.runlog.atomic import write_json, write_text

    assert config.auto is not None
    result = auto_quantize(source, config, read_auto_text(source, config.auto))
    rules, table, picture = (out.parent / f"{out.name}.auto.{end}" for end in ("toml", "json", "svg"))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(rules, result.rules_file(name))
    write_json(table, result.to_dict())
    write_text(picture, render_allocation(result.to_dict()))
    if not quiet:
        print("\n".join(auto_table(result)))
        print(f"rules {rules}, figures {table}, picture {picture}\n")
    return result.config


def auto_table(result: AutoResult) -> list[str]:
    """The choice as lines of text for a terminal: every group, what each format costs it, and why it got its own."""
    formats = list(dict.fromkeys(format for group in result.groups for format in group.losses if format != "keep"))
    head = ("layer", "group", "weights", *(f"KL {format}" for format in formats), "becomes", "because")
    cells = [
        (
            *(str(group.layer), group.kind, f"{group.numel:,}"),
            *(f"{group.losses[f]:.2e}" if f in group.losses else "-" for f in formats),
            *(group.format, group.reason),
        )
        for group in result.groups
    ]
    widths = [max(len(cell[i]) for cell in (head, *cells)) for i in range(len(head))]
    lines = []
    for cell in (head, *cells):
        numbers = "  ".join(f"{cell[i]:>{widths[i]}}" for i in range(2, 3 + len(formats)))
        lines.append(
            f"{cell[0]:>{widths[0]}}  {cell[1]:<{widths[1]}}  {numbers}  {cell[-2]:<{widths[-2]}}  {cell[-1]}".rstrip()
        )
    ratio = result.measured_kl / result.predicted_kl if result.predicted_kl > 0 else 1.0
    lines.append(
        f"{result.goal}: {result.bits:.3f} bits a weight; KL {result.measured_kl:.4g} nats a token as a whole, "
        f"{ratio:.2f} times the sum of the groups' own; at least {result.bound:.4g} by that sum; "
        f"another MB would save {result.price:.3g}"
    )
    return lines


def read_toml(file: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        RecipeError: the file is missing, or not TOML.
    """
    import tomllib

    from tafkir.errors import RecipeError

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(file)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid TOML ({error})", where=str(file)) from error


def read_rules(file: Path) -> dict[str, Any]:
    """The keys of a file that `--auto` wrote, or of any TOML with the same: at the top, or in `[quantize]`.

    Raises:
        RecipeError: the file is missing, not TOML, or has no rules.
    """
    from tafkir.errors import RecipeError

    table = read_toml(file)
    keys = table.get("quantize", table)
    if not isinstance(keys, dict) or not keys.get("rules"):
        raise RecipeError("there are no rules", where=str(file), expected="[[rules]] with tensors and format")
    return json.loads(json.dumps(keys))  # type: ignore[no-any-return]
