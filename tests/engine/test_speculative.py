"""With drafts the engine says what it says without, token by token, whatever else a request asks for."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tafkir.checkpoint.packed import load_packed
from tafkir.checkpoint.save import save_checkpoint
from tafkir.engine.drafters import Drafter, ModelDrafter, NextnDrafter, NgramDrafter
from tafkir.engine.engine import Engine
from tafkir.engine.paged_engine import PagedEngine
from tafkir.engine.sequence import TokenEvent
from tafkir.engine.shaping import Shaper, Shaping
from tafkir.engine.speculative import Speculation
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.recipe.model import MtpConfig
from tafkir.records import Completion, Request, SamplingParams
from tests.engine.test_drafters import build, random_text

EOS = 3
MakeDrafter = Callable[[Decoder], Drafter]
DRAFTERS: dict[str, MakeDrafter] = {
    "ngram": lambda decoder: NgramDrafter(5, shortest=1),
    "nextn": NextnDrafter,
    "nextn, one layer": lambda decoder: NextnDrafter(build(MtpConfig(depth=1)), 4),
    "another model": lambda decoder: ModelDrafter(build(None, seed=9), 64, 3),
    "itself": lambda decoder: ModelDrafter(decoder, 64, 4),
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return build(MtpConfig(depth=3))


def make(decoder: Decoder, drafter: MakeDrafter | None = None, **options: Any) -> Engine:
    speculation = Speculation(drafter(decoder), adaptive=False) if drafter else None
    return Engine(decoder, **{"eos_ids": (EOS,), "max_batch": 6, "speculation": speculation, **options})


def requests(**params: Any) -> list[Request]:
    """Prompts of many lengths, some shared; answers that end at their limit, at the context's, or by a stop token."""
    found = []
    for i, length in enumerate((1, 7, 16, 33, 60, 118)):
        text = tuple(random_text(length, i, vocab=8) if length == 33 else random_text(length, i))
        for j in range(1 + i % 2):
            limit = {"max_tokens": 3 + 6 * ((i + j) % 4), "seed": 10 * i + j, "stop_token_ids": (i, 40 + i), **params}
            found.append(Request(f"{i}.{j}", text, SamplingParams(**limit), prefix_ids=text[:2] if i == 2 else ()))
    return found


def run(engine: Engine, wanted: Sequence[Request]) -> dict[str, Completion]:
    return {done.request_id: done for done in engine.complete(wanted)}


def assert_same(got: dict[str, Completion], expected: dict[str, Completion], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, plain in expected.items():
        assert got[name].token_ids == plain.token_ids, name
        assert got[name].finish_reason == plain.finish_reason, name
        assert got[name].logprobs == pytest.approx(plain.logprobs, abs=tolerance), name


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.3, "top_k": 40, "top_p": 0.95}])
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_same_tokens_and_logprobs(decoder: Decoder, name: str, params: dict[str, Any]) -> None:
    expected = run(make(decoder), requests(**params))
    engine = make(decoder, DRAFTERS[name])
    assert_same(run(engine, requests(**params)), expected)
    assert engine.speculation is not None
    seen = engine.speculation.acceptance
    assert seen.num_draft_tokens > 30, "there were drafts, and not all of them were right"
    # A text that ends within a draft leaves the rest of it unused.
    assert (seen.num_accepted_tokens > 0.9 * seen.num_draft_tokens) == (name == "itself")
    assert sum(seen.accepted_per_pos) == seen.num_accepted_tokens
    assert sum(seen.drafted_per_pos) == seen.num_draft_tokens


def test_a_draft_that_is_right_costs_a_step_for_five_tokens(decoder: Decoder) -> None:
    engine = make(decoder, DRAFTERS["itself"], eos_ids=())
    engine.add_request(Request("a", (5, 6), SamplingParams(temperature=0, max_tokens=41)))
    sizes = []
    while engine.has_work:
        sizes.append(len(engine.step()))
    assert sizes == [1, 5, 5, 5, 5, 5, 5, 5, 5]


class EvenTokens:
    """A grammar: even tokens alone, and after eight of them the end."""

    error: str | None = None

    def __init__(self) -> None:
        self.pushed: list[int] = []

    def allowed(self) -> bytes:
        return bytes([1 << EOS]) if len(self.pushed) == 8 else bytes([0b01010101] * 8)

    def push(self, token_id: int) -> None:
        assert token_id == EOS if len(self.pushed) == 8 else token_id % 2 == 0, "a token that the grammar forbids"
        self.pushed.append(token_id)


class Numerals:
    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(f"<{token}>" for token in ids)


def shaped(engine: Engine, temperature: float) -> tuple[dict[str, list[TokenEvent]], list[str]]:
    """Grammars, penalties, min-p, stop strings, alternatives, n and a cancelled request, all in one batch."""
    texts = [tuple(random_text(20, 50 + i, vocab=9)) for i in range(3)]
    events: dict[str, list[TokenEvent]] = {}
    for i, (text, n) in enumerate(itertools.product(texts, range(3))):
        stop = (f"<{10 + i}><", f"{i}><5") if n == 2 else ()
        params = SamplingParams(temperature=temperature, max_tokens=30, seed=i, stop=stop)
        wishes = Shaping(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2, min_p=0.02 * n)
        shaper = Shaper(wishes, text, temperature, EvenTokens() if n == 0 else None) if n < 2 else None
        events[f"{i}"] = []
        engine.add_request(Request(f"{i}", text, params), top_logprobs=2 * n, shaper=shaper)
    order = []
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
            if event.finish_reason:
                order.append(event.request_id)
        if len(events["7"]) >= 9 and "7" not in order:
            engine.cancel("7")
            order.append("7")
            events["7"] = events["7"][:9]
    return events, order


@pytest.mark.parametrize(("name", "temperature"), [("ngram", 1.0), ("nextn", 0.0), ("itself", 1.0)])
def test_with_grammars_penalties_stops_alternatives_and_siblings(
    decoder: Decoder, name: str, temperature: float
) -> None:
    expected, order = shaped(make(decoder, tokenizer=Numerals()), temperature)
    got, got_order = shaped(make(decoder, DRAFTERS[name], tokenizer=Numerals()), temperature)
    assert sorted(order) == sorted(got_order) == sorted(expected)
    for request_id, events in expected.items():
        found = got[request_id]
        assert [event.token_id for event in found] == [event.token_id for event in events], request_id
        assert [event.finish_reason for event in found] == [event.finish_reason for event in events]
        for one, other in zip(found, events, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert {events[-1].finish_reason for name, events in expected.items() if name != "7"} >= {"stop", "length"}


def every_wish(temperature: float) -> list[tuple[Request, Shaper | None]]:
    """Grammar or none, no stop or a string or a token, one answer or two: all of it with all of it."""
    found = []
    stops: list[dict[str, Any]] = [{}, {"stop": ("<7><", "2><5", "><9>")}, {"stop_token_ids": (10, 11, 25)}]
    for i, (grammar, stop, n) in enumerate(itertools.product((False, True), stops, (1, 2))):
        text = tuple(random_text(20 + 3 * i, 70 + i, vocab=12))
        for j in range(n):
            params = SamplingParams(temperature=temperature, max_tokens=10 + i // 2, seed=10 * i + j, **stop)
            wishes = Shaping(repetition_penalty=1.1) if grammar or j == 1 else None
            shaper = Shaper(wishes, text, temperature, EvenTokens() if grammar else None) if wishes else None
            found.append((Request(f"{i}.{j}", text, params), shaper))
    return found


def answers(engine: Engine, temperature: float) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for request, shaper in every_wish(temperature):
        events[request.id] = []
        engine.add_request(request, shaper=shaper)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


@pytest.mark.parametrize(("temperature", "name"), list(zip(itertools.cycle((1.0, 0.0)), [*DRAFTERS, "nextn, packed"])))
def test_drafts_with_grammars_stops_siblings_and_known_beginnings(
    decoder: Decoder, tmp_path: Path, name: str, temperature: float
) -> None:
    """Where peers break: each drafter with every mixture of wishes, first over an empty cache, then over a full one."""
    model = decoder
    if name == "nextn, packed":
        save_checkpoint(tmp_path / "m", decoder, dtype=torch.bfloat16)
        model = load_packed(tmp_path / "m").decoder
    expected = answers(make(model, tokenizer=Numerals()), temperature)
    speculation = Speculation(DRAFTERS[name.removesuffix(", packed")](model), adaptive=False)
    engine = PagedEngine(model, eos_ids=(EOS,), max_batch=8, tokenizer=Numerals(), speculation=speculation)
    for _ in range(2):
        for request_id, events in answers(engine, temperature).items():
            plain = expected[request_id]
            assert [event.token_id for event in events] == [event.token_id for event in plain], request_id
            assert events[-1].finish_reason == plain[-1].finish_reason
            assert [e.logprob for e in events] == pytest.approx([e.logprob for e in plain], abs=1e-5)
    assert {events[-1].finish_reason for events in expected.values()} == {"stop", "length"}
    assert engine.prefix_hits > 100 and engine.cache_usage == 0
    assert speculation.acceptance.num_draft_tokens > 100


def test_sampled_texts_follow_the_model() -> None:
    """Chi-square of texts of three tokens against the model's own probabilities, by full forwards."""
    prompt, count, temperature = (5, 9, 9, 5, 9), 1500, 3.0
    small = build(MtpConfig(depth=3), vocab=16)

    def probabilities(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            hidden = small(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)])).hidden_ND
            logits = small.logits(hidden[-1:])[0].double() / temperature
            return torch.where(logits >= logits.sort().values[-4], logits, -torch.inf).softmax(-1)

    engine = make(small, NextnDrafter, max_batch=256, eos_ids=())
    wanted = [
        Request(str(i), prompt, SamplingParams(temperature=temperature, top_k=4, max_tokens=3, seed=i))
        for i in range(count)
    ]
    texts = Counter(done.token_ids for done in engine.complete(wanted))
    assert engine.speculation is not None
    assert 0 < engine.speculation.acceptance.num_accepted_tokens < engine.speculation.acceptance.num_draft_tokens
    expected: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(probabilities(prompt).tolist()):
        for second, q in enumerate(probabilities([*prompt, first]).tolist()):
            for third, r in enumerate(probabilities([*prompt, first, second]).tolist() if p * q else []):
                expected[first, second, third] = p * q * r
    large = {text: p * count for text, p in expected.items() if p * count >= 5}
    rest = count - sum(large.values())
    observed = sum(texts[text] for text in large)
    assert observed > count - 2 * rest - 20
    chi2 = sum((texts[text] - mean) ** 2 / mean for text, mean in large.items()) + (count - observed - rest) ** 2 / (
        rest or 1
    )
    degrees = len(large)
    assert degrees > 20
    # Five standard deviations of the chi-square distribution above its mean.
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("options", [{"latent": True}, {"kv_cache": "fp8"}, {"record_experts": True}])
def test_every_cache_and_the_experts(decoder: Decoder, latent_decoder: Decoder, options: dict[str, Any]) -> None:
    options = dict(options)
    model = latent_decoder if options.pop("latent", False) else decoder
    wanted = [
        Request(r.id, tuple(token % 61 for token in r.prompt_ids[-60:]), r.params, tuple(t % 61 for t in r.prefix_ids))
        for r in requests(temperature=0)
    ]
    expected = run(make(model, **options), wanted)
    drafter: MakeDrafter = lambda decoder: NgramDrafter(4, shortest=1)  # noqa: E731
    if options.get("kv_cache"):
        # One code may round the other way, for several tokens share a product: what is said is close, not equal.
        got = run(make(model, drafter, **options), wanted)
        equal = [got[name].token_ids == done.token_ids for name, done in expected.items()]
        assert sum(equal) >= len(equal) - 2
        return
    got = run(make(model, drafter, **options), wanted)
    assert_same(got, expected)
    if options.get("record_experts"):
        for name, done in expected.items():
            assert torch.equal(got[name].expert_ids, done.expert_ids)


def test_it_stops_drafting_where_that_costs_more(decoder: Decoder) -> None:
    """By a clock that goes on with every look at it and eleven ticks with every draft."""
    expected = run(make(decoder), requests(temperature=0))
    now = itertools.count()

    class Slow(NgramDrafter):
        def draft(self, rows: Any, most: int) -> list[list[int]]:
            for _ in range(10):
                next(now)
            return super().draft(rows, most)

    speculation = Speculation(Slow(5), clock=lambda: float(next(now)))
    engine = Engine(decoder, eos_ids=(EOS,), max_batch=6, speculation=speculation)
    for _ in range(4):
        assert_same(run(engine, requests(temperature=0)), expected)
    assert speculation.meter is not None
    gain = speculation.meter.gain(1)
    assert gain is not None and gain < 1
    before = speculation.acceptance.num_drafts
    run(engine, [Request("a", (5,), SamplingParams(temperature=0, max_tokens=100))])
    assert speculation.acceptance.num_drafts == before, "off"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_to_the_bit_where_every_row_is_computed_alone(decoder: Decoder, temperature: float) -> None:
    """In bfloat16, where several tokens at a time otherwise round another way."""
    model, wanted = copy.deepcopy(decoder).bfloat16(), requests(temperature=temperature)
    options: dict[str, Any] = {"eos_ids": (EOS,), "max_batch": 6, "batch_invariant": True}
    plain = run(PagedEngine(model, **options), wanted)
    drafted = run(
        PagedEngine(model, **options, speculation=Speculation(DRAFTERS["itself"](model), adaptive=False)), wanted
    )
    for name, done in plain.items():
        assert (drafted[name].token_ids, drafted[name].logprobs) == (done.token_ids, done.logprobs)


@pytest.mark.slow
def test_with_known_beginnings_chunks_and_too_few_blocks(decoder: Decoder) -> None:
    """Twice the same requests: the second time their prompts are in the cache, and layers that draft never saw them."""
    wanted = requests(temperature=0.8, max_tokens=40, stop_token_ids=())
    expected = run(make(decoder, eos_ids=()), wanted)
    engine = PagedEngine(
        decoder,
        eos_ids=(),
        max_batch=6,
        speculation=Speculation(NextnDrafter(decoder), adaptive=False),
        max_cache_bytes=12 * 16 * decoder.config.kv_bytes_per_token(4),
        chunk_tokens=24,
        max_prefill_tokens=40,
    )
    for _ in range(2):
        assert_same(run(engine, wanted), expected)
    assert engine.speculation is not None and engine.speculation.acceptance.num_draft_tokens > 30
    assert engine.prefix_hits > 100 and engine.num_preemptions > 0
    assert engine.cache_usage == 0, "every block is returned"
