"""`tafkir regrade RESULTS`: new verdicts for stored answers, without asking any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

__all__ = ["regrade"]


def regrade(
    results: Annotated[Path, typer.Argument(help="A results file of `tafkir eval --tasks`, or its folder.")],
    tasks: Annotated[str | None, typer.Option(help="Only these tasks.", show_default="all that it holds")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[TASK=]PATH", help="Data of a task that is not in the package: a file or a folder."),
    ] = None,
    sandbox: Annotated[
        str | None, typer.Option(metavar="TIER", help="As in eval: bwrap, rlimit or remote.", show_default="bwrap")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Let the tier rlimit run programs with your own rights.")
    ] = False,
    judge: Annotated[str | None, typer.Option(metavar="URL#MODEL", help="Endpoint that judges answers.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would change.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Grade stored answers again by the tasks as they are now; no model is asked.

    For a scorer that was corrected, and for answers whose scorer failed. Verdicts that differ are appended; the last
    line of an answer counts.
    """
    from tafkir.cli.eval_tasks import load_tasks
    from tafkir.eval.regrade import regrade_samples
    from tafkir.eval.samples import load_samples, samples_file
    from tafkir.runlog.rundir import RunDir
    from tafkir.tasks.backends import Backends, choose_backends
    from tafkir.tasks.sandbox import Tier

    path = samples_file(results)
    names = tasks or ",".join(dict.fromkeys(sample.task for sample in load_samples(path)))
    backends = Backends(cast(Tier | None, sandbox), unsafe, judge or "", judge_cache=path.with_name("judged.jsonl"))
    with choose_backends(backends), RunDir(path.parent).lock():
        wanted = {task.name: task for task in load_tasks(names, data or ())}
        done = regrade_samples(path, wanted, write=not dry_run).to_dict()
    if as_json:
        print(json.dumps(done, indent=2, ensure_ascii=False))
        return
    for row in done["changed"][:50]:
        print(
            f"{row['model']} · {row['task']} · {row['item']} · {row['repeat']}: {row['before']} -> {row['after']}  "
            f"({row['extracted']!r} against {row['expected']!r}) {row['reason']}"
        )
    moves = ", ".join(f"{count:,} {move}" for move, count in done["moves"].items()) or "none"
    print(f"{done['graded']:,} answers graded again; changed: {moves}")
    if done["unknown"]:
        print(f"{done['unknown']:,} answers are to items that their task does not have any more")
