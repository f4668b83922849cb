"""What each training stage of a recipe does: load what came before, fit, write a checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tafkir.checkpoint.load import load_checkpoint, load_config, outline_checkpoint
from tafkir.checkpoint.save import save_checkpoint
from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.loader import (
    PretrainStream,
    PromptStream,
    SftStream,
    heldout_conversations,
    heldout_documents,
    repeat_sources,
)
from tafkir.data.packing import Document
from tafkir.data.stories import make_story
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import CheckpointError
from tafkir.models.build import add_mtp, build_decoder, stretch_context
from tafkir.models.decoder import Decoder
from tafkir.ops.native import select_kernels
from tafkir.recipe.model import ModelConfig, MtpConfig
from tafkir.recipe.parallel import world_size
from tafkir.recipe.schema import ConversationTable, MtpStageConfig, PretrainConfig, SftConfig, TrainTable
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.runlog.rollouts import Keep, RolloutLog
from tafkir.tasks.math import WordProblems
from tafkir.tasks.mixture import MixtureStream, TaskMixture, solved_texts
from tafkir.train.copies import open_copies
from tafkir.train.language import DocumentBatch, language_step, validation_loss
from tafkir.train.long_tail import open_rollouts
from tafkir.train.loop import FitResult, Trainer, fit
from tafkir.train.monitor import MismatchMonitor
from tafkir.train.mtp import measure_mtp
from tafkir.train.mtp_distill import distill_step, freeze_all_but_mtp
from tafkir.train.ranks import open_ranks
from tafkir.train.rlvr import RlvrStep
from tafkir.train.selection import select_checkpoint
from tafkir.train.state import Carried
from tafkir.train.task_rollouts import open_tasks

__all__ = [
    "as_written",
    "finish_policy",
    "keep_checkpoints",
    "open_policy",
    "run_mtp",
    "run_pretrain",
    "run_rlvr",
    "run_sft",
    "run_tokenizer",
    "save_policy",
]

_NUM_TOKENIZER_STORIES = 2000
_NUM_TOKENIZER_TASKS = 500
_NUM_HELDOUT_TASKS = 20


def run_tokenizer(ctx: StageContext) -> dict[str, Any]:
    """Train the tokenizer on training problems, their solutions and stories; writes `checkpoint/tokenizer.json`."""
    assert ctx.recipe.tokenizer is not None
    corpus = load_corpus(ctx.recipe.data)
    problems = list(corpus.train)
    if ctx.recipe.pretrain is not None and ctx.recipe.pretrain.story_share > 0:
        problems += [make_story(derive_seed(ctx.seed, "tokenizer", i)) for i in range(_NUM_TOKENIZER_STORIES)]
    texts = [problem.question for problem in problems]
    texts += ["\n".join(map(str, problem.steps)) for problem in problems if problem.steps]
    if ctx.recipe.sft is not None and ctx.recipe.sft.tasks:
        mixture = TaskMixture(ctx.recipe.sft.tasks, WordProblems())
        texts += solved_texts(mixture, _NUM_TOKENIZER_TASKS, derive_seed(ctx.seed, "tokenizer", "tasks"))
    tokenizer = Tokenizer.train(texts, ctx.recipe.tokenizer.vocab_size)
    tokenizer.save(ctx.stage.checkpoint_dir)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    return {
        "vocab_size": tokenizer.vocab_size,
        "texts": len(texts),
        "characters_per_token": sum(map(len, texts)) / tokens,
    }


def run_pretrain(ctx: StageContext) -> dict[str, Any]:
    """Next-token training from fresh weights, or from the recipe's base."""
    config = ctx.recipe.pretrain
    assert config is not None
    corpus, decoder, tokenizer = _start(ctx, shared=world_size() > 1)
    stream = PretrainStream(
        repeat_sources(corpus.train, ctx.recipe.data.repeat),
        tokenizer,
        ctx.recipe.data.augment,
        batch_problems=config.batch_problems,
        drill_share=config.drill_share,
        story_share=config.story_share,
        crowded_share=config.crowded_share,
        question_loss=config.question_loss,
        seed=derive_seed(ctx.seed, "pretrain"),
    )
    heldout: list[Document] = list(heldout_documents(corpus.validation, tokenizer))
    return _fit_language(ctx, config, decoder, tokenizer, stream.batch_at, heldout, corpus)


def run_sft(ctx: StageContext) -> dict[str, Any]:
    """Supervised fine-tuning on chains of thought in the chat format."""
    config = ctx.recipe.sft
    assert config is not None
    corpus, decoder, tokenizer = _start(ctx, shared=world_size() > 1)
    if config.epochs:
        usable = sum(bool(problem.steps) for problem in repeat_sources(corpus.train, ctx.recipe.data.repeat))
        steps = max(1, math.ceil(config.epochs * usable / config.batch_problems))
        config = config.model_copy(update={"steps": steps})
    return _fit_language(ctx, config, decoder, tokenizer, *_conversations(ctx, config, tokenizer, corpus), corpus)


def run_mtp(ctx: StageContext) -> dict[str, Any]:
    """Distillation of the model, which stays as it is, into multi-token-prediction layers that draft for it."""
    config = ctx.recipe.mtp
    assert config is not None
    corpus, decoder, tokenizer = _start(ctx, shared=world_size() > 1)
    freeze_all_but_mtp(decoder)
    return _fit_language(ctx, config, decoder, tokenizer, *_conversations(ctx, config, tokenizer, corpus), corpus)


def _conversations(
    ctx: StageContext, config: ConversationTable, tokenizer: Tokenizer, corpus: Corpus
) -> tuple[DocumentBatch, list[Document]]:
    """Solved problems in the chat format, of words or of the tasks that the recipe names, and some held-out ones."""
    seed = derive_seed(ctx.seed, ctx.stage.kind)
    words = SftStream(
        repeat_sources(corpus.train, ctx.recipe.data.repeat),
        tokenizer,
        ctx.recipe.data.augment,
        batch_problems=config.batch_problems,
        story_share=config.story_share,
        crowded_share=config.crowded_share,
        seed=seed,
    )
    if not config.tasks:
        return words.batch_at, list(heldout_conversations(corpus.validation, tokenizer))
    mixture = TaskMixture(config.tasks, WordProblems())
    stream = MixtureStream(mixture, tokenizer, per_step=config.batch_problems, seed=seed, word_conversation=words.at)
    heldout = TaskMixture(config.tasks, WordProblems(), samples=_NUM_HELDOUT_TASKS, seed=seed)
    documents: list[Document] = [
        stream.solved(example) for example in heldout.examples("validation") if example.extra.get("level")
    ]
    return stream.solved_batch_at, documents


def run_rlvr(ctx: StageContext) -> dict[str, Any]:
    """Reinforcement learning on training problems, rolled out by the completer that the context builds."""
    config = ctx.recipe.rlvr
    assert config is not None
    corpus, decoder, tokenizer = _start(ctx)
    assert ctx.previous is not None
    problems = [p for p in corpus.train if not config.max_steps or len(p.steps) <= config.max_steps]
    stream = PromptStream(
        repeat_sources(problems, ctx.recipe.data.repeat),
        tokenizer,
        ctx.recipe.data.augment,
        prompts_per_step=config.prompts_per_step,
        story_share=config.story_share,
        max_steps=config.max_steps,
        seed=derive_seed(ctx.seed, "rlvr"),
    )
    trainer = Trainer(decoder, config, open_copies(ctx.recipe.parallel))
    completer = ctx.build_completer(ctx.previous)
    seed = derive_seed(ctx.seed, "rlvr")
    tasks = open_tasks(config, tokenizer, completer, WordProblems(), stream, folder=ctx.stage.path, seed=seed)
    rollouts = open_rollouts(
        completer,
        tokenizer,
        ctx.share_grading(tasks.task),
        tasks.prompts,
        config,
        weights=lambda: trainer.decoder.state_dict().items(),
        seed=seed,
        ranks=trainer.ranks,
    )
    rollouts = tasks.watch(rollouts)
    reference = copy.deepcopy(decoder).requires_grad_(False) if config.kl.coef > 0 else None
    log = RolloutLog(ctx.stage.rollouts_dir, Keep.parse(config.keep_rollouts if trainer.is_main else "none"))
    monitor = MismatchMonitor(
        config.monitor,
        config.acceptance,
        path=ctx.stage.path / "mismatch.jsonl" if trainer.is_main else None,
        decode=lambda ids: tokenizer.decode(list(ids)),
    )
    step = RlvrStep(trainer, rollouts, config, reference=reference, log=log, monitor=monitor)
    keep = keep_checkpoints(ctx, trainer, tokenizer)
    carried: dict[str, Carried] = {"rollouts": rollouts, "monitor": monitor}
    result = fit(trainer, ctx.stage, step, keep=keep, carried=carried, label="rlvr")
    return _finish(ctx, config, trainer, tokenizer, result, corpus)


def _start(ctx: StageContext, *, shared: bool = False) -> tuple[Corpus, Decoder, Tokenizer]:
    """The problems, and the decoder and tokenizer to go on with; fresh weights where there is only a tokenizer."""
    corpus = load_corpus(ctx.recipe.data)
    return corpus, *open_policy(ctx, shared=shared)


def open_policy(ctx: StageContext, *, shared: bool = False) -> tuple[Decoder, Tokenizer]:
    """The decoder and tokenizer to go on with; fresh weights where there is only a tokenizer.

    Args:
        shared: whether many processes train it; what they read of a checkpoint comes on the meta device.

    Raises:
        CheckpointError: there is nothing to start from, or it is another model than the recipe's.
    """
    torch.set_num_threads(ctx.recipe.threads)
    select_kernels(ctx.recipe.kernels)
    if ctx.previous is None:
        raise CheckpointError(
            "there is nothing to start from",
            where=f"stage {ctx.stage.kind}",
            fix="add a [tokenizer] stage to the recipe, or set base",
        )
    tokenizer = Tokenizer.load(ctx.previous)
    # Only a tokenizer stage leaves a folder without a model; elsewhere its absence is damage.
    if ctx.previous == ctx.run.stage("tokenizer").checkpoint_dir:
        _check_vocabulary(ctx.recipe.model, tokenizer, ctx.previous)
        return build_decoder(ctx.recipe.model, derive_seed(ctx.seed, "weights")), tokenizer
    wanted = ctx.recipe.model
    if ctx.stage.kind == "mtp" and ctx.recipe.mtp is not None and wanted.mtp is None:
        wanted = wanted.model_copy(update={"mtp": MtpConfig(depth=ctx.recipe.mtp.depth)})
    found = load_config(ctx.previous)
    # Chat models are published without these layers; reinforcement learning, which does not train them, adds none.
    adds_mtp = wanted.mtp is not None and found.mtp is None and ctx.stage.kind in ("pretrain", "sft", "mtp")
    # A context is stretched once; a stretched checkpoint says itself that it is.
    scaling = wanted.rope_scaling if found.rope_scaling is None else None
    given = ({"mtp": None} if adds_mtp else {}) | ({"rope_scaling": None} if scaling else {})
    _check_shape(found, wanted.model_copy(update=given), ctx.previous)
    # Where many share the stage, each reads its own part once it knows it; a decoder that grows is read whole.
    outline = shared and not adds_mtp
    decoder = outline_checkpoint(ctx.previous) if outline else load_checkpoint(ctx.previous).decoder
    if scaling is not None:
        decoder = stretch_context(decoder, scaling, wanted.max_position_embeddings)
    if adds_mtp and wanted.mtp is not None:
        add_mtp(decoder, wanted.mtp, derive_seed(ctx.seed, "mtp"))
    return decoder, tokenizer


def _check_vocabulary(model: ModelConfig, tokenizer: Tokenizer, where: Path) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} entries",
            where=str(where),
            expected=f"at most model.vocab_size={model.vocab_size}",
            fix="set model.vocab_size and tokenizer.vocab_size to the same number",
        )


def _check_shape(found: ModelConfig, wanted: ModelConfig, where: Path) -> None:
    """The checkpoint must be the model that the recipe describes."""
    have, want = found.model_dump(), wanted.model_dump()
    free = {"initializer_range", "rotary_dim", "partial_rotary_factor", "max_position_embeddings"}
    different = [key for key in want if key not in free and have[key] != want[key]]
    if found.rotary_size != wanted.rotary_size:
        different.append("partial_rotary_factor")
    if different:
        shown = ", ".join(f"{key}={have[key]} (recipe: {want[key]})" for key in different)
        raise CheckpointError(
            f"the checkpoint is another model: {shown}",
            where=str(where),
            fix="give the recipe's [model] table the checkpoint's values, or start from another checkpoint",
        )


def _fit_language(
    ctx: StageContext,
    config: PretrainConfig | SftConfig | MtpStageConfig,
    decoder: Decoder,
    tokenizer: Tokenizer,
    documents: DocumentBatch,
    heldout: list[Document],
    corpus: Corpus,
) -> dict[str, Any]:
    source = ctx.previous if decoder.embed_tokens.weight.is_meta else None
    trainer = Trainer(decoder, config, open_ranks(ctx.recipe.parallel, ctx.recipe.model), source)
    distills = isinstance(config, MtpStageConfig)
    trains_mtp = isinstance(config, MtpStageConfig) or bool(config.mtp_loss_weight or config.mtp_final_loss_weight)

    def validate() -> Mapping[str, float]:
        row = {"validation/loss": validation_loss(decoder, heldout, ranks=trainer.ranks)}
        if trains_mtp:
            row |= {f"validation/{name}": value for name, value in measure_mtp(decoder, heldout).items()}
        if trainer.average is not None:
            with trainer.average.applied():
                row["validation/average_loss"] = validation_loss(decoder, heldout, ranks=trainer.ranks)
        return row

    build_step = distill_step if distills else language_step
    step = build_step(trainer, documents, label=ctx.stage.kind)
    keep = keep_checkpoints(ctx, trainer, tokenizer)
    result = fit(trainer, ctx.stage, step, validate=validate if heldout else None, keep=keep, label=ctx.stage.kind)
    selected: dict[str, Any] = {}
    if isinstance(config, SftConfig) and config.select:
        keep(config.steps)
        selected["select"] = select_checkpoint(ctx, config.select, trainer, tokenizer, corpus.validation)
    finished = _finish(ctx, config, trainer, tokenizer, result, corpus) | selected
    if trains_mtp and heldout:
        with as_written(trainer, config):
            finished["mtp"] = measure_mtp(decoder, heldout)
    return finished


def save_policy(ctx: StageContext, trainer: Trainer, path: Path, tokenizer: Tokenizer, **lineage: Any) -> None:
    """Write a checkpoint; many ranks gather their parts, and one of them writes."""
    decoder = trainer.ranks.whole(trainer.decoder)
    if decoder is None:
        return
    lineage = {"recipe": ctx.recipe.name, "stage": ctx.stage.kind, **lineage, "seed": ctx.seed}
    dtype = getattr(torch, trainer.config.checkpoint_dtype)
    save_checkpoint(path, decoder, tokenizer=tokenizer, extra=lineage, dtype=dtype)


def keep_checkpoints(ctx: StageContext, trainer: Trainer, tokenizer: Tokenizer) -> Callable[[int], None]:
    """Writes `checkpoints/step-<n>`, as the weights are after n steps: what `tafkir merge` takes."""

    def keep(done: int) -> None:
        path = ctx.stage.path / "checkpoints" / f"step-{done:08d}"
        save_policy(ctx, trainer, path, tokenizer, steps=done)

    return keep


def as_written(trainer: Trainer, config: TrainTable) -> AbstractContextManager[None]:
    """The decoder with the weights that its checkpoint holds: their average, or the last ones."""
    if trainer.average is not None and config.ema is not None and config.ema.checkpoint:
        return trainer.average.applied()
    return nullcontext()


def _finish(
    ctx: StageContext, config: TrainTable, trainer: Trainer, tokenizer: Tokenizer, result: FitResult, corpus: Corpus
) -> dict[str, Any]:
    return finish_policy(ctx, config, trainer, tokenizer, result) | {"train_problems": corpus.counts()}


def finish_policy(
    ctx: StageContext, config: TrainTable, trainer: Trainer, tokenizer: Tokenizer, result: FitResult
) -> dict[str, Any]:
    """Write the checkpoint, from the weights or from their average, and say what the stage did."""
    averaged = {"ema_decay": config.ema.decay} if config.ema is not None and config.ema.checkpoint else {}
    with as_written(trainer, config):
        save_policy(ctx, trainer, ctx.stage.checkpoint_dir, tokenizer, steps=result.steps, **averaged)
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "peak_rss_bytes": result.peak_rss_bytes,
    }
