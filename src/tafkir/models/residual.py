"""The residual stream as a module: what a sublayer reads from it, and how its output is written back.

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tafkir.recipe.model import ModelConfig

__all__ = ["PlainResidual", "ResidualStream", "build_residual"]


class ResidualStream(nn.Module):
    """The residual around one sublayer, and the way in and out of the stream.

    A decoder has one for its ends (`enter`, `exit`) and each sublayer has its own (`read`, `write`), so a block is
    `u, ctx = residual.read(state); state = residual.write(state, ctx, f(u))` and knows nothing of the state's shape.
    """

    def enter(self, x_ND: Tensor) -> Tensor:
        """The state that stands for fresh embeddings."""
        raise NotImplementedError

    def read(self, state: Tensor) -> tuple[Tensor, Any]:
        """The sublayer's input [N, D], and what `write` needs to know of this reading."""
        raise NotImplementedError

    def write(self, state: Tensor, ctx: Any, y_ND: Tensor) -> Tensor:
        """The state after a sublayer with output y."""
        raise NotImplementedError

    def exit(self, state: Tensor) -> Tensor:
        """The hidden states [N, D] that the final norm takes."""
        raise NotImplementedError


class PlainResidual(ResidualStream):
    """x + f(x); the state is x itself and there is nothing to learn."""

    def enter(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def read(self, state: Tensor) -> tuple[Tensor, None]:
        return state, None

    def write(self, state: Tensor, ctx: None, y_ND: Tensor) -> Tensor:
        return state + y_ND

    def exit(self, state: Tensor) -> Tensor:
        return state


def build_residual(config: ModelConfig) -> ResidualStream:
    """The residual of one sublayer (or of the decoder's ends), its parameters uninitialised."""
    return {"plain": PlainResidual}[config.residual.kind]()
