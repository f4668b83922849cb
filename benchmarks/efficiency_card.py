"""Which model solves 4x4 Sudoku, and at what cost: a recursive model, the shipped base, and the base after fine-tuning.

    python benchmarks/efficiency_card.py

trains `trm-sudoku4`, fine-tunes the shipped base on solved Sudoku in text (`[[sft.tasks]]`, levels 1 to 3), and sets
both beside the base with `tafkir card`. Runs that are there already can be named instead.
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

_RESULT = Path(__file__).parent / "results" / "efficiency_card.json"
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
    parser.add_argument("--trm", type=Path, help="run directory of a recursive model for 4x4 Sudoku")
    parser.add_argument("--sft", type=Path, help="run directory of a language model fine-tuned on Sudoku")
    parser.add_argument("--limit", type=int, default=0, help="puzzles; 0 is all of the test part")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    runs = ["--runs-dir", str(args.runs_dir)]
    if args.trm is None:
        tafkir("run", "trm-sudoku4", *runs)
    if args.sft is None:
        recipe = args.runs_dir / "sft-sudoku4.toml"
        loaded = load_recipe([find_recipe("wordmath-tiny")], list(_SFT))
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(dump_toml(loaded.recipe, loaded.origins), encoding="utf-8")
        tafkir("run", str(recipe), *runs)
    contestants = {
        "recursive": args.trm or args.runs_dir / "trm-sudoku4",
        "base": "base-tiny",
        "fine-tuned": args.sft or args.runs_dir / "sft-sudoku4",
    }
    named = [f"{name}={place}" for name, place in contestants.items()]
    tafkir("card", *named, "--task", "sudoku4", "--limit", str(args.limit), *runs)
    write_json(_RESULT, read_json(args.runs_dir / "card-sudoku4" / "card.json"))


if __name__ == "__main__":
    main()
