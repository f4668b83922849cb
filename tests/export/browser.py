"""A headless Chromium that is driven over a pipe by the DevTools protocol, with no network but this machine."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import gzip
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

__all__ = ["Browser"]

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip

# axe-core as `npm pack axe-core@4.14.1` leaves it (MPL-2.0, the licence stands in its first line), gzipped.
_AXE = Path(__file__).with_name("axe.min.js.gz")
_RULES = "wcag2a wcag2aa wcag21a wcag21aa wcag22aa best-practice"
# What axe finds, and a page too wide for its window. The read-outs of charts are hidden, and most of a report's nodes.
_FAULTS = """document.querySelectorAll(".hit").forEach(node => node.remove());
axe.run(document, {runOnly: %s.split(" "), resultTypes: ["violations"]}).then(found => [
  ...found.violations.flatMap(v => v.nodes.slice(0, 3).map(n =>
    `${v.id} (${v.impact}): ${v.help}: ${n.html.slice(0, 160)} ${(n.failureSummary || "").slice(0, 240)}`)),
  ...[document.documentElement].filter(r => r.scrollWidth > r.clientWidth + 1).map(r => `${r.scrollWidth} px wide`),
])"""

_START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"


class Browser:
    """One page. Use it as a context; `console` and `requests` grow while it is open.

    Attributes:
        console: messages and errors that the page left.
        requests: addresses that the page asked for.
    """

    def __init__(self, profile: Path, timeout_s: float = 120) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._profile, self._timeout_s = profile, timeout_s
        self._number, self._buffer, self._session = 0, b"", ""

    def __enter__(self) -> Self:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        read_there, self._write = os.pipe()
        self._read, write_there = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4; ours are moved out of their way first.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_there, write_there)]
        command = [sys.executable, "-c", _START, *map(str, theirs), str(found), *_FLAGS]
        command += [f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (read_there, write_there, *theirs):
            os.close(end)
        target = next(t for t in self._targets() if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._session = ""
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _targets(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            targets: list[dict[str, Any]] = self.call("Target.getTargets")["targetInfos"]
            if any(target["type"] == "page" for target in targets):
                return targets
            time.sleep(0.05)
        raise TimeoutError("the browser opens no page")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], self._timeout_s)
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError("the browser does not answer")
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif event.get("method") == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, address: str) -> None:
        """Go to an address; returns at once."""
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:2000])
        return done["result"].get("value")

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Size of the window, in CSS pixels."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def prefer(self, theme: str, *, still: bool = True) -> None:
        """What the reader's system asks of pages: "light" or "dark", and nothing that moves."""
        features = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce" if still else "no-preference"}
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()]
        )

    def faults(self) -> list[str]:
        """What axe-core finds against WCAG 2.2 AA and good practice on the page as it stands, and a page too wide."""
        if not self.run("typeof axe !== 'undefined'"):
            self.run(gzip.decompress(_AXE.read_bytes()).decode() + ";0")
        found: list[str] = self.run(_FAULTS % json.dumps(_RULES))
        return found

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key, such as 3, Enter, Tab or ArrowRight."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        # What a key does of itself, such as moving the focus, goes by its number.
        code = {"Tab": 9, "Enter": 13, "Escape": 27}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=8 * shift, **more
            )

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Pressed, moved or released at a place of the window."""
        button = {"button": "none"} if kind == "moved" else {"button": "left", "clickCount": 1}
        held = 0 if kind == "released" else 1
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind.capitalize()}", x=x, y=y, buttons=held, **button)

    def cpu_s(self) -> float:
        """CPU seconds of the processes that render pages, all their threads."""
        session, self._session = self._session, ""
        processes = self.call("SystemInfo.getProcessInfo")["processInfo"]
        self._session = session
        return sum(process["cpuTime"] for process in processes if process["type"] == "renderer")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A picture of the page, all of it or what fits into the window."""
        done = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(done["data"]))
