"""The browser page in a real Chromium against a live server."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.responses import HTMLResponse

from tafkir.serve.app import build_app
from tests.serve.conftest import Server, start

QUESTION = "Is 1 < 2 & 3 > 2?"
ARABIC = "كم يساوي ٤٨ زائد ٢٤؟"
HOSTILE = '<img src=x onerror="document.title=1">**b** \\\\boxed{7}'
# The page counts as loaded, and Chromium prints it, when the image comes: at the end of the script.
DRIVER = f"""<script>
localStorage.setItem("tafkir.max-tokens", "8");
document.getElementById("max-tokens").value = 8;
(async () => {{
  await ask({QUESTION!r});
  await ask({ARABIC!r});
  const target = document.createElement("div");
  target.id = "hostile";
  render(target, '{HOSTILE}');
  document.body.append(target);
  document.getElementById("max-tokens").value = "";
  document.getElementById("temperature").value = "nonsense";
  await ask("{"word " * 300}");
  await fetch("/done", {{ method: "POST" }});
}})();
</script><img src="/hold" alt="">"""


@pytest.fixture
def driven(checkpoint: Path) -> Iterator[Server]:
    """The page as it is served, with a script at its end that uses it."""
    app = build_app(checkpoint, num_threads=1)

    @app.get("/driven", response_class=HTMLResponse)
    def page() -> str:
        served = next(route for route in app.routes if getattr(route, "path", "") == "/")
        html: str = served.endpoint().body.decode()  # type: ignore[attr-defined]
        return html.replace("</body>", DRIVER + "</body>")

    done = asyncio.Event()

    @app.post("/done")
    async def finish() -> None:
        done.set()

    @app.get("/hold")
    async def hold() -> None:
        await asyncio.wait_for(done.wait(), 90)

    server, uvicorn_server, thread = start(app)
    yield server
    uvicorn_server.should_exit = True
    thread.join(timeout=20)


@pytest.mark.browser
def test_a_conversation_in_the_browser(driven: Server, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--disable-dev-shm-usage", "--no-first-run", "--timeout=90000", "--dump-dom", f"{driven.url}/driven"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = done.stdout
    assert "tiny-random · " in dom, "the model's name and size"
    assert "Is 1 &lt; 2 &amp; 3 &gt; 2?" in dom
    turns = re.findall(r'<article class="turn (user|assistant)"(?: dir="(ltr|rtl)")?', dom)
    assert [direction for _, direction in turns] == ["", "ltr", "", "rtl", "", "ltr"]
    assert [role for role, _ in turns] == ["user", "assistant"] * 3
    assert dom.count('class="problem"') == 1, "the last question is too long, and only that one fails"
    assert "must leave room for an answer" in dom
    assert "8 tokens" in dom
    hostile = dom[dom.index('id="hostile"') :]
    assert "<img" not in hostile
    assert "&lt;img src=x" in hostile
    assert '<strong class="">b</strong>' in hostile or "<strong>b</strong>" in hostile
    assert '<span class="boxed">7</span>' in hostile


def test_the_page_may_talk_to_its_server_alone(server: Server) -> None:
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
