"""Starts `tafkir` commands without the seconds that imports take: a script that forks a process per command.

It imports everything once, on one thread. Then each line of its input is a job in JSON, and each line of its output
says how that job's process ended. A job: {"args", "cwd", "stdout", "stderr"} and, where wanted,

- "kill": {"event", "path", "count", "after_s"}: the process sends itself SIGKILL, or the "signal" given, at the
  `count`-th audit event of that name (a regular expression) on a path that matches, or `after_s` later;
- "stdin": a file with what it reads;
- "uid": the user to run as;
- "max_file_bytes": the largest file that it may write.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from typing import Any

Job = dict[str, Any]

WRITES = re.compile(r"open|os\.(rename|remove|mkdir|rmdir|truncate|chmod)")


def kill_at(event: str, path: str, count: int, after_s: float, signal: int = signal.SIGKILL) -> None:
    """Arm this process: the signal reaches it at the moment described."""
    left = count

    def die() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal)

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if left <= 0 or not WRITES.fullmatch(name) or not re.fullmatch(event, name):
            return
        if name == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not re.search(path, " -> ".join(str(arg) for arg in args[:2] if isinstance(arg, str | os.PathLike))):
            return
        left -= 1
        if left == 0 and after_s:
            threading.Thread(target=die, daemon=True).start()
        elif left == 0:
            die()

    sys.addaudithook(hook)


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
    if kill := job.get("kill"):
        kill_at(**kill)
    if uid := job.get("uid"):
        os.setuid(uid)


def wait_for_jobs() -> None:
    """Fork for every job; returns in the forked process, which then is the command."""
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            prepare(json.loads(line))
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # what the first optimiser imports

    import tafkir.cli.pipeline
    import tafkir.engine.engine
    import tafkir.eval.stage
    import tafkir.report.stage
    import tafkir.train.stages  # noqa: F401
    from tafkir.cli.main import main

    gc.freeze()
    wait_for_jobs()
    main()
