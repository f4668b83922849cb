"""Multi-token prediction: against transformers' MtpModel, by hand on five tokens, and packed against one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.errors import CheckpointError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.mtp import ShiftedBatch, shift_documents
from tafkir.ops.rope import rope_table
from tafkir.recipe.model import ModelConfig
from tests.models.conftest import glm_config, glm_tensors

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "initializer_range": 0.15,
}


def config_of(shape: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(TINY | changes | {"mtp": shape})


def build(seed: int = 1, *, shape: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    """A decoder with MTP, random norms and expert biases, so that nothing hides behind ones and zeros."""
    decoder = build_decoder(config_of(shape or {}, **changes), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in decoder.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            if "expert_bias" in name:
                tensor.uniform_(-0.3, 0.3, generator=generator)
    return decoder


def predict(decoder: Decoder, documents: list[torch.Tensor]) -> list[tuple[ShiftedBatch, torch.Tensor]]:
    """Each depth's rows and logits over documents packed in one row."""
    cu = [0]
    for document in documents:
        cu.append(cu[-1] + len(document))
    ids, positions = torch.cat(documents), torch.cat([torch.arange(len(document)) for document in documents])
    labels = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])
    out = decoder(ids, positions, VarlenCausal(cu))
    assert decoder.mtp is not None
    batches = shift_documents(ids, positions, labels, cu, decoder.mtp.shape.depth)
    outputs = decoder.mtp(out.hidden_ND, out.pre_norm_ND, decoder.embed_tokens, batches)
    return [(batch, decoder.logits(o.hidden_MD)) for batch, o in zip(batches, outputs, strict=True)]


def tokens(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed))


def transformers_mtp(decoder: Decoder) -> Any:
    """transformers' main model and MtpModel with our weights."""
    pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpModel
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM

    assert decoder.mtp is not None
    config = decoder.config
    depth = decoder.mtp.shape.depth
    # The block of every depth is MoE; transformers picks that by index, so let it count past the dense layers.
    main = Glm4MoeForCausalLM(glm_config(config)).float()
    named = {name: tensor.clone() for name, tensor in glm_tensors(decoder).items()}
    main.load_state_dict({name: t for name, t in named.items() if ".mtp." not in name}, strict=True)
    config_mtp = main.config.get_mtp_config()
    config_mtp.first_k_dense_replace = 0
    config_mtp.mtp_hidden_states_first = decoder.mtp.shape.concat_order == "hidden_first"
    main.config.get_mtp_config = lambda: config_mtp
    mtp = MtpModel(main, depth).float()
    renamed = {}
    for name, tensor in named.items():
        if ".mtp." not in name:
            continue
        name = name.removeprefix("model.mtp.").replace(".block.", ".mtp_block.")
        parts = name.split(".")
        if parts[2] == "norm":
            parts[2] = "post_norm"
        renamed[".".join(parts)] = tensor
    missing, unexpected = mtp.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(name.startswith(("embed_tokens", "shared_head")) for name in missing)
    return main, mtp


@pytest.mark.parametrize("order", ["embedding_first", "hidden_first"])
def test_depth_one_equals_transformers(order: str) -> None:
    decoder = build(shape={"concat_order": order})
    main, mtp = transformers_mtp(decoder)
    ids = tokens(13)
    ((batch, logits),) = predict(decoder, [ids])
    with torch.no_grad():
        hidden = main(ids[None], output_hidden_states=True).hidden_states[-1]
        rows = len(batch.rows_M)
        theirs = mtp.forward_layer(
            0, hidden[:, :rows], torch.arange(rows)[None], None, input_ids=ids[None, 1 : rows + 1]
        )
        oracle = mtp.shared_head(theirs)[0]
    assert oracle.abs().max() > 1
    torch.testing.assert_close(logits, oracle, rtol=0, atol=1e-5)


def test_two_chained_depths_equal_transformers() -> None:
    decoder = build(shape={"depth": 2})
    main, mtp = transformers_mtp(decoder)
    ids = tokens(12)
    found = predict(decoder, [ids])
    with torch.no_grad():
        state = main(ids[None], output_hidden_states=True).hidden_states[-1]
        for k, (batch, logits) in enumerate(found, start=1):
            rows = len(batch.rows_M)
            state = mtp.forward_layer(
                k - 1, state[:, :rows], torch.arange(rows)[None], None, input_ids=ids[None, k : rows + k]
            )
            torch.testing.assert_close(logits, mtp.shared_head(state)[0], rtol=0, atol=1e-5)


def test_deepseek_layer_equals_transformers_under_its_names(tmp_path: Path) -> None:
    """What we write as `model.layers.2.*` is loaded by transformers as a block of its own: MLA, YaRN, MoE."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import MtpModel

    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7}
    decoder = build(
        9,
        model_type="deepseek_v3",
        attention_type="mla",
        num_key_value_heads=4,
        head_dim=20,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        use_qk_norm=False,
        rope_interleave=True,
        rope_scaling=yarn,
    )
    save_checkpoint(tmp_path / "v3", decoder)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "v3")
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v3", config=config).float()
    config.num_hidden_layers = 3
    deeper = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v3", config=config).float()
    tensors = load_file(tmp_path / "v3" / "model.safetensors")
    assert torch.equal(tensors["model.layers.2.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.2.shared_head.head.weight"], tensors["lm_head.weight"])
    main.config.num_hidden_layers = 2
    config_mtp = main.config.get_mtp_config()
    config_mtp.first_k_dense_replace = 0
    main.config.get_mtp_config = lambda: config_mtp
    mtp = MtpModel(main, 1).float()
    layer = mtp.layers[0]
    layer.mtp_block.load_state_dict(deeper.model.layers[2].state_dict(), strict=True)
    with torch.no_grad():
        for ours, theirs in (("enorm", layer.enorm), ("hnorm", layer.hnorm), ("shared_head.norm", layer.post_norm)):
            theirs.weight.copy_(tensors[f"model.layers.2.{ours}.weight"])
        layer.eh_proj.weight.copy_(tensors["model.layers.2.eh_proj.weight"])
        ids = tokens(13)
        hidden = main(ids[None], output_hidden_states=True).hidden_states[-1]
        theirs = mtp.forward_layer(0, hidden[:, :11], torch.arange(11)[None], None, input_ids=ids[None, 1:12])
        oracle = mtp.shared_head(theirs)[0]
    ((_, logits),) = predict(decoder, [ids])
    assert oracle.abs().max() > 1
    torch.testing.assert_close(logits, oracle, rtol=0, atol=1e-5)


def test_a_checkpoint_whose_config_hides_its_mtp_layer_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ling", build())
    path = tmp_path / "ling" / "config.json"
    path.write_text(path.read_text().replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0'))
    with pytest.raises(CheckpointError, match=r"not in the model: model\.layers\.2\.attention"):
        load_checkpoint(tmp_path / "ling")


@pytest.mark.parametrize("kind", ["mhc", "hc", "deepseek_v4"])
def test_layers_have_a_residual_of_their_own(kind: str) -> None:
    decoder = build(3, residual={"kind": kind}, shape={"depth": 2})
    documents = [tokens(length, seed=length) for length in (7, 5)]
    packed, alone = predict(decoder, documents), [predict(decoder, [document]) for document in documents]
    error = (packed[1][1] - torch.cat([found[1][1] for found in alone])).abs().max()
    assert error <= 1e-5 * packed[1][1].abs().max()
    config = decoder.config
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters(mtp=True)


def test_shift_by_hand_on_five_tokens() -> None:
    ids, positions = torch.tensor([10, 11, 12, 13, 14]), torch.arange(5)
    labels = torch.tensor([11, -100, 13, 14, -100])
    one, two, three = shift_documents(ids, positions, labels, (0, 5), 7)
    assert one.rows_M.tolist() == [0, 1, 2] == one.positions_M.tolist() == one.rows_before_M.tolist()
    assert one.input_ids_M.tolist() == [11, 12, 13]
    assert one.labels_M.tolist() == [-100, 13, 14]
    assert two.rows_M.tolist() == [0, 1] == two.rows_before_M.tolist()
    assert two.input_ids_M.tolist() == [12, 13] and two.labels_M.tolist() == [13, 14]
    assert three.input_ids_M.tolist() == [13] and three.labels_M.tolist() == [14]


def test_shift_of_packed_documents_never_crosses_a_boundary() -> None:
    documents = [torch.tensor([1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6]), torch.tensor([7, 8, 9, 10])]
    cu = (0, 2, 5, 6, 10)
    positions = torch.tensor([0, 1, 0, 1, 2, 0, 0, 1, 2, 3])
    labels = torch.tensor([2, -100, 4, 5, -100, -100, 8, 9, 10, -100])
    one, two = shift_documents(torch.cat(documents), positions, labels, cu, 3)
    assert one.rows_M.tolist() == [2, 6, 7] and one.positions_M.tolist() == [0, 0, 1]
    assert one.input_ids_M.tolist() == [4, 8, 9] and one.labels_M.tolist() == [5, 9, 10]
    assert one.cu_seqlens == (0, 1, 3)
    assert two.rows_M.tolist() == [6] and two.rows_before_M.tolist() == [1] and two.cu_seqlens == (0, 1)
    assert two.input_ids_M.tolist() == [9] and two.labels_M.tolist() == [10]


@pytest.mark.parametrize(
    "shape",
    [
        {"depth": 3},
        {"depth": 2, "chain_hidden": False},
        {"depth": 2, "input_state": "pre_norm"},
        {"depth": 2, "concat_order": "hidden_first"},
    ],
    ids=str,
)
def test_packed_documents_equal_each_alone(shape: dict[str, Any]) -> None:
    decoder = build(2, shape=shape)
    documents = [tokens(length, seed=length) for length in (2, 9, 1, 4, 3, 6)]
    packed = predict(decoder, documents)
    apart = [predict(decoder, [document]) for document in documents]
    for k, (batch, logits) in enumerate(packed):
        alone = [found[k] for found in apart if len(found) > k]
        error = (logits - torch.cat([found for _, found in alone])).abs().max()
        assert error <= 1e-6 * logits.abs().max()
        assert batch.labels_M.tolist() == [int(x) for b, _ in alone for x in b.labels_M]
        assert len(batch.rows_M) == sum(max(0, len(d) - k - 2) for d in documents)


def test_every_switch_changes_the_logits() -> None:
    """Same weights, another switch, other numbers: none is dead."""
    base = build(4, shape={"depth": 2})
    documents = [tokens(8)]
    reference = predict(base, documents)[1][1]
    for switch in ({"concat_order": "hidden_first"}, {"input_state": "pre_norm"}, {"chain_hidden": False}):
        other = build(4, shape={"depth": 2, **switch})
        other.load_state_dict(base.state_dict())
        assert (predict(other, documents)[1][1] - reference).abs().max() > 1e-2, switch


def test_target_state_at_depth_two_by_hand() -> None:
    """chain_hidden = false feeds the decoder's own state at position i to every depth."""
    decoder = build(5, shape={"depth": 2, "chain_hidden": False})
    assert decoder.mtp is not None
    ids = tokens(7)
    out = decoder(ids, torch.arange(7), VarlenCausal((0, 7)))
    layer = decoder.mtp.layers[1]
    rows = 4
    cos, sin = rope_table(torch.arange(rows), decoder.config.rotary_size, decoder.config.rope_theta)
    wanted = layer(out.hidden_ND[:rows], decoder.embed_tokens(ids[2:6]), cos, sin, VarlenCausal((0, rows)))
    torch.testing.assert_close(predict(decoder, [ids])[1][1], decoder.logits(wanted.hidden_MD))


def test_the_block_is_moe_even_after_dense_layers_only_and_dense_without_experts() -> None:
    assert build(first_k_dense_replace=9).mtp.routers  # type: ignore[union-attr]
    dense = build(num_experts=0, num_experts_per_tok=1, n_group=1, topk_group=1)
    assert dense.mtp is not None and not dense.mtp.routers
    assert len(predict(dense, [tokens(6)])[0][1]) == 4


def test_mtp_leaves_the_decoder_bit_identical() -> None:
    with_mtp, without = build_decoder(config_of({}), 7), build_decoder(ModelConfig(**TINY), 7)
    state = with_mtp.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in without.state_dict().items())
    assert {name.split(".")[0] for name in state.keys() - without.state_dict().keys()} == {"mtp"}


@pytest.mark.parametrize("shape", [{}, {"depth": 3}], ids=str)
def test_the_config_counts_what_the_module_has(shape: dict[str, Any]) -> None:
    config = config_of(shape)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters(mtp=True)
    assert decoder.mtp is not None
    assert sum(p.numel() for p in decoder.mtp.parameters()) == config.parameter_counts().mtp


def test_fresh_weights_are_sane() -> None:
    decoder = build_decoder(config_of({"depth": 2}), 7)
    state = decoder.state_dict()
    assert not state["mtp.layers.1.block.mlp.router.expert_bias"].any()
    assert math.isclose(state["mtp.layers.1.eh_proj.weight"].std().item(), 0.15, rel_tol=0.1)
    loss = F.cross_entropy(predict(decoder, [tokens(30)])[0][1], torch.zeros(28, dtype=torch.int64))
    assert loss.isfinite()
