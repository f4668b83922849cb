"""The residual stream as a module: what a sublayer reads from it, and how its output is written back.

Shapes: N tokens, D hidden, n streams, M = n^2 + 2n map entries in the order [pre | post | res].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tafkir.errors import BackendUnavailable
from tafkir.models.recompute import Recorder
from tafkir.ops.hyper_connections import (
    Maps,
    Reading,
    Write,
    deepseek_v4_exit,
    deepseek_v4_res,
    gated_maps,
    hc_maps,
    project_and_read,
    read_streams,
    write_and_read,
    write_streams,
)
from tafkir.ops.sinkhorn import sinkhorn
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.residual import ResidualConfig

__all__ = [
    "TORCH_KERNELS",
    "DeepseekV4Connection",
    "DeepseekV4Ends",
    "Gains",
    "HyperConnection",
    "Kernels",
    "ManifoldConnection",
    "PlainResidual",
    "ResidualStream",
    "StreamEnds",
    "StreamState",
    "build_residual",
    "composed_gains",
    "observe_res_maps",
    "single_gains",
    "use_kernels",
]


class ResidualStream(nn.Module):
    """The residual around one sublayer (`read`, `write`), or the ends of a decoder's stream (`enter`, `exit`).

    A block is `u, ctx = residual.read(state); state = residual.write(state, ctx, f(u))` and knows nothing of what
    the state looks like.
    """

    def enter(self, x_ND: Tensor) -> Any:
        """The state that stands for fresh embeddings."""
        raise NotImplementedError

    def read(self, state: Any) -> tuple[Tensor, Any]:
        """The sublayer's input [N, D], and what `write` needs to know of this reading."""
        raise NotImplementedError

    def write(self, state: Any, ctx: Any, y_ND: Tensor) -> Any:
        """The state after a sublayer with output y."""
        raise NotImplementedError

    def exit(self, state: Any) -> Tensor:
        """The hidden states [N, D] that the final norm takes."""
        raise NotImplementedError

    def saving(self, state: Any) -> AbstractContextManager[None]:
        """What the sublayer and its residual run under; decides what autograd keeps of them."""
        return nullcontext()

    def normed(self, state: Any, u_ND: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """norm(u), the first thing that every sublayer computes."""
        return norm(u_ND)

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """Fill the parameters, if there are any; `std` is the model's, not the maps'."""


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


class StreamState(NamedTuple):
    """The streams [N, n, D], and who recomputes them in the backward (None: they are kept).

    A sublayer's writing may wait (`write`) for the next one's reading, so that both meet the streams together; `x_NnD`
    does it at once.
    """

    kept_NnD: Tensor
    recorder: Recorder | None
    write: Write | None = None

    @property
    def x_NnD(self) -> Tensor:  # noqa: N802  # a shape's suffix
        """The streams, [N, n, D]."""
        return self.kept_NnD if self.write is None else write_streams(*self.write)


class _Context(NamedTuple):
    """The streams as `project_and_read` hands them on, and the maps of this reading."""

    x_NnD: Tensor
    maps: Maps


class _Float32Module(ResidualStream):
    """Parameters that stay float32 whatever dtype the model is cast to, as DeepSeek-V4 stores them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Float32Module:
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return,no-untyped-call]


class StreamEnds(_Float32Module):
    """n copies of the embeddings in, the mean of the streams out.

    The mean keeps equal streams as they are, so that a model whose maps do not tell streams apart is the plain one.
    """

    def __init__(self, config: ResidualConfig, num_sublayers: int) -> None:
        super().__init__()
        self.num_streams = config.num_streams
        # arXiv 2512.24880, section 4.3.2: n L / L_r states of n D, and (n + 2) D L_r while a block is recomputed.
        optimum = math.sqrt(config.num_streams * num_sublayers / (config.num_streams + 2))
        self.block_sublayers = max(1, round(optimum)) if config.recompute else None

    def enter(self, x_ND: Tensor) -> StreamState:
        x_NnD = x_ND.unsqueeze(1).repeat(1, self.num_streams, 1)
        wanted = self.block_sublayers is not None and torch.is_grad_enabled()
        return StreamState(x_NnD, Recorder(self.block_sublayers or 1) if wanted else None)

    def exit(self, state: StreamState) -> Tensor:
        return state.x_NnD.mean(1)


class DeepseekV4Ends(StreamEnds):
    """DeepSeek-V4's way out (`hc_head`): a weighted sum of the streams, one weight per stream and token."""

    def __init__(self, config: ResidualConfig, num_sublayers: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__(config, num_sublayers)
        num = config.num_streams
        self.hc_eps, self.norm_eps = config.eps, norm_eps
        self.phi = nn.Parameter(torch.empty(num, num * hidden_size))
        self.bias = nn.Parameter(torch.empty(num))
        self.alpha = nn.Parameter(torch.empty(1))
        self.config = config

    def exit(self, state: StreamState) -> Tensor:
        return deepseek_v4_exit(state.x_NnD, self.phi, self.bias, self.alpha, self.hc_eps, self.norm_eps)

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        """The mean of the streams, up to what the small phi adds."""
        self.phi.normal_(0.0, self.config.phi_std, generator=generator)
        self.bias.fill_(_share_bias(self.config.num_streams))
        self.alpha.fill_(self.config.alpha_init)


def _share_bias(num_streams: int) -> float:
    """b with sigmoid(b) = 1 / n; -ln(n - 1), and for one stream a number whose sigmoid is 1 in float32."""
    return -math.log(num_streams - 1) if num_streams > 1 else 20.0


class Kernels(NamedTuple):
    """The ops that meet whole streams; every set has the same signatures and numbers."""

    project_and_read: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Reading]
    write_streams: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sinkhorn: Callable[[Tensor, int], Tensor]
    write_and_read: Callable[[Write, Tensor, Tensor, Tensor, float, float], Reading] | None = None
    """The second, then the first, as one; None where the set has none."""


TORCH_KERNELS = Kernels(project_and_read, write_streams, sinkhorn, write_and_read)


class _Connection(_Float32Module):
    """What the three kinds of n streams share: the maps' parameters, and the writing.

    Attributes:
        phi: [rows, width] float32, from the normed streams to map entries.
        bias: [M] float32.
        alpha: [3] float32, gates on what phi gives for pre, post and res.
        observer: called with H_res [N, n, n] of every reading; see `observe_res_maps`.
    """

    def __init__(self, config: ResidualConfig, rows: int, width: int) -> None:
        super().__init__()
        self.config, num = config, config.num_streams
        self.phi = nn.Parameter(torch.empty(rows, width))
        self.bias = nn.Parameter(torch.empty(num * num + 2 * num))
        self.alpha = nn.Parameter(torch.empty(3))
        self.observer: Callable[[Tensor], None] | None = None
        self.kernels = TORCH_KERNELS

    def _read(self, state: StreamState) -> tuple[Tensor, _Context]:
        raise NotImplementedError

    def _project(self, state: StreamState, norm_eps: float, pre_eps: float) -> Reading:
        """z and u of streams that are there, or that are written first."""
        how = (self.phi, self.bias[: self.config.num_streams], self.alpha[0], norm_eps, pre_eps)
        if state.write is not None and self.kernels.write_and_read is not None:
            return self.kernels.write_and_read(state.write, *how)
        return self.kernels.project_and_read(state.x_NnD, *how)

    def read(self, state: StreamState) -> tuple[Tensor, _Context]:
        u_ND, reading = self._read(state)
        if self.observer is not None:
            self.observer(reading.maps.res_Nij.detach())
        return u_ND, reading

    def write(self, state: StreamState, ctx: _Context, y_ND: Tensor) -> StreamState:
        write = Write(ctx.x_NnD, y_ND, ctx.maps.post_Nn, ctx.maps.res_Nij)
        if state.recorder is not None:
            state.recorder.end_sublayer(ctx.maps, y_ND)
        elif self.kernels.write_and_read is not None:
            return StreamState(ctx.x_NnD, None, write)
        return StreamState(self.kernels.write_streams(*write), state.recorder)

    def saving(self, state: StreamState) -> AbstractContextManager[None]:
        return nullcontext() if state.recorder is None else state.recorder.sublayer(state.x_NnD)

    def normed(self, state: StreamState, u_ND: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(u_ND) if state.recorder is None else state.recorder.normed(u_ND, norm)

    def fresh_weights(self, std: float, generator: torch.Generator) -> None:
        self.phi.normal_(0.0, self.config.phi_std, generator=generator)
        self.alpha.fill_(self.config.alpha_init)
        self._init_bias(*self.bias.split([self.config.num_streams] * 2 + [self.config.num_streams**2]))

    def _init_bias(self, pre_n: Tensor, post_n: Tensor, res_nn: Tensor) -> None:
        """Fill the three parts such that equal streams meet the plain residual."""
        pre_n.fill_(_share_bias(self.config.num_streams))
        post_n.zero_()
        res_nn.copy_((self.config.res_diagonal * torch.eye(self.config.num_streams)).flatten())


class HyperConnection(_Connection):
    """Hyper-connections without constraints (arXiv 2512.24880, equation 5; arXiv 2409.19606).

    `phi` is [n + 2, D], rows theta_pre, theta_post and the n of theta_res. Fresh maps are those of the latter paper,
    equation 14: sublayer l reads stream l mod n, writes to all, and mixes none.
    """

    def __init__(self, config: ResidualConfig, hidden_size: int, sublayer_idx: int) -> None:
        super().__init__(config, config.num_streams + 2, hidden_size)
        self.sublayer_idx = sublayer_idx

    def _read(self, state: StreamState) -> tuple[Tensor, _Context]:
        x_NnD = state.x_NnD
        maps = hc_maps(x_NnD, self.phi, self.bias, self.alpha, self.config.eps)
        return read_streams(x_NnD, maps.pre_Nn), _Context(x_NnD, maps)

    def _init_bias(self, pre_n: Tensor, post_n: Tensor, res_nn: Tensor) -> None:
        num = self.config.num_streams
        pre_n.zero_()[self.sublayer_idx % num] = 1.0
        post_n.fill_(1.0)
        res_nn.copy_(torch.eye(num).flatten())


class ManifoldConnection(_Connection):
    """Manifold-constrained hyper-connections, mHC (arXiv 2512.24880, equations 3 and 7 to 9).

    `phi` is [M, n D]. Fresh maps: b_pre = -ln(n - 1) and b_post = 0 make a sublayer read the mean of the streams and
    add its output to each, so equal streams stay the plain residual under any doubly stochastic H_res; phi, not zero,
    tells the streams apart (with phi = 0 they would get equal gradients for ever). `res_diagonal` says how far H_res
    starts from the average of all streams towards the identity.
    """

    def __init__(self, config: ResidualConfig, hidden_size: int) -> None:
        num = config.num_streams
        super().__init__(config, num * num + 2 * num, num * hidden_size)

    def _read(self, state: StreamState) -> tuple[Tensor, _Context]:
        got = self._project(state, self.config.eps, 0.0)
        raw = gated_maps(got.z_NM, self.bias, self.alpha, self.config.num_streams)
        res_Nij = self.kernels.sinkhorn(raw.res_Nij, self.config.sinkhorn_iters)
        return got.u_ND, _Context(got.x_NnD, Maps(got.pre_Nn, 2 * torch.sigmoid(raw.post_Nn), res_Nij))


class DeepseekV4Connection(_Connection):
    """mHC as DeepSeek-V4 checkpoints store it: `phi`, `bias`, `alpha` are their `fn`, `base`, `scale`.

    Rows [pre | post | comb], comb transposed against H_res; eps on pre and within Sinkhorn; the RMSNorm over n D has
    the model's epsilon. Fresh maps are those of mHC (zero comb logits give a doubly stochastic H_res).
    """

    def __init__(self, config: ResidualConfig, hidden_size: int, norm_eps: float) -> None:
        num = config.num_streams
        super().__init__(config, num * num + 2 * num, num * hidden_size)
        self.norm_eps = norm_eps

    def _read(self, state: StreamState) -> tuple[Tensor, _Context]:
        eps = self.config.eps
        got = self._project(state, self.norm_eps, eps)
        raw = gated_maps(got.z_NM, self.bias, self.alpha, self.config.num_streams)
        res_Nij = deepseek_v4_res(raw.res_Nij, self.config.sinkhorn_iters, eps)
        return got.u_ND, _Context(got.x_NnD, Maps(got.pre_Nn, 2 * torch.sigmoid(raw.post_Nn), res_Nij))


def build_residual(config: ModelConfig, sublayer_idx: int | None = None) -> ResidualStream:
    """The residual of one sublayer, or with no index the ends of the stream; parameters uninitialised."""
    residual, hidden = config.residual, config.hidden_size
    if residual.kind == "plain":
        return PlainResidual()
    if sublayer_idx is None:
        sublayers = 2 * config.num_hidden_layers
        if residual.kind == "deepseek_v4":
            return DeepseekV4Ends(residual, sublayers, hidden, config.rms_norm_eps)
        return StreamEnds(residual, sublayers)
    if residual.kind == "hc":
        return HyperConnection(residual, hidden, sublayer_idx)
    if residual.kind == "mhc":
        return ManifoldConnection(residual, hidden)
    return DeepseekV4Connection(residual, hidden, config.rms_norm_eps)


def use_kernels(decoder: nn.Module, kernels: Literal["torch", "triton"] | Kernels) -> None:
    """Choose what mixes the streams of every sublayer; a fresh decoder uses torch.

    Recomputing in blocks always uses torch, so with other kernels it is exact up to their rounding only.

    Raises:
        BackendUnavailable: Triton is not installed.
    """
    if kernels == "triton":
        try:
            from tafkir.ops.triton import stream_mixing as triton
        except ModuleNotFoundError as error:
            fix = "pip install 'tafkir[gpu]', or use torch"
            raise BackendUnavailable("the triton package is not installed", where="use_kernels", fix=fix) from error
        kernels = Kernels(triton.project_and_read, triton.write_streams, triton.sinkhorn)
    for module in decoder.modules():
        if isinstance(module, _Connection):
            module.kernels = TORCH_KERNELS if isinstance(kernels, str) else kernels


@contextmanager
def observe_res_maps(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collects H_res [N, n, n] of every sublayer that runs inside, in the order in which they run."""
    connections = [module for module in decoder.modules() if isinstance(module, _Connection)]
    seen: list[Tensor] = []
    for connection in connections:
        connection.observer = seen.append
    try:
        yield seen
    finally:
        for connection in connections:
            connection.observer = None


@dataclass(frozen=True, slots=True)
class Gains:
    """By how much mappings can amplify, one number per sublayer, each the mean over tokens.

    Attributes:
        forward: largest absolute row sum: what the signal can gain.
        backward: largest absolute column sum: what the gradient can gain.
        attenuation: smallest absolute column sum, which the largest hides.
    """

    forward: list[float]
    backward: list[float]
    attenuation: list[float]


def single_gains(res_maps: list[Tensor]) -> Gains:
    """Gains of each H_res [N, n, n] by itself (arXiv 2512.24880, figures 3a and 7a)."""
    rows = [res.float().sum(-1).abs() for res in res_maps]
    columns = [res.float().sum(-2).abs() for res in res_maps]
    return Gains(
        [float(sums.amax(-1).mean()) for sums in rows],
        [float(sums.amax(-1).mean()) for sums in columns],
        [float(sums.amin(-1).mean()) for sums in columns],
    )


def composed_gains(res_maps: list[Tensor]) -> Gains:
    """Gains of the product H_res[L-1] ... H_res[l] for every l: from sublayer l to the end (figures 3b and 7b)."""
    products: list[Tensor] = []
    for res in reversed(res_maps):
        products.append(res.double() if not products else products[-1] @ res.double())
    return single_gains(products[::-1])
