"""What loading and saving a checkpoint takes besides the model: measured by the kernel, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")

CHILD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.load import empty_decoder
from tafkir.ops.fp8 import quantize_fp8_blocks
from tafkir.recipe.model import ModelConfig

torch.set_num_threads(1)
folder = Path(sys.argv[1])
shape = dict(vocab_size=8192, hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
             intermediate_size=1024, moe_intermediate_size=256, num_experts=64, num_experts_per_tok=2)
small = ModelConfig(num_hidden_layers=1, **(shape | dict(vocab_size=64)))
medium = ModelConfig(num_hidden_layers=2, **shape)
large = ModelConfig(num_hidden_layers=4, **shape)


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def filled(config, dtype):
    decoder = empty_decoder(config, dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(0.01)
    for router in decoder.routers:
        router.expert_bias = torch.zeros(router.expert_bias.shape)
    return decoder


def save(name, decoder):
    save_checkpoint(folder / name, decoder, dtype=torch.bfloat16, max_shard_bytes=60 * 10**6)
    (folder / name / "tafkir.json").unlink()
    return decoder


def save_fp8(name, config):
    save_checkpoint(folder / name, filled(config, torch.bfloat16), dtype=torch.bfloat16)
    (folder / name / "tafkir.json").unlink()
    tensors = load_file(folder / name / "model.safetensors")
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        tensors[key], tensors[key + "_scale_inv"] = quantize_fp8_blocks(tensors[key])
    save_file(tensors, folder / name / "model.safetensors")
    settings = json.loads((folder / name / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / name / "config.json").write_text(json.dumps(settings))


def measure(what, action):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    sizes = [tensor.nbytes for tensor in action().state_dict().values()]
    print(json.dumps({"what": what, "used": status("VmHWM") - before, "model": sum(sizes), "largest": max(sizes)}))


def load(name, dtype):
    return load_checkpoint(folder / name, dtype=dtype).decoder


# First a small one of each: imports, buffers and lazily loaded code are not the model's.
save("small", filled(small, torch.float32))
save_fp8("small fp8", small)
for dtype in (torch.bfloat16, torch.float32):
    load("small", dtype)
    load("small fp8", dtype)
decoder = filled(large, torch.float32)
measure("save", lambda: save("large", decoder))
del decoder
save_fp8("medium fp8", medium)
measure("load", lambda: load("large", torch.bfloat16))
measure("load wider", lambda: load("large", torch.float32))
measure("load fp8", lambda: load("medium fp8", torch.bfloat16))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Bytes by which the peak grew, those of the model in memory and of its largest tensor."""
    args = [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("models"))]
    # Freed memory goes back to the system, so that one measurement does not live on what another left.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    result = subprocess.run(args, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return {row.pop("what"): row for row in map(json.loads, result.stdout.splitlines())}


def test_loading_takes_the_model_and_little_more(measured: dict[str, dict[str, int]]) -> None:
    got = measured["load"]
    assert got["model"] > 150e6
    assert got["used"] <= 1.15 * got["model"] + got["largest"], got


@pytest.mark.parametrize(("what", "size"), [("load", 150e6), ("load wider", 300e6), ("load fp8", 60e6)])
def test_only_the_chunk_that_is_read_comes_on_top(measured: dict[str, dict[str, int]], what: str, size: float) -> None:
    """Not a tensor, and no page of the files; a dequantized weight needs a row of blocks."""
    got = measured[what]
    assert got["model"] > size
    # The lower bound says that the peak is seen at all; a process may have a few freed pages at hand.
    assert 0.6 * got["model"] <= got["used"] <= 1.02 * got["model"] + 8e6, got


def test_saving_takes_one_tensor(measured: dict[str, dict[str, int]]) -> None:
    """One stacked tensor of ours in the wanted dtype, and one of theirs cut out of it."""
    got = measured["save"]
    assert got["model"] > 300e6
    assert got["used"] <= 1.2 * got["largest"], got
