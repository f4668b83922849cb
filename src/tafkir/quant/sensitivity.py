"""What quantizing one group of matrices does to a model's predictions: measured exactly, or estimated for all at once.

A group is what engines read in one format: q/k/v, gate/up, all experts of a layer, or a matrix alone.
Shapes: N tokens, C of them counted, V vocabulary, D width of a group's output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tafkir.errors import CheckpointError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import Decoder
from tafkir.models.experts import Experts, MoE
from tafkir.models.hf import resolve_names
from tafkir.models.layers import Linear
from tafkir.ops.moe import swiglu
from tafkir.quant.activations import INPUT_AMAX, QuantizedExperts, quantize_inputs
from tafkir.quant.policy import component_of, layer_of, sibling_group
from tafkir.quant.texts import Passage
from tafkir.recipe.quantize import FormatName
from tafkir.runlog.progress import Progress

__all__ = [
    "Group",
    "find_groups",
    "fisher_losses",
    "kl_losses",
    "measure_kl",
    "quantized_groups",
    "read_input_amax",
    "read_predictions",
]

_PARTS = ("attention", "attention_kv_b", "attention_out", "mlp", "experts", "shared_experts")
_KINDS = {"query_key_value": "q/k/v", "qkv_proj": "q/k/v", "dense": "o", "wo": "o"}
_CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that get one format.

    Attributes:
        name: what a person calls it, `3 experts`.
        layer: that it is in.
        kind: what it is in the layer, `q/k/v`.
        parameters: names in the decoder.
        tensors: names in the checkpoint.
        numel: weights in all.
    """

    name: str
    layer: int
    kind: str
    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    numel: int

    @property
    def component(self) -> str:
        """As the policy names it."""
        return component_of(self.tensors[0], self.layer + 1)


def find_groups(decoder: Decoder) -> list[Group]:
    """The groups of the decoder's layers, in their order; multi-token prediction, routers and norms are none."""
    found: dict[str, list[Any]] = {}
    shapes = dict(decoder.named_parameters())
    for names in resolve_names(decoder):
        parts = [part for group in names.parts for part in group]
        layer = layer_of(parts[0])
        if not names.name.startswith("layers.") or layer is None or names.name not in shapes:
            continue
        component = component_of(parts[0], decoder.config.num_hidden_layers)
        if component not in _PARTS:
            continue
        stem, _, rest = sibling_group(parts[0]).rpartition(".")
        key = re.sub(r"\.experts\.\d+$", ".experts", stem) if names.stacked else f"{stem}.{rest}"
        members = found.setdefault(key, [layer, _kind(key, component), [], [], 0])
        members[2].append(names.name)
        members[3] += parts
        members[4] += shapes[names.name].numel()
    return [
        Group(f"{layer} {kind}", layer, kind, tuple(ours), tuple(theirs), numel)
        for layer, kind, ours, theirs, numel in found.values()
    ]


def _kind(key: str, component: str) -> str:
    """What a person calls a group within its layer, whatever the family's names."""
    last = key.rpartition(".")[2]
    if component == "experts" or last in _KINDS:
        return _KINDS.get(last, "experts")
    maps = "/".join(re.sub(r"_proj(_with_mqa)?$", "", name) for name in last.split("+"))
    return f"shared {maps}" if component == "shared_experts" else maps


# ---- a model with some groups quantized ------------------------------------------------------------------------------


@contextmanager
def quantized_groups(
    decoder: Decoder,
    chosen: Sequence[tuple[Group, FormatName]],
    weights: Mapping[FormatName, Mapping[str, Tensor]],
    amax: Mapping[str, float],
) -> Iterator[None]:
    """The decoder with some groups in some formats, inputs included where the format has them; undone at the end.

    Args:
        chosen: groups and their formats; `keep` changes nothing.
        weights: for each format, what the parameters become.
        amax: largest magnitude that inputs are scaled for, by parameter; 2688 where it is not said.
    """
    parameters, modules = dict(decoder.named_parameters()), dict(decoder.named_modules())
    with ExitStack() as stack, torch.no_grad():
        for group, format in chosen:
            if format == "keep":
                continue
            for name in group.parameters:
                parameter, kept = parameters[name], parameters[name].detach().clone()
                stack.callback(parameter.data.copy_, kept)
                parameter.data.copy_(weights[format][name])
            if format == "nvfp4":
                _round_inputs(group, modules, amax, stack)
        yield


def _round_inputs(group: Group, modules: Mapping[str, nn.Module], amax: Mapping[str, float], stack: ExitStack) -> None:
    for name in group.parameters:
        path = name.rpartition(".")[0]
        module = modules[path]
        if isinstance(module, Experts):
            moe = cast(MoE, modules[path.rpartition(".")[0]])
            if moe.experts is module:
                stack.callback(setattr, moe, "experts", module)
                moe.experts = QuantizedExperts(module, _expert_amax(path, amax))  # type: ignore[assignment]
        else:
            rounded = partial(_rounded_argument, amax=amax.get(name, INPUT_AMAX))
            stack.callback(module.register_forward_pre_hook(rounded).remove)


def _expert_amax(path: str, amax: Mapping[str, float]) -> tuple[float, float]:
    up, down = (amax.get(f"{path}.{part}_proj", INPUT_AMAX) for part in ("gate_up", "down"))
    return up, down


def _rounded_argument(module: nn.Module, args: tuple[Any, ...], *, amax: float) -> tuple[Any, ...]:
    return (quantize_inputs(args[0], amax), *args[1:])


@torch.no_grad()
def read_input_amax(decoder: Decoder, groups: Sequence[Group], passages: Sequence[Passage]) -> dict[str, float]:
    """The largest magnitude of every matrix's inputs on a text, by parameter; what calibration would scale them for."""
    found: dict[str, float] = {}
    modules = dict(decoder.named_modules())

    def look(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        peaks = {"weight": args[0]} if isinstance(module, Linear) else _expert_inputs(cast(Experts, module), *args)
        for name, values in peaks.items():
            key = f"{path}.{name}"
            found[key] = max(found.get(key, 0.0), float(values.abs().amax()) if values.numel() else 0.0)

    with ExitStack() as stack:
        for path in dict.fromkeys(name.rpartition(".")[0] for group in groups for name in group.parameters):
            stack.callback(modules[path].register_forward_pre_hook(partial(look, path)).remove)
        for chunk in _chunks(passages):
            _log_probs(decoder, *chunk)
    return {name: value for name, value in found.items() if value > 0}


def _expert_inputs(experts: Experts, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> dict[str, Tensor]:
    """What the two matrices of every expert read: the tokens that it gets, and the largest of their hidden states."""
    peaks = [
        swiglu(F.linear(x_ND[(ids_NA == expert).any(-1)], experts.gate_up_proj[expert])).abs().amax().reshape(1)
        for expert in ids_NA.unique().tolist()
    ]
    return {"gate_up_proj": x_ND, "down_proj": torch.cat(peaks) if peaks else x_ND[:0]}


# ---- exact -----------------------------------------------------------------------------------------------------------


def _chunks(passages: Sequence[Passage]) -> Iterator[tuple[Tensor, list[int], Tensor]]:
    """Token ids of passages that fit together, their boundaries, and the places where a counted token is predicted."""
    ids: list[int] = []
    bounds, places = [0], list[int]()
    for passage in passages:
        if len(ids) and len(ids) + len(passage.ids) > _CHUNK_TOKENS:
            yield torch.tensor(ids), bounds, torch.tensor(places, dtype=torch.long)
            ids, bounds, places = [], [0], []
        places += [len(ids) + place for place in passage.places]
        ids = ids + list(passage.ids)
        bounds = [*bounds, len(ids)]
    if ids:
        yield torch.tensor(ids), bounds, torch.tensor(places, dtype=torch.long)


def _log_probs(decoder: Decoder, ids_N: Tensor, bounds: Sequence[int], places: Tensor) -> Tensor:
    """[places, V]: of the successors of the tokens at these places."""
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    hidden_ND = decoder(ids_N, positions, VarlenCausal(bounds)).hidden_ND
    return F.log_softmax(decoder.logits(hidden_ND[places]), dim=-1)


@torch.no_grad()
def read_predictions(decoder: Decoder, passages: Sequence[Passage]) -> list[Tensor]:
    """Log-probabilities [counted tokens, V], for each run of passages.

    Raises:
        CheckpointError: there is no text.
    """
    found = [_log_probs(decoder, *chunk) for chunk in _chunks(passages)]
    if not sum(map(len, found)):
        raise CheckpointError("no text to measure on", expected="passages of two tokens or more")
    return found


@torch.no_grad()
def measure_kl(decoder: Decoder, passages: Sequence[Passage], reference: Sequence[Tensor]) -> float:
    """Mean KL, in nats a counted token, of the reference predictions from the decoder's as it is now."""
    total = 0.0
    for chunk, p in zip(_chunks(passages), reference, strict=True):
        q = _log_probs(decoder, *chunk)
        total += float((p.exp() * (p - q)).sum(-1).clamp_min(0).sum(dtype=torch.float64))
    return total / sum(map(len, reference))


def kl_losses(
    decoder: Decoder,
    groups: Sequence[Group],
    formats: Sequence[Mapping[FormatName, object]],
    weights: Mapping[FormatName, Mapping[str, Tensor]],
    passages: Sequence[Passage],
    reference: Sequence[Tensor],
    amax: Mapping[str, float],
) -> list[dict[FormatName, float]]:
    """For each group and each of its formats, the mean KL with that group alone quantized: a forward pass each."""
    losses: list[dict[FormatName, float]] = []
    total, done = sum(len(own) for own in formats), 0
    with Progress("sensitivity", total) as progress:
        for group, own in zip(groups, formats, strict=True):
            losses.append({})
            for format in own:
                with quantized_groups(decoder, [(group, format)], weights, amax):
                    losses[-1][format] = measure_kl(decoder, passages, reference)
                done += 1
                progress.update(done, kl=losses[-1][format])
    return losses


# ---- by one backward pass --------------------------------------------------------------------------------------------


class _Watch:
    """Sums what a group's error does to a passage's loss, to first order: gradients times changes of outputs."""

    def __init__(self, groups: Sequence[Group], formats: Sequence[Mapping[FormatName, object]]) -> None:
        self.sums: list[dict[FormatName, Tensor]] = [{} for _ in groups]
        self.totals: list[dict[FormatName, float]] = [dict.fromkeys(own, 0.0) for own in formats]

    def add(self, group: int, format: FormatName, change_N: Tensor) -> None:
        seen = self.sums[group].get(format)
        self.sums[group][format] = change_N if seen is None else seen + change_N

    def square(self, bounds: Sequence[int]) -> None:
        """Ends a pass: squares what each passage came to."""
        for sums, totals in zip(self.sums, self.totals, strict=True):
            for format, change_N in sums.items():
                whole = torch.stack([change_N[a:b].sum(dtype=torch.float64) for a, b in pairwise(bounds)])
                totals[format] += float(whole.square().sum())
            sums.clear()


def fisher_losses(
    decoder: Decoder,
    groups: Sequence[Group],
    formats: Sequence[Mapping[FormatName, object]],
    weights: Mapping[FormatName, Mapping[str, Tensor]],
    passages: Sequence[Passage],
    amax: Mapping[str, float],
    *,
    draws: int = 4,
    seed: int = 0,
) -> list[dict[FormatName, float]]:
    """Estimates of what `kl_losses` measures, for all groups at once by a few forward and backward passes.

    To second order, KL is half of d^T F d for a change d of a layer's outputs, with the Fisher information F = E[g g^T]
    of gradients g under labels that the model itself draws. So a passage's share is half of E[(sum of g . d)^2] over
    its tokens, with the change d = Q(x) Q(W)^T - x W^T of each. A few draws of labels stand for the expectation; the
    estimate scatters by about sqrt(2 / (draws x passages)). Changes of a router's choice are not seen.
    """
    watch = _Watch(groups, formats)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    modules = dict(decoder.named_modules())
    with ExitStack() as stack:
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        stack.callback(decoder.embed_tokens.register_forward_hook(_start_graph).remove)
        for index, group in enumerate(groups):
            for path in dict.fromkeys(name.rpartition(".")[0] for name in group.parameters):
                change = partial(_watched, watch, index, list(formats[index]), path, (weights, amax))
                stack.callback(modules[path].register_forward_hook(change).remove)
        with torch.enable_grad():
            for ids, bounds, places in [chunk for _ in range(draws) for chunk in _chunks(passages)]:
                logs_CV = _log_probs(decoder, ids, bounds, places)
                drawn_C = torch.multinomial(logs_CV.detach().exp(), 1, generator=generator)
                (-logs_CV.gather(1, drawn_C)).sum().backward()
                watch.square(bounds)
                count += len(places)
    return [{format: 0.5 * total / count for format, total in own.items()} for own in watch.totals]


def _start_graph(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Gradients begin at the embeddings' output, so that no parameter needs one."""
    return output.requires_grad_()


def _watched(
    watch: _Watch,
    group: int,
    formats: Sequence[FormatName],
    path: str,
    given: tuple[Mapping[FormatName, Mapping[str, Tensor]], Mapping[str, float]],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Ask for the gradient of a module's output, and set the change that each format makes against it."""
    inputs = tuple(value.detach() for value in args)
    weights, amax = given

    def weigh(gradient_ND: Tensor) -> None:
        with torch.no_grad():
            for format in formats:
                theirs = {
                    name.rpartition(".")[2]: weights[format][name] for name in weights[format] if _within(name, path)
                }
                changed_ND = _run_with(module, inputs, theirs, (path, amax) if format == "nvfp4" else None)
                watch.add(group, format, ((changed_ND - output.detach()) * gradient_ND).flatten(1).sum(-1))

    if output.requires_grad:
        output.register_hook(weigh)


def _within(name: str, path: str) -> bool:
    return name.rpartition(".")[0] == path


def _run_with(
    module: nn.Module,
    inputs: tuple[Any, ...],
    weights: Mapping[str, Tensor],
    rounded: tuple[str, Mapping[str, float]] | None,
) -> Tensor:
    """What a linear map, or a stack of experts, makes of the same inputs with other weights.

    Args:
        rounded: the module's name and the magnitudes by parameter, where inputs are rounded, too.
    """
    if isinstance(module, Linear):
        x = (
            inputs[0]
            if rounded is None
            else quantize_inputs(inputs[0], rounded[1].get(f"{rounded[0]}.weight", INPUT_AMAX))
        )
        return F.linear(x, weights["weight"], module.bias)
    assert isinstance(module, Experts)
    stand_in = QuantizedExperts(module, (None, None) if rounded is None else _expert_amax(*rounded))
    for name, weight in weights.items():
        setattr(stand_in, name, nn.Parameter(weight, requires_grad=False))
    return cast(Tensor, stand_in(*inputs))
