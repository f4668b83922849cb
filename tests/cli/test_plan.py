"""`tafkir plan`: answers, terms that add up, errors that say what would do, and no torch on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tafkir.cli.main import app
from tafkir.errors import CapacityError, CheckpointError, RecipeError
from tests.conftest import ROOT, Cli

RUN = CliRunner()


def planned(*args: str) -> str:
    done = RUN.invoke(app, ["plan", *args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_an_answer_without_torch_in_a_second(here: Cli, cli_env: dict[str, str]) -> None:
    """CPU time of a whole process; one second is the aim, doubled here for a machine that is shared."""
    script = (
        "import sys, time; from tafkir.cli.main import app\n"
        "app(['plan', 'deepseek-r1', '--hardware', 'h200:8', '--precision', 'fp8'], standalone_mode=False)\n"
        "print({'torch', 'numpy'} & set(sys.modules), time.process_time() < 2)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=cli_env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set() True"
    assert "TP8" in done.stdout and "published rows" in done.stdout


def test_explanations_add_up() -> None:
    text = planned("ring-flash-2.0", "--hardware", "h20:4", "--precision", "fp8", "--explain")
    blocks = 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if not line.startswith("  ") or not any(unit in line for unit in ("GB: ", "ms: ")):
            continue
        said = float(line.rpartition(" ")[2].replace(",", ""))
        terms = []
        for other in lines[i + 1 :]:
            if not other.startswith("     ") and not (other.startswith("    ") and other[4:14].strip()[:1].isdigit()):
                break
            number = other[4:14].strip().replace(",", "")
            if not number.replace(".", "").isdigit() or len(other) < 16 or other[14:16] != "  ":
                break
            terms.append(float(number))
        assert sum(terms) == pytest.approx(said, abs=0.06), line
        blocks += 1
    assert blocks == 4 and "not modelled:" in text and "price:" in text


def test_json_says_the_same() -> None:
    found = json.loads(planned("deepseek-r1", "--hardware", "b200:8", "--precision", "nvfp4", "--json"))
    best = found["options"][0]
    assert found["minimum_chips"] == 4 and found["parameters"]["total"] == 671026404352
    assert sum(term["seconds"] for term in best["point"]["tpot"]) == pytest.approx(best["point"]["tpot_s"])
    assert best["dollars_per_million_out"][0] <= best["dollars_per_million_out"][2]
    assert 0 < found["left_out_errors"]["tpot"] < 0.2


def test_recipes_and_folders_and_shapes_of_its_own(tmp_path: Path) -> None:
    shutil.copy(ROOT / "src/tafkir/presets/deepseek-r1.json", tmp_path / "config.json")
    keys = json.loads((tmp_path / "config.json").read_text())
    del keys["description"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    for model in (str(tmp_path), "deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"):
        assert "671.03B" in planned(model, "--hardware", "h200:8", "--precision", "fp8")
    llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "head_dim": None}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    assert "8.03B" in planned(str(tmp_path), "--hardware", "h100:1")
    (tmp_path / "config.json").write_text(json.dumps(llama | {"hidden_size": None}))
    with pytest.raises(CheckpointError, match="no sizes: hidden_size"):
        planned(str(tmp_path))
    assert "70.55B" in planned("llama-3.3-70b", "--hardware", "h100:4", "--price", "2.5")
    assert "no price" in planned("base-tiny", "--hardware", "b300:1")


def test_training() -> None:
    args = ["deepseek-v3", "--hardware", "h800:2048", "--train", "--precision", "fp8", "--tokens", "14.8e12"]
    text = planned(*args, "--mfu", "0.391", "--explain")
    assert "39.1%" in text and "given MFU" in text
    best = json.loads(planned(*args, "--json"))[0]
    assert 0.3 < best["mfu"] < 0.45


def test_one_layout_alone() -> None:
    args = ["deepseek-r1", "--hardware", "h200:8", "--precision", "fp8", "--layout", "tp8,ep8", "--json"]
    (option,) = json.loads(planned(*args))["options"]
    assert option["layout"] == {"tp": 8, "pp": 1, "dp": 1, "ep": 8, "cp": 1}


def test_percentiles_and_scripts() -> None:
    args = ["qwen3-32b", "--hardware", "h100:2"]
    curve = json.loads(planned(*args, "--simulate", "500", "--json"))["simulated"]
    assert [load["rate"] for load in curve] == sorted(load["rate"] for load in curve) and len(curve) == 8
    assert curve[0]["ttft"]["p99"] < 2 < curve[-1]["ttft"]["p99"]
    assert "TTFT s p50" in planned(*args, "--simulate", "100")
    assert planned(*args, "--emit", "vllm", "--checkpoint", "Qwen/Qwen3-32B").startswith("#!/usr/bin/env bash")


def test_a_day() -> None:
    args = ["qwen3-32b", "--hardware", "h100:2", "--day", "1000"]
    days = json.loads(planned(*args, "--json"))
    assert days["scaled"]["replica_hours"] < 0.9 * days["as at noon"]["replica_hours"]
    assert "chip hours" in planned(*args)


def test_tables_of_chips_and_claims(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[chips.h100.price]\nlow = 1\nmid = 1.5\nhigh = 2\n")
    text = planned("hardware", "--hardware-file", str(mine))
    assert "1.00/1.50/2.00" in text and "ascend-910b3" in text
    claims = json.loads(planned("claims", "--json"))
    assert {"claim", "inputs", "computed", "verdict"} <= set(claims[0])
    assert "contradiction" in planned("claims")


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        (["nothing-70b"], RecipeError, "no such model"),
        (["qwen3-23b"], RecipeError, "did you mean qwen3-32b"),
        (["deepseek-r1", "--hardware", "h2000:8"], RecipeError, "did you mean .*h200"),
        (["deepseek-r1", "--hardware", "h200:none"], RecipeError, "'none' is no count"),
        (["deepseek-r1", "--hardware", "910b:32", "--precision", "fp8"], RecipeError, "has no fp8 units.*bf16, int8"),
        (["deepseek-r1", "--hardware", "h100:8", "--precision", "fp8"], CapacityError, "memory is missed .* 16 chips"),
        (["deepseek-r1", "--precision", "fp7"], RecipeError, "no such precision"),
        (["deepseek-r1", "--objective", "speed"], RecipeError, "cost, latency, chips"),
        (["deepseek-r1", "--engine", "tgi"], RecipeError, "sglang, trtllm, vllm"),
        (["deepseek-r1", "--workload", "none.toml"], RecipeError, "no such workload"),
        (["deepseek-r1", "--speculate", "many"], RecipeError, "TOKENS"),
        (["deepseek-r1", "--hardware", "h100:8", "--train"], CapacityError, "training does not fit"),
        (["qwen3-0.6b", "--train", "--precision", "int8"], RecipeError, "nothing is trained in int8"),
        (["deepseek-r1", "--hardware", "h200:8", "--layout", "tp3"], RecipeError, "128 heads do not divide by TP 3"),
        (
            ["deepseek-r1", "--hardware", "h200:8", "--layout", "tp16"],
            RecipeError,
            "takes 16 chips; expected at most 8",
        ),
        (["deepseek-r1", "--layout", "8x"], RecipeError, "'8x' is no size"),
        (["trm-arc1"], RecipeError, "recursive model .* --dry-run"),
        (["qwen3-0.6b", "--emit", "tgi"], RecipeError, "one of vllm, sglang"),
    ],
)
def test_errors_say_what_to_do(args: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        planned(*args)


@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    found = json.loads(planned("base-tiny", "--hardware", "cpu", "--workload", "chat", "--json"))
    chip = found["hardware"]
    assert chip["key"] == "cpu" and found["precision"] == "fp32"
    # Any machine that runs this multiplies between a gigaflop and ten teraflops, and copies a gigabyte a second.
    assert 1e9 < chip["flops"]["fp32"] < 1e13 and 1e9 < chip["bandwidth"] < 1e12
    assert found["options"][0]["point"]["tpot_s"] > 0


def test_serving_is_handed_to_another_engine(here: Cli, cli_env: dict[str, str], tmp_path: Path) -> None:
    command = ("serve", "base-tiny", "--engine", "vllm")
    script = here(*command, "--hardware", "h100:2", "--print").stdout
    assert "exec vllm serve" in script and "--max-model-len 512" in script and "--hf-overrides" not in script
    assert "--tp-size" in here("serve", "base-tiny", "--engine", "sglang", "--hardware", "h100", "--print").stdout
    assert "on which chips?" in here(*command).stderr
    assert "no such engine" in here("serve", "base-tiny", "--engine", "vlm", "--hardware", "h100").stderr
    # A program of that name gets the port.
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "asked: $*"\n')
    (tmp_path / "vllm").chmod(0o755)
    path = f"{tmp_path}:{cli_env['PATH']}"
    run = [sys.executable, "-m", "tafkir.cli.main", *command, "--hardware", "h100", "--port", "8123"]
    done = subprocess.run(run, env=cli_env | {"PATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("asked: serve") and done.stdout.rstrip().endswith("--port 8123")
