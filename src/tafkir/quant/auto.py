"""AutoQuantize: mixed precision under a budget, from measured losses, solved exactly and measured again as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tafkir.checkpoint.load import load_checkpoint
from tafkir.errors import RecipeError
from tafkir.models.decoder import Decoder
from tafkir.quant.activations import INPUT_AMAX
from tafkir.quant.budget import Allocation, Option, allocate, best_choices
from tafkir.quant.calibration_text import read_calibration_text
from tafkir.quant.convert import open_source
from tafkir.quant.fake import FakeQuantizer
from tafkir.quant.formats import pieces_of
from tafkir.quant.plan import QuantizePlan, plan_quantization
from tafkir.quant.policy import decide
from tafkir.quant.rules import exact_rules
from tafkir.quant.sensitivity import (
    Group,
    find_groups,
    fisher_losses,
    kl_losses,
    measure_kl,
    quantized_groups,
    read_input_amax,
    read_predictions,
)
from tafkir.quant.texts import Passage, familiar_problems
from tafkir.recipe.auto import AutoConfig
from tafkir.recipe.quantize import CalibrationConfig, FormatName, QuantizeConfig, RuleConfig
from tafkir.runlog.progress import Progress

__all__ = [
    "AutoResult",
    "GroupChoice",
    "Sensitivities",
    "auto_quantize",
    "choose",
    "measure_sensitivities",
    "read_auto_text",
]

_SEARCH_STEPS = 10
# Problems that no stage draws, no calibration and no comparison: those count from 0, 1e9, 2e9 and 3e9.
_FIRST_STORY = 4 * 10**9
_FOUR_BITS = ("nvfp4", "nvfp4_w4a16", "mxfp4", "int4")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """One group, what each format would cost it, and what it got.

    Attributes:
        name: what a person calls it.
        layer: that it is in.
        kind: what it is in the layer.
        component: as the policy names it.
        numel: weights in all.
        losses: by format, nats a token; 0 for keep.
        bytes: by format, scales included.
        format: chosen.
        reason: why, in words.
    """

    name: str
    layer: int
    kind: str
    component: str
    numel: int
    losses: Mapping[FormatName, float]
    bytes: Mapping[FormatName, int]
    format: FormatName
    reason: str


@dataclass(frozen=True, slots=True)
class AutoResult:
    """A mixture of formats, and what it was decided on.

    Attributes:
        config: with the rules that reproduce it, and no auto.
        groups: every group with its choice.
        goal: as asked for.
        sensitivity: how losses were measured.
        tokens: that count of the text they were measured on.
        bits: stored bits for each weight of the groups.
        predicted_kl: sum of the groups' own losses, nats a token.
        measured_kl: of the whole mixture on the same text.
        bound: no mixture of these losses is better.
        price: nats that another megabyte would save.
        frontier: (bits, predicted nats) of the best mixtures at other budgets.
    """

    config: QuantizeConfig
    groups: list[GroupChoice]
    goal: str
    sensitivity: str
    tokens: int
    bits: float
    predicted_kl: float
    measured_kl: float
    bound: float
    price: float
    frontier: list[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self, dict_factory=dict), "config": self.config.model_dump(mode="json", exclude_none=True)}

    def rules_file(self, source: str) -> str:
        """TOML that `tafkir quantize --rules` reads, and that can be laid over a recipe."""
        head = [
            f"# Chosen by `tafkir quantize --auto {self.goal}` for {source}: {self.bits:.3f} bits a weight,",
            f"# KL {self.measured_kl:.3g} nats a token ({self.predicted_kl:.3g} as a sum of the groups' own).",
            "[quantize]",
        ]
        plain = self.config.model_dump(mode="json", exclude_none=True, exclude={"rules", "calibration"})
        head += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        if self.config.calibration is not None:
            inner = self.config.calibration.model_dump(mode="json", exclude_none=True)
            head += ["", "[quantize.calibration]", *(f"{key} = {json.dumps(value)}" for key, value in inner.items())]
        rules = [
            f"\n[[quantize.rules]]\ntensors = {json.dumps(rule.tensors)}\nformat = {json.dumps(rule.format)}"
            for rule in self.config.rules
        ]
        return "\n".join([*head, *rules]) + "\n"


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What every group loses in every format, with all that is needed to choose and to measure a whole mixture.

    Attributes:
        decoder: of the source, as it is.
        groups: of its layers.
        losses: by format, for each group.
        amax: largest magnitudes that inputs are scaled for, by parameter.
        sizes: bytes by format, for each group, keep among them.
        weights: what parameters become in each format.
        passages: the text.
        reference: the source's predictions on it.
        other_bytes: of the tensors in no group, and of single numbers beside the codes.
        names: of all tensors of the checkpoint.
    """

    decoder: Decoder
    groups: list[Group]
    losses: list[dict[FormatName, float]]
    amax: Mapping[str, float]
    sizes: list[dict[FormatName, int]]
    weights: Mapping[FormatName, Mapping[str, Tensor]]
    passages: Sequence[Passage]
    reference: Sequence[Tensor]
    other_bytes: int
    names: list[str]

    @property
    def numel(self) -> int:
        """Weights of all groups."""
        return sum(group.numel for group in self.groups)

    def measure(self, formats: Sequence[FormatName]) -> float:
        """KL of a whole mixture, one format a group, nats a token."""
        return self.measure_on(formats, self.passages, self.reference)

    def measure_on(
        self, formats: Sequence[FormatName], passages: Sequence[Passage], reference: Sequence[Tensor]
    ) -> float:
        """The same on another text, with the source's predictions on it (`read_predictions`)."""
        with quantized_groups(self.decoder, list(zip(self.groups, formats, strict=True)), self.weights, self.amax):
            return measure_kl(self.decoder, passages, reference)


def measure_sensitivities(
    source: Path | str, config: QuantizeConfig, auto: AutoConfig, passages: Sequence[Passage]
) -> Sensitivities:
    """Measure what each group of a checkpoint loses in each format.

    Args:
        source: checkpoint of a family that Tafkir runs; it is held in memory, for `fisher` once more for each format.
        config: choice of scales, layout, and what becomes of tensors that are in no group.
        auto: formats, and how to measure.
        passages: the text.

    Raises:
        CheckpointError: as `load_checkpoint`; or there is no text.
        RecipeError: the layout has no place for a format, or no matrix can have any of them.
    """
    decoder = load_checkpoint(source).decoder
    groups = find_groups(decoder)
    with open_source(source) as (files, hf_config):
        plan = plan_quantization(files, hf_config, _plain(config), 1 << 60)
    shapes = {decision.name: decision.shape for decision in plan.decisions}
    own = {name for group in groups for name in group.tensors}
    dtype = _DTYPES[plan.dtypes[groups[0].tensors[0]]]
    options: list[dict[FormatName, object]] = [{} for _ in groups]
    weights: dict[FormatName, Mapping[str, Tensor]] = {}
    for format in auto.formats:
        uniform = _uniform(config, format)
        possible = {d.name for d in decide(shapes, uniform, decoder.config.num_hidden_layers) if d.format == format}
        fitting = [possible.issuperset(group.tensors) and _may_be(group, format) for group in groups]
        for option, fits in zip(options, fitting, strict=True):
            if fits:
                option[format] = True
        if any(fitting):
            weights[format] = _OnDemand(FakeQuantizer(decoder, uniform, dtype), decoder, groups)
    if not weights:
        raise RecipeError("no matrix can be any of these", where=f"auto.formats = {list(auto.formats)}")
    reference = read_predictions(decoder, passages)
    amax = {name: INPUT_AMAX * config.input_scale for group in groups for name in group.parameters}
    if config.calibration is not None:
        amax = read_input_amax(decoder, groups, passages)
    if auto.sensitivity == "fisher":
        # Every backward pass asks for all of them.
        weights = {format: dict(made) for format, made in weights.items()}
        losses = fisher_losses(decoder, groups, options, weights, passages, amax)
    else:
        losses = kl_losses(decoder, groups, options, weights, passages, reference, amax)
    sizes = [_sizes(group, [*option, "keep"], plan, config) for group, option in zip(groups, options, strict=True)]
    theirs = {
        piece.name
        for job in plan.jobs
        for decision, pieces in zip(job.decisions, job.pieces, strict=True)
        for piece in pieces
        if decision.name in own
    }
    other = sum(p.num_bytes for pieces in plan.shards.values() for p in pieces if p.name not in theirs)
    # Beside the codes, engines want at most two numbers a matrix.
    other += 8 * len(own)
    return Sensitivities(decoder, groups, losses, amax, sizes, weights, passages, reference, other, list(shapes))


class _OnDemand(Mapping[str, Tensor]):
    """What the parameters of groups become in a format, made for one group at a time, while they are what they were."""

    def __init__(self, quantizer: FakeQuantizer, decoder: Decoder, groups: Sequence[Group]) -> None:
        self._quantizer, self._decoder = quantizer, decoder
        self._together = {name: g.parameters for g in groups for name in g.parameters if name in quantizer.formats}
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            self.made = self._quantizer(self._decoder.state_dict(), self._together[name])
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._together)

    def __len__(self) -> int:
        return len(self._together)


def read_auto_text(source: Path, auto: AutoConfig) -> list[Passage]:
    """The text that losses are measured on: a file's, or made-up problems as the model is used to them."""
    if auto.text == "task":
        return familiar_problems(source, auto.tokens, _FIRST_STORY)
    ids = read_calibration_text(source, CalibrationConfig(text=auto.text, tokens=auto.tokens))
    return [Passage.whole(window) for window in ids]


def _plain(config: QuantizeConfig) -> QuantizeConfig:
    return config.model_copy(update={"auto": None})


def _uniform(config: QuantizeConfig, format: FormatName) -> QuantizeConfig:
    """All matrices of the layers in one format, scales chosen as in the mixture."""
    update = {"preset": "all-linear", "scheme": format, "rules": (), "scales": config.scale_choice, "auto": None}
    return QuantizeConfig.model_validate({**config.model_dump(), **update})


def _may_be(group: Group, format: FormatName) -> bool:
    """MLA's kv_b is absorbed by engines, which expect it in 8 or 16 bits."""
    return group.component != "attention_kv_b" or format not in _FOUR_BITS


def _sizes(
    group: Group, formats: Sequence[FormatName], plan: QuantizePlan, config: QuantizeConfig
) -> dict[FormatName, int]:
    """Bytes of codes and scales; single numbers are counted elsewhere, so that bits come out as the format's own."""
    shapes = {decision.name: decision.shape for decision in plan.decisions}
    return {
        format: sum(
            piece.num_bytes
            for name in group.tensors
            for piece in pieces_of(name, shapes[name], format, config.layout, plan.dtypes[name])
            if len(piece.shape) > 1 or (piece.name.endswith("weight_scale") and piece.shape not in ((), (1,)))
        )
        for format in formats
    }


# ---- the choice ------------------------------------------------------------------------------------------------------


def auto_quantize(
    source: Path | str,
    config: QuantizeConfig,
    passages: Sequence[Passage],
    *,
    measured: Sensitivities | None = None,
) -> AutoResult:
    """Choose the formats of a checkpoint's matrices under the budget of `config.auto`.

    Args:
        source: checkpoint of a family that Tafkir runs.
        config: with `auto` set; its rules go before what is found here.
        passages: the text to measure on.
        measured: what `measure_sensitivities` found before, such as for another budget.

    Raises:
        RecipeError: the budget is too small for the formats, or config has no auto.
        CheckpointError: as `measure_sensitivities`.
    """
    auto = config.auto
    if auto is None:
        raise RecipeError("there is no budget", where="quantize.auto", expected="one of bits, bytes and kl")
    found = measured or measure_sensitivities(source, config, auto, passages)
    if auto.kl is not None:
        allocation, formats, kl = _search_kl(found, auto.kl)
    else:
        allocation, formats = choose(found, _budget(found, auto))
        kl = found.measure(formats)
    rules = exact_rules({g.tensors: f for g, f in zip(found.groups, formats, strict=True)}, found.names)
    fixed = [RuleConfig(tensors=pattern, format=format) for pattern, format in rules]
    choices = []
    for i, (group, sizes) in enumerate(zip(found.groups, found.sizes, strict=True)):
        losses: dict[FormatName, float] = {**found.losses[i], "keep": 0.0}
        reason = _reason(formats[i], losses, sizes, allocation.price)
        whose = (group.name, group.layer, group.kind, group.component, group.numel)
        choices.append(GroupChoice(*whose, losses, sizes, formats[i], reason))
    return AutoResult(
        config=_plain(config).model_copy(update={"rules": (*config.rules, *fixed), "scales": config.scale_choice}),
        groups=choices,
        goal=auto.goal,
        sensitivity=auto.sensitivity,
        tokens=sum(len(passage.places) for passage in passages),
        bits=8 * sum(sizes[f] for sizes, f in zip(found.sizes, formats, strict=True)) / found.numel,
        predicted_kl=sum(losses.get(f, 0.0) for losses, f in zip(found.losses, formats, strict=True)),
        measured_kl=kl,
        bound=allocation.bound,
        price=allocation.price * 1e6,
        frontier=[(8 * cost / found.numel, loss) for cost, loss in best_choices(_options(found))],
    )


def _budget(found: Sensitivities, auto: AutoConfig) -> int:
    """Bytes for the groups' codes and scales."""
    if auto.bits is not None:
        return int(auto.bits * found.numel / 8 + 1e-6)
    assert auto.bytes is not None
    return auto.bytes - found.other_bytes


def choose(found: Sensitivities, budget: int) -> tuple[Allocation, list[FormatName]]:
    """The mixture with the least sum of losses in so many bytes of codes and scales.

    Raises:
        RecipeError: the budget is too small; the message says what it takes.
    """
    least = sum(min(sizes.values()) for sizes in found.sizes)
    if least > budget:
        raise RecipeError(
            "the budget is too small for these formats",
            where="quantize.auto",
            expected=f"bits={8 * least / found.numel + 0.0005:.3f} or bytes={least + found.other_bytes} at least",
            fix="raise it, or name a format of fewer bits",
        )
    allocation = allocate(_options(found), budget)
    return allocation, [list(sizes)[pick] for sizes, pick in zip(found.sizes, allocation.picks, strict=True)]


def _search_kl(found: Sensitivities, target: float) -> tuple[Allocation, list[FormatName], float]:
    """The smallest of the best mixtures whose measured KL is at most the target, by bisection over the budget."""
    low = sum(min(sizes.values()) for sizes in found.sizes)
    high = sum(max(sizes.values()) for sizes in found.sizes)
    best: tuple[Allocation, list[FormatName], float] | None = None
    budget = low
    with Progress("auto kl", _SEARCH_STEPS) as progress:
        for step in range(_SEARCH_STEPS):
            allocation, formats = choose(found, budget)
            kl = found.measure(formats)
            progress.update(step + 1, kl=kl, bits=8 * allocation.cost / found.numel)
            if kl <= target:
                best, high = (allocation, formats, kl), allocation.cost
                if budget == low:
                    break
            else:
                low = budget
            budget = (low + high) // 2
    if best is None or all(format == "keep" for format in best[1]):
        raise RecipeError(
            f"no mixture of these formats stays within {target:g} nats", where="quantize.auto.kl", fix="raise it"
        )
    return best


def _options(found: Sensitivities) -> list[list[Option]]:
    return [
        [Option(size, losses.get(format, 0.0)) for format, size in sizes.items()]
        for sizes, losses in zip(found.sizes, found.losses, strict=True)
    ]


def _reason(
    format: FormatName, losses: Mapping[FormatName, float], sizes: Mapping[FormatName, int], price: float
) -> str:
    """What the next format up or down would save or cost, against the price of a byte."""

    def said(other: FormatName, verb: str) -> tuple[float, str]:
        nats, size = abs(losses[other] - losses[format]), max(1, abs(sizes[other] - sizes[format]))
        return nats / size, f"{other} {verb} {nats:.2g} nats for {size / 1e3:,.1f} kB"

    larger = [said(other, "saves") for other in sizes if sizes[other] > sizes[format]]
    smaller = [said(other, "costs") for other in sizes if sizes[other] < sizes[format]]
    words = []
    if smaller:
        rate, text = min(smaller)
        words.append(f"{text}: {_times(rate, price)} the price")
    if larger:
        rate, text = max(larger)
        words.append(f"{text}: {_times(rate, price)} the price")
    return "; ".join(words)


def _times(rate: float, price: float) -> str:
    return f"{rate / price:.2g} times" if price > 0 else "above"
