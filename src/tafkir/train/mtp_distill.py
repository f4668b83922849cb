"""Multi-token-prediction layers for a finished model: they alone train, on what the frozen model itself predicts.

Shapes: M rows that a depth reads, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tafkir.data.packing import pack_documents
from tafkir.models.decoder import Decoder
from tafkir.ops.loss import IGNORE_INDEX, distillation_loss
from tafkir.train.language import DocumentBatch, split_evenly
from tafkir.train.loop import StepOutput, Trainer, router_metrics
from tafkir.train.mtp import MtpCounts, predict, predictor_of, run_decoder

__all__ = ["distill_step", "freeze_all_but_mtp"]


def freeze_all_but_mtp(decoder: Decoder) -> None:
    """Take the gradients of everything but the multi-token-prediction layers; the shared tables stay fixed, too."""
    decoder.requires_grad_(False)
    predictor_of(decoder).requires_grad_(True)


def distill_step(trainer: Trainer, documents: DocumentBatch, *, label: str) -> Callable[[int], StepOutput]:
    """A step function that trains the layers of a frozen decoder to foresee what that decoder will predict.

    Depth k at position i learns the decoder's own distribution at position i + k, by Kullback-Leibler divergence in
    the mean over depths: what speculative decoding accepts is agreement with the model, not with the text. Weights and
    router biases of the decoder are not touched.
    """
    decoder, ranks = trainer.decoder, trainer.ranks

    def step(step: int) -> StepOutput:
        parts = split_evenly(documents(step), trainer.config.micro_batches * ranks.sizes.data_shards)
        pieces = [pack_documents(part) for part in ranks.own(parts)]
        counts = MtpCounts(decoder, pieces, ranks)
        for piece, shifted in zip(pieces, counts.shifted, strict=True):
            with torch.no_grad():
                out = run_decoder(decoder, piece)
            terms = []
            for k, output in enumerate(predict(decoder, out, shifted)):
                if shifted[k].idle:
                    terms.append(counts.add(k, output.hidden_MD.new_zeros(()), output, idle=True))
                    continue
                wanted = (shifted[k].labels_M != IGNORE_INDEX).nonzero().squeeze(1)
                teacher_MD = out.hidden_ND[shifted[k].rows_M[wanted] + k + 1]
                loss = distillation_loss(output.hidden_MD[wanted], teacher_MD, decoder.head_weight)
                terms.append(counts.add(k, loss, output))
            if terms:
                torch.stack(terms).sum().backward()
        norm = trainer.update([], where=f"{label} step {step + 1}")
        counts.balance(trainer.config.expert_bias_update_rate)
        losses = counts.metrics("train/mtp_kl")
        tokens = int(ranks.sum(sum(piece.input_ids_N.numel() for piece in pieces)))
        mean = sum(losses.values()) / counts.depth
        return StepOutput(
            metrics={
                "train/loss": mean,
                **losses,
                "train/grad_norm": norm,
                "train/tokens": tokens,
                **router_metrics(ranks.sum_loads(counts.loads)),
            },
            tokens=tokens,
            shown={"loss": mean},
        )

    return step
