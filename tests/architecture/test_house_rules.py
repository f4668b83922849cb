"""The rules of the house, held by a machine: import floors, torch-free floors, names, and every recipe key in use."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tafkir.recipe.load import describe_keys
from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "tafkir"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES = 60
TORCH_FREE = ("errors", "records", "protocols", "runlog", "recipe", "plan", "cli")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_imports_go_down_only(cli_env: dict[str, str], tmp_path: Path) -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    command = [str(linter) if linter.exists() else str(shutil.which("lint-imports")), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, env=cli_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_lower_floors_and_the_command_line_import_without_torch(cli_env: dict[str, str]) -> None:
    names = [
        ".".join(("tafkir", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in MODULES
        if path.relative_to(PACKAGE).with_suffix("").parts[0] in TORCH_FREE
    ]
    script = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    script += "print(sorted({'torch', 'numpy', 'transformers', 'safetensors', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], env=cli_env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(names) > 20


def test_every_package_says_what_it_is_for() -> None:
    folders = {path.parent for path in MODULES}
    assert [name_of(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
    assert [name_of(path) for path in MODULES if not ast.get_docstring(tree_of(path))] == []


def test_no_room_is_called_after_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}
    assert [name_of(path) for path in MODULES if path.stem in empty or path.parent.name in empty] == []


def test_only_the_command_line_prints() -> None:
    offenders = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert offenders == []


def test_functions_fit_on_a_screen() -> None:
    """Sixty lines at most, the docstring not counted."""
    offenders = [
        f"{name_of(path)}:{node.lineno} {node.name} ({lines} lines)"
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := _code_lines(node)) > MAX_FUNCTION_LINES
    ]
    assert offenders == []


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return _span(function) - (_span(first) if documented else 0)


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_broad_excepts_stay_at_the_edges() -> None:
    """Only the server and the graders may swallow everything: there the failure is recorded."""
    offenders = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] not in ("serve", "tasks")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not _raises_again(node)
    ]
    assert offenders == []


def _raises_again(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


@pytest.fixture(scope="module")
def attributes_read() -> set[str]:
    """Names of all attributes that code outside the recipe itself and the planner reads."""
    return {
        node.attr
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] not in ("recipe", "plan")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.mark.parametrize("key", sorted(describe_keys()))
def test_every_recipe_key_does_something(key: str, attributes_read: set[str]) -> None:
    by_type = {"model_type", "score_function", "method"}  # one value each: the type says it all
    through_a_property = {
        "rotary_dim": "rotary_size",
        "partial_rotary_factor": "rotary_size",
        "attention_type": "layer_specs",
        "first_k_dense_replace": "layer_specs",
        "decoder_sparse_step": "layer_specs",
        "mlp_only_layers": "layer_specs",
        "original_max_position_embeddings": "bounds",
        "beta_fast": "bounds",
        "beta_slow": "bounds",
        "data_parallel": "data_shards",
        "expert_parallel": "expert",
        "tensor_parallel": "tensor",
        "expansion": "intermediate_size",
        "intermediate_multiple": "intermediate_size",
        "translate": "augment",
        "scales": "scale_choice",
    }
    name = key.rpartition(".")[2]
    assert name in by_type or through_a_property.get(name, name) in attributes_read
