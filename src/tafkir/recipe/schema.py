"""The typed recipe: every key that a recipe file may hold, with its default and its meaning.

Frozen and closed: an unknown key is an error. Imports without torch. A stage runs when its table is present;
stages run in the order of `STAGES`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tafkir.native.compiled import KernelChoice
from tafkir.recipe.cluster import ClusterConfig
from tafkir.recipe.lab import LabConfig
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.qat import QatConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.rl import RlvrConfig
from tafkir.recipe.rlhf import DpoConfig, PreferencesConfig, RewardConfig, RlhfConfig
from tafkir.recipe.selection import SelectConfig
from tafkir.recipe.tables import DecayShape, EmaConfig, OptimConfig, Positive, Table, TrainTable
from tafkir.recipe.tasks import Tasks
from tafkir.recipe.trm import TrmConfig
from tafkir.records import STAGES, StageName
from tafkir.runlog.trackers import TrackerName

__all__ = [
    "STAGES",
    "AugmentConfig",
    "ConversationTable",
    "DataConfig",
    "DecayShape",
    "DpoConfig",
    "EmaConfig",
    "EvalConfig",
    "LabConfig",
    "LanguageTable",
    "MtpStageConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreferencesConfig",
    "PretrainConfig",
    "QatConfig",
    "QuantizeConfig",
    "Recipe",
    "ReportConfig",
    "RewardConfig",
    "RlhfConfig",
    "RlvrConfig",
    "SelectConfig",
    "SftConfig",
    "StageName",
    "TokenizerConfig",
    "TrainTable",
    "TrmConfig",
]


class AugmentConfig(Table):
    """Fresh variants of training problems whose answer is recomputed from the equations."""

    renumber: float = Field(0.8, ge=0, le=1, description="Share of drawn problems that get new numbers.")
    rename: float = Field(0.5, ge=0, le=1, description="Share of drawn problems that get new names.")
    max_number: int = Field(999, ge=10, description="Largest number that renumbering may draw or produce.")


class DataConfig(Table):
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


class TokenizerConfig(Table):
    """Byte-level BPE with single digits, trained on the training problems."""

    vocab_size: int = Field(2048, ge=300, description="Entries, the special tokens among them.")


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
    pack_tokens: int = Field(
        0, ge=0, description="Largest packed row, in tokens: a step's documents fill as many as they need; 0 sets none."
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


class ConversationTable(TrainTable):
    """What the stages that read solved problems in the chat format have in common."""

    batch_problems: Positive = Field(48, description="Conversations per optimiser step.")
    story_share: float = Field(0.3, ge=0, le=1, description="Share of conversations about made-up problems.")
    crowded_share: float = Field(
        0.5, ge=0, le=1, description="Share of the made-up problems with more numbers than the question needs."
    )
    tasks: Tasks = Field((), description="Kinds of solved problems to learn from; none means the word problems alone.")


class SftConfig(LanguageTable, ConversationTable):
    """Next-token loss on the assistant's chain of thought only, in the chat format."""

    epochs: float = Field(
        0.0, ge=0, description="Passes over the training problems, in place of steps; 0 counts by steps."
    )
    select: SelectConfig | None = None

    @model_validator(mode="after")
    def _check_sft(self) -> Self:
        if self.tasks and self.epochs:
            raise ValueError("epochs counts word problems, and tasks draws others: set steps")
        if self.select and (self.ema or not self.checkpoint_every):
            raise ValueError("select chooses among what checkpoint_every keeps, without ema: set it above 0")
        return self


class MtpStageConfig(ConversationTable):
    """Multi-token-prediction layers for a finished model, which learn to foresee what it will say.

    The model stays as it is, bit for bit: only the layers learn, those of `[model.mtp]` or new ones.
    """

    depth: Positive = Field(1, description="Layers to add to a model without any; layer k looks k + 1 tokens ahead.")


class EvalConfig(Table):
    """Held-out accuracy of every stage, with intervals."""

    samples: Positive = Field(4, description="k of avg@k.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of avg@k.")
    max_tokens: Positive = Field(128, description="Length limit of an answer.")
    max_problems: int = Field(0, ge=0, description="Evaluate only the first this many problems per source; 0 is all.")
    split: Literal["validation", "test"] = Field("test", description="Which held-out part is scored.")
    stages: tuple[Literal["base", "pretrain", "sft", "dpo", "rlvr", "rlhf", "qat", "ptq", "quantize"], ...] = Field(
        ("sft", "rlvr"),
        min_length=1,
        description="Stages whose checkpoints are scored; ptq is what qat.baseline keeps for comparison.",
    )
    activations: Literal["exact", "quantized"] = Field(
        "exact", description="Inputs of matrices that a checkpoint has in NVFP4 with them: as they are, or rounded."
    )
    kv_cache: Literal["auto", "fp8", "nvfp4"] = Field(
        "auto", description="Numbers of the cache: as the weights', one byte each, or 4.5 bits."
    )
    tasks: Tasks = Field((), description="Kinds of problems to score, level by level; none means the word problems.")


class ReportConfig(Table):
    """The page that explains the run."""

    sample_chains: int = Field(10, ge=0, description="Sample chains to show, with verdicts.")


class ParallelConfig(Table):
    """How the processes of `torchrun` share a training stage: their number is the product of the three sizes."""

    data_parallel: Literal[-1] | Positive = Field(
        -1, description="Ranks that split the data, and shard weights and moments (FSDP2); -1 takes the rest."
    )
    expert_parallel: Positive = Field(1, description="Ranks that split the data, and share out the experts.")
    tensor_parallel: Positive = Field(1, description="Ranks that split heads and the width of every MLP.")
    device: Literal["cpu", "auto", "cuda", "npu", "mps"] = Field(
        "cpu", description="Where training computes: cuda is also ROCm, npu is Ascend, auto the best that is there."
    )


class Recipe(Table):
    """One recipe: a model, its data and the stages that make it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the run directory.")
    description: str = Field("", description="One line for `tafkir recipe ls`.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0 takes the physical cores, at most 8.")
    kernels: KernelChoice = Field(
        "auto", description="Float32 ops on the CPU: compiled kernels, torch alone, or what is built (auto)."
    )
    track: tuple[TrackerName, ...] = Field(
        (), description="Where training stages write their numbers besides metrics.jsonl: tensorboard, wandb."
    )
    base: str | None = Field(None, description="Bundled or local checkpoint that the first training stage starts from.")
    parallel: ParallelConfig = ParallelConfig()
    cluster: ClusterConfig | None = None
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig | None = None
    pretrain: PretrainConfig | None = None
    preferences: PreferencesConfig = PreferencesConfig()
    sft: SftConfig | None = None
    reward: RewardConfig | None = None
    dpo: DpoConfig | None = None
    rlvr: RlvrConfig | None = None
    rlhf: RlhfConfig | None = None
    qat: QatConfig | None = None
    mtp: MtpStageConfig | None = None
    quantize: QuantizeConfig | None = None
    eval: EvalConfig | None = None
    lab: LabConfig | None = None
    trm: TrmConfig | None = None
    report: ReportConfig | None = None

    @model_validator(mode="after")
    def _check_qat(self) -> Self:
        if self.qat is not None and self.quantize is None:
            raise ValueError("[qat] trains for the formats of a [quantize], which is not there")
        if self.qat is not None and self.quantize is not None and (self.quantize.calibration or self.quantize.auto):
            raise ValueError(
                "[qat] needs formats and scales made of weights alone: leave out quantize.calibration and auto"
            )
        if self.eval is not None and "ptq" in self.eval.stages and not (self.qat and self.qat.baseline):
            raise ValueError("eval.stages has ptq, which only qat.baseline = true makes")
        return self
