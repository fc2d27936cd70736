"""The `llava-region` command: it only parses. Each subcommand is one file in `llava_region.commands`."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pkgutil import iter_modules

import typer

from llava_region import __version__, commands
from llava_region.errors import LlavaRegionError

# The base of click's errors. Newer typers contain a copy of click, older ones need an installed click, so it is looked up among
# the bases of an error that every typer exports; that error's type is the nearest that a type checker can know.
_ClickException: type[typer.BadParameter] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="llava-region",
    help="Tools around training a visual region of LLaVA-style models. Training itself: python -m llava_region.train --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for _module in iter_modules(commands.__path__):
    _command = import_module(f"llava_region.commands.{_module.name}").command
    # the list of commands shows the first clause, which fits on one line
    app.command(_module.name, short_help=re.split("[,;.]", _command.__doc__)[0])(_command)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; bad input prints one line, `error: ...`, on stderr and returns 2."""
    try:
        code = app(args=sys.argv[1:] if argv is None else argv, standalone_mode=False)
    except LlavaRegionError as e:
        return _fail(str(e))
    except _ClickException as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message())
            return 2
        return _fail(e.format_message())
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
