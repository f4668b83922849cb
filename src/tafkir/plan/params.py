"""What a model's shape costs, from its config alone: layers, parameters, cache, FLOPs, bytes. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from tafkir.recipe.model import LayerSpec, ModelConfig, ParameterCounts

__all__ = [
    "WEIGHT_FORMATS",
    "ModelSummary",
    "block_matrices",
    "decode_flops",
    "describe_layers",
    "prefill_flops",
    "summarize_model",
    "weight_bytes",
]

WEIGHT_FORMATS = ("bf16", "fp8", "nvfp4")
_BF16_BYTES = 2
_FP8_BLOCK = 128
_NVFP4_BLOCK = 16
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in numbers.

    Attributes:
        layers: the decoder blocks in order, equal neighbours together.
        attention: in one line.
        parameters: exact counts.
        context: tokens that the figures below are for.
        kv_bytes_per_token: cache of one token over all layers, bfloat16.
        kv_bytes: the same for the whole context.
        prefill_flops_per_token: mean over a prompt of `context` tokens; without the output head, which runs once.
        decode_flops_per_token: for one new token that sees `context` tokens.
        weight_bytes: by format, without the multi-token-prediction layers.
        mtp_depth: multi-token-prediction layers.
        mtp_weight_bytes: theirs, in bfloat16.
    """

    layers: str
    attention: str
    parameters: ParameterCounts
    context: int
    kv_bytes_per_token: int
    kv_bytes: int
    prefill_flops_per_token: float
    decode_flops_per_token: float
    weight_bytes: dict[str, int]
    mtp_depth: int
    mtp_weight_bytes: int


def summarize_model(config: ModelConfig, context: int) -> ModelSummary:
    """Count a model.

    Args:
        config: its shape.
        context: tokens in the cache when a token is decoded, and in a prompt that is prefilled.
    """
    counts = config.parameter_counts()
    kv_bytes = config.kv_bytes_per_token(_BF16_BYTES)
    return ModelSummary(
        layers=describe_layers(config),
        attention=_describe_attention(config),
        parameters=counts,
        context=context,
        kv_bytes_per_token=kv_bytes,
        kv_bytes=kv_bytes * context,
        prefill_flops_per_token=prefill_flops(config, context),
        decode_flops_per_token=decode_flops(config, context),
        weight_bytes={name: weight_bytes(config, name) for name in WEIGHT_FORMATS},
        mtp_depth=config.mtp.depth if config.mtp else 0,
        mtp_weight_bytes=counts.mtp * _BF16_BYTES,
    )


def describe_layers(config: ModelConfig) -> str:
    """The blocks by run length, such as `1 x dense, 31 x MoE 256/8+1`: experts / active + shared."""
    shared = f"+{config.num_shared_experts}" if config.num_shared_experts else ""
    names = {"dense": "dense", "moe": f"MoE {config.num_experts}/{config.num_experts_per_tok}{shared}"}
    runs = ((names[ffn], sum(1 for _ in group)) for ffn, group in groupby(spec.ffn for spec in config.layer_specs))
    return ", ".join(f"{count} x {name}" for name, count in runs)


def _describe_attention(config: ModelConfig) -> str:
    if config.attention_type == "mla":
        shape = config.mla
        queries = f"queries {shape.q_lora_rank}, " if shape.q_lora_rank else ""
        return (
            f"MLA, {config.num_attention_heads} heads of {config.head_dim}, latent {queries}"
            f"keys and values {shape.kv_lora_rank} + {shape.qk_rope_head_dim} rotated"
        )
    heads = f"{config.num_attention_heads} heads of {config.head_dim}"
    return f"GQA, {heads}, {config.num_key_value_heads} for keys and values, {config.rotary_size} dims rotated"


def prefill_flops(config: ModelConfig, context: int) -> float:
    """Of each token of a prompt in the mean, without the head: causal attention sees (context + 1) / 2 tokens."""
    head = 2 * config.vocab_size * config.hidden_size
    blocks = config.flops_per_token(0) - head
    per_seen = config.flops_per_token(1) - config.flops_per_token(0)
    return blocks + per_seen * (context + 1) / 2


def decode_flops(config: ModelConfig, context: int) -> float:
    """Of a new token that sees `context` tokens, the head included.

    With MLA the queries are carried into the latent space, where keys and values stay as they are cached.

    What carries them there and back is as large as the expansion that it replaces, so only attention itself differs.
    """
    if config.attention_type == "mla":
        shape = config.mla
        per_head = shape.latent_dim + shape.kv_lora_rank
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * per_head
        return float(config.flops_per_token(0) + attention * context)
    return float(config.flops_per_token(context))


def block_matrices(config: ModelConfig) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, how many) of the linear maps inside the decoder blocks, which FP8 and NVFP4 formats shrink.

    Routers, norms, residual mappings, embedding table and output head are not among them: they stay in bfloat16.
    """
    hidden = config.hidden_size
    for spec in config.layer_specs:
        yield from _attention_matrices(config, spec)
        if spec.ffn == "dense":
            yield config.intermediate_size, hidden, 2
            yield hidden, config.intermediate_size, 1
            continue
        width, shared = config.moe_intermediate_size, config.num_shared_experts * config.moe_intermediate_size
        yield width, hidden, 2 * config.num_experts
        yield hidden, width, config.num_experts
        if shared:
            yield shared, hidden, 2
            yield hidden, shared, 1


def _attention_matrices(config: ModelConfig, spec: LayerSpec) -> Iterator[tuple[int, int, int]]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if spec.mixer == "gqa":
        yield heads * config.head_dim, hidden, 1
        yield config.num_key_value_heads * config.head_dim, hidden, 2
        yield hidden, heads * config.head_dim, 1
        return
    shape = config.mla
    if shape.q_lora_rank:
        yield shape.q_lora_rank, hidden, 1
    yield heads * config.head_dim, shape.q_lora_rank or hidden, 1
    yield shape.latent_dim, hidden, 1
    yield heads * (shape.qk_nope_head_dim + shape.v_head_dim), shape.kv_lora_rank, 1
    yield hidden, heads * shape.v_head_dim, 1


def weight_bytes(config: ModelConfig, name: str) -> int:
    """Bytes of all weights in a format; what it does not shrink (see `block_matrices`) stays in bfloat16.

    fp8 is DeepSeek's: one byte and a float32 scale per block of 128 x 128. nvfp4 is NVIDIA's: four bits, one byte of
    scale per 16 weights of a row, one float32 per matrix.
    """
    total = config.num_parameters()
    if name == "bf16":
        return total * _BF16_BYTES
    shrunk = stored = 0
    for rows, columns, count in block_matrices(config):
        shrunk += rows * columns * count
        if name == "fp8":
            blocks = ceil(rows / _FP8_BLOCK) * ceil(columns / _FP8_BLOCK)
            stored += count * (rows * columns + _SCALE_BYTES * blocks)
        else:
            stored += count * (ceil(rows * columns / 2) + rows * ceil(columns / _NVFP4_BLOCK) + _SCALE_BYTES)
    return stored + (total - shrunk) * _BF16_BYTES
