"""A `tafkir serve` of its own, and clients lean enough to share its cores: what benchmarks over HTTP have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

__all__ = ["Answer", "ServerProcess", "post", "serving"]


@dataclass
class ServerProcess:
    """A running server: its address, and what it costs."""

    port: int
    process: subprocess.Popen[str]
    ready_s: float
    _probe: psutil.Process = field(init=False)

    def __post_init__(self) -> None:
        self._probe = psutil.Process(self.process.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def rss_mib(self) -> float:
        return self._probe.memory_info().rss / (1 << 20)

    @property
    def peak_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    @property
    def cpu_s(self) -> float:
        times = self._probe.cpu_times()
        return times.user + times.system

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(rf"{name}[{{ ]", line))


@contextlib.contextmanager
def serving(checkpoint: str, *options: str, threads: int | None = None) -> Iterator[ServerProcess]:
    """`tafkir serve` on a free port until the block ends."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "tafkir.cli.main", "serve", checkpoint, "--port", "0", *options]
    began = time.monotonic()
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if "chat at" in line), "")
        found = re.search(r"chat at http://[^:]+:(\d+)", line)
        if found is None:
            raise SystemExit(f"tafkir serve {checkpoint} did not start: {line}{process.stderr.read()}")
        # What is logged later is shown, and the pipe never fills.
        threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
        server = ServerProcess(int(found[1]), process, 0.0)
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{server.url}/ready").status_code == 200:
                    break
            time.sleep(0.01)
        server.ready_s = time.monotonic() - began
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@dataclass
class Answer:
    """What a request met. Times are seconds since it was sent; `arrivals` are of the chunks that came."""

    status: int = 0
    retry_after: str | None = None
    arrivals: list[float] = field(default_factory=list)
    last_s: float = 0.0
    done: bool = False
    left: bool = False
    text: str = ""

    @property
    def first_s(self) -> float:
        return self.arrivals[0] if self.arrivals else float("nan")


async def post(port: int, path: str, body: dict[str, Any], leave_after_s: float | None = None) -> Answer:
    """Send a request on a connection of its own and read the answer as bytes; `leave_after_s` closes it early."""
    answer, payload = Answer(), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    began = time.perf_counter()
    try:
        async with asyncio.timeout(leave_after_s):
            writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
            await writer.drain()
            await _read(reader, answer, began)
    except TimeoutError:
        answer.left = True
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        answer.text = repr(error)
    finally:
        answer.last_s = time.perf_counter() - began
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer, began: float) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    answer.status = int(head.split(" ", 2)[1])
    found = re.search(r"(?i)retry-after: *(\S+)", head)
    answer.retry_after = found[1] if found else None
    tail = b""
    while data := await reader.read(1 << 16):
        answer.arrivals.append(time.perf_counter() - began)
        tail = (tail + data)[-4000:]
    answer.done = answer.status == 200 and (b"[DONE]" in tail or b"event-stream" not in head.encode())
    answer.text = tail.decode("utf-8", "replace")
