"""`tafkir model show | ls`: what a model is made of and what it costs, from its shape alone."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tafkir.plan.params import ModelSummary
    from tafkir.recipe.model import ModelConfig

__all__ = ["app", "find_model"]

app = typer.Typer(help="Look at the shape of models.", no_args_is_help=True, rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with exact numbers.")]

Rows = list[tuple[str, str]]


@app.command("show")
def show(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Preset, checkpoint folder, run directory, or recipe (name or file)."),
    ],
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Context for cache and FLOPs; the model's longest if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a model is made of and what it costs. Nothing is loaded, allocated or downloaded.

    \b
    tafkir model show ring-flash-2.0                   a published shape by name; `tafkir model ls` lists them
    tafkir model show ./DeepSeek-R1 --context 8192     a checkpoint folder (its config.json is enough)
    tafkir model show recipes/wordmath-tiny.toml       the [model] table of a recipe

    \b
    layers       equal neighbours together: 31 x MoE 256/8+1 is 31 blocks of 256 experts, of which a token visits 8,
                 and 1 that every token visits
    active       parameters that one token meets; the others wait for other tokens
    KV cache     bytes that every token of a conversation keeps, in bfloat16
    FLOPs        prefill: mean over a prompt of CONTEXT tokens; decode: one more token after CONTEXT tokens
    weights      fp8 and nvfp4 shrink the linear maps inside the blocks, scales included; the rest stays bfloat16
    """
    from tafkir.plan.params import summarize_model

    name, kind, config = find_model(model)
    summary = summarize_model(config, context or config.max_position_embeddings)
    if as_json:
        print(json.dumps(_as_json(name, kind, config, summary), indent=2))
        return
    _print_rows(f"{name} ({kind})", _describe(config, summary))


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List the models that Tafkir knows by name: published shapes, then what ships with it."""
    from tafkir.plan.params import describe_layers

    rows = []
    for name, (kind, description, config) in _known_models().items():
        counts = config.parameter_counts()
        rows.append(
            {
                "name": name,
                "kind": kind,
                "parameters": counts.total,
                "active_parameters": counts.active,
                "layers": describe_layers(config),
                "description": description,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    _print_list(rows)


def find_model(name: str) -> tuple[str, str, ModelConfig]:
    """The model that a person means: a preset, a checkpoint, a run (its last checkpoint), or a recipe.

    Returns:
        Its name, what it was found as (`preset`, `checkpoint` or `recipe`), and its shape.

    Raises:
        RecipeError: there is none of that name; the message names the nearest one.
        CheckpointError: the folder is no checkpoint, or of an unknown architecture.
    """
    import difflib

    from tafkir.errors import RecipeError
    from tafkir.recipe.bundled import bundled_checkpoints, bundled_recipes
    from tafkir.recipe.presets import list_presets, load_preset

    if name in list_presets():
        return name, "preset", load_preset(name)
    if Path(name).is_dir() or name in bundled_checkpoints():
        return name, "checkpoint", _config_of_checkpoint(name)
    if Path(name).is_file() and Path(name).name == "config.json":
        return name, "checkpoint", _config_of_checkpoint(str(Path(name).parent))
    if Path(name).is_file() or name in bundled_recipes():
        from tafkir.recipe.load import load_recipe

        return name, "recipe", load_recipe([name]).recipe.model
    known = [*list_presets(), *bundled_checkpoints(), *bundled_recipes()]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else "`tafkir model ls` lists the known ones"
    raise RecipeError("no such model, folder or file", where=name, fix=fix)


def _config_of_checkpoint(name: str) -> ModelConfig:
    from tafkir.cli.completer import checkpoint_of
    from tafkir.errors import CheckpointError
    from tafkir.recipe.hf_config import config_from_hf

    path = checkpoint_of(name) / "config.json"
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path), fix="name a checkpoint folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError("not valid JSON", where=str(path), fix="take the file anew") from error
    if not isinstance(keys, dict):
        raise CheckpointError("not a JSON object", where=str(path), fix="take the file anew")
    # How the weights are stored is not the model's shape.
    return config_from_hf({key: value for key, value in keys.items() if key != "quantization_config"}, str(path))


def _known_models() -> dict[str, tuple[str, str, ModelConfig]]:
    """Every model that has a name: presets, bundled checkpoints, and recipes that make one from nothing.

    Returns:
        What it was found as, what it is, and its shape.
    """
    from tafkir.recipe.bundled import bundled_checkpoints, bundled_recipes
    from tafkir.recipe.model import ModelConfig
    from tafkir.recipe.presets import list_presets, load_preset

    known = {name: ("preset", what, load_preset(name)) for name, what in list_presets().items()}
    for name in bundled_checkpoints():
        known.setdefault(name, ("checkpoint", "A checkpoint that ships with Tafkir", _config_of_checkpoint(name)))
    for name, path in bundled_recipes().items():
        # What ships is a valid recipe; its model alone is looked at, which spares the import of all other tables.
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        if name not in known and "base" not in tables and "pretrain" in tables:
            shape = ModelConfig.model_validate(tables.get("model", {}))
            known[name] = ("recipe", tables.get("description", ""), shape)
    return known


def _as_json(name: str, kind: str, config: ModelConfig, summary: ModelSummary) -> dict[str, Any]:
    counts = summary.parameters
    return {
        "name": name,
        "kind": kind,
        **asdict(summary),
        "parameters": asdict(counts)
        | {"non_embedding": counts.non_embedding, "active_non_embedding": counts.active_non_embedding},
        "config": config.model_dump(mode="json", exclude_none=True),
    }


def _describe(config: ModelConfig, summary: ModelSummary) -> Rows:
    counts = summary.parameters
    rows = [
        ("family", config.model_type),
        ("layers", f"{config.num_hidden_layers}: {summary.layers}"),
        ("width", f"{config.hidden_size:,}, vocabulary {config.vocab_size:,}" + _tied(config)),
        ("attention", summary.attention),
        ("parameters", _count(counts.total)),
        ("  active", _count(counts.active)),
        ("  non-embedding", _count(counts.non_embedding)),
        ("  active non-embedding", _count(counts.active_non_embedding)),
    ]
    if config.residual.kind != "plain":
        rows.append(("  residual mappings", f"{_count(counts.residual)}, {config.residual.num_streams} streams"))
    if summary.mtp_depth:
        size = _bytes(summary.mtp_weight_bytes)
        rows.append((f"MTP, {summary.mtp_depth} x", f"{_count(counts.mtp)} more, {size} in bf16"))
        rows.append(("  active", _count(counts.mtp_active)))
    rows += [
        ("KV cache", f"{_bytes(summary.kv_bytes_per_token)} a token (bf16)"),
        (f"  at {summary.context:,} tokens", _bytes(summary.kv_bytes)),
        ("FLOPs a token", f"at {summary.context:,} tokens of context"),
        ("  prefill", _flops(summary.prefill_flops_per_token)),
        ("  decode", _flops(summary.decode_flops_per_token)),
    ]
    rows.append(("weights", "  ".join(f"{name} {_bytes(size)}" for name, size in summary.weight_bytes.items())))
    return rows


def _tied(config: ModelConfig) -> str:
    return " (tied)" if config.tie_word_embeddings else ""


def _count(number: int) -> str:
    return f"{_short(number)} ({number:,})"


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return f"{number:,.0f}"


def _flops(number: float) -> str:
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f} FLOP"


def _bytes(number: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:,.2f} {unit}".replace(".00 ", " ")
    return f"{number:,} B"


def _print_rows(title: str, rows: Rows) -> None:
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE, show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows:
            table.add_row(key, value, style="dim" if key.startswith("  ") else "", end_section=False)
        Console(highlight=False).print(table)
        return
    width = max(len(key) for key, _ in rows)
    print(title)
    for key, value in rows:
        print(f"{key:<{width}}  {value}")


def _print_list(rows: list[dict[str, Any]]) -> None:
    cells = [
        (row["name"], _short(row["parameters"]), _short(row["active_parameters"]), row["layers"], row["description"])
        for row in rows
    ]
    head = ("model", "total", "active", "layers", "what it is")
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        for i, name in enumerate(head):
            table.add_column(name, style="cyan" if i == 0 else "", justify="right" if i in (1, 2) else "left")
        for cell in cells:
            table.add_row(*cell)
        Console(highlight=False).print(table)
        return
    widths = [max(len(cell[i]) for cell in (head, *cells)) for i in range(4)]
    for cell in (head, *cells):
        name, total, active, layers, words = cell
        print(
            f"{name:<{widths[0]}}  {total:>{widths[1]}}  {active:>{widths[2]}}  {layers:<{widths[3]}}  {words}".rstrip()
        )
