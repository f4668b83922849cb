"""Loads a checkpoint without expanding its weights: codes and scales stay as they are stored."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tafkir.checkpoint.files import read_json
from tafkir.checkpoint.load import Checkpoint, on_meta, opened, placed, tokenizer_path
from tafkir.checkpoint.quantized import EncodedWeight
from tafkir.checkpoint.read import WeightFiles
from tafkir.errors import CheckpointError
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.models.hf import architecture_of, drop_absent_mtp, resolve_names, split_pieces
from tafkir.models.hf.convert import check_names, repeated_names
from tafkir.models.hf.table import Resolved
from tafkir.models.layers import Embedding, Linear
from tafkir.models.packed import PackedDecoder
from tafkir.ops.integers import quantize_int8
from tafkir.ops.packed import PackedFormat, PackedMatrix
from tafkir.recipe.bundled import find_checkpoint

__all__ = ["load_packed"]

# Whose values are read one by one: MLA's absorbed attention multiplies parts of it.
_EXPANDED = "kv_b_proj"


@torch.no_grad()
def load_packed(name: Path | str, *, verify_hashes: bool = True, int8_head: bool = False) -> Checkpoint:
    """`load_checkpoint`, but matrices stay in bfloat16, INT8, FP8 or NVFP4 where they are stored so.

    With `int8_head`, logits come from an INT8 copy of the output head, a scale a row: other numbers than the
    checkpoint's, from fewer bytes. Embeddings stay what they are.

    Those in other codes (INT4, MXFP4, MXFP8), or whose rows are no multiple of 16 long, become float32.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    path = find_checkpoint(name)
    hf_config = read_json(path / "config.json")
    with opened(path, hf_config, verify_hashes) as (config, files), placed(files):
        decoder = on_meta(PackedDecoder, drop_absent_mtp(config, files.names), torch.float32)
        table = architecture_of(hf_config, str(path / "config.json"))
        resolved, copies = resolve_names(decoder, table), repeated_names(decoder, table)
        wanted = {part for names in resolved for parts in names.parts for part in parts}
        check_names(wanted, set(files.names) - copies.keys())
        state = decoder.state_dict(keep_vars=True)
        for names in resolved:
            packed = _is_matrix(decoder, names.name)
            decoder.place(names.name, _parts(files, names, state) if packed else _whole(files, names, state))
        if int8_head:
            codes, scales = quantize_int8(decoder.head_weight)
            decoder.own_head = PackedMatrix("int8", codes, scales, tile=(1, codes.shape[1]))
    return Checkpoint(path, decoder.config, decoder, tokenizer_path(path), files.manifest)


def _is_matrix(decoder: Decoder, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    matrix = leaf == "weight" and isinstance(decoder.get_submodule(path), Linear | Embedding)
    return (matrix and _EXPANDED not in path) or isinstance(decoder.get_submodule(path), Experts) or leaf == "down_proj"


def _whole(files: WeightFiles, names: Resolved, state: dict[str, Tensor]) -> Tensor:
    like = state[names.name]  # on the meta device, whose empty_like imports sympy: half a second of a server's start
    place = torch.empty(like.shape, dtype=like.dtype)
    for theirs, piece in split_pieces(place, names):
        files.read_into(theirs, piece)
    return place


def _parts(files: WeightFiles, names: Resolved, state: dict[str, Tensor]) -> list[tuple[PackedMatrix, ...]]:
    shapes = {theirs: tuple(piece.shape) for theirs, piece in split_pieces(state[names.name], names)}
    return [tuple(_matrix(files, part, shapes[part]) for part in parts) for parts in names.parts]


def _matrix(files: WeightFiles, name: str, shape: tuple[int, ...]) -> PackedMatrix:
    encoded = files.encoded.get(name)
    if encoded is None:
        stored = files.read(name) if shape[1] % 16 == 0 else None
        if stored is not None and tuple(stored.shape) == shape and stored.dtype in (torch.float32, torch.bfloat16):
            return PackedMatrix("float32" if stored.dtype == torch.float32 else "bfloat16", stored)
    elif encoded.shape == shape and shape[1] % 16 == 0:
        matrix = _coded(files, encoded)
        if matrix is not None:
            return matrix
    place = torch.empty(shape)
    files.read_into(name, place)  # also says what is wrong with it
    return PackedMatrix("float32", place)


def _coded(files: WeightFiles, weight: EncodedWeight) -> PackedMatrix | None:
    """None for codes that the kernels do not read."""
    rows, columns = weight.shape
    tiles = {"int8": (1, columns), "fp8_channel": (1, columns), "fp8": (rows, columns), "fp8_block": (128, 128)}
    is_nvfp4 = weight.encoding in ("nvfp4", "nvfp4_inverse")
    if weight.encoding not in tiles and not is_nvfp4:
        return None
    codes, scale = files.read_stored(weight.codes), files.read_stored(weight.scale)
    total = files.read_stored(weight.global_scale).float().reshape(()) if weight.global_scale else torch.tensor(1.0)
    finite = scale.float().isfinite().all() and (scale.float() >= 0).all() and total.isfinite()
    if not finite or (codes.dtype == torch.float8_e4m3fn and not codes.float().isfinite().all()):
        raise CheckpointError("codes or scales are not finite", where=weight.codes, fix="quantize the checkpoint again")
    if is_nvfp4:  # kernels know no sign of a scale, not even that of -0
        scale = scale.view(torch.uint8).bitwise_and(0x7F).view(torch.float8_e4m3fn)
        kind: PackedFormat = "nvfp4" if weight.encoding == "nvfp4" else "nvfp4_inverse"
        return PackedMatrix(kind, codes.reshape(rows, columns // 2), scale, float(total))
    tile = tiles[weight.encoding]
    scale = scale.float().reshape(-(-rows // tile[0]), -(-columns // tile[1])).contiguous()
    return PackedMatrix("int8" if weight.encoding == "int8" else "fp8", codes, scale, tile=tile)
