"""A checkpoint as one GGUF file, for llama.cpp and what builds on it.

Matrices become F32, F16, BF16 or Q8_0; with `auto`, MXFP4 and NVFP4 codes and scales are carried over bit for bit in
the order that GGUF has for them, where llama.cpp can use them. Norms, routers and biases are F32, as llama.cpp wants
them. One matrix is in memory at a time, whatever the size of the checkpoint.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tafkir.checkpoint.files import fp8_block_size, read_json, read_manifest
from tafkir.checkpoint.folder import write_error
from tafkir.checkpoint.quantized import EncodedWeight, packed_method
from tafkir.checkpoint.read import WeightFiles, open_weights
from tafkir.errors import BackendUnavailable, CheckpointError
from tafkir.export.gguf_meta import architecture_of, model_fields, read_gguf_tokenizer
from tafkir.recipe.hf_config import config_from_hf
from tafkir.recipe.model import ModelConfig
from tafkir.runlog.progress import Progress

__all__ = ["GgufResult", "GgufType", "export_gguf", "repack_mxfp4", "repack_nvfp4"]

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Bytes of a block and numbers in it, by GGUF's names.
_BLOCKS = {"F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "Q8_0": (34, 32), "MXFP4": (17, 32), "NVFP4": (36, 64)}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "MXFP4": 38, "NVFP4": 39}

# The families whose graph in llama.cpp multiplies by NVFP4's global scale; others would compute without it.
_WITH_GLOBAL_SCALES = frozenset({"qwen3", "qwen3_moe"})

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GgufResult:
    """What was written.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the family.
        num_bytes: of the file.
        types: tensors by their type.
        left_out: weights of multi-token prediction, which stay behind.
    """

    path: Path
    architecture: str
    num_bytes: int
    types: dict[str, int]
    left_out: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: its parts are written one after the other."""

    name: str
    type: str
    shape: tuple[int, ...]
    parts: tuple[Callable[[], Bytes], ...]

    @property
    def num_bytes(self) -> int:
        size, numbers = _BLOCKS[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // numbers * size


def _require_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise BackendUnavailable("the package gguf is not installed", fix="pip install 'tafkir[serve]'") from error


@torch.no_grad()
def export_gguf(source: Path, path: Path, type: GgufType = "auto") -> GgufResult:
    """Write a checkpoint as a GGUF file; it appears under its name when it is whole.

    Args:
        source: a checkpoint folder of a family in `gguf_meta.ARCHITECTURES`, as it is trained or quantized.
        path: the file; must not be there.
        type: of matrices; auto keeps 4-bit codes, float32 and float16, and makes BF16 of the rest.

    Raises:
        BackendUnavailable: the package `gguf` is missing.
        CheckpointError: the checkpoint is damaged, or is something that llama.cpp has no place for.
    """
    gguf = _require_gguf()
    if path.exists():
        raise CheckpointError("is there already", where=str(path), fix="choose another name, or remove it")
    hf_config = read_json(source / "config.json")
    where = str(source / "config.json")
    config = config_from_hf({k: v for k, v in hf_config.items() if k != "quantization_config"}, where)
    architecture = architecture_of(config, where)
    blocks, packed = fp8_block_size(hf_config, where), packed_method(hf_config, source)
    with open_weights(source, block_size=blocks, packed=packed, manifest=read_manifest(source)) as files:
        names = gguf.get_tensor_name_map(_arch(gguf, architecture), config.num_hidden_layers)
        entries, left_out = _entries(files, config, type, lambda name: _mapped(names, name))
        staging = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(gguf, staging, source, architecture, config, entries)
            staging.replace(path)
        except OSError as error:
            raise write_error(path, error) from error
        finally:
            staging.unlink(missing_ok=True)
    types: dict[str, int] = {}
    for entry in entries:
        types[entry.type] = types.get(entry.type, 0) + 1
    return GgufResult(path, architecture, path.stat().st_size, types, left_out)


def _arch(gguf: Any, name: str) -> Any:
    return next(arch for arch, its in gguf.MODEL_ARCH_NAMES.items() if its == name)


def _mapped(names: Any, name: str) -> str:
    """GGUF's name of a weight; a bias on the router's choice has none of its own in checkpoints."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace(
        "gate.expert_bias", "gate.expert_bias.bias"
    )
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError("llama.cpp has no place for this weight in its family", where=name)
    return str(found)


# ---- what becomes of each weight ------------------------------------------------------------------------------------


def _entries(
    files: WeightFiles, config: ModelConfig, type: GgufType, mapped: Callable[[str], str]
) -> tuple[list[_Entry], int]:
    """Every tensor of the file, experts of a layer as one; and how many weights stay behind."""
    entries: list[_Entry] = []
    experts: dict[str, dict[int, str]] = {}
    left_out = 0
    for name in files.names:
        layer, expert = _LAYER.match(name), _EXPERT.fullmatch(name)
        if (layer and int(layer[1]) >= config.num_hidden_layers) or name.startswith(("mtp.", "model.mtp")):
            left_out += 1
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        elif expert:
            experts.setdefault(f"{expert[1]}.{expert[3]}_proj.weight", {})[int(expert[2])] = name
        elif name.endswith("kv_b_proj.weight"):
            entries += _absorbed(files, config, name, type, mapped)
        else:
            entries += _whole(files, [name], mapped(name), type, config)
    if config.tie_word_embeddings and not config.model_type.startswith("qwen3"):
        # Only Qwen3's graph reads the embedding as the head.
        table = next(name for name in files.names if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
        entries += _whole(files, [table], "output.weight", type, config)
    for stacked, members in experts.items():
        if sorted(members) != list(range(config.num_experts)):
            raise CheckpointError("experts are missing", where=stacked, expected=f"{config.num_experts} of them")
        weights = [members[i] for i in range(config.num_experts)]
        entries += _whole(files, weights, mapped(stacked), type, config, stacked=True)
    return entries, left_out


def _whole(
    files: WeightFiles, members: list[str], name: str, type: GgufType, config: ModelConfig, *, stacked: bool = False
) -> Iterator[_Entry]:
    """A weight, or one of each expert, with the scales that GGUF keeps beside NVFP4."""
    shape = files.shape(members[0])
    kind = _type_of(files, members, shape, name, type)
    if kind == "NVFP4" and config.model_type not in _WITH_GLOBAL_SCALES:
        kind = "BF16"
    full = (len(members), *shape) if stacked else shape
    encoded = [files.encoded.get(member) for member in members]
    if kind == "NVFP4":
        weights = [weight for weight in encoded if weight is not None]
        yield _Entry(name, kind, full, tuple(partial(_nvfp4, files, weight) for weight in weights))
        numbers = np.array([_global_scale(files, weight) for weight in weights], dtype=np.float32)
        yield _Entry(name.removesuffix("weight") + "scale", "F32", (len(members),), (lambda: numbers.view(np.uint8),))
    elif kind == "MXFP4":
        weights = [weight for weight in encoded if weight is not None]
        yield _Entry(name, kind, full, tuple(partial(_mxfp4, files, weight) for weight in weights))
    else:
        yield _Entry(name, kind, full, tuple(partial(_converted, files, member, kind) for member in members))


def _type_of(files: WeightFiles, members: list[str], shape: tuple[int, ...], name: str, type: GgufType) -> str:
    """Norms, biases and routers in F32; the matrices as asked, or as they are stored."""
    if len(shape) == 1 or name.endswith((".bias", "ffn_gate_inp.weight")):
        return "F32"
    width = shape[-1]
    if type == "auto":
        encodings = {files.encoded[member].encoding if member in files.encoded else "" for member in members}
        if encodings <= {"nvfp4", "nvfp4_inverse"} and width % 64 == 0:
            return "NVFP4"
        if encodings == {"mxfp4"} and width % 32 == 0:
            return "MXFP4"
        stored = {files.tensors[member].dtype if member in files.tensors else "" for member in members}
        return "F32" if stored == {"F32"} else "F16" if stored == {"F16"} else "BF16"
    # Rows that do not split into Q8_0's blocks keep the precision of a float.
    return "F16" if type == "q8_0" and width % 32 else type.upper()


def _absorbed(
    files: WeightFiles, config: ModelConfig, name: str, type: GgufType, mapped: Callable[[str], str]
) -> Iterator[_Entry]:
    """MLA's map up from the latent, parted by heads: keys the other way round, so that queries meet the latent."""
    mla, heads = config.mla, config.num_attention_heads
    nope, rank, value = mla.qk_nope_head_dim, mla.kv_lora_rank, mla.v_head_dim
    # Parted and turned around, 4-bit blocks would be others.
    plain: GgufType = "bf16" if type == "auto" and name in files.encoded else type

    def part(keys: bool, kind: str) -> Bytes:
        both = _read(files, name).view(heads, nope + value, rank)
        return _as_type((both[:, :nope].transpose(1, 2) if keys else both[:, nope:]).contiguous(), kind)

    for keys, shape in ((True, (heads, rank, nope)), (False, (heads, value, rank))):
        target = mapped(name.replace("kv_b_proj", "k_b_proj" if keys else "v_b_proj"))
        kind = _type_of(files, [name], shape, target, plain)
        yield _Entry(target, kind, shape, (partial(part, keys, kind),))


def _read(files: WeightFiles, name: str) -> Tensor:
    """The weight as float32."""
    place = torch.empty(files.shape(name))
    files.read_into(name, place)
    return place


def _converted(files: WeightFiles, name: str, kind: str) -> Bytes:
    return _as_type(_read(files, name), kind)


def _as_type(values: Tensor, type: str) -> Bytes:
    flat: Tensor
    if type == "F32":
        flat = values.flatten()
    elif type in ("F16", "BF16"):
        flat = values.flatten().to(torch.float16 if type == "F16" else torch.bfloat16)
        if not bool(flat.isfinite().all()):
            raise CheckpointError("the weights overflow in float16", fix="--type bf16")
    else:
        return _q8_0(values)
    return flat.view(torch.uint8).numpy()


def _q8_0(values: Tensor) -> Bytes:
    """Blocks of 32: a float16 scale, the largest magnitude / 127, and 32 integers, halves away from zero."""
    blocks = values.reshape(-1, 32).numpy()
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    ratio = blocks * inverse
    codes = np.trunc(ratio + np.copysign(np.float32(0.5), ratio)).astype(np.int8)
    whole: Bytes = np.concatenate([scale.astype(np.float16).view(np.uint8), codes.view(np.uint8)], axis=1)
    return whole.reshape(-1)


# ---- 4-bit codes ----------------------------------------------------------------------------------------------------


def _nvfp4(files: WeightFiles, weight: EncodedWeight) -> Bytes:
    codes, scale = files.read_stored(weight.codes), files.read_stored(weight.scale)
    return repack_nvfp4(codes.numpy(), scale.view(torch.uint8).numpy())


def _mxfp4(files: WeightFiles, weight: EncodedWeight) -> Bytes:
    codes, scale = files.read_stored(weight.codes), files.read_stored(weight.scale)
    return repack_mxfp4(codes.numpy(), scale.view(torch.uint8).numpy())


def _global_scale(files: WeightFiles, weight: EncodedWeight) -> float:
    assert weight.global_scale is not None
    number = files.read_stored(weight.global_scale).reshape(())
    return float(number.reciprocal() if weight.encoding == "nvfp4_inverse" else number)


def _halves(packed: Bytes, size: int) -> Bytes:
    """Neighbours in a byte become partners half a block apart: [..., size / 2] bytes, the same codes."""
    pairs = packed.reshape(-1, size // 2)
    codes = np.empty((len(pairs), size), dtype=np.uint8)
    codes[:, 0::2], codes[:, 1::2] = pairs & np.uint8(15), pairs >> np.uint8(4)
    return codes[:, : size // 2] | (codes[:, size // 2 :] << np.uint8(4))


def repack_nvfp4(packed: Bytes, scale: Bytes) -> Bytes:
    """NVFP4 in GGUF's order: for 64 numbers 4 scales, then 4 x 8 bytes; the global scale stands beside it.

    Args:
        packed: uint8 [N, K / 2], the even number in the low half of a byte.
        scale: E4M3 bytes [N, K / 16]; K a multiple of 64.
    """
    return np.concatenate([scale.reshape(-1, 4), _halves(packed, 16).reshape(-1, 32)], axis=1).reshape(-1)


def repack_mxfp4(packed: Bytes, scale: Bytes) -> Bytes:
    """MXFP4 in GGUF's order: for 32 numbers an E8M0 scale, then 16 bytes.

    Args:
        packed: uint8 [N, K / 2], the even number in the low half of a byte.
        scale: E8M0 bytes [N, K / 32].
    """
    return np.concatenate([scale.reshape(-1, 1), _halves(packed, 32)], axis=1).reshape(-1)


# ---- the file -------------------------------------------------------------------------------------------------------


def _write(
    gguf: Any, staging: Path, source: Path, architecture: str, config: ModelConfig, entries: list[_Entry]
) -> None:
    writer = gguf.GGUFWriter(staging, architecture)
    try:
        _write_fields(writer, source, architecture, config, entries)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.type]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.num_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (out,) = writer.fout
        writer.write_padding(out, out.tell())
        megabytes = max(1, sum(entry.num_bytes for entry in entries) >> 20)
        with Progress(f"gguf {source.name} (MB)", megabytes) as progress:
            done = 0
            for entry in entries:
                for part in entry.parts:
                    out.write(part().data)
                writer.write_padding(out, entry.num_bytes)
                done += entry.num_bytes
                progress.update(min(megabytes, done >> 20))
            progress.update(megabytes)
    finally:
        writer.close()


def _write_fields(writer: Any, source: Path, architecture: str, config: ModelConfig, entries: list[_Entry]) -> None:
    writer.add_name(source.resolve().name)
    for key, value in model_fields(config).items():
        add = (
            writer.add_bool if isinstance(value, bool)
            else writer.add_string if isinstance(value, str)
            else writer.add_float32 if isinstance(value, float)
            else writer.add_uint32
        )  # fmt: skip
        add(f"{architecture}.{key}", value)
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.type] = sizes.get(entry.type, 0) + entry.num_bytes
    writer.add_file_type(_FILE_TYPES[max(sizes, key=lambda kind: sizes[kind])])
    writer.add_quantization_version(2)
    tokenizer = read_gguf_tokenizer(source, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    for key, token in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
