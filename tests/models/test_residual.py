"""The residual in the decoder: fresh streams equal the plain model and yet come apart, recomputing changes no bit."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tafkir.errors import BackendUnavailable
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.residual import (
    TORCH_KERNELS,
    DeepseekV4Connection,
    ManifoldConnection,
    PlainResidual,
    StreamState,
    build_residual,
    composed_gains,
    observe_res_maps,
    single_gains,
    use_kernels,
)
from tafkir.ops.hyper_connections import write_streams
from tafkir.ops.loss import next_token_loss
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.residual import ResidualConfig

KINDS = ["hc", "mhc", "deepseek_v4"]
DENSE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    first_k_dense_replace=3,
    initializer_range=0.1,
)
LENGTHS = (5, 31, 12)


def config_of(**residual: object) -> ModelConfig:
    return DENSE.model_copy(update={"residual": ResidualConfig.model_validate(residual)})


def run(decoder: Decoder, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of a next-token loss by name."""
    total = sum(LENGTHS)
    ids = torch.randint(0, 61, (total,), generator=torch.Generator().manual_seed(seed))
    bounds = [0, 5, 36, 48]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    decoder.zero_grad()
    hidden_ND = decoder(ids, positions, VarlenCausal(bounds)).hidden_ND
    next_token_loss(hidden_ND, decoder.head_weight, ids.roll(-1)).backward()
    return hidden_ND.detach(), {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "tol"), [("hc", 1e-5), ("mhc", 1e-5), ("deepseek_v4", 1e-4)])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_without_phi_the_fresh_model_is_the_plain_one(kind: str, tol: float, streams: int) -> None:
    """Hidden states and every shared gradient; DeepSeek-V4's eps alone keeps it from being exact."""
    plain, expected = run(build_decoder(DENSE, 0))
    hidden, grads = run(build_decoder(config_of(kind=kind, phi_std=0.0, num_streams=streams), 0))
    torch.testing.assert_close(hidden, plain, rtol=0, atol=tol)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=tol)


def test_streams_may_start_apart_and_the_fresh_model_stays_the_plain_one() -> None:
    plain, _ = run(build_decoder(DENSE, 0))
    decoder = build_decoder(config_of(kind="mhc", phi_std=0.0, res_diagonal=3.0), 0)
    with observe_res_maps(decoder) as res_maps:
        hidden, _ = run(decoder)
    torch.testing.assert_close(hidden, plain, rtol=0, atol=1e-5)
    kept = math.exp(3) / (math.exp(3) + 3)
    for res in res_maps:
        torch.testing.assert_close(res.diagonal(dim1=-2, dim2=-1), torch.full((48, 4), kept))


@pytest.mark.parametrize("kind", KINDS)
def test_with_phi_the_fresh_model_is_near_the_plain_one(kind: str) -> None:
    plain, _ = run(build_decoder(DENSE, 0))
    hidden, _ = run(build_decoder(config_of(kind=kind), 0))
    assert 1e-6 < float((hidden - plain).abs().max()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_every_residual_parameter_learns_from_the_first_step(kind: str) -> None:
    _, grads = run(build_decoder(config_of(kind=kind), 0))
    maps = {name: grad for name, grad in grads.items() if "residual" in name}
    assert len(maps) == 3 * (2 * DENSE.num_hidden_layers + (kind == "deepseek_v4"))
    assert [name for name, grad in maps.items() if not grad.abs().max() > 0] == []


def trained(config: ModelConfig, steps: int = 8) -> Decoder:
    decoder = build_decoder(config, 0)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=2e-3)
    for step in range(steps):
        run(decoder, seed=step)
        optimizer.step()
    return decoder


def spread(decoder: Decoder) -> float:
    """By how much the streams differ at the end, relative to their size."""
    ends, states = decoder.residual, []
    leave: Callable[..., Tensor] = ends.exit
    ends.exit = lambda state: states.append(state.x_NnD.detach()) or leave(state)  # type: ignore[method-assign,func-returns-value]
    run(decoder)
    streams = states[0]
    return float((streams - streams.mean(1, keepdim=True)).norm() / streams.norm())


def test_phi_breaks_the_symmetry_that_zero_phi_keeps_for_ever() -> None:
    """Equal streams get equal gradients: with phi = 0 mHC stays the plain residual, and b_res never learns."""
    frozen, alive = (trained(config_of(kind="mhc", phi_std=std)) for std in (0.0, 0.02))
    assert spread(frozen) < 1e-9
    assert spread(alive) > 1e-4
    moved = []
    for decoder in (frozen, alive):
        connection = decoder.layers[1].mlp_residual
        assert isinstance(connection, ManifoldConnection)
        moved.append(float(connection.bias[8:].abs().max()))
    assert moved[0] < 1e-12 < 1e-10 < moved[1]


@pytest.mark.parametrize("kind", KINDS)
def test_h_res_is_applied(kind: str) -> None:
    """Unequal streams, a silent sublayer: what comes out is H_res X, and it is not X."""
    residual = build_residual(config_of(kind=kind), 0)
    with torch.no_grad():
        residual.fresh_weights(0.02, torch.Generator().manual_seed(0))
        residual.bias.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[operator,union-attr]
        state = build_residual(config_of(kind=kind)).enter(torch.zeros(7, 32))
        state = StreamState(torch.randn(7, 4, 32, generator=torch.Generator().manual_seed(2)), None)
        _, ctx = residual.read(state)
        out = residual.write(state, ctx, torch.zeros(7, 32)).x_NnD
    torch.testing.assert_close(out, torch.einsum("nij,njd->nid", ctx.maps.res_Nij, state.x_NnD))
    assert float((out - state.x_NnD).norm() / state.x_NnD.norm()) > 0.2


def test_deepseek_v4_weights_give_transformers_streams() -> None:
    """The module's parameters are theirs: fn, base, scale, and hc_head at the exit."""
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = config_of(kind="deepseek_v4", eps=1e-5)
    shape = type("Shape", (), {"hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-5, "hidden_size": 32})
    shape.rms_norm_eps = DENSE.rms_norm_eps  # type: ignore[attr-defined]
    theirs, head = modeling.DeepseekV4HyperConnection(shape), modeling.DeepseekV4HyperHead(shape)
    ours, ends = build_residual(config, 0), build_residual(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, other in zip(
            [*ours.parameters(), *ends.parameters()], [*theirs.parameters(), *head.parameters()], strict=True
        ):
            other.copy_(mine.normal_(generator=generator).mul_(0.5))
        state = ends.enter(torch.zeros(9, 32))
        state = StreamState(torch.randn(9, 4, 32, generator=generator), None)
        y_ND = torch.randn(9, 32, generator=generator)
        post, comb, collapsed = theirs(state.x_NnD.unsqueeze(0))
        u_ND, ctx = ours.read(state)
        after = ours.write(state, ctx, y_ND)
        expected = post[0].unsqueeze(-1) * y_ND.unsqueeze(1) + comb[0].mT @ state.x_NnD
        torch.testing.assert_close(u_ND, collapsed[0], rtol=0, atol=5e-6)
        torch.testing.assert_close(after.x_NnD, expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(ends.exit(after), head(expected.unsqueeze(0))[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moe", [False, True])
def test_recomputing_changes_no_bit(kind: str, moe: bool) -> None:
    shape = DENSE.model_copy(update={"first_k_dense_replace": 1}) if moe else DENSE
    results = []
    for recompute in (False, True):
        residual = ResidualConfig.model_validate({"kind": kind, "recompute": recompute})
        results.append(run(build_decoder(shape.model_copy(update={"residual": residual}), 0)))
    (kept, kept_grads), (again, again_grads) = results
    assert torch.equal(kept, again)
    assert kept_grads.keys() == again_grads.keys()
    assert [name for name in kept_grads if not torch.equal(kept_grads[name], again_grads[name])] == []


def saved_streams(decoder: Decoder) -> int:
    """How many tensors of the streams' size autograd keeps."""
    streams = (sum(LENGTHS), 4, 32)
    kept = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape == streams:
            kept.add(tensor.data_ptr())
        return tensor

    ids, positions = torch.zeros(sum(LENGTHS), dtype=torch.int64), torch.arange(sum(LENGTHS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = decoder(ids, positions, VarlenCausal([0, sum(LENGTHS)])).hidden_ND
    assert hidden.requires_grad
    return len(kept)


def test_recomputing_keeps_no_streams_in_the_graph() -> None:
    """Of 6 sublayers: without it all 6; with it none in the graph (each block holds its first, sqrt(nL/(n+2)) = 2)."""
    kept, recomputed = (config_of(kind="mhc", recompute=flag) for flag in (False, True))
    assert saved_streams(build_decoder(kept, 0)) == 6
    decoder = build_decoder(recomputed, 0)
    assert decoder.residual.block_sublayers == round(math.sqrt(4 * 6 / 6)) == 2
    assert saved_streams(decoder) == 0


def test_the_graph_may_be_walked_twice() -> None:
    decoder = build_decoder(config_of(kind="mhc", recompute=True), 0)
    ids = torch.arange(9)
    total = decoder(ids, ids, VarlenCausal([0, 9])).hidden_ND.square().sum()
    first, second = (torch.autograd.grad(total, list(decoder.layers.parameters()), retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_residual_parameters_stay_float32() -> None:
    decoder = build_decoder(config_of(kind="mhc"), 0)
    expected, _ = run(decoder)
    decoder = decoder.to(torch.bfloat16)
    assert decoder.layers[0].mlp.gate_up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in decoder.named_parameters() if "residual" in n} == {torch.float32}
    got, grads = run(decoder)
    assert got.dtype == torch.bfloat16 and all(bool(grad.isfinite().all()) for grad in grads.values())
    assert float((got.float() - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_the_config_counts_what_is_built_and_twins_share_their_weights(kind: str) -> None:
    config = config_of(kind=kind)
    decoder, plain = build_decoder(config, 3), build_decoder(DENSE, 3)
    assert sum(p.numel() for p in decoder.parameters()) == config.num_parameters()
    others = {name: value for name, value in decoder.state_dict().items() if "residual" not in name}
    assert others.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, others[name]) for name, value in plain.state_dict().items())
    assert isinstance(plain.residual, PlainResidual) and not list(plain.residual.parameters())


def test_published_numbers_of_added_parameters() -> None:
    """The paper's models and DeepSeek-V4-Flash, by the formula (n^2 + 2n) n C + n^2 + 2n + 3 a sublayer."""
    mhc = ResidualConfig(kind="mhc")
    for layers, hidden, millions in ((12, 1280, 3.0), (18, 1920, 6.7), (30, 2560, 14.8)):
        assert round(mhc.num_parameters(hidden, 2 * layers) / 1e6, 1) == pytest.approx(millions, abs=0.11)
    v4 = ResidualConfig(kind="deepseek_v4")
    assert v4.num_parameters(4096, 2 * 43) == 86 * (24 * 16384 + 27) + 4 * 16384 + 5


def test_gains_of_known_mappings() -> None:
    doubling, swap = torch.eye(2).mul(2).expand(3, 2, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(3, 2, 2)
    uneven = torch.tensor([[1.0, -3.0], [0.0, 1.0]]).expand(3, 2, 2)
    single = single_gains([doubling, swap, uneven])
    assert single.forward == [2.0, 1.0, 2.0]  # |1 - 3| = 2
    assert single.backward == [2.0, 1.0, 2.0]
    assert single.attenuation == [2.0, 1.0, 1.0]
    composed = composed_gains([doubling, swap, uneven])
    # From the end: uneven; uneven @ swap = [[-3, 1], [1, 0]]; that @ doubling.
    assert composed.forward == [4.0, 2.0, 2.0]
    assert composed.backward == [4.0, 2.0, 2.0]


def test_mhc_bounds_the_composed_gain_and_hc_does_not() -> None:
    """Maps far from their beginning, 12 sublayers: HC's product grows with depth, mHC's stays near one."""
    gains = {}
    for kind in ("hc", "mhc"):
        config = config_of(kind=kind).model_copy(update={"num_hidden_layers": 6, "first_k_dense_replace": 6})
        decoder = build_decoder(config, 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if name.endswith("residual.bias"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
            with observe_res_maps(decoder) as maps:
                run_ids = torch.arange(20)
                decoder(run_ids, run_ids, VarlenCausal([0, 20]))
        assert len(maps) == 12 and maps[0].shape == (20, 4, 4)
        gains[kind] = composed_gains(maps)
    assert gains["hc"].forward[0] > 10
    assert max(gains["mhc"].forward + gains["mhc"].backward) < 1.6
    assert min(gains["mhc"].attenuation) > 0.5


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="triton is installed here")
def test_triton_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="the triton package is not installed"):
        use_kernels(build_decoder(config_of(kind="mhc"), 0), "triton")


def test_kernels_reach_every_sublayer_and_can_be_taken_back() -> None:
    decoder = build_decoder(config_of(kind="mhc"), 0)
    seen: list[int] = []

    def write(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
        seen.append(1)
        return write_streams(x, y, post, res)

    expected, _ = run(decoder)
    use_kernels(decoder, TORCH_KERNELS._replace(write_streams=write, write_and_read=None))
    assert torch.equal(run(decoder)[0], expected) and len(seen) == 6
    use_kernels(decoder, "torch")
    run(decoder)
    assert len(seen) == 6


def test_observing_ends_with_its_block() -> None:
    decoder = build_decoder(config_of(kind="deepseek_v4"), 0)
    with observe_res_maps(decoder) as maps:
        run(decoder)
    assert len(maps) == 6
    run(decoder)
    assert len(maps) == 6
    assert isinstance(decoder.layers[0].mlp_residual, DeepseekV4Connection)
