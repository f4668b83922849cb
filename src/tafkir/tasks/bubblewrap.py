"""The bubblewrap command line of the sandbox: what a program inside can see, which is an interpreter and no more."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from tafkir.errors import BackendUnavailable
from tafkir.tasks.syscalls import build_filter

__all__ = ["ENVIRONMENT", "PACKAGES", "TMP_BYTES", "UNSAFE", "bwrap_command", "package_folders"]

TMP_BYTES: Final = 16 << 20
"""Size of the only folder that a program may write to, and of any file in it."""

PACKAGES: Final = "/packages"
"""Where the packages lie that a task asks for."""

# A fixed hash seed gives equal runs equal results; one thread, for there are no more to be had.
ENVIRONMENT: Final = {"PYTHONHASHSEED": "0", "TMPDIR": "/tmp", "OPENBLAS_NUM_THREADS": "1"}
UNSAFE: Final = "or choose the tier rlimit (--unsafe), which runs what the model writes with your own rights"
_NOBODY = "65534"
_INSTALL = "install it: apt install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora), pacman -S bubblewrap"


@cache
def package_folders(names: tuple[str, ...]) -> tuple[Path, ...]:
    """The folders of installed packages, and of the shared libraries that their wheels brought along.

    Args:
        names: of packages or modules in them.

    Raises:
        BackendUnavailable: one is not installed.
    """
    found: list[Path] = []
    for name in dict.fromkeys(name.partition(".")[0] for name in names):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise BackendUnavailable(
                f"programs of this task may import {name}, which is not installed", fix=f"pip install {name}"
            )
        folder = Path(spec.origin).resolve().parent
        found += [folder, *(libraries for libraries in [folder.with_name(f"{name}.libs")] if libraries.is_dir())]
    return tuple(found)


@cache
def bwrap_command(packages: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The command up to the system-call filter and `--`. Nothing inside can be written to but a small `/tmp`.

    Args:
        packages: installed ones that lie, read-only and alone, below `PACKAGES`.

    Raises:
        BackendUnavailable: bubblewrap or a package is missing, or this machine has no filter that would hold root.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise BackendUnavailable(
            "model-written code is run in a sandbox, and bubblewrap (bwrap) is not installed",
            fix=f"{_INSTALL}; {UNSAFE}",
        )
    if build_filter() is None and os.geteuid() == 0:
        raise BackendUnavailable(
            "the sandbox cannot limit the processes of root on this kind of processor",
            fix=f"start it as another user; {UNSAFE}",
        )
    command = [bwrap, "--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    bound = [*map(Path, ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")), *_interpreter()]
    for path in bound:
        if path.is_symlink() and path.parent == Path("/"):  # /lib -> usr/lib, as most systems have it
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    for path in _hidden(bound):
        command += ["--tmpfs", str(path), "--remount-ro", str(path)]
    command += ["--ro-bind", str(Path(__file__).with_name("sandbox_program.py").resolve()), "/runner.py"]
    for path in package_folders(packages):
        command += ["--ro-bind", str(path), f"{PACKAGES}/{path.name}"]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--size", str(TMP_BYTES), "--perms", "0755", "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/"]
    return tuple(command)


def _interpreter() -> list[Path]:
    """The interpreter's program, its standard library, and the shared library that it may be linked to."""
    paths = {Path(os.path.realpath(sys.executable))}
    paths |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    library, folder = sysconfig.get_config_var("INSTSONAME"), sysconfig.get_config_var("LIBDIR")
    if library and folder:
        paths.add(Path(folder) / str(library))
    return [path for path in sorted(paths) if not path.is_relative_to("/usr/lib")]


def _hidden(bound: Sequence[Path]) -> list[Path]:
    """Folders inside the bound ones that hold more than the standard library: Tafkir's tests may be there."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    candidates = {stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")}
    candidates.add(Path(__file__).resolve().parents[1])
    found = sorted(path for path in candidates if path.is_dir() and any(path.is_relative_to(b) for b in bound))
    return [path for path in found if not any(path != other and path.is_relative_to(other) for other in found)]
