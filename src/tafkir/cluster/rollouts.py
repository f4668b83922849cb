"""Rollout workers behind `Completer`: calls of a fixed make-up, so that it does not matter who computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from tafkir.cluster.actors import ActorPool, PoolLimits
from tafkir.errors import RequestError, RolloutError
from tafkir.native.compiled import KernelChoice
from tafkir.protocols import Completer
from tafkir.records import Completion, Request

__all__ = ["RolloutCalls", "RolloutPool", "split_requests"]

BuildCompleter = Callable[[], Completer]


def split_requests(requests: Sequence[Request], prompts_per_call: int) -> list[tuple[Request, ...]]:
    """Requests in calls of so many prompts each; neighbours with the same prompt stay together, in their order.

    An engine's last bits depend on what it computes together. A split that depends on the requests alone makes
    results equal however many workers there are, whichever of them answers, and however often one is replaced.
    """
    calls: list[list[Request]] = []
    prompts, last = 0, None
    for request in requests:
        if request.prompt_ids != last:
            if prompts % prompts_per_call == 0:
                calls.append([])
            prompts, last = prompts + 1, request.prompt_ids
        calls[-1].append(request)
    return [tuple(call) for call in calls]


class RolloutCalls:
    """A completer in this process that is called as the workers of a pool are: the same results, bit for bit."""

    def __init__(self, completer: Completer, prompts_per_call: int) -> None:
        self._completer, self._prompts_per_call = completer, prompts_per_call

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield one completion per request."""
        for call in split_requests(requests, self._prompts_per_call):
            yield from self._completer.complete(call)

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probabilities, see `Completer`."""
        return self._completer.score(token_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights, see `Completer`."""
        self._completer.load_weights(weights, version)


class _Sampler:
    """The subject of a rollout worker."""

    def __init__(self, completer: Completer) -> None:
        self._completer = completer

    def take(self, state: npt.NDArray[np.uint8], version: int) -> None:
        self._completer.load_weights(load(state.tobytes()).items(), version)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        return list(self._completer.complete(requests))

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return self._completer.score(token_ids)


class _BuildSampler:
    """Builds a worker's completer with the trainer's number of threads and kernels."""

    def __init__(self, build: BuildCompleter, num_threads: int, kernels: KernelChoice | None) -> None:
        self._build, self._num_threads, self._kernels = build, num_threads, kernels

    def __call__(self) -> _Sampler:
        from tafkir.ops.native import select_kernels

        torch.set_num_threads(self._num_threads)
        if self._kernels is not None:
            select_kernels(self._kernels)
        return _Sampler(self._build())


class RolloutPool:
    """Ray workers, each with a completer of its own, as one `Completer`.

    Args:
        build: makes a worker's completer, in the worker's process.
        num_workers: how many.
        prompts_per_call: prompts that a worker gets at once.
        num_threads: CPU threads of each worker's torch; results depend on it in the last bits.
        kernels: which kernels they compute with; None leaves torch's.
        limits: waits and attempts.
    """

    def __init__(
        self,
        build: BuildCompleter,
        num_workers: int,
        *,
        prompts_per_call: int,
        num_threads: int,
        kernels: KernelChoice | None = None,
        limits: PoolLimits | None = None,
    ) -> None:
        self._prompts_per_call = prompts_per_call
        subject = _BuildSampler(build, num_threads, kernels)
        self._actors = ActorPool("rollout", subject, num_workers, limits or PoolLimits())
        self.policy_version = 0

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Yield one completion per request, call by call as the workers finish them.

        Raises:
            RequestError: two requests have the same id, or a worker's completer refuses one.
            RolloutError: a worker answered other requests than it was given, or with other weights.
        """
        if len({request.id for request in requests}) < len(requests):
            raise RequestError("two requests have the same id", where="rollout workers", expected="distinct ids")
        return self._complete(split_requests(requests, self._prompts_per_call))

    def _complete(self, calls: Sequence[tuple[Request, ...]]) -> Iterator[Completion]:
        for index, completions in self._actors.run([("complete", (call,)) for call in calls]):
            asked = sorted(request.id for request in calls[index])
            if sorted(done.request_id for done in completions) != asked:
                raise RolloutError(
                    f"{len(completions)} completions for {len(asked)} requests",
                    where="rollout workers",
                    expected="one completion for each request",
                )
            for done in completions:
                if done.policy_version != self.policy_version:
                    raise RolloutError(
                        f"sampled with weights of version {done.policy_version}",
                        where=f"request {done.request_id!r}",
                        expected=str(self.policy_version),
                    )
                yield done

    def score(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced log-probabilities; sequences go to the workers one call each, see `Completer`."""
        scored = dict(self._actors.run([("score", ([list(ids)],)) for ids in token_ids]))
        return [scored[i][0] for i in range(len(token_ids))]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Put the weights into the object store, once for all workers; each takes them with its next call."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        self._actors.set_state(np.frombuffer(save(state), np.uint8), version)
        self.policy_version = version

    def metrics(self) -> dict[str, float]:
        """Workers that were lost so far, and calls that were made again."""
        return self._actors.metrics()

    def close(self) -> None:
        """End all workers."""
        self._actors.close()
