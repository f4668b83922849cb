"""Pages of the docs site that are made from the code: home from the READMEs, recipe keys, commands, Python, claims.

mkdocs loads this as a hook (mkdocs.yml); nothing it makes lies in the repository, so nothing goes out of date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tafkir.cli.main import app
from tafkir.plan.claims import check_claims
from tafkir.recipe.load import describe_keys, table_of
from tafkir.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
# What people import; the rest is the house's own.
MODULES = (
    "tafkir",
    "tafkir.records",
    "tafkir.protocols",
    "tafkir.errors",
    "tafkir.checkpoint.load",
    "tafkir.checkpoint.save",
    "tafkir.models.build",
    "tafkir.engine.paged_engine",
    "tafkir.tasks.catalog",
    "tafkir.eval.statistics",
    "tafkir.ops.sinkhorn",
    "tafkir.train.losses",
    "tafkir.train.acceptance",
    "tafkir.train.advantages",
)
_REMOTE_SHIM = "https://unpkg.com/iframe-worker/shim"
_SHIM = "assets/iframe-worker.js"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./((?:src|tests|benchmarks|tools|recipes)/[^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "index.md": _home("README.md"),
        "index.ar.md": _home("README.ar.md"),
        "reference/recipe.md": "\n".join(_recipe()),
        "reference/cli.md": "\n".join(_commands()),
        "reference/python.md": "\n".join(_python()),
        "reference/claims.md": "\n".join(_claims()),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository that are no pages, instead of linking to where the site has nothing."""
    return _OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}`)", markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """The one script that the theme's search takes from the network, where it is read from a disk, comes along."""
    return output.replace(_REMOTE_SHIM, get_relative_url(_SHIM, page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the page that says that there is none."""
    return output_content.replace(_REMOTE_SHIM, _SHIM)


def _home(name: str) -> str:
    """A README as the site's page: links into docs/ become links beside it, others the file's name."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = (
        text.replace("](docs/", "](")
        .replace("](README.ar.md)", "](index.ar.md)")
        .replace("](README.md)", "](index.md)")
    )
    text = text.replace('<div dir="rtl">', '<div dir="rtl" markdown>')
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    kept = there | {"index.md", "index.ar.md"}

    def name_it(found: re.Match[str]) -> str:
        target = found[2].partition("#")[0]
        return found[0] if target in kept or "://" in target else f"{found[1]} (`{found[2]}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", name_it, text)


def _recipe() -> Iterator[str]:
    """Every key with its default, grouped by table."""
    yield "# Recipe keys\n\nA recipe is TOML. What is not set has the default here; `tafkir recipe show NAME --explain`"
    yield "says the same of a recipe of yours. Keys of tables that come in kinds are those of the first kind.\n"
    tables: dict[str, dict[str, str]] = {}
    for path, words in describe_keys().items():
        head, _, key = path.rpartition(".")
        tables.setdefault(head, {})[key] = words
    for head, keys in tables.items():
        yield f"\n## {f'`[{head}]`' if head else 'At the top'}\n\n| key | default | what it is |\n|---|---|---|"
        for key, words in keys.items():
            yield f"| `{key}` | {_default(head, key)} | {_cell(words)} |"


def _default(table: str, key: str) -> str:
    fields = getattr(table_of(table) if table else Recipe, "model_fields", {})
    value = fields[key].default if key in fields else None
    shown = None if value is PydanticUndefined or isinstance(value, BaseModel) or value == "" else value
    return "" if shown is None else f"`{list(shown) if isinstance(shown, tuple) else shown}`"


def _commands() -> Iterator[str]:
    """Each command with its help and options, as `--help` has them."""
    yield "# Command line\n"
    root: Any = typer.main.get_command(app)
    yield from _describe(root, "tafkir", 2)


def _describe(command: Any, name: str, level: int) -> Iterator[str]:
    context = type(command).context_class(command, info_name=name)
    if name != "tafkir":
        yield f"\n{'#' * min(level, 4)} `{name}`\n\n{_help(command.help or '')}\n"
        options = [option for option in command.get_params(context) if option.name != "help"]
        if options:
            yield "| | |\n|---|---|"
            for option in options:
                told = getattr(option, "help", "") or ""
                shown = (
                    ", ".join(option.opts) if option.opts[0].startswith("-") else option.metavar or option.name.upper()
                )
                yield f"| `{shown}` | {_cell(told)} |"
    if hasattr(command, "list_commands"):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from _describe(found, f"{name} {child}", level + (name != "tafkir"))


def _help(text: str) -> str:
    """Indented lines of help are commands; the rest is prose."""
    blocks = []
    for part in re.split(r"\n\s*\n", text.replace("\b", "")):
        indented = all(line.startswith("    ") for line in part.splitlines() if line.strip())
        blocks.append(part if indented else " ".join(part.split()))
    return "\n\n".join(blocks).replace("<", "&lt;")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _python() -> Iterator[str]:
    yield "# Python\n\nWhat people import; [the house](../structure.md) has the rest, a line a file.\n"
    for module in MODULES:
        yield f"\n::: {module}\n"


def _claims() -> Iterator[str]:
    """What the five systems say, recomputed."""
    yield "# Claims, recomputed\n\n`tafkir plan claims` computes this page. Measured: [status](../status.md).\n"
    system = ""
    for claim in check_claims():
        if claim.system != system:
            system = claim.system
            yield f"\n## {system}\n\n| claim | from | computed | verdict |\n|---|---|---|---|"
        yield f"| {_cell(claim.claim)} | {_cell(claim.inputs)} | {_cell(claim.computed)} | {_cell(claim.verdict)} |"
