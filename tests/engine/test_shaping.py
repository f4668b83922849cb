"""Wishes of several requests at once, against arithmetic written out for each token."""

from __future__ import annotations

import torch

from tafkir.engine.shaping import Shaper, Shaping, Thinking, shape_rows


def test_rows_are_shaped_as_each_alone() -> None:
    logits_RV = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    wishes = [
        Shaping(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5),
        Shaping(thinking=Thinking(7, 8, max_tokens=1)),
        Shaping(frequency_penalty=-1.0, logit_bias={3: 2.0}),
        Shaping(repetition_penalty=0.5, min_tokens=None, end_ids=(5,)),
    ]
    prompts, drawn = [(1, 2, 2), (), (9,), (4,)], [2, 11, 11, 2]
    shapers = [
        Shaper(wish, prompt, 1.0, think_first=wish.thinking is not None)
        for wish, prompt in zip(wishes, prompts, strict=True)
    ]
    for shaper in shapers:
        for token in drawn:
            shaper.push(token)
    found = shape_rows(shapers, logits_RV)
    for row, (wish, prompt) in enumerate(zip(wishes, prompts, strict=True)):
        for token in range(40):
            value = float(logits_RV[row, token])
            if token in (*prompt, *drawn):
                value = value / wish.repetition_penalty if value > 0 else value * wish.repetition_penalty
            count = drawn.count(token)
            value -= (count > 0) * wish.presence_penalty + wish.frequency_penalty * count
            value += wish.logit_bias.get(token, 0.0)
            if (row == 3 and token == 5) or (shapers[row]._forced and token != shapers[row]._forced[0]):
                value = -torch.inf
            torch.testing.assert_close(float(found[row, token]), value, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, torch.stack([s.shape(x) for s, x in zip(shapers, logits_RV, strict=True)]))
