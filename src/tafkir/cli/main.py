"""The `tafkir` command: its subcommands, and how errors end."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

import tafkir
from tafkir.cli.loading import LoadOnUse
from tafkir.errors import TafkirError

__all__ = ["app", "main"]

_FREE_SPACE = "free some space, then run the same command again"
_PERMISSIONS = "change its permissions, or choose another place"
_FIXES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: "choose another place",
}

# Plain help: drawing boxes would double the time that `tafkir --help` takes.
app = typer.Typer(
    name="tafkir",
    cls=LoadOnUse,
    help="Build, train, serve and measure small reasoning models from one recipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tafkir {tafkir.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from tafkir.runlog.logging import setup_logging

    setup_logging()


def main() -> None:
    """Run the command line; an expected error ends as one line on stderr and an exit code, without a traceback."""
    # Tafkir brings no plugins for pydantic, which would search every installed package for them.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app(prog_name="tafkir")
    except TafkirError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("out of memory. Fix: make the batch or the model smaller, see `tafkir run --dry-run`", 1)
    except OSError as error:
        fix = _FIXES.get(error.errno or 0)
        if fix is None:
            raise
        _fail(f"{error.filename or 'disk'}: {os.strerror(error.errno or 0)}. Fix: {fix}", 1)


def _fail(message: str, code: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
