"""Training for quantization, killed with SIGKILL again and again, ends bit for bit like a run that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tafkir.checkpoint import load_checkpoint
from tafkir.quant.fake import FakeQuantizer
from tafkir.recipe.load import load_recipe
from tests.e2e.conftest import Tafkir, differing, outcome

KILLS = {
    "in the middle of the second step": ("os.rename", r"08-qat/state/step-00000001", 1, 0.02),
    "before the state has its name": ("os.rename", r"08-qat/state/step-00000002", 1, 0.0),
    "with the old state and the new one there": ("os.remove", r"08-qat/state/step-00000002", 1, 0.0),
    "its checkpoint written but not in place": ("os.rename", r"08-qat/checkpoint$", 1, 0.0),
    "between its checkpoint and its result": ("os.rename", r"08-qat/result\.json", 1, 0.0),
    "while it is quantized": ("os.rename", r"10-quantize/ptq$", 1, 0.0),
}


def test_a_killed_run_ends_like_an_unbroken_one(
    tafkir: Tafkir, tiny: tuple[str, ...], reference: Path, tmp_path: Path
) -> None:
    base = json.dumps(str(reference / "stages" / "03-sft" / "checkpoint"))
    keys = [f"base={base}", *(f"{stage}=" for stage in ("tokenizer", "pretrain", "sft", "rlvr", "eval", "report"))]
    keys += ["qat.steps=4", "qat.batch_problems=4", "qat.save_every=1", "qat.log_every=1", "qat.warmup_steps=1"]
    keys += ["qat.max_completion_tokens=12", "qat.baseline=true", "qat.learning_rate=3e-3", "qat.story_share=0"]
    keys += ["quantize.preset=all-linear"]
    command = [*tiny, *(word for key in keys for word in ("--set", key))]
    for moment, (event, path, count, after_s) in KILLS.items():
        done = tafkir(*command, cwd=tmp_path, kill={"event": event, "path": path, "count": count, "after_s": after_s})
        assert done.code == -9, f"{moment}: the process was not killed\n{done.err}"
    assert tafkir(*command, cwd=tmp_path).code == 0
    whole = tafkir(*command, "--name", "whole", cwd=tmp_path)
    assert whole.code == 0, whole.err
    broken, unbroken = tmp_path / "runs" / "tiny", tmp_path / "runs" / "whole"
    assert differing(outcome(broken), outcome(unbroken)) == []
    result = json.loads((unbroken / "stages/08-qat/result.json").read_text())
    assert result["objective"] == "distill" and min(result["kl_before"], result["kl_after"]) > 0
    rows = [json.loads(row) for row in (unbroken / "stages/08-qat/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["train/kl"] > 0 and row["train/grad_norm"] > 0 for row in rows)

    assert rows[-1]["validation/kl"] == pytest.approx(result["kl_after"])

    # What was trained is what was written; what came before is written beside it.
    recipe = load_recipe([str(unbroken / "recipe.resolved.toml")]).recipe
    for name, source in (("checkpoint", unbroken / "stages/08-qat/checkpoint"), ("ptq", Path(json.loads(base)))):
        decoder = load_checkpoint(source).decoder
        assert recipe.quantize is not None
        worth = FakeQuantizer(decoder, recipe.quantize)(dict(decoder.named_parameters()))
        written = load_checkpoint(unbroken / "stages/10-quantize" / name).decoder.state_dict()
        assert worth and all((written[key] == values).all() for key, values in worth.items())

    # The text may be learnt, too.
    text = [*command, "--set", "qat.objective=sft", "--set", "qat.data=solutions", "--set", "quantize="]
    text += ["--set", "quantize.scheme=nvfp4_w4a16", "--name", "text", "--only", "qat"]
    assert tafkir(*text, cwd=tmp_path).code == 0
    rows = [json.loads(row) for row in (tmp_path / "runs/text/stages/08-qat/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
