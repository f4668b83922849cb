"""What users notice when one of two replicas behind a proxy is killed and started again, and when one is told to end.

    PYTHONPATH=src python benchmarks/high_availability.py --out benchmarks/results/high_availability.json

Real replicas (`tafkir serve`), real nginx and HAProxy under the files of `tafkir plan proxy`. Clients ask in a closed
loop, every second one for a stream; each answer is compared with that of a quiet server. A replica gets kill -9, comes
back after `--dead` seconds, and a second after it is ready the other one gets SIGTERM and comes back, too.

`lost`: no byte of an answer came, which a retry could have saved. `cut`: a stream that had begun was broken off, which
no retry can mend. `refused`: 503 or 429. `retried` is what the proxy's log says it sent again. Times are the whole
answer's, by the phase in which it was asked for: before, kill (until the replica is ready again), drain (the same for
SIGTERM), after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tafkir.plan.launch.proxy import PROXIES, render_proxy

__all__ = ["Answer", "Load", "Proxy", "free_ports", "is_ready", "proxy_before", "wait_until"]

_PROMPTS = [f"Ali has {n} apples and buys {n + 3} more. How many" for n in range(2, 10)]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def is_ready(port: int) -> bool:
    """Whether a server answers 200 to /ready."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until(condition: Any, what: str, limit_s: float = 60.0) -> None:
    """Ask again every 20 ms."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took longer than {limit_s:g} s")
        time.sleep(0.02)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy: where it listens, and the file that says what it sent again."""

    port: int
    status_port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def retried(self) -> int:
        """Requests that went to more than one replica, by its log."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return sum(bool(re.search(r" up=[^=]+[,:] | rc=\+?[1-9]", line)) for line in lines)


@contextmanager
def proxy_before(kind: str, replicas: Sequence[int], folder: Path) -> Iterator[Proxy]:
    """The proxy `kind` before servers on these ports of this machine; its files lie in `folder`."""
    folder.mkdir(parents=True)
    port, status_port = free_ports(2)
    addresses = [f"127.0.0.1:{each}" for each in replicas]
    config = folder / "proxy.conf"
    config.write_text(render_proxy(kind, addresses, listen=f"127.0.0.1:{port}", status_port=status_port))
    nginx = kind == "nginx"
    command = ["nginx", "-p", str(folder), "-c", str(config)] if nginx else ["haproxy", "-f", str(config)]
    checked = subprocess.run([*command, "-t" if nginx else "-c"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    log = folder / ("access.log" if nginx else "log")
    with (folder / "log").open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            wait_until(lambda: is_ready(port), f"{kind}'s start")
            yield Proxy(port, status_port, log, process)
        finally:
            process.terminate()


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request: ok, other (another text), refused, failed, lost or cut; times are time.monotonic()."""

    outcome: str
    streamed: bool
    began: float
    ended: float


class Load:
    """Clients that ask a server in a closed loop until they are told to stop.

    Args:
        port: of the server or proxy on this machine.
        clients: how many ask at the same time, every second one for streams.
        tokens: of an answer.
        expected: the answer to each prompt; None takes what comes.
    """

    def __init__(self, port: int, clients: int, tokens: int, expected: dict[str, str] | None) -> None:
        self._port, self._tokens, self._expected = port, tokens, expected
        self.answers: list[Answer] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            prompt, streamed, began = _PROMPTS[turn % len(_PROMPTS)], turn % 2 == 1, time.monotonic()
            outcome, text = ask(self._port, prompt, self._tokens, streamed)
            if outcome == "ok" and self._expected is not None and text != self._expected[prompt]:
                outcome = "other"
            self.answers.append(Answer(outcome, streamed, began, time.monotonic()))
            turn += 1


def ask(port: int, prompt: str, tokens: int, streamed: bool) -> tuple[str, str]:
    """(outcome, text) of one request over a connection of its own."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": streamed}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    status = None
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        status = response.status
        raw = response.read().decode()
    except (OSError, http.client.HTTPException):
        return ("lost" if status is None else "cut"), ""
    finally:
        connection.close()
    if status != 200:
        assert status not in (429, 503) or int(response.headers["retry-after"]) >= 1
        return ("refused" if status in (429, 503) else "failed"), raw
    if not streamed:
        return "ok", json.loads(raw)["choices"][0]["text"]
    events = [line[6:] for line in raw.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut", ""
    return "ok", "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def _start(checkpoint: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tafkir.cli.main", "serve", checkpoint, "--port", str(port), "--threads", "1"]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def _once(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One round: load, kill -9, return, SIGTERM, return."""
    ports = free_ports(2)
    replicas = [_start(args.checkpoint, port, folder / f"{kind}-{port}.log") for port in ports]
    try:
        for port in ports:
            wait_until(partial(is_ready, port), "a replica's start")
        expected = {prompt: ask(ports[0], prompt, args.tokens, False)[1] for prompt in _PROMPTS}
        with proxy_before(kind, ports, folder / kind) as proxy:
            marks = [time.monotonic()]
            with Load(proxy.port, args.clients, args.tokens, expected) as load:
                time.sleep(args.seconds)
                for index, sent in enumerate((signal.SIGKILL, signal.SIGTERM)):
                    marks.append(time.monotonic())
                    replicas[index].send_signal(sent)
                    replicas[index].wait()
                    time.sleep(args.dead)
                    replicas[index] = _start(args.checkpoint, ports[index], folder / f"{kind}-{ports[index]}.log")
                    wait_until(partial(is_ready, ports[index]), "a replica's return")
                    time.sleep(1)  # as in a rolling restart: for the proxy to see it
                marks.append(time.monotonic())
                time.sleep(args.seconds)
            return {"phases": _phases(load.answers, marks), "retried": proxy.retried}
    finally:
        for replica in replicas:
            replica.kill()
            replica.wait()


def _phases(answers: Sequence[Answer], marks: Sequence[float]) -> dict[str, Any]:
    phases = {}
    for name, begin, end in zip(("before", "kill", "drain", "after"), marks, (*marks[1:], float("inf")), strict=True):
        # What is on its way when the signal comes is what the signal does.
        own = [a for a in answers if begin <= a.began < end and not (name == "before" and a.ended > end)]
        if name in ("kill", "drain"):
            own += [a for a in answers if a.began < begin <= a.ended and a not in own]
        times = sorted(a.ended - a.began for a in own if a.outcome in ("ok", "other"))
        cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else [float("nan")] * 99
        phases[name] = {
            "requests": len(own),
            "outcomes": dict(Counter(a.outcome for a in own)),
            "p50_s": round(cuts[49], 4),
            "p99_s": round(cuts[98], 4),
            "max_s": round(times[-1], 4) if times else None,
        }
    return phases


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="base-tiny")
    parser.add_argument("--proxies", nargs="+", choices=PROXIES, default=[p for p in PROXIES if shutil.which(p)])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load before the kill, and at the end")
    parser.add_argument("--dead", type=float, default=2.0, help="seconds that a replica stays away")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = _parse()
    if not args.proxies:
        sys.exit("neither nginx nor haproxy is installed")
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.proxies}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for kind in args.proxies:
                place = Path(folder) / str(repeat)
                place.mkdir(exist_ok=True)
                found = _once(kind, args, place)
                rounds[kind].append(found)
                print(f"{repeat + 1}/{args.repeats} {kind}: {json.dumps(found)}", file=sys.stderr, flush=True)
    table = {kind: _summary(found) for kind, found in rounds.items()}
    chosen = {name: value for name, value in vars(args).items() if name != "out"}
    result: dict[str, Any] = {
        "benchmark": "high_availability",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    result |= {"options": chosen, "summary": table, "rounds": rounds}
    for kind, phases in table.items():
        for name, row in phases.items():
            print(f"{kind:<8} {name:<8} {row}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of what happened, medians of times."""
    out: dict[str, Any] = {}
    for name in rounds[0]["phases"]:
        phases = [found["phases"][name] for found in rounds]
        total: Counter[str] = sum((Counter(phase["outcomes"]) for phase in phases), Counter())
        out[name] = {"requests": sum(phase["requests"] for phase in phases), **total}
        out[name] |= {key: statistics.median(phase[key] for phase in phases) for key in ("p50_s", "p99_s")}
    out["all"] = {"retried": sum(found["retried"] for found in rounds)}
    return out


if __name__ == "__main__":
    main()
