"""`--report_to`: whether a run will be able to report where it is told to. transformers finds out after weights are loaded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace

from llava_region.errors import LlavaRegionError
from llava_region.training.flag_values import words

# integrations that transformers leaves out of "all" though they are installed, and the module that each needs
BESIDES_ALL = {"azure_ml": "azureml", "flyte": "flytekit"}
# Prints whether W&B would have to ask for a key. In a process of its own, since W&B starts a service, and keeps what it finds.
ASKS_FOR_KEY = """
import inspect, wandb
if wandb.setup().settings.mode in ("online", "run", "shared", None):
    without_prompt = "prompt" in inspect.signature(wandb.login).parameters
    there = wandb.login(prompt=False, verify=False) if without_prompt else wandb.api.api_key
    print("asks" if not there else "knows")
"""
SECONDS = 60.0


def reporters(args: Namespace) -> list[str]:
    """Where a command line reports. Left out, that is every integration that is installed."""
    from transformers.integrations import get_available_reporting_integrations

    given = args.report_to if isinstance(args.report_to, list) else [args.report_to] if args.report_to else ["all"]
    return {"all": get_available_reporting_integrations(), "none": []}.get(given[0], given) if len(given) == 1 else given


def check_reporters(args: Namespace) -> None:
    """Check `--report_to` against what there is.

    Raises:
        LlavaRegionError: an unknown word, or one whose package is not installed.
    """
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    asked, known = reporters(args), words([*INTEGRATION_TO_CALLBACK, "all", "none"])
    there = {*get_available_reporting_integrations(), *(name for name, module in BESIDES_ALL.items() if importlib.util.find_spec(module))}
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            raise LlavaRegionError(
                f"--report_to {' '.join(asked)}: '{name}' {known.otherwise}; allowed: {known.allowed} (the last two alone)"
            )
        if name not in there:
            raise LlavaRegionError(
                f"--report_to {name}: its package is not installed, or switched off by an environment variable; install it, or give "
                f"--report_to {' or '.join([*sorted(there), 'none'])}"
            )


def login_problem(args: Namespace) -> str | None:
    """Why W&B would end the run after weights are loaded: nobody is logged in, and there is no terminal to ask at. None: it would not,
    or that is not known."""
    if "wandb" not in reporters(args) or (sys.stdin is not None and sys.stdin.isatty()):
        return None
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASKS_FOR_KEY], capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "asks" not in asked.stdout.split():
        return None
    given = "--report_to wandb" if args.report_to and "wandb" in args.report_to else "--report_to is left out or all, and so it"
    return (
        f"{given} reports to W&B, where nobody is logged in; log in with 'wandb login' or WANDB_API_KEY, set WANDB_MODE=offline, or give "
        "--report_to none"
    )
