"""What `tafkir eval` can be told, option by option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tafkir.cli.serve import CacheNumbers

__all__ = [
    "ApiKeyEnv",
    "AsJson",
    "Concurrency",
    "Curve",
    "DataPaths",
    "Depths",
    "ExtraBody",
    "FailOnError",
    "Judge",
    "KvCache",
    "Lengths",
    "Limit",
    "ListTasks",
    "MaxCost",
    "MaxSeconds",
    "MaxTokens",
    "MaxTotalTokens",
    "ModelNames",
    "Needles",
    "OldTask",
    "OutFolder",
    "Overrides",
    "Price",
    "QuestionOnlyFlag",
    "Retries",
    "RunName",
    "RunsDir",
    "Samples",
    "SandboxTier",
    "Seed",
    "TaskNames",
    "Temperature",
    "Timeout",
    "TopP",
    "Unsafe",
    "UntilSettled",
]

ModelNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]MODEL...",
        help="Checkpoint folder, run directory or bundled name; with --tasks also http://host/v1#model.",
        show_default=False,
    ),
]
OldTask = Annotated[
    str,
    typer.Option(
        help="problems (held-out ones), needle (numbers to be found in long texts), or puzzles, by recursive and "
        "language models alike: sudoku4, sudoku6, maze-small, ..., or a recipe file with [trm.puzzles]."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set one value of the recipe `eval`, such as eval.samples=8."),
]
QuestionOnlyFlag = Annotated[
    bool,
    typer.Option("--question-only", help="Ask the question alone, without the published instruction; kept apart."),
]
RunName = Annotated[str | None, typer.Option(help="Name of the run directory; with --tasks: eval.")]
RunsDir = Annotated[Path, typer.Option(envvar="TAFKIR_RUNS_DIR", help="Where run directories are made.")]
KvCache = Annotated[CacheNumbers, typer.Option("--kv-cache", help="Numbers of the cache; not for puzzles.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Lengths = Annotated[
    str | None,
    typer.Option(help="Needle: tokens of the texts: 4096,32768.", show_default="up to the context"),
]
Depths = Annotated[
    str | None, typer.Option(help="Needle: where the number stands, 0 to 1.", show_default="0,0.25,0.5,0.75,1")
]
Samples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Answers an item. Needle: texts for each length and depth.",
        show_default="the task's own; needle 20",
    ),
]
Needles = Annotated[int | None, typer.Option(min=1, help="Needle: named numbers in each text.", show_default="4")]
ListTasks = Annotated[bool, typer.Option("--list", help="List the published tasks, and end.")]
TaskNames = Annotated[
    str | None,
    typer.Option(help="Published tasks and one's own: gsm8k,math500,mine.py,rows.jsonl:number (see --list)."),
]
DataPaths = Annotated[
    list[str] | None,
    typer.Option(metavar="[TASK=]PATH", help="Data of a task that is not in the package: a file or a folder."),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the one results file; answers in it are kept.", show_default="RUNS_DIR/NAME"),
]
Limit = Annotated[int, typer.Option(min=0, help="Only the first so many items of each task; 0 is all.")]
Seed = Annotated[int, typer.Option(help="From which the seeds of all answers are derived.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.", show_default="the task's own")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, show_default="the task's own")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.", show_default="the task's own")]
UntilSettled = Annotated[
    float | None,
    typer.Option(
        metavar="WIDTH",
        min=0.0,
        help="One more answer an item, until the 95 % interval is no wider (0.05: five points) or --samples is "
        "reached.",
    ),
]
Curve = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Accuracy with so many tokens an answer, from stored text.")
]
FailOnError = Annotated[bool, typer.Option(help="Exit with 1 where an answer failed.")]
MaxTotalTokens = Annotated[int | None, typer.Option(min=1, help="Budget of this call: tokens of prompts and answers.")]
MaxSeconds = Annotated[float | None, typer.Option(min=0.0, help="Budget of this call: wall time.")]
MaxCost = Annotated[float | None, typer.Option(min=0.0, help="Budget of this call: money; needs --price.")]
Price = Annotated[
    str | None, typer.Option(metavar="IN,OUT", help="Of a million prompt tokens, and of a million others.")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at an endpoint at once.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that an endpoint may take for one answer.")]
Retries = Annotated[int, typer.Option(min=0, help="Further attempts of a request that failed.")]
ApiKeyEnv = Annotated[str, typer.Option(help="Environment variable with the key of endpoints.")]
ExtraBody = Annotated[str | None, typer.Option(metavar="JSON", help="Added to every request: '{\"top_k\": 20}'.")]
SandboxTier = Annotated[
    str | None,
    typer.Option(
        metavar="TIER",
        help="Where answered programs run: bwrap, rlimit (needs --unsafe), or remote (TAFKIR_SANDBOX_URL).",
        show_default="bwrap",
    ),
]
Unsafe = Annotated[bool, typer.Option("--unsafe", help="Let the tier rlimit run programs with your own rights.")]
Judge = Annotated[
    str | None, typer.Option(metavar="URL#MODEL", help="Endpoint that judges answers; its key: TAFKIR_JUDGE_KEY.")
]
