"""Calibration, layer by layer: against the whole model run with hooks, resumed after a kill, refused where blind."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tafkir.checkpoint import load_checkpoint, save_checkpoint
from tafkir.checkpoint.layers import LayerReader
from tafkir.errors import CheckpointError, DataError, RecipeError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.experts import MoE
from tafkir.models.layers import Linear
from tafkir.models.mtp import shift_documents
from tafkir.ops.moe import swiglu
from tafkir.ops.nvfp4 import dequantize_nvfp4
from tafkir.quant.calibrate import calibrate_checkpoint
from tafkir.quant.calibrated import quantize_calibrated
from tafkir.quant.calibration_text import read_calibration_text
from tafkir.quant.coverage import coverage_rows, given_tokens
from tafkir.quant.observe import InputStatistics, covered_range, histogram_quantile
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.quantize import CalibrationConfig, QuantizeConfig
from tafkir.recipe.residual import ResidualConfig

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
QWEN = ModelConfig(
    model_type="qwen3_moe", num_key_value_heads=2, head_dim=16, partial_rotary_factor=1.0, num_shared_experts=0,
    n_group=1, topk_group=1, first_k_dense_replace=0, mlp_only_layers=(0,), score_function="softmax",
    use_expert_bias=False, routed_scaling_factor=1.0, **SMALL,
)  # fmt: skip
DEEPSEEK = ModelConfig(
    model_type="deepseek_v3", attention_type="mla", num_key_value_heads=4, head_dim=24, q_lora_rank=32,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, rope_interleave=True, use_qk_norm=False,
    n_group=2, topk_group=1, first_k_dense_replace=1, residual=ResidualConfig(kind="mhc", num_streams=2), **SMALL,
)  # fmt: skip
DOCUMENTS = [
    torch.randint(0, 48, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (40, 3, 57, 21)
]


def config_of(*, layout: Any = "modelopt", scales: Any = None, **calibration: Any) -> QuantizeConfig:
    how = CalibrationConfig(**{"cold_experts": "force", "min_expert_tokens": 4, **calibration})
    return QuantizeConfig(preset="all-linear", layout=layout, scales=scales, calibration=how)


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek with mHC"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    shape = QWEN if request.param == "qwen3_moe" else DEEPSEEK
    save_checkpoint(path, build_decoder(shape, seed=0), dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "model"
    save_checkpoint(path, build_decoder(QWEN, seed=0), dtype=torch.bfloat16)
    return path


class Remembering(VarlenCausal):
    """Keys and values of every layer."""

    seen: dict[int, tuple[float, float]]

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        k, v = self.seen.get(layer_idx, (0.0, 0.0))
        self.seen[layer_idx] = max(k, float(k_NGK.abs().max())), max(v, float(v_NGK.abs().max()))
        return super().attend(layer_idx, q_NHK, k_NGK, v_NGK)


def run_whole(source: Path) -> tuple[dict[str, Tensor], list[Tensor], dict[int, tuple[float, float]]]:
    """Inputs of every map, document after document through the whole model; experts' loads; ranges of the cache."""
    decoder = load_checkpoint(source).decoder.requires_grad_(False)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        elif isinstance(module, MoE):

            def keep(_: Any, args: Any, name: str = name, mlp: MoE = module) -> None:
                x, ids, _weights = args
                for expert in range(4):
                    token = (ids == expert).any(1)
                    hidden = swiglu(x[token] @ mlp.experts.gate_up_proj[expert].T)
                    for part, values in (("gate_up_proj", x[token]), ("down_proj", hidden)):
                        inputs.setdefault(f"{name}.experts.{part}", []).append(values)
                        inputs.setdefault(f"{name}.experts.{expert}.{part}", []).append(values)

            module.experts.register_forward_pre_hook(keep)
    cache: dict[int, tuple[float, float]] = {}
    loads: list[Tensor] = []
    for document in DOCUMENTS:
        state = Remembering([0, len(document)])
        state.seen = cache
        out = decoder(torch.tensor(document), torch.arange(len(document)), state)
        loads = [a + b for a, b in zip(loads, out.expert_load, strict=True)] if loads else list(out.expert_load)
        if decoder.mtp is not None:
            ids, positions = torch.tensor(document), torch.arange(len(document))
            batches = shift_documents(ids, positions, ids.roll(-1), [0, len(document)], decoder.mtp.shape.depth)
            for _ in decoder.mtp(out.hidden_ND, out.pre_norm_ND, decoder.embed_tokens, batches):
                pass
    return {name: torch.cat(values) for name, values in inputs.items()}, loads, cache


def test_the_record_is_what_hooks_see_in_the_whole_model(source: Path, tmp_path: Path) -> None:
    made = calibrate_checkpoint(source, tmp_path / "record", config_of(cold_experts="data_free"), DOCUMENTS)
    inputs, loads, cache = run_whole(source)
    compared = 0
    for index, layer in enumerate(made.layers):
        tensors = load_file(tmp_path / "record" / f"layer-{index:05d}.safetensors")
        for key, found in layer["inputs"].items():
            x = inputs[f"layers.{index}.{key}"]
            assert found["tokens"] == len(x) and found["amax"] == pytest.approx(float(x.abs().max()), rel=1e-4)
            blocks = x.view(len(x), -1, 16).abs().amax(2)
            torch.testing.assert_close(tensors[f"{key}.block_amax"], blocks.amax(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(tensors[f"{key}.mean_square"], x.square().mean(0), rtol=1e-3, atol=1e-6)
            compared += 1
        assert (layer["kv"]["k_amax"], layer["kv"]["v_amax"]) == pytest.approx(cache[index], rel=1e-4)
        assert made.kv_range(index).latent_amax is None or made.kv_range(index).latent_amax
    assert [list(layer.routed) for layer in made.coverage] == [load.tolist() for load in loads]
    assert compared > 3 * 4 + 8
    shared = [layer["inputs"]["mlp.experts.gate_up_proj"]["weights"] for layer in made.layers[1:]]
    assert len(shared[0]) == 8 and len({made.ranges[name] for name in shared[0]}) == 1
    assert made.content["tokens"] == sum(map(len, DOCUMENTS)) and not list((tmp_path / "record").glob("hidden*"))


def test_layers_of_multi_token_prediction_are_calibrated_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = DEEPSEEK.model_copy(update={"num_hidden_layers": 2, "mtp": MtpConfig(depth=2)})
    save_checkpoint(tmp_path / "model", build_decoder(shape, seed=0), dtype=torch.bfloat16)
    # Behind layers 0 and 1: two depths, whose matrices are read by these rules, the projection of both inputs included.
    rules = ({"tensors": "model.layers.[23].*proj*.weight", "format": "nvfp4"},)
    config = QuantizeConfig.model_validate({**config_of(cold_experts="data_free").model_dump(), "rules": rules})
    _, made = quantize_calibrated(tmp_path / "model", tmp_path / "out", config, DOCUMENTS, record=tmp_path / "whole")
    inputs, _, _ = run_whole(tmp_path / "model")
    assert len(made.layers) == 4
    for index, layer in enumerate(made.layers[2:]):
        assert len(layer["inputs"]) > 5
        for key, found in layer["inputs"].items():
            x = inputs[f"mtp.layers.{index}.{key}" if key == "eh_proj" else f"mtp.layers.{index}.block.{key}"]
            assert found["tokens"] == len(x) and found["amax"] == pytest.approx(float(x.abs().max()), rel=1e-4)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("eh_proj", "self_attn.q_a_proj", "mlp.experts.3.up_proj", "mlp.shared_experts.down_proj"):
        scale = float(stored[f"model.layers.3.{name}.input_scale"])
        assert scale == pytest.approx(made.ranges[f"model.layers.3.{name}.weight"] / 2688, rel=1e-6)
    read, asked = LayerReader.mtp_layer, list[int]()

    def killed(self: LayerReader, depth: int) -> Any:
        asked.append(depth)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return read(self, depth)

    monkeypatch.setattr(LayerReader, "mtp_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(tmp_path / "model", tmp_path / "killed", config, DOCUMENTS)
    calibrate_checkpoint(tmp_path / "model", tmp_path / "killed", config, DOCUMENTS)
    assert asked == [0, 1, 0, 1] and not list((tmp_path / "killed").glob("hidden*"))
    for file in (tmp_path / "whole").glob("layer-*"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    with pytest.raises(CheckpointError, match="no document has the 3 tokens that layer 1 of multi-token prediction"):
        calibrate_checkpoint(tmp_path / "model", tmp_path / "short", config, [[1, 2]])


def test_a_written_checkpoint_has_the_calibrated_scales(source: Path, tmp_path: Path) -> None:
    config = config_of(layout="compressed-tensors")
    _, made = quantize_calibrated(source, tmp_path / "out", config, DOCUMENTS, record=tmp_path / "record")
    files = load_file(tmp_path / "out" / "model.safetensors")
    stored = {
        name.removesuffix("input_global_scale") + "weight": 1 / float(t)
        for name, t in files.items()
        if "input_gl" in name
    }
    assert stored.keys() == made.ranges.keys() and len(set(stored.values())) > 8
    for name, scale in stored.items():
        assert scale == pytest.approx(made.ranges[name] / 2688, rel=1e-6)
    assert not {"calibration.json", ".lock"} & {file.name for file in (tmp_path / "out").iterdir()}
    assert load_checkpoint(tmp_path / "out").manifest is not None
    # Another format and other ranges by the same record; FP8 reaches to 448.
    again = QuantizeConfig.model_validate(
        {**config_of(ranges="percentile", percentile=90.0).model_dump(), "scheme": "fp8"}
    )
    _, other = quantize_calibrated(source, tmp_path / "fp8", again, DOCUMENTS, record=tmp_path / "record")
    files, name = load_file(tmp_path / "fp8" / "model.safetensors"), "model.layers.2.mlp.experts.1.up_proj.weight"
    assert float(files[name.replace("weight", "input_scale")]) == pytest.approx(other.ranges[name] / 448)
    assert other.ranges[name] < made.ranges[name]


def test_gptq_writes_what_it_chose_and_later_layers_read_it(source: Path, tmp_path: Path) -> None:
    config = config_of(scales="local_hessian", gptq=True)
    _, made = quantize_calibrated(source, tmp_path / "out", config, DOCUMENTS, record=tmp_path / "record")
    errors = [error for layer in made.layers for error in layer["errors"].values()]
    assert max(errors) <= 1.0001 and np.mean(errors) < 0.8
    loaded = load_checkpoint(tmp_path / "out").decoder.state_dict()
    name = "layers.2.mlp.experts.down_proj"
    for expert in range(4):
        chosen = made.chosen(f"model.layers.2.mlp.experts.{expert}.down_proj.weight")
        assert chosen is not None
        torch.testing.assert_close(loaded[name][expert], dequantize_nvfp4(*chosen))
    # What the record says of the last layer are the inputs that the written model gives it.
    inputs, _, _ = run_whole(tmp_path / "out")
    seen = made.layers[2]["inputs"]
    key = "attention.qkv_proj" if "attention.qkv_proj" in seen else "attention.q_a_proj"
    assert seen[key]["amax"] == pytest.approx(float(inputs[f"layers.2.{key}"].abs().max()), rel=1e-3)


def test_a_killed_calibration_goes_on_with_the_same_numbers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read = config_of(scales="local_hessian"), LayerReader.layer
    calibrate_checkpoint(source, tmp_path / "whole", config, DOCUMENTS)
    asked: list[int] = []

    def killed(self: LayerReader, index: int) -> Any:
        asked.append(index)
        if index == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(LayerReader, "layer", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(source, tmp_path / "killed", config, DOCUMENTS)
    assert [file.name for file in (tmp_path / "killed").glob("hidden*")] == ["hidden-00001.safetensors"]
    calibrate_checkpoint(source, tmp_path / "killed", config, DOCUMENTS)
    assert asked == [0, 1, 2, 2]
    calibrate_checkpoint(source, tmp_path / "killed", config, DOCUMENTS)
    assert asked == [0, 1, 2, 2]
    for file in (tmp_path / "whole").glob("layer-*"):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name


def test_cold_experts(qwen: Path, tmp_path: Path) -> None:
    few = DOCUMENTS[1:2]
    with pytest.raises(CheckpointError, match=r"layer 1: \d of 4 experts get fewer than 2 of 3 tokens: .*'force'"):
        calibrate_checkpoint(qwen, tmp_path / "a", config_of(cold_experts="error", min_expert_tokens=2), few)
    with pytest.raises(CheckpointError, match="there are 3 tokens in all; expected min_expert_tokens = 9"):
        calibrate_checkpoint(qwen, tmp_path / "b", config_of(min_expert_tokens=9), few)
    forced = calibrate_checkpoint(qwen, tmp_path / "c", config_of(min_expert_tokens=3, gptq=True), few)
    for layer in forced.coverage:
        assert all(routed + given == 3 for routed, given in zip(layer.routed, layer.given, strict=True))
        assert sum(layer.routed) == 6 and not layer.data_free
    free = calibrate_checkpoint(qwen, tmp_path / "d", config_of(cold_experts="data_free", gptq=True), few)
    assert all(layer.data_free for layer in free.coverage) and forced.coverage[0].routed == free.coverage[0].routed
    cold = free.coverage[0].data_free[0]
    assert free.chosen(f"model.layers.1.mlp.experts.{cold}.up_proj.weight") is None
    assert free.input_scale(f"model.layers.1.mlp.experts.{cold}.up_proj.weight") > 0
    balanced = calibrate_checkpoint(qwen, tmp_path / "e", config_of(cold_experts="balance"), DOCUMENTS)
    share = -(-2 * sum(map(len, DOCUMENTS)) // 4)
    for layer in balanced.coverage:
        assert all(
            routed + given == max(share, routed) for routed, given in zip(layer.routed, layer.given, strict=True)
        )
    row = coverage_rows(balanced.coverage)[0]
    assert row["experts"] == 4 and row["fewest"] == min(balanced.coverage[0].routed) and row["given_tokens"] > 0


def test_one_layer_and_one_expert_are_in_memory_at_a_time(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, expert, alive = LayerReader.layer, LayerReader.expert, list[weakref.ref[Any]]()

    def one_layer(self: LayerReader, index: int) -> Any:
        gc.collect()  # modules point back at themselves by their hooks
        assert not any(seen() is not None for seen in alive)
        alive.append(weakref.ref(made := layer(self, index)))
        assert all(tensor.is_meta == ("mlp.experts" in name) for name, tensor in made.state_dict().items())
        return made

    def one_expert(self: LayerReader, index: int, which: int) -> Any:
        assert sum(seen() is not None for seen in alive) == 1
        made = expert(self, index, which)
        alive.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(LayerReader, "layer", one_layer)
    monkeypatch.setattr(LayerReader, "expert", one_expert)
    calibrate_checkpoint(qwen, tmp_path / "record", config_of(scales="local_hessian"), DOCUMENTS)
    assert len(alive) == 3 + 2 * 4 * 2


def test_an_expert_is_given_the_tokens_that_its_router_likes_best() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.8, 0.2], [0.3, 0.7]])
    assert given_tokens(0, torch.tensor([2]), scores, 3).tolist() == [1, 3]
    assert given_tokens(1, torch.tensor([0, 3]), scores, 2).tolist() == []
    assert given_tokens(1, torch.tensor([]).long(), scores, 99).tolist() == [0, 3, 1, 2]


def test_ranges_are_quantiles_of_block_maxima() -> None:
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)).exp_()
    x[0, 0] = -1e4
    seen = InputStatistics(64)
    for part in x.split(700):
        seen.add(part)
    assert seen.histogram is not None and seen.amax == 1e4
    blocks = x.abs().view(-1, 16).amax(1).numpy()
    for share in (0.01, 0.5, 0.9999):
        exact = np.quantile(blocks, share, method="inverted_cdf")
        assert exact <= histogram_quantile(seen.histogram, share) <= exact * 1.0041
    reach = {
        kind: covered_range(seen.histogram, seen.amax, CalibrationConfig(ranges=kind, percentile=99.0))  # type: ignore[arg-type]
        for kind in ("max", "percentile", "headroom")
    }
    assert reach["max"] == 1e4 and reach["percentile"] == pytest.approx(np.quantile(blocks, 0.99), rel=0.01)
    assert reach["headroom"] == pytest.approx(16384 * np.quantile(blocks, 0.01), rel=0.01)
    assert covered_range(torch.tensor([5, 0]), 0.0, CalibrationConfig(ranges="headroom")) == 0.0


def test_what_cannot_be_calibrated_is_refused(qwen: Path, tmp_path: Path) -> None:
    config = config_of()
    with pytest.raises(CheckpointError, match="the text has token 48; expected tokens below 48"):
        calibrate_checkpoint(qwen, tmp_path / "a", config, [[1, 48]])
    with pytest.raises(CheckpointError, match="nothing to calibrate on"):
        calibrate_checkpoint(qwen, tmp_path / "a", config, [[]])
    calibrate_checkpoint(qwen, tmp_path / "a", config, DOCUMENTS[:1])
    with pytest.raises(CheckpointError, match="another checkpoint, text or choice of weights"):
        calibrate_checkpoint(qwen, tmp_path / "a", config, DOCUMENTS)
    rules = ({"tensors": "lm_head.weight", "format": "nvfp4"},)
    wrong = QuantizeConfig.model_validate({**config.model_dump(), "rules": rules})
    with pytest.raises(RecipeError, match=r"lm_head.weight: calibration does not see"):
        calibrate_checkpoint(qwen, tmp_path / "b", wrong, DOCUMENTS)
    with pytest.raises(ValueError, match="local_hessian' needs data"):
        QuantizeConfig(scales="local_hessian")
    with pytest.raises(ValueError, match="set one or the other"):
        QuantizeConfig(input_scale=0.5, calibration=CalibrationConfig())


def test_inputs_that_are_zero_always_have_no_scale(qwen: Path, tmp_path: Path) -> None:
    made = calibrate_checkpoint(qwen, tmp_path / "record", config_of(), DOCUMENTS[:1])
    made.ranges["silent"] = 0.0
    for name in ("silent", "unknown"):
        with pytest.raises(CheckpointError, match=f"{name}: its inputs were zero"):
            made.input_scale(name)


def test_text_of_many_kinds(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"token_ids": [1, 2, 3, 4, 5]}\n\n{"text": "Two and two are four."}\n')
    read = read_calibration_text("base-tiny", CalibrationConfig(text=str(lines), window=3))
    assert read[:2] == [[1, 2, 3], [4, 5]] and all(len(document) <= 3 for document in read)
    assert sum(map(len, read_calibration_text("base-tiny", CalibrationConfig(tokens=300)))) == 300
    (tmp_path / "b.txt").write_text("one two three " * 40)
    few = read_calibration_text("base-tiny", CalibrationConfig(text=str(tmp_path / "b.txt"), window=16, tokens=40))
    assert [len(document) for document in few] == [16, 16, 8]
    lines.write_text("[1]\n")
    with pytest.raises(DataError, match=r"a.jsonl:1"):
        read_calibration_text("base-tiny", CalibrationConfig(text=str(lines)))
    lines.write_text('{"tokens": [1]}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: neither text nor ids"):
        read_calibration_text("base-tiny", CalibrationConfig(text=str(lines)))
    with pytest.raises(DataError, match="cannot read the text"):
        read_calibration_text("base-tiny", CalibrationConfig(text=str(tmp_path / "none.txt")))


def test_the_command(qwen: Path, tmp_path: Path, here: Callable[..., CompletedProcess[str]]) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"token_ids": ids}) for ids in DOCUMENTS))
    common = ("quantize", str(qwen), "--preset", "all-linear", "--calibrate", "text.jsonl", "--json")
    done = here(
        *common, "out", "--cold-experts", "force", "--gptq", "--scales", "local_hessian", "--ranges", "headroom"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["calibration"]
    assert said["tokens"] == sum(map(len, DOCUMENTS)) and len(said["coverage"]) == 2 and said["ranges"] == "headroom"
    assert [len(layer["routed"]) for layer in said["experts"]] == [4, 4]
    assert said["gptq"]["weights"] > 30 and said["gptq"]["mean_error"] < 1
    assert [file.name for file in tmp_path.iterdir() if "calibration" in file.name] == []
    kept = here(*common, "other", "--cold-experts", "data_free", "--calibration-record", "record")
    assert kept.returncode == 0, kept.stderr
    assert (tmp_path / "record" / "calibration.json").exists()
    cold = here(*common, "third", "--min-expert-tokens", "500")
    assert cold.returncode == 1 and "experts get fewer than 500" in cold.stderr and not (tmp_path / "third").exists()
