"""Rollouts: groups of graded completions, drawn from a `Completer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tafkir.data.tokenizer import Tokenizer
from tafkir.protocols import Completer, Task
from tafkir.recipe.seeds import derive_seed
from tafkir.records import Completion, Example, Request, SamplingParams, Verdict

__all__ = ["Rollout", "RolloutGroup", "collect_rollouts"]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion with its text and verdict."""

    completion: Completion
    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions of one prompt, in the order of their seeds."""

    example: Example
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]


def collect_rollouts(
    completer: Completer,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[tuple[Example, Sequence[int]]],
    *,
    group_size: int,
    params: SamplingParams,
    seed: int,
) -> list[RolloutGroup]:
    """Sample `group_size` completions per prompt and grade them.

    Args:
        prompts: each example with its prompt tokens.
        params: sampling parameters; the seed in them is ignored.
        seed: completion j of prompt i draws from the stream `derive_seed(seed, i, j)`.

    Returns:
        One group per prompt, in the order given, whatever order the completions finish in.
    """
    requests = []
    for i, (_, prompt_ids) in enumerate(prompts):
        for j in range(group_size):
            own = replace(params, seed=derive_seed(seed, i, j))
            requests.append(Request(str(i * group_size + j), tuple(prompt_ids), own))
    completions = {int(done.request_id): done for done in completer.complete(requests)}
    groups = []
    for i, (example, prompt_ids) in enumerate(prompts):
        rollouts = []
        for j in range(group_size):
            completion = completions[i * group_size + j]
            text = tokenizer.decode(list(completion.token_ids))
            verdict = task.grade(example, text, finished=completion.finish_reason == "stop")
            rollouts.append(Rollout(completion, text, verdict))
        groups.append(RolloutGroup(example, tuple(prompt_ids), tuple(rollouts)))
    return groups
