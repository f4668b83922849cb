"""The page in a real Chromium: from a file and a server, in both languages, at phone width, and what it answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.cli.main import app
from tafkir.data.puzzles.rules import is_right, solve_by_rules
from tafkir.errors import RequestError
from tafkir.export import page as page_module
from tafkir.export.page import MAX_PAGE_BYTES, Page, build_page, runtime_source
from tafkir.models.solving import solve_puzzles
from tests.export.browser import Browser
from tests.export.conftest import small_checkpoint

QUESTION = "1..43.1...43...."


@pytest.fixture(scope="module")
def solvers(tmp_path_factory: pytest.TempPathFactory) -> list[TrmCheckpoint]:
    """One of Sudoku and one of mazes, which have learned nothing."""
    folder = tmp_path_factory.mktemp("solvers")
    return [small_checkpoint(folder, "mlp"), small_checkpoint(folder, "attention")]


@pytest.fixture(scope="module")
def page(solvers: list[TrmCheckpoint], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return build_page(solvers, tmp_path_factory.mktemp("page") / "site", "float32")


@pytest.fixture(scope="module")
def browser(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, opened from the disk, awake."""
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1200, 900)
        browser.open(page.path.as_uri())
        wake(browser)
        yield browser


def wake(browser: Browser) -> None:
    browser.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
    browser.run("tafkir.ready")
    browser.run("Object.assign(tafkir.settings, {pace: 'instant', language: 'en', most: 4}); tafkir.renderAll()")


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(browser: Browser) -> str:
    return str(browser.run("document.getElementById('status').innerText"))


@pytest.mark.browser
def test_each_step_is_what_torch_says(browser: Browser, solvers: list[TrmCheckpoint]) -> None:
    for solver in solvers:
        asked = QUESTION if solver.puzzles.kind == "sudoku" else "######S # ## # ##  G######"[:25]
        rows = "\n".join(asked[i : i + solver.puzzles.columns] for i in range(0, len(asked), solver.puzzles.columns))
        assert browser.run(f"tafkir.take({rows!r})") is True
        browser.run("tafkir.solve()")
        steps = json.loads(browser.run("JSON.stringify(tafkir.place().steps)"))
        ours = solve_puzzles(solver.model, solver.puzzles.read(rows)[None], steps=4)
        assert [step["answer"] for step in steps] == ours.answers[:, 0].tolist()
        assert [step["q"] for step in steps] == pytest.approx((1 / (1 + np.exp(-ours.q_halt[:, 0]))).tolist(), abs=1e-6)
        assert status(browser).startswith("Unsolved: after 4 steps"), "it has learned nothing"
        assert browser.run("tafkir.place().shown") == -1, "no attempt stands as the answer"


@pytest.mark.browser
def test_the_rules_in_the_page_are_the_rules(browser: Browser, solvers: list[TrmCheckpoint]) -> None:
    """Puzzles that the page makes have one answer by ours; that answer, and only it, is right by its rules."""
    for number, solver in enumerate(solvers):
        format = solver.puzzles
        for _ in range(5):
            browser.run(f"document.querySelectorAll('#tabs button')[{number}].click()")
            browser.run("document.getElementById('fresh').click()")
            question = np.array(browser.run("tafkir.place().question"), dtype=np.uint8)
            answer = solve_by_rules(format, question)
            wrong = answer.copy()
            blank = int(np.flatnonzero(answer != question)[0])
            wrong[blank] = question[blank]
            for grid in (answer, wrong):
                said = browser.run(f"isRight(tafkir.place().model.puzzles, {question.tolist()}, {grid.tolist()})")
                assert said is is_right(format, question, grid)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("11" + "." * 14, "Two equal digits see each other"),
        ("." * 16, "more than one solution"),
        ("123....4" + "." * 8, "no solution"),
        ("1234", "no grid of a size that lives here"),
        ("#####\n#S# #\n#####\n#  G#\n#####", "No way leads from start to goal"),
        ("#####\n#   #\n#   #\n#  G#\n#####", "needs a start and a goal"),
    ],
)
def test_what_is_no_puzzle_is_named(browser: Browser, grid: str, message: str) -> None:
    browser.run(f"tafkir.take({grid!r}) && tafkir.solve()")
    assert message in status(browser)
    assert browser.run("tafkir.place().steps.length") == 0


@pytest.mark.browser
def test_keys_and_paste(browser: Browser) -> None:
    browser.run("document.querySelectorAll('#tabs button')[0].click(); document.getElementById('clear').click()")
    browser.run("document.querySelector('[data-cell=\"0\"]').focus()")
    for key in ("3", "ArrowRight", "٢", "ArrowDown", "9", "1", "Backspace", "4", "ArrowLeft", "ArrowUp"):
        browser.press(key)
    assert browser.run("writeGrid(tafkir.place().model.puzzles, tafkir.place().question)") == "32..\n.4..\n....\n...."
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "Row 1, column 1: 3"
    browser.run(
        "(() => { const data = new DataTransfer(); data.setData('text', '١٠٠٤ ٣٠١٠ ٠٠٤٣ ٠٠٠٠');"
        " document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data})); })()"
    )
    assert browser.run("writeGrid(tafkir.place().model.puzzles, tafkir.place().question)").replace("\n", "") == QUESTION
    browser.press("Enter")
    assert browser.run("new Promise(done => setTimeout(() => done(tafkir.place().steps.length), 500))") > 0


@pytest.mark.browser
def test_a_maze_is_drawn_with_the_mouse(browser: Browser) -> None:
    browser.run("document.querySelectorAll('#tabs button')[1].click(); document.getElementById('clear').click()")
    box = browser.run("JSON.stringify(document.getElementById('cells').getBoundingClientRect())")
    left, top, side = (json.loads(box)[key] for key in ("left", "top", "width"))
    place = [(left + side * (c + 0.5) / 5, top + side * (r + 0.5) / 5) for r in range(5) for c in range(5)]
    for path in ((7, 12), (6, 11, 16)):
        browser.mouse("pressed", *place[path[0]])
        for cell in path[1:]:
            browser.mouse("moved", *place[cell])
        browser.mouse("released", *place[path[-1]])
    drawn = browser.run("writeGrid(tafkir.place().model.puzzles, tafkir.place().question)").split("\n")
    assert drawn == ["#####", "# # #", "# # #", "#S G#", "#####"], "walls where it was pressed, the start dragged"


@pytest.mark.browser
def test_arabic_runs_from_right_to_left_with_its_digits(browser: Browser) -> None:
    browser.run(f"tafkir.take('{QUESTION}'); document.getElementById('language').click()")
    assert browser.run("getComputedStyle(document.body).direction") == "rtl"
    assert browser.run("document.documentElement.lang") == "ar"
    assert "سودوكو ٤×٤" in browser.run("document.getElementById('tabs').innerText")
    assert browser.run("[...document.querySelectorAll('#drawing text')].map(t => t.textContent).join('')") == "١٤٣١٤٣"
    first = "document.querySelector('#drawing text').getBoundingClientRect().left"
    middle = "document.getElementById('board').getBoundingClientRect()"
    assert browser.run(f"{first} < ({middle}.left + {middle}.right) / 2"), "the grid itself is not mirrored"
    browser.run("document.getElementById('digits').click()")
    assert browser.run("[...document.querySelectorAll('#drawing text')].map(t => t.textContent).join('')") == "143143"
    untold = browser.run("Object.keys(WORDS.en).filter(key => typeof WORDS.ar[key] !== typeof WORDS.en[key])")
    assert untold == []
    browser.run("document.getElementById('language').click()")


@pytest.mark.browser
def test_nothing_sticks_out_and_nothing_leaves(browser: Browser, page: Page) -> None:
    for width, phone in ((360, True), (390, True), (820, False), (1440, False)):
        browser.resize(width, 800, phone=phone)
        for tab in (0, 1):
            browser.run(f"document.querySelectorAll('#tabs button')[{tab}].click()")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), width
        assert width != 390 or browser.faults() == []
    browser.resize(1200, 900)
    assert {request.split(":")[0] for request in browser.requests} == {"file", "blob"}
    assert browser.console == []
    with pytest.raises(RuntimeError):
        browser.run("fetch('http://127.0.0.1:9/').then(() => 1)")
    assert any("Content Security Policy" in line for line in browser.console), "the page may ask nobody"


@pytest.mark.browser
def test_a_plain_server_does_as_well(browser: Browser, page: Page) -> None:
    before = len(browser.requests)
    with serve(page.path.parent) as address:
        browser.open(f"{address}/#puzzle={QUESTION}")
        wake(browser)
        assert browser.run("writeGrid(tafkir.place().model.puzzles, tafkir.place().question)").startswith("1..4\n3.1.")
        browser.run("tafkir.solve()")
        assert browser.run("tafkir.place().steps.length") == 4
        browser.open(page.path.as_uri())
        wake(browser)
    asked = [request for request in browser.requests[before:] if not request.startswith(("blob:", "file:"))]
    assert asked == [f"{address}/"]


def test_one_file_with_everything(page: Page, solvers: list[TrmCheckpoint]) -> None:
    text = page.path.read_text(encoding="utf-8")
    assert page.size_bytes == len(text.encode()) < MAX_PAGE_BYTES and list(page.models) == ["mlp", "attention"]
    assert [path.name for path in page.path.parent.iterdir()] == ["index.html"]
    assert "src=" not in text.split("<script>")[0] and "ONNX Runtime Web" in text


def test_the_bundled_runtime_is_what_it_says() -> None:
    import gzip
    import hashlib

    folder = Path(page_module.__file__).parent / "runtime"
    source = runtime_source()
    assert (source["package"], source["license"]) == ("onnxruntime-web", "MIT")
    for name, known in source["sha256"].items():
        assert hashlib.sha256(gzip.decompress((folder / f"{name}.gz").read_bytes())).hexdigest() == known
    assert "Microsoft Corporation" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert b"THIRD PARTY" in gzip.decompress((folder / "ThirdPartyNotices.txt.gz").read_bytes()).upper()


def test_pages_that_cannot_be(solvers: list[TrmCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no checkpoint for the page"):
        build_page([], tmp_path / "out")
    with pytest.raises(RequestError, match=r"solves sudoku of 4 x 4, too"):
        build_page([solvers[0], solvers[0]], tmp_path / "out")
    monkeypatch.setattr(page_module, "MAX_PAGE_BYTES", 1_000_000)
    with pytest.raises(RequestError, match=r"the page would have 5\.\d MB; expected at most 1 MB"):
        build_page(solvers[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["trm", "page", str(tmp_path / "out"), "--model", "none"])
    assert done.exception is not None and "no such checkpoint" in str(done.exception)
