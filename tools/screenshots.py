"""Takes pictures of the project's pages in a headless Chromium: `python tools/screenshots.py OUT [NAME...]`.

Every line of `SHOTS` is one picture. The chat page is served with `base-tiny`; of a page that is a file, such as
`runs/base-tiny/report.html`, give the path in place of its maker. With `--axe axe.min.js` (npm package axe-core), what
WCAG 2.2 AA forbids is listed for each, and the exit code is 1 where there is any. With Pillow, they have 256 colours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.export.browser import Browser  # noqa: E402

MAX_BYTES = 200_000
LOADED = "new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))"
QUESTION = "Sara sold 48 clips in April, and half as many in May. How many clips did she sell altogether?"
ENGLISH = r"""The sum of the first $n$ odd numbers is a square:

$$\sum_{k=1}^{n} (2k-1) = n^2$$

| n | odd numbers | sum |
|--:|-------------|----:|
| 2 | 1 + 3 | 4 |
| 3 | 1 + 3 + 5 | 9 |

```python
def is_sum(n: int) -> bool:
    return sum(range(1, 2 * n, 2)) == n**2
```

So for `n = 7` the answer is \boxed{49}."""
ARABIC = r"""مجموع أول $n$ من الأعداد الفردية مربّع كامل:

$$\sum_{k=1}^{n} (2k-1) = n^2$$

1. نكتب الأعداد: $1, 3, 5, \dots$
2. نجمعها بالدالة `sum(range(1, 2*n, 2))`.

| العدد | الأعداد الفردية | المجموع |
|---|---|---|
| 2 | 1 + 3 | 4 |
| 3 | 1 + 3 + 5 | 9 |

```python
def is_sum(n: int) -> bool:
    return sum(range(1, 2 * n, 2)) == n**2
```

فالجواب عند $n = 7$ هو \boxed{49}."""
THOUGHT = {
    "en": "The odd numbers begin 1, 3, 5.\n1 + 3 = 4, and 4 + 5 = 9.\nSquares, then.",
    "ar": "تبدأ الأعداد الفردية بـ 1 و3 و5.\n1 + 3 = 4\n4 + 5 = 9\nإنها مربعات.",
}


def talk(language: str) -> str:
    """A conversation as the page keeps it, written by hand: what a large model might say."""
    question = {"en": "What is the sum of the first 7 odd numbers?", "ar": "ما مجموع أول سبعة أعداد فردية؟"}[language]
    answer = {
        "role": "assistant", "content": {"en": ENGLISH, "ar": ARABIC}[language], "reasoning": THOUGHT[language],
        "thoughtMs": 2140, "end": "stop",
        "usage": {"completion_tokens": 274, "completion_tokens_details": {"reasoning_tokens": 48}},
        "timings": {"ttft_ms": 96, "predicted_per_second": 118, "draft_n": 120, "draft_n_accepted": 86},
    }  # fmt: skip
    turns = [{"role": "user", "content": question}, answer]
    made = {"id": "shown", "title": question, "created": 1.7e12, "updated": 1.7e12, "turns": turns}
    return f"open({json.dumps(made)}); $('question').blur()"


def chat(theme: str, language: str, *scripts: str) -> Callable[[Browser, str], None]:
    """The chat page in a theme and a language, after some scripts."""

    def show(browser: Browser, address: str) -> None:
        browser.open(f"{address}/?lang={language}")
        browser.run(LOADED)
        browser.run(f"localStorage.clear(); change('theme', {theme!r}); document.fonts.ready.then(() => 0)")
        for script in scripts:
            browser.run(script)
        browser.run("document.fonts.ready.then(() => new Promise(ok => setTimeout(ok, 300)))")

    return show


@dataclass(frozen=True)
class Shot:
    """One picture: what it shows, and how large the window is."""

    name: str
    show: Callable[[Browser, str], None] | Path
    width: int = 1200
    height: int = 900
    phone: bool = False


ASK = f"ask({QUESTION!r}).then(() => document.querySelector('.thought').open = true)"
SHOTS = (
    Shot("chat-welcome", chat("light", "en"), height=700),
    Shot("chat-answer", chat("light", "en", ASK), height=700),
    Shot("chat-light", chat("light", "en", talk("en"))),
    Shot("chat-dark", chat("dark", "en", talk("en"))),
    Shot("chat-arabic", chat("light", "ar", talk("ar"))),
    Shot("chat-arabic-dark", chat("dark", "ar", talk("ar"))),
    Shot("chat-phone", chat("light", "en", talk("en")), 390, 844, True),
    Shot("chat-phone-arabic", chat("dark", "ar", talk("ar")), 390, 844, True),
    Shot("chat-phone-welcome", chat("dark", "ar"), 390, 844, True),
    Shot("chat-settings", chat("light", "en", talk("en"), "$('show-settings').click()")),
    Shot("chat-settings-arabic", chat("dark", "ar", talk("ar"), "$('show-settings').click()"), 390, 844, True),
    Shot("chat-problem", chat("light", "en", f"ask({'word ' * 600!r})"), height=700),
    Shot("chat-edit", chat("dark", "en", talk("en"), "document.querySelector('.user [aria-label=Edit]').click()")),
    Shot("chat-key", chat("light", "ar", "void askKey(words.keyAsk)"), 390, 844, True),
    Shot("chat-talks", chat("light", "en", ASK, "$('show-talks').click()"), height=700),
)


@contextlib.contextmanager
def chat_server() -> Iterator[str]:
    """The address of `base-tiny`, served on this machine."""
    from tafkir.serve.app import build_app
    from tafkir.serve.options import ServerOptions
    from tafkir.serve.run import HttpServer

    app = build_app("base-tiny", num_threads=1, speculate="ngram")
    server = HttpServer(app, ServerOptions(), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def shrink(path: Path) -> None:
    """256 colours, which pages like these do not miss."""
    with contextlib.suppress(ImportError):
        from PIL import Image

        image = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        image.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        print(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}", file=sys.stderr)


def check(browser: Browser, axe: Path) -> list[str]:
    """What axe finds against WCAG 2.2 AA on the page as it stands."""
    browser.run(axe.read_text(encoding="utf-8") + ";0")
    rules = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}"
    found = browser.run(f"axe.run(document, {rules}).then(r => r.violations)")
    return [
        f"{v['id']} ({v['impact']}): {v['help']}: {node['html'][:160]} {node.get('failureSummary', '')[:200]}"
        for v in found
        for node in v["nodes"][:3]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="of the pictures; all by default")
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [shot for shot in SHOTS if not args.names or shot.name in args.names]
    failed = False
    with chat_server() as address, tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for shot in wanted:
            browser.resize(shot.width, shot.height, phone=shot.phone)
            if isinstance(shot.show, Path):
                browser.open(shot.show.resolve().as_uri())
                browser.run(LOADED)
            else:
                shot.show(browser, address)
            path = args.out / f"{shot.name}.png"
            browser.screenshot(path, whole=False)
            shrink(path)
            found = check(browser, args.axe) if args.axe else []
            print(shot.name, path.stat().st_size, *found, sep="\n  " if found else " ")
            failed = failed or bool(found)
        for line in browser.console:
            print("console:", line)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
