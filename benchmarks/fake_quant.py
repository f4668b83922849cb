"""What training with fake quantization costs: a forward pass, and forward with backward, against bfloat16 and float32.

The sides take turns on the same packed documents, in one process and one thread; every figure is CPU-seconds, and
ratios are medians over the rounds, each within its own. `w4a4` rounds weights once (as a training step does, whatever
its micro-batches) and inputs in every forward; `with_codes` counts the rounding of the weights too, which a step with
one micro-batch pays in full. Memory is what a side holds besides the float32 model: the rounded weights, and the most
that a forward with backward kept.

    python benchmarks/fake_quant.py --out benchmarks/results/fake_quant.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tafkir.data.packing import PackedBatch, pack_documents
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import next_token_loss
from tafkir.ops.native import select_kernels
from tafkir.quant.fake import FakeQuantizer, fake_quantize
from tafkir.quant.rollout import prepare_decoder
from tafkir.recipe.load import load_recipe
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.rollout import RolloutConfig
from tafkir.train.mtp import run_decoder

FORMATS = {
    "w4a4": QuantizeConfig(preset="all-linear", scheme="nvfp4"),
    "w4a16": QuantizeConfig(preset="all-linear", scheme="nvfp4_w4a16"),
    "four_over_six": QuantizeConfig(preset="all-linear", scheme="nvfp4", scales="four_over_six"),
    "mxfp4": QuantizeConfig(preset="all-linear", scheme="mxfp4", layout="compressed-tensors"),
    "fp8": QuantizeConfig(preset="all-linear", scheme="fp8_channel"),
}


def shapes() -> dict[str, ModelConfig]:
    """The shipped base, and wider models, where matrices weigh more than what lies between them."""
    tiny = load_recipe(["base-tiny"]).recipe.model
    moe = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    moe |= {"intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 16}
    dense = {**moe, "num_experts": 0, "num_shared_experts": 0, "intermediate_size": 1536, "model_type": "qwen3"}
    return {
        "tiny": tiny,
        "moe-512": tiny.model_copy(update=moe),
        "dense-512": tiny.model_copy(update={**dense, "partial_rotary_factor": 1.0}),
    }


def documents(vocab: int, tokens: int) -> PackedBatch:
    """Documents of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, vocab, (64,), generator=generator).tolist() for _ in range(tokens // 64)]
    return pack_documents([(ids, None) for ids in rows])


def rounded(decoder: Decoder, config: QuantizeConfig) -> tuple[Decoder, FakeQuantizer]:
    """A copy that computes as the quantized checkpoint does."""
    own = copy.deepcopy(decoder)
    quantizer = fake_quantize(own, config)
    return own, quantizer


def write(decoder: Decoder, quantizer: FakeQuantizer, source: dict[str, Any]) -> None:
    """Give the copy the rounded weights, without a copy of them."""
    own = dict(decoder.named_parameters())
    for name, values in quantizer(source).items():
        own[name].data = values


def forward(decoder: Decoder, batch: PackedBatch) -> torch.Tensor:
    out = run_decoder(decoder, batch)
    return next_token_loss(out.hidden_ND.float(), decoder.head_weight.float(), batch.labels_N)


def backward(decoder: Decoder, batch: PackedBatch) -> None:
    forward(decoder, batch).backward()
    decoder.zero_grad(set_to_none=True)


def cpu_seconds(action: Callable[[], Any]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def measure(config: ModelConfig, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of every side, and ratios to bfloat16 and float32."""
    decoder = build_decoder(config, 0)
    source = dict(decoder.named_parameters())
    batch = documents(config.vocab_size, tokens)
    half = prepare_decoder(copy.deepcopy(decoder), RolloutConfig(precision="bfloat16"))
    actions: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: forward(half, batch),
        "float32": lambda: forward(decoder, batch),
        "float32 backward": lambda: backward(decoder, batch),
        "bfloat16 backward": lambda: backward(half, batch),
    }
    for name, formats in FORMATS.items():
        own, quantizer = rounded(decoder, formats)
        write(own, quantizer, source)
        actions[name] = lambda own=own: forward(own, batch)
        actions[f"{name} codes"] = lambda quantizer=quantizer: quantizer(source)
        if name == "w4a4":
            actions["w4a4 backward"] = lambda own=own: backward(own, batch)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            spent = cpu_seconds(action)
            if number:
                seconds[name].append(spent)
    rows: dict[str, Any] = {}
    for name in FORMATS:
        codes = [a + b for a, b in zip(seconds[name], seconds[f"{name} codes"], strict=True)]
        rows[name] = {
            "to_bfloat16": ratio(seconds[name], seconds["bfloat16"]),
            "to_float32": ratio(seconds[name], seconds["float32"]),
            "with_codes_to_bfloat16": ratio(codes, seconds["bfloat16"]),
            "with_codes_to_float32": ratio(codes, seconds["float32"]),
        }
    rows["w4a4"]["backward_to_float32"] = ratio(seconds["w4a4 backward"], seconds["float32 backward"])
    rows["w4a4"]["backward_to_bfloat16"] = ratio(seconds["w4a4 backward"], seconds["bfloat16 backward"])
    weights = sum(values.numel() * 4 for values in FakeQuantizer(decoder, FORMATS["w4a4"])(source).values())
    return {
        "parameters": config.num_parameters(),
        "tokens": int(batch.input_ids_N.numel()),
        "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "rounded_weights_bytes": weights,
        "model_bytes": sum(p.numel() * 4 for p in source.values()),
        "formats": rows,
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3), "max": round(max(pairs), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=tuple(shapes()), default=list(shapes()))
    parser.add_argument("--kernels", choices=("native", "torch"), default="native")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    select_kernels(args.kernels)
    result = {
        "benchmark": "fake_quant",
        "command": " ".join(["python", *sys.argv]),
        "cpu": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "models": {name: measure(shapes()[name], args.tokens, args.rounds) for name in args.models},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for name, rows in result["models"].items():
        for format, row in rows["formats"].items():
            figures = ", ".join(f"{key} {value['median']:.2f}" for key, value in row.items())
            print(f"{name:10} {format:14} {figures}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
