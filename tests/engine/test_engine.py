"""The engine against the plain forward: same greedy tokens, same log-probabilities, whatever shares the batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from tafkir.engine.engine import Engine
from tafkir.errors import CapacityError, CheckpointError, RequestError, SamplingError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.protocols import Completer
from tafkir.records import Completion, Request, SamplingParams

MakeEngine = Callable[..., Engine]
Prompts = list[tuple[int, ...]]
EOS = 3


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    return {done.request_id: done for done in engine.complete(requests)}


def naive_greedy(decoder: Decoder, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """The whole sequence through the whole model for every token: no cache, no batch."""
    ids, logprobs = list(prompt), []
    for _ in range(max_tokens):
        with torch.no_grad():
            hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
            logprob_V = decoder.logits(hidden[-1:])[0].log_softmax(-1)
        ids.append(int(logprob_V.argmax()))
        logprobs.append(float(logprob_V.max()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="session")
def greedy_answers(shared_decoder: Decoder, prompts: Prompts) -> list[tuple[list[int], list[float]]]:
    return [naive_greedy(shared_decoder, prompt, 36) for prompt in prompts]


def training_logprobs(
    decoder: Decoder, prompt: Sequence[int], completion: Sequence[int], temperature: float
) -> torch.Tensor:
    ids = torch.tensor([*prompt, *completion])
    with torch.no_grad():
        hidden = decoder(ids, torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
        logprob_NV = (decoder.logits(hidden) / temperature).log_softmax(-1)
    start = len(prompt)
    return logprob_NV[start - 1 : -1].gather(1, ids[start:, None]).squeeze(1)


def sampled(prompts: Prompts, group: int = 3, **params: object) -> list[Request]:
    return [
        Request(f"{i}.{j}", prompt, SamplingParams(seed=100 * i + j, **params))  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts)
        for j in range(group)
    ]


def test_is_a_completer(make_engine: MakeEngine) -> None:
    assert isinstance(make_engine(), Completer)


@pytest.mark.parametrize("max_batch", [1, 5, 64])
def test_greedy_equals_the_naive_loop(
    make_engine: MakeEngine, greedy_answers: list[tuple[list[int], list[float]]], prompts: Prompts, max_batch: int
) -> None:
    """Cached equals uncached, with groups that share a prompt, rows that come and go, and a growing cache."""
    requests = [
        Request(f"{i}.{j}", prompt, SamplingParams(temperature=0, max_tokens=1 + 3 * i + j))
        for i, prompt in enumerate(prompts)
        for j in range(2)
    ]
    done = run(make_engine(max_batch=max_batch), requests)
    assert len(done) == len(requests)
    reasons = set()
    for i, request in enumerate(requests):
        tokens, logprobs = (column[: request.params.max_tokens] for column in greedy_answers[i // 2])
        completion = done[request.id]
        assert list(completion.token_ids) == tokens, request.id
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert completion.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        reasons.add(completion.finish_reason)
    assert "length" in reasons


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_logprobs_equal_the_training_forward(
    make_engine: MakeEngine, shared_decoder: Decoder, prompts: Prompts, temperature: float
) -> None:
    requests = sampled(prompts, max_tokens=40, temperature=temperature)
    done = run(make_engine(max_batch=10), requests)
    worst = 0.0
    for request in requests:
        completion = done[request.id]
        trained = training_logprobs(shared_decoder, request.prompt_ids, completion.token_ids, temperature)
        worst = max(worst, float((torch.tensor(completion.logprobs) - trained).abs().max()))
    assert worst < 1e-5
    assert len({len(completion.token_ids) for completion in done.values()}) > 5, "sequences of many lengths"


def test_tokens_do_not_depend_on_the_batch(make_engine: MakeEngine, prompts: Prompts) -> None:
    """Exact up to float order: a draw that falls within 1e-6 of a token's edge may differ, and here none does."""
    requests = sampled(prompts[1::2], group=2, max_tokens=20)
    together = run(make_engine(max_batch=64), requests)
    narrow = run(make_engine(max_batch=5), list(reversed(requests)))
    engine = make_engine()
    for request in requests:
        (alone,) = engine.complete([request])
        for other in (together[request.id], narrow[request.id]):
            assert alone.token_ids == other.token_ids
            assert alone.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_same_call_twice_is_bit_identical(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(max_batch=9)
    requests = sampled(prompts, group=2, max_tokens=20)
    first = list(engine.complete(requests))
    run(engine, sampled(prompts[::-1], group=1, max_tokens=40, temperature=2.0))  # leaves other contents in the cache
    assert list(engine.complete(requests)) == first
    assert list(make_engine(max_batch=9).complete(requests)) == first


def test_different_seeds_and_no_seed_differ(make_engine: MakeEngine, prompts: Prompts) -> None:
    requests = [Request(str(j), prompts[5], SamplingParams(max_tokens=20, seed=j)) for j in range(8)]
    assert len({done.token_ids for done in make_engine().complete(requests)}) == 8
    unseeded = [replace(request, params=SamplingParams(max_tokens=20)) for request in requests]
    assert len({done.token_ids for done in make_engine().complete(unseeded)}) == 8


def test_top_k_one_is_greedy(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine()
    greedy = run(engine, [Request("a", prompts[4], SamplingParams(temperature=0, max_tokens=20))])["a"]
    for cut in ({"top_k": 1}, {"top_p": 1e-6}):
        done = run(engine, [Request("a", prompts[4], SamplingParams(max_tokens=20, seed=1, **cut))])["a"]  # type: ignore[arg-type]
        assert done.token_ids == greedy.token_ids


def test_score_equals_sampling_logprobs(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(max_prefill_tokens=50)
    requests = sampled(prompts, group=2, max_tokens=15)
    done = run(engine, requests)
    scores = engine.score([request.prompt_ids + done[request.id].token_ids for request in requests])
    for request, score in zip(requests, scores, strict=True):
        tokens = done[request.id].token_ids
        assert score.shape == (len(request.prompt_ids) + len(tokens) - 1,)
        assert score.dtype == torch.float32
        expected = torch.tensor(done[request.id].logprobs)
        torch.testing.assert_close(score[len(request.prompt_ids) - 1 :], expected, atol=1e-5, rtol=0)


def test_scores_may_enter_a_loss(make_engine: MakeEngine) -> None:
    (score,) = make_engine().score([[5, 6, 7]])
    weight = torch.ones(2, requires_grad=True)
    (score * weight).sum().backward()
    assert torch.equal(weight.grad, score)


@pytest.mark.parametrize("ids", [[], [5], [5, 64], [5, -1], [5] * 129])
def test_score_refuses_what_it_cannot_score(make_engine: MakeEngine, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="sequence 1"):
        make_engine().score([[5, 6], ids])


def test_stop_token_ids(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(eos_ids=())
    free = run(engine, [Request("a", prompts[6], SamplingParams(max_tokens=30, seed=7))])["a"]
    stop = free.token_ids[10]
    cut = free.token_ids.index(stop) + 1
    params = SamplingParams(max_tokens=30, seed=7, stop_token_ids=(63, stop))
    done = run(engine, [Request("a", prompts[6], params)])["a"]
    assert done.token_ids == free.token_ids[:cut]
    assert done.logprobs == free.logprobs[:cut]
    assert (free.finish_reason, done.finish_reason) == ("length", "stop")


class Letters:
    """Token 10 is "a", 11 is "b" and so on."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(chr(87 + token) for token in ids)


def test_stop_strings_across_tokens(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(eos_ids=(), tokenizer=Letters())
    free = run(engine, [Request("a", prompts[6], SamplingParams(max_tokens=30, seed=9))])["a"]
    text = Letters().decode(free.token_ids)
    stop = text[8:11]
    params = SamplingParams(max_tokens=30, seed=9, stop=("never there", stop))
    other = Request("b", prompts[6], SamplingParams(max_tokens=30, seed=9))
    done = run(engine, [Request("a", prompts[6], params), other])
    assert Letters().decode(done["a"].token_ids) == text[: text.index(stop) + 3]
    assert done["a"].finish_reason == "stop"
    assert done["b"].token_ids == free.token_ids, "the neighbour runs on"


def test_context_ends_a_completion(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(eos_ids=(), max_context=48)
    (done,) = engine.complete([Request("a", prompts[10], SamplingParams(max_tokens=1000, seed=0))])
    assert len(done.token_ids) == 48 - 40
    assert done.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ((), {}, "prompt is empty"),
        ((5, 64), {}, "token id 64"),
        ((5, -1), {}, "token id -1"),
        ((5,) * 128, {}, "128 tokens"),
        ((5,), {"temperature": -0.1}, "temperature=-0.1"),
        ((5,), {"temperature": float("nan")}, "temperature=nan"),
        ((5,), {"temperature": float("inf")}, "temperature=inf"),
        ((5,), {"top_p": 0.0}, "top_p=0.0"),
        ((5,), {"top_p": 1.01}, "top_p=1.01"),
        ((5,), {"top_k": -1}, "top_k=-1"),
        ((5,), {"max_tokens": 0}, "max_tokens=0"),
        ((5,), {"stop": ("",)}, "empty stop string"),
        ((5,), {"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_bad_requests_are_refused_before_any_runs(
    make_engine: MakeEngine, prompt: tuple[int, ...], params: dict[str, object], says: str
) -> None:
    engine = make_engine()
    good = Request("good", (5, 6), SamplingParams(max_tokens=2))
    bad = Request("bad", prompt, SamplingParams(**params))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=f"'bad'.*{re.escape(says)}"):
        engine.complete([good, bad])
    assert not engine.has_work
    assert len(run(engine, [good])) == 1


def test_ids_must_differ(make_engine: MakeEngine) -> None:
    request = Request("a", (5,), SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="same id"):
        make_engine().complete([request, request])
    engine = make_engine()
    engine.add_request(request)
    with pytest.raises(RequestError, match="in use"):
        engine.add_request(request)
    with pytest.raises(RequestError, match="still running"):
        engine.complete([request])


def test_incremental_events_equal_complete(make_engine: MakeEngine, prompts: Prompts) -> None:
    requests = sampled(prompts, max_tokens=20)
    done = run(make_engine(), requests)
    engine = make_engine()
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    logprobs: dict[str, list[float]] = {request.id: [] for request in requests}
    reasons: dict[str, str] = {}
    waiting = list(requests)
    steps = 0
    while waiting or engine.has_work:
        if steps % 3 == 0 and waiting:  # requests arrive while others run
            engine.add_request(waiting.pop(0))
        for event in engine.step():
            assert event.request_id not in reasons, "no token after the last"
            tokens[event.request_id].append(event.token_id)
            logprobs[event.request_id].append(event.logprob)
            if event.finish_reason:
                reasons[event.request_id] = event.finish_reason
        steps += 1
    for request in requests:
        completion = done[request.id]
        assert tuple(tokens[request.id]) == completion.token_ids
        assert logprobs[request.id] == pytest.approx(completion.logprobs, abs=1e-5)
        assert reasons[request.id] == completion.finish_reason
    assert engine.step() == []


def test_top_logprobs(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine()
    engine.add_request(Request("plain", prompts[3], SamplingParams(max_tokens=5, seed=0)))
    engine.add_request(Request("top", prompts[3], SamplingParams(max_tokens=5, temperature=0)), top_logprobs=4)
    while engine.has_work:
        for event in engine.step():
            if event.request_id == "plain":
                assert event.top == ()
                continue
            assert [len(event.top), event.top[0][0]] == [4, event.token_id]
            assert event.top[0][1] == pytest.approx(event.logprob, abs=1e-5)
            assert [pair[1] for pair in event.top] == sorted((pair[1] for pair in event.top), reverse=True)
    with pytest.raises(RequestError, match="top_logprobs=21"):
        engine.add_request(Request("x", (5,), SamplingParams()), top_logprobs=21)


def test_cancel(make_engine: MakeEngine, prompts: Prompts) -> None:
    requests = sampled(prompts[3:6], group=2, max_tokens=30)
    expected = run(make_engine(eos_ids=()), requests)
    engine = make_engine(eos_ids=(), max_batch=4)
    for request in requests:
        engine.add_request(request)
    for _ in range(5):
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 2)
    running = engine.cancel("0.1")
    waiting = engine.cancel("2.0")
    assert running is not None
    assert waiting is not None
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert running.token_ids == expected["0.1"].token_ids[:5]
    assert waiting.token_ids == ()
    assert engine.cancel("0.1") is None
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert set(tokens) == {"0.0", "1.0", "1.1", "2.1"}
    assert tuple(tokens["2.1"]) == expected["2.1"].token_ids


def test_closing_the_iterator_cancels_the_rest(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(max_batch=4)
    requests = sampled(prompts, max_tokens=20)
    iterator = engine.complete(requests[:12])
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert not engine.has_work
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert run(engine, requests[-4:]) == run(make_engine(max_batch=4), requests[-4:])


def test_finished_sequences_leave_at_once(make_engine: MakeEngine, prompts: Prompts) -> None:
    engine = make_engine(eos_ids=(), max_batch=4)
    long = [Request(f"long{i}", prompts[i], SamplingParams(max_tokens=40, seed=i)) for i in range(3)]
    short = [Request(f"short{i}", prompts[i], SamplingParams(max_tokens=2, seed=i)) for i in range(12)]
    order = [done.request_id for done in engine.complete([*long, *short])]
    assert order[:12] == [f"short{i}" for i in range(12)], "short ones pass through the one free row"


class TestMemory:
    """A full cache makes requests wait or refuses them; it never cuts one short."""

    def test_a_request_that_can_never_fit_is_refused(self, make_engine: MakeEngine) -> None:
        engine = make_engine(max_cache_bytes=60_000)
        with pytest.raises(CapacityError, match="key-value cache"):
            engine.complete([Request("a", (5,) * 100, SamplingParams(max_tokens=100))])

    def test_requests_wait_for_room_and_all_finish(self, make_engine: MakeEngine, prompts: Prompts) -> None:
        limit = 200_000
        requests = sampled(prompts, group=2, max_tokens=25)
        engine = make_engine(max_batch=32, max_cache_bytes=limit)
        for request in requests:
            engine.add_request(request)
        tokens: dict[str, list[int]] = {}
        peak_running, peak_bytes = 0, 0
        while engine.has_work:
            for event in engine.step():
                tokens.setdefault(event.request_id, []).append(event.token_id)
            peak_running = max(peak_running, engine.num_running)
            peak_bytes = max(peak_bytes, engine.cache_bytes)
        assert 1 < peak_running < 32
        assert peak_bytes <= limit
        free = run(make_engine(max_batch=32), requests)
        assert {id: tuple(ids) for id, ids in tokens.items()} == {id: done.token_ids for id, done in free.items()}

    def test_an_idle_cache_gives_way_to_another_shape(self, make_engine: MakeEngine) -> None:
        engine = make_engine(eos_ids=(), max_cache_bytes=90_000)
        wide = [Request(str(i), (5 + i,), SamplingParams(max_tokens=5, seed=i)) for i in range(8)]
        deep = [Request("deep", (5,) * 60, SamplingParams(max_tokens=60, seed=1))]
        for requests in (wide, deep, wide):
            assert len(run(engine, requests)) == len(requests)
            assert engine.cache_bytes <= 90_000

    def test_an_ended_sequence_does_not_make_the_cache_grow(self, make_engine: MakeEngine) -> None:
        """One sequence ends at 32 tokens, where a row is full; the younger ones leave its row waiting for a while."""
        engine = make_engine(eos_ids=(), max_batch=64)
        engine.add_request(Request("old", (5,), SamplingParams(max_tokens=32, seed=0)))
        for _ in range(10):
            engine.step()
        for i in range(40):
            engine.add_request(Request(str(i), (5,), SamplingParams(max_tokens=60, seed=i)))
        while engine.num_running != 40:
            engine.step()
        before = engine.cache_bytes
        for _ in range(5):
            engine.step()
        assert engine.cache_bytes == before

    @pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_context": 129}, {"max_context": 1}])
    def test_impossible_sizes(self, make_engine: MakeEngine, options: dict[str, int]) -> None:
        with pytest.raises(CapacityError):
            make_engine(**options)


class TestWeights:
    def test_new_weights_take_effect_and_carry_their_version(self, prompts: Prompts) -> None:
        config_decoder = build_tiny_pair()
        old, new = config_decoder
        engine = Engine(old, eos_ids=(EOS,))
        requests = sampled(prompts[:3], max_tokens=10)
        before = run(engine, requests)
        engine.load_weights(new.state_dict().items(), version=7)
        after = run(engine, requests)
        fresh = run(Engine(new, eos_ids=(EOS,), policy_version=7), requests)
        assert after == fresh
        assert {done.policy_version for done in before.values()} == {0}
        assert {done.policy_version for done in after.values()} == {7}
        assert {i: done.token_ids for i, done in before.items()} != {i: done.token_ids for i, done in after.items()}

    @pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
    def test_nothing_is_half_loaded(self, damage: str) -> None:
        old, new = build_tiny_pair()
        kept = {name: tensor.clone() for name, tensor in old.state_dict().items()}
        weights = dict(new.state_dict())
        if damage == "unknown":
            weights["layers.9.weight"] = torch.zeros(1)
        elif damage == "missing":
            del weights["norm.weight"]
        else:
            weights["norm.weight"] = torch.zeros(3)
        engine = Engine(old, eos_ids=())
        with pytest.raises(CheckpointError, match=r"layers\.9\.weight" if damage == "unknown" else r"norm\.weight"):
            engine.load_weights(weights.items(), version=1)
        assert engine.policy_version == 0
        assert all(torch.equal(kept[name], tensor) for name, tensor in old.state_dict().items())

    def test_running_requests_forbid_new_weights(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.add_request(Request("a", (5,), SamplingParams(max_tokens=5)))
        with pytest.raises(RequestError, match="still running"):
            engine.load_weights([], version=1)

    def test_broken_weights_are_an_error_not_tokens(self) -> None:
        decoder, _ = build_tiny_pair()
        with torch.no_grad():
            decoder.norm.weight[0] = torch.nan
        with pytest.raises(SamplingError, match="nan"):
            list(Engine(decoder, eos_ids=()).complete([Request("a", (5, 6), SamplingParams(max_tokens=3))]))


def build_tiny_pair() -> tuple[Decoder, Decoder]:
    from tafkir.recipe.model import ModelConfig

    config = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, head_dim=8, intermediate_size=32,
        moe_intermediate_size=8, num_experts=4, n_group=2, topk_group=1, max_position_embeddings=128,
    )  # fmt: skip
    return build_decoder(config, 1), build_decoder(config, 2)


def test_bfloat16_runs_close_to_float32(shared_decoder: Decoder, prompts: Prompts) -> None:
    """The cache takes the weights' dtype, and the log-probabilities stay close to the training forward's."""
    import copy

    decoder = copy.deepcopy(shared_decoder).to(torch.bfloat16)
    for router in decoder.routers:
        router.expert_bias = router.expert_bias.float()
    requests = sampled(prompts[:4], group=2, max_tokens=10)
    done = run(Engine(decoder, eos_ids=()), requests)
    for request in requests:
        trained = training_logprobs(decoder, request.prompt_ids, done[request.id].token_ids, 1.0)
        assert float((torch.tensor(done[request.id].logprobs) - trained).abs().mean()) < 0.15


def test_a_full_row_that_ended_leaves_its_neighbour_alone(make_engine: MakeEngine) -> None:
    """The first row ends at exactly the buffer's length and stays until the next compaction; the others run on."""
    engine = make_engine(eos_ids=(), max_batch=40)
    limits = [32] + [10] * 39 + [30] * 39
    requests = [Request(str(i), (5, 6, 7), SamplingParams(seed=i, max_tokens=limit)) for i, limit in enumerate(limits)]
    done = run(engine, requests)
    scores = engine.score([[5, 6, 7, *done[request.id].token_ids] for request in requests])
    for request, limit, score in zip(requests, limits, scores, strict=True):
        answer = done[request.id]
        assert len(answer.token_ids) == limit
        torch.testing.assert_close(torch.tensor(answer.logprobs), score[2:], atol=1e-5, rtol=0)
