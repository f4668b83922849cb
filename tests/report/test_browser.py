"""The page in a real browser: nothing leaves it, nothing complains, and nothing sticks out at phone width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tafkir.report.collect import collect
from tafkir.report.quantized import render_verification
from tafkir.report.render import render_html
from tafkir.runlog.rundir import RunDir
from tests.report.test_quantized import verification

pytestmark = pytest.mark.browser

PROBE = """<!doctype html><link rel="icon" href="data:,"><body>
<iframe src="report.html" style="width:390px;height:900px"></iframe>
<iframe src="report.html" style="width:1280px;height:900px"></iframe>
<script>
window.onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const rtl = [...page.querySelectorAll("[dir=auto]")].filter(p => p.matches(":dir(rtl)"));
    return {
      width: root.clientWidth,
      scroll: root.scrollWidth,
      charts: page.querySelectorAll("svg.chart").length,
      scripts: page.scripts.length,
      rtl: rtl.length,
      text: page.body.innerText.length,
    };
  });
  document.body.textContent = "PROBE" + JSON.stringify(seen) + "END";
};
</script></body>"""


@dataclass
class _Visit:
    """What a visit to the probe page left behind."""

    seen: list[dict[str, Any]]
    console: list[str]
    requests: list[str]


class _Handler(SimpleHTTPRequestHandler):
    paths: list[str]

    def __init__(self, *args: Any, paths: list[str], **kwargs: Any) -> None:
        self.paths = paths
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.paths.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address that a folder is served at, and the paths that were asked for."""
    paths: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), paths=paths))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _visit(page: str, folder: Path) -> _Visit:
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "probe.html").write_text(PROBE, encoding="utf-8")
    with _serve(folder) as (address, paths):
        return _browse(address, paths, folder / "profile")


def _browse(address: str, paths: list[str], profile: Path) -> _Visit:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    log = profile / "net.json"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={profile}",
        # Nothing but this test's own server can be reached, so a stray request fails instead of going out.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        "--window-size=1400,1000",
        "--dump-dom",
    ]
    command = [browser, *flags, f"{address}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    probe = re.search(r"PROBE(\[.*?\])END", done.stdout, flags=re.S)
    assert probe, f"the page did not load: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    started = re.findall(r'"initiator":"([^"]+)".*?"url":"([^"]+)"', log.read_text(encoding="utf-8"))
    # The browser asks its own maker for things as well; those requests carry no page's origin.
    outside = [url for initiator, url in started if initiator == address and not url.startswith(f"{address}/")]
    return _Visit(json.loads(probe[1]), console, [*paths, *outside])


@pytest.fixture(scope="module")
def visit(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> _Visit:
    """One visit to the page of a finished run."""
    return _visit(render_html(collect(finished_run)), tmp_path_factory.mktemp("site"))


def test_no_request_leaves_the_page_and_nothing_complains(visit: _Visit) -> None:
    assert set(visit.requests) == {"/probe.html", "/report.html"}
    assert visit.console == []
    for frame in visit.seen:
        assert frame["charts"] >= 20 and frame["scripts"] == 0 and frame["text"] > 5000
        assert frame["rtl"] >= 1


def test_nothing_sticks_out_at_phone_or_desktop_width(visit: _Visit) -> None:
    assert [frame["width"] < 400 for frame in visit.seen] == [True, False]
    for frame in visit.seen:
        assert frame["scroll"] <= frame["width"]


def test_the_checks_would_notice(finished_run: RunDir, tmp_path: Path) -> None:
    unguarded = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render_html(collect(finished_run)))
    bad = '<img src="http://tracker.example/x.png"><div style="width:3000px">wide</div></body>'
    visit = _visit(unguarded.replace("</body>", bad), tmp_path)
    assert "http://tracker.example/x.png" in visit.requests
    assert visit.seen[0]["scroll"] > visit.seen[0]["width"]


def test_the_policy_stops_what_an_escape_might_miss(finished_run: RunDir, tmp_path: Path) -> None:
    bad = '<script>document.title="owned"</script><img src="http://tracker.example/x.png"></body>'
    visit = _visit(render_html(collect(finished_run)).replace("</body>", bad), tmp_path)
    assert set(visit.requests) == {"/probe.html", "/report.html"}
    assert any("Content Security Policy" in line for line in visit.console)


def test_the_page_of_a_verification(hostile: str, arabic: str, tmp_path: Path) -> None:
    visit = _visit(render_verification(verification(hostile, arabic)), tmp_path)
    assert set(visit.requests) == {"/probe.html", "/report.html"} and visit.console == []
    for frame in visit.seen:
        assert frame["charts"] == 2 and frame["scripts"] == 0 and frame["rtl"] >= 1
        assert frame["scroll"] <= frame["width"]
