"""Where the compiled kernels of this machine lie, and which arithmetic a choice of `kernels` means. Without torch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Literal

from tafkir.errors import BackendUnavailable, RecipeError

__all__ = ["BUILD_COMMAND", "OVERRIDE", "SOURCES", "KernelChoice", "flags", "kernels_path", "resolve_kernels"]

KernelChoice = Literal["auto", "native", "torch"]

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        *("kernels.cpp", "streams.cpp", "formats.cpp", "weights.cpp", "sublayers.cpp", "paged.cpp", "decode.cpp"),
        *("digits.h", "shared.h", "tiles.h", "vectors.h"),
    )
)
OVERRIDE = "TAFKIR_KERNELS"
"""Environment variable that says what "auto" means, "native" or "torch"; a recipe's own word counts more."""
BUILD_COMMAND = "python -m tafkir.native.build"


def flags() -> tuple[str, ...]:
    """The compiler's flags. Sums are reordered only where a loop says so ("omp simd"): no -ffast-math."""
    vectors = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    plain = "-O3 -march=native -std=c++17 -fPIC -shared -fopenmp -fopenmp-simd -fno-math-errno -fno-trapping-math"
    return (*plain.split(), *vectors)


@functools.cache
def kernels_path() -> Path:
    """Where the library lies once it is built: in the user's cache, under a name of its own for each source, flags
    and processor, so that one made for another processor is never loaded."""
    parts = [*(source.read_bytes() for source in SOURCES), " ".join(flags()).encode(), _processor().encode()]
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tafkir" / f"kernels-{digest}.so"


def resolve_kernels(choice: KernelChoice) -> Literal["native", "torch"]:
    """What a choice means on this machine; "auto" takes the native kernels where they are built.

    Raises:
        BackendUnavailable: "native", and they are not built.
        RecipeError: TAFKIR_KERNELS holds another word.
    """
    if choice == "auto":
        word = os.environ.get(OVERRIDE, "auto")
        if word not in ("auto", "native", "torch"):
            raise RecipeError(f"{OVERRIDE}={word!r}", expected="auto, native or torch")
        if word == "auto":
            return "native" if kernels_path().exists() else "torch"
        choice = "native" if word == "native" else "torch"
    if choice == "native" and not kernels_path().exists():
        raise BackendUnavailable(
            "the native kernels are not built for this processor",
            where=str(kernels_path()),
            fix=f'{BUILD_COMMAND} (needs a C++ compiler), or set kernels = "torch"',
        )
    return choice


def _processor() -> str:
    """The processor's name and instruction sets."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines() if path.exists() else []
    wanted = ("vendor_id", "model name", "cpu family", "model", "flags", "Features", "CPU part")
    told = [line for line in lines if line.partition(":")[0].strip() in wanted]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *told])
