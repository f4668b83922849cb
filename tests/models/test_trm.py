"""The tiny recursive model: its options, one by one, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tafkir.errors import CheckpointError, DataError
from tafkir.models.trm import Trm, build_trm
from tafkir.models.trm_names import OFFICIAL_PREFIX, official_names, shape_from_official, without_prefix
from tafkir.ops.post_norm import post_norm_reference
from tafkir.recipe.trm import TrmShape

BATCH, CELLS = 4, 9
NEIGHBOURS = {"mixer": "neighbours", "prefix_length": 0}


def shape(**given: object) -> TrmShape:
    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_multiple": 8,
        "prefix_length": 2,
        "num_recursions": 2,
        "num_latent_steps": 3,
        "max_supervision_steps": 5,
        "vocab_size": 5,
        "sequence_length": CELLS,
    }
    return TrmShape.model_validate({**small, **given})


def inputs(batch: int = BATCH, cells: int = CELLS) -> Tensor:
    return torch.randint(0, 5, (batch, cells), generator=torch.Generator().manual_seed(1))


def gradients(model: Trm, **how: object) -> dict[str, Tensor]:
    model.train().zero_grad()
    out = model(model.start(BATCH), inputs(), **how)
    (out.logits.float().square().sum() + out.q_halt.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["attention", "mlp"])
def mixer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_fresh_weights(mixer: str) -> None:
    big = shape(mixer=mixer, hidden_size=96, num_attention_heads=4, puzzle_embedding_size=96, num_puzzle_ids=3)
    model = build_trm(big, 3)
    for name, tensor in model.state_dict().items():
        if name in ("q_head.weight", "puzzle_table.weight"):
            assert not tensor.any()
        elif name == "q_head.bias":
            assert tensor.tolist() == [-5.0, -5.0]
        else:
            std = 1.0 if name.endswith("init") else (96 if "embed" in name else tensor.shape[1]) ** -0.5
            assert float(tensor.std()) == pytest.approx(std, rel=0.25)
            assert float(tensor.abs().max()) <= 2 * std / 0.8796 + 1e-6
    again = build_trm(big, 3).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert "y_init" not in dict(model.named_parameters()), "the starts are fixed"


def test_the_recursion_is_the_papers(mixer: str) -> None:
    """T times: n updates of z from x, y and z, then one of y from y and z."""
    model = build_trm(shape(mixer=mixer, prefix_length=0), 0)
    start = model.start(BATCH)
    x = model.embed(inputs())
    angles = model._angles(CELLS, x.device)

    def net(value: Tensor) -> Tensor:
        return model._outward(model.network(model._inward(value), angles))

    y, z = start
    for _ in range(2):
        for _ in range(3):
            z = net(x + y + z)
        y = net(y + z)
    out = model(start, inputs())
    torch.testing.assert_close(out.logits, model.lm_head(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.q_halt, model.q_head(y[:, 0])[:, 0])
    torch.testing.assert_close(out.state.z, z, rtol=1e-5, atol=1e-5)


def test_depth_is_an_argument_too(mixer: str) -> None:
    deep, shallow = (
        build_trm(shape(mixer=mixer, num_recursions=t, num_latent_steps=n), 0) for t, n in ((2, 3), (1, 2))
    )
    torch.testing.assert_close(
        deep(deep.start(BATCH), inputs(), depth=(1, 2)).logits, shallow(shallow.start(BATCH), inputs()).logits
    )
    assert not torch.equal(deep(deep.start(BATCH), inputs()).logits, shallow(shallow.start(BATCH), inputs()).logits)


def test_only_the_last_recursion_has_a_gradient(mixer: str) -> None:
    """The first recursion's result, given as a constant start, leaves the same gradients."""
    model = build_trm(shape(mixer=mixer), 0)
    whole = gradients(model)
    with torch.no_grad():
        before = model(model.start(BATCH), inputs(), depth=(1, 3)).state
    model.zero_grad()
    out = model(before, inputs(), depth=(1, 3))
    (out.logits.square().sum() + out.q_halt.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-4)


def test_one_step_gradients(mixer: str) -> None:
    """The same answer; the gradient goes back through the last update of z and y alone."""
    one, whole = build_trm(shape(mixer=mixer, gradient="one_step"), 0), build_trm(shape(mixer=mixer), 0)
    torch.testing.assert_close(one(one.start(BATCH), inputs()).logits, whole(whole.start(BATCH), inputs()).logits)
    found, other = gradients(one), gradients(whole)
    torch.testing.assert_close(found["lm_head.weight"], other["lm_head.weight"], rtol=1e-4, atol=1e-4)
    name = "network.layers.0.mlp.down_proj.weight"
    assert float((found[name] - other[name]).norm()) > 0.01 * float(other[name].norm())
    calls = []
    one.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    one(one.start(BATCH), inputs())
    assert calls == [False] * 6 + [True] * 2


def test_a_single_latent(mixer: str) -> None:
    model = build_trm(shape(mixer=mixer, latents="z"), 0)
    out = model(model.start(BATCH), inputs())
    assert torch.equal(out.state.y, out.state.z)
    assert not torch.equal(out.logits, build_trm(shape(mixer=mixer), 0)(model.start(BATCH), inputs()).logits)


def test_separate_networks(mixer: str) -> None:
    two = build_trm(shape(mixer=mixer, separate_networks=True), 0)
    one = build_trm(shape(mixer=mixer), 0)
    assert two.answer_network is not None
    state = two.state_dict()
    state |= {
        name.replace("network.", "answer_network.", 1): t for name, t in state.items() if name.startswith("network.")
    }
    two.load_state_dict(state)
    one.load_state_dict({name: t for name, t in state.items() if not name.startswith("answer_network")})
    torch.testing.assert_close(two(two.start(BATCH), inputs()).logits, one(one.start(BATCH), inputs()).logits)


def test_counts_are_those_of_the_model(mixer: str) -> None:
    for given in (
        {},
        {"position_encoding": "learned", "prefix_length": 0},
        {"separate_networks": True, "puzzle_embedding_size": 20, "num_puzzle_ids": 7},
    ):
        model = build_trm(shape(mixer=mixer, **given), 0)
        table = 140 if given.get("num_puzzle_ids") else 0
        assert model.shape.num_parameters() == sum(p.numel() for p in model.parameters()) + table
        assert model.shape.num_parameters(puzzle_table=False) == sum(p.numel() for p in model.parameters())


def test_the_papers_sizes() -> None:
    """Counts of trm.md, measured on the official modules."""
    paper = {"vocab_size": 11, "sequence_length": 81}
    assert TrmShape(**paper, mixer="mlp").num_parameters() == 5_028_866
    assert TrmShape(**paper).num_parameters() == 6_828_034
    assert TrmShape(**paper).flops_per_pass() == pytest.approx(1.36e9, rel=0.01)
    assert TrmShape(**paper, mixer="mlp").flops_per_pass() == pytest.approx(1.22e9, rel=0.01)
    assert TrmShape(**paper, mixer="mlp").flops_per_supervision_step(train=True) == pytest.approx(42.7e9, rel=0.01)


@pytest.mark.parametrize(("multiple", "expected"), [(256, 256), (32, 64), (1, 43)])
def test_rounding_of_swiglu_widths(multiple: int, expected: int) -> None:
    sized = shape(intermediate_multiple=multiple)
    assert sized.intermediate_size(16) == expected
    assert build_trm(sized, 0).network.layers[0].mlp.down_proj.weight.shape == (16, expected)  # type: ignore[union-attr]


def test_no_prefix(mixer: str) -> None:
    """Without a prefix the halting head reads the first cell, and no cell is lost."""
    model = build_trm(shape(mixer=mixer, prefix_length=0), 0)
    out = model(model.start(BATCH), inputs())
    assert out.state.y.shape == (BATCH, CELLS, 16) and out.logits.shape == (BATCH, CELLS, 5)
    assert 4 * model.embed_tokens.weight[inputs()[0, 0], 0].item() == pytest.approx(
        model.embed(inputs())[0, 0, 0].item()
    )


def test_puzzle_vectors_stand_in_the_prefix(mixer: str) -> None:
    model = build_trm(shape(mixer=mixer, puzzle_embedding_size=20, num_puzzle_ids=3), 0).eval()
    assert model.puzzle_table is not None
    model.puzzle_table.weight[2] = torch.arange(1.0, 21.0)
    x = model.embed(inputs(), torch.tensor([0, 2, 1, 2])) / 4
    torch.testing.assert_close(x[1, :2].flatten(), torch.cat((torch.arange(1.0, 21.0), torch.zeros(12))))
    assert torch.equal(x[1, :2], x[3, :2]) and not x[0, :2].any()
    assert torch.equal(model.embed(inputs())[:, :2], torch.zeros(BATCH, 2, 16)), "row 0 where no id is given"


def test_lookups_in_training_collect_their_gradient_outside_the_parameters(mixer: str) -> None:
    model = build_trm(shape(mixer=mixer, puzzle_embedding_size=16, num_puzzle_ids=3), 0).train()
    assert model.puzzle_table is not None and "puzzle_table.weight" not in dict(model.named_parameters())
    ids = torch.tensor([0, 2, 2, 2])
    out = model(model.start(BATCH), inputs(), ids)
    out.logits.square().sum().backward()
    ((touched, vectors),) = model.puzzle_table.touched
    assert torch.equal(touched, ids) and vectors.grad is not None and vectors.grad.any()
    model.eval()(model.start(BATCH), inputs(), ids)
    assert len(model.puzzle_table.touched) == 1


def test_recomputing_passes_changes_no_gradient(mixer: str) -> None:
    model = build_trm(shape(mixer=mixer), 0)
    kept = gradients(model)
    model.recompute = True
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, kept[name], rtol=1e-5, atol=1e-5)


def test_passes_in_bfloat16(mixer: str) -> None:
    model = build_trm(shape(mixer=mixer), 0)
    exact = model(model.start(BATCH), inputs(), depth=(1, 1)).logits
    model.dtype = torch.bfloat16
    out = model(model.start(BATCH), inputs(), depth=(1, 1))
    assert out.logits.dtype == out.state.y.dtype == torch.bfloat16 and out.q_halt.dtype == torch.float32
    torch.testing.assert_close(out.logits.float(), exact, rtol=0.1, atol=0.1)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())


def test_neighbours_are_the_nine_cells_around() -> None:
    """Against loops; what is further away than there are filters on the way is not seen, but by the halting head."""
    model = build_trm(
        shape(mixer="neighbours", prefix_length=0, sequence_length=12, grid_columns=4, num_recursions=1), 0
    )
    mixer = model.network.layers[0].get_submodule("neighbours")
    filters = mixer.get_parameter("filters")
    assert filters.std().item() == pytest.approx(1 / 3, rel=0.25)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2))
    mixed = torch.zeros_like(x)
    for row, column, down, right in itertools.product(range(3), range(4), (-1, 0, 1), (-1, 0, 1)):
        if 0 <= row + down < 3 and 0 <= column + right < 4:
            seen = x[:, (row + down) * 4 + column + right]
            mixed[:, row * 4 + column] += filters[:, down + 1, right + 1] * seen
    torch.testing.assert_close(mixer(x, filters), post_norm_reference(x, mixed, 1e-5), rtol=1e-5, atol=1e-5)
    assert model.shape.num_parameters() == sum(p.numel() for p in model.parameters())

    line = build_trm(shape(mixer="neighbours", prefix_length=0, sequence_length=20, grid_columns=20), 0)
    tokens = inputs(1, 20)
    changed = tokens.index_add(1, torch.tensor([0]), torch.where(tokens[:, :1] < 4, 1, -1))
    outs = [line(line.start(1), each, depth=(1, 1)) for each in (tokens, changed)]
    differs = (outs[0].logits != outs[1].logits).any(-1)[0].nonzero().squeeze(1).tolist()
    assert differs == [0, 1, 2, 3, 4], "two blocks, two passes"
    torch.testing.assert_close(outs[0].q_halt, line.q_head(outs[0].state.y.amax(1))[:, 0])


def test_attention_with_rope_takes_other_lengths() -> None:
    model = build_trm(shape(), 0).eval()
    out = next(model.steps(inputs(cells=4)))
    assert out.logits.shape == (BATCH, 4, 5)


@pytest.mark.parametrize("given", [{"mixer": "mlp"}, {"position_encoding": "learned"}, NEIGHBOURS])
def test_the_mlp_variant_is_tied_to_one_length(given: dict[str, str]) -> None:
    model = build_trm(shape(**given), 0).eval()
    with pytest.raises(DataError, match=r"the grid has 16 cells; expected 9: .* tied to one length"):
        next(model.steps(inputs(cells=16)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_attention_heads": 3}, "does not divide"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "even"),
        ({"puzzle_embedding_size": 33}, "does not fit"),
        ({"latents": "z", "separate_networks": True}, "one network"),
        ({"mixer": "neighbours"}, "set prefix_length = 0"),
        ({**NEIGHBOURS, "grid_columns": 4}, "9 cells do not fill rows of 4"),
    ],
)
def test_networks_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        shape(**given)


def test_the_names_of_the_reference() -> None:
    full = shape(mixer="mlp", puzzle_embedding_size=4, separate_networks=True)
    names = official_names(list(Trm(full).state_dict()), full)
    assert names["network.layers.1.token_mlp.gate_up_proj.weight"] == "L_level.layers.1.mlp_t.gate_up_proj.weight"
    assert names["answer_network.layers.0.mlp.down_proj.weight"] == "H_level.layers.0.mlp.down_proj.weight"
    assert names["puzzle_table.weight"] == "puzzle_emb.weights" and names["y_init"] == "H_init"
    assert len(set(names.values())) == len(names)
    assert without_prefix(OFFICIAL_PREFIX + "H_init") == without_prefix("model.inner.H_init") == "H_init"


def test_weights_that_belong_to_no_such_model() -> None:
    with pytest.raises(CheckpointError, match="not a TRM or HRM checkpoint"):
        shape_from_official({"wte.weight": (3, 4)})
    sizes = {"embed_tokens.embedding_weight": (5, 16), "L_level.layers.0.mlp.down_proj.weight": (16, 64)}
    with pytest.raises(CheckpointError, match="hidden_size is 16 by the weights; expected 32"):
        shape_from_official(sizes, hidden_size=32)
