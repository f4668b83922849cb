"""What one answer costs in FLOPs, from shapes alone: by its tokens, or by its supervision steps.

Multiplications and additions of matrix products and of attention are counted, as torch's FlopCounterMode counts them;
norms, activations and lookups are not.
"""

from __future__ import annotations

from tafkir.plan.params import decode_flops, prefill_flops
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.trm import TrmShape

__all__ = ["completion_flops", "recursion_flops"]


def completion_flops(config: ModelConfig, prompt_tokens: int, new_tokens: int) -> float:
    """FLOPs of one completion: the prompt at once, its last position through the head, then one pass a token.

    The last of the new tokens is sampled and not fed. What is routed to experts counts for the active ones.

    Args:
        config: the model's shape.
        prompt_tokens: at least 1.
        new_tokens: tokens that were sampled, the stop token among them.
    """
    if new_tokens == 0:
        return 0.0
    head = 2.0 * config.vocab_size * config.hidden_size
    flops = prompt_tokens * prefill_flops(config, prompt_tokens) + head
    # A pass over position t sees t tokens, its own among them: an arithmetic series from P + 1 on.
    first, last = (decode_flops(config, prompt_tokens + place) for place in (1, max(1, new_tokens - 1)))
    return flops + (new_tokens - 1) * (first + last) / 2


def recursion_flops(shape: TrmShape, supervision_steps: float) -> float:
    """FLOPs of a puzzle that a recursive model thinks about for so many supervision steps, both heads included.

    Args:
        shape: the network and its recursion.
        supervision_steps: may be a mean.
    """
    heads = 2.0 * shape.hidden_size * (shape.sequence_length * shape.vocab_size + 2)
    return supervision_steps * (shape.flops_per_supervision_step() + heads)
