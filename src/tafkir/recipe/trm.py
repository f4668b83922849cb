"""The tiny recursive model as tables of the recipe: `[trm]`, its network, and its shape. Imports without torch.

Names here, in the paper (TRM, arXiv 2510.04871), and in the reference's config:

    num_recursions         T      H_cycles        recursions of a supervision step; the last one has the gradient
    num_latent_steps       n      L_cycles        updates of z in a recursion, before its one update of y
    max_supervision_steps  N_sup  halt_max_steps  supervision steps until a puzzle is given up
    mixer = "mlp"          MLP    mlp_t           positions mixed by a SwiGLU instead of attention
    mixer = "neighbours"   -      -               each position mixed with the eight around it
    prefix_length          -      puzzle_emb_len  positions before the grid: the puzzle's vector, then zeros
    intermediate_multiple  -      256             what SwiGLU widths are rounded up to
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from tafkir.recipe.puzzles import ArcPuzzles, Puzzles, SudokuPuzzles
from tafkir.recipe.tables import Positive, Table, TrainTable
from tafkir.recipe.teacher import AnswersTeacher, Teacher

__all__ = ["Precision", "TrmConfig", "TrmModelConfig", "TrmShape"]

Precision = Literal["float32", "bfloat16", "auto"]


class TrmModelConfig(Table):
    """The network and its recursion; the defaults are the paper's."""

    hidden_size: Positive = Field(512, description="Width D of y, z and x.")
    num_hidden_layers: Positive = Field(2, description="Blocks of the network.")
    num_attention_heads: Positive = Field(8, description="Heads of the attention mixer.")
    expansion: float = Field(4.0, gt=0, description="SwiGLU width is 2/3 of this times the input's, rounded up.")
    intermediate_multiple: Positive = Field(
        256, description="SwiGLU widths are rounded up to a multiple of this; 32 suits small models."
    )
    mixer: Literal["attention", "mlp", "neighbours"] = Field(
        "attention",
        description="How positions exchange: attention, a SwiGLU over one fixed length, or filters of 3x3 cells.",
    )
    position_encoding: Literal["rope", "learned", "none"] = Field(
        "rope", description="How attention knows positions; the mlp mixer needs none and takes none but learned."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base of RoPE.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of the norms after each sublayer.")
    prefix_length: int = Field(16, ge=0, description="Positions before the grid: the puzzle's vector, then zeros.")
    puzzle_embedding_size: int = Field(
        0, ge=0, description="Numbers of the vector that each puzzle id has of its own; 0 is none."
    )
    num_recursions: Positive = Field(3, description="Recursions T of a supervision step; the last has the gradient.")
    num_latent_steps: Positive = Field(6, description="Updates n of z in a recursion, before its one update of y.")
    max_supervision_steps: Positive = Field(16, description="Supervision steps N_sup until a puzzle is given up.")
    gradient: Literal["recursion", "one_step"] = Field(
        "recursion", description="Back through the whole last recursion, or its last update of z and y alone (HRM)."
    )
    latents: Literal["yz", "z"] = Field("yz", description="Answer y and latent z apart, or a single z for both.")
    separate_networks: bool = Field(False, description="One network updates z and another one y (HRM).")

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.hidden_size % self.num_attention_heads and self.mixer == "attention":
            raise ValueError("num_attention_heads does not divide hidden_size")
        if self.mixer == "attention" and self.position_encoding == "rope" and self.head_dim % 2:
            raise ValueError("RoPE needs an even hidden_size / num_attention_heads")
        if self.mixer == "neighbours" and self.prefix_length:
            raise ValueError("neighbours are those of a grid without a prefix: set prefix_length = 0")
        if self.puzzle_embedding_size > self.prefix_length * self.hidden_size:
            raise ValueError("puzzle_embedding_size does not fit into prefix_length x hidden_size")
        if self.latents == "z" and self.separate_networks:
            raise ValueError("a single latent has one network")
        return self

    def for_puzzles(
        self, vocab_size: int, sequence_length: int, num_puzzle_ids: int = 1, *, grid_columns: int | None = None
    ) -> TrmShape:
        """The network for puzzles of one size."""
        sizes = {"vocab_size": vocab_size, "sequence_length": sequence_length, "num_puzzle_ids": num_puzzle_ids}
        sizes |= {"grid_columns": grid_columns} if grid_columns and self.mixer == "neighbours" else {}
        return TrmShape.model_validate(self.model_dump() | sizes)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def intermediate_size(self, width: int) -> int:
        """Hidden width of a SwiGLU over `width` inputs."""
        multiple = self.intermediate_multiple
        return -(-round(self.expansion * width * 2 / 3) // multiple) * multiple


class TrmShape(TrmModelConfig):
    """A network for puzzles of one size: what a checkpoint's config.json holds."""

    vocab_size: Positive = Field(description="Symbols of a cell, the padding 0 among them.")
    sequence_length: Positive = Field(description="Cells L of a grid.")
    num_puzzle_ids: Positive = Field(1, description="Rows of the table of puzzle vectors.")
    grid_columns: Positive | None = Field(
        None, description="Columns of the grid, for the mixer of neighbours; not set, the grid is square."
    )

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if self.mixer == "neighbours" and self.sequence_length % self.columns:
            raise ValueError(f"{self.sequence_length} cells do not fill rows of {self.columns}")
        return self

    @property
    def columns(self) -> int:
        """Columns of the grid, as the mixer of neighbours needs them."""
        return self.grid_columns or math.isqrt(self.sequence_length)

    @property
    def num_positions(self) -> int:
        """Positions S that the network sees: prefix and grid."""
        return self.prefix_length + self.sequence_length

    def num_parameters(self, *, puzzle_table: bool = True) -> int:
        """Trained numbers; the table of puzzle vectors, which published counts leave out, can be left out."""
        d = self.hidden_size
        blocks = self.num_hidden_layers * (2 if self.separate_networks else 1)
        count = blocks * sum(self._block_weights()) + 2 * self.vocab_size * d + 2 * d + 2
        if self.position_encoding == "learned":
            count += self.num_positions * d
        return count + (self.num_puzzle_ids * self.puzzle_embedding_size if puzzle_table else 0)

    def flops_per_pass(self) -> float:
        """Multiplications and additions of one pass of the network over one puzzle."""
        d, s = self.hidden_size, self.num_positions
        mixer, mlp = self._block_weights()
        mixing = 2 * d * mixer if self.mixer == "mlp" else 2 * s * mixer
        mixing += 4 * s * s * d if self.mixer == "attention" else 0
        return float(self.num_hidden_layers * (mixing + 2 * s * mlp))

    def flops_per_supervision_step(self, *, train: bool = False) -> float:
        """One supervision step of one puzzle: every pass forward and, in training, those with a gradient back."""
        passes = self.num_recursions * (self.num_latent_steps + 1)
        if train:
            passes += 2 * (2 if self.gradient == "one_step" else self.num_latent_steps + 1)
        return passes * self.flops_per_pass()

    def _block_weights(self) -> tuple[int, int]:
        """Weights of a block's mixer and of its SwiGLU."""
        d, s = self.hidden_size, self.num_positions
        mixer = {"mlp": 3 * s * self.intermediate_size(s), "attention": 4 * d * d, "neighbours": 9 * d}[self.mixer]
        return mixer, 3 * d * self.intermediate_size(d)


class TrmConfig(TrainTable):
    """Deep supervision: every optimiser step is one supervision step of a batch whose finished puzzles are replaced."""

    batch_size: Positive = Field(64, description="Puzzles that are being worked on at a time.")
    loss: Literal["stable_max", "softmax"] = Field(
        "stable_max", description="Cross entropy of the stable-max (the reference), or of the softmax."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of the softmax cross entropy.")
    q_loss_weight: float = Field(0.5, ge=0, description="Weight of the loss of the halting head.")
    act: bool = Field(True, description="End a puzzle early where the halting head says solved; else all N_sup steps.")
    halt_exploration: float = Field(
        0.1, ge=0, le=1, description="Share of steps with a random least number of supervision steps."
    )
    halt_threshold: float = Field(0.0, description="Answers are also scored at the first step with q above this.")
    puzzle_learning_rate: float = Field(1e-2, gt=0, description="Peak step of the puzzle vectors' sign-SGD.")
    puzzle_weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of the puzzle vectors that are touched.")
    precision: Precision = Field(
        "float32", description="Number format of the passes; auto is bfloat16 where the device has units for it."
    )
    recompute: bool = Field(False, description="Keep each pass's input alone and compute it again in the backward.")
    curriculum: tuple[tuple[float, Positive, Positive], ...] = Field(
        (), description="Shallower recursions at first: (share of the steps, T, n) each, until that share is over."
    )
    select: Literal["best", "last"] = Field(
        "best", description="Checkpoint of the best validation score so far, or of the last step."
    )
    eval_batch_size: Positive = Field(256, description="Puzzles that are solved at once in measuring.")
    num_labelled: int | None = Field(
        None, ge=0, description="Training puzzles whose answers are known, the first so many; others are the teacher's."
    )
    teacher: Teacher | None = None
    model: TrmModelConfig = TrmModelConfig()
    puzzles: Puzzles = SudokuPuzzles()

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        if self.label_smoothing and self.loss != "softmax":
            raise ValueError('label_smoothing needs loss = "softmax"')
        shares = [share for share, _, _ in self.curriculum]
        if shares != sorted(set(shares)) or any(not 0 < share < 1 for share in shares):
            raise ValueError("the shares of curriculum must rise between 0 and 1")
        if isinstance(self.puzzles, ArcPuzzles) and not self.model.puzzle_embedding_size:
            raise ValueError("tasks of ARC are told apart by their vectors: set model.puzzle_embedding_size")
        taught = self.teacher is not None or self.num_labelled is not None
        if taught and self.puzzles.kind in ("arc", "official"):
            raise ValueError(f"num_labelled and teacher are not for puzzles of kind {self.puzzles.kind}")
        if isinstance(self.teacher, AnswersTeacher) and self.num_labelled is None:
            raise ValueError("a teacher of answers needs num_labelled: it answers the puzzles beyond those")
        if self.micro_batches > self.batch_size:
            raise ValueError("micro_batches is larger than batch_size")
        return self

    def depth_at(self, step: int) -> tuple[int, int]:
        """T and n of step `step`, counted from 0."""
        for share, recursions, latent_steps in self.curriculum:
            if step < share * self.steps:
                return recursions, latent_steps
        return self.model.num_recursions, self.model.num_latent_steps
