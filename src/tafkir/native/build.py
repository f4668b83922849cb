"""`python -m tafkir.native.build`: compiles the kernels for this machine with the system's C++ compiler."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tafkir.errors import BackendUnavailable
from tafkir.native.compiled import BUILD_COMMAND, SOURCES, flags, kernels_path

__all__ = ["build", "torch_blas"]

logger = logging.getLogger("tafkir")


def build() -> Path:
    """Compile the C++ files beside this one into the user's cache, or return the library that is there.

    Raises:
        BackendUnavailable: no C++ compiler is installed, it refuses the source, the cache is not writable, or torch's
            matrix product, which the kernels call, cannot be reached.
    """
    target = kernels_path()
    if target.exists():
        return target
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not shutil.which(compiler[0]):
        raise BackendUnavailable("no C++ compiler found", where=compiler[0] or None, fix="install g++, or set CXX")
    torch_blas()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            units = [str(source) for source in SOURCES if source.suffix == ".cpp"]
            command = [*compiler, *flags(), *units, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip()[-400:]
                raise BackendUnavailable(f"{compiler[0]} says {said}", where=str(SOURCES[0].parent))
            made.replace(target)
    except OSError as error:
        fix = "make it writable, or set XDG_CACHE_HOME to a folder that is"
        raise BackendUnavailable(str(error), where=str(target.parent), fix=fix) from error
    return target


def torch_blas() -> ctypes.c_void_p:
    """The address of the float32 matrix product (`sgemm_`) that torch's processor library exports.

    Raises:
        BackendUnavailable: this build of torch has none.
    """
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin).parent / "lib" / "libtorch_cpu.so" if spec and spec.origin else None
    sgemm = getattr(ctypes.CDLL(str(path)), "sgemm_", None) if path and path.exists() else None
    if sgemm is None:
        raise BackendUnavailable("this build of torch does not export its matrix product (sgemm_)", where=str(path))
    return ctypes.cast(sgemm, ctypes.c_void_p)


def main() -> None:
    """Build, and say in one line what became of it."""
    parser = argparse.ArgumentParser(prog=BUILD_COMMAND, description="Compile the native kernels for this processor.")
    parser.add_argument("--optional", action="store_true", help="failing to build is no error")
    optional: bool = parser.parse_args().optional
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        logger.info("Native kernels: %s", build())
    except BackendUnavailable as error:
        logger.info("Native kernels are not built, torch's are used: %s. To build them later: %s", error, BUILD_COMMAND)
        sys.exit(0 if optional else error.exit_code)


if __name__ == "__main__":
    main()
