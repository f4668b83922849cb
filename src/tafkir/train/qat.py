"""The `qat` stage: the model learns with its weights and inputs as the quantized checkpoint will have them.

Quantization-aware distillation (QAD, arXiv 2601.20088) by default: the model before, in full precision, teaches its own
distributions. The training code is that of the other stages; only what the parameters are worth during forward and
backward changes. Gradients go straight through to the full-precision weights that the optimiser moves.

Shapes: M target positions, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tafkir.data.corpus import Corpus, load_corpus
from tafkir.data.loader import PromptStream, SftStream, heldout_conversations, repeat_sources
from tafkir.data.packing import Document, pack_documents
from tafkir.data.tokenizer import Tokenizer
from tafkir.errors import TrainingError
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import IGNORE_INDEX, distillation_loss
from tafkir.protocols import Completer
from tafkir.recipe.qat import QatConfig
from tafkir.recipe.quantize import QuantizeConfig
from tafkir.recipe.seeds import derive_seed
from tafkir.recipe.stage import StageContext
from tafkir.records import Request, SamplingParams
from tafkir.train.language import DocumentBatch, language_step, split_evenly, validation_loss
from tafkir.train.loop import StepOutput, Trainer, add_loads, fit, router_metrics
from tafkir.train.mtp import run_decoder
from tafkir.train.stages import as_written, finish_policy, keep_checkpoints, open_policy

__all__ = ["AnswerStream", "BuildQuantizer", "QuantizedTrainer", "Quantizer", "distill_step", "divergence", "run_qat"]

_HELDOUT = 128


class Quantizer(Protocol):
    """What parameters are worth once they are quantized.

    Attributes:
        inside: of the last call, for parameters that were cut off in places: where they were not.
    """

    inside: dict[str, Tensor]

    def __call__(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters that change, float32, by name; a function of the weights alone."""
        ...


class BuildQuantizer(Protocol):
    """Lets a decoder quantize its matrices' inputs, and returns what quantizes its parameters."""

    def __call__(self, decoder: Decoder, config: QuantizeConfig, dtype: torch.dtype) -> Quantizer: ...


class QuantizedTrainer(Trainer):
    """A trainer whose decoder computes with quantized parameters between `enter` and the update that follows.

    Codes and scales are made once a step, from the weights as they are then. The update goes to the weights in full
    precision; where a search of scales has cut a weight off, it gets no gradient.
    """

    def __init__(self, decoder: Decoder, config: QatConfig, quantizer: Quantizer) -> None:
        super().__init__(decoder, config)
        self.quantizer = quantizer
        self._own: dict[str, Tensor] = {}

    def enter(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Let the parameters be what they, or other weights of the same names, are worth quantized."""
        parameters = dict(self.decoder.named_parameters())
        quantized = self.quantizer(parameters if weights is None else weights)
        for name, values in quantized.items():
            self._own[name] = parameters[name].data
            parameters[name].data = values

    def leave(self) -> None:
        """Give the parameters their own values again."""
        parameters = dict(self.decoder.named_parameters())
        for name, values in self._own.items():
            parameters[name].data = values
        self._own = {}

    @contextmanager
    def quantized(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """`enter`, and `leave` at the end of the block."""
        self.enter(weights)
        try:
            yield
        finally:
            self.leave()

    def update(self, loads: list[Tensor], *, where: str) -> float:
        """As `Trainer.update`, on the weights in full precision."""
        self.leave()
        for name, parameter in self.decoder.named_parameters():
            inside = self.quantizer.inside.get(name)
            if inside is not None and parameter.grad is not None:
                parameter.grad.mul_(inside)
        return super().update(loads, where=where)


class AnswerStream:
    """Problems with answers that a model samples itself; those are what is learnt.

    Args:
        completer: samples; its weights stay as they are.
        prompts: the problems of each step.
        params: how; the seed in them is ignored.
        seed: the answer to problem i of a step draws from the stream `derive_seed(seed, step, i)`.
    """

    def __init__(self, completer: Completer, prompts: PromptStream, params: SamplingParams, seed: int) -> None:
        self.completer, self.prompts, self.params, self.seed = completer, prompts, params, seed

    def batch_at(self, step: int) -> list[Document]:
        """Prompts and answers of a step, counted from 0, each with its mask of targets."""
        prompts = [ids for _, ids in self.prompts.batch_at(step)]
        requests = [
            Request(str(i), tuple(ids), replace(self.params, seed=derive_seed(self.seed, step, i)))
            for i, ids in enumerate(prompts)
        ]
        answers = {int(done.request_id): done.token_ids for done in self.completer.complete(requests)}
        return [([*ids, *answers[i]], [False] * len(ids) + [True] * len(answers[i])) for i, ids in enumerate(prompts)]


def distill_step(
    trainer: Trainer, teacher: Decoder, documents: DocumentBatch, *, label: str
) -> Callable[[int], StepOutput]:
    """A step function: mean KL(teacher || model) over all targets of the step, whatever the micro-batches.

    Both have one head, the decoder's, which stays as it is.
    """
    decoder = trainer.decoder

    def step(step: int) -> StepOutput:
        pieces = [pack_documents(part) for part in split_evenly(documents(step), trainer.config.micro_batches)]
        targets = sum(piece.num_targets for piece in pieces)
        if not targets:
            raise TrainingError("no document has anything to learn", where=f"{label} step {step + 1}")
        total = 0.0
        loads: list[Tensor] = []
        for piece in pieces:
            wanted = (piece.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
            with torch.no_grad():
                teacher_MD = run_decoder(teacher, piece).hidden_ND[wanted]
            out = run_decoder(decoder, piece)
            loss = distillation_loss(out.hidden_ND[wanted], teacher_MD, teacher.head_weight)
            (loss / targets).backward()
            total += loss.item()
            loads = add_loads(loads, out.expert_load)
        norm = trainer.update(loads, where=f"{label} step {step + 1}")
        tokens = sum(piece.input_ids_N.numel() for piece in pieces)
        return StepOutput(
            metrics={
                "train/kl": total / targets,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                **router_metrics(loads),
            },
            tokens=tokens,
            shown={"kl": total / targets},
        )

    return step


@torch.no_grad()
def divergence(decoder: Decoder, teacher: Decoder, documents: Sequence[Document], *, batch_size: int = 64) -> float:
    """Mean KL(teacher || decoder) at the targets of all documents, in nats per token."""
    total, targets = 0.0, 0
    for start in range(0, len(documents), batch_size):
        piece = pack_documents(documents[start : start + batch_size])
        wanted = (piece.labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        hidden = [run_decoder(model, piece).hidden_ND[wanted] for model in (decoder, teacher)]
        total += float(distillation_loss(hidden[0], hidden[1], teacher.head_weight))
        targets += len(wanted)
    return total / max(1, targets)


def run_qat(ctx: StageContext, *, build_quantizer: BuildQuantizer) -> dict[str, Any]:
    """Train the last policy for the formats of the recipe's `[quantize]`.

    Args:
        build_quantizer: what knows those formats.

    Returns:
        Besides the totals, on held-out problems: `kl_before` and `kl_after`, the divergence of the quantized model from
        the one in full precision without and with this stage, in nats per token.

    Raises:
        CheckpointError: there is no checkpoint before.
        RecipeError: the formats do not fit the model.
    """
    config, formats = ctx.recipe.qat, ctx.recipe.quantize
    assert config is not None and formats is not None
    corpus = load_corpus(ctx.recipe.data)
    decoder, tokenizer = open_policy(ctx)
    teacher = copy.deepcopy(decoder).requires_grad_(False)
    if config.objective == "distill":
        # Teacher and student share the head, and tied tables are both.
        for table in (decoder.embed_tokens, decoder.lm_head):
            if table is not None:
                table.requires_grad_(False)
    if decoder.mtp is not None:
        decoder.mtp.requires_grad_(False)
    quantizer = build_quantizer(decoder, formats, getattr(torch, config.checkpoint_dtype))
    trainer = QuantizedTrainer(decoder, config, quantizer)
    documents = _documents(ctx, config, corpus, tokenizer)
    if config.objective == "distill":
        inner = distill_step(trainer, teacher, documents, label="qat")
    else:
        inner = language_step(trainer, documents, label="qat")

    def step(step: int) -> StepOutput:
        trainer.enter()
        try:
            return inner(step)
        finally:
            trainer.leave()

    heldout: list[Document] = list(heldout_conversations(corpus.validation, tokenizer)[:_HELDOUT])

    def validate() -> Mapping[str, float]:
        with trainer.quantized():
            return {
                "validation/loss": validation_loss(decoder, heldout),
                "validation/kl": divergence(decoder, teacher, heldout),
            }

    keep = keep_checkpoints(ctx, trainer, tokenizer)
    result = fit(trainer, ctx.stage, step, validate=validate if heldout else None, keep=keep, label="qat")
    finished = finish_policy(ctx, config, trainer, tokenizer, result)
    if heldout:
        with trainer.quantized(dict(teacher.named_parameters())):
            finished["kl_before"] = divergence(decoder, teacher, heldout)
        with as_written(trainer, config), trainer.quantized():
            finished["kl_after"] = divergence(decoder, teacher, heldout)
    return finished | {"objective": config.objective, "train_problems": corpus.counts()}


def _documents(ctx: StageContext, config: QatConfig, corpus: Corpus, tokenizer: Tokenizer) -> DocumentBatch:
    """What each step learns on, as the recipe says."""
    problems = repeat_sources(corpus.train, ctx.recipe.data.repeat)
    seed = derive_seed(ctx.seed, "qat")
    if config.data == "solutions":
        return SftStream(
            problems,
            tokenizer,
            ctx.recipe.data.augment,
            batch_problems=config.batch_problems,
            story_share=config.story_share,
            seed=seed,
        ).batch_at
    prompts = PromptStream(
        problems,
        tokenizer,
        ctx.recipe.data.augment,
        prompts_per_step=config.batch_problems,
        story_share=config.story_share,
        seed=seed,
    )
    params = SamplingParams(
        temperature=config.temperature,
        max_tokens=config.max_completion_tokens,
        stop_token_ids=(tokenizer.turn_end_id,),
    )
    assert ctx.previous is not None
    return AnswerStream(ctx.build_completer(ctx.previous), prompts, params, derive_seed(seed, "answers")).batch_at
