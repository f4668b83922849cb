"""Static decode steps: the plain path's tokens, alone, filled up, and replayed from a record of every operation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tafkir.engine.paged_engine import PagedEngine
from tafkir.engine.static_steps import Run, StaticDecode, size_of_rows
from tafkir.errors import BackendUnavailable
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts
from tafkir.ops import native
from tafkir.ops.moe import swiglu_reference
from tafkir.records import Completion, Request, SamplingParams
from tests.engine.conftest import EOS

# What waits for the device or copies from the processor, which no graph can hold.
_HOST = {"_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "_unique2", "is_nonzero"}


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in _HOST, f"{func} cannot be captured"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record_operations(run: Run) -> Run:
    """As a CUDA graph: the same operations on the same memory, whatever Python would do by now."""

    def refuse(_: Tensor) -> None:
        raise AssertionError("tolist cannot be captured")

    with pytest.MonkeyPatch.context() as patch, _Record() as record:
        patch.setattr(Tensor, "tolist", refuse)
        outputs = run()

    def replay() -> tuple[Tensor, list[Tensor]]:
        for func, args, kwargs, out in record.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return outputs

    return replay


def all_experts(x_ND: Tensor, gate_up_EID: Tensor, down_EDI: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
    """Every expert of every token, most of them at weight zero: what is computed depends on no token."""
    share_NE = x_ND.new_zeros(len(x_ND), len(gate_up_EID)).scatter_(1, ids_NA, weights_NA)
    parts = [F.linear(swiglu_reference(F.linear(x_ND, a)), b) for a, b in zip(gate_up_EID, down_EDI, strict=True)]
    return torch.einsum("end,ne->nd", torch.stack(parts), share_NE)


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    """Compiled kernels are no operations of torch, and have steps of their own."""
    before = native.kernels_in_use()
    native.select_kernels("torch")
    yield
    native.select_kernels(before)


def static_copy(decoder: Decoder) -> Decoder:
    decoder = copy.deepcopy(decoder)
    for module in decoder.modules():
        if isinstance(module, Experts):
            module.kernel = all_experts
    return decoder


def requests_of(prompts: list[tuple[int, ...]]) -> list[Request]:
    """Greedy and sampled ones that end at different times, so that the batch takes many sizes."""
    return [
        Request(str(i), tuple(t % 61 for t in ids), SamplingParams(max_tokens=5 + 2 * i, temperature=i % 2, seed=i))
        for i, ids in enumerate(prompts)
    ]


def run(engine: PagedEngine, requests: list[Request]) -> dict[str, Completion]:
    return {done.request_id: done for done in engine.complete(requests)}


def recorded(engine: PagedEngine) -> StaticDecode:
    static = StaticDecode(engine.decoder, engine._cache, record_operations)
    engine._runner.static = static
    return static


def assert_same(ours: dict[str, Completion], theirs: dict[str, Completion], atol: float = 2e-5) -> None:
    assert {i: c.token_ids for i, c in ours.items()} == {i: c.token_ids for i, c in theirs.items()}
    for i, completion in ours.items():
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), torch.tensor(theirs[i].logprobs), rtol=0, atol=atol
        )
        if completion.expert_ids is not None:
            assert torch.equal(completion.expert_ids, theirs[i].expert_ids)


@pytest.mark.parametrize("family", ["shared_decoder", "latent_decoder"])
def test_the_plain_paths_tokens(request: Any, prompts: list[tuple[int, ...]], family: str) -> None:
    """With prompts that come and rows that end in between, in little room, experts returned."""
    decoder = static_copy(request.getfixturevalue(family))
    asked = requests_of(prompts[3:9])
    tight = 6 * 16 * decoder.config.kv_bytes_per_token(4)
    options = {"eos_ids": (EOS,), "max_batch": 5, "max_cache_bytes": tight, "chunk_tokens": 24}
    options["record_experts"] = bool(decoder.routers)
    plain = PagedEngine(decoder, static_steps=False, **options)
    expected = run(plain, asked)
    for is_recorded in (False, True):
        engine = PagedEngine(decoder, static_steps=True, **options)
        static = recorded(engine) if is_recorded else engine._runner.static
        assert_same(run(engine, asked), expected)
        assert engine.num_preemptions == plain.num_preemptions
        # 1, 2, 4 and 5 rows, 8 blocks.
        assert 2 <= static.num_recorded <= 4
        assert engine._cache.blocks.num_used == 0


def test_other_weights_are_read_or_recorded_anew(shared_decoder: Decoder, prompts: list[tuple[int, ...]]) -> None:
    decoder, asked = static_copy(shared_decoder), requests_of(prompts[1:3])
    engine = PagedEngine(decoder, eos_ids=(EOS,), max_batch=8)
    static = recorded(engine)
    before, sizes = run(engine, asked), static.num_recorded
    changed = {name: tensor.roll(1, 0) if "embed" in name else tensor for name, tensor in decoder.state_dict().items()}
    engine.load_weights({name: tensor.clone() for name, tensor in changed.items()}.items(), 1)
    assert static.num_recorded == sizes  # in place: what is recorded holds
    fresh = PagedEngine(decoder, eos_ids=(EOS,), max_batch=8)
    after = run(engine, asked)
    assert_same(after, run(fresh, asked))
    assert after != before
    # A weight of its own elsewhere, as an adapter that is merged would be.
    layer = decoder.layers[0].attention.o_proj
    layer.weight = nn.Parameter(layer.weight.flip(0))
    static.forget_moved()
    assert static.num_recorded == 0
    engine.forget_prefixes()
    assert_same(run(engine, asked), run(PagedEngine(decoder, eos_ids=(EOS,), max_batch=8), asked))


def test_sizes_and_what_cannot_be_static(shared_decoder: Decoder) -> None:
    assert [size_of_rows(n, 30) for n in (1, 2, 3, 5, 8, 9, 17, 25, 30)] == [1, 2, 4, 8, 8, 16, 24, 30, 30]
    with pytest.raises(BackendUnavailable, match="which experts are computed"):
        PagedEngine(shared_decoder, eos_ids=(EOS,), static_steps=True)
    for option, message in ({"batch_invariant": True}, "by itself"), ({"kv_cache": "fp8"}, "keeps codes"):
        with pytest.raises(BackendUnavailable, match=message):
            PagedEngine(static_copy(shared_decoder), eos_ids=(EOS,), static_steps=True, **option)
    # What the record refuses: the plain experts read how many tokens each has got.
    engine = PagedEngine(shared_decoder, eos_ids=(), max_batch=2)
    recorded(engine)
    with pytest.raises(AssertionError, match="cannot be captured"):
        run(engine, [Request("a", (5, 6, 7), SamplingParams(max_tokens=4, temperature=0))])
