"""A checkpoint's decoder one layer at a time, and of a mixture of experts one expert: never the whole of it.

Shapes: N tokens, D hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tafkir.checkpoint.load import read_manifest
from tafkir.checkpoint.quantized import packed_method
from tafkir.checkpoint.read import WeightFiles, fp8_block_size, open_weights, read_json
from tafkir.models.decoder import Decoder, DecoderLayer
from tafkir.models.experts import MoE
from tafkir.models.hf import Resolved, architecture_of, config_from_hf, drop_absent_mtp, resolve_names, split_pieces
from tafkir.models.hf.convert import check_names, repeated_names
from tafkir.models.layers import RMSNorm
from tafkir.models.mtp import MtpLayer
from tafkir.models.residual import ResidualStream, build_residual
from tafkir.models.router import Router
from tafkir.recipe.bundled import find_checkpoint
from tafkir.recipe.model import LayerSpec

__all__ = ["LayerReader", "open_layers"]

Part = TypeVar("Part", bound=nn.Module)

_ROWS = 4096  # of the embedding table, read at a time


class LayerReader:
    """Parts of a decoder as modules in float32, each filled from the files when it is asked for.

    Attributes:
        files: open.
        hf_config: of config.json.
        outline: the decoder on the meta device.
        names: what each tensor of the decoder's state dict is made of.
    """

    def __init__(self, files: WeightFiles, hf_config: dict[str, Any], where: str) -> None:
        plain = {key: value for key, value in hf_config.items() if key != "quantization_config"}
        self.files, self.hf_config = files, hf_config
        table = architecture_of(hf_config, where)
        self.config = drop_absent_mtp(config_from_hf(plain, where), files.names)
        with torch.device("meta"):
            self.outline = Decoder(self.config)
        self.names: dict[str, Resolved] = {names.name: names for names in resolve_names(self.outline, table)}
        wanted = {name for names in self.names.values() for parts in names.parts for name in parts}
        check_names(wanted, set(files.names) - repeated_names(self.outline, table).keys())

    @property
    def num_layers(self) -> int:
        """Decoder layers, and behind them those of multi-token prediction."""
        return self.config.num_hidden_layers + (self.config.mtp.depth if self.config.mtp else 0)

    def prefix(self, index: int) -> str:
        """What names of the decoder's tensors begin with in a layer; of multi-token prediction, in its block."""
        behind = index - self.config.num_hidden_layers
        return f"layers.{index}." if behind < 0 else f"mtp.layers.{behind}.block."

    def spec(self, index: int) -> LayerSpec:
        """What kind of layer it is."""
        specs = self.config.layer_specs
        return specs[index] if index < len(specs) else self.config.mtp_layer_spec

    def layer(self, index: int) -> DecoderLayer:
        """A decoder layer without its routed experts, which stay on the meta device: see `expert`. Behind the last one
        come the blocks of multi-token prediction."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index, self.spec(index))
        experts = layer.mlp.experts if isinstance(layer.mlp, MoE) else None
        if isinstance(layer.mlp, MoE):
            layer.mlp.experts = nn.Identity()  # type: ignore[assignment]
        layer = self._filled(layer, self.prefix(index))
        if isinstance(layer.mlp, MoE) and experts is not None:
            layer.mlp.experts = experts
        return layer

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Weights of a routed expert: gate over up [2I, D], and down [D, I]."""
        made = []
        for part in ("gate_up_proj", "down_proj"):
            name = f"{self.prefix(layer)}mlp.experts.{part}"
            shape = self.outline.get_parameter(name).shape[1:]
            weight = torch.empty(shape)
            theirs = self.names[name].parts[expert]
            for their, piece in zip(theirs, weight.chunk(len(theirs)), strict=True):
                self.files.read_into(their, piece)
            made.append(weight)
        return made[0], made[1]

    def ends(self) -> ResidualStream:
        """The ends of the residual stream."""
        with torch.device("meta"):
            module = build_residual(self.config)
        return self._filled(module, "residual.")

    def norm(self) -> RMSNorm:
        """The norm behind the last decoder layer."""
        return self._filled(RMSNorm(self.config.hidden_size, self.config.rms_norm_eps), "norm.")

    def mtp_layer(self, depth: int) -> MtpLayer:
        """What stands around the block of a layer of multi-token prediction, whose own place is empty."""
        with torch.device("meta"):
            layer = MtpLayer(self.config, nn.Identity())
        return self._filled(layer, f"mtp.layers.{depth}.")

    def embed(self, ids: Tensor) -> Tensor:
        """Rows [N, D] of the embedding table; a few thousand rows of it are in memory at once."""
        ((name,),) = self.names["embed_tokens.weight"].parts
        rows, width = self.files.shape(name)
        out = torch.empty(len(ids), width)
        if name in self.files.encoded:
            return torch.nn.functional.embedding(ids, self.files.read(name).float())
        step = _ROWS if self.files.block_size is None else _ROWS // self.files.block_size[0] * self.files.block_size[0]
        for start in range(0, rows, max(step, 1)):
            chunk = range(start, min(rows, start + max(step, 1)))
            (where,) = ((ids >= chunk.start) & (ids < chunk.stop)).nonzero(as_tuple=True)
            if len(where):
                place = torch.empty(len(chunk), width)
                self.files.read_window(name, (rows, width), chunk, range(width), place)
                out[where] = place[ids[where] - chunk.start]
        return out

    def _filled(self, module: Part, prefix: str) -> Part:
        module = module.to_empty(device="cpu").float()
        for part in module.modules():
            if isinstance(part, Router) and part.expert_bias is not None:
                part.expert_bias = part.expert_bias.float()
        for name, tensor in module.state_dict().items():
            for theirs, piece in split_pieces(tensor, self.names[prefix + name]):
                self.files.read_into(theirs, piece)
        return module.requires_grad_(False)


@contextmanager
def open_layers(name: Path | str) -> Iterator[LayerReader]:
    """Open a checkpoint of any kind that `load_checkpoint` takes, to be read layer by layer.

    Raises:
        CheckpointError: as `load_checkpoint`, as far as config and headers go; tensors are checked when they are read.
    """
    path = find_checkpoint(name)
    hf_config, where = read_json(path / "config.json"), str(path / "config.json")
    blocks, packed = fp8_block_size(hf_config, where), packed_method(hf_config, path)
    with open_weights(path, block_size=blocks, packed=packed, manifest=read_manifest(path)) as files:
        yield LayerReader(files, hf_config, where)
