"""Learning from preferences as tables of the recipe: `[preferences]`, `[reward]`, `[dpo]` and `[rlhf]`. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tafkir.recipe.rl import Acceptance, KlConfig, NoAcceptance, PolicyTable
from tafkir.recipe.tables import Positive, Table, TrainTable

__all__ = ["DpoConfig", "Flaw", "GuardConfig", "JudgeConfig", "PreferencesConfig", "RewardConfig", "RlhfConfig"]

Flaw = Literal["result", "answer", "step"]
"""What is wrong with the rejected side of a made-up pair."""


class PreferencesConfig(Table):
    """Which preference pairs `[reward]`, `[dpo]` and `[rlhf]` learn from."""

    sources: tuple[str, ...] = Field(
        ("dpo_en_demo",), description="Bundled sets of pairs, or paths of JSONL files of one's own."
    )
    made_up: int = Field(0, ge=0, description="Pairs made up: a worked word problem against the same with a flaw.")
    flaws: tuple[Flaw, ...] = Field(
        ("result",),
        min_length=1,
        description="Flaws of the made-up pairs: a wrong last result with the answer after it, an answer that is not "
        "the last result, or a step too many.",
    )
    max_length: int = Field(1024, ge=8, description="Pairs with more tokens in prompt and longer side are left out.")
    heldout_share: float = Field(0.2, ge=0, lt=1, description="Share of the prompts that are only measured on.")
    on_bad_row: Literal["error", "skip"] = Field("error", description="What a malformed pair does.")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if not self.sources and not self.made_up:
            raise ValueError("sources is empty and made_up is 0: there would be no pair")
        return self


class RewardConfig(TrainTable):
    """A Bradley-Terry reward model: the policy so far with a scalar head, trained on preference pairs."""

    batch_pairs: Positive = Field(16, description="Pairs per optimiser step.")
    center_coef: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (0.01 is usual)."
    )
    judge_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of training pairs kept for a second model, the guard's judge; 0 is none.",
    )
    num_bins: int = Field(10, ge=2, description="Rows of the reliability table.")


class DpoConfig(TrainTable):
    """Direct learning from preference pairs, without a reward model or rollouts."""

    loss: Literal["sigmoid", "robust", "ipo", "simpo", "orpo", "kto"] = Field(
        "sigmoid", description="DPO (with label_smoothing: cDPO), robust DPO, IPO, SimPO, ORPO or KTO."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference; IPO's tau, ORPO's lambda.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of pairs taken to be labelled the wrong way.")
    simpo_gamma: float = Field(1.0, ge=0, description="SimPO's target margin.")
    batch_pairs: Positive = Field(16, description="Pairs per optimiser step.")


class GuardConfig(Table):
    """What stops a policy that learns to please its reward model alone."""

    kl_budget: float = Field(
        0.0, ge=0, description="Largest KL towards the first policy, nats a completion; 0 does not watch it."
    )
    judge: bool = Field(False, description="Watch the judge that [reward] trained on pairs of its own.")
    window: int = Field(5, ge=1, description="Steps that a mean is taken over.")
    tolerance: float = Field(
        0.1, ge=0, description="How far the judge's mean may fall below its best while the reward rises."
    )
    action: Literal["stop", "lower"] = Field(
        "stop", description="End the stage there, or go on with a lower learning rate."
    )
    lower_by: float = Field(0.5, gt=0, lt=1, description="What `lower` multiplies the learning rate by each time.")


class JudgeConfig(Table):
    """A language model as grader, behind any OpenAI-compatible endpoint."""

    url: str = Field(description="Base URL, such as http://127.0.0.1:8000/v1.")
    model: str = Field(description="Name of the model there.")
    mode: Literal["rubric", "pairwise"] = Field(
        "rubric",
        description="Score each answer, or let the answers to a prompt meet in pairs, each pair in both orders: the "
        "reward is the share of points.",
    )
    opponents: int = Field(
        0, ge=0, description="Pairwise: others of its group that each answer is compared with; 0 is all of them."
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key; may be unset.")
    rubric: str = Field(
        "Is the answer correct, helpful, harmless, and no longer than it needs to be?",
        min_length=1,
        description="What the answer is judged by.",
    )
    max_score: int = Field(10, ge=1, description="Rubric: best score; the reward is score / max_score.")
    max_tokens: Positive = Field(512, description="Length limit of a judgement.")
    timeout_s: float = Field(60.0, gt=0, description="Time limit of one call.")
    max_retries: int = Field(3, ge=0, description="Further calls after a failed one, with growing pauses between.")
    backoff_s: float = Field(1.0, ge=0, description="First pause; it doubles with each retry.")
    max_calls: int = Field(10_000, ge=1, description="Budget of the stage in calls, retries among them.")
    token_budget: int = Field(
        0, ge=0, description="Budget of the stage in tokens as the endpoint counts them; 0 is none."
    )
    concurrency: Positive = Field(8, description="Calls at once.")
    max_failures: float = Field(
        0.5, ge=0, le=1, description="The stage ends where a larger share of a step's answers cannot be graded."
    )


class RlhfConfig(PolicyTable):
    """The step of `[rlvr]` with a reward model, or a judge, as grader, on the prompts of `[preferences]`.

    With `verifiable_share` above 0 it is the joint stage: that share of a step's prompts are word problems, graded by
    their verifier.
    """

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    kl: KlConfig = KlConfig(coef=0.02)
    acceptance: Acceptance = NoAcceptance()
    grader: Literal["reward_model", "judge"] = Field(
        "reward_model", description="What grades the answers to the prompts of [preferences]."
    )
    normalize_reward: bool = Field(
        True, description="Rewards in standard deviations from the mean of the reward model's training pairs."
    )
    reward_clip: float = Field(5.0, gt=0, description="Rewards are cut to this distance from 0.")
    verifiable_share: float = Field(
        0.0, ge=0, lt=1, description="Share of the prompts that are word problems with a verifier (joint stage)."
    )
    guard: GuardConfig = GuardConfig()
    judge: JudgeConfig | None = None

    @model_validator(mode="after")
    def _check_rlhf(self) -> Self:
        if self.grader == "judge" and self.judge is None:
            raise ValueError('grader = "judge" needs a [rlhf.judge] table with url and model')
        if self.max_resamples:
            raise ValueError("max_resamples is for verifiable rewards, whose groups are often all alike")
        return self
