"""Extras, pins, the version and the Docker files agree with the code, the Makefile and the README."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tafkir
from tafkir.cli.loading import LoadOnUse
from tafkir.cli.serve import serve
from tafkir.recipe.bundled import bundled_checkpoints
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


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "docs/install.md"])
def test_a_page_for_developers_names_what_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^`?make ([a-z-]+)", text, re.MULTILINE)) <= targets
    paths = re.findall(r"`((?:src|tests|docs|benchmarks|quant)/[\w./-]+)`", text)
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "src/tafkir" / path).exists(), path
    assert set(re.findall(r"^`?tafkir ([a-z]+)", text, re.MULTILINE)) <= set(LoadOnUse().list_commands(None))


# ---- the Docker files ----------------------------------------------------------------------------------------------


def _instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize(("name", "torch"), [("Dockerfile", ""), ("Dockerfile.cuda", " TORCH=cu130")])
def test_an_image_takes_the_steps_of_the_readme(name: str, torch: str, tmp_path: Path) -> None:
    steps = _instructions(name)
    assert ("RUN", f"make install{torch}") in steps
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"make install{torch}" in readme
    assert steps.index(("USER", "tafkir")) < steps.index(("RUN", f"make install{torch}")), (
        "as a user without privileges"
    )
    assert not [rest for word, rest in steps if word == "USER" and rest != "tafkir"]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [rest.split()[1:] for word, rest in steps if word == "COPY"]
    assert sorted(source for *sources, _ in copied for source in sources) == sorted(kept)
    for source in kept:
        (tmp_path / source).symlink_to(ROOT / source)
    command = ["make", "-n", *f"install{torch}".split(), f"PYTHON={sys.executable}"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert ".venv/bin/python -m pip install" in planned.stdout and "tafkir.native.build" in planned.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_an_image_serves_and_knows_whether_it_is_healthy(name: str) -> None:
    steps = dict(_instructions(name))
    assert json.loads(steps["ENTRYPOINT"]) == ["tafkir"]
    command, checkpoint, *options = json.loads(steps["CMD"])
    assert command == "serve" and checkpoint in bundled_checkpoints()
    defaults = inspect.signature(serve).parameters
    assert options == ["--host", "0.0.0.0"] and {"host", "port"} <= set(defaults)
    assert f":{defaults['port'].default}/health'" in steps["HEALTHCHECK"] and steps["EXPOSE"] == "8000"
    compile(shlex.split(steps["HEALTHCHECK"].partition("CMD ")[2])[2], name, "exec")


def test_the_two_images_differ_in_torch_alone() -> None:
    plain, cuda = (_instructions(name) for name in ("Dockerfile", "Dockerfile.cuda"))
    assert [line for line in plain if line not in cuda] == [("RUN", "make install")]
    assert {word for word, _ in (line for line in cuda if line not in plain)} == {"RUN", "ENV"}
