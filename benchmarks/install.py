"""What an installation weighs, how soon the command answers, and whether a wheel does its work outside the source tree.

    python benchmarks/install.py --out benchmarks/results/install.json
    python benchmarks/install.py --python python3.13 --keep /tmp/venv --out ...     # another Python; keeps the venv

Builds wheel and sdist, installs the wheel with constraints.txt into an empty venv, and counts the bytes there. Then the
CPU-seconds of `tafkir --help` beside a Python that does nothing, in turn, and of commands that a new user gives, in an
empty folder, each ending with exit code 0. Needs a package index and hatchling. Eight minutes, most of it torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Nothing of the source tree.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TAFKIR"))}
CLEAN |= {"OMP_NUM_THREADS": "1", "SHELL": "/bin/bash"}
# What a new user does, in this order, in an empty folder.
COMMANDS = {
    "help": "--help",
    "doctor": "doctor",
    "fixes": "doctor --fix",
    "completion": "--show-completion",
    "recipes": "recipe ls",
    "dry run": "run wordmath-tiny --dry-run",
    "run": "run smoke",
    "solve": "solve 1..43.1...43....",
    "eval": "eval runs/smoke --tasks svamp --limit 4 --out scores",
    "quantize": "quantize runs/smoke four-bits",
    "plan": "plan deepseek-r1 --hardware b200:8 --precision nvfp4",
    "report": "report runs/smoke",
}


def cpu_seconds(command: list[str], cwd: Path, **settings: str) -> tuple[float, str]:
    """User and system time of a command and what it started, and its output.

    Raises:
        SystemExit: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=cwd, env=CLEAN | settings, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def folder_bytes(folder: Path, without: str = "") -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if not without or path.suffix != without)


def build(place: Path) -> tuple[Path, dict[str, Any]]:
    """The wheel, and sizes of it and of the sdist."""
    cpu_seconds([sys.executable, "-m", "hatchling", "build", "-d", str(place)], ROOT)
    (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as source:
        told = {"wheel_files": len(archive.namelist()), "sdist_files": len(source.getnames())}
    return wheel, {"wheel_bytes": wheel.stat().st_size, "sdist_bytes": sdist.stat().st_size, **told}


def install(python: str, venv: Path, wheel: Path) -> dict[str, float]:
    """Make an empty venv with pip, and install the wheel there."""
    cpu_seconds([python, "-m", "venv", str(venv)], ROOT)
    began = time.monotonic()
    pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    cpu, _ = cpu_seconds([*pip, str(wheel)], ROOT)
    return {"cpu_s": round(cpu, 1), "seconds": round(time.monotonic() - began, 1)}


def weigh(venv: Path) -> dict[str, Any]:
    """Bytes of a venv's packages."""
    site = next(venv.glob("lib/python*/site-packages"))
    sizes = {part.name: folder_bytes(part) for part in site.iterdir() if part.is_dir()}
    return {
        "site_packages_bytes": folder_bytes(site),
        "of_these_bytecode": folder_bytes(site) - folder_bytes(site, ".pyc"),
        "largest": dict(sorted(sizes.items(), key=lambda item: -item[1])[:8]),
        "packages": len(list(metadata.distributions(path=[str(site)]))),
    }


def start_up(python: Path, place: Path, repeats: int) -> dict[str, Any]:
    """CPU-seconds of `tafkir --help`, in turn with a Python that does nothing, and what its imports take."""
    sides = {"help": ["-m", "tafkir", "--help"], "python alone": ["-c", "pass"]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for round_number in range(repeats + 1):  # the first one warms the disk and is not counted
        for side, arguments in sides.items():
            taken, _ = cpu_seconds([str(python), *arguments], place)
            if round_number:
                seconds[side].append(taken)
    imports = []
    for _ in range(repeats):
        command = [str(python), "-X", "importtime", "-c", "import tafkir.cli.main"]
        told = subprocess.run(command, cwd=place, env=CLEAN, capture_output=True, text=True, check=True).stderr
        imports.append(int(re.findall(r"(\d+) \| tafkir\.cli\.main$", told, re.MULTILINE)[-1]) / 1e6)
    return {
        **{f"{side}_cpu_s": round(statistics.median(taken), 3) for side, taken in seconds.items()},
        "help_cpu_s_all": [round(taken, 3) for taken in seconds["help"]],
        "import_s": round(statistics.median(imports), 3),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="whose venv it is")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="leave the venv there; one that is there already is measured")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "empty"
        place.mkdir()
        wheel, result = build(Path(folder) / "dist")
        venv = options.keep or Path(folder) / "venv"
        if not venv.exists():
            result["install"] = install(options.python, venv, wheel)
        result["base"] = weigh(venv)
        python = venv / "bin/python"
        ask = "import platform, torch; print(platform.python_version(), torch.__version__)"
        result["python"], result["torch"] = cpu_seconds([str(python), "-c", ask], place)[1].split()
        result["start_up"] = start_up(python, place, options.repeats)
        told = {}
        native = {"kernels": [str(python), "-m", "tafkir.native.build"]}
        smoke = {name: [str(venv / "bin/tafkir"), *line.split()] for name, line in COMMANDS.items()}
        for name, command in (native | smoke).items():
            cpu, output = cpu_seconds(command, place, XDG_CACHE_HOME=str(Path(folder) / "cache"))
            told[name] = {"cpu_s": round(cpu, 2), "last_line": (output.strip().splitlines() or [""])[-1][:160]}
            print(f"{name:<12} {cpu:6.2f} CPU-s   {told[name]['last_line'][:90]}", flush=True)
        result["commands"] = told
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
