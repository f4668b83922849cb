"""Several given tokens of each sequence in one step, and counting back: what speculative decoding stands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tafkir.engine.batch import Column
from tafkir.engine.engine import Engine
from tafkir.models.decoder import Decoder
from tafkir.records import Request, SamplingParams


@pytest.mark.parametrize("options", [{}, {"latent": True}, {"kv_cache": "fp8"}])
@torch.inference_mode()
def test_fed_tokens_have_the_logits_of_as_many_steps(
    shared_decoder: Decoder, latent_decoder: Decoder, prompts: list[tuple[int, ...]], options: dict[str, Any]
) -> None:
    """Rows of different age and shared prompts; half of what was fed is taken back, and the rest decodes on."""
    latent = options.pop("latent", False)
    engine = Engine(latent_decoder if latent else shared_decoder, eos_ids=(), **options)
    for i, which in enumerate((3, 3, 5, 1)):
        engine.add_request(
            Request(str(i), tuple(min(token, 60) for token in prompts[which]), SamplingParams(max_tokens=60, seed=i))
        )
        engine.step()
    engine.step()
    batch, runner = engine._batch, engine._runner
    count_B, token_B = batch.column(Column.COUNT).clone(), batch.column(Column.TOKEN).clone()
    engine._cache.reserve(4, batch.longest + 4)
    grouping = engine._group()
    expected, fed = [], [token_B]
    for _ in range(4):
        expected.append(runner.decode(batch, grouping))
        batch.record(0, expected[-1])
        fed.append(batch.column(Column.TOKEN).clone())
    batch.truncate(count_B)
    assert torch.equal(batch.column(Column.TOKEN), token_B)
    got_NV = engine.decoder.logits(runner.feed(batch, grouping, torch.stack(fed[:4], dim=1)).hidden_ND)
    # One FP8 code may round the other way; nothing else differs by more than float order.
    atol = 2e-2 if options else 1e-4
    torch.testing.assert_close(got_NV.view(4, 4, -1), torch.stack(expected, dim=1), atol=atol, rtol=1e-4)
    for logits in got_NV.view(4, 4, -1).unbind(1)[:2]:
        batch.record(0, logits)
    batch.truncate(count_B + 2)
    assert torch.equal(batch.column(Column.TOKEN), fed[2])
    torch.testing.assert_close(runner.decode(batch, grouping), expected[2], atol=atol, rtol=1e-4)
