"""Which model solves puzzles, and at what cost: a recursive model, the shipped base, and the base after fine-tuning.

    python benchmarks/efficiency_card.py
    python benchmarks/efficiency_card.py --task sudoku6 --limit 100
    python benchmarks/efficiency_card.py --task maze-small --limit 100

trains `trm-<task>`, for 4x4 Sudoku fine-tunes the shipped base on solved ones in text (`[[sft.tasks]]`, levels 1 to 3),
and sets both beside the base with `tafkir card`. Runs that are there already can be named instead; for other puzzles
than 4x4 Sudoku the base stands alone, as it is, unless --sft names a fine-tuned one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tafkir.recipe.bundled import find_recipe
from tafkir.recipe.load import load_recipe
from tafkir.recipe.show import dump_toml
from tafkir.runlog.atomic import read_json, write_json

_RESULTS = Path(__file__).parent / "results"
_SFT = (
    'name="sft-sudoku4"', 'base="base-tiny"', "pretrain=", "tokenizer=", "rlvr=", "eval=", "report=", "threads=1",
    "sft.steps=400", "sft.batch_problems=24", "sft.learning_rate=2e-3", "sft.warmup_steps=20", "sft.weight_decay=0",
    "sft.epochs=", 'sft.tasks=[{kind="sudoku", difficulty=[1, 2, 3]}]',
)  # fmt: skip


def tafkir(*words: str) -> None:
    """One command of the program."""
    subprocess.run([sys.executable, "-m", "tafkir.cli.main", *words], check=True)


def main() -> None:
    """Train what is not there, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sudoku4", choices=("sudoku4", "sudoku6", "maze-small"))
    parser.add_argument("--trm", type=Path, help="run directory of a recursive model for these puzzles")
    parser.add_argument("--sft", type=Path, help="run directory of a language model fine-tuned on them")
    parser.add_argument("--limit", type=int, default=0, help="puzzles; 0 is all of the test part")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    runs = ["--runs-dir", str(args.runs_dir)]
    if args.trm is None:
        tafkir("run", f"trm-{args.task}", *runs)
    if args.sft is None and args.task == "sudoku4":
        recipe = args.runs_dir / "sft-sudoku4.toml"
        loaded = load_recipe([find_recipe("wordmath-tiny")], list(_SFT))
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(dump_toml(loaded.recipe, loaded.origins), encoding="utf-8")
        tafkir("run", str(recipe), *runs)
        args.sft = args.runs_dir / "sft-sudoku4"
    contestants = {"recursive": args.trm or args.runs_dir / f"trm-{args.task}", "base": "base-tiny"}
    if args.sft is not None:
        contestants["fine-tuned"] = args.sft
    named = [f"{name}={place}" for name, place in contestants.items()]
    tafkir("card", *named, "--task", args.task, "--limit", str(args.limit), *runs)
    own = "" if args.task == "sudoku4" else f".{args.task}"
    write_json(_RESULTS / f"efficiency_card{own}.json", read_json(args.runs_dir / f"card-{args.task}" / "card.json"))


if __name__ == "__main__":
    main()
