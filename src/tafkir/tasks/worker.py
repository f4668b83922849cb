"""Work in other processes, JSON lines in and out, within a time limit that holds in any thread."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import IO, Any, Literal

__all__ = ["WorkerFailure", "WorkerPool"]

START_LIMIT_S = 120.0


class WorkerFailure(Exception):
    """There is no reply: the worker could not be started, took too long, or ended its process."""

    def __init__(self, kind: Literal["start", "time", "died"], detail: str = "") -> None:
        self.kind, self.detail = kind, detail
        super().__init__(detail or kind)


def _pump(stream: IO[str], lines: SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


class Worker:
    """A warm process. Its first line says that it is ready, or holds an `error`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=env,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.lines: SimpleQueue[str | None] = SimpleQueue()
        self.pump = threading.Thread(target=_pump, args=(self.stdout, self.lines), daemon=True)
        self.pump.start()

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next reply, or None when the worker died. Raises queue.Empty after `timeout_s`."""
        line = self.lines.get(timeout=timeout_s)
        return None if line is None else dict(json.loads(line))

    def send(self, request: Mapping[str, Any]) -> bool:
        try:
            self.stdin.write(json.dumps(request, default=repr) + "\n")
            self.stdin.flush()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pump.join()
        self.stdout.close()
        try:
            self.stdin.close()
        except OSError:  # what was still to be written has nobody to read it
            return


class WorkerPool:
    """Warm worker processes, started when first needed.

    Safe to use from any thread; more threads than workers take turns, and waiting does not count as working.

    Args:
        command: what starts a worker.
        timeout_s: how long one request may take; its worker is killed then.
        max_workers: how many requests may be worked on at once.
        env: the workers' environment; this process's when None.
    """

    def __init__(
        self, command: Sequence[str], *, timeout_s: float, max_workers: int, env: Mapping[str, str] | None = None
    ) -> None:
        self.command, self.timeout_s, self.env = command, timeout_s, env
        self._slots = threading.BoundedSemaphore(max_workers)
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            WorkerFailure: there is none.
        """
        with self._slots:
            worker = self._take()
            try:
                reply = worker.receive(self.timeout_s) if worker.send(request) else None
            except Empty:
                worker.stop()
                raise WorkerFailure("time") from None
            if reply is None:
                worker.stop()
                raise WorkerFailure("died")
            with self._lock:
                self._idle.append(worker)
            return reply

    def start(self) -> None:
        """Start a worker and keep it warm. Raises WorkerFailure where it cannot be started."""
        with self._slots:
            worker = self._take()
            with self._lock:
                self._idle.append(worker)

    def _take(self) -> Worker:
        """An idle worker or a new one."""
        with self._lock:
            if self._owner != os.getpid():
                # after a fork the pipes belong to the parent
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.stop()
        worker = Worker(self.command, self.env)
        try:
            ready = worker.receive(START_LIMIT_S)
        except Empty:
            ready = None
        if ready is None or "error" in ready:
            worker.stop()
            raise WorkerFailure("start", str(ready["error"]) if ready else "")
        return worker

    def close(self) -> None:
        """End the idle workers; the next request starts a new one."""
        with self._lock:
            workers, self._idle = self._idle, []
        if self._owner == os.getpid():
            for worker in workers:
                worker.stop()
