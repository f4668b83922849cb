"""What exporting a recursive model costs and gives: bytes, accuracy and time in each weight format, and in a browser.

For each checkpoint and each of float32, float16, int8 and fp4 (NVFP4):

    step.onnx       bytes of the file of one supervision step
    error           largest difference to torch with the weights that the file unpacks to, over all steps
    solved          share of unseen test puzzles solved by solve.onnx, with its 95 % interval: an answer after some step
                    keeps the rules, which is what `tafkir solve` and the page accept
    as torch        puzzles whose taken answer is the one that float32 torch takes
    step, CPU ms    onnxruntime and torch, one puzzle, one thread, in turn; medians of CPU time
    browser         onnxruntime-web in Chromium: CPU ms of the page's thread for one whole solve, drawing left out

and for the page that holds all of them: its bytes, and CPU and wall seconds of its process from opening it to the first
solved puzzle. CPU time does not wait for neighbours; wall time does.

    python benchmarks/trm_device.py sudoku4 sudoku6 maze-small --out benchmarks/results/trm_device.json

Rows that the file holds already, of the same weights and versions, are not measured again: delete it to begin anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from tafkir.checkpoint.trm import TrmCheckpoint, load_trm
from tafkir.data.puzzles.parts import PuzzleSet
from tafkir.data.puzzles.rules import is_right
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.engine.puzzles import find_solver
from tafkir.export.check import OnnxSolver
from tafkir.export.onnx_files import make_files
from tafkir.export.page import build_page, runtime_source
from tafkir.export.weights import WEIGHT_FORMATS, WeightFormat
from tafkir.intervals import accuracy
from tafkir.models.solving import Solved, solve_puzzles
from tafkir.recipe.load import load_recipe
from tafkir.recipe.seeds import derive_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.export.browser import Browser

REPEATS = 25


def test_puzzles(checkpoint: TrmCheckpoint) -> PuzzleSet:
    """The puzzles that the checkpoint's recipe tests on: the recipe beside it, or of its run directory."""
    assert checkpoint.manifest is not None
    lineage, folder = checkpoint.manifest.lineage, checkpoint.path
    beside = folder / "recipe.toml"
    recipe = load_recipe([beside if beside.exists() else folder.parents[2] / "recipe.resolved.toml"]).recipe
    assert recipe.trm is not None
    return build_puzzles(recipe.trm.puzzles, derive_seed(lineage["seed"], "trm", "puzzles")).test


def taken(checkpoint: TrmCheckpoint, puzzles: PuzzleSet, solved: Solved) -> list[bytes | None]:
    """The first answer of each puzzle that keeps the rules."""
    found: list[bytes | None] = []
    for number, question in enumerate(puzzles.inputs):
        answers = (step[number] for step in solved.answers)
        found.append(next((a.tobytes() for a in answers if is_right(checkpoint.puzzles, question, a)), None))
    return found


def cpu_ms(actions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(REPEATS + 2):
        for name, action in actions.items():
            began = time.process_time()
            action()
            if repeat >= 2:
                times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure_format(checkpoint: TrmCheckpoint, puzzles: PuzzleSet, format: WeightFormat) -> dict[str, Any]:
    """One row: size, parity, accuracy, time."""
    model = checkpoint.model
    made = make_files(checkpoint, format)
    steps = model.shape.max_supervision_steps
    ours = taken(checkpoint, puzzles, solve_puzzles(model, puzzles.inputs))
    theirs = taken(checkpoint, puzzles, OnnxSolver(made.files["solve.onnx"]).solve(puzzles.inputs, steps))
    one, state = puzzles.inputs[:1], model.start(1)
    tokens, y, z = torch.from_numpy(one).long(), *(np.ascontiguousarray(part.numpy()) for part in state)
    stepper = OnnxSolver(made.files["step.onnx"])
    times = cpu_ms({"onnxruntime": lambda: stepper.step(one, y, z), "torch": lambda: model(state, tokens)})
    return {
        "step_bytes": len(made.files["step.onnx"]),
        "solve_bytes": len(made.files["solve.onnx"]),
        "parity": made.parity.to_dict(),
        "solved": accuracy([answer is not None for answer in theirs]).to_dict(),
        "as_torch": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "step_cpu_ms": times,
    }


def measure_page(checkpoints: list[TrmCheckpoint], puzzles: list[PuzzleSet], format: WeightFormat) -> dict[str, Any]:
    """The page in Chromium: its size, the first solve, and solves of the first test puzzles."""
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "profile", 600) as browser:
        page = build_page(checkpoints, Path(folder) / "page", format)
        browser.resize(1200, 900)
        browser.call("Performance.enable", timeDomain="threadTicks")
        cpu, wall = browser.cpu_s(), time.perf_counter()
        browser.open(page.path.as_uri())
        browser.run("new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))")
        browser.run("tafkir.settings.pace = 'instant'; tafkir.ready")
        awake = browser.cpu_s() - cpu, time.perf_counter() - wall
        rows = {}
        for number, (checkpoint, part) in enumerate(zip(checkpoints, puzzles, strict=True)):
            browser.run(f"document.querySelectorAll('#tabs button')[{number}].click()")
            solves = [solve_in(browser, question.tolist()) for question in part.inputs[:REPEATS]]
            if number == 0:
                first = browser.cpu_s() - cpu, time.perf_counter() - wall
            rows[checkpoint.path.name] = {
                "first_cpu_ms": solves[0]["ms"],
                "cpu_ms": statistics.median(solve["ms"] for solve in solves[1:]),
                "cpu_ms_most": max(solve["ms"] for solve in solves[1:]),
                "steps": statistics.mean(solve["steps"] for solve in solves),
                "solved": sum(solve["verdict"] == "solved" for solve in solves),
                "of": len(solves),
            }
        return {
            "bytes": page.size_bytes,
            "weights": format,
            "awake_cpu_s": awake[0],
            "awake_wall_s": awake[1],
            f"{REPEATS}_solves_cpu_s": first[0],
            "solves": rows,
            "console": browser.console,
        }


def solve_in(browser: Browser, question: list[int]) -> dict[str, Any]:
    """One puzzle by the network alone: its steps until one is right, nothing drawn."""
    before = thread_s(browser)
    found = browser.run(
        f"(async () => {{ const model = tafkir.place().model, question = {question}; let steps = 0, right = false;"
        " for await (const step of Thinker.think(model, question, 16)) { steps++;"
        " if (isRight(model.puzzles, question, step.answer)) { right = true; break; } }"
        " return JSON.stringify({ steps, verdict: right ? 'solved' : 'unsolved' }); })()"
    )
    return json.loads(found) | {"ms": 1e3 * (thread_s(browser) - before)}


def thread_s(browser: Browser) -> float:
    """CPU seconds of the page's main thread."""
    metrics = {each["name"]: each["value"] for each in browser.call("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


def show(rows: dict[str, dict[str, dict[str, Any]]], page: dict[str, Any] | None) -> None:
    """Tables for people."""
    print("| checkpoint | weights | step.onnx | error | solved | as torch | onnxruntime, ms a step | torch |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, formats in rows.items():
        for format, row in formats.items():
            exact, times = row["solved"], row["step_cpu_ms"]
            print(
                f"| {name} | {format} | {row['step_bytes'] / 1e3:,.0f} kB | {row['parity']['max_error']:.0e} | "
                f"{exact['value']:.1%} ({exact['low']:.1%} to {exact['high']:.1%}) | {row['as_torch']} of "
                f"{exact['num_problems']} | {times['onnxruntime']:.1f} | {times['torch']:.1f} |"
            )
    if page is None:
        return
    print(f"\npage: {page['bytes'] / 1e6:.1f} MB, awake after {page['awake_cpu_s']:.2f} CPU-seconds")
    for name, row in page["solves"].items():
        print(
            f"{name}: {row['cpu_ms']:.0f} CPU-ms a solve (at most {row['cpu_ms_most']:.0f}, the first "
            f"{row['first_cpu_ms']:.0f}), {row['steps']:.1f} steps, {row['solved']} of {row['of']} solved"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="run directories, checkpoint folders or bundled names")
    parser.add_argument("--page-weights", default="float16", choices=WEIGHT_FORMATS)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoints = [load_trm(find_solver(name, "")) for name in args.checkpoints]
    puzzles = [test_puzzles(checkpoint) for checkpoint in checkpoints]
    result = begin(args.out, checkpoints)
    rows = result["formats"]
    for checkpoint, part in zip(checkpoints, puzzles, strict=True):
        own = rows.setdefault(checkpoint.path.name, {})
        for format in WEIGHT_FORMATS:
            if format not in own:
                own[format] = measure_format(checkpoint, part, format)
                keep(args.out, result)
                print(checkpoint.path.name, format, "done", file=sys.stderr)
    if not args.no_browser:
        result["page"] = measure_page(checkpoints, puzzles, args.page_weights)
        keep(args.out, result)
    show(rows, result["page"])


def begin(out: Path | None, checkpoints: list[TrmCheckpoint]) -> dict[str, Any]:
    """What is measured, where and on which weights, with the rows that the file holds of the same."""
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load": os.getloadavg()[0],
        "versions": versions | {"onnxruntime-web": runtime_source()["version"]},
        "parameters": {c.path.name: c.model.shape.num_parameters() for c in checkpoints},
        "weights": {c.path.name: checksum(c) for c in checkpoints},
        "repeats": REPEATS,
        "formats": {},
        "page": None,
    }
    before = json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {}
    if before.get("versions") == result["versions"]:
        same = [name for name, found in result["weights"].items() if before.get("weights", {}).get(name) == found]
        result["formats"] = {name: before["formats"][name] for name in same if name in before["formats"]}
    return result


def checksum(checkpoint: TrmCheckpoint) -> str:
    """Of the weights' file."""
    return hashlib.sha256((checkpoint.path / "model.safetensors").read_bytes()).hexdigest()


def keep(out: Path | None, result: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
