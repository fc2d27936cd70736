"""What `llava-region doctor` finds on this machine: `collect` makes the `Facts`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from llava_region import upstreams
from llava_region.doctor.versions import versions as table
from llava_region.progress import track

# Each is run in an interpreter of its own, as are the upstreams' probes: an import that fails there, or takes it down, is a
# finding and not a crash.
PROBES = {
    "torch": "import torch; c = torch.cuda; print(torch.version.cuda, *(c.get_device_name(i) for i in range(c.device_count())), sep='\\n')",
    "transformers": "import transformers",
    "peft": "import peft",
    "deepspeed": "import deepspeed",
    "bitsandbytes": "import bitsandbytes",
    "flash-attn": "import flash_attn",
}
PROGRAMS = ("g++", "ninja", "numactl")
VARIABLES = ("DS_BUILD_OPS",)


@dataclass(frozen=True)
class Facts:
    """What is installed, and what else matters.

    Attributes:
        versions: component -> version, for those installed; an upstream without a version has "".
        broken: component -> last line of the error its import ends in.
        cuda: CUDA version torch was built for, or None.
        gpus: names of the GPUs that torch can use.
        driver_gpus: names of the GPUs that `nvidia-smi` lists.
        programs: of `PROGRAMS`, those on the PATH.
        conflicts: (component, requirement that it declares, version installed), for those not met.
        locks: lock files under the torch extensions folder.
        environment: of `VARIABLES` and the upstreams' `variables`, those that are set.
    """

    versions: dict[str, str]
    broken: dict[str, str] = field(default_factory=dict)
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    driver_gpus: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, str, str], ...] = ()
    locks: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def has(self, component: str, spec: str = "") -> bool:
        """Whether the component is installed, in a version within `spec`."""
        version = self.versions.get(component)
        if version is None:
            return False
        try:
            return not spec or SpecifierSet(spec).contains(Version(version), prereleases=True)
        except InvalidVersion:
            return False


def collect() -> Facts:
    """Look at this machine. Takes some seconds: what is installed is imported, each in an interpreter of its own."""
    every = upstreams.every()
    versions = _versions()
    codes = {**PROBES, **{upstream.name: upstream.probe for upstream in every}}
    probes = {component: _start(code) for component, code in codes.items() if component in versions}
    ended = {component: _end(probes[component]) for component in track(list(probes), "Importing what is installed")}
    variables = [*(variable for upstream in every for variable in upstream.variables), *VARIABLES]
    torch_lines = [line for line in ended["torch"][1].splitlines() if line] if "torch" in ended else []
    return Facts(
        versions=versions,
        broken={component: error for component, (error, _) in ended.items() if error},
        cuda=next((line for line in torch_lines[:1] if line != "None"), None),
        gpus=tuple(torch_lines[1:]),
        driver_gpus=_driver_gpus(),
        programs=tuple(program for program in PROGRAMS if shutil.which(program)),
        conflicts=tuple(_unmet(versions)),
        locks=_locks(),
        environment={name: os.environ[name] for name in variables if name in os.environ},
    )


def _versions() -> dict[str, str]:
    """The version of everything that is installed, as in `Facts`."""
    found = {"python": platform.python_version()}
    for component in table():
        if component != "python" and (version := _version(component)):
            found[component] = version
    for upstream in upstreams.every():
        if _trainer_file(upstream.train_module_name):
            found[upstream.name] = next(filter(None, map(_version, upstream.distributions)), "")
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _trainer_file(module: str) -> Path | None:
    """The file of an upstream's module with `train()`, found without importing the package, whose `__init__` may load torch.

    The current folder counts too: `python -m` and the launchers search it, and the upstreams are often run from their checkout.
    """
    package, *inner = module.split(".")
    spec = util.find_spec(package)
    folders = [*(spec.submodule_search_locations or () if spec else ()), package]
    return next((path for folder in folders if (path := Path(folder, *inner).with_suffix(".py")).is_file()), None)


def _start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def _end(probe: subprocess.Popen[str], seconds: float = 180) -> tuple[str | None, str]:
    """(last line of its error or None, its output)."""
    try:
        out, err = probe.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return f"no end after {seconds:g} s", ""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    return (None if probe.returncode == 0 else (lines or [f"exit status {probe.returncode}"])[-1]), out


def _driver_gpus() -> tuple[str, ...]:
    if not shutil.which("nvidia-smi"):
        return ()
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if done.returncode == 0 else ()


def _unmet(versions: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Requirements of the libraries on each other that the installed versions do not meet."""
    for component in ("transformers", "peft", "accelerate", "deepspeed"):
        for line in metadata.requires(component) or () if component in versions else ():
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = _version(requirement.name)
            if installed and not requirement.specifier.contains(installed, prereleases=True):
                yield component, f"{requirement.name}{requirement.specifier}", installed


def _locks() -> tuple[str, ...]:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return tuple(sorted(str(path) for path in folder.glob("**/lock")))
