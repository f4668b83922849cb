"""Two real replicas behind the real nginx and HAProxy, under load: one is killed and comes back, the other one ends."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import signal
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tafkir.errors import RecipeError
from tafkir.plan.launch.proxy import PROXIES, render_proxy
from tafkir.serve.admin import ADMIN_PATHS
from tafkir.serve.run import serve
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from high_availability import Load, Proxy, ask, free_ports, is_ready, proxy_before, wait_until

TOKENS = 24
Start = Callable[[int], ForkServerProcess]


@pytest.fixture(scope="module")
def start(checkpoint: Path) -> Iterator[Start]:
    """Starts a replica on a port: a process of its own, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tafkir.serve.run", "tafkir.serve.app", "tafkir.serve.loading"])
    started = []

    def start(port: int) -> ForkServerProcess:
        process = context.Process(target=serve, args=(checkpoint, "127.0.0.1", port), kwargs={"num_threads": 1})
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_kill_loses_nothing_that_a_retry_could_save(start: Start, tmp_path: Path) -> None:
    kinds = [kind for kind in PROXIES if shutil.which(kind)]
    if not kinds:
        pytest.skip("neither nginx nor haproxy is installed")
    ports = free_ports(2)
    replicas = [start(port) for port in ports]
    for port in ports:
        wait_until(partial(is_ready, port), "the start")
    prompts = [f"Ali has {n} apples and buys {n + 3} more. How many" for n in range(2, 10)]
    expected = {prompt: ask(ports[0], prompt, TOKENS, False)[1] for prompt in prompts}
    with ExitStack() as stack:
        proxies = {kind: stack.enter_context(proxy_before(kind, ports, tmp_path / kind)) for kind in kinds}
        loads = {kind: stack.enter_context(Load(proxy.port, 4, TOKENS, expected)) for kind, proxy in proxies.items()}

        def all_ask(more: int) -> None:
            goals = {kind: len(load.answers) + more for kind, load in loads.items()}
            wait_until(lambda: all(len(loads[kind].answers) >= goal for kind, goal in goals.items()), "the load")

        all_ask(8)
        replicas[0].kill()
        replicas[0].join()
        all_ask(10)
        for kind, load in loads.items():
            assert {a.outcome for a in load.answers} <= {"ok", "cut"}, kind
            assert all(a.streamed for a in load.answers if a.outcome == "cut"), "only what had begun"
            assert proxies[kind].retried >= 1, kind
        cut = {kind: Counter(a.outcome for a in load.answers)["cut"] for kind, load in loads.items()}
        replicas[0] = start(ports[0])
        wait_until(lambda: is_ready(ports[0]), "the return")
        if "haproxy" in proxies:
            wait_until(lambda: _up(proxies["haproxy"]) == 2, "HAProxy's notice")
        all_ask(8)
        replicas[1].terminate()
        all_ask(10)
        replicas[1].join()
        assert replicas[1].exitcode in (0, -signal.SIGTERM)
    for kind, load in loads.items():
        seen = Counter(a.outcome for a in load.answers)
        assert set(seen) <= {"ok", "cut"} and seen["cut"] == cut[kind], "an end that was asked for cuts nothing"


def _up(proxy: Proxy) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy.status_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(line.startswith("haproxy_server_status{") and 'state="UP"} 1' in line for line in lines)


@pytest.mark.parametrize("kind", PROXIES)
def test_what_is_a_replica_s_own_is_not_reached_through_a_proxy(kind: str) -> None:
    config = render_proxy(kind, ["a:1"])
    for path in ("/metrics", *ADMIN_PATHS):
        assert re.search(rf"location = {path} {{ return 404|return status 404 if {{ path .*{path}\b", config), path


@pytest.mark.parametrize(
    ("kind", "replicas", "listen", "words"),
    [
        ("caddy", ["a:1"], "b:1", "no configuration for 'caddy'"),
        ("nginx", [], "b:1", "no replica"),
        ("nginx", ["a:1", "a:1"], "b:1", "named twice"),
        ("haproxy", ["a:1;"], "b:1", "no address"),
        ("haproxy", ["a:1"], "b:70000", "no address"),
    ],
)
def test_wrong_addresses(kind: str, replicas: list[str], listen: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        render_proxy(kind, replicas, listen=listen)
