"""The `llava-region` command: it only parses. Each subcommand is one file in `llava_region.commands`."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from llava_region import __version__, commands
from llava_region.errors import BAD_INPUT, LlavaRegionError, Program, guarded

if TYPE_CHECKING:
    from typer import Typer

DEBUG = "--debug"


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; what goes wrong is one line on stderr and an exit code (see `llava_region.errors`)."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: run(given), Program("llava-region", given, debug=DEBUG in given), whole_process=argv is None)


@cache
def app() -> Typer:
    """The command with its subcommands. typer is imported here, where Ctrl-C is already looked after."""
    import typer

    made = typer.Typer(
        name="llava-region",
        help="Tools around training a visual region of LLaVA-style models. Training itself: python -m llava_region.train --help",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @made.callback(invoke_without_command=True)
    def _options(
        version: bool = typer.Option(False, "--version", help="Print the version and exit."),
        debug: bool = typer.Option(False, DEBUG, help="Show the traceback of an error; may be given anywhere."),
    ) -> None:
        if version:
            print(__version__)
            raise typer.Exit

    for module in iter_modules(commands.__path__):
        command = import_module(f"llava_region.commands.{module.name}").command
        # the list of commands shows the first clause, which fits on one line
        made.command(module.name, short_help=re.split("[,;.]", command.__doc__)[0])(command)
    return made


def run(argv: list[str]) -> int:
    """Run one subcommand; returns its exit code.

    Raises:
        LlavaRegionError: bad input.
    """
    import typer

    # The base of click's errors. Newer typers contain a copy of click, older ones need an installed click, so it is looked up among
    # the bases of an error that every typer exports; that error's type is the nearest that a type checker can know.
    click_exception: type[typer.BadParameter] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = app()(args=[arg for arg in argv if arg != DEBUG], standalone_mode=False)
    except click_exception as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message())
            return BAD_INPUT
        raise LlavaRegionError(e.format_message()) from e
    except typer.Abort as e:
        raise KeyboardInterrupt from e
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
