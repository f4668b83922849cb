"""Where matrices of a decoder layer read: linear maps with the same inputs, and the weights that they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tafkir.checkpoint.layers import LayerReader
from tafkir.models.decoder import DecoderLayer
from tafkir.models.hf import split_pieces
from tafkir.models.hf.table import Resolved
from tafkir.models.layers import Linear

__all__ = ["Site", "expert_names", "linear_sites"]

# MLA's maps of the hidden states, of which a layer has two.
_SAME_INPUTS = ("attention.q_a_proj", "attention.q_proj", "attention.kv_a_proj")


@dataclass(frozen=True, slots=True)
class Site:
    """Linear maps that read the same inputs.

    Attributes:
        key: name of the first of them within its layer.
        modules: the maps.
        names: what each one's weight is made of.
    """

    key: str
    modules: list[Linear]
    names: list[Resolved]

    @property
    def width(self) -> int:
        """Of the inputs."""
        return int(self.modules[0].weight.shape[1])

    @property
    def weights(self) -> list[str]:
        """Names of the checkpoint."""
        return [name for names in self.names for parts in names.parts for name in parts]

    def pieces(self) -> list[tuple[str, Tensor]]:
        """Each weight of the checkpoint, as a view of the module's."""
        return list(self._pieces())

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        for module, names in zip(self.modules, self.names, strict=True):
            yield from split_pieces(module.weight.data, names)


def linear_sites(reader: LayerReader, index: int, layer: DecoderLayer) -> list[Site]:
    """The linear maps of a layer, by what they read; routed experts are not among them."""
    sites: dict[str, Site] = {}
    first = None
    for name, module in layer.named_modules():
        if not isinstance(module, Linear):
            continue
        key = name
        if name in _SAME_INPUTS:
            key = first = first or name
        site = sites.setdefault(key, Site(key, [], []))
        site.modules.append(module)
        site.names.append(reader.names[f"{reader.prefix(index)}{name}.weight"])
    return list(sites.values())


def expert_names(reader: LayerReader, index: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each routed expert of a layer, the weights of the checkpoint that read its inputs, and its hidden states."""
    up, down = (
        reader.names[f"{reader.prefix(index)}mlp.experts.{part}"].parts for part in ("gate_up_proj", "down_proj")
    )
    return list(zip(up, down, strict=True))
