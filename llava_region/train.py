"""`python -m llava_region.train (llava|bunny|PATH/TO/upstream/train script) <upstream flags> --tune_layers SPEC`

Picks the upstream, checks what can be checked before weights load, hooks its train() and runs it. Without
--tune_layers the upstream runs untouched.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from importlib import import_module
from pathlib import Path

from llava_region import processes
from llava_region.errors import LlavaRegionError

UPSTREAMS = ("llava", "bunny")
USAGE = "python -m llava_region.train (llava|bunny|PATH/TO/llava/train/train_mem.py) <upstream flags> --tune_layers sparse:25%"


def main(argv: list[str] | None = None) -> int:
    """Run a training; bad input prints one `error: ...` line on stderr and returns 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        upstream, script, flags = pick_upstream(argv)
        if "--help" in flags or "-h" in flags:
            return show_help(upstream)
        train(upstream, script, flags)
    except LlavaRegionError as e:
        # once a node: what is wrong may be wrong on one node alone
        if processes.is_first_on_node():
            print("error: " + " ".join(str(e).split()), file=sys.stderr, flush=True)
        return 2
    return 0


def pick_upstream(argv: list[str]):
    """Split a command line into upstream, train script and the upstream's flags.

    The deepspeed launcher puts `--local_rank=N` in front of all else, so the name is the first argument without dashes.

    Returns:
        (hooks module `llava_region.patches.NAME`, script's file name, flags).

    Raises:
        LlavaRegionError: neither `llava`, `bunny` nor the path of one of their train scripts.
    """
    at = next((i for i, arg in enumerate(argv) if not arg.startswith("-")), None)
    before = argv[:at]
    if at is None or any(not arg.startswith(("--local_rank=", "--local-rank=")) for arg in before):
        if "--help" in argv or "-h" in argv:
            return None, "", argv
        raise LlavaRegionError(f"the upstream to train with is not named; usage: {USAGE}")
    name, flags = argv[at], before + argv[at + 1 :]
    if name in UPSTREAMS:
        return import_module(f"llava_region.patches.{name}"), "train.py", flags
    path = Path(name)
    if not path.is_file():
        raise LlavaRegionError(
            f"'{name}' is neither an upstream nor a file; allowed: {', '.join(UPSTREAMS)}, or the path of their train script"
        )
    for upstream in UPSTREAMS:
        hooks = import_module(f"llava_region.patches.{upstream}")
        root = hooks.checkout_of(path)
        if root is not None:
            sys.path.insert(0, str(root))
            return hooks, path.name, flags
    raise LlavaRegionError(f"'{name}' is no train script of LLaVA (llava/train/train*.py) or Bunny (bunny/train/train.py)")


def train(upstream, script: str, flags: list[str]) -> None:
    """Run the upstream's train() on its flags, hooked if they hold --tune_layers.

    Raises:
        LlavaRegionError: bad input, before weights load; or a run that would be silently wrong.
    """
    from llava_region.training.arguments import OWN_FLAGS

    given = [arg.split("=")[0].replace("-", "_") for arg in flags]
    own = sorted(flag for flag in OWN_FLAGS if flag.replace("-", "_") in given)
    module = upstream.train_module()
    sys.argv = [sys.argv[0], *flags]
    if not own:
        refuse_misspelt(flags)
        upstream.entry(script)()
        return
    if "--tune_layers" not in own:
        raise LlavaRegionError(f"{own[0]} needs --tune_layers; to train every layer, give --tune_layers all")
    from llava_region.training import preflight
    from llava_region.training.gloo_order import wait_for_every_gather

    checked = preflight.check(upstream, module, flags)
    args = checked.args
    if args.dry_run:
        from llava_region.training.dry_run import show

        if processes.is_first():
            show(upstream, checked)
        return
    if script == "train_mem.py" and importlib.util.find_spec("flash_attn") is None:
        raise LlavaRegionError(
            f"{script} asks for flash attention, which is not installed; install flash-attn, or give train.py or '{upstream.NAME}' instead"
        )
    if args.region_memory:
        from llava_region.training.dry_run import check_region_memory

        check_region_memory(upstream, checked)
    import torch
    import transformers

    if args.deepspeed and not torch.cuda.is_available():
        wait_for_every_gather()
    # upstream seeds only when the trainer is built, after LoRA and projector were drawn: two runs would never be alike
    transformers.set_seed(args.seed)
    run = upstream.entry(script)
    options = {"upstream_version": upstream.version(), "base_model": args.model_name_or_path}
    with upstream.applied(checked.region, fix_generation_config=args.fix_generation_config, **options):
        run()


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


def show_help(upstream) -> int:
    """Print our own flags, and where the upstream's are."""
    import dataclasses

    from llava_region.training.arguments import RegionArguments

    about = __doc__.split("\n\n", 1)[1].strip()  # without the usage line
    print(f"usage: {USAGE}\n\n{about}\n\nflags beside the upstream's own:")
    for field in dataclasses.fields(RegionArguments):
        print(f"  --{field.name:<24} {field.metadata['help'].replace('%%', '%')}")
    if upstream is not None:
        import transformers

        from llava_region.patches.seams import argument_classes

        print(f"\n{upstream.TITLE}'s flags:")
        transformers.HfArgumentParser(argument_classes(upstream.train_module())[:2]).print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
