"""Tiny checkpoints that every tool starts from: equal bytes wherever they are made, without a random stream of torch.

Used by the tests, and by `tools/write_peer_checkpoints.py` in the environment of the peers: no Tafkir in here.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["FAMILIES", "write_source"]

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
_HIDDEN, _LAYERS, _VOCAB, _EXPERTS, _EXPERT_WIDTH = 128, 2, 64, 4, 64
_COMMON: dict[str, Any] = {
    "vocab_size": _VOCAB, "hidden_size": _HIDDEN, "intermediate_size": 256, "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 32},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 2, "head_dim": 32, "num_experts": _EXPERTS,
        "num_experts_per_tok": 2, "moe_intermediate_size": _EXPERT_WIDTH, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": _EXPERTS,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": _EXPERT_WIDTH,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def _attention(family: str) -> dict[str, tuple[int, ...]]:
    if family != "deepseek_v3":
        return {
            "q_proj.weight": (128, _HIDDEN), "k_proj.weight": (64, _HIDDEN), "v_proj.weight": (64, _HIDDEN),
            "o_proj.weight": (_HIDDEN, 128), "q_norm.weight": (32,), "k_norm.weight": (32,),
        }  # fmt: skip
    return {
        "q_a_proj.weight": (64, _HIDDEN), "q_a_layernorm.weight": (64,), "q_b_proj.weight": (4 * 48, 64),
        "kv_a_proj_with_mqa.weight": (32 + 16, _HIDDEN), "kv_a_layernorm.weight": (32,),
        "kv_b_proj.weight": (4 * 64, 32), "o_proj.weight": (_HIDDEN, 128),
    }  # fmt: skip


def _mlp(width: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (width, _HIDDEN), (_HIDDEN, width)
    return {"gate_proj.weight": wide, "up_proj.weight": wide, "down_proj.weight": narrow}


def _shapes(family: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCAB, _HIDDEN)}
    for index in range(_LAYERS):
        stem = f"model.layers.{index}."
        shapes |= {f"{stem}self_attn.{name}": shape for name, shape in _attention(family).items()}
        if family == "qwen3" or index == 0:
            shapes |= {f"{stem}mlp.{name}": shape for name, shape in _mlp(256).items()}
        else:
            shapes[f"{stem}mlp.gate.weight"] = (_EXPERTS, _HIDDEN)
            if family == "deepseek_v3":
                shapes[f"{stem}mlp.gate.e_score_correction_bias"] = (_EXPERTS,)
                shapes |= {f"{stem}mlp.shared_experts.{n}": s for n, s in _mlp(_EXPERT_WIDTH).items()}
            for expert in range(_EXPERTS):
                shapes |= {f"{stem}mlp.experts.{expert}.{n}": s for n, s in _mlp(_EXPERT_WIDTH).items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}{norm}.weight"] = (_HIDDEN,)
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCAB, _HIDDEN)}


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Bell-shaped values with a heavy tail, by exact integer arithmetic; the stream of RandomState is frozen."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    bell = stream.randint(0, 1 << 16, size=(4, *shape)).sum(0) - 2 * ((1 << 16) - 1)
    tail = np.where(stream.randint(0, 64, size=shape) == 0, 8.0, 1.0)
    values = torch.from_numpy(bell * tail * math.ldexp(1.0, -21 - zlib.crc32(name.encode()) % 3)).float()
    if len(shape) == 1:
        # A router's bias is exact in BF16; a norm stands near one.
        return (values * 8).bfloat16().float() if name.endswith("correction_bias") else 1 + values
    if len(shape) == 2 and shape[1] >= 64:
        values[0, :32] = 0
        values[1, 5] = -0.0
    return values


def write_source(family: str, path: Path) -> None:
    """A BF16 checkpoint of a family, with the names of the hub; the router's bias is float32, as there."""
    path.mkdir(parents=True)
    tensors = {
        name: _draw(name, shape).to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
        for name, shape in _shapes(family).items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": family, **_COMMON, **_OWN[family]}
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
