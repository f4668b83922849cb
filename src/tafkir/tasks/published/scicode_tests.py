"""Takes SciCode's tests apart: what runs among a model's functions, and what compares their values with the targets.

A published test runs the model's code and the comparison with the target in one process, where the code could read the
target or patch `numpy.allclose`. Here the first part returns the values of the expressions that come from the model's
functions; the second part, which no code of a model ever shares a process with, has the rest: targets, the test's own
computations, comparisons.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from tafkir.errors import DataError

__all__ = ["COMPARERS", "SplitTest", "split_tests"]

COMPARERS = """
def cmp_tuple_or_list(first, second):
    return len(first) == len(second) and all(map(_tafkir_close, first, second))
def are_csc_matrix_close(first, second):
    return numpy.allclose(_tafkir_dense(first), _tafkir_dense(second))
def are_dicts_close(first, second, atol=1e-8, rtol=1e-5):
    first, second = ({str(key) if "sympy" in type(key).__module__ else key: value for key, value in side.items()}
                     for side in (first, second))
    return first.keys() == second.keys() and all(_tafkir_close(first[k], second[k], atol, rtol) for k in first)
def _tafkir_dense(value):
    return value.toarray() if hasattr(value, "toarray") else value
def _tafkir_close(first, second, atol=1e-8, rtol=1e-5):
    if isinstance(first, dict):
        return are_dicts_close(first, second)
    if isinstance(first, (bool, str)) or "sympy" in type(first).__module__:
        return bool(first == second)
    try:
        return bool(numpy.allclose(_tafkir_dense(first), _tafkir_dense(second), atol=atol, rtol=rtol))
    except ValueError:
        return bool(first == second)
"""
"""`scicode.compare.cmp`, which the tests import, as its rules are."""

_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True, slots=True)
class SplitTest:
    """One test.

    Attributes:
        own: statements that run among the model's functions and leave the values of its expressions, a tuple, in
            `_tafkir_values`.
        check: statements that need `target` and `_tafkir_values`, and raise where the test fails.
    """

    own: str
    check: str


def split_tests(dependencies: str, tests: Sequence[str], where: str) -> list[SplitTest]:
    """The tests of one step, in their order; later ones may use names of earlier ones.

    Args:
        dependencies: the imports that stand before the model's code.

    Raises:
        DataError: a test is no Python, or compares in the middle of what it computes.
    """
    splitter = _Splitter(where)
    splitter.trusted |= {name for node in _parse(dependencies, where) for name in _bound(node)}
    return [splitter.split(test) for test in tests]


def _parse(source: str, where: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise DataError(f"a test is no Python ({error})", where=where) from None


def _bound(node: ast.AST) -> set[str]:
    """Names that a statement gives a meaning."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = {node.name}
    return names


def _loaded(node: ast.AST) -> set[str]:
    """Names that a node uses, but for those that it binds within itself: arguments, loop variables."""
    inner = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    if isinstance(node, ast.FunctionDef) or not isinstance(node, ast.stmt):
        inner |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    return names - inner


def _changed(node: ast.stmt) -> set[str]:
    """Names whose values a statement may change: of `x[i] = ...`, and all in a loop, or a call for its effect."""
    places = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else None
    )
    if places is None:
        return _loaded(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    return {name for place in places for name in _loaded(place)}


def _inlined(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """A test that is a function without arguments, which is then called, as the statements of that function."""
    functions = {
        node.name: node for node in statements if isinstance(node, ast.FunctionDef) and not _arguments(node.args)
    }
    for node in statements:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in functions:
            yield from functions[call.func.id].body
        elif not (isinstance(node, ast.FunctionDef) and node.name in functions):
            yield node


def _arguments(given: ast.arguments) -> bool:
    return bool(given.args or given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg)


class _Splitter:
    """Knows which names are the test's own (`trusted`, the variables among them), and which come from the target."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.trusted = set(dir(builtins)) | {"cmp_tuple_or_list", "are_csc_matrix_close", "are_dicts_close"}
        self.variables: set[str] = set()
        self.targets = {"target"}

    def split(self, test: str) -> SplitTest:
        own: list[ast.stmt] = []
        check: list[ast.stmt] = []
        captured: list[ast.expr] = []
        for node in _inlined(_parse(test, self.where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scicode"):
                continue
            bound, loaded = _bound(node), _loaded(node)
            if any(isinstance(part, ast.Assert) for part in ast.walk(node)) or loaded & self.targets:
                check.append(cast(ast.stmt, _Capture(self, captured).visit(node)))
                self.targets |= bound
                continue
            own.append(node)
            self.targets -= bound
            if loaded <= self.trusted:
                check.append(node)
                self.trusted |= bound
                if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
                    self.variables |= bound
            else:
                self.trusted -= bound | (_changed(node) & self.variables)
        values = ast.Assign([ast.Name("_tafkir_values", ast.Store())], ast.Tuple(captured, ast.Load()))
        return SplitTest(_unparse([*own, values]), _unparse(check))


def _unparse(statements: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(statements, [])))


class _Capture(ast.NodeTransformer):
    """Replaces what comes from the model's functions by `_tafkir_values[n]`."""

    def __init__(self, splitter: _Splitter, captured: list[ast.expr]) -> None:
        self._known, self._captured = splitter, captured

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store):
            if self._is_theirs(node):
                return self._take(node)
            if isinstance(node, _Comprehension | ast.Lambda) and not _loaded(node) <= self._local:
                inner = [part for part in ast.walk(node) if isinstance(part, ast.expr) and self._is_theirs(part)]
                if inner and not isinstance(inner[0], ast.Name):
                    return self._take(ast.ListComp(node.elt, node.generators)
                                      if isinstance(node, ast.GeneratorExp) else node)  # fmt: skip
        return self.generic_visit(node)

    @property
    def _local(self) -> set[str]:
        return self._known.trusted | self._known.targets

    def _is_theirs(self, node: ast.expr) -> bool:
        """Calls, attributes and subscripts of a name that is neither the test's own nor the target's."""
        root: ast.expr = node
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            root = root.func if isinstance(root, ast.Call) else root.value
        return isinstance(root, ast.Name) and isinstance(root.ctx, ast.Load) and root.id not in self._local

    def _take(self, node: ast.expr) -> ast.expr:
        if _loaded(node) & self._known.targets:
            raise DataError("a test gives its target to the model's code", where=self._known.where)
        self._captured.append(node)
        place = ast.Constant(len(self._captured) - 1)
        return ast.Subscript(ast.Name("_tafkir_values", ast.Load()), place, ast.Load())
