"""`tafkir model show | ls`: published counts to the digit, other sources than presets, errors, and no torch."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.models.decoder import Decoder
from tafkir.models.layers import Linear
from tafkir.plan.params import block_matrices, describe_layers, summarize_model, weight_bytes
from tafkir.recipe.bundled import bundled_checkpoints
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.presets import list_presets, load_preset
from tests.conftest import ROOT, Cli

PUBLISHED = {
    # billions in all, per token, per token without embeddings; bfloat16 cache per token; blocks
    # (Qwen cuts 3.35 to 3.3)
    "ring-mini-2.0": (16.26, 1.43, 0.789, 40 * 1024, "1 x dense, 19 x MoE 256/8+1"),
    "ring-flash-2.0": (102.89, 6.15, 4.86, 64 * 1024, "1 x dense, 31 x MoE 256/8+1"),
    "ring-1t": (999.7, 51.05, 48.5, 320 * 1024, "4 x dense, 76 x MoE 256/8+1"),
    "deepseek-v3": (671.03, 37.55, 35.7, 61 * 576 * 2, "3 x dense, 58 x MoE 256/8+1"),
    "deepseek-r1": (671.03, 37.55, 35.7, 61 * 576 * 2, "3 x dense, 58 x MoE 256/8+1"),
    "qwen3-0.6b": (0.6, 0.6, 0.44, 28 * 2 * 8 * 128 * 2, "28 x dense"),
    "qwen3-30b-a3b": (30.5, 3.35, 2.7, 48 * 2 * 4 * 128 * 2, "48 x MoE 128/8"),
}


def shown(here: Cli, *args: str) -> dict[str, Any]:
    done = here("model", "show", *args, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def digits(number: float, like: float) -> float:
    """Rounded to as many places as the published figure has."""
    return round(number, len(str(like).partition(".")[2]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(here: Cli, name: str) -> None:
    found = shown(here, name)
    total, active, active_non_embedding, kv, layers = PUBLISHED[name]
    counts = found["parameters"]
    assert digits(counts["total"] / 1e9, total) == total
    assert digits(counts["active"] / 1e9, active) == active
    assert digits(counts["active_non_embedding"] / 1e9, active_non_embedding) == active_non_embedding
    assert found["kv_bytes_per_token"] == kv
    assert found["layers"] == layers
    assert counts["total"] - counts["embeddings"] == counts["non_embedding"]


def test_multi_token_prediction_is_counted_apart(here: Cli) -> None:
    assert shown(here, "ring-flash-2.0")["mtp_depth"] == 0
    base, v3 = shown(here, "ling-flash-base-2.0"), shown(here, "deepseek-v3")
    # The published base is 106B where the chat model is 103B.
    assert round((base["parameters"]["total"] + base["parameters"]["mtp"]) / 1e9, 1) == 106.2
    assert (v3["mtp_depth"], round(v3["parameters"]["mtp"] / 1e9, 1)) == (1, 11.6)


def test_the_rumoured_model_has_the_rumoured_size(here: Cli) -> None:
    counts = shown(here, "r2-rumoured")["parameters"]
    assert round(counts["total"] / 1e12, 1) == 1.2 and round(counts["active"] / 1e9) == 78


def test_flops_and_cache_at_a_context(here: Cli) -> None:
    found = shown(here, "ring-flash-2.0", "--context", "1000")
    config = ModelConfig.model_validate(found["config"])
    head = 2 * 157184 * 4096
    blocks = 2 * found["parameters"]["active_non_embedding"]
    per_seen_token = 2 * 32 * 32 * (128 + 128)
    assert found["decode_flops_per_token"] == blocks + head + per_seen_token * 1000
    assert found["prefill_flops_per_token"] == blocks + per_seen_token * 500.5
    assert found["kv_bytes"] == 1000 * config.kv_bytes_per_token(2)
    # DeepSeek-V3 decodes over its latent cache: 512 + 64 for the scores and 512 for the values, 128 heads, 61 layers.
    one, two = (shown(here, "deepseek-v3", "--context", n)["decode_flops_per_token"] for n in ("1", "2"))
    assert two - one == 2 * 61 * 128 * (576 + 512)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 2, "first_k_dense_replace": 2},
        {"num_experts": 0, "tie_word_embeddings": True},
        {
            "attention_type": "mla",
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "use_qk_norm": False,
        },
    ],
    ids=["Ling", "more shared", "dense", "MLA"],
)
def test_the_matrices_are_those_of_the_built_blocks(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(changes)
    with torch.device("meta"):
        decoder = Decoder(config)
    linear = {id(m.weight) for m in decoder.layers.modules() if isinstance(m, Linear)}
    wanted = sum(p.numel() for n, p in decoder.layers.named_parameters() if id(p) in linear or ".experts." in n)
    assert sum(rows * columns * count for rows, columns, count in block_matrices(config)) == wanted
    assert weight_bytes(config, "bf16") == 2 * config.num_parameters()


def test_weight_formats_by_hand() -> None:
    """One dense layer of width 64, 100 wide inside: FP8 blocks are padded, NVFP4 rows end within a block."""
    config = ModelConfig(
        hidden_size=64, num_hidden_layers=1, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=100, vocab_size=50, num_experts=0,
    )  # fmt: skip
    attention, mlp = [(64, 64), (32, 64), (32, 64), (64, 64)], [(100, 64), (100, 64), (64, 100)]
    weights = sum(rows * columns for rows, columns in attention + mlp)
    rest = 2 * (config.num_parameters() - weights)
    assert weight_bytes(config, "fp8") == weights + 7 * 4 + rest
    scales = sum(rows * columns // 16 for rows, columns in attention) + 2 * 100 * 4 + 64 * 7
    assert weight_bytes(config, "nvfp4") == weights // 2 + scales + 7 * 4 + rest


def test_layers_that_alternate_keep_their_order() -> None:
    config = ModelConfig(num_hidden_layers=6, mlp_only_layers=(3,), num_shared_experts=0)
    assert describe_layers(config) == "1 x dense, 2 x MoE 32/2, 1 x dense, 2 x MoE 32/2"


def test_checkpoints_runs_and_recipes_are_models_too(here: Cli, tmp_path: Path) -> None:
    bundled = bundled_checkpoints()["base-tiny"]
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(bundled / "config.json", folder)
    run = tmp_path / "runs" / "mine"
    shutil.copytree(folder, run / "stages" / "03-sft" / "checkpoint")
    kinds = {}
    for name in ("base-tiny", "mine", "mine/config.json", "runs/mine", "smoke"):
        found = shown(here, name)
        kinds[name] = found["kind"]
        assert found["parameters"]["total"] == (59_360 if name == "smoke" else 2_872_704)
    assert kinds == dict.fromkeys(("base-tiny", "mine", "mine/config.json", "runs/mine"), "checkpoint") | {
        "smoke": "recipe"
    }


def test_the_text_says_what_the_numbers_are(here: Cli) -> None:
    done = here("model", "show", "deepseek-v3", "--context", "4096")
    lines = done.stdout.splitlines()
    assert lines[0] == "deepseek-v3 (preset)"
    rows = dict(line.split("  ", 1) for line in lines[1:] if not line.startswith(" "))
    assert rows["parameters"].strip() == "671.03B (671,026,404,352)"
    assert rows["MTP, 1 x"].strip().startswith("11.61B") and "\x1b" not in done.stdout
    assert "fp8" in rows["weights"] and "nvfp4" in rows["weights"]
    assert max(map(len, lines)) <= 100


def test_a_list_of_all_names(here: Cli) -> None:
    rows = json.loads(here("model", "ls", "--json").stdout)
    names = [row["name"] for row in rows]
    assert set(list_presets()) < set(names) and "base-tiny" in names
    text = here("model", "ls").stdout
    assert all(f"\n{name} " in f"\n{text}" for name in names)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ring-flash-2", "did you mean ring-flash-2.0"),
        ("DeepSeek-R1", "deepseek-r1"),
        ("zzzz", "`tafkir model ls`"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(here: Cli, name: str, words: str) -> None:
    done = here("model", "show", name)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name}: no such model") and words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "config.json: the file is missing"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"architectures": ["LlamaForCausalLM"]}', "LlamaForCausalLM is not supported; expected one of Bailing"),
    ],
)
def test_a_folder_that_is_no_checkpoint(here: Cli, tmp_path: Path, content: str | None, words: str) -> None:
    (tmp_path / "mine").mkdir()
    if content is not None:
        (tmp_path / "mine" / "config.json").write_text(content)
    done = here("model", "show", "mine")
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("args", [["show", "ring-1t"], ["ls"]])
def test_it_answers_at_once_and_without_torch(args: list[str], cli_env: dict[str, str], tmp_path: Path) -> None:
    script = (
        f"import sys; sys.argv = {['tafkir', 'model', *args]}\n"
        "from tafkir.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    took: dict[str, list[float]] = {script: [], "import pydantic, rich.console, typer": []}
    for _ in range(3):
        for code, seconds in took.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=cli_env, cwd=tmp_path, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if code is script:
                assert done.stdout.splitlines()[-1] == "[]" and "999." in done.stdout
    # Processor time, beside what the libraries of a command line take by themselves (0.2 s, so 0.6 s when quiet): a
    # busy neighbour slows both.
    ours, libraries = (min(seconds) for seconds in took.values())
    assert ours < 3 * libraries


def test_the_help_teaches(here: Cli) -> None:
    text = here("model", "show", "--help").stdout
    for word in ("tafkir model show ring-flash-2.0", "active", "KV cache", "prefill", "nvfp4"):
        assert word in text


def test_the_table_in_the_docs_is_up_to_date(cli_env: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "write_models.py"), "--check"]
    done = subprocess.run(command, env=cli_env, check=False)
    assert done.returncode == 0, "run `PYTHONPATH=src python tools/write_models.py` and commit docs/models.md"


def test_every_preset_has_a_summary() -> None:
    for name in list_presets():
        config = load_preset(name)
        summary = summarize_model(config, 4096)
        bf16, fp8, nvfp4 = (summary.weight_bytes[kind] for kind in ("bf16", "fp8", "nvfp4"))
        assert bf16 > fp8 > nvfp4 > bf16 / 4
        assert summary.decode_flops_per_token > summary.prefill_flops_per_token > 0
