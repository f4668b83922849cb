"""`tafkir compare` over results files: verdicts, flips, groups, training text, other tools' files, the page."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.errors import DataError, RecipeError
from tafkir.eval.compare import compare_sides, first_divergence
from tafkir.eval.every_eval_ever import write_every_eval_ever
from tafkir.eval.lm_eval_files import write_lm_eval
from tafkir.eval.samples import Sample
from tafkir.eval.scores import codeforces_rating
from tafkir.eval.sides import load_foreign, load_sides
from tafkir.eval.table import render_scores, score_samples
from tafkir.report.comparison import render_comparison
from tafkir.tasks.ratings import solved_rating

STAMP = "2026-11-22T17-40-55.922546"
# One line as lm-eval 0.4.13 wrote it with --log_samples (its dummy model), hashes cut short.
OF_LM_EVAL = (
    '{"doc_id": 0, "doc": {"question": "What is 0+2?", "answer": "2"}, "target": "2", "arguments": {"gen_args_0": '
    '{"arg_0": "What is 0+2?", "arg_1": {"until": ["\\n\\n"], "do_sample": true, "temperature": 0.7}}}, '
    '"resps": [["lol", "lol"]], "filtered_resps": ["[invalid]"], "filter": "flexible", "metrics": ["exact_match"], '
    '"doc_hash": "036166d1", "prompt_hash": "f1b9c55c", "target_hash": "d4735e3a", "exact_match": 0.0}'
)


def sample(model: str, item: int, right: bool, repeat: int = 0, **other: Any) -> Sample:
    """One answer; the wrong ones differ from the right ones after a common start."""
    fields: dict[str, Any] = {
        "key": f"{model}-{item}-{repeat}-v1",
        "model": model,
        "task": "sums",
        "task_version": "1",
        "item": f"q{item}",
        "source": "made up",
        "subject": "even" if item % 2 == 0 else "odd",
        "difficulty": str(1 + item % 10),
        "repeat": repeat,
        "seed": item,
        "question": f"ما حاصل {item} + 2؟",
        "text": f"Add two to {item}: " + (f"{item + 2}" if right else "nothing"),
        "reasoning": "Let me see.",
        "outcome": "correct" if right else "wrong",
        "reward": float(right),
        "extracted": f"{item + 2}" if right else "nothing",
        "expected": f"{item + 2}",
        "reason": "" if right else "not the sum",
        "tokens": 10 + item % 3,
        "finish_reason": "stop",
        "latency_s": 0.25,
        "fingerprint": "abc",
    }
    return Sample(**{**fields, **other})


def write(path: Path, samples: Sequence[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples), encoding="utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two models in one file: the second loses items 0 to 29 of 200, gains 190 to 194."""
    first = [sample("base", i, right=i < 180) for i in range(200)]
    second = [sample("small", i, right=30 <= i < 180 or 190 <= i < 195) for i in range(200)]
    return write(tmp_path / "results" / "samples.jsonl", first + second)


def test_models_of_one_file_compare(two: Path) -> None:
    row = compare_sides(load_sides([two.parent]), margin=0.02, num_flips=6).pairs[0]["tasks"][0]
    judged = row["judgement"]
    assert judged["verdict"] == "worse" and not judged["non_inferior"]
    assert judged["difference"]["value"] == pytest.approx(-25 / 200)
    assert judged["retention"]["value"] == pytest.approx(155 / 180)
    assert (row["lost"], row["gained"], row["num_items"], row["samples"]) == (30, 5, 200, 1)
    assert row["churn"] == pytest.approx(35 / 200)
    assert [flip["direction"] for flip in row["flips"]] == ["lost"] * 4 + ["gained"] * 2
    flip = row["flips"][0]
    assert flip["texts"][0][: flip["diverges_at"]] == flip["texts"][1][: flip["diverges_at"]]
    assert flip["texts"][0][flip["diverges_at"] :] == flip["expected"] and flip["shares"] == [1, 0]
    kinds = {(group["kind"], group["group"]): group for group in row["groups"]}
    assert len(kinds) == 2 + 10 and ("source", "made up") not in kinds
    assert [group for kind, group in kinds if kind == "difficulty"] == [str(level) for level in range(1, 11)]
    assert kinds["subject", "even"]["num_problems"] == 100


def test_failures_are_left_out_and_counted(two: Path, tmp_path: Path) -> None:
    samples = [sample("base", i, right=True) for i in range(40)]
    other = [sample("mine", i, right=True) for i in range(40)]
    other[3] = replace(other[3], outcome="error", reward=0.0)
    sides = load_sides([write(tmp_path / "a.jsonl", samples), write(tmp_path / "b.jsonl", other)])
    compared = compare_sides(sides, margin=0.2)
    row = compared.pairs[0]["tasks"][0]
    assert row["num_items"] == 39 and row["failed"] == [0, 1] and row["scores"][1]["value"] == 1
    assert row["judgement"]["verdict"] == "equivalent"
    assert compared.notes == ["sums: 1 items lack an answer on one side and are left out."]
    short = write(tmp_path / "c.jsonl", [replace(s, model="short") for s in samples[:30]])
    with pytest.raises(DataError, match=r"170 items were answered on one side only.*--common"):
        compare_sides(load_sides([two, short])[1:])
    with pytest.raises(RecipeError, match="two or more"):
        compare_sides(load_sides([short]))


def test_several_models_are_corrected_together(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", [sample(name, i, right=i >= lost) for i in range(60)])
        for name, lost in (("a", 0), ("b", 6), ("c", 8))
    ]
    compared = compare_sides(load_sides(files))
    p = [pair["tasks"][0]["judgement"] for pair in compared.pairs]
    assert [pair["second"] for pair in compared.pairs] == ["b", "c"]
    assert p[1]["p_holm"] == pytest.approx(2 * p[1]["difference"]["p_value"])
    assert p[0]["p_holm"] == pytest.approx(p[0]["difference"]["p_value"])


def test_pass_and_majority_are_compared_in_pairs(tmp_path: Path) -> None:
    """Three answers an item; the second model is right once where the first is right twice."""
    rows = [sample("a", i, right=r < 2 * (i % 2), repeat=r, task="arc-agi-1") for i in range(40) for r in range(3)]
    rows += [sample("b", i, right=r < i % 2, repeat=r, task="arc-agi-1") for i in range(40) for r in range(3)]
    sides = load_sides([write(tmp_path / "samples.jsonl", rows)])
    (row,) = compare_sides(sides).pairs[0]["tasks"]
    values = {other["metric"]: [side["value"] for side in other["scores"]] for other in row["others"]}
    # unbiased: of three answers with two right ones any two hold one, with one right one two of three pairs do
    assert values == {"pass@2": [0.5, pytest.approx(1 / 3)], "pass@3": [0.5, 0.5], "maj@3": [0.5, 0.0]}
    assert row["others"][2]["difference"]["losses"] == 20 and row["others"][1]["difference"]["value"] == 0
    assert row["judgement"]["difference"]["value"] == pytest.approx(-1 / 6)
    quoted = compare_sides(sides, metrics={"arc-agi-1": "pass@2"})
    (row,) = quoted.pairs[0]["tasks"]
    assert row["judgement"]["difference"]["value"] == pytest.approx(-1 / 6) and row["scores"][0]["value"] == 0.5
    assert [other["metric"] for other in row["others"]] == ["pass@3", "maj@3", "mean"]
    assert any(line.endswith("(pass@2)") for line in quoted.lines())
    assert "maj@3" in render_comparison(quoted.to_dict())


def test_codeforces_ratings_have_intervals_and_a_difference(tmp_path: Path) -> None:
    def solved(model: str, top: int) -> list[Sample]:
        return [sample(model, i, right=i < top, source="codeforces", task="codeforces", difficulty=str(800 + 40 * i))
                for i in range(60)]  # fmt: skip

    weak, strong = solved("weak", 20), solved("strong", 30)
    ratings = [codeforces_rating(side) for side in (weak, strong)]
    assert ratings[0] and ratings[1] and ratings[0]["value"] < 1700 < ratings[1]["high"]
    assert codeforces_rating([sample("a", 1, right=True)]) is None, "no rating of what is no contest"
    sides = load_sides([write(tmp_path / "samples.jsonl", weak + strong)])
    compared = compare_sides(sides)
    found = compared.pairs[0]["tasks"][0]["rating"]["difference"]
    assert found["value"] == pytest.approx(ratings[1]["value"] - ratings[0]["value"]) and found["low"] > 0
    # The interval against an independent one: problems drawn again with replacement, both models on the same.
    generator = random.Random(0)
    pairs = [[(800.0 + 40 * i, i < top) for i in range(60)] for top in (20, 30)]
    changes = []
    for _ in range(150):
        taken = [generator.randrange(60) for _ in range(60)]
        first, second = (solved_rating([side[i] for i in taken])[0] for side in pairs)
        changes.append(second - first)
    width = (found["high"] - found["low"]) / (2 * 1.96)
    assert width == pytest.approx(stdev(changes), rel=0.35)
    assert any(line.startswith("  rating") for line in compared.lines())
    (row,) = score_samples(strong)
    assert "above" in render_scores([row]) and "rating" in render_scores([row])


def test_divergence_starts_at_a_word() -> None:
    assert first_divergence("so it is 12 then", "so it is 15 then") == len("so it is ")
    assert first_divergence("same", "same") == 4
    assert first_divergence("same", "same and more") == 0
    assert first_divergence("a b", "a b c") == 2
    assert first_divergence("", "x") == 0


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_writes_a_page_and_knows_training_text(two: Path, tmp_path: Path) -> None:
    long = "in a village far away there lived a man who had seven goats and {} sheep in all"
    told = [long.format(n) if n < 10 else f"Another tale, {n} words long" for n in range(40)]
    samples = [replace(s, question=told[s.seed]) for m in ("a", "b") for s in _half(m)]
    file = write(tmp_path / "long.jsonl", samples)
    trained = tmp_path / "train.jsonl"
    trained.write_text(json.dumps({"messages": [{"content": f"Once, {long.format(5)}, so they say."}]}) + "\n")
    page = tmp_path / "page.html"
    runner = CliRunner()
    done = runner.invoke(app, ["compare", str(two), "--margin", "2", "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "worse" in done.stdout and "30 down, 5 up of 200" in done.stdout and "could have been seen" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert 'dir="auto"' in text and "<mark" in text and "ما حاصل" in text and "<script" not in text
    found = runner.invoke(app, ["compare", str(file), "--trained-on", str(trained), "--json"])
    clean = json.loads(found.stdout)["pairs"][0]["tasks"][0]["clean"]
    # Numbers count as alike, so one telling covers all ten questions of its kind.
    assert clean["num_seen"] == 10 and clean["judgement"]["difference"]["num_problems"] == 30
    assert clean["shared"]["q0"].startswith("in a village far away")
    planned = runner.invoke(app, ["compare", str(two), "--plan", "--margin", "1"])
    assert planned.exit_code == 0 and "200 items x1 show" in planned.stdout
    wrong = runner.invoke(app, ["compare", str(two), "--html", "page.txt"])
    assert isinstance(wrong.exception, RecipeError) and "ends in .html" in str(wrong.exception)


def _half(model: str) -> list[Sample]:
    return [sample(model, i, right=i % 2 == 0) for i in range(40)]


# ---- other tools -------------------------------------------------------------------------------------------------


def test_samples_of_lm_eval_are_read(tmp_path: Path) -> None:
    place = tmp_path / "out" / "dummy"
    place.mkdir(parents=True)
    (place / f"samples_sums_local_{STAMP}.jsonl").write_text(OF_LM_EVAL + "\n")
    (place / f"results_{STAMP}.json").write_text('{"model_name": "m/x", "versions": {"sums_local": 1.5}}')
    found = load_foreign(tmp_path)
    assert found is not None and len(found) == 1
    one = found[0]
    assert (one.model, one.task, one.task_version, one.item, one.outcome) == ("m/x", "sums_local", "1.5", "0", "wrong")
    assert (one.text, one.extracted, one.expected, one.question) == ("lol", None, "2", "What is 0+2?")
    (place / f"samples_sums_local_{STAMP}.jsonl").write_text(
        OF_LM_EVAL.replace('"exact_match": 0.0', '"exact_match": 7') + "\n"
    )
    with pytest.raises(DataError, match="exact_match is 7"):
        load_foreign(tmp_path)
    assert load_foreign(tmp_path / "out" / "nothing") is None


@pytest.mark.parametrize("tool", ["lm-eval", "every-eval-ever"])
def test_exports_come_back(tool: str, tmp_path: Path) -> None:
    samples = [sample("org/model", i, right=(i + r) % 3 == 0, repeat=r) for i in range(6) for r in range(2)]
    lost = replace(samples[3], outcome="error", reason="503", reward=0.0)
    source = write(tmp_path / "samples.jsonl", [*samples[:3], lost, *samples[4:]])
    done = CliRunner().invoke(app, ["export", tool, str(source), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    back = load_foreign(tmp_path / "out")
    assert back is not None
    keep = ("task", "item", "text", "expected", "extracted", "outcome", "reward", "subject", "difficulty")
    if tool == "lm-eval":
        kept = [s for s in samples if s.key != lost.key]
        # A failure is no answer there, so the repeats that follow it move up.
        assert [[getattr(s, k) for k in keep] for s in back] == [[getattr(s, k) for k in keep] for s in kept]
    else:
        wanted = [*samples[:3], lost, *samples[4:]]
        more = (*keep, "key", "repeat", "seed", "reasoning", "latency_s", "tokens", "question", "reason")
        assert [[getattr(s, k) for k in more] for s in back] == [[getattr(s, k) for k in more] for s in wanted]
        log = json.loads(next(p for p in (tmp_path / "out").rglob("*.json")).read_text())
        details = log["detailed_evaluation_results"]
        assert details["total_rows"] == 12 and (tmp_path / "out" / details["file_path"]).is_file()
        assert log["evaluation_results"][0]["score_details"]["details"] == {"failed": "1"}


def test_writers_keep_models_apart(tmp_path: Path) -> None:
    samples = [sample(model, i, right=True) for model in ("a/b", "c") for i in range(3)]
    files = write_lm_eval(samples, tmp_path / "lm", STAMP)
    assert [file.parent.name for file in files] == ["a__b"] * 2 + ["c"] * 2
    paths = write_every_eval_ever(samples, tmp_path / "eee", organization="me", now=1_790_000_000.5)
    assert {path.parent.relative_to(tmp_path / "eee").as_posix() for path in paths} == {
        "data/tafkir/a/b",
        "data/tafkir/me/c",
    }
