"""Starts `tafkir` commands without the seconds that imports take: a script that forks a process per command.

It imports everything once, on one thread. Then each line of its input is a job in JSON, and each line of its output
says how that job's process ended and what it cost: {"code", "cpu_s"}. A job: {"args", "cwd", "stdout", "stderr"} and,
where wanted,

- "kill": {"event", "path", "count", "after_s"}: the process sends itself SIGKILL, or the "signal" given, at the
  `count`-th audit event of that name (a regular expression) on a path that matches, or `after_s` later;
- "kill": {"cpu_s"}: it gets SIGKILL, or the "signal" given, when it has used that much of a processor;
- "events": a file that gets a line for every file operation on a path that holds `cwd`;
- "clock": a seed; the time of day and the monotonic clock jump, the one to and fro, the other ahead;
- "stdin": a file with what it reads;
- "uid": the user to run as;
- "max_file_bytes": the largest file that it may write.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]

WRITES = re.compile(r"open|os\.(rename|remove|mkdir|rmdir|truncate|chmod)")


def watch_writes(call: Callable[[str, str], None]) -> None:
    """Call `call(event, paths)` before every operation that changes the file system."""

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if not WRITES.fullmatch(name):
            return
        if name == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        call(name, " -> ".join(str(arg) for arg in args[:2] if isinstance(arg, str | os.PathLike)))

    sys.addaudithook(hook)


def kill_at(event: str, path: str, count: int, after_s: float, signal: int = signal.SIGKILL) -> None:
    """Arm this process: the signal reaches it at the moment described."""
    left = count

    def die() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal)

    def count_down(name: str, paths: str) -> None:
        nonlocal left
        if left <= 0 or not re.fullmatch(event, name) or not re.search(path, paths):
            return
        left -= 1
        if left == 0 and after_s:
            threading.Thread(target=die, daemon=True).start()
        elif left == 0:
            die()

    watch_writes(count_down)


def record_writes(path: str) -> None:
    """Write a line for every file operation in the folder that the process works in."""
    handle, here = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), os.getcwd()

    def note(name: str, paths: str) -> None:
        if here in paths or (not paths.startswith(("/", "<")) and paths):
            os.write(handle, f"{name} {paths}\n".encode())

    watch_writes(note)


def jumping_clock(seed: int) -> None:
    """Let the clocks jump at every fifth reading: the time of day by years, the monotonic one ahead by minutes."""
    generator, lock = random.Random(seed), threading.Lock()
    real_time, real_monotonic, ahead, off = time.time, time.monotonic, 0.0, 0.0

    def jump() -> None:
        nonlocal ahead, off
        with lock:
            if generator.random() < 0.2:
                off, ahead = generator.uniform(-3e8, 3e8), ahead + generator.uniform(0, 600)

    def time_of_day() -> float:
        jump()
        return real_time() + off

    def monotonic() -> float:
        jump()
        return real_monotonic() + ahead

    time.time, time.monotonic = time_of_day, monotonic
    time.time_ns = lambda: int(time_of_day() * 1e9)


def prepare(job: Job) -> None:
    """Make the forked process what the job asks for."""
    sys.argv = ["tafkir", *job["args"]]
    os.chdir(job["cwd"])
    for number, name in ((0, job.get("stdin", os.devnull)), (1, job["stdout"]), (2, job["stderr"])):
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    if limit := job.get("max_file_bytes"):
        # Python ignores SIGXFSZ: a write past the limit is an error like any other.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "event" in (kill := job.get("kill", {})):
        kill_at(**kill)
    if events := job.get("events"):
        record_writes(events)
    if (clock := job.get("clock")) is not None:
        jumping_clock(clock)
    if uid := job.get("uid"):
        os.setuid(uid)


def wait_for(pid: int, cpu_s: float | None, number: int) -> tuple[int, float]:
    """How the process ended, and the CPU-seconds that it took; it is sent a signal when it has taken `cpu_s`."""
    clock = (~pid << 3) | 2  # what clock_getcpuclockid(3) gives
    while cpu_s is not None:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        if time.clock_gettime(clock) >= cpu_s:
            os.kill(pid, number)
            break
        time.sleep(0.001)
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def wait_for_jobs() -> None:
    """Fork for every job; returns in the forked process, which then is the command."""
    while line := sys.stdin.readline():
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            prepare(job)
            return
        kill = job.get("kill", {})
        code, cpu_s = wait_for(pid, kill.get("cpu_s"), kill.get("signal", signal.SIGKILL))
        print(json.dumps({"code": code, "cpu_s": cpu_s}), flush=True)
    sys.exit()


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # what the first optimiser imports

    import tafkir.cli.pipeline
    import tafkir.engine.engine
    import tafkir.eval.stage
    import tafkir.report.stage
    import tafkir.train.stages  # noqa: F401
    from tafkir.cli.main import main

    for name in sys.argv[1:]:
        __import__(name)
    gc.freeze()
    wait_for_jobs()
    main()
