"""Breaks commands at random moments, lets them finish, and compares what they leave with what an unbroken run leaves.

`python -m tests.crash.driver --points 64 --out FILE` breaks every command of `COMMANDS` in turn until there are that
many kills; `tests/crash/test_crash.py` does a few of them. Equal seeds break at equal moments, as far as a machine
allows: moments are counted in file operations or in CPU-seconds, not by the clock.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.conftest import HERE, Done, Launcher, differing, rows_of_sums, write_jsonl

Files = dict[str, bytes]

# What may differ between a run that was broken and one that was not, and why. All else is equal, bit for bit.
CLOCK = {
    "wall_s", "cpu_s", "seconds", "latency_s", "created", "created_at", "timings",  # when, and how long it took
    "peak_rss_bytes", "html_bytes", "markdown_bytes",  # of the process that came last; reports print the times above
}  # fmt: skip
PER_PROCESS = {
    "asked_now", "tokens_now", "prompt_tokens_now", "cost_now", "retries",  # of the last call alone, by their meaning
    "id", "request_id",  # drawn anew for every request to the server, as OpenAI's are
}  # fmt: skip
# Whole files: where and when a run took place, or pages that show it; compared by name alone.
NOT_COMPARED = ("log.jsonl", "env.json", "timings.jsonl", ".lock", "report.html", "report.md", "card.html")
# Answers come in the order in which they end, and this is another one when some were there already.
UNORDERED = ("out.jsonl", "samples.jsonl")

MODULES = ("tafkir.train.preference_stages", "tafkir.train.trm_stage", "tafkir.quant.stage", "tafkir.quant.calibrate",
           "tafkir.serve.app", "tafkir.serve.offline", "tafkir.cli.eval_tasks", "tafkir.cli.quantize",
           "tafkir.eval.checkpoint_answers", "tafkir.tasks.catalog")  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command as it is started at a tiny size, in a folder of its own; `{name}` is what another one has left."""

    args: str
    leaves: str = "{place}"
    """What later commands call by this one's name."""


def _stages(*wanted: str, **settings: object) -> str:
    """A run of some stages of the smallest recipe, on the sums."""
    stages = ("tokenizer", "pretrain", "sft", "reward", "rlvr", "rlhf", "eval", "report")
    absent = [f"{stage}=" for stage in stages if stage not in wanted and stage not in ("reward", "rlhf")]
    given = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return " ".join(["run smoke {tiny} --set data.sources=['{sums}']", *(f"--set {key}" for key in (*absent, *given))])


_CHECKPOINT = "{{place}}/runs/tiny/stages/*-{}/checkpoint"
COMMANDS = {
    "pretrain": Command(
        _stages("tokenizer", "pretrain", pretrain__steps=6, pretrain__save_every=2), _CHECKPOINT.format("pretrain")
    ),
    "sft": Command(_stages("sft", base="{pretrain}", sft__steps=9, sft__save_every=2), _CHECKPOINT.format("sft")),
    "rlvr": Command(
        _stages("rlvr", "eval", "report", base="{sft}", eval__stages="['rlvr']", eval__max_problems=4, rlvr__steps=3)
    ),
    "rlhf": Command(
        _stages(
            "reward", "rlhf", base="{sft}", preferences__max_length=400, preferences__made_up=24, reward__steps=2,
            reward__batch_pairs=4,
            reward__save_every=1, reward__log_every=1, rlhf__steps=2, rlhf__prompts_per_step=4, rlhf__group_size=3,
            rlhf__max_completion_tokens=12, rlhf__save_every=1, rlhf__log_every=1, rlhf__learning_rate=3e-3,
            rlhf__guard__tolerance=100, rlhf__guard__kl_budget=1000, rlhf__verifiable_share=0.5,
        )
    ),
    "trm": Command(
        "run trm-sudoku4 --name tiny --set trm.steps=6 --set trm.batch_size=8 --set trm.save_every=2 --set threads=1 "
        "--set trm.log_every=1 --set trm.validate_every=3 --set trm.model.hidden_size=32 "
        "--set trm.puzzles.num_train=40 --set trm.puzzles.num_validation=8 --set trm.puzzles.num_test=8"
    ),
    "quantize": Command("quantize {sft} out --shard-size 0.00003 --workers 1 --preset all-linear"),
    "calibrate": Command(
        "quantize {sft} out --shard-size 0.00003 --workers 1 --preset all-linear --calibrate {text} "
        "--calibration-tokens 512 --gptq --cold-experts data_free --calibration-record record"
    ),
    "generate": Command(
        "generate {sft} --input {batch} --output out.jsonl --max-batch 2 --threads 1 --model-name tiny"
    ),
    "eval": Command("eval {sft} --tasks {items}:number --samples 2 --temperature 0.8 --max-tokens 16 --out results"),
}  # fmt: skip


# ---- what a command leaves ---------------------------------------------------------------------------------------


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in CLOCK | PER_PROCESS}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def read_result(path: Path) -> bytes:
    """A file as it is compared."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        rows = [json.dumps(_without_times(json.loads(line)), sort_keys=True) for line in content.splitlines()]
        return "\n".join(sorted(rows) if name in UNORDERED else rows).encode()
    if name in ("result.json", "summary.json", "record.json"):
        return json.dumps(_without_times(json.loads(content))).encode()
    if path.suffix == ".safetensors" and name.startswith("step-"):
        end = 8 + int.from_bytes(content[:8], "little")
        header = {key: value for key, value in json.loads(content[8:end]).items() if key != "__metadata__"}
        return json.dumps(header).encode() + content[end:]  # the metadata counts seconds
    return content


def left_in(place: Path) -> Files:
    """All that a command has left in its folder, hidden files too; of what is not compared, the names."""
    return {
        path.relative_to(place).as_posix(): b"" if path.name in NOT_COMPARED or path.is_dir() else read_result(path)
        for path in sorted(place.rglob("*"))
    }


# ---- breaking it -------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """An unbroken run: what it left, what it cost, and its file operations in order."""

    files: Files
    cpu_s: float
    events: list[str]
    leaves: Path
    wall_s: float


@dataclass
class Count:
    """What was done to one command."""

    kills: int = 0
    at_files: int = 0
    interrupts: int = 0
    full_disks: int = 0
    read_only: int = 0
    clocks: int = 0
    runs: int = 0
    compared: int = 0
    files: int = 0
    cpu_s: float = 0.0
    faults: list[str] = field(default_factory=list)


class Driver:
    """Runs commands in folders below `place`, and breaks them there."""

    def __init__(self, place: Path, seed: int = 0) -> None:
        self.place, self.seed = place, seed
        self.launcher = Launcher(place, *MODULES)
        self.references: dict[str, Reference] = {}
        self.counts = {name: Count() for name in COMMANDS}
        problem = {"messages": [{"role": "user", "content": "What is 4 plus 1?"}], "max_tokens": 12, "seed": 1}
        requests = [{"custom_id": f"r{i}", "url": "/v1/chat/completions", "body": {**problem, "seed": i}}
                    for i in range(12)]  # fmt: skip
        items = [{"id": str(i), "question": f"What is {i} plus 1?", "answer": i + 1} for i in range(8)]
        (place / "text.txt").write_text("Ann has 1 pen and gets 4. How many pens? 1 + 4 = 5.\n" * 80)
        self.given = {
            "tiny": HERE / "tiny.toml",
            "sums": write_jsonl(place / "sums.jsonl", rows_of_sums()),
            "text": place / "text.txt",
            "batch": write_jsonl(place / "batch.jsonl", requests),
            "items": write_jsonl(place / "items.jsonl", items),
        }

    def close(self) -> None:
        self.launcher.close()

    def run(self, name: str, place: Path, **job: Any) -> Done:
        """The command in a folder; `job` says how it is to be broken."""
        args = COMMANDS[name].args
        for other in ("pretrain", "sft"):
            if "{" + other + "}" in args:
                self.given[other] = self.reference(other).leaves
        words = args.format(**self.given).split()
        done = self.launcher(*words, cwd=place, **job)
        self.counts[name].runs += 1
        self.counts[name].cpu_s += done.cpu_s
        return done

    def reference(self, name: str) -> Reference:
        """The command once through, undisturbed."""
        if name not in self.references:
            place, events, began = self.place / "unbroken" / name, self.place / f"{name}.events", time.monotonic()
            place.mkdir(parents=True)
            done = self.run(name, place, events=str(events))
            assert done.code == 0, f"{name}: {done.err}"
            (leaves, *_) = self.place.glob(COMMANDS[name].leaves.format(place=f"unbroken/{name}"))
            lines = events.read_text().splitlines()
            wall_s = time.monotonic() - began
            self.references[name] = Reference(left_in(place), done.cpu_s, lines, leaves, wall_s)
        return self.references[name]

    def moment(self, generator: random.Random, name: str) -> dict[str, Any]:
        """When to break a run: at a file operation, just after one, or anywhere."""
        reference = self.reference(name)
        if generator.random() < 0.4:
            return {"cpu_s": reference.cpu_s * generator.uniform(0.02, 0.95)}
        after_s = generator.choice((0.0, 0.0, 0.001, 0.004))
        count = generator.randint(1, len(reference.events))
        return {"event": ".*", "path": f"^[^/]|{self.place}", "count": count, "after_s": after_s}

    def compare(self, name: str, place: Path, how: str) -> None:
        """Finish the command and note what is not as the unbroken run left it."""
        count, wanted = self.counts[name], self.reference(name).files
        done = self.run(name, place)
        if done.code != 0 and "is there already" not in done.err:  # quantize, killed when it was done
            count.faults.append(f"{name}, {how}: does not go on ({done.code}): {done.err[-2000:]}")
            return
        made = left_in(place)
        count.compared += 1
        count.files += len(made)
        if names := differing(made, wanted):
            count.faults.append(f"{name}, {how}: {', '.join(names)}")
        else:
            shutil.rmtree(place)

    def _folder(self, name: str, kind: str) -> Path:
        place = self.place / f"{name}-{kind}-{self.counts[name].runs}"
        place.mkdir()
        return place

    def one_line(self, name: str, done: Done, codes: tuple[int, ...], how: str) -> None:
        """Note it where a command did not end with one of these codes and one line."""
        if done.code == 0 and "may end" in how:
            return
        if done.code in (128 - code for code in codes):
            return  # the signal came when Python was ending
        last = done.err.splitlines()[-1:] or [""]
        told = last[0].startswith("error: ") and "Traceback" not in done.err and "Exception ignored" not in done.err
        if done.code not in codes or not told:
            self.counts[name].faults.append(f"{name}, {how}: ended with {done.code}: {done.err[-3000:]}")

    # One way to break a command each; all end with `compare`.

    def kill(self, name: str, number: int) -> None:
        """SIGKILL once, twice or three times, each run going on with what the one before left."""
        generator = random.Random(f"{self.seed} {name} kill {number}")
        place, how = self._folder(name, "kill"), []
        for _ in range(generator.choice((1, 1, 2, 3))):
            moment = self.moment(generator, name)
            if self.run(name, place, kill=moment).code != -signal.SIGKILL:
                break  # it went on behind that moment, and is finished
            self.counts[name].kills += 1
            self.counts[name].at_files += "event" in moment
            how.append(json.dumps(moment))
        self.compare(name, place, f"killed at {' and '.join(how)}")

    def interrupt(self, name: str, number: int) -> None:
        """SIGTERM or Ctrl-C: one line, 143 or 130."""
        generator = random.Random(f"{self.seed} {name} interrupt {number}")
        place, sent = self._folder(name, "interrupt"), (signal.SIGTERM, signal.SIGINT)[number % 2]
        moment = self.moment(generator, name)
        how = f"{sent.name} at {json.dumps(moment)} (it may end before)"
        done = self.run(name, place, kill={**moment, "signal": sent})
        self.one_line(name, done, (128 + sent,), how)
        self.counts[name].interrupts += done.code > 0
        self.compare(name, place, how)

    def clock(self, name: str, number: int) -> None:
        """The clock jumps to and fro; then a kill, and files that are from the future and from long ago."""
        generator = random.Random(f"{self.seed} {name} clock {number}")
        place, moment = self._folder(name, "clock"), self.moment(generator, name)
        self.run(name, place, kill=moment, clock=generator.randrange(1 << 30))
        for path in place.rglob("*"):
            when = generator.uniform(0, 4e9)
            os.utime(path, (when, when))
        self.counts[name].clocks += 1
        how = f"clock {number}, killed at {json.dumps(moment)}"
        done = self.run(name, place, clock=generator.randrange(1 << 30))
        if done.code and "is there already" not in done.err:
            self.counts[name].faults.append(f"{name}, {how}: ended with {done.code}: {done.err[-3000:]}")
        self.compare(name, place, how)

    def full_disk(self, name: str, number: int) -> None:
        """The disk is full at some size below what the command needs; then there is room."""
        generator = random.Random(f"{self.seed} {name} full disk {number}")
        disk_bytes = sum(-(-len(content) // 4096) * 4096 for content in self.reference(name).files.values())
        with mounted(self._folder(name, "disk")) as (place, remount):
            size = 4096 * max(1, int(disk_bytes * generator.uniform(0.05, 0.9)) // 4096)
            remount(f"size={size}")
            done = self.run(name, place)
            # A disk this small may still hold it all: half of its files may be such that are compared by name.
            self.one_line(name, done, (1,), f"a disk of {size} bytes (it may end)")
            self.counts[name].full_disks += done.code == 1
            remount("size=256m")
            self.compare(name, place, f"a disk of {size} bytes")

    def read_only_disk(self, name: str, number: int) -> None:
        """A kill, and a disk that comes back read-only; then it may be written again."""
        generator = random.Random(f"{self.seed} {name} read-only disk {number}")
        moment = self.moment(generator, name)
        with mounted(self._folder(name, "read-only")) as (place, remount):
            self.run(name, place, kill=moment)
            remount("ro")
            how = f"a read-only disk after a kill at {json.dumps(moment)}"
            self.one_line(name, self.run(name, place), (1,), f"{how} (a command may end before it writes)")
            self.counts[name].read_only += 1
            remount("rw")
            self.compare(name, place, how)


@contextmanager
def mounted(disk: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A folder on a small file system at `disk`, and what mounts it anew with other options.

    Raises:
        PermissionError: this user may not mount.
    """

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            raise PermissionError(done.stderr.decode())

    mount("size=256m")
    try:
        (disk / "folder").mkdir()
        yield disk / "folder", lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def may_mount(place: Path) -> bool:
    """Whether this process can give a folder a file system of its own."""
    try:
        with mounted(place):
            return True
    except (PermissionError, FileNotFoundError):
        return False


# ---- all of it ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=64, help="kills -9, over all commands")
    parser.add_argument("--others", type=int, default=2, help="times that each command meets each other trouble")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(COMMANDS), help="commands, with commas")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    given = parser.parse_args()
    names, began = given.only.split(","), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tafkir-crash-") as folder:
        driver = Driver(Path(folder), given.seed)
        probe = Path(folder) / "probe"
        probe.mkdir()
        troubles = [driver.interrupt, driver.clock, *([driver.full_disk, driver.read_only_disk] * may_mount(probe))]
        for name in names:
            _break(driver, name, -(-given.points // len(names)), [(trouble, given.others) for trouble in troubles])
        driver.close()
    faults = [fault for name in names for fault in driver.counts[name].faults]
    rows = {name: {**vars(driver.counts[name]), "cpu_s": round(driver.counts[name].cpu_s, 1)} for name in names}
    total = sum(driver.counts[name].kills for name in names)
    print(f"{total} kills, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    if given.out:
        said = {"seed": given.seed, "kills": total, "wall_s": round(time.monotonic() - began), "commands": rows}
        given.out.write_text(json.dumps(said, indent=2) + "\n")
    sys.exit(bool(faults))


def _break(driver: Driver, name: str, points: int, troubles: list[tuple[Callable[[str, int], None], int]]) -> None:
    count, number = driver.counts[name], 0
    while count.kills < points and number < 4 * points:
        driver.kill(name, number)
        number += 1
    for trouble, times in troubles:
        for number in range(times):
            trouble(name, number)
    for fault in count.faults:
        print(fault)
    print(f"{name:<10} {count.kills} kills ({count.at_files} at files), {count.interrupts} interrupts, "
          f"{count.clocks} clocks, {count.full_disks} full and {count.read_only} read-only disks; {count.compared} "
          f"compared, {len(count.faults)} faults, {count.cpu_s:.1f} CPU-seconds", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
