"""The tiny recursive model (TRM, arXiv 2510.04871): one small network that corrects an answer y and a latent z.

How its names relate to the paper's and to the reference's stands in `tafkir.recipe.trm`. As options it also is HRM
(arXiv 2506.21734): two networks, one-step gradients, one prefix position.

Shapes: B batch, L cells of a grid, S positions (prefix and cells), D hidden, V symbols, E numbers of a puzzle vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tafkir.errors import DataError
from tafkir.models.layers import Embedding, Linear
from tafkir.models.trm_blocks import PuzzleTable, SolverNetwork, truncated_normal_
from tafkir.ops.rope import rope_table
from tafkir.ops.split_heads import Angles
from tafkir.recipe.trm import TrmShape

__all__ = ["Trm", "TrmOutput", "TrmState", "build_trm"]

_FIRST_Q_BIAS = -5.0


class TrmState(NamedTuple):
    """What goes from one supervision step to the next, both [B, S, D]; with a single latent both are the same."""

    y: Tensor
    z: Tensor


class TrmOutput(NamedTuple):
    """One supervision step.

    Attributes:
        state: detached.
        logits: [B, L, V], in the dtype of the passes.
        q_halt: [B] float32; above 0 where the answer is taken to be right.
        q_continue: [B] float32; trained by HRM alone.
    """

    state: TrmState
    logits: Tensor
    q_halt: Tensor
    q_continue: Tensor


class _Passes(NamedTuple):
    """One pass of the network that updates z, and of the one that updates y; mostly the same one."""

    of_z: Callable[[Tensor], Tensor]
    of_y: Callable[[Tensor], Tensor]


class Trm(nn.Module):
    """Solves grids of one size; its weights are left uninitialised, see `build_trm`.

    Args:
        shape: network, recursion and sizes.
    """

    y_init: Tensor
    z_init: Tensor

    def __init__(self, shape: TrmShape) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = torch.float32
        self.recompute = False
        d = shape.hidden_size
        self.embed_tokens = Embedding(shape.vocab_size, d)
        self.embed_positions = Embedding(shape.num_positions, d) if shape.position_encoding == "learned" else None
        table = PuzzleTable(shape.num_puzzle_ids, shape.puzzle_embedding_size)
        self.puzzle_table = table if shape.puzzle_embedding_size else None
        self.network = SolverNetwork(shape)
        self.answer_network = SolverNetwork(shape) if shape.separate_networks else None
        self.lm_head = Linear(d, shape.vocab_size)
        self.q_head = Linear(d, 2, bias=True)
        # Fixed, not trained, and the same at every position.
        self.register_buffer("y_init", torch.empty(d))
        self.register_buffer("z_init", torch.empty(d))

    @property
    def takes_any_grid(self) -> bool:
        """Whether no weight knows how large the grid is; see `resized`."""
        return self.shape.mixer == "neighbours" and self.embed_positions is None

    def resized(self, rows: int, columns: int) -> Trm:
        """A network of the same weights, which it shares, for grids of other sides.

        Raises:
            DataError: a weight is tied to one size.
        """
        if not self.takes_any_grid:
            expected = 'mixer = "neighbours" without learned positions'
            raise DataError("this network is made for grids of one size", expected=expected)
        other = Trm(self.shape.model_copy(update={"sequence_length": rows * columns, "grid_columns": columns}))
        other.load_state_dict(self.state_dict(), assign=True)
        return other.train(self.training)

    def start(self, batch_size: int, num_cells: int | None = None) -> TrmState:
        """The state before the first supervision step."""
        positions = self.shape.prefix_length + (num_cells or self.shape.sequence_length)
        size = (batch_size, positions, self.shape.hidden_size)
        return TrmState(*(init.to(self.dtype).expand(size) for init in (self.y_init, self.z_init)))

    def embed(self, inputs_BL: Tensor, puzzle_ids_B: Tensor | None = None) -> Tensor:
        """The question x [B, S, D]: prefix and symbols, times sqrt(D).

        Raises:
            DataError: the network is made for another number of cells.
        """
        self._check_length(inputs_BL.shape[1])
        shape = self.shape
        x_BSD = self.embed_tokens.weight.to(self.dtype)[inputs_BL]
        if shape.prefix_length:
            x_BSD = torch.cat((self._prefix(inputs_BL, puzzle_ids_B), x_BSD), dim=1)
        if self.embed_positions is not None:
            x_BSD = math.sqrt(0.5) * (x_BSD + self.embed_positions.weight.to(self.dtype))
        return math.sqrt(shape.hidden_size) * x_BSD

    def _prefix(self, inputs_BL: Tensor, puzzle_ids_B: Tensor | None) -> Tensor:
        """The puzzle's vector, filled up with zeros."""
        shape, batch = self.shape, inputs_BL.shape[0]
        numbers = shape.prefix_length * shape.hidden_size
        if self.puzzle_table is None:
            return self.y_init.new_zeros(batch, shape.prefix_length, shape.hidden_size, dtype=self.dtype)
        if puzzle_ids_B is None:
            puzzle_ids_B = inputs_BL.new_zeros(batch)
        vectors_BE = self.puzzle_table(puzzle_ids_B).to(self.dtype)
        return F.pad(vectors_BE, (0, numbers - vectors_BE.shape[1])).view(batch, shape.prefix_length, -1)

    def _check_length(self, num_cells: int) -> None:
        if num_cells == self.shape.sequence_length:
            return
        if self.shape.mixer != "attention" or self.embed_positions is not None:
            bound = "learned positions" if self.shape.mixer == "attention" else f"{self.shape.mixer} mixer"
            raise DataError(
                f"the grid has {num_cells} cells",
                expected=f"{self.shape.sequence_length}: the {bound} of this network is tied to one length",
                fix='give puzzles of that size, or train a network with mixer = "attention" and RoPE',
            )

    def forward(
        self,
        state: TrmState,
        inputs_BL: Tensor,
        puzzle_ids_B: Tensor | None = None,
        *,
        depth: tuple[int, int] | None = None,
    ) -> TrmOutput:
        """One supervision step: T recursions of n updates of z and one of y, the last of them with a gradient.

        Args:
            state: from `start` or from the step before.
            inputs_BL: int64 symbols.
            puzzle_ids_B: int64 rows of the table of puzzle vectors; none is row 0.
            depth: (T, n) in place of the shape's.

        Raises:
            DataError: the network is made for another number of cells.
        """
        recursions, latent_steps = depth or (self.shape.num_recursions, self.shape.num_latent_steps)
        x_BSD = self.embed(inputs_BL, puzzle_ids_B)
        x, y, z = (self._inward(value) for value in (x_BSD, state.y, state.z))
        passes = self._passes(self._angles(x_BSD.shape[1], x_BSD.device))
        with torch.no_grad():
            for _ in range(recursions - 1):
                y, z = self._recurse(x, y, z, latent_steps, passes)
            if self.shape.gradient == "one_step":
                z = self._think(x, y, z, latent_steps - 1, passes)
        latent_steps = 1 if self.shape.gradient == "one_step" else latent_steps
        y, z = self._recurse(x, y, z, latent_steps, passes)
        y_BSD = self._outward(y)
        after = TrmState(y_BSD.detach(), self._outward(z.detach()))
        logits_BLV = F.linear(y_BSD[:, self.shape.prefix_length :], self.lm_head.weight.to(self.dtype))
        bias = self.q_head.bias
        assert bias is not None
        # Neighbours leave the first position knowing its corner alone, so there q is told the most of every feature.
        told_BD = y_BSD.amax(1) if self.shape.mixer == "neighbours" else y_BSD[:, 0]
        q_B2 = F.linear(told_BD, self.q_head.weight.to(self.dtype), bias.to(self.dtype)).float()
        return TrmOutput(after, logits_BLV, q_B2[:, 0], q_B2[:, 1])

    def steps(
        self, inputs_BL: Tensor, puzzle_ids_B: Tensor | None = None, count: int | None = None
    ) -> Iterator[TrmOutput]:
        """One supervision step after the other, N_sup of them or `count`, without gradients."""
        state = self.start(*inputs_BL.shape)
        for _ in range(count or self.shape.max_supervision_steps):
            with torch.no_grad():
                out = self(state, inputs_BL, puzzle_ids_B)
            state = out.state
            yield out

    def _recurse(self, x: Tensor, y: Tensor, z: Tensor, latent_steps: int, passes: _Passes) -> tuple[Tensor, Tensor]:
        """n updates of z and one of y; a single latent is updated n times with x and once without."""
        z = self._think(x, y, z, latent_steps, passes)
        if self.shape.latents == "z":
            z = passes.of_z(z)
            return z, z
        return passes.of_y(y + z), z

    def _think(self, x: Tensor, y: Tensor, z: Tensor, latent_steps: int, passes: _Passes) -> Tensor:
        injected = x if self.shape.latents == "z" else y + x
        for _ in range(latent_steps):
            z = passes.of_z(z + injected)
        return z

    def _passes(self, angles: Angles | None) -> _Passes:
        """The networks of a supervision step, their matrices converted once."""

        def bind(network: SolverNetwork) -> Callable[[Tensor], Tensor]:
            matrices = network.matrices(self.dtype)

            def run(x: Tensor) -> Tensor:
                if self.recompute and torch.is_grad_enabled():
                    return checkpoint(network, x, angles, matrices, use_reentrant=False)  # type: ignore[no-any-return]
                return network(x, angles, matrices)  # type: ignore[no-any-return]  # nn.Module call

            return run

        of_z = bind(self.network)
        return _Passes(of_z, of_z if self.answer_network is None else bind(self.answer_network))

    def _angles(self, num_positions: int, device: torch.device) -> Angles | None:
        if self.shape.mixer != "attention" or self.shape.position_encoding != "rope":
            return None
        positions = torch.arange(num_positions, device=device)
        return rope_table(positions, self.shape.head_dim, self.shape.rope_theta)

    def _inward(self, x_BSD: Tensor) -> Tensor:
        """As the blocks want it: the mlp mixer multiplies from the left, so its positions come first."""
        return x_BSD.transpose(0, 1).contiguous() if self.shape.mixer == "mlp" else x_BSD

    def _outward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.shape.mixer == "mlp" else x


def build_trm(shape: TrmShape, seed: int) -> Trm:
    """A model with fresh weights: truncated normals of variance 1 / fan-in; the q head starts at 0 with bias -5."""
    model = Trm(shape)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("q_head"):
            nn.init.constant_(parameter, 0.0 if name.endswith("weight") else _FIRST_Q_BIAS)
        else:
            fan_in = shape.hidden_size if "embed" in name else parameter[0].numel()
            truncated_normal_(parameter, fan_in**-0.5, generator)
    for start in (model.y_init, model.z_init):
        truncated_normal_(start, 1.0, generator)
    return model
