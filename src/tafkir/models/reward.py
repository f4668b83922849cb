"""A decoder that gives one number instead of a next token: the reward of a conversation.

Shapes: N tokens, S sequences, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.models.layers import Linear
from tafkir.recipe.model import ModelConfig

__all__ = ["RewardModel", "reward_model_from"]


class RewardModel(Decoder):
    """The decoder with a linear head of one output, `score`, read at a sequence's last token.

    It is what transformers calls `...ForSequenceClassification` with one label: no output head over the vocabulary,
    no multi-token-prediction layers. Weights are uninitialised, as a decoder's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.model_copy(update={"mtp": None}))
        self.lm_head = None
        self.score = Linear(config.hidden_size, 1)

    def rewards(self, out: DecoderOutput, last_S: Tensor) -> Tensor:
        """Rewards (S,), float32, from the hidden states at the last token of each sequence.

        Args:
            out: of this model's forward.
            last_S: index of each sequence's last token in the flat batch, int64.
        """
        score_S1: Tensor = self.score(out.hidden_ND.index_select(0, last_S))
        return score_S1.float().squeeze(-1)


@torch.no_grad()
def reward_model_from(decoder: Decoder, seed: int) -> RewardModel:
    """A reward model with a copy of a decoder's weights and a fresh head.

    The head is normal with variance 1 / (D + 1) (Stiennon et al. 2020, arXiv 2009.01325, appendix B.1), a pure
    function of the seed.
    """
    model = RewardModel(decoder.config)
    own = model.state_dict()
    for name, value in decoder.state_dict().items():
        if name in own:
            own[name].copy_(value)
    std = (decoder.config.hidden_size + 1) ** -0.5
    model.score.fresh_weights(std, torch.Generator().manual_seed(seed))
    return model
