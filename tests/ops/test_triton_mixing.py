"""The Triton kernels against the ops they stand in for, on the CPU through Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tafkir.ops import hyper_connections as hc
from tafkir.ops.sinkhorn import sinkhorn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the triton package is not installed here"
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The kernels' module, imported with the interpreter on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("tafkir.ops.triton.stream_mixing")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad((out.float() * normal(99, *out.shape)).sum(), leaves)
    return [out.detach(), *grads]


@pytest.mark.parametrize(("streams", "hidden"), [(4, 40), (2, 1), (1, 7), (4, 1500)])
def test_writing_and_reading(kernels: ModuleType, streams: int, hidden: int) -> None:
    """Widths below, above and off a block."""
    x, y, pre = normal(0, 3, streams, hidden), normal(1, 3, hidden), normal(2, 3, streams)
    res = normal(3, 3, streams, streams)
    for ours, expected in (
        (results(kernels.write_streams, (x, y, pre, res)), results(hc.write_streams, (x, y, pre, res))),
        (results(kernels.read_streams, (x, pre)), results(hc.read_streams, (x, pre))),
    ):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("iters", "scale"), [(1, 1.0), (2, 3.0), (6, 1.0), (5, 300.0)])
def test_sinkhorn(kernels: ModuleType, iters: int, scale: float) -> None:
    logits = normal(4, 2, 4, 4) * scale
    ours, expected = (
        results(lambda x: kernels.sinkhorn(x, iters), [logits]),
        results(lambda x: sinkhorn(x, iters), [logits]),
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_reading_with_its_projection(kernels: ModuleType) -> None:
    x, phi, bias, alpha = normal(0, 3, 4, 8), normal(1, 24, 32), normal(2, 4), normal(3, 1)[0]
    ours, expected = (
        results(lambda *inputs, read=read: torch.cat(read(*inputs, 1e-6, 0.1)[:2], -1), (x, phi, bias, alpha))
        for read in (kernels.project_and_read, hc.project_and_read)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
