"""`tafkir doctor`: what this machine can do, and what is missing with the command that adds it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["doctor", "examine", "fixes", "show"]

_DEVELOPMENT = ("dev", "docs")
_SOURCE_TREE = Path(__file__).resolve().parents[3]
# Asked in a process of its own: a broken torch build must not take the doctor down with it.
_ASK_TORCH = """
import importlib.util, json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
if torch.backends.mps.is_available():
    devices.append("Apple MPS")
if importlib.util.find_spec("torch_npu"):
    import torch_npu
    devices += [torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    "accelerators": devices,
}))
"""


def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Print the commands that add what is missing, and no more.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can do, and what is missing. Exit code 1 when Tafkir cannot run here."""
    found = examine(Path.cwd())
    if fix:
        print("\n".join(fixes(found)))
    elif as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    if found["problems"]:
        raise typer.Exit(1)


def examine(place: Path) -> dict[str, Any]:
    """What the machine has, and `problems`: one line for each thing that keeps Tafkir from running."""
    from tafkir.native.compiled import kernels_path
    from tafkir.runlog.rundir import available_cores, cpu_model, memory_bytes, physical_cores

    torch = _ask_torch()
    problems = [torch["problem"]] if "problem" in torch else []
    problems += [f"{name} is not installed" for name in _missing_packages(None) or () if name != "torch"]
    if not os.access(place, os.W_OK):
        problems.append(f"{place} is not writable: runs cannot be made here (choose another place with --runs-dir)")
    return {
        "python": sys.version.split()[0],
        "cpu": cpu_model(),
        "cores_physical": physical_cores(),
        "cores_logical": available_cores(),
        "memory_bytes": memory_bytes(),
        "disk_free_bytes": shutil.disk_usage(place).free,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "browser": next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None),
        "sandbox": shutil.which("bwrap"),
        "torch": torch,
        "kernels": kernels_path().exists(),
        # Triton comes with torch's own GPU builds, and is of no use to the others.
        "missing": {extra: _missing_packages(extra) for extra in _extras() if extra != "gpu" or torch["accelerators"]},
        "problems": problems,
    }


def fixes(found: dict[str, Any]) -> list[str]:
    """Shell commands that add what `examine` missed, the most needed first; remarks are comments."""
    python = _python()
    lines = []
    if not os.access(Path.cwd(), os.W_OK):
        lines.append("cd ~   # this folder is not writable; or name another one by --runs-dir")
    absent = [named[1] for line in found["problems"] if (named := re.fullmatch(r"(\S+) is not installed", line))]
    if absent:
        lines.append(f"{python} -m pip install {' '.join(absent)}")
    lines += _torch_fixes(found["torch"], python)
    if not found["compiler"]:
        lines.append(_system_package("g++", dnf="gcc-c++", brew="gcc") + "   # for faster kernels")
    if not found["kernels"]:
        lines.append(f"{python} -m tafkir.native.build")
    if not found["sandbox"] and sys.platform == "linux":
        lines.append(_system_package("bubblewrap") + "   # to run programs that a model wrote")
    if None in found["missing"].values():
        lines.append(f"{python} -m pip install -e {shlex.quote(str(_SOURCE_TREE))}")
    wanted = [extra for extra, missing in found["missing"].items() if missing and extra not in _DEVELOPMENT]
    if wanted:
        lines.append(f"{python} -m pip install 'tafkir[{','.join(wanted)}]'   # only those that you need")
    if not found["browser"]:
        lines.append(_system_package("chromium") + "   # for the browser tests alone")
    return lines or ["# nothing is missing"]


def _torch_fixes(torch: dict[str, Any], python: str) -> list[str]:
    """For a torch that does not start, and for one that does not see the GPU that is here."""
    gpu = bool(shutil.which("nvidia-smi"))
    if "problem" not in torch and not (gpu and torch["cuda"] is None and torch["hip"] is None):
        return []
    if (_SOURCE_TREE / "Makefile").exists():
        return [f"make -C {shlex.quote(str(_SOURCE_TREE))} clean install" + (" TORCH=cu130" if gpu else "")]
    index = " --index-url https://download.pytorch.org/whl/cu130" if gpu else ""
    return [f"{python} -m pip install --force-reinstall torch{index}"]


def _python() -> str:
    """How a shell names this interpreter; `python` where that is the same one."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)


def _system_package(name: str, **other_names: str) -> str:
    """The command of this system's package manager; Debian's where none is known."""
    managers = {"apt-get": "apt-get install -y", "dnf": "dnf install -y", "brew": "brew install"}
    manager = next(filter(shutil.which, managers), "apt-get")
    sudo = "" if manager == "brew" or os.geteuid() == 0 else "sudo "
    return f"{sudo}{managers[manager]} {other_names.get(manager, name)}"


def _extras() -> list[str]:
    from importlib import metadata

    try:
        return metadata.metadata("tafkir").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return ["dev"]


def _ask_torch() -> dict[str, Any]:
    import subprocess

    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"problem": f"torch cannot be imported: {last}", "accelerators": []}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _missing_packages(extra: str | None) -> list[str] | None:
    """Packages of an extra (`extra=None`: of Tafkir itself) that are not installed.

    None where that is not known, because Tafkir runs from a source tree without being installed.
    """
    # Here, because every command pays for what stands at the top.
    from importlib import metadata

    try:
        requirements = metadata.requires("tafkir") or []
    except metadata.PackageNotFoundError:
        return None
    missing = []
    for requirement in requirements:
        named = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        if (named[1] if named else None) != extra or ("Linux" in requirement and sys.platform != "linux"):
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def show(found: dict[str, Any]) -> None:
    """Print what `examine` found."""
    torch = found["torch"]
    print(f"python        {found['python']}")
    print(f"processor     {found['cpu']}, {found['cores_physical']} cores ({found['cores_logical']} logical)")
    print(f"memory        {found['memory_bytes'] / 2**30:.1f} GiB")
    print(f"disk free     {found['disk_free_bytes'] / 2**30:.1f} GiB here")
    if "problem" not in torch:
        build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU"
        features = f"{build} build, {torch['cpu_capability']}, {torch['threads']} threads"
        print(f"torch         {torch['version']} ({features})")
    print(f"kernels       {_kernels_line(found['kernels'])}")
    print(f"accelerators  {', '.join(torch['accelerators']) or 'none; everything runs on the processor'}")
    print(f"compiler      {found['compiler'] or 'none; not needed'}")
    print(f"browser       {found['browser'] or 'none; only the browser tests need one'}")
    print(f"sandbox       {found['sandbox'] or 'none; programs that a model wrote are not run (bubblewrap)'}")
    for extra, missing in found["missing"].items():
        print(f"{f'+ {extra}':<13} {_extra_line(extra, missing)}")
    for problem in found["problems"]:
        print(f"problem       {problem}")
    if not found["problems"]:
        print("ready         tafkir run wordmath-tiny")


def _kernels_line(built: bool) -> str:
    from tafkir.native.compiled import BUILD_COMMAND

    return "native, built for this processor" if built else f"torch's; faster ones need a compiler: {BUILD_COMMAND}"


def _extra_line(extra: str, missing: list[str] | None) -> str:
    if missing is None:
        return "not known: Tafkir is not installed here, only found on the path (pip install -e .)"
    return f"missing {', '.join(missing)}: {_python()} -m pip install 'tafkir[{extra}]'" if missing else "installed"
