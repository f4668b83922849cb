"""The same quantized weights under another tool's names: ModelOpt's, or those of compressed-tensors. Without torch.

Codes and block scales are copied bit for bit; global scales are inverted, as the two tools have them the other way
round (one division in float32, the one that engines make when they load). What the other layout has no place for is
refused. MXFP4 may become NVFP4 on the way: its scales are powers of two, which E4M3 holds over 18 binades.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tafkir.checkpoint.cache_scales import CACHE_SCALE, cache_scale_name
from tafkir.checkpoint.files import (
    INDEX_FILE,
    SCALE_SUFFIX,
    SINGLE_FILE,
    StoredFiles,
    fp8_block_size,
    open_files,
    read_json,
    read_manifest,
)
from tafkir.checkpoint.folder import MAX_SHARD_BYTES, refuse_present, write_folder
from tafkir.checkpoint.header import MANIFEST_DTYPES
from tafkir.checkpoint.manifest import MANIFEST_NAME, TensorEntry
from tafkir.checkpoint.quantized import EncodedWeight, packed_method
from tafkir.errors import CapacityError, CheckpointError
from tafkir.quant.formats import Piece, pieces_of
from tafkir.quant.layouts import compressed_tensors_config, modelopt_configs
from tafkir.quant.policy import Decision, sibling_group
from tafkir.quant.shards import Shard
from tafkir.quant.validate import validate_checkpoint
from tafkir.recipe.quantize import LAYOUT_FORMATS, FormatName, LayoutName, QuantizeConfig
from tafkir.runlog.atomic import write_json
from tafkir.runlog.progress import Progress

__all__ = ["RelayoutResult", "cache_of", "mxfp4_scales_as_nvfp4", "relayout_checkpoint"]

_CHUNK_BYTES = 4 << 20
_QUANT_CONFIG_FILE = "hf_quant_config.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".pkl")
# E4M3 holds the powers of two from 2^-9, a subnormal, to 2^8.
_E4M3_OF_POWER = {p: (p + 7) << 3 if p >= -6 else 1 << (p + 9) for p in range(-9, 9)}


@dataclass(frozen=True, slots=True)
class RelayoutResult:
    """What was done.

    Attributes:
        path: the new checkpoint.
        weights: quantized weights that were carried over, by format.
        copied: tensors that are the same in both.
        num_bytes: of all tensors written.
    """

    path: Path
    weights: dict[str, int]
    copied: int
    num_bytes: int


@dataclass(slots=True)
class _Move:
    """A tensor to be written: the bytes of a stored one, or these."""

    piece: Piece
    stored: str = ""
    content: bytes | None = None


@dataclass(slots=True)
class _Plan:
    decisions: list[Decision] = field(default_factory=list)
    moves: list[_Move] = field(default_factory=list)
    static_inputs: bool = False


def relayout_checkpoint(
    source: Path,
    path: Path,
    layout: LayoutName,
    *,
    cast: Literal["nvfp4"] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> RelayoutResult:
    """Write a quantized checkpoint in another layout, a few megabytes at a time; the folder appears when it is whole.

    Args:
        source: a folder by ModelOpt or compressed-tensors, or with DeepSeek's FP8 blocks.
        path: the new folder; must not be there.
        layout: whose names it gets.
        cast: nvfp4 makes NVFP4 (weights alone) of MXFP4.
        max_shard_bytes: of a file's tensors.

    Raises:
        CheckpointError: the source is not quantized or damaged, the layout has no place for a format, or a cast would
            lose something.
        CapacityError: the disk has too little room.
    """
    refuse_present(path)
    if layout == "gpt-oss":
        raise CheckpointError("gpt-oss has stacks of experts, the others each by itself", where="--layout")
    hf_config = read_json(source / "config.json")
    blocks, method = fp8_block_size(hf_config, str(source / "config.json")), packed_method(hf_config, source)
    if method is None and blocks is None:
        raise CheckpointError(
            "the checkpoint is not quantized", where=str(source), fix="`tafkir quantize` writes either layout"
        )
    if method == layout and cast is None:
        raise CheckpointError(f"the layout is {layout} already", where=str(source), fix="take it as it is")
    with open_files(source, block_size=blocks, packed=method, manifest=read_manifest(source)) as files:
        plan = _plan(files, layout, cast)
        config = QuantizeConfig(layout=layout, preset="r1-fp4", kv_cache=cache_of(hf_config, source))
        with write_folder(path) as staging:
            _check_room(staging, plan)
            shards, hashes = _write(staging, files, plan, max_shard_bytes)
            _write_beside(staging, files, plan, config, hf_config, shards, hashes)
            validate_checkpoint(staging, plan.decisions, config)
    weights: dict[str, int] = {}
    for decision in plan.decisions:
        if decision.format != "keep":
            weights[decision.format] = weights.get(decision.format, 0) + 1
    kept = sum(decision.format == "keep" for decision in plan.decisions)
    return RelayoutResult(path, weights, kept, sum(move.piece.num_bytes for move in plan.moves))


# ---- the plan -------------------------------------------------------------------------------------------------------


def _plan(files: StoredFiles, layout: LayoutName, cast: str | None) -> _Plan:
    plan = _Plan()
    largest = _largest_exponents(files) if cast == "nvfp4" else {}
    for name in files.names:
        shape = files.shape(name)
        weight = files.encoded.get(name)
        stored = files.tensors.get(name)
        if weight is None and (stored is None or stored.dtype != "F8_E4M3"):
            assert stored is not None
            plan.decisions.append(Decision(name, "other", "keep", shape))
            plan.moves.append(_Move(Piece(name, stored.dtype, shape), name))
            continue
        format = _format_of(files, name, weight)
        if cast == "nvfp4" and format == "mxfp4":
            assert weight is not None
            format = "nvfp4_w4a16"
            contents = [weight.codes, *_cast_scales(files, name, weight, largest[sibling_group(name)])]
        else:
            contents = _contents(files, name, weight, format, layout)
        if format not in LAYOUT_FORMATS[layout]:
            fix = "--cast nvfp4 keeps every value" if format == "mxfp4" else "quantize the original to another format"
            raise CheckpointError(f"{layout} has no place for {format}", where=name, fix=fix)
        plan.static_inputs |= format == "fp8" and f"{name.removesuffix('weight')}input_scale" in files.tensors
        plan.decisions.append(Decision(name, "other", format, shape))
        pieces = _pieces(files, name, shape, format, layout)
        for piece, content in zip(pieces, contents, strict=True):
            plan.moves.append(_Move(piece, content) if isinstance(content, str) else _Move(piece, "", content))
    for name in files.tensors:
        if said := CACHE_SCALE.fullmatch(name):
            other = cache_scale_name(said["attention"], "k" if said["part"] == "k" else "v", layout)
            piece = Piece(other, "F32", () if layout == "modelopt" else (1,))
            plan.moves.append(_Move(piece, "", _packed(files.read_number(name), name)))
    return plan


def _format_of(files: StoredFiles, name: str, weight: EncodedWeight | None) -> FormatName:
    if weight is None:
        if files.block_size != (128, 128):
            raise CheckpointError(
                f"the FP8 blocks are {files.block_size}", where=name, expected="128x128, as both layouts have them"
            )
        return "fp8_block"
    if weight.encoding == "nvfp4" or weight.encoding == "nvfp4_inverse":
        stem = name.removesuffix("weight")
        known = any(f"{stem}{part}" in files.tensors for part in ("input_scale", "input_global_scale"))
        return "nvfp4" if known else "nvfp4_w4a16"
    if weight.encoding == "mxfp4_stack":
        raise CheckpointError(
            "neither layout has a place for stacks of experts", where=name, fix="take gpt-oss' files as they are"
        )
    return weight.encoding


def _pieces(
    files: StoredFiles, name: str, shape: tuple[int, ...], format: FormatName, layout: LayoutName
) -> list[Piece]:
    """What the weight becomes; FP8's scales stay float32, and its inputs' scale goes along where there is one."""
    pieces = pieces_of(name, shape, format, layout, "F32")
    stem = name.removesuffix("weight")
    if format == "fp8" and layout == "compressed-tensors" and f"{stem}input_scale" in files.tensors:
        pieces.append(Piece(f"{stem}input_scale", "F32", (1,)))
    return pieces


def _contents(
    files: StoredFiles, name: str, weight: EncodedWeight | None, format: FormatName, layout: LayoutName
) -> list[str | bytes]:
    """For each piece the stored tensor that it is, or its bytes."""
    stem = name.removesuffix("weight")
    if weight is None:
        return [name, _floats(files, name + SCALE_SUFFIX)]
    if format in ("nvfp4", "nvfp4_w4a16"):
        assert weight.global_scale is not None
        turned = (weight.encoding == "nvfp4") == (layout == "compressed-tensors")
        parts = [weight.global_scale]
        if format == "nvfp4":
            parts += [part for part in (f"{stem}input_scale", f"{stem}input_global_scale") if part in files.tensors][:1]
        numbers = [_number(files, part) for part in parts]
        return [weight.codes, weight.scale, *(_packed(1 / n if turned else n, name) for n in numbers)]
    if format in ("fp8", "fp8_channel", "fp8_block"):
        contents: list[str | bytes] = [weight.codes, _floats(files, weight.scale)]
        if f"{stem}input_scale" in files.tensors:
            contents.append(_packed(_number(files, f"{stem}input_scale"), name))
        elif format == "fp8" and layout == "modelopt":
            raise CheckpointError(
                "its inputs have no scale", where=name, expected="input_scale, which ModelOpt's FP8 needs",
                fix="quantize the original to fp8_channel",
            )  # fmt: skip
        return contents
    return list(weight.parts)


def _floats(files: StoredFiles, name: str) -> bytes:
    """Scales as float32, which holds each of the dtypes that they come in."""
    dtype, content = files.tensors[name].dtype, files.read_bytes(name)
    if dtype == "F32":
        return content
    wide = bytearray(4 * math.prod(files.tensors[name].shape))
    if dtype == "BF16":
        wide[2::4], wide[3::4] = content[0::2], content[1::2]
        return bytes(wide)
    if dtype == "F16":
        return struct.pack(f"<{len(content) // 2}f", *struct.unpack(f"<{len(content) // 2}e", content))
    if dtype == "F8_E8M0":
        return struct.pack(f"<{len(content)}f", *(math.ldexp(1, byte - 127) for byte in content))
    raise CheckpointError(f"dtype is {dtype}", where=name, expected="F32, BF16, F16 or F8_E8M0")


def _number(files: StoredFiles, name: str) -> float:
    return float(struct.unpack("<f", _floats(files, name))[0])


def _packed(number: float, name: str) -> bytes:
    """A float32; the division before it was in float64, which rounds to the same as one in float32."""
    if not 0 < number < 3.4028235e38:
        raise CheckpointError(f"a global scale of {number} is none", where=name, fix="quantize the original again")
    return struct.pack("<f", number)


# ---- MXFP4 as NVFP4 -------------------------------------------------------------------------------------------------


def _largest_exponents(files: StoredFiles) -> dict[str, int]:
    """The largest E8M0 byte of every group of MXFP4 weights that engines read as one."""
    largest: dict[str, int] = {}
    for name, weight in files.encoded.items():
        if weight.encoding == "mxfp4":
            found = max(files.read_bytes(weight.scale), default=0)
            if found == 255:
                raise CheckpointError("the scales are not finite", where=weight.scale, fix="take the checkpoint anew")
            key = sibling_group(name)
            largest[key] = max(largest.get(key, 0), found)
    return largest


def _cast_scales(files: StoredFiles, name: str, weight: EncodedWeight, largest: int) -> list[str | bytes]:
    scale, exponent = mxfp4_scales_as_nvfp4(files.read_bytes(weight.scale), largest)
    lost = [block for block, byte in enumerate(scale[::2]) if byte == 0]
    if lost:
        codes = files.read_bytes(weight.codes)
        if any(code & 0x77 for block in lost for code in codes[16 * block : 16 * block + 16]):
            raise CheckpointError(
                f"{len(lost)} blocks are more than 2^17 times smaller than the largest, which E4M3 scales cannot say",
                where=name,
                fix="quantize the original to NVFP4",
            )
        scale = scale.replace(b"\0", b"\1")
    return [scale, _packed(math.ldexp(1, exponent), name)]


def mxfp4_scales_as_nvfp4(scales: bytes, largest: int) -> tuple[bytes, int]:
    """E4M3 block scales and the exponent of the global scale under which the same codes have the same values.

    With m = k_max - 8, the global scale is 2^m, and that of a block 2^(k - m) (ModelOpt's `--cast_mxfp4_to_nvfp4`).

    Args:
        scales: E8M0 bytes of blocks of 32.
        largest: the largest byte of all that share the global scale.

    Returns:
        Two E4M3 bytes for each block, 0 where none is small enough; the exponent m.
    """
    table = bytes(_E4M3_OF_POWER.get(byte - largest + 8, 0) if byte <= largest else 0 for byte in range(256))
    once = scales.translate(table)
    twice = bytearray(2 * len(once))
    twice[0::2] = twice[1::2] = once
    return bytes(twice), largest - 127 - 8


# ---- the work -------------------------------------------------------------------------------------------------------


def _check_room(staging: Path, plan: _Plan) -> None:
    wanted = sum(move.piece.num_bytes for move in plan.moves) + (64 << 20)
    free = shutil.disk_usage(staging).free
    if free < wanted:
        raise CapacityError(
            f"the disk has {free / 1e9:.2f} GB free", where=str(staging.parent), expected=f"{wanted / 1e9:.2f} GB",
            fix="free space, or choose another place",
        )  # fmt: skip


def _split(moves: list[_Move], max_shard_bytes: int) -> Iterator[list[_Move]]:
    shard: list[_Move] = []
    filled = 0
    for move in moves:
        if shard and filled + move.piece.num_bytes > max_shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(move)
        filled += move.piece.num_bytes
    yield shard


def _write(
    staging: Path, files: StoredFiles, plan: _Plan, max_shard_bytes: int
) -> tuple[dict[str, list[Piece]], dict[str, str]]:
    """The files with their tensors, and the hash of every tensor."""
    parts = list(_split(plan.moves, max_shard_bytes))
    total = len(parts)
    names = [SINGLE_FILE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    megabytes = max(1, sum(move.piece.num_bytes for move in plan.moves) >> 20)
    hashes: dict[str, str] = {}
    done = 0
    with Progress(f"convert {files.listing.parent.name} (MB)", megabytes) as progress:
        for name, moves in zip(names, parts, strict=True):
            shard = Shard(staging / name, [move.piece for move in moves])
            try:
                for move in moves:
                    hashes[move.piece.name] = _copy(files, move, shard)
                    done += move.piece.num_bytes
                    progress.update(min(megabytes, done >> 20))
            finally:
                os.close(shard.descriptor)
        progress.update(megabytes)
    return {name: [m.piece for m in moves] for name, moves in zip(names, parts, strict=True)}, hashes


def _copy(files: StoredFiles, move: _Move, shard: Shard) -> str:
    if move.content is not None:
        return shard.write(move.piece.name, memoryview(move.content))
    stored, expected = files.tensors[move.stored], files.check_entry(move.stored)
    tensor, digest = shard.tensor(move.piece.name), hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, stored.num_bytes)))
    for start in range(0, stored.num_bytes, _CHUNK_BYTES):
        content = buffer[: min(_CHUNK_BYTES, stored.num_bytes - start)]
        files.read_at(stored, stored.offset + start, content)
        digest.update(content)
        tensor.append(content)
    if expected is not None and files.verify_hashes and digest.hexdigest() != expected:
        raise files.unlike_manifest(move.stored)
    return tensor.hash()


def cache_of(hf_config: Mapping[str, Any], source: Path) -> Literal["none", "fp8", "nvfp4"]:
    """The cache that a checkpoint asks engines for.

    Raises:
        CheckpointError: in numbers that are not known here.
    """
    scheme = (hf_config.get("quantization_config") or {}).get("kv_cache_scheme")
    if scheme is None and (source / _QUANT_CONFIG_FILE).is_file():
        scheme = (read_json(source / _QUANT_CONFIG_FILE).get("quantization") or {}).get("kv_cache_quant_algo")
    if scheme in (None, "none"):
        return "none"
    if scheme == "FP8" or (isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")):
        return "fp8"
    if scheme == "NVFP4":
        return "nvfp4"
    raise CheckpointError(
        f"the cache's format {scheme!r} is not known", where=str(source), expected="FP8, NVFP4 or none"
    )


def _write_beside(
    staging: Path,
    files: StoredFiles,
    plan: _Plan,
    config: QuantizeConfig,
    hf_config: Mapping[str, Any],
    shards: Mapping[str, list[Piece]],
    hashes: Mapping[str, str],
) -> None:
    """Index, configs, manifest where the source has one, and whatever else is in its folder."""
    for file in sorted(files.listing.parent.iterdir()):
        own = file.name in (INDEX_FILE, MANIFEST_NAME, "config.json", _QUANT_CONFIG_FILE)
        if file.is_file() and not own and not file.name.startswith(".") and file.suffix not in _NOT_COPIED:
            shutil.copyfile(file, staging / file.name)
    if len(shards) > 1:
        total = sum(piece.num_bytes for pieces in shards.values() for piece in pieces)
        weight_map = {piece.name: file for file, pieces in shards.items() for piece in pieces}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(staging / INDEX_FILE, index)
    if config.layout == "modelopt":
        nested, quantization = modelopt_configs(plan.decisions, config)
        write_json(staging / _QUANT_CONFIG_FILE, nested)
    else:
        quantization = compressed_tensors_config(plan.decisions, config, static_inputs=plan.static_inputs)
    write_json(staging / "config.json", {**hf_config, "quantization_config": quantization})
    if files.manifest is not None:
        entries = {
            piece.name: TensorEntry(dtype=MANIFEST_DTYPES[piece.dtype], shape=piece.shape, sha256=hashes[piece.name])
            for pieces in shards.values()
            for piece in pieces
        }
        lineage = {**files.manifest.lineage, "converted_from": files.listing.parent.name, "layout": config.layout}
        manifest = files.manifest.model_copy(update={"lineage": lineage, "tensors": dict(sorted(entries.items()))})
        write_json(staging / MANIFEST_NAME, manifest.model_dump(mode="json"))
