"""Checkpoints: what is saved comes back, and what is damaged is refused with its name."""

from __future__ import annotations

import errno
import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tafkir.checkpoint import Manifest, load_checkpoint, load_config, save_checkpoint
from tafkir.checkpoint.save import write_error
from tafkir.checkpoint.tensors import hash_tensor
from tafkir.errors import CheckpointError
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
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


@pytest.fixture
def decoder() -> Decoder:
    decoder = build_decoder(CONFIG, seed=0)
    decoder.routers[0].expert_bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    return decoder


@pytest.fixture
def folder(tmp_path: Path, decoder: Decoder) -> Path:
    save_checkpoint(tmp_path / "model", decoder)
    return tmp_path / "model"


class TinyTokenizer:
    """Just the parts of a tokenizer that a checkpoint asks for."""

    eos_id, pad_id = 7, 3

    def save(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}")
        (path / "tokenizer_config.json").write_text("{}")


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, keep_manifest: bool = False) -> None:
    """Change the weights on disk, as a foreign tool might."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    if not keep_manifest:
        (folder / "tafkir.json").unlink()


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_saved_comes_back(folder: Path, decoder: Decoder) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer_path is None
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(checkpoint.decoder.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in checkpoint.decoder.parameters())
    assert load_config(folder) == CONFIG


def test_saving_what_was_loaded_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "again", load_checkpoint(folder).decoder)
    assert content(tmp_path / "again") == content(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_on_disk(dtype: torch.dtype, decoder: Decoder, tmp_path: Path) -> None:
    manifest = save_checkpoint(tmp_path / "low", decoder, dtype=dtype)
    tensors = load_file(tmp_path / "low" / "model.safetensors")
    bias = "model.layers.1.mlp.gate.expert_bias"
    assert {name: t.dtype for name, t in tensors.items() if name != bias} == dict.fromkeys(
        tensors.keys() - {bias}, dtype
    )
    assert torch.equal(tensors[bias], decoder.routers[0].expert_bias)
    loaded = load_checkpoint(tmp_path / "low")
    for name, tensor in loaded.decoder.state_dict().items():
        assert tensor.dtype == torch.float32
        expected = decoder.state_dict()[name]
        assert torch.equal(tensor, expected if "expert_bias" in name else expected.to(dtype).float())
    assert manifest.tensors["lm_head.weight"].dtype == str(dtype).removeprefix("torch.")


def test_load_casts_but_keeps_the_expert_bias(folder: Path) -> None:
    decoder = load_checkpoint(folder, dtype=torch.bfloat16).decoder
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert decoder.routers[0].expert_bias.dtype == torch.float32


def test_the_manifest_names_every_tensor(decoder: Decoder, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", decoder, extra={"stage": "sft", "step": 3})
    manifest = load_checkpoint(tmp_path / "model").manifest
    assert manifest is not None
    assert manifest.lineage == {"stage": "sft", "step": 3}
    assert manifest.num_parameters == CONFIG.num_parameters()
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert manifest.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert manifest.tensors[name].shape == tuple(tensor.shape)
        assert manifest.tensors[name].sha256 == hash_tensor(tensor)
    assert Manifest.model_validate_json((tmp_path / "model" / "tafkir.json").read_text()) == manifest


def test_tokenizer_travels_with_the_weights(decoder: Decoder, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "first", decoder, tokenizer=TinyTokenizer())
    save_checkpoint(tmp_path / "second", decoder, tokenizer_dir=tmp_path / "first")
    first, second = content(tmp_path / "first"), content(tmp_path / "second")
    assert first == second
    assert json.loads(second["generation_config.json"]) == {"eos_token_id": 7, "pad_token_id": 3}
    assert json.loads(second["config.json"])["eos_token_id"] == 7
    assert load_checkpoint(tmp_path / "second").tokenizer_path == tmp_path / "second"


def test_a_tokenizer_folder_without_a_tokenizer_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not there"):
        save_checkpoint(tmp_path / "model", decoder, tokenizer_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sharded_foreign_checkpoint_loads(folder: Path, decoder: Decoder) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    (folder / "tafkir.json").unlink()
    loaded = load_checkpoint(folder)
    assert loaded.manifest is None
    assert torch.equal(loaded.decoder.head_weight, decoder.head_weight)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: the file is missing"):
        load_checkpoint(folder)


def test_transformers_reads_the_tensors_without_us(folder: Path, decoder: Decoder) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("model.word_embeddings.weight"), decoder.embed_tokens.weight)


@pytest.mark.parametrize("keep", [0, 5, 900, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is truncated or damaged"):
        load_checkpoint(folder)


def test_a_flipped_bit_is_refused_by_name(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not hold the tensor that tafkir\.json"):
        load_checkpoint(folder)


def test_another_architecture_is_named_beside_the_supported_ones(folder: Path) -> None:
    set_config(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert "LlamaForCausalLM is not supported" in str(caught.value)
    assert "BailingMoeV2ForCausalLM" in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_not_finite_weights_are_refused_by_name(folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=rf"{name}: the weights are not finite"):
        load_checkpoint(folder)
    with torch.no_grad():
        decoder.norm.weight[3] = torch.inf
    with pytest.raises(CheckpointError, match=r"not finite: model\.norm\.weight"):
        save_checkpoint(tmp_path / "new", decoder)
    assert not (tmp_path / "new").exists()


def test_float16_overflow_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    with torch.no_grad():
        decoder.norm.weight[0] = 1e6
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*wider dtype"):
        save_checkpoint(tmp_path / "new", decoder, dtype=torch.float16)


def test_missing_extra_and_misshapen_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(spare=tensors.pop("model.norm.weight")))
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight; 1 tensors not in the model: spare"):
        load_checkpoint(folder)
    rewrite(folder, lambda t: t.update({"model.norm.weight": t.pop("spare")[:5].clone()}), keep_manifest=True)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: shape is \[5\]; expected \[16\]"):
        load_checkpoint(folder)


def test_an_integer_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int64)}))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: dtype is I64; expected F32, BF16, F16, or F8_E4M3"
    ):
        load_checkpoint(folder)


def damage_json(folder: Path) -> None:
    (folder / "config.json").write_text('{\n "a": 1,\n oops')


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_manifest(folder: Path) -> None:
    (folder / "tafkir.json").write_text('{"format_version": 9}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, r"config\.json:3: not valid JSON"),
        (drop_weights, r"no weights; expected model\.safetensors"),
        (pickle_only, r"pytorch_model\.bin is not read: a pickle can run code"),
        (damage_manifest, r"tafkir\.json: format_version"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: the file is missing"),
    ],
    ids=["config", "no weights", "pickle", "manifest", "no config"],
)
def test_a_damaged_folder_says_what_is_wrong(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint("no-such-name")


def test_a_bundled_name_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tafkir.recipe.bundled as bundled

    (folder.parent / "checkpoints").mkdir()
    folder.rename(folder.parent / "checkpoints" / "tiny-base")
    monkeypatch.setattr(bundled, "_PACKAGE", folder.parent)
    assert load_checkpoint("tiny-base").config == CONFIG


def test_saving_again_replaces_and_leaves_nothing_behind(folder: Path, decoder: Decoder) -> None:
    (folder / "stale.txt").write_text("from an older save")
    with torch.no_grad():
        decoder.norm.weight.fill_(2.0)
    save_checkpoint(folder, decoder)
    assert not (folder / "stale.txt").exists()
    assert torch.equal(load_checkpoint(folder).decoder.norm.weight, decoder.norm.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Make the operating system refuse to write files beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_leaves_the_old_checkpoint_whole(folder: Path, decoder: Decoder) -> None:
    before = content(folder)
    with largest_file(6000), pytest.raises(CheckpointError, match="model: cannot write the checkpoint"):
        save_checkpoint(folder, decoder)
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_named(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint \(File exists\)"):
        save_checkpoint(tmp_path / "file" / "model", decoder)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_is_called_one(error: Exception) -> None:
    assert str(write_error(Path("runs/x"), error)).startswith("runs/x: the disk is full. Fix: free some space")


def test_a_dtype_that_is_not_for_weights_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write torch\.int8"):
        save_checkpoint(tmp_path / "model", decoder, dtype=torch.int8)
