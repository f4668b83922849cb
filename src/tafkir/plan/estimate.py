"""Time and memory of each stage of a recipe, from counts of FLOPs and a stated rate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tafkir.recipe.lab import MismatchLabConfig, ResidualLabConfig
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.puzzles import ArcPuzzles
from tafkir.recipe.schema import DpoConfig, Recipe, RewardConfig, TrmConfig
from tafkir.records import STAGES, StageName

__all__ = ["ASSUMPTIONS", "Rates", "StageEstimate", "estimate_stages"]

_TOKENS_PER_PROBLEM = 92
_PROMPT_TOKENS = 60
_COMPLETION_SHARE = 0.5
# Tokens of a pair, both answers, as a share of the limit on its prompt and longer answer.
_PAIR_SHARE = 0.8
_PAIRS_OF_A_SOURCE = 300
_MADE_UP_TOKENS = 130
_TRAINING_PROBLEMS = {"gsm8k": 7173, "svamp": 600}
_TRAINING_OF_ONES_OWN = 2000
_HELD_OUT_PROBLEMS = {"gsm8k": 1319, "svamp": 300}
_HELD_OUT_OF_ONES_OWN = 500
_PROCESS_BYTES = 450 << 20
_SMALL_STAGE_S = 5.0
# Floats that a block keeps for the backward pass, per token and per unit of hidden size.
_ACTIVATIONS_PER_HIDDEN = 40
# The same for residual streams, per sublayer and stream.
_ACTIVATIONS_PER_STREAM = 3
# Narrow models and streams move bytes more than they multiply: time over that of the multiplications (measured).
_LAB_SLOWDOWN = {"plain": 3.0, "hc": 7.0, "mhc": 7.0}


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s that one CPU thread sustains on models of a few million parameters (measured on AVX-512 cores)."""

    train: float = 23e9
    decode: float = 11e9


_RATES = Rates()

ASSUMPTIONS = (
    f"{_TOKENS_PER_PROBLEM} tokens a problem with its solution; rollouts end after {_COMPLETION_SHARE:.0%} of their "
    f"limit; {_RATES.train / 1e9:.0f} GFLOP/s a thread in training and {_RATES.decode / 1e9:.0f} in generation; float32"
)


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What one stage is expected to take."""

    kind: StageName
    tokens: int
    flops: float
    seconds: float
    memory_bytes: int


# Measured with benchmarks/rollout_precision.py; and what a step of the mismatch laboratory takes besides arithmetic.
_QUANTIZED_INPUTS_SLOWDOWN = 5.0
_STEP_S = 0.1
# The recursion runs on narrow matrices; puzzles of a file that is not read here.
_TRM_RATE = 35e9
_SYMBOLS, _CELLS_OF_ONES_OWN = 11, 81


@dataclass(frozen=True, slots=True)
class _Work:
    """Tokens of a whole stage that are trained on and sampled, and tokens whose activations are held at once."""

    trained: int = 0
    sampled: int = 0
    batch: int = 0


def estimate_stages(recipe: Recipe, *, rates: Rates | None = None) -> list[StageEstimate]:
    """One estimate per stage of the recipe, in order.

    Args:
        recipe: resolved, so that `threads` is a number.
        rates: measured rates, where they are known.
    """
    rates = rates or _RATES
    return [_estimate(kind, recipe, rates) for kind in STAGES if getattr(recipe, kind) is not None]


def _estimate(kind: StageName, recipe: Recipe, rates: Rates) -> StageEstimate:
    if kind == "lab" and recipe.lab:
        if isinstance(recipe.lab, ResidualLabConfig):
            return _estimate_lab(recipe, recipe.lab, rates)
        return _estimate_mismatch_lab(recipe, recipe.lab, rates)
    if kind == "trm" and recipe.trm:
        return _estimate_trm(recipe, recipe.trm)
    work = _work(kind, recipe)
    if not work.trained and not work.sampled:
        return StageEstimate(kind, 0, 0.0, _SMALL_STAGE_S, _PROCESS_BYTES)
    # A trained token takes three forwards' worth (forward, and backward twice), a sampled one takes one.
    forward = float(recipe.model.flops_per_token(_TOKENS_PER_PROBLEM // 2))
    train, decode = 3 * forward * work.trained, forward * work.sampled
    seconds = (train / rates.train + decode / rates.decode) / max(1, recipe.threads)
    memory = _memory_bytes(recipe.model, work.batch)
    return StageEstimate(kind, work.trained or work.sampled, train + decode, seconds, memory)


def _estimate_trm(recipe: Recipe, config: TrmConfig) -> StageEstimate:
    """Passes of the recursion, in training and in measuring; what the passes with a gradient keep decides on memory."""
    cells = config.puzzles.num_cells or _CELLS_OF_ONES_OWN
    shape = config.model.for_puzzles(_SYMBOLS, cells, grid_columns=getattr(config.puzzles, "columns", None))
    flops = 0.0
    for (recursions, latent_steps), steps in Counter(map(config.depth_at, range(config.steps))).items():
        depth = {"num_recursions": recursions, "num_latent_steps": latent_steps}
        flops += steps * config.batch_size * shape.model_copy(update=depth).flops_per_supervision_step(train=True)
    validations = config.steps // config.validate_every if config.validate_every else 1
    voters = config.puzzles.num_voters if isinstance(config.puzzles, ArcPuzzles) else 0
    solved = config.puzzles.num_test * (1 + voters) + validations * config.puzzles.num_validation
    flops += solved * shape.max_supervision_steps * shape.flops_per_supervision_step()
    # Each block keeps its input, the widened input and its result; the mixer about as much again as its input.
    kept = 2 * shape.intermediate_size(shape.hidden_size) + 6 * shape.hidden_size
    passes = 1 if config.recompute else shape.num_latent_steps + 1
    activations = config.batch_size // config.micro_batches * shape.num_positions * shape.num_hidden_layers * kept
    memory = _PROCESS_BYTES + 4 * (5 * shape.num_parameters() + passes * activations)
    if isinstance(config.puzzles, ArcPuzzles):
        # The table of puzzle vectors has no moments and no average, but the best one so far is kept beside it.
        memory += 4 * 2 * config.puzzles.expected_puzzle_ids * config.model.puzzle_embedding_size
    seconds = flops / _TRM_RATE / max(1, recipe.threads)
    return StageEstimate("trm", config.steps * config.batch_size * cells, flops, seconds, memory)


def _estimate_mismatch_lab(recipe: Recipe, config: MismatchLabConfig, rates: Rates) -> StageEstimate:
    """Every variant samples and trains alike; with quantized activations sampling is slower by far."""
    completions = config.prompts_per_step * config.group_size
    sampled = config.steps * completions * (config.digits + 1)
    trained = config.steps * config.prompts_per_step * (config.digits + 1) + sampled
    forward = float(recipe.model.flops_per_token(config.digits))
    flops = seconds = 0.0
    num_variants = 0
    for name, runs in Counter(rollout for rollout, *_ in config.variants()).items():
        slowdown = _QUANTIZED_INPUTS_SLOWDOWN if name == "nvfp4_w4a4" else 1.0
        num_variants += runs
        flops += runs * forward * (3 * trained + sampled)
        seconds += runs * forward * (3 * trained / rates.train + slowdown * sampled / rates.decode)
        # Small models wait for the interpreter, whatever their arithmetic.
        seconds += runs * config.steps * _STEP_S * slowdown
    seconds /= max(1, recipe.threads)
    memory = _memory_bytes(recipe.model, trained // config.steps)
    return StageEstimate("lab", num_variants * trained, flops, seconds, memory)


def _estimate_lab(recipe: Recipe, config: ResidualLabConfig, rates: Rates) -> StageEstimate:
    """Every variant by its own depth and kind; the largest one decides on memory."""
    batch = config.batch_sequences * config.sequence_length
    tokens = config.seeds * config.steps * batch
    flops = seconds = 0.0
    memory = 0
    for depth in config.depths:
        for kind in config.kinds:
            residual = recipe.model.residual.model_copy(update={"kind": kind})
            model = recipe.model.model_copy(update={"num_hidden_layers": depth, "residual": residual})
            own = 3.0 * model.flops_per_token(config.sequence_length // 2) * tokens
            flops += own
            seconds += _LAB_SLOWDOWN[kind] * own / rates.train / max(1, recipe.threads)
            streams = residual.num_streams * _ACTIVATIONS_PER_STREAM if kind != "plain" else 0
            memory = max(memory, _memory_bytes(model, batch) + 4 * batch * 2 * depth * streams * model.hidden_size)
    return StageEstimate("lab", tokens * len(config.depths) * len(config.kinds), flops, seconds, memory)


def _work(kind: StageName, recipe: Recipe) -> _Work:
    if kind in ("pretrain", "sft"):
        table = recipe.pretrain if kind == "pretrain" else recipe.sft
        assert table is not None
        batch = table.batch_problems * _TOKENS_PER_PROBLEM
        steps: float = table.steps
        if recipe.sft and kind == "sft" and recipe.sft.epochs:
            problems = sum(_TRAINING_PROBLEMS.get(source, _TRAINING_OF_ONES_OWN) for source in recipe.data.sources)
            steps = recipe.sft.epochs * problems / table.batch_problems
        at_once = min(batch // table.micro_batches, table.pack_tokens or batch)
        return _Work(trained=int(steps * batch), batch=at_once)
    if kind == "mtp" and recipe.mtp:
        batch = recipe.mtp.batch_problems * _TOKENS_PER_PROBLEM
        # the model's own forward is a third of what a trained token takes, and its few extra layers are not counted
        return _Work(trained=recipe.mtp.steps * batch // 3, batch=batch // recipe.mtp.micro_batches)
    if kind == "qat" and recipe.qat:
        batch = recipe.qat.batch_problems * _TOKENS_PER_PROBLEM
        own = recipe.qat.batch_problems * recipe.qat.max_completion_tokens * _COMPLETION_SHARE
        sampled = int(recipe.qat.steps * own) if recipe.qat.data == "answers" else 0
        # The teacher's forward is a third of what a trained token takes.
        trained = recipe.qat.steps * batch * (4 if recipe.qat.objective == "distill" else 3) // 3
        return _Work(trained=trained, sampled=sampled, batch=batch // recipe.qat.micro_batches)
    if kind in ("reward", "dpo"):
        return _pair_work(recipe.reward if kind == "reward" else recipe.dpo, recipe)
    config = recipe.rlvr if kind == "rlvr" else recipe.rlhf if kind == "rlhf" else None
    if config is not None:
        completions = config.prompts_per_step * config.group_size
        sampled = int(completions * config.max_completion_tokens * _COMPLETION_SHARE)
        # A group's prompt is computed once for all its completions.
        batch = config.prompts_per_step * _PROMPT_TOKENS + sampled
        trained = config.steps * batch * config.updates_per_rollout
        return _Work(trained=trained, sampled=config.steps * sampled, batch=batch // config.micro_batches)
    if kind == "eval" and recipe.eval:
        held_out = [_HELD_OUT_PROBLEMS.get(source, _HELD_OUT_OF_ONES_OWN) for source in recipe.data.sources]
        limit = recipe.eval.max_problems
        answers = sum(min(limit or count, count) for count in held_out) * (recipe.eval.samples + 1)
        return _Work(sampled=int(answers * len(recipe.eval.stages) * recipe.eval.max_tokens * _COMPLETION_SHARE))
    return _Work()


def _pair_work(table: RewardConfig | DpoConfig | None, recipe: Recipe) -> _Work:
    """A prompt is computed once for both answers; DPO's reference and a second model are small beside that."""
    assert table is not None
    config = recipe.preferences
    read = _PAIRS_OF_A_SOURCE * len(config.sources)
    tokens = read * config.max_length * _PAIR_SHARE + config.made_up * min(_MADE_UP_TOKENS, config.max_length)
    batch = int(table.batch_pairs * tokens / (read + config.made_up))
    models = 1 + bool(recipe.reward and table is recipe.reward and recipe.reward.judge_share)
    return _Work(trained=models * table.steps * batch, batch=batch // table.micro_batches)


def _memory_bytes(model: ModelConfig, batch_tokens: int) -> int:
    """Weights, gradients and two AdamW moments; activations kept for the backward pass; logits and their gradient."""
    states = 4 * model.num_parameters() * (4 if batch_tokens else 1)
    activations = 4 * batch_tokens * model.num_hidden_layers * _ACTIVATIONS_PER_HIDDEN * model.hidden_size
    logits = 4 * batch_tokens * model.vocab_size * 3
    return _PROCESS_BYTES + states + activations + logits
