"""The solvers that ship with the package: their notes are true, and they solve at once, in Python and in a page."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import tafkir
from tafkir.checkpoint.trm import load_trm
from tafkir.data.puzzles.rules import is_right
from tafkir.engine.puzzles import find_solver
from tafkir.export.check import draw_questions
from tafkir.export.page import build_page
from tafkir.recipe.bundled import bundled_recipes, bundled_solvers
from tafkir.recipe.load import load_recipe
from tests.export.browser import Browser
from tests.export.conftest import small_checkpoint

MAX_SOLVER_BYTES = 1_500_000


@pytest.mark.parametrize("name", bundled_solvers())
def test_a_solver_is_what_its_note_says(name: str) -> None:
    folder = bundled_solvers()[name]
    note = (folder / "README.md").read_text(encoding="utf-8")
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in note and len(weights) < MAX_SOLVER_BYTES
    lineage = json.loads((folder / "tafkir.json").read_text(encoding="utf-8"))["lineage"]
    assert f"(`{lineage['recipe']}`), seed {lineage['seed']}" in note and lineage["recipe"] in bundled_recipes()
    recipe = load_recipe([folder / "recipe.toml"]).recipe
    assert recipe.trm is not None and (recipe.name, recipe.trm.steps) == (lineage["recipe"], lineage["steps"])
    assert f"{load_trm(name).model.shape.num_parameters():,} parameters" in note


@pytest.mark.parametrize("name", bundled_solvers())
def test_fresh_puzzles_are_solved_without_naming_a_model(name: str) -> None:
    format = load_trm(name).puzzles
    questions = draw_questions(format, 12, seed=77)
    answers = [tafkir.solve(format.show(question), max_steps=16) for question in questions]
    for question, answer in zip(questions, answers, strict=True):
        if answer.grid is not None:
            assert is_right(format, question, format.read("\n".join(answer.grid)))
    assert sum(answer.verdict == "solved" for answer in answers) >= 8


def test_the_solver_is_found_by_the_size_of_the_grid(tmp_path: Path) -> None:
    four = bundled_solvers()["sudoku4"]
    small_checkpoint(tmp_path, "attention")
    bundled = {"sudoku4": four, "maze": tmp_path / "attention"}
    maze = "#####\n#S  #\n### #\n#G  #\n#####"
    found = {
        "1..43.1...43....": four,
        "1..43.1...43....\n1..43.1...43....\n": four,
        "1 . | . 4\n3 . | 1 .\n----+----\n. . | 4 3\n. . | . .": four,
        maze: tmp_path / "attention",
        maze.replace("#S  #", "#S").replace("\n", "\r\n"): tmp_path / "attention",
        maze.replace("\n", "") + "\n" + maze.replace("\n", ""): tmp_path / "attention",
    }
    assert {text: find_solver(None, text, lambda: bundled) for text in found} == found


@pytest.mark.browser
def test_the_page_solves_what_it_makes(tmp_path: Path) -> None:
    solvers = [load_trm(folder) for folder in bundled_solvers().values()]
    page = build_page(solvers, tmp_path / "page")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page.path.as_uri())
        browser.run("new Promise(ok => document.readyState === 'complete' ? ok() : addEventListener('load', ok))")
        browser.run("tafkir.ready")
        browser.run("Object.assign(tafkir.settings, {pace: 'instant', language: 'en'}); tafkir.renderAll()")
        for number, solver in enumerate(solvers):
            if len(solvers) > 1:
                browser.run(f"document.querySelectorAll('#tabs button')[{number}].click()")
            found = []
            for _ in range(5):
                browser.run("document.getElementById('fresh').click(); tafkir.solve()")
                place = json.loads(browser.run("JSON.stringify(tafkir.place())"))
                status = browser.run("document.getElementById('status').innerText")
                if place["verdict"] == "solved":
                    answer = np.array(place["steps"][-1]["answer"], dtype=np.uint8)
                    assert is_right(solver.puzzles, np.array(place["question"], dtype=np.uint8), answer)
                    assert re.match(r"Solved in \d+ steps?", status)
                    assert browser.run("document.getElementById('board').classList.contains('solved')")
                else:
                    assert status.startswith("Unsolved: after 16 steps") and place["shown"] == -1
                found.append(place["verdict"])
            assert found.count("solved") >= 2, solver.path.name
        assert browser.console == []
