"""Which residual a decoder has: part of the model's config, torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ResidualConfig"]


class ResidualConfig(BaseModel):
    """How sublayers read from and write to the residual: one stream, or several that learned maps mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["plain", "hc", "mhc", "deepseek_v4"] = Field(
        "plain", description="One stream, hyper-connections, manifold-constrained ones, or as DeepSeek-V4 stores them."
    )
    num_streams: int = Field(4, ge=1, description="Residual streams n; the plain residual has one.")
    sinkhorn_iters: int = Field(20, ge=1, description="Sinkhorn iterations t_max of mHC.")
    alpha_init: float = Field(0.01, ge=0, description="Fresh gates on the input-dependent part of the maps.")
    phi_std: float = Field(0.02, ge=0, description="Standard deviation of the maps' fresh weights; zero never mixes.")
    res_diagonal: float = Field(
        0.0, description="Fresh logits on the diagonal of mHC's H_res: 0 averages the streams, more keeps them apart."
    )
    eps: float = Field(1e-6, gt=0, description="Epsilon of the maps' RMSNorm; in DeepSeek-V4's form, of the maps.")
    recompute: bool = Field(False, description="Keep the streams of one sublayer in a few and recompute the others.")

    def num_parameters(self, hidden_size: int, num_sublayers: int) -> int:
        """Parameters of the maps around all sublayers and, in DeepSeek-V4's form, of what merges the streams."""
        if self.kind == "plain":
            return 0
        n = self.num_streams
        maps = n * n + 2 * n
        if self.kind == "hc":
            return num_sublayers * ((n + 2) * hidden_size + maps + 3)
        width = n * hidden_size
        head = n * width + n + 1 if self.kind == "deepseek_v4" else 0
        return num_sublayers * (maps * width + maps + 3) + head
