"""Chooses NVFP4 weights on the inputs that they met: scales by the local Hessian, codes by GPTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tafkir.errors import CheckpointError
from tafkir.ops.nvfp4 import BLOCK_SIZE, Nvfp4, dequantize_nvfp4
from tafkir.ops.nvfp4_scales import search_nvfp4
from tafkir.quant.calibration import LayerRecord
from tafkir.quant.formats import NVFP4_FORMATS
from tafkir.quant.gptq import gptq_nvfp4, input_order, inverse_factor, output_error
from tafkir.quant.hessian import search_local_hessian
from tafkir.quant.observe import InputStatistics, Moment
from tafkir.quant.policy import sibling_group
from tafkir.recipe.quantize import FormatName, QuantizeConfig

__all__ = ["Chooser"]


class Chooser:
    """What a quantization wants to choose on data.

    Args:
        config: with `calibration` set.
        formats: of every weight, by name.
    """

    def __init__(self, config: QuantizeConfig, formats: Mapping[str, FormatName]) -> None:
        assert config.calibration is not None
        self.calibration, self.scales, self.formats = config.calibration, config.scale_choice, formats

    def moment(self, names: Sequence[str]) -> Moment:
        """What has to be known of the second moments of these weights' inputs."""
        if not any(self.formats[name] in NVFP4_FORMATS for name in names):
            return "none"
        if self.calibration.gptq:
            return "full"
        return "blocks" if self.scales == "local_hessian" else "none"

    def choose(self, pieces: Sequence[tuple[str, Tensor]], seen: InputStatistics, record: LayerRecord) -> bool:
        """Choose the weights that read the same inputs, and record them.

        GPTQ's are put in the place of the weights, so that what follows reads their outputs.

        Args:
            pieces: names and weights.
            seen: of their inputs, with the second moment that `moment` asks for.
            record: of the layer.

        Returns:
            Whether weights have changed.
        """
        groups: dict[str, list[tuple[str, Tensor]]] = {}
        for name, weight in pieces:
            if self.formats[name] in NVFP4_FORMATS:
                groups.setdefault(sibling_group(name), []).append((name, weight))
        if seen.moment is None or not groups:
            return False
        hessian = seen.moment / max(1, seen.tokens)
        factor = self._factor(hessian, pieces[0][0]) if self.calibration.gptq else None
        for members in groups.values():
            # What engines read as one matrix shares its global scale, and so can be chosen as one.
            weight = torch.cat([weight for _, weight in members])
            chosen = self._scales(weight, hessian)
            errors = torch.zeros(2, 0)
            if factor is not None:
                chosen, errors = self._round(weight, chosen, hessian, factor)
            start = 0
            for name, part in members:
                rows = slice(start, start + len(part))
                record.weights[name] = Nvfp4(chosen.packed[rows], chosen.scale[rows], chosen.global_scale.clone())
                if factor is not None:
                    before, after = errors[:, rows].sum(1).tolist()
                    record.errors[name] = after / before if before > 0 else 1.0
                    part.copy_(dequantize_nvfp4(*record.weights[name]))
                start += len(part)
        return factor is not None

    def _factor(self, hessian: Tensor, name: str) -> Tensor:
        if self.calibration.act_order:
            order = input_order(hessian)
            hessian = hessian[order][:, order]
        try:
            return inverse_factor(hessian, self.calibration.damping)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=name, expected=error.expected, fix=error.fix) from error

    def _scales(self, weight: Tensor, hessian: Tensor) -> Nvfp4:
        if self.scales != "local_hessian":
            return search_nvfp4(weight, self.scales)
        if hessian.dim() == 2:
            grid = hessian.view(len(hessian) // BLOCK_SIZE, BLOCK_SIZE, -1, BLOCK_SIZE)
            hessian = grid.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return search_local_hessian(weight, hessian)

    def _round(self, weight: Tensor, nearest: Nvfp4, hessian: Tensor, factor: Tensor) -> tuple[Nvfp4, Tensor]:
        """GPTQ's codes, and the output errors [2, rows] of the nearest and of them."""
        chosen = gptq_nvfp4(weight, nearest, hessian, factor_KK=factor, act_order=self.calibration.act_order)
        errors = [output_error(weight, dequantize_nvfp4(*made), hessian) for made in (nearest, chosen)]
        return chosen, torch.stack(errors)
