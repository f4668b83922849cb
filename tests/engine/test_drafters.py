"""Drafters against slow references: a search of the text, the MTP layers over whole texts, the draft model alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import pytest
import torch

from tafkir.checkpoint.packed import load_packed
from tafkir.checkpoint.save import save_checkpoint
from tafkir.engine.drafters import ModelDrafter, NextnDrafter, NgramDrafter, Row
from tafkir.engine.sequence import Sequence
from tafkir.engine.speculative import Acceptance, GainMeter, parse_speculate
from tafkir.errors import CapacityError, RecipeError
from tafkir.models.attention import VarlenCausal
from tafkir.models.build import build_decoder
from tafkir.models.decoder import Decoder
from tafkir.models.mtp import shift_documents
from tafkir.ops import native
from tafkir.ops.rope import rope_table
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.records import Request, SamplingParams

VOCAB = 64


@functools.cache
def build(mtp: MtpConfig | None, seed: int = 0, vocab: int = VOCAB) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts=8,
        max_position_embeddings=128,
        mtp=mtp,
    )
    decoder = build_decoder(config, seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return decoder


@pytest.fixture
def native_kernels(native_library: object) -> Iterator[None]:
    before = native.kernels_in_use()
    native.select_kernels("native")
    yield
    native.select_kernels(before)


def row(text: SequenceOf[int], tokens: SequenceOf[int], temperature: float = 0.0) -> Row:
    request = Request("r", tuple(text), SamplingParams(temperature=temperature))
    return Row(Sequence(request, key=7, limit=100, stop_ids=()), list(tokens))


def random_text(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_acceptance_is_counted_by_position() -> None:
    seen = Acceptance()
    for count, accepted in ((3, 2), (3, 0), (1, 1), (0, 0)):
        seen.note(count, accepted)
    assert (seen.num_drafts, seen.num_draft_tokens, seen.num_accepted_tokens) == (3, 7, 3)
    assert (seen.drafted_per_pos, seen.accepted_per_pos) == ([3, 2, 2], [2, 1, 0])


def test_ngrams_equal_a_search_of_the_text() -> None:
    drafter, text = NgramDrafter(5), random_text(400, 0, vocab=5)
    asked = row(text[:20], text[20:21])
    found = 0
    for end in range(21, 400):
        # Not asked at every length: what came in between is read all the same.
        if end % 3:
            known = text[:end]
            expected: list[int] = []
            for size in (4, 3, 2):
                at = next((i for i in range(end - size - 1, -1, -1) if known[i : i + size] == known[-size:]), None)
                if at is not None:
                    expected = [known[at + size + i % (end - at - size)] for i in range(5)]
                    break
            assert drafter.draft([Row(asked.seq, text[20:end])], 8) == [expected]
            found += bool(expected)
    assert found > 100
    assert drafter.draft([row([1, 2], [3])], 5) == [[]]


def states_of(decoder: Decoder, ids: list[int], name: str | None) -> torch.Tensor:
    output = decoder(torch.tensor(ids), torch.arange(len(ids)), VarlenCausal([0, len(ids)]))
    found: torch.Tensor = getattr(output, name or "hidden_ND")
    return found


def chain_reference(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """Every depth over the whole sequence, by the code that trains it."""
    assert decoder.mtp is not None
    drafts: list[int] = []
    for depth in range(count):
        # One more token stands for the label, which nothing reads.
        known = torch.tensor([*ids, *drafts, 0])
        output = decoder(known, torch.arange(len(known)), VarlenCausal([0, len(known)]))
        batches = shift_documents(known, torch.arange(len(known)), known, [0, len(known)], depth + 1)
        found = list(decoder.mtp(output.hidden_ND, output.pre_norm_ND, decoder.embed_tokens, batches))[depth]
        drafts.append(int(decoder.logits(found.hidden_MD[-1:]).argmax()))
    return drafts


def reused_reference(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """One layer over a sequence that grows by its own states and drafts."""
    assert decoder.mtp is not None
    states = states_of(decoder, ids[:-1], "hidden_ND")
    drafts: list[int] = []
    for _ in range(count):
        config, size = decoder.config, len(states)
        cos, sin = rope_table(torch.arange(size), config.rotary_size, config.rope_theta, config.rope_scaling)
        embedded = decoder.embed_tokens(torch.tensor([*ids, *drafts][1:]))
        out = decoder.mtp.layers[0](states, embedded, cos, sin, VarlenCausal([0, size]))
        drafts.append(int(decoder.logits(out.hidden_MD[-1:]).argmax()))
        states = torch.cat((states, out.hidden_MD[-1:]))
    return drafts


@pytest.mark.parametrize(
    ("mtp", "count", "reference"),
    [
        (MtpConfig(depth=3), 3, chain_reference),
        (MtpConfig(depth=3, chain_hidden=False, input_state="pre_norm"), 3, chain_reference),
        (MtpConfig(depth=1), 4, reused_reference),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_nextn_equals_the_layers_over_the_whole_sequence(
    mtp: MtpConfig, count: int, reference: object, packed: bool, tmp_path: Path, native_kernels: None
) -> None:
    """Two sequences of different age, one to four tokens accepted at a time; what was guessed leaves no trace. Packed
    layers draft in one call of a kernel."""
    decoder = build(mtp)
    if packed:
        save_checkpoint(tmp_path / "m", decoder, dtype=torch.float32)
        decoder = load_packed(tmp_path / "m").decoder
    drafter = NextnDrafter(decoder, count)
    assert (drafter._chain is not None) == packed
    texts = [random_text(40, 1), random_text(50, 2)]
    ends = [9, 1]
    seqs = [row(text[:end], []).seq for text, end in zip(texts, ends, strict=True)]
    prompts, told = list(ends), [0, 0]
    steps = 0
    for advance in ((1, 1), (1, 4), (3, 1), (2, 2), (4, 1), (1, 3)):
        ends = [end + more for end, more in zip(ends, advance, strict=True)]
        for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
            states = states_of(decoder, text[: end - 1], drafter.state)
            drafter.observe(seqs[i], told[i], states[told[i] :])
            told[i] = end - 1
        rows = [Row(seq, text[p:end]) for seq, text, p, end in zip(seqs, texts, prompts, ends, strict=True)]
        drafts = drafter.draft(rows, 8)
        for text, end, draft in zip(texts, ends, drafts, strict=True):
            assert draft == reference(decoder, text[:end], count)  # type: ignore[operator]
            steps += 1
    assert steps == 12
    drafter.drop(seqs[0])
    assert drafter.draft([Row(seqs[0], [1])], 4) == [[]]


@torch.inference_mode()
def test_a_chain_draws_by_the_requests_own_numbers(tmp_path: Path, native_kernels: None) -> None:
    """In the kernel as in torch: temperature, top-k and top-p."""
    save_checkpoint(tmp_path / "m", build(MtpConfig(depth=3)), dtype=torch.float32)
    decoder = load_packed(tmp_path / "m").decoder
    drafts: list[list[list[int]]] = []
    for native_chain in (True, False):
        drafter = NextnDrafter(decoder, 4)
        assert drafter._chain is not None
        drafter._chain = drafter._chain if native_chain else None
        drafts.append([])
        for seed in range(12):
            text = random_text(12, seed)
            params = SamplingParams(temperature=1.5, top_k=(0, 5)[seed % 2], top_p=(1.0, 0.7)[seed // 2 % 2])
            seq = Sequence(Request("r", tuple(text[:10]), params), key=7 * seed - 30, limit=100, stop_ids=())
            drafter.observe(seq, 0, states_of(decoder, text[:11], drafter.state))
            drafts[-1] += drafter.draft([Row(seq, text[10:])], 4)
    assert drafts[0] == drafts[1]
    assert len({tuple(draft) for draft in drafts[0]}) == 12


@torch.inference_mode()
def test_nextn_goes_on_after_steps_that_it_did_not_see() -> None:
    decoder, text = build(MtpConfig(depth=3)), random_text(40, 3)
    drafter, seq = NextnDrafter(decoder), row(text[:10], []).seq
    states = states_of(decoder, text, drafter.state)
    drafter.observe(seq, 0, states[:10])
    assert len(drafter.draft([Row(seq, text[10:11])], 3)[0]) == 3
    assert drafter.draft([Row(seq, text[10:20])], 3) == [[]], "the newest token's state is not known"
    drafter.observe(seq, 19, states[19:20])
    assert len(drafter.draft([Row(seq, text[10:21])], 3)[0]) == 3


@torch.inference_mode()
def test_a_draft_model_says_what_it_says_alone() -> None:
    decoder = build(None, seed=5)
    drafter = ModelDrafter(decoder, VOCAB, 4)
    drafter._CHUNK = 16  # type: ignore[misc]
    texts, prompts = [random_text(60, 4), random_text(50, 5)], [40, 3]
    seqs = [row(text[:p], []).seq for text, p in zip(texts, prompts, strict=True)]
    for more in (1, 2, 6):
        rows = [Row(s, t[p : p + more]) for s, t, p in zip(seqs, texts, prompts, strict=True)]
        for known, draft in zip((r.ids for r in rows), drafter.draft(rows, 4), strict=True):
            for token in draft:
                assert token == int(decoder.logits(states_of(decoder, known, None)[-1:]).argmax())
                known.append(token)
            assert len(draft) == 4
    assert drafter.draft([row(random_text(126, 6), [1])], 4) == [[]], "its context is full"
    with pytest.raises(CapacityError, match="the draft model has 64 tokens"):
        ModelDrafter(decoder, 65)


def test_the_meter_follows_what_it_measures() -> None:
    def run(meter: GainMeter, steps: int, speculative_s: float, tokens: int) -> list[bool]:
        chosen = []
        for _ in range(steps):
            chosen.append(meter.choose(2))
            seconds, got = (speculative_s, tokens) if chosen[-1] else (1.0, 2)
            meter.note(2, chosen[-1], got, seconds)
        return chosen

    meter = GainMeter(window=4, patience=20)
    first = run(meter, 100, 2.0, 3)
    assert first[:8] == [False] * 4 + [True] * 4
    assert meter.gain(2) == pytest.approx(0.75)
    assert sum(first[8:]) == pytest.approx(92 * 4 / 24, abs=4), "off but for the trials"
    assert meter.gain(64) is None, "another size of batch is another question"
    later = run(meter, 100, 2.0, 6)
    assert meter.gain(2) == pytest.approx(1.5)
    assert sum(later[30:]) > 50, "on but for the trials"
    assert sum(run(meter, 100, 2.0, 2)[30:]) < 20, "off again"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("ngram", ("ngram", None)), ("nextn:3", ("nextn", 3)), ("./a/b:2", ("./a/b", 2)), ("a:b", ("a:b", None))],
)
def test_the_option(text: str, meaning: tuple[str, int | None]) -> None:
    assert parse_speculate(text) == meaning


@pytest.mark.parametrize("text", ["", ":3", "ngram:0", "nextn:17"])
def test_the_option_says_what_it_takes(text: str) -> None:
    with pytest.raises(RecipeError, match="expected ngram, nextn or a checkpoint"):
        parse_speculate(text)
