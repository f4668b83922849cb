"""The same puzzles for recursive and language models: one grader, one table, and costs that can be counted again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from tafkir.checkpoint.save import save_checkpoint
from tafkir.checkpoint.trm import load_trm, save_trm
from tafkir.cli.card import show_card
from tafkir.cli.evaluate import evaluate
from tafkir.data.puzzles.arc_sets import ArcSets
from tafkir.data.puzzles.rules import is_right
from tafkir.data.puzzles.sudoku import Box, fingerprint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.arc import answer_tasks
from tafkir.errors import DataError, RecipeError
from tafkir.eval.efficiency import CardSettings, Contestant, measure_card, render_card_table
from tafkir.eval.puzzles import count_seen
from tafkir.models.build import build_decoder
from tafkir.models.trm import build_trm
from tafkir.plan.flops import completion_flops, recursion_flops
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.puzzles import ArcPuzzles, MazePuzzles, Puzzles, SudokuPuzzles
from tafkir.recipe.trm import TrmModelConfig, TrmShape
from tafkir.report.card import render_card, scatter
from tafkir.runlog.metrics import read_jsonl
from tafkir.tasks.arc_task import ArcSetTask
from tafkir.tasks.puzzle_sets import (
    PuzzleSetTask,
    build_for,
    form_mark,
    load_puzzle_task,
    read_answer,
    read_question,
)
from tests.eval.conftest import CONFIG, build_completer

FEW = {"num_train": 4, "num_validation": 2, "num_test": 6}
TINY = TrmModelConfig(
    hidden_size=16, intermediate_multiple=8, mixer="mlp", position_encoding="none", prefix_length=0, num_recursions=2,
    num_latent_steps=2, max_supervision_steps=3,
)  # fmt: skip
RECIPE = """
name = "few"
[trm]
[trm.puzzles]
kind = "sudoku"
num_train = 4
num_validation = 2
num_test = 6
"""


def task_of(puzzles: Puzzles) -> PuzzleSetTask:
    return PuzzleSetTask("few", build_for(puzzles, 0))


@pytest.fixture(scope="module")
def sudoku() -> PuzzleSetTask:
    return task_of(SudokuPuzzles(**FEW))


@pytest.fixture(scope="module")
def maze() -> PuzzleSetTask:
    return task_of(MazePuzzles(**FEW, rows=7, columns=7, min_path=4))


# ---- the task ----------------------------------------------------------------------------------------------------


def test_a_grid_and_the_words_for_it_get_the_same_verdict(sudoku: PuzzleSetTask) -> None:
    generator = np.random.default_rng(0)
    for example in sudoku.examples("test"):
        question, label = (np.array(example.extra[name], dtype=np.uint8) for name in ("question", "label"))
        assert sudoku.grade(example, sudoku.write(label)).correct
        assert sudoku.grade(example, f"<think>1 or 2?</think> \\boxed{{{example.answer}}}").correct
        assert (read_question(sudoku.format, example.question) == question).all()
        for _ in range(5):
            answer = label.copy()
            answer[generator.integers(16)] = generator.integers(1, 6)
            right = is_right(sudoku.format, question, answer)
            assert sudoku.grade(example, sudoku.write(answer)).correct == right == bool((answer == label).all())


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        ("\\boxed{12}", "wrong", "has 2 cells"),
        ("\\boxed{1234 3412 2143 432x}", "wrong", "unknown symbol 'X'"),
        ("<think>hm", "no_answer", "never ends"),
        ("", "no_answer", "no answer"),
    ],
)
def test_answers_that_are_no_grid(sudoku: PuzzleSetTask, text: str, outcome: str, reason: str) -> None:
    verdict = sudoku.grade(sudoku.examples("test")[0], text)
    assert verdict.outcome == outcome and reason in verdict.reason and verdict.reward == 0


def test_a_maze_is_answered_by_moves_or_by_its_marked_grid(maze: PuzzleSetTask) -> None:
    for example in maze.examples("test"):
        label = np.array(example.extra["label"], dtype=np.uint8)
        question = np.array(example.extra["question"], dtype=np.uint8)
        assert (read_answer(maze.format, question, example.answer) == label).all()
        assert maze.grade(example, f"\\boxed{{{example.answer}}}").correct
        assert maze.grade(example, f"\\boxed{{{', '.join(example.answer.lower())}}}").correct
        assert maze.grade(example, maze.write(label)).correct
        assert (read_question(maze.format, example.question.translate(str.maketrans(".E", " G"))) == question).all()
        there_and_back = example.answer[0] + {"U": "D", "D": "U", "L": "R", "R": "L"}[example.answer[0]]
        assert maze.grade(example, f"\\boxed{{{there_and_back + example.answer}}}").correct, "the same way"
        assert "before E" in maze.grade(example, f"\\boxed{{{example.answer[:-1]}}}").reason
        assert "into a wall" in maze.grade(example, "\\boxed{UUUUUUUUU}").reason


def test_examples_of_one_recipe_are_the_puzzles_of_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "few.toml"
    path.write_text(RECIPE)
    task = load_puzzle_task(str(path))
    puzzles = build_for(SudokuPuzzles(**FEW), 0)
    assert task.name == "few" and len({e.id for part in ("test", "train") for e in task.examples(part)}) == 10  # type: ignore[arg-type]
    assert (task.cells(task.examples("test")) == puzzles.test.inputs).all()
    with pytest.raises(RecipeError, match=r"sudoku5.*sudoku4"):
        load_puzzle_task("sudoku5")
    with pytest.raises(RecipeError, match="no puzzles"):
        load_puzzle_task(str(Path(__file__).parents[2] / "recipes" / "smoke.toml"))


# ---- FLOPs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prefix_length": 2},
        {"mixer": "attention", "position_encoding": "rope", "num_attention_heads": 2},
        {"latents": "z"},
        {"gradient": "one_step"},
        {"separate_networks": True},
    ],
    ids=str,
)
def test_flops_of_a_recursion_are_those_that_torch_counts(given: dict[str, Any]) -> None:
    shape = TINY.model_copy(update=given).for_puzzles(6, 16)
    model = build_trm(TrmShape.model_validate(shape.model_dump()), 0)
    inputs = torch.ones(5, 16, dtype=torch.int64)
    # The fused attention of the CPU is not among what torch counts.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        list(model.steps(inputs, count=3))
    assert counter.get_total_flops() / 5 == pytest.approx(recursion_flops(shape, 3), rel=1e-6)


def test_flops_of_a_completion_are_those_that_torch_counts() -> None:
    """Of transformers' Qwen3 with a cache; its prompt's attention is a square of which the causal one is a half."""
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, attn_implementation="eager", tie_word_embeddings=False)).eval()
    prompt, new = 11, 7
    products: Counter[str] = Counter()
    cache, ids = None, torch.zeros(1, prompt, dtype=torch.int64)
    for token in range(new):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, torch.zeros(1, 1, dtype=torch.int64)
        for name, count in counter.get_flop_counts()["Global"].items():
            attention = "bmm" in str(name)
            causal = (prompt + 1) / (2 * prompt) if attention and token == 0 else 1.0
            products["attention" if attention else "weights"] += count * causal
    config = ModelConfig(model_type="qwen3", num_experts=0, partial_rotary_factor=1.0, **sizes)  # type: ignore[arg-type]
    assert products["attention"] > 0
    # Weights of norms are counted as products, too: less than a hundredth.
    assert completion_flops(config, prompt, new) == pytest.approx(sum(products.values()), rel=0.01)
    assert completion_flops(config, prompt, 0) == 0


# ---- the card ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contestants(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sudoku: PuzzleSetTask
) -> list[Contestant]:
    folder = tmp_path_factory.mktemp("card")
    shape = TINY.for_puzzles(sudoku.format.vocab_size, sudoku.format.num_cells)
    save_trm(folder / "recursive", build_trm(shape, 1), sudoku.format)
    save_checkpoint(folder / "language", build_decoder(CONFIG, 3), tokenizer=tokenizer)
    return [Contestant(name, folder / name) for name in ("recursive", "language")]


def test_both_kinds_of_models_stand_in_one_table(
    contestants: list[Contestant], sudoku: PuzzleSetTask, tmp_path: Path
) -> None:
    settings = CardSettings(max_tokens=8, timed=2, limit=5)
    card = measure_card(sudoku, contestants, settings, build_completer=build_completer, folder=tmp_path)
    assert card == json.loads(json.dumps(card)) or card["num_puzzles"] == 5
    final, halting, language, search = card["rows"]
    assert [row["kind"] for row in card["rows"]] == ["recursive", "recursive", "language", "search"]
    assert search["accuracy"]["value"] == 1.0 and search["accuracy"]["num_problems"] == 5
    shape = TINY.for_puzzles(6, 16)
    assert final["flops"] == recursion_flops(shape, 3) == final["curve"][-1][0]
    assert final["accuracy"]["value"] == final["curve"][-1][1] and halting["amount"] == 3, "q starts below zero"
    assert final["parameters"] == shape.num_parameters()
    assert language["parameters"] == CONFIG.num_parameters() > language["active_parameters"]
    for row in (final, halting, language):
        records = list(read_jsonl(tmp_path / row["records"]))
        assert len(records) == 5 and all(row["seconds"] > 0 and row["bytes_on_disk"] > 0 for row in (final, language))
        assert sum(record["outcome"] == "correct" for record in records) == 5 * row["accuracy"]["value"]
        assert [record["question"] for record in records] == [e.question for e in sudoku.examples("test")][:5]
    table, page = render_card_table(card), render_card(json.loads(json.dumps(card)))
    assert all(name in table and name in page for name in ("recursive", "language", "search"))
    assert page.count("<circle") == 3 + 2, "three steps (the last large), the ring, the language model"


def test_a_card_again_reuses_answers_and_is_the_same(
    contestants: list[Contestant], sudoku: PuzzleSetTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CardSettings(max_tokens=8, timed=1, limit=3)
    cards = [
        measure_card(sudoku, contestants, settings, build_completer=build_completer, folder=tmp_path) for _ in range(2)
    ]
    for card in cards:
        for row in card["rows"]:
            for measured in ("seconds", "joules", "peak_bytes"):
                del row[measured]
    assert cards[0] == cards[1]


@pytest.mark.parametrize(
    ("table", "seen"),
    [
        ({}, 0),
        ({"num_train": 5}, None),
        ({"num_train": 40, "num_validation": 1, "num_test": 1}, 6),
    ],
)
def test_puzzles_that_training_knew_are_counted(table: dict[str, int], seen: int | None, tmp_path: Path) -> None:
    """The same recipe shares no form between its parts; another one's training may hold forms of its test puzzles."""
    origin = SudokuPuzzles(**FEW)
    task = PuzzleSetTask("few", build_for(origin, 0), (origin, 0))
    checkpoint = tmp_path / "run" / "stages" / "01-trm" / "checkpoint"
    examples = task.examples("test")
    assert count_seen(checkpoint, task, examples) is None
    keys = "\n".join(f"{name} = {value}" for name, value in {**FEW, **table}.items())
    checkpoint.mkdir(parents=True)
    recipe = f'name = "run"\n[trm]\n[trm.puzzles]\nkind = "sudoku"\n{keys}\n'
    (tmp_path / "run" / "recipe.resolved.toml").write_text(recipe)
    found = count_seen(checkpoint, task, examples)
    forms = build_for(SudokuPuzzles(**{**FEW, **table}), 0)
    grids = {fingerprint(question, Box(2, 2)) for question in forms.train.inputs}
    assert found == sum(fingerprint(question, Box(2, 2)) in grids for question in task.cells(examples))
    assert found == seen or seen is None
    # A form of a puzzle is that puzzle.
    turned = np.array([rotate.reshape(4, 4).T.ravel() for rotate in task.cells(examples)])
    marks = [[form_mark(task.format, grid) for grid in grids] for grids in (task.cells(examples), turned)]
    assert marks[0] == marks[1]


def test_arc_tasks_have_two_attempts(contestants: list[Contestant], tmp_path: Path) -> None:
    """Forms vote in a recursive model, a language model answers greedily and once more; grids are graded alike."""
    pair = {"input": [[1, 0], [2, 0]], "output": [[0, 1], [0, 2]]}
    other = {"input": [[3, 0], [0, 4]], "output": [[0, 3], [4, 0]]}
    tasks = [{"id": name, "train": [pair, other][::turn], "test": [{**other, "input": [[turn % 7, 5], [0, 6]]}]}
             for name, turn in (("a", 1), ("b", -1), ("c", 1))]  # fmt: skip
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    puzzles = ArcPuzzles(path=str(tmp_path / "tasks.json"), num_copies=2, num_validation=1)
    sets = build_for(puzzles, 0)
    assert isinstance(sets, ArcSets)
    task = ArcSetTask("arc", sets)
    (example, second) = task.examples("test")
    right = np.array(example.extra["output"], dtype=np.uint8)
    assert (
        task.grade(example, task.write(right)).correct and task.grade(example, f"\\boxed{{{example.answer}}}").correct
    )
    assert task.grade(example, task.write(right + 1)).outcome == "wrong" and not task.examples("train")
    assert task.grade(example, task.write(None)).outcome == "no_answer" and example.question != second.question
    shape = TINY.model_copy(update={"prefix_length": 1, "puzzle_embedding_size": 16})
    model = build_trm(shape.for_puzzles(sets.format.vocab_size, sets.format.num_cells, sets.num_puzzle_ids), 1)
    save_trm(tmp_path / "arc", model, sets.format, identifiers=sets.identifiers)
    who = [Contestant("recursive", tmp_path / "arc"), contestants[1]]
    settings = CardSettings(max_tokens=4, timed=1)
    card = measure_card(task, who, settings, build_completer=build_completer, folder=tmp_path)
    recursive, language = card["rows"]
    assert recursive["amount"] == 3 * 3 and recursive["flops"] == recursion_flops(model.shape, 9)
    assert recursive["active_parameters"] == recursive["parameters"] - 16 * sets.num_puzzle_ids
    for row in (recursive, language):
        records = list(read_jsonl(tmp_path / row["records"]))
        assert [record["repeat"] for record in records] == [0, 1, 0, 1] and row["first_attempt"] == 0
    submission = [candidate.grid.tolist() for candidate in answer_tasks(load_trm(who[0].path), task.tasks([example]))[
        example.extra["task"]][0][:1]]  # fmt: skip
    best = next(iter(read_jsonl(tmp_path / recursive["records"])))
    assert best["text"] == (task.write(np.array(submission[0], dtype=np.uint8)) if submission else "")


def test_what_cannot_be_asked(
    contestants: list[Contestant], sudoku: PuzzleSetTask, maze: PuzzleSetTask, tmp_path: Path
) -> None:
    def measure(task: PuzzleSetTask, who: list[Contestant]) -> None:
        measure_card(task, who, CardSettings(), build_completer=build_completer, folder=tmp_path)

    with pytest.raises(DataError, match=r"solves sudoku, 4 x 4.*few: maze, 7 x 7"):
        measure(maze, contestants[:1])
    with pytest.raises(DataError, match="share a name"):
        measure(sudoku, [contestants[0], contestants[0]])


def test_the_command_writes_a_card(
    contestants: list[Contestant], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE)
    given = [f"ours={contestants[0].path}", str(contestants[1].path)]
    show_card(given, str(recipe), name=None, runs_dir=tmp_path, as_json=True, limit=2, max_tokens=4)
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["rows"]] == ["ours", "ours", "language", "search"]
    assert json.loads((tmp_path / "card-few" / "card.json").read_text())["rows"] == shown["rows"]
    assert (tmp_path / "card-few" / "card.html").read_text().startswith("<!doctype html>")
    plain = dict.fromkeys(("overrides", "name", "lengths", "depths", "samples", "needles"))
    evaluate([str(contestants[0].path)], str(recipe), runs_dir=tmp_path, as_json=True, **plain)  # type: ignore[arg-type]
    alone = json.loads(capsys.readouterr().out)
    assert alone["run"] == str(tmp_path / "few-recursive") and len(alone["rows"]) == 3
    for wrong, message in (({"task": "sudoku5"}, "problems, needle"), ({"samples": 3}, "--samples belongs to")):
        given = {"task": str(recipe), **plain, **wrong}
        with pytest.raises(RecipeError, match=message):
            evaluate([str(contestants[0].path)], runs_dir=tmp_path, as_json=True, **given)  # type: ignore[arg-type]


def test_a_figure_without_anything_to_draw() -> None:
    assert scatter([]) == ""
