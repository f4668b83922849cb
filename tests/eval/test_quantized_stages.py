"""What a run says of its quantized checkpoints: which folders are scored, as what, and the share that they keep."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tafkir.cli.completer import completer_builder
from tafkir.eval.stage import run_eval
from tafkir.intervals import student_t_quantile
from tafkir.recipe.load import load_recipe
from tafkir.recipe.stage import StageContext
from tafkir.records import Request
from tafkir.report.collect import collect
from tafkir.report.findings import headline, retention_rows
from tafkir.report.markdown import render_markdown
from tafkir.report.render import render_html
from tafkir.runlog.rundir import RunDir
from tests.eval.conftest import Scripted

Context = Callable[..., StageContext]

TABLES = """\
max_problems = 0
stages = ["rlvr", "ptq", "quantize"]
activations = "quantized"
[qat]
baseline = true
[quantize]
preset = "all-linear"
"""


def put_checkpoints(run: RunDir) -> None:
    """Stand-ins for the quantized ones: what is asked is which folder, not what lies there."""
    for path in (run.stage("quantize").checkpoint_dir, run.stage("quantize").path / "ptq"):
        shutil.copytree(run.stage("rlvr").checkpoint_dir, path)


def test_shares_are_those_of_the_answers(
    eval_context: Context, scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    # How many of the ten problems each checkpoint gets right; the answers tell problems apart by their numbers.
    right = {"06-rlvr": 8, "ptq": 4, "10-quantize": 7}

    def build(checkpoint: Path) -> Scripted:
        asked.append(checkpoint)
        name = checkpoint.name if checkpoint.name == "ptq" else checkpoint.parent.name

        def answer(request: Request) -> str:
            words = engine.tokenizer.decode(list(request.prompt_ids))
            books = int(words.split("holds ")[1].split()[0])
            borrowed = int(words.split("borrows ")[1].split()[0])
            number = (books - 20) // 3 - 30
            return f"\\boxed{{{books - borrowed if number < right[name] else 0}}}"

        engine = scripted(answer)
        return engine

    ctx = eval_context(edit=lambda text: text.replace("max_problems = 5\n", TABLES), build_completer=build)
    put_checkpoints(ctx.run)
    result = json.loads(json.dumps(run_eval(ctx), allow_nan=False))
    assert [path.parent.name for path in asked] == ["06-rlvr", "10-quantize", "10-quantize"]
    assert asked[1].name == "ptq" and list(result["stages"]) == ["rlvr", "ptq", "quantize"]
    kept = {(row["after"], row["metric"]): row for row in result["retention"] if row["source"] == "all"}
    assert kept["ptq", "average"]["value"] == kept["ptq", "greedy"]["value"] == pytest.approx(0.5)
    assert kept["quantize", "average"]["value"] == pytest.approx(7 / 8)
    for (name, _), row in kept.items():
        # Fieller's ends are those ratios at which a paired t-test stands exactly at its limit.
        before, after = (
            [float(i < right[key]) for i in range(10)] for key in ("06-rlvr", name.replace("quantize", "10-quantize"))
        )
        for end in (row["low"], row["high"]):
            gaps = [b - end * a for a, b in zip(before, after, strict=True)]
            mean = sum(gaps) / 10
            error = (sum((gap - mean) ** 2 for gap in gaps) / 9 / 10) ** 0.5
            assert abs(mean) / error == pytest.approx(student_t_quantile(0.975, 9), rel=1e-6)
    # The same answers under other settings would not be taken for these.
    ctx.stage.make()
    ctx.stage.write_result({"finished": True, **result})
    check_page(ctx.run)


def check_page(run: RunDir) -> None:
    record = collect(run, num_chains=0)
    told = [text.replace("\u202f", " ") for text in (headline(record).sentence, *headline(record).beside)]
    assert told[0].startswith("Quantized, the model keeps 87.5 % of its score (95 % interval ")
    assert told[1].startswith("Without training for it, it keeps 50.0 % (")
    rows = [[cell.replace("\u202f", " ") for cell in row] for row in retention_rows(record.evaluation)]
    assert [row[:4] for row in rows[:2]] == [
        ["Quantized untrained", "all", "sampled", "50.0 %"],
        ["Quantized untrained", "all", "greedy", "50.0 %"],
    ]
    for page in (render_html(record), render_markdown(record)):
        assert "What quantization kept" in page and "50.0\u202f%" in page
    # A mark without a colour is not seen: every class of a series has one.
    page = render_html(record)
    assert set(re.findall(r'class="[^"]*\b(c-\w+)', page)) <= set(re.findall(r"\.(c-\w+)", page))
    for row in record.evaluation["retention"]:
        row["high"] = None
    said = headline(record)
    assert said.sentence.endswith("too few right answers to say what it keeps.") and "keeps" not in said.beside[0]


def test_the_base_is_scored_where_it_is_named(eval_context: Context, trained_run: Path) -> None:
    base = json.dumps(str(RunDir.open(trained_run).stage("sft").checkpoint_dir))

    def edit(text: str) -> str:
        text = f"base = {base}\n" + text.replace("[tokenizer]\nvocab_size = 384\n", "")
        return text.replace("max_problems = 5\n", 'max_problems = 2\nstages = ["base", "rlvr"]\n')

    assert list(run_eval(eval_context(edit=edit))["stages"]) == ["base", "rlvr"]


def test_engines_of_the_eval_stage_round_inputs_where_it_is_asked_for() -> None:
    for asked, served in (("exact", False), ("quantized", True)):
        recipe = load_recipe(["wordmath-tiny"], [f"eval.activations={asked}"]).recipe
        assert completer_builder(recipe, "eval").served is served  # type: ignore[attr-defined]
        assert completer_builder(recipe, "rlvr").served is False  # type: ignore[attr-defined]
