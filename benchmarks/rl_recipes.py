"""The measured parts of docs/rlhf.md and docs/tasks.md, from runs of rlhf-tiny and puzzles-tiny.

    tafkir run rlhf-tiny --set threads=1
    tafkir run rlhf-tiny --name rlhf-tiny-dpo --set threads=1 --set reward= --set rlvr= --set rlhf= \\
        --set dpo.steps=60 --set dpo.batch_pairs=24 --set dpo.learning_rate=1e-4 --set dpo.validate_every=20 \\
        --set dpo.weight_decay=0 --set dpo.expert_bias_update_rate=0 --set 'eval.stages=["sft","dpo"]'
    tafkir run puzzles-tiny --set threads=1
    python benchmarks/rl_recipes.py --rlhf runs/rlhf-tiny --dpo runs/rlhf-tiny-dpo --puzzles runs/puzzles-tiny \\
        --out benchmarks/results/rl_recipes.json --docs docs

`--docs` puts the figures between the marks of the two pages, or at their ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tafkir.report.collect import RunRecord, collect, series
from tafkir.runlog.rundir import RunDir

BEGIN, END = "<!-- measured: written by benchmarks/rl_recipes.py -->", "<!-- end -->"
# Steps that the first and the last value of a reward are averaged over.
WINDOW = 5
# What the text says of a curve: name in the metrics, words.
CURVES = (
    ("rlhf/reward", "reward of the reward model (standard deviations)"),
    ("rlhf/judge_reward", "reward of the held-out judge"),
    ("rlhf/kl", "KL towards the first policy (nats a completion)"),
    ("rlhf/length", "tokens of an answer"),
    ("rlhf/reward_length_correlation", "correlation of reward and length"),
    ("rollout/accuracy", "right answers in training (share)"),
)


def command_of(record: RunRecord) -> str:
    """What was run, as `tafkir ...`."""
    return " ".join(["tafkir", *map(str, record.environment.get("command", [])[1:])])


def ends(record: RunRecord, stage: str, metric: str) -> dict[str, float] | None:
    """The mean of a metric over the first and the last steps of a stage, and the largest."""
    found = record.stages.get(stage)  # type: ignore[call-overload]
    values = [value for _, value in series(found.metrics, metric) if value is not None] if found else []
    if not values:
        return None
    return {"first": fmean(values[:WINDOW]), "last": fmean(values[-WINDOW:]), "max": max(values), "steps": len(values)}


def scores(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Mean of the sampled answers by stage and source, and the greedy ones."""
    stages = record.evaluation.get("stages", {})
    return {
        stage: {source: {kind: table.get(kind) for kind in ("average", "greedy")} for source, table in tables.items()}
        for stage, tables in stages.items()
    }


def differences(record: RunRecord) -> list[dict[str, Any]]:
    """Paired differences of the sampled answers between stages."""
    rows = record.evaluation.get("differences", [])
    keys = ("before", "after", "source", "value", "low", "high", "p_value")
    return [{key: row[key] for key in keys} for row in rows if row.get("metric") == "average"]


def summarise(record: RunRecord) -> dict[str, Any]:
    """What one run says, as JSON."""
    reward, rlhf, dpo = (record.result(kind) for kind in ("reward", "rlhf", "dpo"))
    told: dict[str, Any] = {
        "command": command_of(record),
        "cpu": record.environment.get("cpu"),
        "cpu_s": {kind: stage.result.get("cpu_s") for kind, stage in record.stages.items() if stage.result},
        "accuracy": scores(record),
        "differences": differences(record),
        "baselines": record.evaluation.get("baselines", {}),
        "curves": {
            f"{stage}: {name}": found
            for stage in ("rlvr", "rlhf")
            for name, _ in CURVES
            if (found := ends(record, stage, name))
        },
    }
    if reward:
        told["reward_model"] = reward.get("heldout")
        told["judge"] = (reward.get("judge") or {}).get("heldout")
        told["agreement"] = reward.get("agreement")
    if rlhf:
        told["guard"] = rlhf.get("guard")
    if dpo:
        told["dpo"] = {"heldout": dpo.get("heldout"), "loss": dpo.get("loss"), "steps": dpo.get("steps")}
    return told


def percent(estimate: Mapping[str, Any] | None) -> str:
    """A share with its interval."""
    if not estimate:
        return "–"
    return f"{100 * estimate['value']:.1f} % ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def signed(row: Mapping[str, Any]) -> str:
    """A paired difference in points with its interval."""
    return f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})".replace("-", "−")


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def accuracy_table(told: Mapping[str, Any]) -> str:
    """Sampled answers by source, a column for each stage, and the change from the first to the last."""
    stages = list(told["accuracy"])
    if not stages:
        return ""
    rows = []
    for source in sorted(
        {source for stage in stages for source in told["accuracy"][stage]}, key=lambda s: (s == "all", s)
    ):
        cells = [percent((told["accuracy"][stage].get(source) or {}).get("average")) for stage in stages]
        changes = (
            [
                signed(row)
                for row in told["differences"]
                if (row["before"], row["after"], row["source"]) == (stages[-2], stages[-1], source)
            ]
            if len(stages) > 1
            else []
        )
        rows.append([source, *cells, *(changes or [""])])
    last = f"{stages[-1]} minus {stages[-2]}, points" if len(stages) > 1 else ""
    return as_markdown(["problems", *stages, last], rows)


def rlhf_section(told: Mapping[str, Any], dpo: Mapping[str, Any] | None) -> str:
    """The measured part of docs/rlhf.md."""
    model, judge = told.get("reward_model") or {}, told.get("judge") or {}
    lines = [f"`{told['command']}`, one thread; CPU-seconds: {seconds(told)}.", ""]
    rows = [
        ["accuracy on held-out pairs", percent(model.get("accuracy")), percent(judge.get("accuracy"))],
        ["calibration error", percent(model.get("calibration_error")), percent(judge.get("calibration_error"))],
    ]
    bias = [(table.get("length_bias") or {}).get("reward_length_correlation") for table in (model, judge)]
    rows.append(["correlation of reward and length", *("–" if b is None else f"{b:+.2f}" for b in bias)])
    lines += [as_markdown(["", "reward model", "judge"], rows), ""]
    curves = [
        [words, f"{found['first']:.3g}", f"{found['last']:.3g}", f"{found['max']:.3g}"]
        for name, words in CURVES
        # Open prompts have no right answer: their share is 0 throughout.
        if (found := told["curves"].get(f"rlhf: {name}")) and (name != "rollout/accuracy" or found["max"])
    ]
    head = ["RLHF", f"first {WINDOW} steps", f"last {WINDOW} steps", "largest"]
    guard = told.get("guard") or {}
    trips = [f"step {trip['step']}: {trip['reason']}" for trip in guard.get("trips") or []]
    lines += [as_markdown(head, curves), "", f"The guard: {'; '.join(trips) or 'saw nothing to stop'}.", ""]
    lines += ["Word problems, mean of sampled answers:", "", accuracy_table(told)]
    if dpo:
        found = (dpo.get("dpo") or {}).get("heldout") or {}
        right, steps = percent(found.get("accuracy")), dpo["dpo"]["steps"]
        words = f"DPO orders {right} of the held-out pairs rightly after {steps} steps"
        lines += ["", f"{words} (loss {found.get('loss', float('nan')):.3f}; 0.693 is guessing); `{dpo['command']}`:"]
        lines += ["", accuracy_table(dpo)]
    return "\n".join(lines)


def puzzles_section(told: Mapping[str, Any]) -> str:
    """The measured part of docs/tasks.md."""
    text = f"`{told['command']}`, one thread; CPU-seconds: {seconds(told)}. Held-out puzzles, mean of sampled answers:"
    return f"{text}\n\n{accuracy_table(told)}"


def seconds(told: Mapping[str, Any]) -> str:
    """CPU-seconds of the stages."""
    return ", ".join(f"{kind} {value:.0f}" for kind, value in told["cpu_s"].items() if value)


def write_between(page: Path, body: str) -> None:
    """Put text between the marks of a page; one without marks gets a last section with them."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n## Measured\n\n{BEGIN}{END}\n"
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rlhf", "dpo", "puzzles"):
        parser.add_argument(f"--{name}", type=Path, help=f"run directory of the {name} recipe")
    parser.add_argument("--out", type=Path, help="write the JSON to this file; runs that are not given keep their part")
    parser.add_argument("--docs", type=Path, help="folder of rlhf.md and tasks.md")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "rl_recipes"}
    if args.out and args.out.is_file():
        result = json.loads(args.out.read_text(encoding="utf-8"))
    for name in ("rlhf", "dpo", "puzzles"):
        if path := getattr(args, name):
            result[name] = summarise(collect(RunDir.open(path)))
    sections: list[tuple[str, str, Callable[[], str]]] = [
        ("rlhf", "rlhf.md", lambda: rlhf_section(result["rlhf"], result.get("dpo"))),
        ("puzzles", "tasks.md", lambda: puzzles_section(result["puzzles"])),
    ]
    for name, page, build in sections:
        if name in result:
            print(f"{build()}\n")
            if args.docs:
                write_between(args.docs / page, build())
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
