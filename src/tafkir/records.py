"""Typed records that cross stages. Frozen, torch-free, and small enough to read at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

FinishReason = Literal["stop", "length", "cancelled"]
_BROKEN = frozenset({"sandbox", "start"})
Outcome = Literal["correct", "wrong", "no_answer", "length", "timeout", "unjudged", "error", "graded"]
Split = Literal["train", "validation", "test"]
StageName = Literal[
    "tokenizer",
    "pretrain",
    "sft",
    "reward",
    "dpo",
    "rlvr",
    "rlhf",
    "qat",
    "mtp",
    "quantize",
    "eval",
    "lab",
    "trm",
    "report",
]

STAGES: tuple[StageName, ...] = get_args(StageName)
POLICY_STAGES: tuple[StageName, ...] = ("pretrain", "sft", "dpo", "rlvr", "rlhf", "qat", "mtp")
"""Stages that train the model which answers."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. `reasoning` is what stands between `<think>` and `</think>` in an assistant turn."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One problem of a task. `answer` is the reference answer; `extra` carries what only its own task reads.

    `subject` and `difficulty` are what the data set itself says ("Algebra", "Level 3"), empty where it says nothing.
    """

    id: str
    source: str
    split: Split
    question: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    subject: str = ""
    difficulty: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a grader says of one completion. `reason` tells why the outcome is not "correct".

    "graded" is an answer that is better or worse, not right or wrong: its reward says all. "timeout" is a comparison
    that took the grader too long, "length" an answer that the length limit cut off. `failure` names in a word
    what went wrong in the grader itself, such as "sandbox" or "time"; it is empty where nothing did. `sandbox` is the
    tier that a program of the answer ran in ("bwrap", "rlimit", "remote"), empty where none ran.
    """

    outcome: Outcome
    reward: float
    extracted: str | None
    expected: str
    reason: str = ""
    failure: str = ""
    sandbox: str = ""

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @property
    def is_ungraded(self) -> bool:
        """The grader did not work here: the reward says nothing about the answer, and nothing is learned from it."""
        return self.failure in _BROKEN


@dataclass(frozen=True, slots=True)
class Answer:
    """What a grader is given: the text of an assistant turn, and whether it ended by itself."""

    example: Example
    text: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature=0` is greedy; `top_k=0` and `top_p=1` mean no cut.

    `seed` fixes the request's own random stream: the draw at position t depends on (seed, t) alone,
    whatever other requests share the batch. None takes a fresh seed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete, or a completion to go on with.

    `prefix_ids` are tokens of the completion that were sampled before, such as under older weights: sampling goes on
    after them, at the draw of the request's stream that comes next. `max_tokens` counts them. Where requests have to
    wait, a lower `priority` goes first, and equal ones go in the order of their arrival.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    prefix_ids: tuple[int, ...] = ()
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one `Request`.

    `token_ids` holds every sampled token, the stop token among them; `logprobs[t]` is the natural log of the
    probability with which `token_ids[t]` was drawn from the *untruncated* distribution at the request's
    temperature (at temperature 1 when it is greedy), so that it compares with a training forward. The tokens of the
    request's `prefix_ids` are not among them.
    `policy_version` is the number last given to `Completer.load_weights`; a completion that was continued under newer
    weights has the version of each of its tokens in `token_versions`, and that of the last one in `policy_version`.
    `expert_ids` says which experts each token that was fed went to, where the completer records that: an int16 tensor
    [P + n - 1, MoE layers, active experts] for the P tokens of prompt and prefix and all but the last of the n own.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int = 0
    expert_ids: Any = None
    token_versions: tuple[int, ...] = ()
