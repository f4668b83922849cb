"""Writes tests/ops/peer_formats.json: what ModelOpt and compressed-tensors make of a few small tensors, on the CPU.

Runs in an environment of its own, because the peers pin other versions than we do:

    python -m venv peers && peers/bin/pip install torch nvidia-modelopt==0.47.0 compressed-tensors==0.19.0 requests
    peers/bin/python tools/write_peer_formats.py
"""

from __future__ import annotations

import base64
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_args import QuantizationStrategy
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from torch import Tensor

OUT = Path(__file__).parents[1] / "tests" / "ops" / "peer_formats.json"
ROWS, COLUMNS = 2, 128


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(ROWS, COLUMNS, generator=generator)
    spread = torch.randn(ROWS, COLUMNS // 16, 1, generator=generator).mul(2.5).exp()
    wide = (torch.randn(ROWS, COLUMNS // 16, 16, generator=generator) * spread).view(ROWS, COLUMNS)
    ties = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 2).mul(torch.tensor([1.0] * 8 + [-1.0] * 8))
    holes = gauss.clone()
    holes[1, 16:64], holes[0, ::3], holes[0, 5] = 0, 0, -0.0
    return {
        "gauss": gauss * 0.02,
        "wide": wide,
        "ties": ties.repeat(ROWS, COLUMNS // 16) * 448,
        "zeros in it": holes,
        "tiny": gauss * 1e-6,
        "huge": gauss * 9e3,
    }


def text(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    shape = list(tensor.shape)
    return {"dtype": str(tensor.dtype)[6:], "shape": shape, "bytes": base64.b64encode(raw).decode()}


def modelopt(values: Tensor) -> dict[str, list[Tensor]]:
    nvfp4, scale, total = NVFP4QTensor.quantize(values.clone(), 16)
    made = {"nvfp4": [nvfp4._quantized_data, scale, total]}
    for name, limit, factor in (("static", 448.0, 0.75), ("four over six", 256.0, 1.5)):
        amax = values.float().view(ROWS, -1, 16).abs().amax(-1)
        quantizer = SimpleNamespace(
            global_amax=amax.max(), _amax=amax * factor, block_sizes={-1: 16, "four_over_six": limit == 256.0}
        )
        scale, total = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(quantizer, values)
        codes = NVFP4QTensor.quantize(values.clone(), 16, scale, total)[0]
        made[name] = [codes._quantized_data, scale, total]
    mxfp4, scale = MXFP4QTensor.quantize(values.clone(), 32)
    made["mxfp4"] = [mxfp4._quantized_data, scale.view(ROWS, -1)]
    mxfp8, scale = MXFP8QTensor.quantize(values.clone())
    made["mxfp8"] = [mxfp8._quantized_data, scale]
    amax = values.float().abs()
    # The two lines of modelopt/torch/export/quant_utils.py and unified_export_hf.py that make FP8 weights.
    scale = torch.tensor(amax.amax().item() / 448.0)
    made["fp8 tensor"] = [(values / scale).to(torch.float8_e4m3fn), scale]
    scale = amax.amax(-1) / 448.0
    made["fp8 row"] = [(values / scale[:, None]).to(torch.float8_e4m3fn), scale]
    return made


def compressed_tensors(values: Tensor) -> dict[str, list[Tensor]]:
    made = {}
    for name, preset, size in (
        ("nvfp4", "NVFP4A16", 16), ("mxfp4", "MXFP4A16", 32), ("mxfp8", "MXFP8A16", 32), ("int8", "INT8", COLUMNS),
        ("int4", "W4A16", 128), ("fp8 row", "FP8_DYNAMIC", COLUMNS),
    ):  # fmt: skip
        args = PRESET_SCHEMES[preset]["weights"]
        groups = values.view(ROWS, -1, size)
        total = generate_gparam(values.amin(), values.amax()) if name == "nvfp4" else None
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=total)
        dtype = torch.int8 if args.type == "int" else None
        codes = quantize(values, scale, zero, args, dtype=dtype, global_scale=total)
        if args.strategy == QuantizationStrategy.CHANNEL and args.type == "float":
            codes = codes.to(torch.float8_e4m3fn)
        if name == "nvfp4":
            assert total is not None
            made[name] = [pack_fp4_to_uint8(codes), scale.to(torch.float8_e4m3fn), total]
        elif name == "mxfp4":
            made[name] = [pack_fp4_to_uint8(codes), compress_mx_scale(scale, torch.uint8)]
        elif name == "mxfp8":
            made[name] = [codes.to(torch.float8_e4m3fn), compress_mx_scale(scale, torch.uint8)]
        elif name == "int4":
            made[name] = [pack_to_int32(codes, 4), scale]
        else:
            made[name] = [codes, scale]
    return made


def main() -> None:
    cases = []
    for name, wide in inputs().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if name == "tiny" and dtype == torch.float16:
                continue  # the peer's float16 overflows: its global scale becomes 1 and all codes 0
            values = wide.to(dtype)
            case: dict[str, Any] = {"name": name, "values": text(values)}
            for peer, made in (("modelopt", modelopt(values)), ("compressed-tensors", compressed_tensors(values))):
                case[peer] = {format: [text(part) for part in parts] for format, parts in made.items()}
            cases.append(case)
    peers = {name: version(name) for name in ("nvidia-modelopt", "compressed-tensors", "torch")}
    OUT.write_text(json.dumps({"written by": "tools/write_peer_formats.py", "peers": peers, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
