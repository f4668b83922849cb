"""`tafkir canary record` and `check`: what a model answers to questions with known answers, and how far that drifts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tafkir.cli.serve import CacheNumbers, CheckpointName, KvCache, WeightNumbers, Weights

if TYPE_CHECKING:
    from tafkir.serve.canaries import Baseline, Canary

__all__ = ["app"]

app = typer.Typer(
    help="Hold a model's answers to a recorded baseline: in the background of `tafkir serve --canaries`, or at once.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Questions = Annotated[
    Path | None, typer.Option("--canaries", help='Lines {"id", "prompt", "answer"}; those that ship if left out.')
]


@app.command("record")
def record(
    checkpoint: CheckpointName,
    out: Annotated[Path, typer.Option(help="The baseline, for --baseline of `tafkir serve` and of `check`.")],
    canaries: Questions = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    kv_cache: KvCache = CacheNumbers.AUTO,
    weights: Weights = WeightNumbers.AUTO,
) -> None:
    """Ask a model that is as it should be, and keep what it answers.

    \b
    tafkir canary record runs/mine --out baseline.json
    tafkir serve runs/mine --canaries default --baseline baseline.json
    """
    from tafkir.serve.canaries import read_canaries, summary_of

    questions = read_canaries(canaries)
    found = _ask(checkpoint, questions, None, max_tokens, kv_cache, weights)
    found.save(out)
    print(f"{out}: {len(found.readings)} canaries, {json.dumps(summary_of(found.readings))}")


@app.command("check")
def check(
    checkpoint: CheckpointName,
    baseline: Annotated[Path, typer.Option(help="A file of `tafkir canary record`.")],
    canaries: Questions = None,
    kv_cache: KvCache = CacheNumbers.AUTO,
    weights: Weights = WeightNumbers.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Ask a model the same again. Exit code 3 where a light is red."""
    from tafkir.serve.canaries import Baseline, drift_of, light_of, read_canaries

    questions = read_canaries(canaries)
    before = Baseline.load(baseline, questions)
    now = _ask(checkpoint, questions, before, before.max_tokens, kv_cache, weights)
    drift = drift_of(now.readings, before.readings)
    lights = {signal: light_of(signal, value, before.limits) for signal, value in drift.items()}
    words = {signal: ("green", "amber", "red")[light] for signal, light in lights.items()}
    if as_json:
        print(json.dumps({"drift": drift, "lights": words, "model": now.model, "fingerprint": now.fingerprint}))
    else:
        for signal, value in drift.items():
            amber, red = before.limits[signal]
            print(f"{signal:<10} {value:+.4f}  {words[signal]:<6} (amber from {amber:g}, red from {red:g})")
    if 2 in lights.values():
        raise typer.Exit(3)


def _ask(
    checkpoint: str,
    questions: list[Canary],
    baseline: Baseline | None,
    max_tokens: int,
    kv_cache: CacheNumbers,
    weights: WeightNumbers,
) -> Baseline:
    from tafkir.cli.completer import checkpoint_of
    from tafkir.runlog.progress import Progress
    from tafkir.serve.app import build_app
    from tafkir.serve.canaries import Canaries

    app = build_app(checkpoint_of(checkpoint), kv_cache=kv_cache.value, weights=weights.value)
    try:
        asking = Canaries(app.state.live, questions, baseline, max_tokens=max_tokens)
        readings = {}
        with Progress("canaries", len(questions)) as progress:
            for canary, reading in asking.round():
                readings[canary.id] = reading
                progress.update(len(readings))
        return asking.as_baseline(readings)
    finally:
        app.state.worker.stop()
