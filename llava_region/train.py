"""`python -m llava_region.train (llava|bunny|PATH/TO/upstream/train script) <upstream flags> --tune_layers SPEC`

Picks the upstream, checks what can be checked before weights load, hooks its train() and runs it. Without
--tune_layers the upstream runs untouched.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from llava_region import processes, upstreams
from llava_region.errors import LlavaRegionError
from llava_region.errors.ending import Program, guarded
from llava_region.training import signals

if TYPE_CHECKING:
    from llava_region.training.preflight import Preflight
    from llava_region.training.together import Start
    from llava_region.upstreams import Upstream

LOOK = {"--help", "-h", "--dry_run", "--dry-run"}  # nothing is trained
SMALLER = "give a smaller batch per GPU, --gradient_checkpointing True, ZeRO-3 or fewer layers (--dry_run True estimates the need)"


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        upstream: None where only help was asked for.
        script: file name of the upstream's train script.
        flags: the rest of the command line; own: those of this package's flags that it has.
    """

    upstream: Upstream | None
    script: str
    flags: list[str]
    own: tuple[str, ...] = ()

    @property
    def help(self) -> bool:
        return "--help" in self.flags or "-h" in self.flags


def main(argv: list[str] | None = None) -> int:
    """Run a training; what goes wrong is one line on stderr and an exit code (see `llava_region.errors`)."""
    given = sys.argv[1:] if argv is None else list(argv)
    flags, debug = take_debug(given)
    program = Program(
        "llava_region.train", given, debug=debug, folders=given_folders(flags), smaller=SMALLER, long=not LOOK.intersection(flags)
    )
    return guarded(lambda: run(flags), program, whole_process=argv is None)


def run(argv: list[str]) -> int:
    """Run a training; returns the exit code.

    Raises:
        LlavaRegionError: bad input.
    """
    request = parse(argv)
    if request.help:
        show_help(request.upstream)
    elif request.own:
        return signals.heeded(lambda: train_region(request))
    else:
        train_untouched(request)
    return 0


def take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """The command line without our `--debug`, and whether it was there. transformers has a flag of that name, with a value."""
    for at, arg in enumerate(argv):
        value = argv[at + 1] if at + 1 < len(argv) else "-"
        if arg == "--debug" and (at == 0 or value.startswith("-") or value.lower() == "true"):
            return [*argv[:at], *argv[at + 1 + (value.lower() == "true") :]], True
    return argv, False


def given_folders(flags: list[str]) -> list[str]:
    """The run's output folder, as far as the flags can be read before they are checked."""
    pairs = [flag.partition("=")[::2] if "=" in flag else (flag, value) for flag, value in zip(flags, [*flags[1:], ""], strict=False)]
    return [value for name, value in pairs if name.replace("-", "_") == "__output_dir" and value]


def usage() -> str:
    """The command line in short."""
    names = "|".join(upstreams.names())
    return f"python -m llava_region.train ({names}|PATH/TO/upstream/train.py) <upstream flags> --tune_layers sparse:25%"


def parse(argv: list[str]) -> Request:
    """Split a command line into upstream, train script and the upstream's flags.

    The deepspeed launcher puts `--local_rank=N` in front of all else, so the name is the first argument without dashes.
    A train script's checkout is put first on the path.

    Raises:
        LlavaRegionError: neither an upstream's name nor the path of one of its train scripts.
    """
    at = next((i for i, arg in enumerate(argv) if not arg.startswith("-")), None)
    before = argv[:at]
    if at is None or any(not arg.startswith(("--local_rank=", "--local-rank=")) for arg in before):
        if "--help" in argv or "-h" in argv:
            return Request(None, "", argv)
        raise LlavaRegionError(f"the upstream to train with is not named; usage: {usage()}")
    upstream, script = pick_upstream(argv[at])
    flags = before + argv[at + 1 :]
    return Request(upstream, script, flags, own_flags(flags))


def pick_upstream(name: str) -> tuple[Upstream, str]:
    """The upstream of a name, or of the path of a train script, and the script's file name.

    Raises:
        LlavaRegionError: neither.
    """
    if name in upstreams.names():
        return upstreams.get(name), "train.py"
    path = Path(name)
    if not path.is_file():
        raise LlavaRegionError(
            f"'{name}' is neither an upstream nor a file; allowed: {', '.join(upstreams.names())}, or the path of their train script"
        )
    for upstream in upstreams.every():
        root = upstream.checkout_of(path)
        if root is not None:
            sys.path.insert(0, str(root))
            return upstream, path.name
    scripts = " or ".join(f"{u.title} ({u.train_module_name.rpartition('.')[0].replace('.', '/')}/train*.py)" for u in upstreams.every())
    raise LlavaRegionError(f"'{name}' is not a train script of {scripts}")


def own_flags(flags: list[str]) -> tuple[str, ...]:
    """Those of this package's flags that a command line has."""
    from llava_region.training.arguments import OWN_FLAGS

    given = [arg.split("=")[0].replace("-", "_") for arg in flags]
    return tuple(sorted(flag for flag in OWN_FLAGS if flag.replace("-", "_") in given))


def train_untouched(request: Request) -> None:
    """Run the upstream's train() as it is.

    Raises:
        LlavaRegionError: the upstream is not installed, or a flag looks like a misspelt one of ours, or is unknown to it too.
    """
    from llava_region.training.arguments import did_you_mean

    upstream = _upstream_of(request)
    upstream.train_module()
    sys.argv = [sys.argv[0], *request.flags]
    refuse_misspelt(request.flags)
    try:
        upstream.entry(request.script)()
    except ValueError as e:
        unknown = re.findall(r"'(--[\w-]+)", str(e)) if "not used by the HfArgumentParser" in str(e) else []
        if not unknown:
            raise
        known = [f"--{field.name}" for one in upstream.argument_classes() for field in dataclasses.fields(one)]
        raise LlavaRegionError(f"unrecognized arguments: {', '.join(unknown)}{did_you_mean(unknown, known)}") from e


def train_region(request: Request) -> None:
    """Check the flags, and either show what they would do (`--dry_run`) or run the upstream's train(), hooked.

    Raises:
        LlavaRegionError: bad input, before weights load; or a run that would be silently wrong.
    """
    from llava_region.training import dry_run, preflight, small_step, together, zero_choice
    from llava_region.training.deepspeed_config import build_cpu_adam

    upstream = _upstream_of(request)
    upstream.train_module()
    if "--tune_layers" not in request.own:
        raise LlavaRegionError(f"{request.own[0]} needs --tune_layers; to train every layer, give --tune_layers all")
    with processes.joined():
        flags = zero_choice.with_config(request.flags, together.on_first(lambda: zero_choice.chosen(upstream, request.flags)))
        sys.argv = [sys.argv[0], *flags]
        checked = together.on_all(lambda: preflight.check(upstream, flags))
    if checked.args.dry_run:
        if processes.is_first():
            found = dry_run.estimate(upstream, checked)
            rehearsed = small_step.rehearse(upstream, checked) if checked.args.dry_run_step else None
            dry_run.show(checked, found, rehearsed)
        return
    upstream.check_script(request.script)
    let_segments_grow(os.environ)
    if checked.args.deepspeed:
        with processes.joined():
            together.on_all(lambda: build_cpu_adam(checked.args.deepspeed, checked.recipe))
    if checked.args.region_memory:
        dry_run.check_region_memory(upstream, checked)
    for name, text in checked.remarks:
        print(f"{name}: {text}", flush=True)
    with together.started(upstream, checked) as start:
        launch(upstream, request.script, checked, start)


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Have torch's allocator on GPUs extend its segments, unless the user has set it up: batches differ in length, and where memory is
    filled up to the plan, what they leave free is else in pieces that are too small for the next."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second is the name from torch 2.10 on
    if not any(name in environment for name in names):
        environment[names[Version(version("torch")) >= Version("2.10")]] = "expandable_segments:True"


def launch(upstream: Upstream, script: str, checked: Preflight, start: Start) -> None:
    """Run the upstream's train() under the hooks.

    Raises:
        LlavaRegionError: a run that would be silently wrong.
    """
    import torch
    import transformers

    from llava_region.training.gloo_order import wait_for_every_gather

    args = checked.args
    if args.deepspeed and not torch.cuda.is_available():
        wait_for_every_gather()
    # upstream seeds only when the trainer is built, after LoRA and projector were drawn: two runs would never be alike
    transformers.set_seed(args.seed)
    run = upstream.entry(script)
    options = {"upstream_version": upstream.version(), "base_model": _named(checked.recipe.model), "start": start}
    with upstream.applied(checked.region, fix_generation_config=args.fix_generation_config, **options):
        run()


def _named(model: str | None) -> str | None:
    """A model as `region.json` names it: a relative folder with ./ in front, as `models/vicuna` alone could be a hub name later."""
    relative = model and Path(model).is_dir() and not model.startswith((".", "~")) and not Path(model).is_absolute()
    return f"./{model}" if relative else model


def _upstream_of(request: Request) -> Upstream:
    if request.upstream is None:
        raise LlavaRegionError(f"the upstream to train with is not named; usage: {usage()}")
    return request.upstream


def refuse_misspelt(flags: list[str]) -> None:
    """Refuse `--tune_layer` and the like where no flag of ours is given: the upstream would answer with a traceback.

    Raises:
        LlavaRegionError: names the flag that was meant.
    """
    from llava_region.training.arguments import OWN_FLAGS

    for flag in (arg.split("=")[0] for arg in flags if arg.startswith("--")):
        meant = difflib.get_close_matches(flag, OWN_FLAGS, n=1, cutoff=0.9)
        if meant:
            raise LlavaRegionError(f"unrecognized argument: {flag}; did you mean {meant[0]}?")


def show_help(upstream: Upstream | None) -> None:
    """Print our own flags, and the upstream's after them."""
    from llava_region.training.arguments import RegionArguments

    about = str(__doc__).split("\n\n", 1)[1].strip()  # without the usage line
    print(f"usage: {usage()}\n\n{about}\n\nflags in addition to the upstream's own:")
    print(f"  {'--debug':<26} Show the traceback of an error instead of writing it to a file. With a value it is transformers' own.")
    for field in dataclasses.fields(RegionArguments):
        print(f"  --{field.name:<24} {field.metadata['help'].replace('%%', '%')}")
    if upstream is not None:
        import transformers

        print(f"\n{upstream.title}'s flags:")
        transformers.HfArgumentParser(upstream.argument_classes()[:2]).print_help()


if __name__ == "__main__":
    sys.exit(main())
