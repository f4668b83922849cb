"""`make bench`: measure every figure again, one command after another, and write docs/benchmarks.md.

    make bench                                    # or: PYTHONPATH=src python benchmarks/run_all.py
    python benchmarks/run_all.py --list           # steps, minutes, and what they need
    python benchmarks/run_all.py --continue 3     # without what was measured in the last three hours
    python benchmarks/run_all.py --only rl_vs_trl graders --with reference=OTHER_ENVIRONMENT/bin/python
    python benchmarks/run_all.py --write-page     # measure nothing, write the page from the results that are there

The plan is benchmarks/figures.toml. A step that needs what this machine lacks (another engine's environment, a
checkout) is left out and says so, and its older figures keep their date; name it by --with NAME=PATH or in
TAFKIR_BENCH_NAME. A failure does not stop the others: it is told at the end, and the exit code is 1. Times mean
something with nothing else running: the load before and after each step stands beside it in benchmarks/results/bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks_page import write_page
from figures import PLAN, RESULTS, ROOT, Plan, Step, git, now

from tafkir.runlog.rundir import describe_environment

__all__ = ["Bench", "main"]

MACHINE = ("cpu", "cores_logical", "memory_bytes", "platform", "python", "torch")


def places_of(given: list[str], known: Mapping[str, str]) -> dict[str, str]:
    """Paths by name, from the environment and from NAME=PATH.

    Raises:
        SystemExit: a name that the plan does not have.
    """
    found = {name: os.environ[key] for name in known if (key := f"TAFKIR_BENCH_{name.upper()}") in os.environ}
    for text in given:
        name, _, path = text.partition("=")
        if name not in known or not path:
            raise SystemExit(f"--with {text}: expected NAME=PATH, NAME one of {', '.join(known)}")
        found[name] = path
    return found


def counts_of(report: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of pytest's JUnit report."""
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed, skipped = (sum(int(suite.get(key, 0)) for key in keys) for keys in (("failures", "errors"), ("skipped",)))
    return {"passed": int(suite.get("tests", 0)) - failed - skipped, "failed": failed, "skipped": skipped}


class Bench:
    """Runs steps of a plan, one at a time."""

    def __init__(self, plan: Plan, places: dict[str, str], folder: Path) -> None:
        self.plan, self.places, self.folder = plan, places, folder

    def without_paths(self, text: str, out: Path, step: Step) -> str:
        """A results file that says nothing of where things lie on this machine."""
        names = {str(out): f"benchmarks/results/{step.out}", f"{ROOT}/": "", sys.executable: "python"}
        names |= {path: name.upper() for name, path in self.places.items()}
        names |= {str(Path(path).absolute()): name.upper() for name, path in self.places.items()}
        for path in sorted(names, key=len, reverse=True):
            text = text.replace(path, names[path])
        return text.replace(f"{self.folder}/", "")

    def _call(self, arguments: list[str], step: Step, seconds: float) -> str:
        """Run a Python with its own process group, which ends with it; why it failed, or nothing."""
        env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # a step says its own
        env |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONUNBUFFERED": "1"}
        env |= {key: value.format(**self.places) for key, value in (step.env or {}).items()}
        log = self.folder / f"{step.name}.log"
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code in step.held:
            return ""
        last = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])[-300:]
        return f"ended after {seconds / 60:.0f} minutes" if code is None else f"exit code {code}: {last}"

    def _measure(self, step: Step, out: Path) -> str:
        limit = 60 * (2 * step.minutes + 1)
        if step.tests is None:
            return self._call(shlex.split(step.run.format(out=out, **self.places)), step, limit)
        report, counts, began = self.folder / "tests.xml", {}, time.monotonic()
        for group, files in step.tests.items():
            options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"--junitxml={report}"]
            left = limit - (time.monotonic() - began)
            failure = self._call(["-m", "pytest", *options, *files.split()], step, max(left, 1))
            if not report.exists():
                return failure
            counts[group] = counts_of(report)
            report.unlink()
        out.write_text(json.dumps({"groups": counts}, indent=1) + "\n", encoding="utf-8")
        return ""

    def run(self, step: Step) -> str:
        """Measure a step, keep what it found with a stamp; why it failed, or nothing."""
        writes_itself = step.tests is None and "{out}" not in step.run
        out = step.file if writes_itself else self.folder / step.out
        if step.keep and not writes_itself and step.file.exists():
            shutil.copy(step.file, out)
        was = out.stat().st_mtime_ns if out.exists() else 0
        began, load, date = time.monotonic(), os.getloadavg()[0], now()
        failure = self._measure(step, out)
        if failure or not out.exists() or out.stat().st_mtime_ns == was:
            return failure or "it wrote no results"
        step.file.write_text(self.without_paths(out.read_text(encoding="utf-8"), out, step), encoding="utf-8")
        environment = describe_environment()
        step.write_stamp(
            date=date,
            commit=git("rev-parse", "--short", "HEAD"),
            changed=bool(git("status", "--porcelain", "--", "src", "recipes", "benchmarks/*.py")),
            seconds=round(time.monotonic() - began),
            load=[round(load, 2), round(os.getloadavg()[0], 2)],
            machine={key: environment[key] for key in MACHINE},
            command=step.command,
        )
        return ""


def is_fresh(step: Step, hours: float | None) -> bool:
    """Whether what a step left is younger than so many hours."""
    text = step.stamp().get("date", "") if hours is not None and step.is_stamped() else ""
    if len(text) < len("2026-01-01 00:00"):
        return False
    then = datetime.strptime(text, "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    return (datetime.now(UTC) - then).total_seconds() < 3600 * (hours or 0)


def minutes_of(step: Step) -> float:
    """What a step took the last time, or else what the plan says."""
    return float(step.stamp().get("seconds", 60 * step.minutes)) / 60


def chosen(plan: Plan, args: argparse.Namespace, places: Mapping[str, str]) -> tuple[list[Step], dict[str, str]]:
    """Steps to run, and why the others are left out."""
    if unknown := set(args.only or []) - set(plan.steps):
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: not in the plan; --list shows what is")
    steps, left_out = [], {}
    for name, step in plan.steps.items():
        if args.only and name not in args.only:
            continue
        absent = [need for need in step.needs if need not in places]
        if step.long and not args.only:
            left_out[name] = f"long ({step.minutes:g} minutes); run it by --only {name}"
        elif absent:
            left_out[name] = "needs " + ", ".join(f"--with {need}=PATH ({plan.places[need]})" for need in absent)
        elif is_fresh(step, args.hours):
            left_out[name] = f"measured {step.stamp()['date']}"
        else:
            steps.append(step)
    return steps, left_out


def run_all(bench: Bench, steps: list[Step], left_out: dict[str, str], minutes: float) -> dict[str, str]:
    """Run steps until the time is over; reasons of those that failed."""
    failures: dict[str, str] = {}
    began = time.monotonic()
    for number, step in enumerate(steps):
        gone, expected = (time.monotonic() - began) / 60, minutes_of(step)
        if gone + expected > minutes:
            left_out[step.name] = f"no time left: {expected:.1f} minutes after {gone:.0f} of {minutes:g}"
            continue
        rest = sum(map(minutes_of, steps[number:]))
        print(f"[{number + 1}/{len(steps)}] {step.name}: {expected:.1f} minutes, all {rest:.0f} more", flush=True)
        reason = bench.run(step)
        took = (time.monotonic() - began) / 60 - gone
        print(f"    {'FAILED: ' + reason if reason else 'done'} ({took:.1f} minutes)", flush=True)
        if reason:
            failures[step.name] = reason
            shutil.copy(bench.folder / f"{step.name}.log", Path(tempfile.gettempdir()) / f"bench-{step.name}.log")
    return failures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, long ones, too")
    parser.add_argument("--continue", dest="hours", nargs="?", type=float, const=12.0, metavar="HOURS",
                        help="without what was measured in the last hours (12)")  # fmt: skip
    parser.add_argument("--with", dest="places", nargs="+", action="extend", default=[], metavar="NAME=PATH")
    parser.add_argument("--minutes", type=float, default=60.0, help="start nothing that would take longer in all")
    parser.add_argument("--list", action="store_true", help="the plan")
    parser.add_argument("--dry-run", action="store_true", help="what would run, and what would not and why")
    parser.add_argument("--write-page", action="store_true", help="docs/benchmarks.md and its pictures alone")
    parser.add_argument("--plan", type=Path, default=PLAN, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def list_plan(plan: Plan) -> None:
    """Every step with its minutes, figures and needs."""
    for step in plan.steps.values():
        ids = [figure.id for figure in plan.figures if figure.step is step]
        kind = "long, " if step.long else ""
        needs = f"; needs {', '.join(step.needs)}" if step.needs else ""
        print(f"{step.name} ({kind}{step.minutes:g} min{needs}): {', '.join(ids)}\n    {step.command}")
    print("\n".join(f"--with {name}=PATH: {what}" for name, what in plan.places.items()))


def main() -> int:
    args = parse()
    plan = Plan.read(args.plan, args.results)
    if args.list:
        list_plan(plan)
        return 0
    failures: dict[str, str] = {}
    if not args.write_page:
        places = places_of(args.places, plan.places)
        steps, left_out = chosen(plan, args, places)
        with tempfile.TemporaryDirectory() as folder:
            if args.dry_run:
                for step in steps:
                    print(f"{minutes_of(step):5.1f} min  {step.command}")
            else:
                failures = run_all(Bench(plan, places, Path(folder)), steps, left_out, args.minutes)
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        for name, reason in failures.items():
            print(f"FAILED: {name}: {reason}", file=sys.stderr)
    if not args.dry_run and args.plan == PLAN and args.results == RESULTS:
        print(write_page(plan))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
