"""`tafkir bench serve URL`: what users of an OpenAI server meet under load, this project's or any other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tafkir.serve.loadtest import LoadReport, Measured

__all__ = ["app"]

app = typer.Typer(help="Measure servers.", no_args_is_help=True, rich_markup_mode=None)


class Api(StrEnum):
    """Which endpoint to call."""

    COMPLETIONS = "completions"
    CHAT = "chat"


class Shape(StrEnum):
    """`serve.traffic.Lengths.shape`, as a command line names it."""

    FIXED = "fixed"
    CHAT = "chat"
    REASONING = "reasoning"


@app.callback()
def _bench() -> None:
    """Measure servers."""


@app.command("serve")
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Such as http://127.0.0.1:8000/v1")],
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="How many to send.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Closed loop: so many at a time.")] = 8,
    rate: Annotated[float | None, typer.Option(help="Open loop: so many a second (Poisson), come what may.")] = None,
    lengths: Annotated[Shape, typer.Option(help="Lengths: fixed, like chats, or with reasoning's long tail.")] = (
        Shape.FIXED
    ),
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt, where lengths are fixed.")] = 128,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, where lengths are fixed.")] = 128,
    scale: Annotated[float, typer.Option(min=0.001, help="Multiplies drawn lengths, for small contexts.")] = 1.0,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest drawn prompt.")] = 4096,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Longest drawn answer.")] = 16384,
    model: Annotated[str, typer.Option(help="The first of /v1/models if left out.")] = "",
    api: Annotated[Api, typer.Option(help="Which endpoint to call.")] = Api.COMPLETIONS,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = "",
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of full length (vLLM's field).")] = True,
    goal_ttft: Annotated[float, typer.Option(help="Goodput: seconds to the first token.")] = 1.0,
    goal_tpot: Annotated[float, typer.Option(help="Goodput: seconds a token after it.")] = 0.1,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request counts as failed.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Fixes prompts, lengths and arrivals.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (needs matplotlib).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report for programs.")] = False,
) -> None:
    """Send a load and report TTFT, time per token, latency, throughput and goodput.

    Closed loop (--concurrency) shows what a server can do; open loop (--rate) shows what users meet when they do not
    wait for each other. Measure peers with the same command and seed.
    """
    import json

    from tafkir.serve.loadtest import Goal, Target, run_load, summarize
    from tafkir.serve.traffic import Lengths, Load

    target = Target(url, model, api.value, api_key, ignore_eos, timeout)
    shape = Lengths(lengths.value, prompt_tokens, answer_tokens, scale, max_prompt_tokens, max_answer_tokens)
    measured, wall_s = run_load(target, Load(requests, concurrency, rate), shape, seed=seed)
    report = summarize(measured, wall_s, Goal(goal_ttft, goal_tpot))
    if plot is not None:
        _draw(measured, report, plot)
    print(json.dumps(report.as_json()) if json_output else _table(report))
    if not report.succeeded:
        raise typer.Exit(1)


def _table(report: LoadReport) -> str:
    lines = [
        f"{report.succeeded} of {report.requests} requests in {report.wall_s:.2f} s: {report.requests_per_s:.2f} /s, "
        f"{report.tokens_per_s:,.0f} tokens/s, goodput {report.goodput_per_s:.2f} /s ({report.good_share:.0%})",
        f"{'milliseconds':<24}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    rows = {
        "time to first token": report.ttft_s,
        "time per token": report.tpot_s,
        "between chunks": report.gap_s,
        "whole answer": report.latency_s,
        "until refused": report.refusal_s,
    }
    for name, spread in rows.items():
        if spread:
            lines.append(f"{name:<24}" + "".join(f"{1000 * value:>10.1f}" for value in spread.values()))
    if report.succeeded < report.requests:
        lines.append("answers by status: " + ", ".join(f"{k}: {n}" for k, n in sorted(report.statuses.items())))
        lines += [f"  {failure}" for failure in report.failures]
    return "\n".join(lines)


def _draw(measured: Sequence[Measured], report: LoadReport, path: Path) -> None:
    from tafkir.serve.loadplot import draw_load

    draw_load(measured, report, path)
