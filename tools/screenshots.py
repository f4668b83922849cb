"""Opens every page that Tafkir makes in a headless Chromium: `python tools/screenshots.py OUT --run RUN`.

Each view is opened by day and by night, on a desk and on a phone (390 pixels), checked with axe-core against WCAG 2.2
AA, and photographed; a table says what was found, and the exit code is 1 where it is anything. Nothing in it is drawn
by chance. `--docs` takes the pictures that the docs show, and writes them to docs/img.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tafkir.cli.main import app  # noqa: E402
from tests.export.browser import Browser  # noqa: E402

SIZES = {"desk": (1200, 900), "phone": (390, 844)}
LOADED = "new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))"
SETTLED = "document.fonts.ready.then(() => new Promise(ok => setTimeout(ok, 250)))"
SUDOKU = "." * 6 + "...45." + ".31.2." + "..61.." + "3.2.4." + ".152.."
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
    """A conversation as the chat page keeps it, written by hand: what a large model might say."""
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


# ---- the pages, made by the commands that make them ----------------------------------------------------------------


def tafkir(*words: object) -> str:
    """Run a command and return what it prints, in colour."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"FORCE_COLOR": "1", "COLUMNS": "96"}, color=True)
    if done.exit_code not in (0, 3):  # 3: less is kept than asked for, which is no fault of the page
        raise SystemExit(f"tafkir {' '.join(map(str, words))}: {done.exception!r}\n{done.output}")
    return done.output


@dataclass(frozen=True)
class Workshop:
    """A finished run of the whole chain, and the folder that pages are made in."""

    run: Path
    folder: Path

    def linked(self) -> Path:
        """The run under another place, so that writing its report leaves it as it is."""
        place = self.folder / self.run.name
        if not place.exists():
            place.mkdir()
            for child in self.run.resolve().iterdir():
                if not child.name.startswith("report"):
                    (place / child.name).symlink_to(child)
        return place

    def results(self) -> Path:
        """The run's stages as models in a results file, as `tafkir eval --tasks` writes it."""
        from tafkir.eval.sides import load_stages

        place = self.folder / "stages"
        if not place.exists():
            (place / "stages").mkdir(parents=True)
            sides, _ = load_stages(self.run)
            rows = [
                asdict(s) | {"key": f"{s.model} {s.task} {s.item} {s.repeat}-v1"}
                for side in sides
                for own in side.answers.values()
                for s in own
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (place / "samples.jsonl").write_text(text, encoding="utf-8")
        return place

    def checkpoint(self, stage: str) -> Path:
        """As a reader of the page would name it."""
        return next(self.linked().glob(f"stages/*-{stage}/checkpoint")).relative_to(self.folder)

    def terminal(self, name: str, *words: object) -> Path:
        """What a command prints, as a page."""
        theme = TerminalTheme(
            (29, 28, 27), (236, 233, 228), [(29, 28, 27), (255, 154, 143), (94, 207, 156), (230, 180, 92),
            (116, 169, 247), (236, 139, 176), (111, 214, 201), (236, 233, 228)], [(168, 162, 153)] * 8,
        )  # fmt: skip
        console = Console(record=True, width=96, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(Text.from_ansi(f"$ tafkir {' '.join(map(str, words))}\n" + tafkir(*words)))
        path = self.folder / f"{name}.html"
        path.write_text(console.export_html(theme=theme, inline_styles=True), encoding="utf-8")
        return path


def report(shop: Workshop) -> Path:
    tafkir("report", shop.linked())
    return shop.linked() / "report.html"


def report_arabic(shop: Workshop) -> Path:
    tafkir("report", shop.linked(), "--language", "ar")
    return shop.linked() / "report.ar.html"


def evaluation(shop: Workshop) -> Path:
    tafkir("report", shop.results())
    return shop.results() / "report.html"


def compare(shop: Workshop) -> Path:
    tafkir("compare", shop.results(), "--html", shop.folder / "compare.html")
    return shop.folder / "compare.html"


def card(shop: Workshop) -> Path:
    stages = ("sft", "rlvr", "rlhf")
    shapes = [word for name in stages for word in ("--shape", f"{name}={shop.checkpoint(name)}")]
    tafkir("card", shop.results(), *shapes, "--html", shop.folder / "card.html")
    return shop.folder / "card.html"


def verify(shop: Workshop) -> Path:
    before, after, page = shop.checkpoint("mtp"), shop.checkpoint("quantize"), shop.folder / "verify.html"
    few = ("--problems", 150, "--samples", 1, "--runs-dir", shop.folder)
    tafkir("verify", before, after, "--task", "svamp", *few, "--html", page)
    return page


def plan(shop: Workshop) -> Path:
    page = shop.folder / "plan.html"
    tafkir("plan", "ring-flash-2.0", "--hardware", "h20:4", "--precision", "fp8", "--simulate", 600, "--html", page)
    return page


def puzzle(shop: Workshop) -> Path:
    tafkir("trm", "page", shop.folder / "puzzle")
    return shop.folder / "puzzle" / "index.html"


def film(shop: Workshop) -> Path:
    tafkir("trm", "watch", SUDOKU, "--out", shop.folder / "film.html")
    return shop.folder / "film.html"


def watch(shop: Workshop) -> Path:
    return shop.terminal("watch", "trm", "watch", SUDOKU)


# ---- the views -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A page in one state: scripts are run in it one after the other; `tail` follows the address."""

    page: Callable[[Workshop], Path] | Path | str
    scripts: tuple[str, ...] = ()
    tail: str = ""
    checked: bool = True


def solved(language: str, *, digits: bool | None = None) -> tuple[str, ...]:
    chosen = f"Object.assign(tafkir.settings, {{language: {language!r}, arabicDigits: {json.dumps(digits)}}})"
    # The wall clock of the browser is the one thing that would differ from picture to picture.
    thought = "tafkir.place().steps.forEach(s => { s.milliseconds = 12; })"
    return ("tafkir.ready", f"{chosen}; tafkir.take({SUDOKU!r}); tafkir.solve()", f"{thought}; tafkir.renderAll()")


def chosen(language: str) -> str:
    return f"document.documentElement.lang === {language!r} || $('lang').click()"


CHAT = "chat"
ASK = f"ask({QUESTION!r}).then(() => document.querySelector('.thought').open = true)"
VIEWS = {
    "report": View(report),
    "report-arabic": View(report_arabic),
    "evaluation": View(evaluation),
    "compare": View(compare),
    "card": View(card),
    "verify": View(verify),
    "plan": View(plan, (chosen("en"),)),
    "plan-arabic": View(plan, (chosen("ar"),)),
    "puzzle": View(puzzle, solved("en")),
    "puzzle-arabic": View(puzzle, solved("ar")),
    "puzzle-latin-digits": View(puzzle, solved("ar", digits=False)),
    "puzzle-settings": View(puzzle, (*solved("en"), "$('tune').click()")),
    "film": View(film),
    "film-arabic": View(film, ("$('language').lang === 'en' || $('language').click()",)),
    "watch": View(watch, checked=False),
    "chat-welcome": View(CHAT, tail="/?lang=en"),
    "chat-welcome-arabic": View(CHAT, tail="/?lang=ar"),
    "chat-answer": View(CHAT, (ASK,), "/?lang=en"),
    "chat": View(CHAT, (talk("en"),), "/?lang=en"),
    "chat-arabic": View(CHAT, (talk("ar"),), "/?lang=ar"),
    "chat-settings": View(CHAT, (talk("en"), "$('show-settings').click()"), "/?lang=en"),
    "chat-settings-arabic": View(CHAT, (talk("ar"), "$('show-settings').click()"), "/?lang=ar"),
    "chat-problem": View(CHAT, (f"ask({'word ' * 600!r})",), "/?lang=en"),
    "chat-edit": View(CHAT, (talk("en"), "document.querySelector('.user [aria-label=Edit]').click()"), "/?lang=en"),
    "chat-key": View(CHAT, ("void askKey(words.keyAsk)",), "/?lang=ar"),
    "chat-talks": View(CHAT, (ASK, "$('show-talks').click()"), "/?lang=en"),
}
# What the docs show, as (view, theme, size): the file's name says it again.
DOCS = (
    ("report", "light", "desk"), ("report", "dark", "phone"), ("report-arabic", "light", "desk"),
    ("evaluation", "light", "desk"), ("compare", "light", "desk"), ("compare", "dark", "desk"),
    ("plan", "light", "desk"), ("plan-arabic", "dark", "desk"), ("plan", "light", "phone"),
    ("chat", "light", "desk"), ("chat", "light", "phone"),
    ("chat-arabic", "dark", "desk"), ("chat-arabic", "dark", "phone"),
)  # fmt: skip


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


@dataclass(frozen=True)
class Studio:
    """A browser, the pages made so far, and where pictures go."""

    browser: Browser
    shop: Workshop
    out: Path
    whole: bool
    chat: Callable[[], str]
    made: dict[str, str]

    def take(self, name: str, view: View, theme: str, size: str) -> tuple[Path, list[str]]:
        """Open a view, photograph it, and return the picture and what is wrong with the page."""
        browser, phone = self.browser, size == "phone"
        width, height = SIZES[size]
        browser.resize(width, height, phone=phone)
        browser.prefer(theme)
        browser.console.clear()
        browser.open("about:blank")
        browser.open(self._address(view) + view.tail)
        browser.run(LOADED)
        for script in view.scripts:
            browser.run(script)
        browser.run(SETTLED)
        if not view.checked:  # a terminal ends where its words do
            browser.resize(width, browser.run("document.querySelector('pre').getBoundingClientRect().bottom + 16"))
        path = self._shoot(f"{name}-{theme}{'-phone' if phone else ''}", whole=self.whole)
        faults = [*(browser.faults() if view.checked else []), *(f"console: {line}" for line in browser.console)]
        browser.run("localStorage.clear()")
        return path, faults

    def _shoot(self, name: str, *, whole: bool) -> Path:
        if whole:  # longer than WebP can be
            path = self.out / f"{name}.png"
            self.browser.screenshot(path)
            return path
        shot, path = self.shop.folder / "shot.png", self.out / f"{name}.webp"
        self.browser.screenshot(shot, whole=False)
        Image.open(shot).convert("RGB").save(path, lossless=True, quality=100, method=6)
        return path

    def _address(self, view: View) -> str:
        if isinstance(view.page, Path):
            return view.page.resolve().as_uri()
        key = view.page if isinstance(view.page, str) else view.page.__name__
        if key not in self.made:
            began = time.process_time()
            self.made[key] = self.chat() if isinstance(view.page, str) else view.page(self.shop).resolve().as_uri()
            print(f"({key} made in {time.process_time() - began:.1f} CPU-seconds)", flush=True)
        return self.made[key]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "docs" / "img")
    parser.add_argument("--run", type=Path, required=True, help="a finished `make demo`, or `make demo-fast`")
    parser.add_argument("--only", nargs="*", default=list(VIEWS), help="these views")
    parser.add_argument("--page", type=Path, nargs="*", default=[], help="other HTML files to open as well")
    parser.add_argument("--docs", action="store_true", help="the pictures of the docs")
    parser.add_argument("--whole", action="store_true", help="the whole page, not what fits into the window")
    args = parser.parse_args()
    out, run = args.out.resolve(), args.run.resolve()
    out.mkdir(parents=True, exist_ok=True)
    views = {name: view for name, view in VIEWS.items() if name in args.only}
    views |= {path.stem: View(path.resolve()) for path in args.page}
    wanted = [s for s in DOCS if s[0] in views] if args.docs else [
        (name, theme, size) for name in views for theme in ("light", "dark") for size in SIZES
    ]  # fmt: skip
    failed, total = 0, 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.chdir(folder))
        browser = stack.enter_context(Browser(folder / "profile"))
        studio = Studio(browser, Workshop(run, folder), out, args.whole, lambda: stack.enter_context(chat_server()), {})
        for name, theme, size in wanted:
            path, faults = studio.take(name, views[name], theme, size)
            failed, total = failed + bool(faults), total + path.stat().st_size
            told = "".join(f"\n    {fault}" for fault in faults) or "  nothing found"
            print(f"{name:<22} {theme:<6}{size:<6}{path.stat().st_size / 1e3:8,.0f} kB{told}", flush=True)
    print(f"{len(wanted)} views, {failed} with faults; {total / 1e6:.2f} MB of pictures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
