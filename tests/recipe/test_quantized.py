"""The `quantized` fragment goes on from a finished run: what was trained before is not trained again."""

from __future__ import annotations

from pathlib import Path

from tafkir.recipe.fingerprint import fingerprint_stages
from tafkir.recipe.load import load_recipe


def test_a_finished_run_is_gone_on_with(tmp_path: Path) -> None:
    plain, laid = load_recipe(["wordmath-tiny"]).recipe, load_recipe(["wordmath-tiny", "quantized"]).recipe
    before, after = fingerprint_stages(plain, tmp_path), fingerprint_stages(laid, tmp_path)
    assert laid.name == plain.name and all(before[kind] == after[kind] for kind in ("sft", "rlvr", "rlhf"))
    assert set(after) - set(before) == {"qat"} and before["eval"] != after["eval"]
    assert laid.eval is not None and laid.eval.stages == ("rlhf", "ptq", "quantize")
    assert laid.qat is not None and laid.qat.baseline and laid.eval.activations == "quantized"
