"""Films of the thinking: a GIF with a frame a step, and a page that plays by itself."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tafkir.checkpoint.trm import TrmCheckpoint
from tafkir.data.puzzles.format import PuzzleFormat
from tafkir.data.puzzles.rules import solve_by_rules
from tafkir.engine.trace import Trace, trace_puzzle
from tafkir.errors import BackendUnavailable, RequestError
from tafkir.export.film import render_film_html, write_film
from tests.export.browser import Browser
from tests.export.conftest import small_checkpoint


def solved(solver: TrmCheckpoint, text: str) -> Trace:
    """What a model thinks, with a last thought that is right."""
    format = solver.puzzles
    trace = trace_puzzle(solver, format.read(text))
    answer = solve_by_rules(format, trace.question)
    changed = tuple(np.flatnonzero(answer != trace.thoughts[1].answer).tolist())
    last = replace(trace.thoughts[2], answer=answer, right=True, changed=changed)
    return replace(trace, thoughts=(*trace.thoughts[:2], last), taken=3, halted=None)


@pytest.fixture
def traces(tmp_path: Path) -> list[Trace]:
    sudoku = solved(small_checkpoint(tmp_path, "mlp"), "1..43.1...43....")
    maze = solved(small_checkpoint(tmp_path, "attention"), "#####\n#S  #\n### #\n#G  #\n#####")
    own = PuzzleFormat(kind="grids", rows=5, columns=5, symbols=("", *"abcde"))
    return [sudoku, maze, replace(maze, format=own, halted=2)]


def test_a_gif_has_a_frame_a_step(traces: list[Trace], tmp_path: Path) -> None:
    for trace in traces:
        write_film(trace, tmp_path / "film.gif")
        with Image.open(tmp_path / "film.gif") as film:
            assert film.n_frames == 4 and film.info["loop"] == 0
            frames = []
            for number in range(4):
                film.seek(number)
                frames.append(np.asarray(film.convert("RGB"), dtype=int))
        # Wherever cells changed, the pictures differ.
        side = frames[0].shape[1] - 48
        for before, after, thought in zip(frames, frames[1:], trace.thoughts, strict=False):
            moved = np.abs(after - before).sum(-1)[24 : 24 + side, 24 : 24 + side] > 90
            size = side // trace.format.columns
            for cell in thought.changed:
                row, column = divmod(cell, trace.format.columns)
                given = trace.format.symbols[trace.question[cell]]
                if trace.format.kind == "maze" and (given in "#SG" or not thought.right):
                    continue  # walls and ends are drawn as they are given
                if trace.format.kind == "sudoku" and given != ".":
                    continue
                assert moved[row * size : (row + 1) * size, column * size : (column + 1) * size].any(), (cell, trace)


def test_films_of_other_kinds(traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"films cannot be written as '.mp4'; expected .gif or .html"):
        write_film(traces[0], tmp_path / "film.mp4")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(BackendUnavailable, match=r"Pillow is not installed.*--out x.html"):
        write_film(traces[0], tmp_path / "film.gif")
    assert list(tmp_path.glob("film*")) == []


def test_the_page_holds_what_was_recorded(traces: list[Trace]) -> None:
    text = render_film_html(replace(traces[0], model="</script><b>x"))
    assert "</script><b>x" not in text
    found = re.search(r'id="trace">(.*?)</script>', text, flags=re.S)
    assert found
    held = json.loads(found[1])
    assert held["model"] == "</script><b>x" and held["taken"] == 3 and len(held["steps"]) == 3
    assert held["steps"][2]["answer"] == traces[0].thoughts[2].answer.tolist()


@pytest.mark.browser
def test_the_page_plays(traces: list[Trace], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.resize(390, 800, phone=True)
        for number, trace in enumerate(traces):
            path = tmp_path / f"film{number}.html"
            write_film(trace, path)
            browser.open(path.as_uri())
            browser.run("new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))")
            assert browser.run("timer !== null"), "it plays by itself"
            browser.run("stop(); go(3)")
            assert browser.run("document.getElementById('step').textContent") in ("Step 3", "الخطوة ٣")
            assert browser.faults() == []
            browser.run("document.getElementById('language').click()")
            drawn = "circle, polyline" if trace.format.kind == "maze" else "text"
            assert browser.run(f"document.querySelectorAll('#drawing {drawn.replace(', ', ', #drawing ')}').length") > 0
        assert browser.console == [] and {request.split(":")[0] for request in browser.requests} == {"file"}
