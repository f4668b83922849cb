"""Runs a checkpoint on text, one layer after the other, and records what quantization wants to know of its inputs.

In memory are the hidden states of all the text, one layer without its routed experts, and one expert; so a model far
larger than memory is calibrated, too. Weights that are chosen on data (local Hessian, GPTQ) are chosen on the way.

Shapes: N tokens, D hidden, E experts, A active experts per token.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tafkir.checkpoint.files import read_json
from tafkir.checkpoint.folder import write_error
from tafkir.checkpoint.layers import LayerReader, open_layers
from tafkir.errors import CapacityError, CheckpointError, RecipeError
from tafkir.models.attention import VarlenCausal
from tafkir.models.decoder import DecoderLayer
from tafkir.models.experts import MoE
from tafkir.models.mtp import shift_documents
from tafkir.models.residual import StreamState
from tafkir.ops.moe import swiglu
from tafkir.ops.rope import rope_table
from tafkir.quant.calibration import RECORD_FILE, Calibration, KvRange, LayerRecord, load_calibration
from tafkir.quant.choose import Chooser
from tafkir.quant.coverage import LayerCoverage, check_coverage, given_tokens, wanted_tokens
from tafkir.quant.observe import InputStatistics
from tafkir.quant.policy import decide
from tafkir.quant.sites import Site, expert_names, linear_sites
from tafkir.recipe.model import ModelConfig
from tafkir.recipe.quantize import CalibrationConfig, QuantizeConfig
from tafkir.runlog.atomic import remove_leftovers, write_json
from tafkir.runlog.progress import Progress

__all__ = ["calibrate_checkpoint"]

_CHUNK = 4096  # tokens that go through attention at once, or one document
_LOCK = ".lock"
_MARGIN_BYTES = 64 << 20


@torch.no_grad()
def calibrate_checkpoint(
    source: Path | str,
    folder: Path | str,
    config: QuantizeConfig,
    documents: Sequence[Sequence[int]],
    *,
    replace: bool = False,
) -> Calibration:
    """Record a checkpoint's activations, and choose weights on them where `config` asks for it; a killed one goes on.

    Hidden states are exact (float32) up to weights that GPTQ has rounded: what follows them reads their outputs, as in
    the paper. Weights of 4 bits by the local Hessian alone change nothing of what later layers read.

    Args:
        source: a checkpoint folder, or the name of a bundled one.
        folder: of the record; made if it is not there. A finished record of the same work is taken as it is, an
            unfinished one goes on behind its last layer, and one of other work is refused.
        config: with `calibration` set.
        documents: token ids.
        replace: remove a record of other work instead.

    Raises:
        CapacityError: the disk has too little room for the record.
        CheckpointError: the checkpoint is damaged, experts stay cold, activations are not finite, the folder holds
            another calibration or another process writes it.
        RecipeError: a matrix that is to be quantized is not one of the decoder's layers.
    """
    calibration, folder = config.calibration, Path(folder)
    assert calibration is not None
    with open_layers(source) as reader, _held(folder):
        shapes = {name: reader.files.shape(name) for name in reader.files.names}
        decisions = decide(shapes, config, reader.config.num_hidden_layers)
        formats = {decision.name: decision.format for decision in decisions}
        _check_matrices(reader, formats, {"nvfp4", "fp8"} if config.layout == "modelopt" else {"nvfp4"})
        ids = _checked_ids(documents, reader.config.vocab_size)
        fingerprint = _fingerprint(reader, config, ids)
        chooser = Chooser(config, formats)
        try:
            _open_record(folder, fingerprint, calibration, ids, replace)
            _check_room(folder, reader, chooser, shapes, sum(map(len, ids)))
            _Run(reader, calibration, chooser, ids).go(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        return load_calibration(folder, calibration, reader.num_layers)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError("another process calibrates here", where=str(folder)) from error
        yield


def _check_matrices(reader: LayerReader, formats: dict[str, Any], calibrated: set[str]) -> None:
    seen = {name for i in range(reader.num_layers) for name in _layer_names(reader, i)}
    for name, format in formats.items():
        if format in calibrated and name not in seen:
            raise RecipeError(
                "calibration does not see the inputs of this matrix",
                where=name,
                expected="a matrix of attention, MLP or experts in a layer",
                fix="keep it, or give it a format of weights alone: --rule 'PATTERN=nvfp4_w4a16'",
            )


def _layer_names(reader: LayerReader, index: int) -> set[str]:
    layer = reader.outline.get_submodule(reader.prefix(index)[:-1])
    assert isinstance(layer, DecoderLayer)
    own = f"mtp.layers.{index - reader.config.num_hidden_layers}.eh_proj.weight"
    names = {name for parts in reader.names[own].parts for name in parts} if own in reader.names else set[str]()
    names |= {name for site in linear_sites(reader, index, layer) for name in site.weights}
    if isinstance(layer.mlp, MoE):
        names |= {name for parts in expert_names(reader, index) for group in parts for name in group}
    return names


def _checked_ids(documents: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    ids = [list(document) for document in documents if document]
    worst = max((max(document) for document in ids), default=-1)
    if not ids or worst >= vocab_size:
        raise CheckpointError(
            "there is nothing to calibrate on" if not ids else f"the text has token {worst}",
            where="calibration.text",
            expected=f"tokens below {vocab_size}",
            fix="calibrate on text of the checkpoint's own tokenizer",
        )
    return ids


def _fingerprint(reader: LayerReader, config: QuantizeConfig, ids: list[list[int]]) -> str:
    """Of source, text, and of the settings that change what is recorded; ranges are chosen when it is read."""
    assert config.calibration is not None
    chosen = config.model_dump(mode="json", exclude={"calibration", "layout", "input_scale", "kv_cache"})
    how = config.calibration.model_dump(mode="json", include={"gptq", "damping", "act_order"})
    choosing = {**chosen, **how} if config.calibration.gptq or config.scale_choice == "local_hessian" else {}
    experts = config.calibration.model_dump(mode="json", include={"cold_experts", "min_expert_tokens"})
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in reader.files.descriptors}
    behind = [reader.num_layers] if reader.config.mtp else []
    said = json.dumps([reader.hf_config, files, choosing, experts, ids, *behind], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _open_record(
    folder: Path, fingerprint: str, config: CalibrationConfig, ids: list[list[int]], replace: bool
) -> None:
    remove_leftovers(folder)
    if (folder / RECORD_FILE).exists():
        if read_json(folder / RECORD_FILE).get("fingerprint") == fingerprint:
            return
        if not replace:
            raise CheckpointError(
                "holds the calibration of another checkpoint, text or choice of weights",
                where=str(folder),
                fix="remove the folder, or name another one: --calibration-record",
            )
        for file in (*folder.glob("layer-*"), *folder.glob("hidden-*")):
            file.unlink()
    content = {
        "fingerprint": fingerprint,
        "text": config.text,
        "documents": len(ids),
        "tokens": sum(map(len, ids)),
    }
    write_json(folder / RECORD_FILE, content)


def _check_room(
    folder: Path, reader: LayerReader, chooser: Chooser, shapes: dict[str, tuple[int, ...]], tokens: int
) -> None:
    """For the weights that are chosen, 4.5 bits each, and the hidden states of two layers."""
    chosen = sum(math.prod(shape) for name, shape in shapes.items() if chooser.moment([name]) != "none")
    config = reader.config
    streams = 1 if config.residual.kind == "plain" else config.residual.num_streams
    wanted = chosen * 9 // 16 + 2 * tokens * config.hidden_size * streams * 4 + _MARGIN_BYTES
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if (free := shutil.disk_usage(folder).free + there) < wanted:
        raise CapacityError(
            f"the disk has {free / 1e9:.2f} GB free",
            where=str(folder),
            expected=f"{wanted / 1e9:.2f} GB",
            fix="free space or choose another place, then run the same command again",
        )


class _KvRanges(VarlenCausal):
    """Attention of whole documents that remembers how large keys, values and latents were."""

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        super().__init__(cu_seqlens)
        self.k_amax = self.v_amax = 0.0
        self.latent_amax: float | None = None

    def attend(self, layer_idx: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        self.k_amax = max(self.k_amax, float(k_NGK.abs().max()))
        self.v_amax = max(self.v_amax, float(v_NGK.abs().max()))
        return super().attend(layer_idx, q_NHK, k_NGK, v_NGK)

    def keep_latents(self, layer_idx: int, latent_NC: Tensor) -> None:
        self.latent_amax = max(self.latent_amax or 0.0, float(latent_NC.abs().max()))


class _Chunk:
    """Some documents, and the residual stream behind the last layer for them."""

    def __init__(self, positions: Tensor, bounds: Sequence[int], config: ModelConfig) -> None:
        self.size, self.positions, self.bounds = len(positions), positions, list(bounds)
        self.cos, self.sin = rope_table(positions, config.rotary_size, config.rope_theta, config.rope_scaling)
        self.state: Any = None

    @classmethod
    def of(cls, documents: list[list[int]], config: ModelConfig) -> _Chunk:
        lengths = [len(document) for document in documents]
        return cls(torch.cat([torch.arange(length) for length in lengths]), [0, *accumulate(lengths)], config)


def _cut(ids: list[list[int]], reader: LayerReader) -> list[_Chunk]:
    groups: list[list[list[int]]] = [[]]
    for document in ids:
        if groups[-1] and sum(map(len, groups[-1])) + len(document) > _CHUNK:
            groups.append([])
        groups[-1].append(document)
    return [_Chunk.of(group, reader.config) for group in groups]


class _Run:
    """The layers, one after the other."""

    def __init__(self, reader: LayerReader, config: CalibrationConfig, chooser: Chooser, ids: list[list[int]]) -> None:
        self.reader, self.config, self.chooser, self.ids = reader, config, chooser, ids
        self.chunks = _cut(ids, reader)
        self.num_layers = reader.config.num_hidden_layers

    def go(self, folder: Path) -> None:
        """Run what is not there yet."""
        finished, total = 0, self.reader.num_layers
        while (folder / f"layer-{finished:05d}.json").exists():
            finished += 1
        if finished >= total:
            for file in folder.glob("hidden-*.safetensors"):  # a kill came before they went
                file.unlink()
            return
        self._restore(folder / f"hidden-{finished - 1:05d}.safetensors" if finished else None)
        specs = [self.reader.spec(index) for index in range(total)]
        per_layer = [1 + (self.reader.config.num_experts if spec.ffn == "moe" else 1) for spec in specs]
        start = sum(per_layer[:finished])
        label = f"calibrate {self.reader.files.listing.parent.name} (parts of layers)"
        with Progress(label, sum(per_layer), start=start) as self.progress:
            for index in range(finished, self.num_layers):
                self.done = sum(per_layer[:index])
                record = self._layer(index)
                hidden = self._hidden() if index + 1 < total else None
                record.save(folder, index, hidden)
            if total > self.num_layers:
                self.done = sum(per_layer[: self.num_layers])
                # All depths read the decoder's last states, which go when the first of them is finished.
                for index, record in reversed(list(enumerate(self._mtp(), self.num_layers))):
                    record.save(folder, index, None, keeps_hidden=index > self.num_layers)
            self.progress.update(sum(per_layer))

    def _mtp(self) -> list[LayerRecord]:
        """The layers of multi-token prediction, each over the tokens that have one so far ahead and one more.

        Raises:
            CheckpointError: every document is too short.
        """
        config, norm, ends = self.reader.config, self.reader.norm(), self.reader.ends()
        assert config.mtp is not None
        post_norm, flat = config.mtp.input_state == "post_norm", iter([t for ids in self.ids for t in ids])
        pre_norm = [ends.exit(chunk.state) for chunk in self.chunks]
        targets = states = [norm(x) for x in pre_norm] if post_norm else pre_norm
        shifts = []
        for chunk in self.chunks:
            ids = torch.tensor([next(flat) for _ in range(chunk.size)])
            shifts.append(shift_documents(ids, chunk.positions, ids.roll(-1), chunk.bounds, config.mtp.depth))
        records = []
        for k in range(config.mtp.depth):
            layer = self.reader.mtp_layer(k)
            there = [i for i, batches in enumerate(shifts) if k < len(batches)]
            if not there:
                raise CheckpointError(
                    f"no document has the {k + 3} tokens that layer {k + 1} of multi-token prediction needs",
                    where="calibration.text",
                    fix="calibrate on longer documents",
                )
            batches = {i: shifts[i][k] for i in there}
            inputs = [
                layer.halves(
                    states[i][b.rows_before_M] if config.mtp.chain_hidden else targets[i][b.rows_M],
                    self.reader.embed(b.input_ids_M),
                )
                for i, b in batches.items()
            ]
            own = LayerRecord({}, KvRange(0.0, 0.0), None, {}, {})
            site = Site("eh_proj", [layer.eh_proj], [self.reader.names[f"mtp.layers.{k}.eh_proj.weight"]])
            with _observed([site], self.chooser) as statistics:
                joined = [layer.eh_proj(x) for x in inputs]
            if self._finish([site], statistics, own):
                joined = [layer.eh_proj(x) for x in inputs]
            self.chunks = [_Chunk(b.positions_M, b.cu_seqlens, config) for b in batches.values()]
            for chunk, x in zip(self.chunks, joined, strict=True):
                chunk.state = layer.residual.enter(x)
            record = self._layer(self.num_layers + k)
            records.append(own.joined(record))
            pre_norm = [layer.residual.exit(chunk.state) for chunk in self.chunks]
            behind = [layer.norm(x) for x in pre_norm] if post_norm else pre_norm
            states = [behind[there.index(i)] if i in batches else state for i, state in enumerate(states)]
        return records

    def _step(self, layer: int) -> None:
        self.done += 1
        self.progress.update(self.done, layer=layer)

    def _restore(self, file: Path | None) -> None:
        """Hidden states of every chunk: those behind the last finished layer, or fresh embeddings."""
        ends = self.reader.ends()
        flat = torch.tensor([token for document in self.ids for token in document])
        hidden = self.reader.embed(flat) if file is None else load_file(file)["hidden"]
        for chunk, part in zip(self.chunks, hidden.split([chunk.size for chunk in self.chunks]), strict=True):
            if file is None:
                chunk.state = ends.enter(part)
            else:
                chunk.state = part.clone() if part.dim() == 2 else StreamState(part.clone(), None)

    def _hidden(self) -> Tensor:
        """What a resumed run reads; this one goes on from the same numbers."""
        for chunk in self.chunks:
            if isinstance(chunk.state, StreamState):
                chunk.state = StreamState(chunk.state.x_NnD, None)
        return torch.cat([c.state.kept_NnD if isinstance(c.state, StreamState) else c.state for c in self.chunks])

    def _layer(self, index: int) -> LayerRecord:
        layer = self.reader.layer(index)
        record = LayerRecord({}, KvRange(0.0, 0.0), None, {}, {})
        sites = linear_sites(self.reader, index, layer)
        self._attention(layer, [site for site in sites if site.key.startswith("attention.")], record)
        self._step(index)
        rest = [site for site in sites if not site.key.startswith("attention.")]
        if isinstance(layer.mlp, MoE):
            self._experts(index, layer, layer.mlp, rest, record)
        else:
            self._mlp(layer, rest, record)
            self._step(index)
        return record

    def _attention(self, layer: DecoderLayer, sites: list[Site], record: LayerRecord) -> None:
        residual, ranges = layer.attention_residual, []
        readings: list[tuple[Tensor, Any]] = []
        outputs: list[Tensor] = []

        def run(chunk: _Chunk, normed_ND: Tensor) -> Tensor:
            ranges.append(_KvRanges(chunk.bounds))
            out: Tensor = layer.attention(normed_ND, chunk.cos, chunk.sin, ranges[-1])
            return out

        for chunk in self.chunks:
            u_ND, ctx = residual.read(chunk.state)
            readings.append((residual.normed(chunk.state, u_ND, layer.input_layernorm), ctx))
        with _observed(sites, self.chooser) as statistics:
            outputs = [run(c, normed) for c, (normed, _) in zip(self.chunks, readings, strict=True)]
        if self._finish(sites, statistics, record):
            outputs = [run(c, normed) for c, (normed, _) in zip(self.chunks, readings, strict=True)]
        for chunk, (_, ctx), out in zip(self.chunks, readings, outputs, strict=True):
            chunk.state = residual.write(chunk.state, ctx, out)
        latent = [found.latent_amax for found in ranges if found.latent_amax is not None]
        k_amax, v_amax = (max(getattr(found, part) for found in ranges) for part in ("k_amax", "v_amax"))
        record.kv = KvRange(k_amax, v_amax, max(latent, default=None))

    def _mlp(self, layer: DecoderLayer, sites: list[Site], record: LayerRecord) -> None:
        inputs, contexts = self._read_mlp(layer)
        outputs = self._through(layer.mlp, inputs, sites, record)
        self._write_mlp(layer, contexts, outputs)

    def _through(self, module: nn.Module, inputs: list[Tensor], sites: list[Site], record: LayerRecord) -> list[Tensor]:
        """A SwiGLU block over every chunk."""
        with _observed(sites, self.chooser) as statistics:
            outputs = [module(x) for x in inputs]
        return [module(x) for x in inputs] if self._finish(sites, statistics, record) else outputs

    def _read_mlp(self, layer: DecoderLayer) -> tuple[list[Tensor], list[Any]]:
        residual, inputs, contexts = layer.mlp_residual, [], []
        for chunk in self.chunks:
            u_ND, ctx = residual.read(chunk.state)
            inputs.append(residual.normed(chunk.state, u_ND, layer.post_attention_layernorm))
            contexts.append(ctx)
        return inputs, contexts

    def _write_mlp(self, layer: DecoderLayer, contexts: list[Any], outputs: Sequence[Tensor]) -> None:
        for chunk, ctx, out in zip(self.chunks, contexts, outputs, strict=True):
            chunk.state = layer.mlp_residual.write(chunk.state, ctx, out)

    def _finish(self, sites: list[Site], statistics: dict[str, InputStatistics], record: LayerRecord) -> bool:
        """Keep the statistics and choose weights; True where those that the layer computes with have changed."""
        changed = False
        for site in sites:
            found = statistics[site.key]
            record.inputs[site.key] = (list(site.weights), found)
            changed |= self.chooser.choose(site.pieces(), found, record)
            found.moment = None
        return changed

    def _experts(self, index: int, layer: DecoderLayer, mlp: MoE, sites: list[Site], record: LayerRecord) -> None:
        inputs, contexts = self._read_mlp(layer)
        x_ND = torch.cat(inputs)
        routing = mlp.router(x_ND)
        names = expert_names(self.reader, index)
        load_E = torch.bincount(routing.expert_ids_NA.flatten(), minlength=len(names))
        check_coverage(index, load_E, len(x_ND), self.config)
        wanted = wanted_tokens(load_E, self.config) if self.config.cold_experts in ("force", "balance") else 0
        shared = [InputStatistics(width) for width in (x_ND.shape[1], self.reader.config.moe_intermediate_size)]
        out_ND, given, data_free = torch.zeros_like(x_ND), [], []
        for expert, groups in enumerate(names):
            token, slot = (routing.expert_ids_NA == expert).nonzero(as_tuple=True)
            more = given_tokens(expert, token, routing.scores_NE, wanted)
            given.append(len(more))
            cold = len(token) + len(more) < self.config.min_expert_tokens
            data_free += [expert] if cold else []
            if len(token) + len(more):
                x = x_ND[torch.cat((token, more))]
                y = self._expert(index, expert, groups, x, None if cold else record, shared)[: len(token)]
                out_ND.index_add_(0, token, y * routing.weights_NA[token, slot, None].to(y.dtype))
            self._step(index)
        for part, statistics in enumerate(shared):
            key = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")[part]
            record.inputs[key] = ([name for groups in names for name in groups[part]], statistics)
        record.coverage = LayerCoverage(index, tuple(load_E.tolist()), tuple(given), tuple(data_free))
        outputs = list(out_ND.split([chunk.size for chunk in self.chunks]))
        if mlp.shared_experts is not None:
            others = self._through(mlp.shared_experts, inputs, sites, record)
            outputs = [a + b for a, b in zip(outputs, others, strict=True)]
        self._write_mlp(layer, contexts, outputs)

    def _expert(
        self,
        layer: int,
        expert: int,
        groups: tuple[tuple[str, ...], ...],
        x: Tensor,
        record: LayerRecord | None,
        shared: list[InputStatistics],
    ) -> Tensor:
        """Outputs of an expert, by the weights that it has from now on; without a record none is chosen on data."""
        weights = list(self.reader.expert(layer, expert))
        changed, hidden = False, swiglu(F.linear(x, weights[0]))
        for part, values in enumerate((x, hidden)):
            shared[part].add(values)
            if record is None:
                continue
            own = InputStatistics(values.shape[1], self.chooser.moment(groups[part]), histogram=False)
            own.add(values)
            key = f"mlp.experts.{expert}.{('gate_up_proj', 'down_proj')[part]}"
            record.inputs[key] = (list(groups[part]), own)
            pieces = list(zip(groups[part], weights[part].chunk(len(groups[part])), strict=True))
            changed |= self.chooser.choose(pieces, own, record)
            own.moment = None
        return F.linear(swiglu(F.linear(x, weights[0])) if changed else hidden, weights[1])


@contextmanager
def _observed(sites: list[Site], chooser: Chooser) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of every place, by its key, over what runs inside."""
    found = {site.key: InputStatistics(site.width, chooser.moment(site.weights)) for site in sites}

    def hook(statistics: InputStatistics) -> Any:
        return lambda module, args: statistics.add(args[0])

    handles = [site.modules[0].register_forward_pre_hook(hook(found[site.key])) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
