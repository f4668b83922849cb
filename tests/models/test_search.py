"""More thinking at test time: noise, other forms, halting that saves steps, and which run's answer counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tafkir.data.puzzles.format import Cells, PuzzleFormat
from tafkir.data.puzzles.rules import symmetry_of
from tafkir.data.puzzles.sudoku import Box, sudoku_format
from tafkir.errors import RequestError
from tafkir.models import search
from tafkir.models.search import Runs, Search, search_puzzles
from tafkir.models.solving import Solved, halt_above, solve_puzzles
from tafkir.models.trm import Trm, build_trm
from tafkir.recipe.trm import TrmModelConfig

FORMAT = sudoku_format(Box(2, 2))
NETWORK = TrmModelConfig(
    mixer="attention",
    hidden_size=16,
    num_attention_heads=2,
    intermediate_multiple=8,
    prefix_length=1,
    puzzle_embedding_size=16,
    num_recursions=1,
    num_latent_steps=2,
    max_supervision_steps=4,
)


@pytest.fixture(scope="module")
def model() -> Trm:
    built = build_trm(NETWORK.for_puzzles(FORMAT.vocab_size, 16, 3), 0)
    assert built.puzzle_table is not None
    built.puzzle_table.weight.normal_(generator=torch.Generator().manual_seed(1))
    # A head that does not answer -5 for everything.
    torch.nn.init.normal_(built.q_head.weight, generator=torch.Generator().manual_seed(2))
    return built


QUESTIONS: Cells = np.random.default_rng(0).integers(1, 6, (5, 16)).astype(np.uint8)


def test_noise_of_zero_changes_nothing_and_seeds_repeat(model: Trm) -> None:
    plain = solve_puzzles(model, QUESTIONS)
    levels = np.array([0, 1, 0, 1, 1], dtype=np.float32)
    noisy = solve_puzzles(model, QUESTIONS, noise=levels, seed=3)
    assert (noisy.answers[:, [0, 2]] == plain.answers[:, [0, 2]]).all()
    assert (noisy.q_halt[:, [1, 3, 4]] != plain.q_halt[:, [1, 3, 4]]).all()
    again, other = (solve_puzzles(model, QUESTIONS, noise=levels, seed=seed) for seed in (3, 4))
    assert (again.q_halt == noisy.q_halt).all() and (other.q_halt != noisy.q_halt).any()


def test_noise_has_the_deviation_that_was_asked_for(model: Trm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(state: object, *_: object) -> object:
        seen.append(state.z)  # type: ignore[attr-defined]
        return forward(state, *_)

    forward = model.forward
    monkeypatch.setattr(model, "forward", spy)
    solve_puzzles(model, np.repeat(QUESTIONS, 20, axis=0), steps=1, noise=0.5)
    drawn = seen[0] - model.z_init
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02) and abs(float(drawn.mean())) < 0.01


def test_rows_of_the_puzzle_table(model: Trm) -> None:
    rows = np.array([0, 1, 2, 1, 0])
    found = solve_puzzles(model, QUESTIONS, puzzle_ids=rows, batch_size=2)
    for place, row in enumerate(rows):
        alone = solve_puzzles(model, QUESTIONS[place : place + 1], puzzle_ids=np.array([row]))
        assert np.allclose(alone.q_halt[:, 0], found.q_halt[:, place], atol=1e-5)
    assert not np.allclose(solve_puzzles(model, QUESTIONS).q_halt[:, 1], found.q_halt[:, 1], atol=1e-3)


def test_halting_saves_steps_and_changes_no_answer(model: Trm) -> None:
    rows: list[int] = []
    handle = model.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    whole = solve_puzzles(model, QUESTIONS)
    everything = sum(rows)
    threshold = float(np.median(whole.q_halt[1]))
    rows.clear()
    halted = solve_puzzles(model, QUESTIONS, stop=halt_above(threshold))
    handle.remove()
    ends = whole.halts(threshold)
    assert (halted.halts(threshold) == ends).all() and (halted.pick(ends) == whole.pick(ends)).all()
    assert (halted.answers[-1] == whole.pick(ends)).all(), "a puzzle that left keeps its answer"
    assert sum(rows) == (ends + 1).sum() * everything / (4 * 5)


def test_runs_begin_with_the_puzzle_itself(model: Trm) -> None:
    plain = solve_puzzles(model, QUESTIONS)
    for options in ({"noise": 0.5}, {"permute": True}, {"noise": 0.5, "permute": True}):
        runs = search_puzzles(model, FORMAT, QUESTIONS, Search(runs=3, **options))  # type: ignore[arg-type]
        assert runs.answers.shape == (4, 3, 5, 16) and runs.q_halt.shape == (4, 3, 5)
        assert (runs.answers[:, 0] == plain.answers).all()
        assert (runs.q_halt[:, 1] != plain.q_halt).any() and (runs.q_halt[:, 1] != runs.q_halt[:, 2]).any()


def test_permuted_runs_answer_the_puzzle_that_was_asked(monkeypatch: pytest.MonkeyPatch, model: Trm) -> None:
    """A solver that repeats the question in every form of it gives the question back."""

    def echo(_: object, inputs: Cells, **__: object) -> Solved:
        return Solved(np.stack([inputs, inputs]), np.zeros((2, len(inputs)), dtype=np.float32))

    monkeypatch.setattr(search, "solve_puzzles", echo)
    runs = search_puzzles(model, FORMAT, QUESTIONS, Search(runs=6, permute=True))
    assert (runs.answers == QUESTIONS).all()


def runs_of(answers: list[list[int]], q: list[list[float]]) -> Runs:
    """One puzzle of one cell: answers and q by step and run."""
    tokens = np.array(answers, dtype=np.uint8)[:, :, None, None]
    return Runs(tokens, np.array(q, dtype=np.float32)[:, :, None])


def test_picking() -> None:
    last = runs_of([[9, 9, 9, 9], [1, 2, 2, 3]], [[0, 0, 0, 0], [1.0, 0.5, 0.1, 2.0]])
    assert last.taken("q").tolist() == [[3]] and last.pick("q").tolist() == [3]
    assert last.taken("vote").tolist() == [[2]] and last.pick("vote").tolist() == [1]
    equal = runs_of([[1, 2, 1, 2]], [[0.1, 0.4, 0.3, 0.2]])
    assert equal.taken("vote").tolist() == [[2]], "equally many: the more confident answer"
    halting = runs_of([[5, 6], [7, 8]], [[1.0, -1.0], [-9.0, 0.2]])
    assert halting.ends(0.0).tolist() == [[0], [1]] and halting.taken("q", 0.0).tolist() == [[5]]
    assert halting.taken("q").tolist() == [[8]]
    assert halting.first(lambda _, answer: answer[0] in (6, 8)) == (0, 1)
    assert halting.first(lambda _, answer: answer[0] == 3) is None


def test_a_right_answer_ends_all_runs_of_its_puzzle(model: Trm) -> None:
    plain = solve_puzzles(model, QUESTIONS)
    wanted = plain.answers[1]
    rows: list[int] = []
    handle = model.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    runs = search_puzzles(
        model,
        FORMAT,
        QUESTIONS,
        Search(runs=4, noise=2.0),
        accept=lambda puzzle, answer: bool((answer == wanted[puzzle]).all()),
    )
    handle.remove()
    for puzzle in range(5):
        first = runs.first(lambda number, answer: bool((answer == wanted[number]).all()), puzzle)
        assert first is not None and first[0] <= 1
    assert sum(rows) <= 2 * 20 * 3, "two steps of twenty runs of three passes, not four"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs is 0; expected at least 1"),
        ({"noise": -0.1}, "noise is -0.1; expected 0 or more"),
        ({"runs": 2}, "2 runs would all be equal. Fix: add noise"),
    ],
)
def test_searches_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Search(**options)  # type: ignore[arg-type]


def test_grids_of_ones_own_have_the_forms_that_their_recipe_says(model: Trm) -> None:
    size = {"kind": "grids", "rows": 4, "columns": 4, "symbols": ("", *".1234")}
    closed, open_ = PuzzleFormat(**size), PuzzleFormat(**size, turns=True, exchangeable=(2, 3))  # type: ignore[arg-type]
    assert symmetry_of(closed) is None
    with pytest.raises(RequestError, match="no other form of puzzles of kind 'grids' is known"):
        search_puzzles(model, closed, QUESTIONS, Search(runs=2, permute=True))
    assert search_puzzles(model, open_, QUESTIONS, Search(runs=2, permute=True)).answers.shape == (4, 2, 5, 16)
