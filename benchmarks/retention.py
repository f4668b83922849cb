"""What a trained word-problem model keeps in few bits, and what training for it wins back: shares with intervals.

One checkpoint is quantized in several ways, as it is and after distillation for each way (`--qad`). All of them answer
the same held-out problems with the same seeds, as engines would compute: inputs of matrices are rounded wherever the
checkpoint says so. Problems are the test parts of GSM8K and SVAMP, and as many made-up ones that no stage draws as an
interval needs. A share is (score after) / (score before), with Fieller's paired 95 % interval; answers of one problem
count as one observation. Finished answers are kept, so a killed run goes on.

    python benchmarks/retention.py runs/wordmath-tiny/stages/06-rlvr/checkpoint --out benchmarks/results/retention.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.cli.completer import build_completer
from tafkir.cli.pipeline import run_recipe, select_stages
from tafkir.data.chat import encode_conversation
from tafkir.data.sources import read_source
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.eval.metrics import paired_ratio
from tafkir.eval.records import EvalRecord
from tafkir.eval.run import checkpoint_fingerprint, evaluate
from tafkir.eval.summary import problem_scores, score_table
from tafkir.ops.native import select_kernels
from tafkir.quant.auto import auto_quantize, read_auto_text
from tafkir.quant.calibrated import write_quantized
from tafkir.quant.served import load_served
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.load import load_recipe
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.resolve import resolve_recipe
from tafkir.runlog.rundir import RunDir
from tafkir.tasks.math import WordProblems
from tafkir.train.qat import divergence

# Training, the tokenizer and calibration draw their stories elsewhere.
FIRST_STORY = 3 * 10**9
NUM_DIVERGENCE_STORIES = 256

FORMATS: Mapping[str, dict[str, Any]] = {
    "w4a4": {"preset": "all-linear", "scales": "four_over_six"},
    "w4a4-max": {"preset": "all-linear", "scales": "max"},
    "w4a16": {"preset": "all-linear", "scheme": "nvfp4_w4a16", "scales": "four_over_six"},
    "tafkir": {"preset": "tafkir"},
    "w4a4-gptq": {"preset": "all-linear", "scales": "local_hessian", "calibration": {"gptq": True}},
    "tafkir-gptq": {"preset": "tafkir", "scales": "local_hessian", "calibration": {"gptq": True, "tokens": 131_072}},
    "tafkir-mse": {"preset": "tafkir", "scales": "mse"},
    "r1-fp4": {"preset": "r1-fp4", "scales": "four_over_six"},
    "mxfp4": {"preset": "all-linear", "scheme": "mxfp4", "layout": "compressed-tensors"},
    "fp8": {"preset": "all-linear", "scheme": "fp8_block"},
    "auto-4.75": {"preset": "all-linear", "scales": "four_over_six", "auto": {"bits": 4.75}},
    "auto-5.0": {"preset": "all-linear", "scales": "four_over_six", "auto": {"bits": 5.0}},
    "auto-5.5": {"preset": "all-linear", "scales": "four_over_six", "auto": {"bits": 5.5}},
}
"""Ways to quantize. All matrices of the layers, but: tafkir keeps attention in FP8 blocks, r1-fp4 as it is; auto-B is a
mixture of B bits a weight (tafkir has 4.75)."""


def settings_of(name: str, checkpoint: Path) -> QuantizeConfig:
    """A way to quantize, with the formats chosen where it leaves them open; on other problems than those below."""
    config = QuantizeConfig.model_validate(FORMATS[name])
    return auto_quantize(checkpoint, config, read_auto_text(checkpoint, config.auto)).config if config.auto else config


def problems(stories: int, heldout: bool) -> list[Any]:
    """Examples of all sources."""
    own = [problem for source in ("gsm8k", "svamp") for problem in read_source(source)[0]] if heldout else []
    examples = list(WordProblems(own).examples("test")) if own else []
    return examples + [make_story(FIRST_STORY + i).as_example() for i in range(stories)]


def distilled(name: str, checkpoint: Path, folder: Path, overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint after the `qat` stage for a way to quantize, and the stage's result."""
    given = {key: value for key, value in FORMATS[name].items() if key != "auto"}
    formats = [f"quantize.{key}={json.dumps(value)}" for key, value in given.items()]
    rules = settings_of(name, checkpoint).rules
    words = (f"{{tensors={json.dumps(rule.tensors)}, format={json.dumps(rule.format)}}}" for rule in rules)
    formats += [f"quantize.rules=[{', '.join(words)}]"] if rules else []
    stages = [f"{stage}=" for stage in ("sft", "reward", "rlvr", "rlhf", "mtp", "eval", "trm", "report")]
    keys = [f"base={json.dumps(str(checkpoint))}", "threads=1", "qat.baseline=false", *stages, *formats, *overrides]
    loaded = resolve_recipe(load_recipe(["wordmath-tiny", "quantized"], keys))
    run = RunDir(folder / f"run-{name}")
    result = run_recipe(loaded, run, select_stages(loaded.recipe))
    assert loaded.recipe.qat is not None
    return run.stage("qat").checkpoint_dir, {**result["qat"], "learning_rate": loaded.recipe.qat.learning_rate}


def answers(checkpoint: Path, examples: Sequence[Any], args: argparse.Namespace, name: str) -> list[EvalRecord]:
    """What a checkpoint answers, computed as engines would."""
    return evaluate(
        build_completer(checkpoint, served=True),
        Tokenizer.load(checkpoint),
        WordProblems([]),
        examples,
        samples=args.samples,
        temperature=args.temperature,
        max_tokens=96,
        seed=args.seed,
        path=args.work / f"answers-{name}.jsonl",
        fingerprint=checkpoint_fingerprint(checkpoint) + " served",
        label=name,
    )


def shares(before: Sequence[EvalRecord], after: Sequence[EvalRecord]) -> dict[str, Any]:
    """The share kept by source and metric."""
    rows: dict[str, Any] = {}
    sources = {"all": lambda r: True, "stories": lambda r: r.source == "stories"}
    sources["real"] = lambda r: r.source != "stories"
    for source, holds in sources.items():
        sides = [[r for r in side if holds(r)] for side in (before, after)]
        if not all(sides):
            continue
        found = {metric: paired_ratio(*(problem_scores(s, metric) for s in sides)) for metric in ("average", "greedy")}
        rows[source] = {metric: ratio.to_dict() if ratio else None for metric, ratio in found.items()}
        rows[source]["score"] = score_table(sides[1])["all"]["average"]["value"]
        rows[source]["problems"] = len(problem_scores(sides[1], "average"))
    return rows


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every variant in turn; the result is written after each."""
    source = find_checkpoint(args.checkpoint)
    examples = problems(args.stories, not args.no_heldout)
    plain = answers(source, examples, args, "before") if args.samples else []
    teacher, tokenizer = load_checkpoint(source).decoder, Tokenizer.load(source)
    texts = [encode_conversation(tokenizer, make_story(FIRST_STORY - 1 - i)) for i in range(NUM_DIVERGENCE_STORIES)]
    result: dict[str, Any] = {
        "benchmark": "retention",
        "command": " ".join(["python", *sys.argv]),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "checkpoint": str(args.checkpoint),
        "samples": args.samples,
        "temperature": args.temperature,
        "before": shares(plain, plain) if plain else None,
        "variants": {},
    }
    for variant in [*args.formats, *(f"qad {name}" for name in args.qad)]:
        began = time.process_time()
        name = variant.removeprefix("qad ")
        origin, row = source, dict[str, Any]()
        if variant != name:
            origin, stage = distilled(name, source, args.work, args.set)
            told = ("steps", "learning_rate", "cpu_s", "peak_rss_bytes", "kl_before", "kl_after")
            row["qat"] = {key: stage[key] for key in told}
        folder = args.work / variant.replace(" ", "-")
        if not folder.exists():
            # After training the formats are those that it was trained for.
            write_quantized(origin, folder, settings_of(name, source))
        row |= {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
        row |= {"formats": FORMATS[name], "kl": divergence(load_served(folder), teacher, texts)}
        if args.samples:
            row |= shares(plain, answers(folder, examples, args, variant.replace(" ", "-")))
        row["cpu_s"] = time.process_time() - began
        result["variants"][variant] = row
        say(variant, row)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def say(variant: str, row: Mapping[str, Any]) -> None:
    """A line for a variant."""
    words = f"{variant:14} KL {row['kl']:.4f}"
    for source in ("all", "stories", "real"):
        if source in row:
            kept = row[source]["average"]
            words += f"  {source} {100 * kept['value']:.1f} ({100 * kept['low']:.1f} to {100 * kept['high']:.1f})"
    print(words, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a trained checkpoint")
    parser.add_argument("--formats", nargs="*", choices=tuple(FORMATS), default=["w4a4", "w4a16", "tafkir", "mxfp4"])
    parser.add_argument("--qad", nargs="*", choices=tuple(FORMATS), default=["w4a4"])
    parser.add_argument("--stories", type=int, default=1500)
    parser.add_argument("--no-heldout", action="store_true", help="made-up problems alone")
    parser.add_argument("--samples", type=int, default=4, help="0: divergence alone")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--set", action="append", default=[], help="PATH=VALUE of the recipe of the qat stage")
    parser.add_argument("--work", type=Path, default=Path("runs/retention"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    select_kernels("auto")
    args.work.mkdir(parents=True, exist_ok=True)
    measure(args)


if __name__ == "__main__":
    main()
