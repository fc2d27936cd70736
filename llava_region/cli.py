"""The `llava-region` command: it only parses. Each subcommand is one file in `llava_region.commands`."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module
from itertools import pairwise
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from llava_region import __version__, commands
from llava_region.errors import LlavaRegionError
from llava_region.errors.ending import BAD_INPUT, Program, guarded

if TYPE_CHECKING:
    import typer

DEBUG = "--debug"
# What typer (by pydantic or click) says of a value of the wrong kind or size -> what is allowed.
KINDS = {
    "valid integer": "a whole number",
    "valid number": "a number",
    "than or equal to": "a number",
    "is not in the range": "a number",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; what goes wrong is one line on stderr and an exit code (see `llava_region.errors`)."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(lambda: run(given), Program("llava-region", given, debug=DEBUG in given), whole_process=argv is None)


@cache
def app() -> typer.Typer:
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

    from llava_region.progress import deepspeed_on_stderr

    deepspeed_on_stderr()
    # The base of click's errors. Newer typers contain a copy of click, older ones need an installed click, so it is looked up among
    # the bases of an error that every typer exports; that error's type is the nearest that a type checker can know.
    click_exception: type[typer.BadParameter] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
    try:
        code = app()(args=[arg for arg in argv if arg != DEBUG], standalone_mode=False)
    except click_exception as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message())
            return BAD_INPUT
        raise LlavaRegionError(_explained(e, argv)) from e
    except typer.Abort as e:
        raise KeyboardInterrupt from e
    return code if isinstance(code, int) else 0


def _explained(e: typer.BadParameter, argv: list[str]) -> str:
    """What is wrong with a command line, in this package's words; `e` may be any of click's errors."""
    from llava_region import upstreams
    from llava_region.training.arguments import OWN_FLAGS, did_you_mean

    message, unknown, context = e.format_message(), str(getattr(e, "option_name", "")), getattr(e, "ctx", None)
    if "No such command 'train'" in message:
        return f"{message} Training is 'python -m llava_region.train ({'|'.join(upstreams.names())}) FLAGS --tune_layers SPEC'"
    if f"--{unknown.lstrip('-').replace('-', '_')}" in OWN_FLAGS:
        return f"no such option: {unknown}; it is a flag of training, 'python -m llava_region.train UPSTREAM FLAGS {unknown} ...'"
    if unknown and context and "(Possible" not in message and "mean" not in message:
        options = [option for one in context.command.params for option in one.opts if option.startswith("--")]
        return message + did_you_mean([unknown], options)
    return _wrong_value(getattr(e, "param", None), argv, message) or message


def _wrong_value(param: Any, argv: list[str], message: str) -> str | None:
    """`--table is '7'; allowed: a number from 1 to 4`, where that is what the message is about."""
    kind = next((words for text, words in KINDS.items() if text in message), None)
    if kind is None or param is None:
        return None
    least, most = getattr(param, "min", None), getattr(param, "max", None)
    bounds = {(True, True): f" from {least} to {most}", (True, False): f", at least {least}", (False, True): f", at most {most}"}
    given = [value for name, value in pairwise(argv) if name in param.opts]
    given += [arg.partition("=")[2] for arg in argv if "=" in arg and arg.partition("=")[0] in param.opts]
    values = " and ".join(f"'{value}'" for value in given) or "wrong"
    return f"{param.opts[0]} is {values}; allowed: {kind}{bounds.get((least is not None, most is not None), '')}"


if __name__ == "__main__":
    sys.exit(main())
