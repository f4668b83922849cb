"""The typed recipe: every key that a recipe file may hold, with its default and its meaning.

Frozen and closed: an unknown key is an error. Imports without torch. A stage runs when its table is present;
stages run in the order of `STAGES`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tafkir.native.library import KernelChoice
from tafkir.recipe.model import ModelConfig
from tafkir.records import STAGES, StageName

__all__ = [
    "STAGES",
    "AugmentConfig",
    "DataConfig",
    "DecayShape",
    "EmaConfig",
    "EvalConfig",
    "IcePopConfig",
    "LabConfig",
    "LanguageTable",
    "OptimConfig",
    "ParallelConfig",
    "PretrainConfig",
    "Recipe",
    "ReportConfig",
    "RlvrConfig",
    "SftConfig",
    "StageName",
    "TokenizerConfig",
    "TrainTable",
]

Positive = Annotated[int, Field(ge=1)]
DecayShape = Literal["linear", "cosine", "1-sqrt"]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AugmentConfig(_Table):
    """Fresh variants of training problems whose answer is recomputed from the equations."""

    renumber: float = Field(0.8, ge=0, le=1, description="Share of drawn problems that get new numbers.")
    rename: float = Field(0.5, ge=0, le=1, description="Share of drawn problems that get new names.")
    max_number: int = Field(999, ge=10, description="Largest number that renumbering may draw or produce.")


class DataConfig(_Table):
    """Which word problems are read, and how they are varied."""

    sources: tuple[str, ...] = Field(
        ("gsm8k", "svamp"), min_length=1, description="Bundled set names, or paths of JSONL files of one's own."
    )
    repeat: dict[str, int] = Field(
        {"svamp": 6},
        description="How often an epoch visits the problems of a source (each time varied afresh); else 1.",
    )
    max_steps: int = Field(8, ge=1, description="Leave out training problems with longer solutions than this.")
    on_bad_row: Literal["error", "skip"] = Field("error", description="What a malformed JSONL row does.")
    augment: AugmentConfig = AugmentConfig()


class TokenizerConfig(_Table):
    """Byte-level BPE with single digits, trained on the training problems."""

    vocab_size: int = Field(2048, ge=300, description="Entries, the special tokens among them.")


class OptimConfig(_Table):
    """The optimiser and its learning rate: linear warm-up, then the schedule."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="AdamW for everything, or Muon for hidden matrices beside AdamW for the rest."
    )
    muon_learning_rate: float = Field(0.02, gt=0, description="Peak learning rate of the matrices under Muon.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="After the warm-up: none, a decay to the last step, or stable, then a short decay (wsd)."
    )
    decay_share: float = Field(0.1, gt=0, le=1, description="Share of the steps in which wsd decays.")
    decay_shape: DecayShape = Field("1-sqrt", description="How wsd decays.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second-moment decay.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled decay, on matrices only.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip the global gradient norm to this.")


class EmaConfig(_Table):
    """An exponential moving average of the weights, kept beside them."""

    decay: float = Field(0.999, gt=0, lt=1, description="How much of the average stays in each update.")
    warmup: bool = Field(True, description="Average fewer updates in the beginning: decay is at most (1+t)/(10+t).")
    checkpoint: bool = Field(True, description="Write the stage's checkpoint from the average.")


class TrainTable(OptimConfig):
    """What every training stage has in common."""

    steps: Positive = Field(100, description="Optimiser steps.")
    expert_bias_update_rate: float = Field(
        1e-3, ge=0, description="u of the aux-loss-free balance update b += u (sign(e) - mean sign(e)); 0 freezes it."
    )
    micro_batches: Positive = Field(1, description="Pieces of a step's batch, to save memory; the loss stays the same.")
    checkpoint_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Number format of the stage's checkpoint; training itself is float32."
    )
    ema: EmaConfig | None = None
    checkpoint_every: int = Field(
        0, ge=0, description="Steps between checkpoints that stay, for `tafkir merge`; 0 leaves only the last."
    )
    save_every: Positive = Field(100, description="Steps between resumable states.")
    log_every: Positive = Field(10, description="Steps between metric rows.")
    validate_every: int = Field(0, ge=0, description="Steps between validation losses; 0 leaves them out.")


class LanguageTable(TrainTable):
    """What the stages with a next-token loss have in common."""

    sequence_balance_coef: float = Field(
        0.0, ge=0, description="Weight of the routers' sequence-wise balance loss (DeepSeek-V3: 1e-4); 0 is off."
    )
    router_z_coef: float = Field(
        0.0, ge=0, description="Weight of the squared log-sum-exp of the routers' logits (Ling: 3.5e-6); 0 is off."
    )
    mtp_loss_weight: float = Field(
        0.0, ge=0, description="λ of the multi-token-prediction loss (Ling: 0.1, DeepSeek-V3: 0.3 at first); 0 is off."
    )
    mtp_final_loss_weight: float | None = Field(
        None, ge=0, description="λ in the last part of the stage (DeepSeek-V3: 0.1); not set, it never changes."
    )
    mtp_switch_share: float = Field(
        0.67, ge=0, le=1, description="Share of the steps after which λ changes (DeepSeek-V3: 10T of 14.8T tokens)."
    )


class PretrainConfig(LanguageTable):
    """Next-token loss on problems with solutions, and on arithmetic drills."""

    batch_problems: Positive = Field(48, description="Documents per optimiser step.")
    drill_share: float = Field(0.15, ge=0, le=1, description="Share of documents that are arithmetic drills.")
    story_share: float = Field(0.3, ge=0, le=1, description="Share of documents that are made-up word problems.")
    crowded_share: float = Field(
        0.5, ge=0, le=1, description="Share of the made-up problems with more numbers than the question needs."
    )
    question_loss: bool = Field(True, description="Learn to predict the questions too, not only their solutions.")


class SftConfig(LanguageTable):
    """Next-token loss on the assistant's chain of thought only, in the chat format.

    With `method = "mtp_distill"` the model stays as it is, and only its multi-token-prediction layers learn.
    """

    method: Literal["next_token", "mtp_distill"] = Field(
        "next_token", description="Train the whole model on the text, or only its MTP layers on its own predictions."
    )
    batch_problems: Positive = Field(48, description="Conversations per optimiser step.")
    story_share: float = Field(0.3, ge=0, le=1, description="Share of conversations about made-up problems.")
    crowded_share: float = Field(
        0.5, ge=0, le=1, description="Share of the made-up problems with more numbers than the question needs."
    )


class IcePopConfig(_Table):
    """Acceptance band of the training / inference ratio k (arXiv 2510.18855, equations 1-3), both ends included."""

    enabled: bool = Field(True, description="Weight tokens by k inside the band and by 0 outside it.")
    alpha: float = Field(0.5, ge=0, description="Lower end of the band.")
    beta: float = Field(5.0, gt=0, description="Upper end of the band.")


class RlvrConfig(TrainTable):
    """GRPO advantages with the IcePop loss, on problems with a checkable answer."""

    method: Literal["grpo"] = "grpo"
    prompts_per_step: Positive = Field(32, description="Problems per step.")
    group_size: int = Field(8, ge=2, description="Completions per problem.")
    max_steps: int = Field(
        0, ge=0, description="Only problems whose solution has at most this many steps; 0 takes all."
    )
    story_share: float = Field(0.0, ge=0, le=1, description="Share of the problems that are made up.")
    updates_per_rollout: Positive = Field(1, description="Optimiser steps on each batch of rollouts.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    max_completion_tokens: Positive = Field(96, description="Length limit of a rollout.")
    clip_eps_low: float = Field(0.2, ge=0, description="PPO clip below one.")
    clip_eps_high: float = Field(0.2, ge=0, description="PPO clip above one.")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the k3 penalty towards the stage's first policy.")
    icepop: IcePopConfig = IcePopConfig()
    normalize_std: bool = Field(True, description="Divide group advantages by the group's standard deviation.")
    reduction: Literal["sequence_mean", "token_mean"] = Field(
        "sequence_mean", description="Mean over tokens per completion, then over completions; or over all tokens."
    )
    drop_zero_variance: bool = Field(True, description="Leave out groups whose rewards are all equal.")


class EvalConfig(_Table):
    """Held-out accuracy of every stage, with intervals."""

    samples: Positive = Field(4, description="k of avg@k.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of avg@k.")
    max_tokens: Positive = Field(128, description="Length limit of an answer.")
    max_problems: int = Field(0, ge=0, description="Evaluate only the first this many problems per source; 0 is all.")
    split: Literal["validation", "test"] = Field("test", description="Which held-out part is scored.")
    stages: tuple[Literal["pretrain", "sft", "rlvr"], ...] = Field(
        ("sft", "rlvr"), min_length=1, description="Stages whose checkpoints are scored."
    )


class LabConfig(TrainTable):
    """Twins that differ in their residual alone, trained at growing depth on running text, byte by byte.

    Every combination of kind, depth and repeat is one variant; `model.num_hidden_layers` and `model.residual.kind` are
    theirs to set. A variant leaves its measurements and no weights.
    """

    method: Literal["residual"] = Field("residual", description="What the twins differ in.")
    kinds: tuple[Literal["plain", "hc", "mhc"], ...] = Field(
        ("plain", "hc", "mhc"), min_length=1, description="Residual kinds to compare."
    )
    depths: tuple[Positive, ...] = Field((4, 8, 16, 32), min_length=1, description="Decoder blocks of the twins.")
    seeds: Positive = Field(1, description="Repeats, each with weights and a data order of its own.")
    text: str = Field("tinyshakespeare", description="Bundled text, or path of a UTF-8 file, its last tenth held out.")
    sequence_length: int = Field(128, ge=2, description="Bytes of a window.")
    batch_sequences: Positive = Field(4, description="Windows per optimiser step.")
    validation_sequences: Positive = Field(64, description="Held-out windows that the validation loss is taken on.")

    @model_validator(mode="after")
    def _check_lab(self) -> Self:
        for name in ("kinds", "depths"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names something twice")
        if self.ema or self.checkpoint_every or self.checkpoint_dtype != "float32":
            raise ValueError("a lab writes no checkpoint: leave out ema, checkpoint_every and checkpoint_dtype")
        return self


class ReportConfig(_Table):
    """The page that explains the run."""

    sample_chains: int = Field(10, ge=0, description="Sample chains to show, with verdicts.")


class ParallelConfig(_Table):
    """How the processes of `torchrun` share a training stage: their number is the product of the three sizes."""

    data_parallel: Literal[-1] | Positive = Field(
        -1, description="Ranks that split the data, and shard weights and moments (FSDP2); -1 takes the rest."
    )
    expert_parallel: Positive = Field(1, description="Ranks that split the data, and share out the experts.")
    tensor_parallel: Positive = Field(1, description="Ranks that split heads and the width of every MLP.")
    device: Literal["cpu", "auto", "cuda", "npu", "mps"] = Field(
        "cpu", description="Where training computes: cuda is also ROCm, npu is Ascend, auto the best that is there."
    )


class Recipe(_Table):
    """One recipe: a model, its data and the stages that make it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the run directory.")
    description: str = Field("", description="One line for `tafkir recipe ls`.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 takes the physical cores, at most 8.")
    kernels: KernelChoice = Field(
        "auto", description="Float32 ops on the CPU: compiled kernels, torch alone, or what is built (auto)."
    )
    base: str | None = Field(None, description="Bundled or local checkpoint that the first training stage starts from.")
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: SftConfig | None = None
    rlvr: RlvrConfig | None = None
    eval: EvalConfig | None = None
    lab: LabConfig | None = None
    report: ReportConfig | None = None
