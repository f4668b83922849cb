"""Subcommands that are imported when they are asked for: the others cost a start a quarter of a second."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

__all__ = ["LoadOnUse"]

# The name on the command line, and where it is: a function is a command, a Typer a group of them. In the order of help.
_PLACES = {
    "run": "run.run",
    "recipe": "recipes.app",
    "model": "model.app",
    "plan": "plan.app",
    "doctor": "doctor.doctor",
    "serve": "serve.serve",
    "chat": "serve.chat",
    "generate": "generate.generate",
    "bench": "bench.app",
    "eval": "evaluate.evaluate",
    "compare": "compare.compare",
    "regrade": "regrade.regrade",
    "card": "card.card",
    "report": "report.report",
    "merge": "merge.merge",
    "quantize": "quantize.quantize",
    "convert": "export.convert",
    "verify": "verify.verify",
    "export": "export.app",
    "registry": "registry.app",
    "solve": "solve.solve",
    "trm": "trm.app",
    "rollouts": "rollout_view.rollouts",
}


class LoadOnUse(TyperGroup):
    """The group of `tafkir`'s subcommands: knows their names, and imports the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_PLACES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _PLACES and cmd_name not in self.commands:
            self.add_command(_load(cmd_name))
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] not in _PLACES:
            for name in _PLACES:  # for its "Did you mean"
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    module, attribute = _PLACES[name].split(".")
    found: typer.Typer | Callable[..., None] = getattr(import_module(f"tafkir.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)
