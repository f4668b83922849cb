"""The routers' own losses beside the next-token loss, over all micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tafkir.data.packing import PackedBatch
from tafkir.errors import RecipeError
from tafkir.models.decoder import Decoder, DecoderOutput
from tafkir.ops.router_losses import router_z_loss, sequence_balance_loss
from tafkir.recipe.schema import LanguageTable, TrainTable
from tafkir.runlog.metrics import Metric

__all__ = ["RouterLosses"]


class RouterLosses:
    """What one optimiser step adds for its routers, and what it logs of it.

    The losses are summed over the MoE layers; per layer, balance is the mean over the step's documents, z the mean
    over its tokens, so that neither depends on the micro-batches.
    """

    def __init__(self, config: LanguageTable, pieces: Sequence[PackedBatch], add: Callable[[float], float]) -> None:
        self.config, self.add = config, add
        self.num_sequences = add(sum(len(piece.cu_seqlens) - 1 for piece in pieces))
        self.num_tokens = add(sum(piece.input_ids_N.numel() for piece in pieces))
        self.balance = self.z = 0.0

    @classmethod
    def of_step(
        cls,
        decoder: Decoder,
        config: TrainTable,
        pieces: Sequence[PackedBatch],
        add: Callable[[float], float] = float,
    ) -> RouterLosses | None:
        """The losses that the recipe asks for, or None where both are off.

        Args:
            pieces: this process's micro-batches.
            add: sums a number over all processes.

        Raises:
            RecipeError: they are asked for, but the model has no router.
        """
        if not isinstance(config, LanguageTable) or not (config.sequence_balance_coef or config.router_z_coef):
            return None
        if not decoder.routers:
            raise RecipeError(
                "the model has no routers",
                where="sequence_balance_coef, router_z_coef",
                fix="set both to 0, or give the model experts",
            )
        return cls(config, pieces, add)

    def of_piece(self, piece: PackedBatch, out: DecoderOutput) -> Tensor:
        """What a micro-batch adds to the step's loss, a scalar with a gradient for the routers and all before them."""
        total = out.hidden_ND.new_zeros(())
        for routing in out.routings:
            if self.config.sequence_balance_coef:
                top_k = routing.expert_ids_NA.shape[1]
                balance = sequence_balance_loss(routing.scores_NE, top_k, piece.cu_seqlens) / self.num_sequences
                self.balance += balance.item() / len(out.routings)
                total = total + self.config.sequence_balance_coef * balance
            if self.config.router_z_coef:
                z = router_z_loss(routing.logits_NE) / self.num_tokens
                self.z += z.item() / len(out.routings)
                total = total + self.config.router_z_coef * z
        return total

    def metrics(self) -> dict[str, Metric]:
        """The losses that are on, without their weights, as means over the layers; balance is 1 at its best."""
        named = {
            "router/balance_loss": (self.config.sequence_balance_coef, self.balance),
            "router/z_loss": (self.config.router_z_coef, self.z),
        }
        return {name: self.add(value) for name, (coef, value) in named.items() if coef}
