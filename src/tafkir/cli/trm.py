"""`tafkir trm watch | errors | export | page`: see a recursive model think, and take it to a phone or a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tafkir.errors import RequestError

if TYPE_CHECKING:
    from rich.text import Text

    from tafkir.engine.difficulty import DifficultyTable
    from tafkir.engine.trace import Thought, Trace

__all__ = ["app"]

app = typer.Typer(
    help="Recursive models: watch one think, see what it fails at, take it to a phone or a browser.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Model = Annotated[
    str | None, typer.Option("--model", metavar="RUN|CHECKPOINT", help="Who solves it; else the bundled one.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
_Weights = Literal["float32", "float16", "int8", "fp4"]


@app.command("watch")
def watch(
    puzzle: Annotated[str, typer.Argument(metavar="PUZZLE", help="A text file of a grid, `-` for stdin, or one grid.")],
    model: _Model = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Supervision steps at most; else as in training.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write a film instead: .gif, or .html that plays it.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show a model think, step by step.

    How the answer changes from supervision step to step: its symbols, confidence, and q, which says when to stop. In
    the terminal a symbol is the fainter the less sure it is, and underlined where it has just changed.

        tafkir trm watch "1..43.1...43...."
        tafkir trm watch maze.txt --model runs/trm-maze-small --out thinking.gif
    """
    from tafkir.checkpoint.trm import load_trm
    from tafkir.cli.solve import read_puzzles
    from tafkir.data.puzzles.rules import has_rules, solve_by_rules
    from tafkir.engine.puzzles import find_solver, fit_to_grid, split_puzzles
    from tafkir.engine.trace import trace_puzzle

    text, where = read_puzzles(puzzle)
    solver = fit_to_grid(load_trm(find_solver(model, text)), text)
    puzzles = split_puzzles(text, solver.puzzles.num_cells)
    if len(puzzles) != 1:
        raise RequestError(f"{len(puzzles)} puzzles", where=where, expected="one to watch")
    question = solver.puzzles.read(puzzles[0], where)
    if has_rules(solver.puzzles):
        solve_by_rules(solver.puzzles, question, where)
    trace = trace_puzzle(solver, question, max_steps=steps)
    if out is not None:
        from tafkir.export.film import write_film

        write_film(trace, out)
    if as_json:
        print(json.dumps(trace.to_dict(), ensure_ascii=False))
    elif out is None:
        _show_trace(trace)
    else:
        print(out)
    if trace.verdict == "unsolved":
        raise typer.Exit(1)


@app.command("errors")
def errors(
    run: Annotated[Path, typer.Argument(help="Run directory with a stage trm, such as runs/trm-sudoku4.")],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Supervision steps; else as in training.")] = None,
    as_json: _Json = False,
) -> None:
    """Show which puzzles are failed.

    Accuracy by number of givens, or by length of the way, with 95 % intervals. The puzzles are those that the run's
    recipe tests on; none of them was seen in training in any symmetric form.
    """
    from tafkir.checkpoint.trm import load_trm
    from tafkir.data.puzzles.sets import build_puzzles
    from tafkir.engine.difficulty import measure_by_difficulty
    from tafkir.recipe.load import load_recipe
    from tafkir.recipe.seeds import derive_seed
    from tafkir.runlog.rundir import RunDir

    directory = RunDir.open(run)
    recipe = load_recipe([directory.recipe_path]).recipe
    if recipe.trm is None:
        raise RequestError("the run has no stage trm", where=str(run), fix="name a run of a recipe with [trm]")
    solver = load_trm(directory.stage("trm").checkpoint_dir)
    test = build_puzzles(recipe.trm.puzzles, derive_seed(recipe.seed, "trm", "puzzles")).test
    table = measure_by_difficulty(solver.model, solver.puzzles, test, steps=steps)
    if as_json:
        print(json.dumps(table.to_dict()))
    else:
        _show_errors(table)


@app.command("export")
def export(
    checkpoint: Annotated[str, typer.Argument(help="Run directory, checkpoint folder or bundled name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an older one there is replaced.")],
    weights: Annotated[_Weights, typer.Option(help="How matrices stand in the files; fp4 is NVFP4.")] = "float32",
    as_json: _Json = False,
) -> None:
    """Write a model as ONNX, checked.

    step.onnx is one supervision step, solve.onnx all of them, model.json says what a host has to know. Both take any
    batch. They are checked against torch before they get their names: numbers of every step to 1e-4, and the same
    answers. Needs `pip install 'tafkir[trm-web]'`.

        tafkir trm export runs/trm-sudoku4 sudoku4-onnx --weights int8
    """
    from tafkir.checkpoint.trm import load_trm
    from tafkir.engine.puzzles import find_solver
    from tafkir.export.onnx_files import export_trm

    made = export_trm(load_trm(find_solver(checkpoint, "")), out, weights)
    if as_json:
        print(json.dumps({"path": str(out), **made.info["parity"], "files": made.info["files"]}))
        return
    for name, content in made.files.items():
        print(f"{out / name}  {len(content) / 1e3:,.0f} kB")
    parity = made.parity
    print(
        f"equals torch to {parity.max_error:.1e} in {parity.steps} steps; {parity.same} of {parity.compared} answers "
        f"that count are the same"
    )


@app.command("page")
def page(
    out: Annotated[Path, typer.Argument(help="Folder to write index.html to; an older one there is replaced.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="RUN|CHECKPOINT", help="A solver to put in; repeat it. Else all bundled ones."),
    ] = None,
    weights: Annotated[_Weights, typer.Option(help="How matrices stand in the page.")] = "float16",
    as_json: _Json = False,
) -> None:
    """Write a web page that solves.

    One file for a phone or a computer that solves Sudoku and mazes by itself, offline. It holds the models and
    onnxruntime-web, opens from a disk or any static server, and asks nothing of the network. Needs
    `pip install 'tafkir[trm-web]'` to write it, and nothing to use it.

        tafkir trm page my-page && xdg-open my-page/index.html
    """
    from tafkir.checkpoint.trm import load_trm
    from tafkir.engine.puzzles import find_solver
    from tafkir.export.page import build_page
    from tafkir.recipe.bundled import bundled_solvers

    folders = [find_solver(name, "") for name in models] if models else list(bundled_solvers().values())
    made = build_page([load_trm(folder) for folder in folders], out, weights)
    if as_json:
        print(json.dumps({"path": str(made.path), "bytes": made.size_bytes, "models": made.models}))
        return
    held = ", ".join(f"{name} ({size / 1e3:,.0f} kB)" for name, size in made.models.items())
    print(f"{made.path}  {made.size_bytes / 1e6:.1f} MB with {held}")


# ---- on the terminal -------------------------------------------------------------------------------------------------

_SIGNS = {"#": "██", " ": "  ", "o": "••", ".": "· "}
_FAINT, _SURE = (150, 150, 150), (20, 150, 135)


def _show_trace(trace: Trace) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    blocks = [_block(trace, None, 0)]
    blocks += [_block(trace, thought, number) for number, thought in enumerate(trace.shown(), start=1)]
    width = max(line.cell_len for line in blocks[0]) + 4
    per_row = max(1, shutil.get_terminal_size().columns // width)
    for first in range(0, len(blocks), per_row):
        for lines in zip(*blocks[first : first + per_row], strict=True):
            console.print(_beside(lines, width))
        console.print()
    halted = f"it takes itself for right at step {trace.halted}" if trace.halted else "it never takes itself for right"
    found = {"solved": f"solved at step {trace.taken}", "unsolved": "unsolved: no answer keeps the rules"}
    console.print(f"{found.get(trace.verdict, f'answer of step {trace.taken}, unchecked')}; {halted}")


def _block(trace: Trace, thought: Thought | None, number: int) -> list[Text]:
    """A heading, a bar of certainty, and the grid."""
    from rich.text import Text

    wide = 2 * trace.format.columns
    head = Text(f"step {number}" if thought else "puzzle", style="bold")
    bar = Text()
    if thought is not None:
        full = round(thought.q * (max(8, wide) - 5))
        bar = Text("━" * full, style="rgb(20,150,135)") + Text("─" * (max(8, wide) - 5 - full), style="dim")
        bar += Text(f"{100 * min(thought.q, 0.994):4.0f}%")
    lines = [head, bar]
    for row in range(trace.format.rows):
        line = Text()
        for column in range(trace.format.columns):
            line += _cell(trace, thought, row * trace.format.columns + column)
        lines.append(line)
    return lines


def _cell(trace: Trace, thought: Thought | None, place: int) -> Text:
    from rich.text import Text

    symbols, given = trace.format.symbols, int(trace.question[place])
    token = given if thought is None else int(thought.answer[place])
    sign = symbols[token] or "?"
    text = _SIGNS.get(sign, sign + " ") if trace.format.kind in ("maze", "sudoku") else sign + " "
    if thought is None or token == given:
        return Text(text, style="bold" if sign.isalnum() else "dim")
    share = float(thought.confidence[place])
    red, green, blue = (round(low + (high - low) * share) for low, high in zip(_FAINT, _SURE, strict=True))
    style = f"rgb({red},{green},{blue})" + (" underline" if place in thought.changed else "")
    return Text(text, style=style)


def _beside(lines: Sequence[Text], width: int) -> Text:
    from rich.text import Text

    row = Text()
    for line in lines:
        row += line
        row += Text(" " * (width - line.cell_len))
    row.rstrip()
    return row


def _show_errors(table: DifficultyTable) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in (table.measure, "puzzles", "whole grids right", "95 % interval", "cells right", "steps"):
        shown.add_column(name, justify="right")
    for row in (*table.rows, table.total):
        amount = "all" if row is table.total else f"{row.low}" if row.low == row.high else f"{row.low} to {row.high}"
        exact = row.exact
        shown.add_row(
            amount,
            f"{exact.num_problems}",
            f"{exact.value:.1%}",
            f"{exact.low:.1%} to {exact.high:.1%}",
            f"{row.cells:.2%}",
            "-" if row.steps is None else f"{row.steps:.1f}",
        )
    Console(highlight=False).print(shown)
