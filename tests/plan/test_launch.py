"""Scripts for engines: they run, every flag is one of the engine's, and each replica gets chips of its own."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tafkir.errors import CapacityError, RecipeError
from tafkir.plan.advise import Option, advise
from tafkir.plan.coefficients import fitted_coefficients
from tafkir.plan.hardware import load_chips
from tafkir.plan.launch import engine_flags, render_launch
from tafkir.plan.layout import Layout
from tafkir.plan.precision import PRECISIONS
from tafkir.plan.references import find_shape
from tafkir.plan.serving import Deployment, Speculation
from tafkir.plan.workload import WORKLOADS, Workload

CHAT = WORKLOADS["chat"]


def option(model: str, chip: str, precision: str, chips: int, layout: Layout, **changes: object) -> Option:
    known = load_chips(own_only=True)[chip]
    d = Deployment(find_shape(model), known, PRECISIONS[precision], Layout(), fitted_coefficients())
    found, _ = advise(replace(d, **changes), CHAT, chips, split=False)  # type: ignore[arg-type]
    return next(option for option in found if option.fleet.decode.layout == layout)


def started(script: str, folder: Path, **env: str) -> list[tuple[str, list[str]]]:
    """Run a script with engines that only write down how they were called: (visible chips, arguments) of each."""
    for name in ("vllm", "python"):
        fake = folder / name
        fake.write_text('#!/bin/bash\nprintf "%s\\n" "$CUDA_VISIBLE_DEVICES" "$@" > "$0.$$.called"\n')
        fake.chmod(0o755)
    path = folder / "serve.sh"
    path.write_text(script)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "all", **env}
    subprocess.run(["bash", str(path)], env=environment, check=True, timeout=60)
    calls = [called.read_text().splitlines() for called in folder.glob("*.called")]
    return sorted((lines[0], lines[1:]) for lines in calls)


def flags_of(arguments: list[str]) -> dict[str, str]:
    named = {}
    for i, word in enumerate(arguments):
        if word.startswith("--"):
            following = arguments[i + 1] if i + 1 < len(arguments) else "--"
            named[word] = "" if following.startswith("--") else following
    return named


def test_replicas_of_vllm_on_one_node(tmp_path: Path) -> None:
    chosen = option("qwen3-32b", "h100", "bf16", 8, Layout(tp=2))
    calls = started(render_launch(chosen, CHAT, "Qwen/Qwen3-32B", "vllm"), tmp_path)
    assert [chips for chips, _ in calls] == ["0,1", "2,3", "4,5", "6,7"]
    flags = [flags_of(arguments) for _, arguments in calls]
    assert sorted(flag.pop("--port") for flag in flags) == ["8000", "8001", "8002", "8003"]
    assert all(flag == flags[0] and set(flag) <= engine_flags("vllm") for flag in flags)
    assert flags[0]["--tensor-parallel-size"] == "2" and flags[0]["--max-num-seqs"] == str(chosen.batch)
    assert int(flags[0]["--max-model-len"]) >= CHAT.prompt_tokens + CHAT.output_tokens
    assert calls[0][1][:2] == ["serve", "Qwen/Qwen3-32B"]


def test_sglang_over_two_nodes_with_copied_attention_and_drafts(tmp_path: Path) -> None:
    layout = Layout(dp=16, ep=16)
    chosen = option("deepseek-r1", "h200", "fp8", 16, layout, speculation=Speculation(1), cache_dtype_bytes=1)
    script = render_launch(chosen, CHAT, "/models/DeepSeek R1", "sglang")
    ((_, arguments),) = started(script, tmp_path, NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    flags = flags_of(arguments)
    assert set(flags) - {"--port"} <= engine_flags("sglang")
    sizes = {"--tp-size": "16", "--dp-size": "16", "--ep-size": "16", "--nnodes": "2", "--node-rank": "1"}
    drafts = {"--speculative-algorithm": "NEXTN", "--speculative-num-draft-tokens": "2"}
    assert sizes.items() | drafts.items() <= flags.items()
    assert flags["--model-path"] == "/models/DeepSeek R1" and flags["--dist-init-addr"] == "10.0.0.1:20000"
    assert flags["--kv-cache-dtype"] == "fp8_e4m3" and 0.5 < float(flags["--mem-fraction-static"]) < 0.9
    with pytest.raises(subprocess.CalledProcessError):
        started(script, tmp_path)


def test_contexts_are_stretched_by_yarn(tmp_path: Path) -> None:
    chosen = option("ring-flash-2.0", "h20", "fp8", 4, Layout(tp=4))
    own = chosen.fleet.decode.shape.max_context
    long = Workload(prompt_tokens=0.8 * own, output_tokens=0.2 * own)
    ((_, arguments),) = started(render_launch(chosen, long, "ring", "vllm"), tmp_path)
    override = json.loads(flags_of(arguments)["--hf-overrides"])
    assert override["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": own,
    }
    with pytest.raises(CapacityError, match="shorten the workload"):
        render_launch(chosen, replace(long, prompt_tokens=20.0 * own), "ring", "vllm")


def test_what_cannot_be_launched_is_refused() -> None:
    wide = option("deepseek-r1", "h200", "fp8", 16, Layout(dp=16, ep=16))
    with pytest.raises(RecipeError, match="one of vllm, sglang"):
        render_launch(wide, CHAT, "r1", "tgi")
    drafting = option("qwen3-32b", "h100", "bf16", 8, Layout(tp=2), speculation=Speculation(1))
    with pytest.raises(RecipeError, match="no multi-token-prediction layer"):
        render_launch(drafting, CHAT, "qwen", "vllm")
