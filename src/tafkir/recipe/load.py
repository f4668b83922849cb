"""Reads a recipe: `defaults < files from left to right < --set path=value`, and keeps where each value came from."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tafkir.errors import RecipeError
from tafkir.recipe.bundled import find_recipe
from tafkir.recipe.schema import Recipe
from tafkir.records import STAGES

__all__ = ["DEFAULT", "LoadedRecipe", "describe_keys", "flatten", "load_recipe", "table_of"]

DEFAULT = "default"
_SET = "--set"
_BYTES = 256

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A valid recipe and the origin of each of its values.

    `origins` maps the dotted path of every value to `default`, `file:line`, `--set` or `auto`.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    files: tuple[Path, ...]


def load_recipe(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read recipe files, later ones winning, then apply overrides.

    Args:
        files: paths of TOML files, or names of bundled recipes.
        overrides: `path=value` each; the value is TOML, a bare word is a string, nothing at all takes the key
            (or the whole table) back to its default.

    Raises:
        RecipeError: a file is missing or not TOML (`file:line`), a key is unknown (names the nearest valid one),
            or a value has the wrong type or range.
    """
    if not files:
        raise RecipeError("no recipe given", fix="name a file or a bundled recipe; `tafkir recipe ls` lists those")
    tree: Tree = {}
    origins: dict[str, str] = {}
    paths = tuple(find_recipe(name) for name in files)
    for path in paths:
        _merge(tree, origins, *_read_file(path))
    for override in overrides:
        _apply_override(tree, origins, override)
    try:
        recipe = Recipe.model_validate(tree, strict=True)
    except ValidationError as error:
        raise _explain(error, origins, paths) from error
    _check_stages(recipe, str(paths[-1]))
    return LoadedRecipe(recipe, {path: origins.get(path, DEFAULT) for path in flatten(recipe)}, paths)


def _check_stages(recipe: Recipe, where: str) -> None:
    """A recipe must have stages, and the first that trains must have a tokenizer that fits the model."""
    present = {kind for kind in STAGES if getattr(recipe, kind) is not None}
    if not present:
        raise RecipeError("the recipe has no stage", where=where, fix=f"add a table: {', '.join(STAGES)}")
    if recipe.base and recipe.tokenizer:
        raise RecipeError(
            "a recipe with a base has no [tokenizer] of its own", where=where, fix="remove one; the base brings one"
        )
    # The lab reads bytes, or has a task and a tokenizer of its own; the recursive model reads grids.
    reads_text = not present & {"lab", "trm"} or bool(present - {"lab", "trm", "report"})
    if reads_text and not recipe.base and not recipe.tokenizer:
        raise RecipeError("the recipe has neither a base nor a [tokenizer]", where=where, fix="add one of them")
    if recipe.tokenizer and recipe.tokenizer.vocab_size > recipe.model.vocab_size:
        raise RecipeError(
            f"tokenizer.vocab_size={recipe.tokenizer.vocab_size} exceeds model.vocab_size={recipe.model.vocab_size}",
            where=where,
            fix="make the model's at least as large",
        )
    _check_mtp(recipe, where)
    _check_engines(recipe, where)
    if recipe.lab is not None and recipe.model.vocab_size < _BYTES:
        raise RecipeError(
            f"model.vocab_size={recipe.model.vocab_size} does not hold the bytes that [lab] reads",
            where=where,
            fix=f"set it to {_BYTES} or more",
        )


def _check_mtp(recipe: Recipe, where: str) -> None:
    """What trains multi-token prediction needs a model that has the layers."""
    asked = [
        f"{kind}.{key}"
        for kind, table in (("pretrain", recipe.pretrain), ("sft", recipe.sft))
        for key in ("mtp_loss_weight", "mtp_final_loss_weight")
        if table is not None and getattr(table, key)
    ]
    if asked and recipe.model.mtp is None:
        raise RecipeError(
            f"{asked[0]} needs multi-token-prediction layers", where=where, fix="add a [model.mtp] table: depth = 1"
        )


def _check_engines(recipe: Recipe, where: str) -> None:
    """Servers sample with their own arithmetic, and what Ray verifiers grade must be a task that travels."""
    cluster = recipe.cluster
    for kind, table in (("rlvr", recipe.rlvr), ("rlhf", recipe.rlhf)):
        if table is None or table.engine.kind == "in_process":
            continue
        if cluster is not None and cluster.num_rollout_workers:
            what, fix = "would have rollout workers beside its servers", "set cluster.num_rollout_workers to 0"
        elif not table.rollout.is_exact or table.rollout.replay_experts:
            what = "asks for rollouts that only the engine in this process can do"
            fix = f"take {kind}.rollout back to its defaults; a server's precision is set where it is started"
        else:
            continue
        raise RecipeError(f"{kind}.engine.kind = {table.engine.kind} {what}", where=where, fix=fix)
    if cluster is not None and cluster.num_verifiers and recipe.rlvr is not None and recipe.rlvr.reward_file:
        raise RecipeError(
            "rlvr.reward_file and cluster.num_verifiers exclude each other",
            where=where,
            fix="set cluster.num_verifiers to 0: the file's function runs in a process of its own anyway",
        )


def flatten(recipe: BaseModel) -> dict[str, Any]:
    """Every value of a recipe by its dotted path; a value that is not set (None) is left out."""
    return dict(_leaves(recipe.model_dump()))


def table_of(path: str) -> type[BaseModel] | None:
    """The table that a dotted path names (of variants the first), None where it names no table."""
    tables: tuple[type[BaseModel], ...] = (Recipe,)
    for part in [part for part in path.split(".") if part]:
        fields = [table.model_fields[part] for table in tables if part in table.model_fields]
        tables = tuple(table for field in fields for table in _table_types(field.annotation))
        if not tables:
            return None
    return tables[0]


def describe_keys(table: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, str]:
    """What every key of the recipe means, by its dotted path; a table with variants has the keys of all of them."""
    described: dict[str, str] = {}
    for name, field in table.model_fields.items():
        variants = _table_types(field.annotation)
        if not variants:
            described[prefix + name] = field.description or ""
        for variant in variants:
            found = describe_keys(variant, f"{prefix}{name}.")
            described |= {key: words for key, words in found.items() if key not in described}
    return described


def _table_types(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The tables behind `Table`, `Table | None` or a choice of tables."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(table for choice in getattr(annotation, "__args__", ()) for table in _table_types(choice))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value


def _read_file(path: Path) -> tuple[Tree, dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError("not a text file in UTF-8", where=str(path), expected="a TOML recipe") from error
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", where=str(path)) from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        what = found[1] if found else str(error)
        line = found[2] if found and found[2] else len(text.splitlines())
        raise RecipeError(f"not valid TOML: {what}", where=f"{path}:{line}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise RecipeError(f"not valid TOML: {error}", where=str(path)) from None
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return _with_tuples(tree), {key: f"{shown}:{line}" for key, line in _key_lines(text).items()}


def _key_lines(text: str) -> dict[str, int]:
    """The line on which each key and table of a valid TOML text begins."""
    lines: dict[str, int] = {}
    table: tuple[str, ...] = ()
    statement, began = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not statement:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            began = number
        statement += line + "\n"
        try:
            tree = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # the value goes on in the next line
        if statement.lstrip().startswith("["):
            table = _only_path(tree)
            lines[".".join(table)] = began
        else:
            lines |= {".".join((*table, *path)): began for path in _all_paths(tree)}
        statement = ""
    return lines


def _only_path(tree: Any) -> tuple[str, ...]:
    if isinstance(tree, list):
        tree = tree[0]
    return next(((key, *_only_path(value)) for key, value in tree.items()), ())


def _all_paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, Mapping):
            yield from ((key, *rest) for rest in _all_paths(value))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _merge(tree: Tree, origins: dict[str, str], new: Tree, new_origins: Mapping[str, str]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], origins, value, {})
        else:
            tree[key] = value
    origins.update(new_origins)


def _apply_override(tree: Tree, origins: dict[str, str], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys):
        raise RecipeError(
            "not an override", where=f"{_SET} {override}", expected="path=value, such as rlvr.learning_rate=1e-4"
        )
    if not text.strip():
        _reset(tree, origins, keys)
        return
    value = _parse_value(text.strip())
    for key in reversed(keys):
        value = {key: value}
    _merge(tree, origins, value, {".".join(found): _SET for found in _all_paths(value)})


def _reset(tree: Tree, origins: dict[str, str], keys: list[str]) -> None:
    path = ".".join(keys)
    if table_of(path) is None and path not in describe_keys():
        raise RecipeError("unknown key", where=f"{_SET}: {path}", fix=_nearest(path))
    for known in [known for known in origins if known == path or known.startswith(f"{path}.")]:
        del origins[known]
    for key in keys[:-1]:
        tree = tree.get(key, {})
    tree.pop(keys[-1], None)


def _parse_value(text: str) -> Any:
    try:
        return _with_tuples(tomllib.loads(f"value = {text}")["value"])
    except tomllib.TOMLDecodeError:
        return text


_TYPES = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "float"),
    (str, "string"),
    (tuple, "array"),
    (dict, "table"),
)


def _explain(error: ValidationError, origins: Mapping[str, str], files: Sequence[Path]) -> RecipeError:
    details = error.errors(include_url=False)
    # A misspelt key may be the very one that is missing.
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    path = _path_of(first["loc"])
    origin = _origin_of(path, origins) or str(files[-1])
    where = f"{origin}: {path}" if path else origin
    what, expected, fix = _explain_one(first, path)
    if len(details) > 1:
        what += f" (and {len(details) - 1} more)"
    return RecipeError(what, where=where, expected=expected, fix=fix)


def _path_of(location: Sequence[int | str]) -> str:
    """The dotted path of an error. After a table that has variants, pydantic names the variant, which is no key."""
    path, after_variant = "", False
    for part in map(str, location):
        if part.isdecimal() and table_of(path) is not None:
            continue  # a place in an array of tables
        after_variant = not after_variant and part in _variants(path)
        if not after_variant:
            path = f"{path}.{part}" if path else part
    return path


def _variants(path: str) -> dict[str, type[BaseModel]]:
    """The variants of the table at a path, by their `kind` or `method`; none where there is no choice."""
    parent, _, key = path.rpartition(".")
    table = table_of(parent)
    field = table.model_fields.get(key) if table else None
    tables = _table_types(field.annotation) if field else ()
    tag = _tag(tables)
    return {str(each.model_fields[tag].default): each for each in tables} if len(tables) > 1 else {}


def _tag(tables: Sequence[type[BaseModel]]) -> str:
    """The key by which variants are told apart."""
    return "kind" if all("kind" in table.model_fields for table in tables) else "method"


def _explain_one(detail: ErrorDetails, path: str) -> tuple[str, str | None, str | None]:
    """What is wrong, what was expected, how to fix it."""
    if detail["type"] == "extra_forbidden":
        return "unknown key", None, _nearest(path)
    if detail["type"] == "missing":
        return "missing key", None, f"add it: {describe_keys().get(path, '')}"
    if detail["type"] == "union_tag_invalid":
        kinds = detail.get("ctx", {})
        tag = _tag(list(_variants(path).values()))
        return f"got {path}.{tag} = {kinds.get('tag')}", f"one of {kinds.get('expected_tags')}", None
    if detail["type"] == "union_tag_not_found":
        variants = _variants(path)
        tag = _tag(list(variants.values()))
        known = {key for table in variants.values() for key in table.model_fields}
        unknown = next((key for key in detail["input"] if key not in known), None)
        if unknown is not None:
            return f"unknown key {unknown}", None, _nearest(f"{path}.{unknown}")
        return "missing key", f"{path}.{tag} = {' or '.join(variants)}", f"say which {tag} of table it is"
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, "), None, None
    got = detail["input"]
    kind = next((name for python, name in _TYPES if isinstance(got, python)), type(got).__name__)
    shown = kind if isinstance(got, dict) else f"{json.dumps(got, default=str, ensure_ascii=False)} ({kind})"
    expected = _expected(detail)
    if isinstance(got, dict) and expected == "an array":
        return f"got {shown}", "an array of tables", f"write [[{path}]] in a recipe file, once for each"
    return f"got {shown}", expected, None


def _expected(detail: ErrorDetails) -> str:
    """What pydantic would have taken, in a recipe writer's words."""
    if detail["type"].startswith("model"):
        return "a table"
    if detail["type"] == "tuple_type":
        return "an array"
    message = detail["msg"].removeprefix("Input should be ").partition(" after validation")[0]
    return re.sub(r"^\w+ should ", "it to ", message)


def _origin_of(path: str, origins: Mapping[str, str]) -> str | None:
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return None


def _nearest(path: str) -> str:
    """Names the valid key that an unknown one was most likely meant to be."""
    parent, _, key = path.rpartition(".")
    owners = [kind for kind, table in _variants(parent).items() if key in table.model_fields]
    if owners:
        tag = _tag(list(_variants(parent).values()))
        return f"it belongs to {parent}.{tag} = {' or '.join(owners)}"
    known = list(describe_keys())
    tables = [known_path.rpartition(".")[0] for known_path in known]
    siblings = [p.rpartition(".")[2] for p in {*known, *tables} if p and p.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] == key]
    elsewhere = elsewhere or difflib.get_close_matches(path, known, n=1, cutoff=0.0)
    *others, last = elsewhere[:3]
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"
