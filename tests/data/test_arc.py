"""ARC tasks: every layout of files, forms and canvas as in the official code, no test pair in training, bad input."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tafkir.data.puzzles.arc import ArcGrid, ArcPair, ArcTask, parse_grid, read_tasks
from tafkir.data.puzzles.arc_baselines import answer_by_copying, answer_by_rules
from tafkir.data.puzzles.arc_sets import ArcSets, build_arc
from tafkir.data.puzzles.canvas import Form, crop, draw_forms, parse_form, place, turn, turn_back
from tafkir.data.puzzles.leakage import mark_pair
from tafkir.data.puzzles.sets import build_puzzles
from tafkir.data.puzzles.votes import build_submission, pass_at, rank_candidates
from tafkir.errors import DataError
from tafkir.recipe.puzzles import BUNDLED_TASKS, ArcPuzzles

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(0, 10, drawn[:2]).astype(np.uint8)
)
FORMS = st.tuples(st.integers(0, 7), st.permutations(range(1, 10))).map(lambda drawn: Form(drawn[0], (0, *drawn[1])))


def swap(seed: int, *, tests: int = 1, pairs: int = 3, side: int = 3) -> dict[str, list[dict[str, Any]]]:
    """A task: two colours, which the seed says, trade places."""
    random = Random(seed)
    one, other = random.sample(range(10), 2)
    table = {one: other, other: one}
    made = []
    for _ in range(pairs + tests):
        rows = [[random.choice((0, one, other, 5)) for _ in range(side)] for _ in range(side)]
        made.append({"input": rows, "output": [[table.get(cell, cell) for cell in row] for row in rows]})
    return {"train": made[:pairs], "test": made[pairs:]}


def write_set(path: Path, tasks: dict[str, Any]) -> str:
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return str(path)


# ---- files -------------------------------------------------------------------------------------------------------


def test_sets_that_ship() -> None:
    assert {name: len(read_tasks(name)) for name in BUNDLED_TASKS} == {
        n: count for n, (_, count) in BUNDLED_TASKS.items()
    }


def test_every_layout_of_files(tmp_path: Path) -> None:
    tasks = {f"t{seed}": swap(seed, tests=2) for seed in range(3)}
    folder = tmp_path / "tasks" / "nested"
    folder.mkdir(parents=True)
    for name, task in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(task))
    rows = [{"id": name, **task} for name, task in tasks.items()]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "t.jsonl").write_bytes(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines))
    hidden = {n: {**t, "test": [{"input": p["input"]} for p in t["test"]]} for n, t in tasks.items()}
    write_set(tmp_path / "x_solutions.json", {n: [p["output"] for p in t["test"]] for n, t in tasks.items()})
    sources = [
        str(folder),
        str(tmp_path / "tasks"),
        str(tmp_path / "t.jsonl"),
        str(tmp_path / "t.jsonl.gz"),
        write_set(tmp_path / "by-id.json", tasks),
        write_set(tmp_path / "x_challenges.json", hidden),
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for source in [*sources, str(tmp_path / "list.json")]:
        found = read_tasks(source)
        assert [task.id for task in found] == list(tasks)
        for task in found:
            assert [pair.output.tolist() for pair in task.test if pair.output is not None] == [
                pair["output"] for pair in tasks[task.id]["test"]
            ]
    (alone,) = read_tasks(str(folder / "t1.json"))
    assert alone.id == "t1" and len(alone.train) == 3
    assert read_tasks(write_set(tmp_path / "hidden.json", hidden))[0].test[0].output is None


GOOD = {"input": [[1]], "output": [[2]]}
BAD_TASKS: list[tuple[object, str]] = [
    ({"train": [], "test": [GOOD]}, r"a\.json: the task has no demonstrations"),
    ({"test": [GOOD]}, r"a\.json: the task has no demonstrations"),
    ({"train": [GOOD]}, r"a\.json: this is no ARC task; expected \{\"train\""),
    ({"train": [GOOD], "test": []}, "the task has no test input"),
    ({"train": [{"input": [[1]]}], "test": [GOOD]}, r"train 1: the demonstration has no output"),
    ({"train": [{"output": [[1]]}], "test": [GOOD]}, r"train 1: there is no input"),
    ({"train": [GOOD], "test": [{"input": [[1, 2], [3]]}]}, r"test 1: input: rows have different lengths: 2, 1"),
    ({"train": [GOOD], "test": [{"input": [[1, 10]]}]}, r"unknown symbol 10 in row 1; expected integers 0 to 9"),
    ({"train": [GOOD], "test": [{"input": "12"}]}, r"test 1: input: this is no grid"),
    ({"abc": [[1, 2]]}, r"a\.json: task abc: this is no ARC task"),
    ([3], r"a\.json: task 1: this is no ARC task"),
    ({}, r"there is no task"),
    ("hello", r"this is no ARC task"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TASKS)
def test_files_that_are_not_arc(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_tasks(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", r"a\.json:1: not valid JSON"),
        ("a.jsonl", '{"id": 1}\n', r"a\.jsonl:1: this is no ARC task"),
        ("a.jsonl", "[]\n", r"a\.jsonl:1: no ARC task; expected a JSON object"),
        ("none", None, r"no such folder of tasks.*mini-arc"),
        ("none.json", None, r"no such file.*mini-arc"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_tasks(str(tmp_path / name))


def test_solutions_must_fit(tmp_path: Path) -> None:
    path = write_set(tmp_path / "y_challenges.json", {"a": swap(0)})
    write_set(tmp_path / "y_solutions.json", {"a": []})
    with pytest.raises(DataError, match="task a: the solutions do not fit 1 test inputs"):
        read_tasks(path)
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"id": "a", **swap(i)}) for i in range(2)))
    with pytest.raises(DataError, match=r"two\.jsonl:2: the task 'a' is also in .*two\.jsonl:1"):
        read_tasks(str(tmp_path / "two.jsonl"))


# ---- canvas and forms --------------------------------------------------------------------------------------------


def test_the_canvas_of_the_official_code() -> None:
    """Tokens by hand: padding 0, the end mark 1 below and beside the grid, colour c as c + 2."""
    grid = parse_grid([[0, 1], [2, 9]], "here")
    assert place(grid, 4, 4).reshape(4, 4).tolist() == [[2, 3, 1, 0], [4, 11, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert place(grid, 4, 4, 2, 1).reshape(4, 4).tolist() == [[0] * 4, [0] * 4, [0, 2, 3, 1], [0, 4, 11, 1]]
    assert place(grid, 2, 2).tolist() == [2, 3, 4, 11], "a grid that fills the canvas has no marks"
    with pytest.raises(DataError, match="the grid is 2 x 2; expected at most 1 x 3, the size of the canvas"):
        place(grid, 1, 3)


def largest(canvas: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the largest rectangle of colours at the top left, by trying all."""
    sizes = [(r, c) for r in range(1, len(canvas) + 1) for c in range(1, canvas.shape[1] + 1)]
    whole = [size for size in sizes if (canvas[: size[0], : size[1]] >= 2).all()]
    return max(whole, key=lambda size: size[0] * size[1], default=(0, 0))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_the_crop_is_the_largest_rectangle_without_marks(seed: int, rows: int, columns: int) -> None:
    canvas = np.random.default_rng(seed).choice([0, 1, 2, 5, 7, 8, 11], (rows, columns)).astype(np.uint8)
    found = crop(canvas.reshape(-1), rows, columns)
    height, width = largest(canvas)
    assert found.size == height * width
    assert (found + 2 == canvas[: found.shape[0], : found.shape[1]]).all()


@given(grid=GRIDS, form=FORMS)
def test_a_form_is_undone(grid: ArcGrid, form: Form) -> None:
    shown = form.apply(grid)
    assert (form.undo(shown) == grid).all() and (turn_back(turn(grid, form.turn), form.turn) == grid).all()
    assert (crop(place(shown, 6, 6), 6, 6) == shown).all()
    assert parse_form(form.name("a|b")) == ("a|b", form)
    assert sorted(np.unique(shown == 0, return_counts=True)[1]) == sorted(np.unique(grid == 0, return_counts=True)[1])


def test_turns_are_counted_as_in_the_official_code() -> None:
    grid = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    assert [turn(grid, number).reshape(-1).tolist() for number in range(8)] == [
        [1, 2, 3, 4],
        [2, 4, 1, 3],  # a quarter turn to the left
        [4, 3, 2, 1],
        [3, 1, 4, 2],
        [2, 1, 4, 3],  # left and right
        [3, 4, 1, 2],  # up and down
        [1, 3, 2, 4],  # the diagonal
        [4, 2, 3, 1],  # the other one
    ]
    assert Form(3, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9)).name("ab") == "ab|||t3|||0213456789"
    for bad in ("a|||t9|||0123456789", "a|||t1|||0012345678", "a|||t1"):
        with pytest.raises(DataError, match="names no form of a task"):
            parse_form(bad)


def test_forms_differ_and_run_out() -> None:
    def task(rows: list[list[int]]) -> ArcTask:
        grid = parse_grid(rows, "x")
        return ArcTask("t", (ArcPair(grid, grid),), (ArcPair(grid, None),), "x")

    forms = draw_forms(Random(0), task([[1, 2], [3, 4]]), 50)
    assert len(forms) == 51 == len(set(forms)) and forms[0] == Form()
    assert len(draw_forms(Random(0), task([[0]]), 50)) == 1, "one black cell looks the same in every form"
    assert len(draw_forms(Random(0), task([[1]]), 50)) == 9, "one cell of nine colours"
    assert {form.turn for form in draw_forms(Random(0), task([[1, 2, 0]]), 50, turns=(0, 4), recolour=False)} == {0, 4}


# ---- parts -------------------------------------------------------------------------------------------------------


def cells(sets: ArcSets, stream_size: int) -> set[tuple[bytes, bytes]]:
    """Pairs that training shows, as grids in the form of the task."""
    shown = set()
    samples = sets.stream(augment=True, seed=1).take(0, stream_size)
    for question, answer, row in zip(*samples, strict=True):
        name, form = parse_form(sets.identifiers[row])
        assert name != "<blank>"
        grids = []
        for canvas in (question, answer):
            square = canvas.reshape(sets.format.rows, -1)
            inside = np.argwhere(square >= 2)
            (top, left), (bottom, right) = inside.min(0), inside.max(0)
            grids.append(form.undo(square[top : bottom + 1, left : right + 1] - np.uint8(2)).tobytes())
        shown.add((grids[0], grids[1]))
    return shown


def test_test_pairs_are_never_trained_on(tmp_path: Path) -> None:
    path = write_set(tmp_path / "own.json", {f"t{seed}": swap(seed, tests=2) for seed in range(12)})
    config = ArcPuzzles(path=path, num_copies=3, num_validation=4, canvas=(5, 5))
    sets = build_arc(config, 0)
    assert isinstance(sets, ArcSets) and sets.leaked == 0
    assert sets.counts() | {"train": 36, "validation": 8, "test": 16, "tasks": 12} == sets.counts()
    assert sets.num_puzzle_ids == 1 + 12 * 4 == len(sets.identifiers)
    shown = cells(sets, 600)
    tasks = read_tasks(path)
    demonstrations = {(p.input.tobytes(), p.output.tobytes()) for t in tasks for p in t.train}  # type: ignore[union-attr]
    held_out = {(p.input.tobytes(), p.output.tobytes()) for t in tasks for p in t.test}  # type: ignore[union-attr]
    assert shown == demonstrations and not shown & held_out
    ids = {task.task.id for part in sets.held_out.values() for task in part}
    assert ids == {task.id for task in tasks}
    assert build_puzzles(config, 0).test.inputs.tobytes() == sets.test.inputs.tobytes()


def test_a_stream_shows_every_pair_of_an_epoch_in_one_form_of_its_task(tmp_path: Path) -> None:
    path = write_set(tmp_path / "own.json", {f"t{seed}": swap(seed) for seed in range(4)})
    sets = build_arc(ArcPuzzles(path=path, num_copies=5, num_validation=1, canvas=(6, 6)), 0)
    stream = sets.stream(augment=True, seed=2)
    epoch = stream.take(12, 12)
    assert [len({*epoch.puzzle_ids[i : i + 3]}) for i in range(0, 12, 3)] == [1] * 4, "a task's pairs stay together"
    assert (stream.take(17, 3).inputs == epoch.inputs[5:8]).all(), "a sample depends on its number alone"
    still = sets.stream(augment=False, seed=2).take(0, 40)
    assert (still.inputs[:, 0] >= 2).all(), "without moves every grid stands in the corner"
    corners = [(row.reshape(6, 6) >= 2)[0, 0] for row in stream.take(0, 120).inputs]
    assert 40 <= sum(corners) < 90, "one pair of three stays, the others move"


def test_leaks_are_found_in_every_form(tmp_path: Path) -> None:
    own = {f"t{seed}": swap(seed) for seed in range(6)}
    path = write_set(tmp_path / "own.json", own)
    form = Form(3, (0, 5, 9, 1, 2, 3, 4, 6, 7, 8))
    hidden = {side: form.apply(parse_grid(own["t2"]["test"][0][side], "x")).tolist() for side in ("input", "output")}
    # The test pair of t2, turned and recoloured, as another set's demonstration; and one that is new.
    theirs = {"other": {"train": [hidden], "test": [swap(90)["test"][0]]}, "new": swap(91)}
    write_set(tmp_path / "theirs.json", theirs)
    given = {"path": path, "train_paths": (str(tmp_path / "theirs.json"),), "num_copies": 0, "num_validation": 2}
    with pytest.raises(DataError, match=r"1 of 2 tasks share a pair with tasks that are measured, such as other"):
        build_arc(ArcPuzzles(**given), 0)
    sets = build_arc(ArcPuzzles(**given, overlap="exclude"), 0)
    assert sets.excluded == ("other",) and sets.leaked == 0
    assert len(sets.train) == 6 * 3 + 4, "tasks that are not measured are trained on with all their pairs"
    own["t3"]["train"][0] = own["t2"]["test"][0]
    own["t4"]["train"][0] = own["t4"]["test"][0]
    leaky = build_arc(ArcPuzzles(path=write_set(tmp_path / "leaky.json", own), num_copies=0, num_validation=2), 0)
    assert leaky.leaked == 2
    scored = {task.task.id for part in leaky.held_out.values() for task in part}
    assert scored == {"t0", "t1", "t3", "t5"}, "the task is trained on and not scored"


def test_arc_one_in_arc_two(tmp_path: Path) -> None:
    """Tasks of the evaluation set, with demonstrations and test pairs exchanged, as ARC-AGI-2 holds them."""
    evaluation = read_tasks("arc-agi-1/evaluation")[:6]
    rows = []
    for task in evaluation[:4]:
        pairs = [{"input": p.input.tolist(), "output": p.output.tolist()} for p in (*task.test, *task.train)]  # type: ignore[union-attr]
        rows.append(json.dumps({"id": f"v2-{task.id}", "train": pairs[:-1], "test": pairs[-1:]}))
    (tmp_path / "v2.jsonl").write_text("\n".join(rows))
    small = tmp_path / "v1.jsonl"
    small.write_text(
        "\n".join(
            json.dumps(
                {
                    "id": task.id,
                    "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in task.train],  # type: ignore[union-attr]
                    "test": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in task.test],  # type: ignore[union-attr]
                }
            )
            for task in evaluation
        )
    )
    config = ArcPuzzles(path=str(small), train_paths=(str(tmp_path / "v2.jsonl"),), num_copies=0, num_validation=1)
    with pytest.raises(DataError, match=r'4 of 4 tasks share a pair .* Fix: set overlap = "exclude"'):
        build_arc(config, 0)
    assert len(build_arc(config.model_copy(update={"overlap": "exclude"}), 0).excluded) == 4


@given(grids=st.tuples(GRIDS, GRIDS), form=FORMS)
def test_the_mark_of_a_pair_is_that_of_all_its_forms(grids: tuple[ArcGrid, ArcGrid], form: Form) -> None:
    mark = mark_pair(ArcPair(*grids))
    assert mark_pair(ArcPair(form.apply(grids[0]), form.apply(grids[1]))) == mark
    changed = grids[1].copy()
    changed[0, 0] = 0 if changed[0, 0] else 1
    assert mark_pair(ArcPair(grids[0], changed)) != mark or changed.size == 1


def test_canvases(tmp_path: Path) -> None:
    path = write_set(tmp_path / "own.json", {f"t{seed}": swap(seed, side=3 + seed % 2) for seed in range(4)})
    small = build_arc(ArcPuzzles(path=path, num_copies=1, num_validation=1), 0)
    assert (small.format.rows, small.format.columns) == (4, 4) and small.format.vocab_size == 12
    with pytest.raises(DataError, match=r"own\.json: task t1: the grid is 4 x 4; expected at most 3 x 3"):
        build_arc(ArcPuzzles(path=path, num_copies=1, num_validation=1, canvas=(3, 3)), 0)
    rows = {f"r{i}": {k: [{"input": [[i, 1, 2]], "output": [[i, 2]]}] for k in ("train", "test")} for i in range(3)}
    for name, task in rows.items():
        task["test"] = [{"input": [[int(name[1:]), 4]], "output": [[3]]}]
    flat = build_arc(ArcPuzzles(path=write_set(tmp_path / "rows.json", rows), num_copies=20, num_validation=1), 0)
    assert (flat.format.rows, flat.format.columns) == (1, 3)
    assert {form.turn for task in flat.tasks for form in task.forms} <= {0, 2, 4, 5}, "the others would stand upright"
    hidden = {n: {**t, "test": [{"input": [[1]]}]} for n, t in rows.items()}
    with pytest.raises(DataError, match=r"0 tasks have test outputs that can be scored"):
        build_arc(ArcPuzzles(path=write_set(tmp_path / "hidden.json", hidden), num_copies=1), 0)


# ---- votes -------------------------------------------------------------------------------------------------------


def test_votes_count_before_confidence() -> None:
    a, b, c, d = (np.full((1, i + 1), i, dtype=np.uint8) for i in range(4))
    ranked = rank_candidates([(a, 0.9), (b, 0.2), (b, 0.4), (c, 0.5), (c, 0.3), (d[:, :0], 1.0), (c, 0.1)])
    assert [(int(grid[0, 0]), votes) for grid, votes, _ in ranked] == [(2, 3), (1, 2), (0, 1)]
    assert ranked[0].q == pytest.approx(0.3)
    assert rank_candidates([(a, 0.1), (b, 0.2)])[0].grid is b, "equal votes: the more confident one"
    assert rank_candidates([(a, 0.5), (a.reshape(1, 1), 0.5), (a.reshape(-1, 1), 0.5)])[0].votes == 3
    assert pass_at([ranked, ranked], [b, a], 1) == 0 and pass_at([ranked, ranked], [b, a], 2) == 0.5
    assert pass_at([ranked, ranked], [b, a], 5) == 1.0


def test_the_submission_has_two_attempts_for_every_input() -> None:
    (task,) = [ArcTask("ab", (), (ArcPair(np.zeros((1, 1), np.uint8), None),) * 3, "x")]
    one, two = (np.full((1, 2), i, dtype=np.uint8) for i in (1, 2))
    rankings = [rank_candidates([(one, 0.5), (one, 0.5), (two, 0.5)]), rank_candidates([(two, 0.5)]), []]
    assert build_submission({"ab": rankings}, [task]) == {
        "ab": [
            {"attempt_1": [[1, 1]], "attempt_2": [[2, 2]]},
            {"attempt_1": [[2, 2]], "attempt_2": [[2, 2]]},
            {"attempt_1": [[0]], "attempt_2": [[0]]},
        ]
    }
    with pytest.raises(DataError, match="x: 0 of 3 test inputs are answered"):
        build_submission({}, [task])


def task_of(rule: Callable[[ArcGrid], ArcGrid], seed: int) -> tuple[ArcTask, ArcGrid]:
    generator = np.random.default_rng(seed)
    inputs = [generator.integers(0, 10, (4, 4)).astype(np.uint8) for _ in range(4)]
    pairs = [ArcPair(grid, rule(grid)) for grid in inputs]
    assert pairs[3].output is not None
    return ArcTask("t", tuple(pairs[:3]), (ArcPair(inputs[3], None),), "x"), pairs[3].output


RENAMED = np.array([3, 1, 4, 5, 9, 2, 6, 8, 7, 0], dtype=np.uint8)


@pytest.mark.parametrize(
    "rule",
    [
        lambda g: g,
        lambda g: np.rot90(g),
        lambda g: g.T,
        lambda g: RENAMED[g],
        lambda g: RENAMED[np.fliplr(g)],
        lambda g: np.array([[1, 2]], dtype=np.uint8),
        lambda g: g[:2],
        lambda g: g[:, 2:],
        lambda g: g[:2, :2],
        lambda g: np.hstack([g, g]),
    ],
)
def test_simple_rules_are_found(rule: Callable[[ArcGrid], ArcGrid]) -> None:
    task, output = task_of(rule, 0)
    ((first, *_),) = answer_by_rules(task)
    assert (first.grid == output).all() and first.votes == 3
    assert (answer_by_copying(task)[0][0].grid == task.test[0].input).all()
