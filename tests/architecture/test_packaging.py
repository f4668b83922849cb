"""Extras, pins, the version and the Docker files agree with the code, the Makefile and the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tafkir
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
DISTRIBUTIONS = {"PIL": "pillow", "opentelemetry": "opentelemetry-sdk"}
# In code that is written for other programs (a checkpoint's own class for transformers, a program in the sandbox), and
# what comes with Ascend's drivers, for one version of torch, and is imported only where it is installed.
ELSEWHERE = {"transformers", "__main__", "torch_npu"}


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


@cache
def _base() -> set[str]:
    """Distributions that a plain installation holds: the dependencies and what they need themselves."""
    direct = _names(PROJECT["dependencies"])
    needed = (Requirement(line) for name in direct for line in metadata.requires(name) or ())
    return direct | {canonicalize_name(n.name) for n in needed if n.marker is None or n.marker.evaluate({"extra": ""})}


def _imported() -> set[str]:
    """Modules of others that the package imports anywhere."""
    statement = re.compile(r"""^ *(?:import (\w+)|from (\w+)[\w.]* import )|import_module\("(\w+)""", re.MULTILINE)
    found = {name for text in SOURCES.values() for match in statement.findall(text) for name in match if name}
    return found - sys.stdlib_module_names - ELSEWHERE - {"tafkir"}


def test_the_extras_have_their_names_and_nothing_speaks_of_others() -> None:
    assert list(EXTRAS) == ["serve", "rl", "ray", "trm-web", "eval", "plan", "gpu", "docs", "dev"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    texts = [ROOT / name for name in listed if name.endswith((".py", ".md", ".toml", ".yml")) or "." not in name]
    for path in texts or list(SOURCES):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for names in re.findall(r"""(?:tafkir|["']\.)\[([a-z,-]+)\]""", text):
            assert set(names.split(",")) <= set(EXTRAS), f"{path}: [{names}]"


def test_every_import_is_in_the_base_or_in_an_extra_that_its_error_names() -> None:
    for module in _imported():
        name = canonicalize_name(DISTRIBUTIONS.get(module, module))
        if name in _base():
            continue
        holders = [extra for extra, needs in EXTRAS.items() if extra != "dev" and name in _names(needs)]
        assert holders, f"{module} is imported and in no extra"
        said = [t for t in SOURCES.values() if f"tafkir[{holders[0]}]" in t and re.search(rf"\b{module}\b", t)]
        assert said, f"no file that knows {module} names tafkir[{holders[0]}]"


def test_every_dependency_is_pinned_to_a_version_that_it_allows() -> None:
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    everything = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
    for requirement in everything:
        name = canonicalize_name(requirement.name)
        if name in ("tafkir", "triton"):  # the CUDA build of torch says which Triton
            continue
        assert requirement.specifier.contains(pins[name]), requirement


def test_the_citation_is_of_this_version() -> None:
    release = tafkir.__version__.partition(".dev")[0]
    assert f"version: {release}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
