"""What quantizing has done to a checkpoint: every weight against its source, and the answers on text against its own.

Works on any pair of checkpoints of one architecture, whoever quantized them; reads a weight of each at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tafkir.checkpoint.cache_scales import find_cache_scales
from tafkir.checkpoint.load import load_checkpoint
from tafkir.checkpoint.read import WeightFiles
from tafkir.errors import CheckpointError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.quant.convert import open_source
from tafkir.quant.policy import component_of, layer_of
from tafkir.quant.relayout import cache_of
from tafkir.quant.served import load_served
from tafkir.quant.texts import Passage
from tafkir.quant.validate import check_scales
from tafkir.runlog.progress import Progress

__all__ = ["TensorAudit", "audit_cache", "audit_checkpoint", "compare_logits", "summarize_audit"]

_BLOCK = 16
_ROWS = 1 << 22  # weights looked at in one piece
_WORST = 3
_SMALLEST_KL, _BINS_PER_POWER = 1e-8, 6


@dataclass(frozen=True, slots=True)
class TensorAudit:
    """One weight, before and after.

    Attributes:
        name: of the weight.
        component: what it is.
        layer: the decoder layer that it is in; None outside of layers.
        format: how it is stored now; its dtype where it is stored as it is.
        parameters: how many numbers.
        source_bytes: scales included.
        output_bytes: scales included.
        relative_mse: squared error over squared weights.
        cosine: between both, as vectors.
        saturated: share of weights that are larger than the largest value their block can hold.
        underflowed: share of weights that are not zero and became zero.
        worst_blocks: index of the first weight and relative squared error of the worst blocks of 16.
    """

    name: str
    component: str
    layer: int | None
    format: str
    parameters: int
    source_bytes: int
    output_bytes: int
    relative_mse: float
    cosine: float
    saturated: float
    underflowed: float
    worst_blocks: tuple[tuple[int, float], ...]


def audit_checkpoint(source: Path | str, quantized: Path | str) -> list[TensorAudit]:
    """Compare every weight of a quantized checkpoint with the one that it was made of.

    Raises:
        CheckpointError: a weight is missing or left over, has another shape, or a scale is zero or not finite.
    """
    with open_source(source) as (before, hf_config), open_source(quantized) as (after, _):
        missing = sorted(set(before.names) ^ set(after.names))
        if missing:
            here = before if missing[0] in before.names else after
            raise CheckpointError(
                "only one of the two checkpoints has the weight",
                where=f"{here.listing.parent}: {missing[0]}",
                fix="compare a checkpoint with the one that it was made of",
            )
        check_scales(after, after.listing.parent, set())
        layers = int((hf_config.get("text_config") or hf_config).get("num_hidden_layers", 1 << 30))
        audits, total = [], sum(math.prod(before.shape(name)) for name in before.names)
        with Progress("verify (million weights)", max(1, total // 10**6)) as progress:
            done = 0
            for name in before.names:
                audits.append(_audit(name, before, after, layers))
                done += audits[-1].parameters
                progress.update(done // 10**6, relative_mse=audits[-1].relative_mse)
            progress.update(max(1, total // 10**6))
    return audits


def audit_cache(quantized: Path | str) -> dict[str, Any]:
    """What a quantized checkpoint says of the cache that engines shall keep.

    Returns:
        format: none, fp8 or nvfp4; layers: how many have scales; k_scale, v_scale: the smallest and the largest, None
        where there is none and engines take one.

    Raises:
        CheckpointError: a scale is not above zero and finite, only one of keys and values or only some layers have one,
            scales lie there and no cache is asked for, or its format is not known.
    """
    with open_source(quantized) as (files, hf_config):
        folder = files.listing.parent
        format, scales = cache_of(hf_config, folder), find_cache_scales(files)
    layers = int((hf_config.get("text_config") or hf_config).get("num_hidden_layers", len(scales)))
    missing = sorted(set(range(layers)) - scales.keys()) if scales else []
    if missing or (scales and format == "none"):
        what = (
            f"layer {missing[0]} has no scale of its cache" if missing else "scales of a cache, but none is asked for"
        )
        raise CheckpointError(what, where=str(folder), fix="quantize the checkpoint again")
    parts = {f"{part}_scale": [pair[i] for pair in scales.values()] for i, part in enumerate("kv")}
    return {
        "format": format,
        "layers": len(scales),
        **{name: (min(found), max(found)) if found else None for name, found in parts.items()},
    }


def _audit(name: str, before: WeightFiles, after: WeightFiles, layers: int) -> TensorAudit:
    if before.shape(name) != after.shape(name):
        raise CheckpointError(
            f"shape is {list(after.shape(name))}",
            where=f"{after.listing.parent}: {name}",
            expected=f"{list(before.shape(name))}, as in {before.listing.parent}",
        )
    encoded = after.encoded.get(name)
    error = norm = dot = other = 0.0
    saturated = underflowed = 0
    worst: list[tuple[int, float]] = []
    for start, x, y in _pieces(name, before, after):
        squared = (y - x).square_()
        error += float(squared.sum(dtype=torch.float64))
        norm += float(x.square().sum(dtype=torch.float64))
        other += float(y.square().sum(dtype=torch.float64))
        dot += float((x * y).sum(dtype=torch.float64))
        underflowed += int(((y == 0) & (x != 0)).sum())
        if encoded is not None and len(x) % _BLOCK == 0:
            size, largest = x.view(-1, _BLOCK).abs(), y.view(-1, _BLOCK).abs().amax(-1, keepdim=True)
            # More than rounding explains: of 4 and 6 the nearest to 5 is 4.
            saturated += int((size > largest * 1.26).logical_and_(largest > 0).sum())
            per_block = squared.view(-1, _BLOCK).sum(-1) / x.view(-1, _BLOCK).square().sum(-1).clamp_min(1e-30)
            values, places = per_block.topk(min(_WORST, len(per_block)))
            worst += [(start + _BLOCK * int(i), float(v)) for v, i in zip(values, places, strict=True)]
    count = math.prod(before.shape(name))
    return TensorAudit(
        name=name,
        component=_component(name, layers),
        layer=layer_of(name),
        format=encoded.encoding if encoded else after.tensors[name].dtype,
        parameters=count,
        source_bytes=_bytes_of(before, name),
        output_bytes=_bytes_of(after, name),
        relative_mse=error / norm if norm else float(error > 0),
        cosine=dot / math.sqrt(norm * other) if norm and other else float(norm == other),
        saturated=saturated / max(1, count),
        underflowed=underflowed / max(1, count),
        worst_blocks=tuple(sorted(worst, key=lambda block: -block[1])[:_WORST]) if error else (),
    )


def _component(name: str, layers: int) -> str:
    try:
        return component_of(name, layers)
    except CheckpointError:
        return "other"


def _pieces(name: str, before: WeightFiles, after: WeightFiles) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Both weights, flat, in float32, a few million at a time."""
    x, y = (files.read(name) for files in (before, after))
    if name in after.encoded and after.encoded[name].encoding == "mxfp4_stack":
        x, y = x.mT, y.mT  # blocks run along the inputs there
    x, y = x.flatten(), y.flatten()
    for start in range(0, len(x), _ROWS):
        yield start, x[start : start + _ROWS].float(), y[start : start + _ROWS].float()


def _bytes_of(files: WeightFiles, name: str) -> int:
    """Of a weight and of everything that belongs to it."""
    if name in files.encoded:
        stem = name.removesuffix("weight")
        inputs = (f"{stem}input_scale", f"{stem}input_global_scale", f"{name}_shape")
        parts: Sequence[str] = (*files.encoded[name].parts, *inputs)
    else:
        parts = (name, f"{name}_scale_inv")
    return sum(files.tensors[part].num_bytes for part in parts if part in files.tensors)


def summarize_audit(audits: Sequence[TensorAudit]) -> dict[str, Any]:
    """The table by component and format, the totals, and the weights that lost most.

    Errors are weighted by the number of weights: means over all of a component's.
    """
    groups: dict[tuple[str, str], list[TensorAudit]] = {}
    for audit in audits:
        groups.setdefault((audit.component, audit.format), []).append(audit)
    rows = []
    for (part, format), members in sorted(groups.items()):
        sums = Counter[str]()
        for audit in members:
            sums.update({"parameters": audit.parameters, "source": audit.source_bytes, "output": audit.output_bytes})
        weight = max(1, sums["parameters"])
        means = {
            key: sum(getattr(audit, key) * audit.parameters for audit in members) / weight
            for key in ("relative_mse", "cosine", "saturated", "underflowed")
        }
        rows.append(
            {
                "component": part,
                "format": format,
                "tensors": len(members),
                "parameters": sums["parameters"],
                "source_bytes": sums["source"],
                "output_bytes": sums["output"],
                "ratio": sums["source"] / max(1, sums["output"]),
                **means,
                "worst_relative_mse": max(audit.relative_mse for audit in members),
            }
        )
    source, output = (sum(getattr(a, key) for a in audits) for key in ("source_bytes", "output_bytes"))
    worst = sorted(audits, key=lambda audit: -audit.relative_mse)[:5]
    return {
        "source_bytes": source,
        "output_bytes": output,
        "ratio": source / max(1, output),
        "parts": rows,
        "worst": [asdict(audit) for audit in worst if audit.relative_mse > 0],
    }


@torch.no_grad()
def compare_logits(
    source: Path | str, quantized: Path | str, passages: Sequence[Passage], *, served: bool = False
) -> dict[str, Any]:
    """How far the quantized model's predictions of the next token are from the source's, on text.

    Both compute in float32 with the weights that their checkpoints are worth; one is in memory at a time, besides the
    log-probabilities of the other.

    Args:
        source: checkpoint of a family that Tafkir runs.
        quantized: made of it.
        passages: the text.
        served: round the inputs of matrices that are stored in NVFP4 together with theirs.

    Returns:
        tokens: that count; kl_mean, kl_max: of the source's distribution from the quantized one's, in nats;
        kl_quantiles, by share; kl_histogram: pairs of a bin's lower end (six to a power of ten) and its tokens, with
        those below 1e-8 in the first; perplexity_source, perplexity_quantized; top1_agreement: share of tokens with
        the same likeliest successor.
    """
    texts = [passage for passage in passages if passage.places]
    if not texts:
        raise CheckpointError("no text to compare on", expected="passages of two tokens or more")
    load = load_served if served else (lambda name: load_checkpoint(name).decoder)
    decoder = load(source)
    reference = [_log_probs(decoder, passage) for passage in texts]
    del decoder
    decoder = load(quantized)
    kl, nll, same, count = [], [0.0, 0.0], 0, 0
    for passage, p in zip(texts, reference, strict=True):
        q, targets = _log_probs(decoder, passage), torch.tensor([passage.ids[place + 1] for place in passage.places])
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        for i, logs in enumerate((p, q)):
            nll[i] -= float(logs.gather(1, targets[:, None]).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(targets)
    divergence = torch.cat(kl)
    return {
        "tokens": count,
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "kl_quantiles": {str(q): float(divergence.quantile(q)) for q in (0.5, 0.9, 0.99)},
        "kl_histogram": _histogram(divergence),
        "perplexity_source": math.exp(nll[0] / count),
        "perplexity_quantized": math.exp(nll[1] / count),
        "top1_agreement": same / count,
    }


def _histogram(values: Tensor) -> list[tuple[float, int]]:
    """Lower end and count of every bin from the first to the last that holds a value."""
    bins = (values.clamp_min(_SMALLEST_KL).log10() * _BINS_PER_POWER).floor().long()
    first, counts = int(bins.min()), torch.bincount(bins - bins.min()).tolist()
    return [(10 ** ((first + i) / _BINS_PER_POWER), count) for i, count in enumerate(counts)]


def _log_probs(decoder: Decoder, passage: Passage) -> Tensor:
    """[counted tokens, vocabulary]: of each, from what stands before it."""
    ids = passage.ids
    out = decoder(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), VarlenCausal([0, len(ids) - 1]))
    return F.log_softmax(out.hidden_ND[passage.places].float() @ decoder.head_weight.float().T, dim=-1)
