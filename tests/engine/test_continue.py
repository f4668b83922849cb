"""Completions that are stopped and gone on with: the same tokens as in one piece, then new weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tafkir.engine.engine import Engine
from tafkir.errors import RequestError
from tafkir.models.decoder import Decoder
from tafkir.ops.sampling import stream_key, uniform, uniform_reference
from tafkir.protocols import PausingCompleter
from tafkir.records import Completion, Request, SamplingParams
from tests.engine.conftest import EOS, MakeEngine, build_tiny

Prompts = list[tuple[int, ...]]


def requests_for(prompts: Prompts, max_tokens: int = 24) -> list[Request]:
    return [
        Request(f"{i}.{j}", prompt, SamplingParams(max_tokens=max_tokens - i - 3 * j, seed=10 * i + j))
        for i, prompt in enumerate(prompts[::2])
        for j in range(2)
    ]


def test_a_key_may_start_in_the_middle_of_its_stream() -> None:
    for seed in (0, 1, 2**63, 2**64 - 1):
        keys = torch.tensor([stream_key(seed, draw) for draw in (0, 1, 7)])
        drawn = uniform(keys, torch.tensor([9, 8, 2]))
        assert drawn.tolist() == [uniform_reference(seed, 9)] * 3


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_completion_in_two_pieces_is_the_one_in_one_piece(
    make_engine: MakeEngine, prompts: Prompts, cut: int
) -> None:
    requests = requests_for(prompts)
    engine = make_engine()
    whole = {done.request_id: done for done in engine.complete(requests)}
    begun = [request for request in requests if len(whole[request.id].token_ids) > cut]
    assert len(begun) > len(requests) // 2
    rest = [replace(request, prefix_ids=whole[request.id].token_ids[:cut]) for request in begun]
    for done in engine.complete(rest):
        full = whole[done.request_id]
        assert done.token_ids == full.token_ids[cut:]
        assert done.logprobs == pytest.approx(full.logprobs[cut:], abs=2e-5)
        assert done.finish_reason == full.finish_reason


def test_stopping_gives_what_was_sampled_and_leaves_an_idle_engine(make_engine: MakeEngine, prompts: Prompts) -> None:
    requests = requests_for(prompts)
    engine = make_engine(max_batch=6)  # some still wait when it stops
    assert isinstance(engine, PausingCompleter)
    whole = {done.request_id: done for done in engine.complete(requests)}
    finished: list[Completion] = []
    partial: list[Completion] = []
    for done in engine.complete(requests):
        finished.append(done)
        if len(finished) == 4:
            partial = engine.cancel_all()
    assert not engine.has_work and engine.num_running == 0
    assert {done.request_id for done in (*finished, *partial)} == whole.keys()
    assert len(finished) + len(partial) == len(requests)
    for done in partial:
        assert done.finish_reason == "cancelled"
        assert done.token_ids == whole[done.request_id].token_ids[: len(done.token_ids)]
    assert {len(done.token_ids) > 0 for done in partial} == {True, False}
    engine.load_weights(engine.decoder.state_dict().items(), 1)
    by_id = {request.id: request for request in requests}
    rest = [replace(by_id[done.request_id], prefix_ids=done.token_ids) for done in partial]
    joined = {done.request_id: done for done in engine.complete(rest)}
    for done in partial:
        assert done.token_ids + joined[done.request_id].token_ids == whole[done.request_id].token_ids
        assert joined[done.request_id].policy_version == 1


def test_new_weights_speak_only_after_the_prefix(prompts: Prompts) -> None:
    """The log-probabilities of the rest are those of the new weights, given a prefix that older ones wrote."""
    old, new = build_tiny(0), build_tiny(1)
    requests = requests_for(prompts)
    before = {done.request_id: done for done in Engine(old, eos_ids=(EOS,)).complete(requests)}
    begun = [request for request in requests if len(before[request.id].token_ids) > 4]
    engine = Engine(old, eos_ids=(EOS,))
    engine.load_weights(new.state_dict().items(), 7)
    rest = {r.id: replace(r, prefix_ids=before[r.id].token_ids[:4]) for r in begun}
    scorer = Engine(new, eos_ids=(EOS,))
    for done in engine.complete(list(rest.values())):
        request = rest[done.request_id]
        (scored,) = scorer.score([request.prompt_ids + request.prefix_ids + done.token_ids])
        torch.testing.assert_close(torch.tensor(done.logprobs), scored[-len(done.logprobs) :], atol=2e-5, rtol=0)
        assert done.policy_version == 7
        # The draws are those of the stream from the fifth on: inverse CDF by hand.
        first = torch.softmax(logits_of(new, request.prompt_ids + request.prefix_ids), dim=-1)
        u = uniform_reference(request.params.seed or 0, 4)
        assert int((first.cumsum(0) > u).nonzero()[0, 0]) == done.token_ids[0]


@torch.no_grad()
def logits_of(decoder: Decoder, ids: tuple[int, ...]) -> torch.Tensor:
    from tafkir.models.attention import VarlenCausal

    out = decoder(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)]))
    return decoder.logits(out.hidden_ND[-1:])[0].double()


def test_the_length_limit_counts_the_prefix(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine()
    request = Request("a", prompts[2], SamplingParams(max_tokens=6, seed=0), prefix_ids=(5, 6, 7, 8))
    (done,) = engine.complete([request])
    assert len(done.token_ids) <= 2
    context = Request("a", prompts[-1], SamplingParams(max_tokens=500, seed=0, top_k=1), prefix_ids=(5,) * 60)
    (done,) = engine.complete([context])
    assert len(done.token_ids) <= 128 - 60 - 60


@pytest.mark.parametrize(
    ("prefix", "message"),
    [((5,) * 4, "4 tokens are sampled already.*fewer than max_tokens=4"), ((99,), "token id 99")],
)
def test_a_prefix_that_does_not_fit_is_refused(make_engine: MakeEngine, prefix: tuple[int, ...], message: str) -> None:
    request = Request("a", (5, 6), SamplingParams(max_tokens=4, seed=0), prefix_ids=prefix)
    with pytest.raises(RequestError, match=message):
        make_engine().complete([request])


def test_a_stop_string_may_begin_in_the_prefix(shared_decoder: Decoder) -> None:
    class Letters:
        def decode(self, ids: list[int], /) -> str:
            return "".join(chr(60 + token) for token in ids)

    engine = Engine(shared_decoder, eos_ids=(), tokenizer=Letters())  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=12, seed=3)
    (free,) = engine.complete([Request("a", (9, 10), params)])
    stop = Letters().decode(list(free.token_ids[3:6]))
    request = Request("a", (9, 10), replace(params, stop=(stop,)), prefix_ids=free.token_ids[:4])
    (done,) = engine.complete([request])
    assert done.finish_reason == "stop" and done.token_ids == free.token_ids[4:6]
