"""How much KL mixed precision saves at equal bits: `--auto` against the presets, and whether losses add up.

    PYTHONPATH=src python benchmarks/auto_quantize.py base-tiny --out benchmarks/results/auto_quantize.json \
        --picture docs/img/auto-quantize.svg

Losses are measured on one text, mixtures are chosen on them, and every figure is measured on another text, with weights
and activations as engines compute them. `whole / sum` is the KL of a whole mixture over the sum of its groups' own, on
the text that they were measured on. Every checkpoint is measured twice: with NVFP4 inputs scaled for what they reach on
the text (`--calibrate`), and with an input scale of 1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tafkir.cli.completer import checkpoint_of
from tafkir.quant.auto import AutoResult, Sensitivities, auto_quantize, measure_sensitivities
from tafkir.quant.policy import decide
from tafkir.quant.sensitivity import read_predictions
from tafkir.quant.texts import familiar_problems
from tafkir.recipe.auto import AutoConfig, Sensitivity
from tafkir.recipe.quantize import CalibrationConfig, FormatName, PresetName, QuantizeConfig
from tafkir.report.allocation import render_allocation
from tafkir.runlog.atomic import write_json, write_text

BITS = (4.5, 4.75, 5.0, 5.5, 6.5, 8.0)
WAYS: tuple[Sensitivity, ...] = ("kl", "fisher")
PRESETS: tuple[PresetName, ...] = ("all-linear", "tafkir", "r1-fp4", "r1-fp4-v2")
_MEASURED, _HELD_OUT = 4 * 10**9, 10**9


def preset_formats(found: Sensitivities, preset: PresetName) -> list[FormatName]:
    """What a preset gives each group."""
    shapes = {name: tuple(t.shape) for name, t in _tensors(found).items()}
    decisions = {
        d.name: d.format for d in decide(shapes, QuantizeConfig(preset=preset), found.decoder.config.num_hidden_layers)
    }
    return [decisions[group.tensors[0]] for group in found.groups]


def _tensors(found: Sensitivities) -> dict[str, torch.Tensor]:
    from tafkir.models.hf import write_hf_tensors

    return dict(write_hf_tensors(found.decoder, torch.bfloat16))


def bits_of(found: Sensitivities, formats: list[FormatName]) -> float:
    """Stored bits for each weight of the groups."""
    return 8 * sum(sizes[f] for sizes, f in zip(found.sizes, formats, strict=True)) / found.numel


def correlation(a: Sensitivities, b: Sensitivities) -> float:
    """Between the logarithms of two measurements of the same losses."""
    pairs = [(x[f], y[f]) for x, y in zip(a.losses, b.losses, strict=True) for f in x]
    logs = torch.tensor(pairs).log().T
    return float(torch.corrcoef(logs)[0, 1])


def measure(
    name: str, tokens: int, calibrated: bool
) -> tuple[dict[str, Any], AutoResult, list[tuple[str, float, float]]]:
    """All figures of one checkpoint."""
    source = checkpoint_of(name)
    texts, others = (familiar_problems(source, tokens, first) for first in (_MEASURED, _HELD_OUT))
    found: dict[str, Sensitivities] = {}
    seconds: dict[str, float] = {}
    calibration = CalibrationConfig() if calibrated else None
    for way in WAYS:
        began = time.process_time()
        auto = AutoConfig(bits=5.0, sensitivity=way, tokens=tokens)
        config = QuantizeConfig(auto=auto, calibration=calibration)
        found[way] = measure_sensitivities(source, config, auto, texts)
        seconds[way] = time.process_time() - began
    exact = read_predictions(found["kl"].decoder, others)
    rows, shown = [], None
    for way in WAYS:
        for bits in BITS:
            auto = AutoConfig(bits=bits, sensitivity=way)
            config = QuantizeConfig(auto=auto, calibration=calibration)
            result = auto_quantize(source, config, texts, measured=found[way])
            formats = [group.format for group in result.groups]
            additive = sum(losses.get(f, 0.0) for losses, f in zip(found["kl"].losses, formats, strict=True))
            kl = found["kl"].measure_on(formats, others, exact)
            ratio = result.measured_kl / additive
            rows.append({"choice": f"auto, {way}", "bits": result.bits, "kl": kl, "whole_over_sum": ratio})
            if (way, bits) == ("kl", 5.0):
                shown = result
    presets: list[tuple[str, float, float]] = []
    for preset in PRESETS:
        formats = preset_formats(found["kl"], preset)
        presets.append((preset, bits_of(found["kl"], formats), found["kl"].measure_on(formats, others, exact)))
        rows.append({"choice": preset, "bits": presets[-1][1], "kl": presets[-1][2]})
    assert shown is not None
    return (
        {
            "checkpoint": name,
            "inputs": "calibrated" if calibrated else "input_scale 1",
            "tokens": sum(len(text.places) for text in texts),
            "groups": len(found["kl"].groups),
            "weights": found["kl"].numel,
            "fisher_correlation": correlation(found["kl"], found["fisher"]),
            "fisher_over_kl": {f: _sum(found["fisher"], f) / _sum(found["kl"], f) for f in auto.formats},
            "losses": {
                way: {g.name: own for g, own in zip(s.groups, s.losses, strict=True)} for way, s in found.items()
            },
            "cpu_s": seconds,
            "rows": rows,
        },
        shown,
        presets,
    )


def _sum(found: Sensitivities, format: FormatName) -> float:
    return sum(own[format] for own in found.losses if format in own)


def show(result: dict[str, Any]) -> None:
    """The table on a terminal."""
    head = (
        f"{result['checkpoint']}, inputs: {result['inputs']}; {result['groups']} groups, {result['weights']:,} weights"
    )
    print(f"{head}, {result['tokens']:,} tokens")
    print(f"{'choice':<14}{'bits':>6}{'KL':>10}{'whole / sum':>13}")
    for row in result["rows"]:
        additive = f"{row['whole_over_sum']:.2f}" if "whole_over_sum" in row else "-"
        print(f"{row['choice']:<14}{row['bits']:>6.2f}{row['kl']:>10.4f}{additive:>13}")
    sums = ", ".join(f"{format} {ratio:.2f}" for format, ratio in result["fisher_over_kl"].items())
    times = ", ".join(f"{way} {seconds:.1f} CPU-s" for way, seconds in result["cpu_s"].items())
    print(
        f"fisher against kl: correlation of logs {result['fisher_correlation']:.3f}, sums {sums}; {times}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders, runs or bundled names")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="JSON with all figures")
    parser.add_argument("--picture", type=Path, help="SVG of the first checkpoint at 5 bits, presets beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for name in args.checkpoints:
        for calibrated in (True, False):
            result, shown, presets = measure(name, args.tokens, calibrated)
            found.append(result)
            show(result)
            if len(found) == 1 and args.picture:
                write_text(args.picture, render_allocation(shown.to_dict(), others=presets))
            if args.out:
                write_json(args.out, json.loads(json.dumps({"torch": torch.__version__, "checkpoints": found})))


if __name__ == "__main__":
    main()
