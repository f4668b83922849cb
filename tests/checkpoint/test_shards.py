"""Shards, headers and what is read from them: one tensor in one place, at the size it says, or an error naming it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tafkir.checkpoint.read as read_module
from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.finite import all_finite
from tafkir.checkpoint.read import open_weights
from tafkir.checkpoint.tensors import tensor_entry
from tafkir.checkpoint.write import write_weights
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.recipe.model import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts=4,
    n_group=2,
)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in several shards, as from elsewhere: without a manifest."""
    save_checkpoint(tmp_path / "model", build_decoder(CONFIG, seed=0), max_shard_bytes=8000)
    (tmp_path / "model" / "tafkir.json").unlink()
    return tmp_path / "model"


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit(folder: Path, shard: int, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = shards_of(folder)[shard]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_are_what_hugging_face_writes(folder: Path) -> None:
    files = shards_of(folder)
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / INDEX).read_text())
    read: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 8000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        read |= tensors
    assert index["weight_map"].keys() == read.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
    assert not (folder / "model.safetensors").exists()


def test_shards_hold_the_model(folder: Path) -> None:
    decoder, loaded = build_decoder(CONFIG, seed=0), load_checkpoint(folder).decoder
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_files_are_those_of_safetensors_own_writer(tmp_path: Path) -> None:
    """Same order, header and padding, byte for byte; dtypes are mixed, names not ASCII, shapes empty or scalar."""
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(2, 7).bfloat16(),
        "c": torch.randn(4).half(),
        "ä": torch.randn(()),
        "nothing": torch.empty(0, 3),
        "codes": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    (tmp_path / "ours").mkdir()
    plain = {name: tensor for name, tensor in tensors.items() if name != "codes"}
    write_weights(tmp_path / "ours", {n: tensor_entry(t) for n, t in plain.items()}, lambda: plain.items(), 10**9)
    save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("chunk_bytes", [16, 1 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_reading_equals_safetensors(
    stored: torch.dtype, wanted: torch.dtype, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_module, "CHUNK_BYTES", chunk_bytes)
    shapes: tuple[tuple[int, ...], ...] = ((7, 5), (1,), (0, 4), (3, 2, 2), (37,))
    tensors = {str(shape): torch.randn(shape).to(stored) for shape in shapes}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as files, safe_open(tmp_path / "model.safetensors", framework="pt") as theirs:
        assert sorted(files.names) == sorted(tensors)
        for name in files.names:
            expected = theirs.get_tensor(name)
            assert torch.equal(files.read(name), expected) and files.read(name).dtype == stored
            place = torch.full(expected.shape, 9.0, dtype=wanted)
            files.read_into(name, place)
            assert torch.equal(place, expected.to(wanted))
        turned = torch.zeros(5, 7, dtype=wanted)
        files.read_into("(7, 5)", turned.T)
        assert torch.equal(turned.T, tensors["(7, 5)"].to(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_judged_like_isfinite(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    if dtype == torch.float32:
        # All exponents and signs, with mantissas of zeros, ones, and one at the end.
        values = torch.cat([(patterns << 16) | tail for tail in (0, 1, 0xFFFF)]).view(torch.float32)
    else:
        values = patterns.to(torch.int16).view(dtype)
    finite = torch.isfinite(values)
    assert all_finite(values[finite]) and not all_finite(values)
    assert all_finite(values[:0])
    some = torch.cat((torch.nonzero(~finite)[::37, 0], torch.nonzero(finite)[::997, 0]))
    for index in some.tolist():
        assert all_finite(values[index : index + 1]) == bool(finite[index]), hex(int(patterns[index % len(patterns)]))


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    edit(folder, 2, lambda tensors: tensors.update({"model.word_embeddings.weight": torch.zeros(40, 16)}))
    with pytest.raises(
        CheckpointError, match=r"model-00003-of-\d+\.safetensors: model\.word_embeddings\.weight: .*twice"
    ) as e:
        load_checkpoint(folder)
    assert "in model-00001-of" in str(e.value)


def test_a_tensor_that_the_index_does_not_know_is_refused(folder: Path) -> None:
    edit(folder, 1, lambda tensors: tensors.update(spare=torch.zeros(2)))
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-\d+\.safetensors: spare: .*index\.json says .* in no file"
    ):
        load_checkpoint(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_refused(folder: Path) -> None:
    last = shards_of(folder)[-1].name
    edit_index(folder, lambda weights: weights.update({"model.word_embeddings.weight": last}))
    with pytest.raises(
        CheckpointError, match=rf"00001-of-\d+\.safetensors: model\.word_embeddings\.weight: .* in {last}"
    ):
        load_checkpoint(folder)
    edit_index(folder, lambda weights: weights.update({"ghost": last}))
    edit_index(folder, lambda weights: weights.update({"model.word_embeddings.weight": shards_of(folder)[0].name}))
    with pytest.raises(CheckpointError, match=rf"index\.json: ghost: {last} does not hold the tensor"):
        load_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards_of(folder)[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors: the file is missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "model.bin", 3])
def test_an_index_points_into_its_own_folder(folder: Path, file: Any) -> None:
    edit_index(folder, lambda weights: weights.update({"lm_head.weight": file}))
    with pytest.raises(CheckpointError, match=r"index\.json: lm_head\.weight is said to be in .*a file of the folder"):
        load_checkpoint(folder)


def test_missing_and_extra_tensors_name_the_index(folder: Path) -> None:
    edit(folder, -1, lambda tensors: tensors.update(spare=tensors.pop("lm_head.weight")))
    edit_index(folder, lambda weights: weights.update(spare=weights.pop("lm_head.weight")))
    with pytest.raises(
        CheckpointError, match=r"index\.json: 1 tensors missing: lm_head\.weight; .*not in the model: spare"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_names_tensor_and_file(folder: Path, value: float, dtype: torch.dtype) -> None:
    edit(folder, -1, lambda tensors: tensors["lm_head.weight"][-1].fill_(value))
    with pytest.raises(CheckpointError, match=r"-of-\d+\.safetensors: lm_head\.weight: the weights are not finite"):
        load_checkpoint(folder, dtype=dtype)


def test_a_value_that_overflows_the_wanted_dtype_is_refused(folder: Path) -> None:
    edit(folder, -1, lambda tensors: tensors["lm_head.weight"][-1].fill_(1e6))
    load_checkpoint(folder, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the weights overflow in float16.*wider dtype"):
        load_checkpoint(folder, dtype=torch.float16)


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWIN = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "content",
    [
        pack({}, length=2**63),
        pack(b"{"),
        pack(b"\xff\xfe"),
        pack([1]),
        pack({"a": 3}),
        pack({"a": {"dtype": "F32"}}),
        pack({"a": entry(0, 8, "x")}, b"12345678"),
        pack({"a": entry(0, 4)}, b"1234"),
        pack({"a": entry(0, 8, (-1, -2))}, b"12345678"),
        pack({"a": entry(-8, 0)}),
        pack({"a": entry(0, 8), "b": entry(0, 8)}, b"12345678"),
        pack({"a": entry(0, 8), "b": entry(12, 20)}, b"0" * 20),
        pack({"a": entry(0, 8)}, b"123456789"),
        pack(b"{%s,%s}" % (TWIN, TWIN), b"0" * 8),
    ],
    ids="length JSON text list entry offsets shape short negative-shape negative-offset overlap gap rest twins".split(),
)
def test_a_damaged_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: the file is truncated or damaged"),
        open_weights(tmp_path),
    ):
        pass


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as files:
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(500)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the file was cut while it was read"):
            files.read("a")


def test_hashes_are_compared_unless_told_otherwise(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_decoder(CONFIG, seed=0), max_shard_bytes=8000)
    flip = shards_of(tmp_path / "model")[-1]
    data = bytearray(flip.read_bytes())
    data[-4] ^= 1
    flip.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"does not hold the tensor that tafkir\.json describes"):
        load_checkpoint(tmp_path / "model")
    load_checkpoint(tmp_path / "model", verify_hashes=False)
    # A dtype that is not the manifest's is noticed without hashes, too.
    edit(tmp_path / "model", -1, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    with pytest.raises(CheckpointError, match=r"does not hold the tensor that tafkir\.json describes"):
        load_checkpoint(tmp_path / "model", verify_hashes=False)


def test_a_shard_may_be_as_small_as_one_tensor(tmp_path: Path) -> None:
    decoder = build_decoder(CONFIG, seed=0)
    manifest = save_checkpoint(tmp_path / "model", decoder, max_shard_bytes=1)
    assert len(shards_of(tmp_path / "model")) == len(manifest.tensors)
    assert torch.equal(load_checkpoint(tmp_path / "model").decoder.head_weight, decoder.head_weight)


@pytest.mark.parametrize("after", [0, 5, 20])
def test_a_kill_while_shards_are_written_leaves_the_old_ones(folder: Path, after: int) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    decoder = build_decoder(CONFIG, seed=1)
    pid = os.fork()
    if pid == 0:
        calls, pwrite = iter(range(after)), os.pwrite

        def die_after(*args: Any) -> int:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(*args)

        os.pwrite = die_after
        save_checkpoint(folder, decoder, max_shard_bytes=8000)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    # What the kill left under another name does not stand in the way of the next save, and goes with it.
    save_checkpoint(folder, decoder, max_shard_bytes=8000)
    assert torch.equal(load_checkpoint(folder).decoder.head_weight, decoder.head_weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
