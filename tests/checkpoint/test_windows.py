"""Windows of stored tensors: rows and columns of what a whole read gives, and no more bytes than they have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tafkir.checkpoint.read as read_module
from tafkir.checkpoint.read import open_weights
from tafkir.errors import CheckpointError
from tafkir.ops.fp8 import quantize_fp8_blocks

ROWS, COLUMNS, BLOCK = 37, 29, (8, 12)
NUM_SCALES = 5 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_fp8_blocks(weight, BLOCK)
    tensors = {"float32": weight, "bfloat16": weight.bfloat16(), "fp8": codes, "fp8_scale_inv": scale}
    save_file(tensors | {"vector": weight[0].clone()}, path / "model.safetensors")
    return path


def window(low: int, high: int) -> st.SearchStrategy[range]:
    pairs = st.tuples(st.integers(low, high - 1), st.integers(low + 1, high))
    return pairs.map(sorted).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: range(*pair))


@settings(max_examples=40)
@given(rows=window(0, ROWS), columns=st.just(range(COLUMNS)) | window(0, COLUMNS), chunk=st.integers(64, 4096))
@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_is_what_a_whole_read_has_there(
    folder: Path, name: str, dtype: torch.dtype, rows: range, columns: range, chunk: int
) -> None:
    asked, ask = [0], os.preadv

    def count(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = ask(descriptor, buffers, offset)
        asked[0] += got
        return got

    place = torch.full((len(rows), len(columns)), torch.nan, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, open_weights(folder, block_size=BLOCK) as files:
        whole = torch.empty(ROWS, COLUMNS, dtype=dtype)
        files.read_into(name, whole)
        patch.setattr(read_module, "CHUNK_BYTES", chunk)
        patch.setattr(os, "preadv", count)
        files.read_window(name, (ROWS, COLUMNS), rows, columns, place)
    assert torch.equal(place, whole[rows.start : rows.stop, columns.start : columns.stop])
    if name != "fp8":
        assert asked[0] == len(rows) * len(columns) * {"float32": 4, "bfloat16": 2}[name]
    else:
        blocks = -(-rows.stop // BLOCK[0]) - rows.start // BLOCK[0]
        assert asked[0] <= NUM_SCALES * 4 + blocks * BLOCK[0] * COLUMNS


def test_a_vector_has_rows_alone(folder: Path) -> None:
    place = torch.empty(5)
    with open_weights(folder, block_size=BLOCK) as files:
        whole = files.read("vector")
        files.read_window("vector", (COLUMNS,), range(3, 8), range(1), place)
        with pytest.raises(CheckpointError, match=r"shape is \[29\]; expected \[30\] by config"):
            files.read_window("vector", (30,), range(3, 8), range(1), place)
    assert torch.equal(place, whole[3:8])


@pytest.mark.parametrize("columns", [range(COLUMNS), range(4, 9)])
def test_values_that_are_not_finite_are_refused_where_they_are_read(tmp_path: Path, columns: range) -> None:
    weight = torch.zeros(ROWS, COLUMNS)
    weight[20, 6] = torch.inf
    weight[30, 6] = 1e39 / 3  # finite in float32, not in float16
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as files:
        for rows, dtype, message in (
            (range(10, 25), torch.float32, "the weights are not finite"),
            (range(25, 35), torch.float16, "the weights overflow in float16"),
        ):
            with pytest.raises(CheckpointError, match=message):
                place = torch.empty(len(rows), len(columns), dtype=dtype)
                files.read_window("weight", (ROWS, COLUMNS), rows, columns, place)
        files.read_window("weight", (ROWS, COLUMNS), range(0, 20), columns, torch.empty(20, len(columns)))
