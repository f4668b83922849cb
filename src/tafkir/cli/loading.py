"""Subcommands that are imported when they are asked for: the others cost a start a quarter of a second."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any

import typer
import typer.main
from typer.core import TyperGroup

from tafkir.errors import Interrupted

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
    "canary": "canary.app",
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


# The same command goes on with these where they were.
_RESUMED = ("run", "generate", "eval", "quantize")


_terminated = False


def _end_at_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does; forked children die of it as ever."""
    # torchrun ends its processes by it, also those that wait for others and would not come to hear of it.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _terminated
    _terminated = True
    interrupt = signal.getsignal(signal.SIGINT)
    # Whoever has their own way to end, as asyncio has, ends in it.
    (interrupt if callable(interrupt) else signal.default_int_handler)(signal.SIGINT, frame)


def _die_of_it() -> None:
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_die_of_it)


class LoadOnUse(TyperGroup):
    """The group of `tafkir`'s subcommands: knows their names, and imports the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_PLACES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _PLACES and cmd_name not in self.commands:
            self.add_command(_load(cmd_name))
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand; `Interrupted` where Ctrl-C or SIGTERM ended it, and not click's exit code of 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # What was only half made, an event loop say, complains when it goes; the process goes with it.
            sys.unraisablehook = lambda _: None
            warnings.simplefilter("ignore")
            resumed = ctx.invoked_subcommand in _RESUMED
            fix = "the same command goes on where it stopped" if resumed else None
            raise Interrupted(signal.SIGTERM if _terminated else signal.SIGINT, fix=fix) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] not in ("serve", "chat"):  # a server drains; a chat takes Ctrl-C as the end of an answer
            _end_at_sigterm()
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
