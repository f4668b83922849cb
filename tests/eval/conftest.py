"""A tiny random policy with its tokenizer, a scripted completer, and runs that are evaluated for real."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.models.build import build_decoder
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.stage import StageContext
from tafkir.records import Completion, Example, Request
from tafkir.runlog.rundir import RunDir

CONFIG = ModelConfig(
    vocab_size=384,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.4,
)


class Scripted:
    """A completer that answers from a table: (example number, sampled or greedy) -> text."""

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[Request], str], fail_after: int | None = None) -> None:
        self.tokenizer, self.answer, self.fail_after = tokenizer, answer, fail_after
        self.seen: list[Request] = []

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        # Last come, first served: the caller must not rely on the order.
        for request in reversed(requests):
            if self.fail_after is not None and len(self.seen) >= self.fail_after:
                raise KeyboardInterrupt
            self.seen.append(request)
            ids = [*self.tokenizer.encode(self.answer(request)), self.tokenizer.turn_end_id]
            limit = request.params.max_tokens
            reason = "length" if len(ids) > limit else "stop"
            ids = ids[:limit]
            yield Completion(request.id, tuple(ids), (0.0,) * len(ids), reason)  # type: ignore[arg-type]

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        raise NotImplementedError


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Mia has 12 apples and eats 3 of them . 12-3=9 \\boxed{9}"] * 4, 384)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Six problems of two sources."""
    rows = [(7, 2), (9, 4), (15, 6), (20, 11), (8, 1), (30, 5)]
    return [
        Example(f"p{i}", "odd" if i % 2 else "even", "test", f"Mia has {a} apples and eats {b}. Left?", str(a - b))
        for i, (a, b) in enumerate(rows)
    ]


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., Scripted]:
    return lambda answer, fail_after=None: Scripted(tokenizer, answer, fail_after)


def build_completer(checkpoint: Path) -> Engine:
    tokenizer = Tokenizer.load(checkpoint)
    decoder = load_checkpoint(checkpoint).decoder
    return Engine(decoder, eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id), max_batch=32)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Engine:
    """The real engine on random weights."""
    decoder = build_decoder(CONFIG, 3)
    return Engine(decoder, eos_ids=(tokenizer.turn_end_id, tokenizer.document_end_id), max_batch=16)


RECIPE = """\
name = "tiny"
seed = {seed}
threads = 1
[model]
vocab_size = 384
[data]
sources = ["{data}"]
[tokenizer]
vocab_size = 384
[sft]
[rlvr]
[eval]
samples = 2
max_tokens = 12
max_problems = 5
"""


@pytest.fixture(scope="session")
def problem_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems of one's own, thirty of them to train on."""
    rows = []
    names = ("Mia", "Omar", "Lena", "Yusuf", "Ada", "Tariq", "Nora", "Sam")
    things = ("apples", "coins", "cards", "shells", "pencils")
    for i in range(40):
        a, b = 20 + 3 * i, 2 + i % 7
        split = "train" if i < 30 else "test"
        # Wordings of the two parts differ, so that the contamination check has nothing to remove.
        question = (
            f"{names[i % 8]} has {a} {things[i % 5]} and gives away {b}. How many are left?"
            if split == "train"
            else f"A shelf holds {a} books. {names[i % 8]} borrows {b} of those to read at home. Count what stays."
        )
        rows.append(
            f'{{"id": "own/{split}/{i}", "split": "{split}", "question": "{question}", "answer": "{a - b}", '
            f'"equation": "{a} - {b}"}}\n'
        )
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A run directory with two different checkpoints."""
    run = RunDir.create(tmp_path_factory.mktemp("runs") / "tiny")
    for kind, seed in (("sft", 3), ("rlvr", 4)):
        stage = run.stage(kind)  # type: ignore[arg-type]
        save_checkpoint(stage.checkpoint_dir, build_decoder(CONFIG, seed), tokenizer=tokenizer)
    return run.path


@pytest.fixture
def eval_context(tmp_path: Path, trained_run: Path, problem_file: Path) -> Callable[..., StageContext]:
    """Makes the context in which the pipeline calls the eval stage, on a copy of `trained_run`."""

    def build(name: str = "tiny", *, seed: int = 0, edit: Callable[[str], str] = str, **changes: Any) -> StageContext:
        path = tmp_path / name
        if not path.exists():
            shutil.copytree(trained_run, path)
        run = RunDir.open(path)
        run.recipe_path.write_text(edit(RECIPE.format(seed=seed, data=problem_file)), encoding="utf-8")
        recipe = load_recipe([run.recipe_path]).recipe
        previous = run.stage("rlvr").checkpoint_dir
        options = {"previous": previous, "build_completer": build_completer, **changes}
        return StageContext(recipe, run, run.stage("eval"), seed=recipe.seed, **options)

    return build
