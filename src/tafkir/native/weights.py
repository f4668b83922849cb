"""The kernels that make NVFP4 and FP8 of whole weights, called with the addresses of buffers. Without torch."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Literal

from tafkir.errors import BackendUnavailable
from tafkir.native.compiled import BUILD_COMMAND, kernels_path, resolve_kernels

__all__ = ["KINDS", "RULES", "Buffer", "Kind", "Rule", "WeightKernels", "weight_kernels"]

Kind = Literal["F32", "BF16", "F8_E8M0"]
Rule = Literal["max", "four_over_six", "mse", "inverse"]

KINDS: dict[str, int] = {"F32": 0, "BF16": 1, "F8_E8M0": 2}
"""Number formats by their names in a safetensors header, as the kernels count them."""

RULES: dict[Rule, int] = {"max": 0, "four_over_six": 1, "mse": 2, "inverse": 3}
"""How block scales are chosen: `ops.nvfp4_scales.search_nvfp4`'s names, and `quantize_nvfp4_inverse`."""

_SIGNATURES = {
    "tafkir_weight_amax": "pllp",
    "tafkir_global_scale": "llfp",
    "tafkir_quantize_weight": "plllffpp",
    "tafkir_quantize_tiles": "plllllfpp",
    "tafkir_widen_scales": "pllp",
    "tafkir_fp8_to_bfloat16": "ppllllllp",
}
_TYPES = {"l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SMALLEST_NORMAL = 2.0**-126


class Buffer:
    """Memory that is used again and again: page-aligned, and never smaller than it was.

    Attributes:
        address: of its first byte; changes when it grows.
    """

    def __init__(self) -> None:
        self.size, self.address = 0, 0
        self._memory: mmap.mmap | None = None

    def view(self, num_bytes: int) -> memoryview:
        """The first bytes, after growing where there are fewer; what was in it before is lost then."""
        if num_bytes > self.size or self._memory is None:
            self.size = -(-max(num_bytes, 1) // (1 << 21)) * (1 << 21)
            self._memory = mmap.mmap(-1, self.size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return memoryview(self._memory)[:num_bytes]


class WeightKernels:
    """The kernels of one loaded library; each call runs on the caller's thread, without Python's lock."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_TYPES[letter] for letter in signature]
            function.restype = ctypes.c_int
        self._library = library

    def amax(self, address: int, dtype: str, count: int, so_far: float = 0.0) -> float:
        """The largest magnitude of float32 or bfloat16 numbers and `so_far`; NaN where there is one."""
        found = ctypes.c_float(so_far)
        self._library.tafkir_weight_amax(address, KINDS[dtype], count, ctypes.addressof(found))
        return found.value

    def global_scale(self, dtype: str, rule: Rule, amax: float) -> float:
        """The float32 scale of a weight; by the rule `inverse` one to divide by."""
        found = ctypes.c_float()
        self._library.tafkir_global_scale(KINDS[dtype], RULES[rule], amax, ctypes.addressof(found))
        return found.value

    def quantize_nvfp4(
        self, address: int, dtype: str, blocks: int, rule: Rule, amax: float, scale: int, packed: int
    ) -> None:
        """Fill the E4M3 scales, a byte for each block of 16, and the packed codes, eight bytes a block.

        Args:
            address: of float32 or bfloat16 numbers, all finite.
            dtype: theirs.
            blocks: how many.
            rule: how the scales are chosen.
            amax: of all the weights that share the global scale.
            scale: address of what is filled.
            packed: and of this.
        """
        total = self.global_scale(dtype, rule, amax)
        self._library.tafkir_quantize_weight(address, KINDS[dtype], blocks, RULES[rule], amax, total, scale, packed)

    def quantize_fp8(
        self, address: int, dtype: str, shape: tuple[int, int], tile: tuple[int, int], codes: int, scale: int
    ) -> None:
        """Fill E4M3 codes and float32 scales, one for each tile of a matrix; a whole row as tile has no least scale."""
        tiny = 0.0 if tile[0] == 1 else _SMALLEST_NORMAL
        self._library.tafkir_quantize_tiles(address, KINDS[dtype], *shape, *tile, tiny, codes, scale)

    def widen_scales(self, address: int, dtype: str, count: int, scale: int) -> bool:
        """Fill float32 scales from float32, bfloat16 or E8M0; False where one is negative or not finite."""
        return not self._library.tafkir_widen_scales(address, KINDS[dtype], count, scale)

    def dequantize_fp8(self, codes: int, scale: int, rows: range, width: int, block: tuple[int, int], out: int) -> bool:
        """Fill bfloat16 numbers from some rows of a matrix in FP8 blocks; False where one is not finite.

        Args:
            codes: address of those rows' codes.
            scale: of the whole matrix' float32 scales.
            rows: which rows they are.
            width: of the matrix.
            block: rows and columns that share a scale.
            out: address of what is filled.
        """
        columns = -(-width // block[1])
        found = self._library.tafkir_fp8_to_bfloat16(codes, scale, rows.start, len(rows), width, *block, columns, out)
        return not found


def weight_kernels() -> WeightKernels | None:
    """The kernels, where they are built and torch's arithmetic is not asked for.

    Raises:
        BackendUnavailable: the library is there and cannot be loaded.
        RecipeError: TAFKIR_KERNELS holds an unknown word.
    """
    return _load(str(kernels_path())) if resolve_kernels("auto") == "native" else None


@functools.cache
def _load(path: str) -> WeightKernels:
    try:
        return WeightKernels(ctypes.CDLL(path))
    except OSError as error:
        fix = f"delete it and build it again: {BUILD_COMMAND}"
        raise BackendUnavailable(str(error), where=path, fix=fix) from error
