"""`tafkir` without the seconds that imports take: a process that has them forks one for every call.

`python forked.py serve SOCKET` waits for calls; `python forked.py call SOCKET ARGS...` is one: it hands over its
arguments, folder, environment and streams, passes signals on, and ends as the command does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def call(place: str, args: list[str]) -> int:
    """Run a command over there, on this process's streams; returns its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as there:
        there.connect(place)
        job = json.dumps({"args": args, "cwd": os.getcwd(), "env": dict(os.environ)})
        socket.send_fds(there, [job.encode()], [0, 1, 2])
        pid = int(there.recv(64))
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        return int(there.recv(64))


def serve(place: str) -> None:
    """Fork for every call; returns in the forked process, which then is the command."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{place}.new")
        listener.listen()
        os.rename(f"{place}.new", place)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that watch over commands
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, streams, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    if pid := os.fork():
        caller.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        caller.send(str(os.waitstatus_to_exitcode(status) % 256).encode())
        os._exit(0)
    caller.close()
    job = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = ["tafkir", *job["args"]]


if __name__ == "__main__":
    if sys.argv[1] == "call":
        sys.exit(call(sys.argv[2], sys.argv[3:]))
    import torch._dynamo  # noqa: F401  # what the first optimiser imports

    import tafkir.cli.pipeline
    import tafkir.engine.engine
    import tafkir.eval.stage
    import tafkir.report.stage
    import tafkir.train.stages
    import tafkir.train.trm_stage  # noqa: F401
    from tafkir.cli.main import main

    serve(sys.argv[2])
    main()
