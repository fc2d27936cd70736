"""What is installed, whether training can work with it, and the command that mends what is broken.

`collect` looks at this machine, `diagnose` judges: a pure function over versions, so that every known bad set is a test.
The version sets that ran end to end are `TESTED`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from llava_region.progress import track

UPSTREAMS = ("llava", "bunny")
TITLES = {"llava": "LLaVA", "bunny": "Bunny"}
TESTED = {
    "llava": "LLaVA c121f04 (llava-torch 1.2.2.post1), torch 2.13.0, transformers 4.37.2, peft 0.10.0, accelerate 0.34.2, deepspeed 0.16.9",
    "bunny": "Bunny 08273ac, torch 2.13.0, transformers 4.40.2, peft 0.10.0, accelerate 0.30.1, deepspeed 0.18.9",
}
# Installed versions outside these ranges are reported, whatever else is known about them.
SUPPORTED = {
    "python": {"llava": ">=3.10,<3.13", "bunny": ">=3.10,<3.13"},
    "torch": {"llava": ">=2.1", "bunny": ">=2.1"},
    "transformers": {"llava": ">=4.37,<4.38", "bunny": ">=4.39.3,<4.42"},
    "tokenizers": {"llava": ">=0.14,<0.19", "bunny": ">=0.14,<0.20"},
    "peft": {"llava": ">=0.10,<0.13", "bunny": ">=0.10,<0.13"},
    "accelerate": {"llava": ">=0.21,<1.0", "bunny": ">=0.21,<1.0"},
    "deepspeed": {"llava": ">=0.16,<0.19.8", "bunny": ">=0.16,<0.19.8"},
    "numpy": {"llava": "<2", "bunny": "<2"},
    "bitsandbytes": {"llava": ">=0.41", "bunny": ">=0.41"},
    "flash-attn": {"llava": ">=2.3", "bunny": ">=2.3"},
}
OPTIONAL = ("bitsandbytes", "flash-attn")
DISTRIBUTIONS = {"llava": ("llava-torch", "llava"), "bunny": ("bunny",)}
# Each is run in an interpreter of its own: an import that fails there, or takes it down, is a finding and not a crash.
PROBES = {
    "torch": "import torch; c = torch.cuda; print(torch.version.cuda, *(c.get_device_name(i) for i in range(c.device_count())), sep='\\n')",
    "transformers": "import transformers",
    "peft": "import peft",
    "deepspeed": "import deepspeed",
    "bitsandbytes": "import bitsandbytes",
    "flash-attn": "import flash_attn",
    "llava": "import llava.train.train; from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM",
    "bunny": "import bunny.train.train",
}


@dataclass(frozen=True)
class Facts:
    """What `collect` found.

    Attributes:
        versions: component -> version, for those installed; an upstream without a version has "".
        broken: component -> last line of the error its import ends in.
        cuda: CUDA version torch was built for, or None.
        gpus: names of the GPUs that torch can use.
        driver_gpus: names of the GPUs that `nvidia-smi` lists.
        programs: of `g++`, `ninja` and `numactl`, those on the PATH.
        conflicts: (component, requirement that it declares, version installed), for those not met.
        locks: lock files under the torch extensions folder.
        environment: `BUNNY_ROOT` and `DS_BUILD_OPS` where set.
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


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        level: `error` (training does not work), `warning` (something else does not, or nobody tried), `note`.
        component: the row of the table it belongs to.
        text: what breaks.
        mend: the command that mends it, or what to do.
        upstreams: the upstreams it concerns.
    """

    level: str
    component: str
    text: str
    mend: str = ""
    upstreams: tuple[str, ...] = UPSTREAMS


def diagnose(facts: Facts) -> list[Finding]:
    """Everything known to be wrong with these versions, the errors first."""
    rules = (_upstreams, _required, _broken, _conflicts, _ranges, _transformers, _accelerate, _peft, _deepspeed, _numpy, _gpu, _optional)
    findings = [finding for rule in rules for finding in rule(facts)]
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.level))


def trains(facts: Facts, findings: list[Finding]) -> dict[str, bool]:
    """For each upstream, whether training with it can work: it is installed, and no error concerns it."""
    wrong = {upstream for finding in findings if finding.level == "error" for upstream in finding.upstreams}
    return {upstream: facts.has(upstream) and upstream not in wrong for upstream in UPSTREAMS}


def _present(facts: Facts) -> tuple[str, ...]:
    return tuple(upstream for upstream in UPSTREAMS if facts.has(upstream))


def _upstreams(facts: Facts):
    if _present(facts):
        return
    root = facts.environment.get("BUNNY_ROOT")
    bunny = f"export PYTHONPATH={root}" if root else "clone github.com/BAAI-DCAI/Bunny at 08273ac, and put it on PYTHONPATH"
    yield Finding("error", "llava", "neither LLaVA nor Bunny can be imported", "pip install --no-deps llava-torch==1.2.2.post1", ("llava",))
    yield Finding("error", "bunny", "neither LLaVA nor Bunny can be imported", bunny, ("bunny",))


def _required(facts: Facts):
    for component in ("torch", "transformers", "peft", "accelerate", "numpy"):
        if not facts.has(component):
            yield Finding("error", component, f"{component} is not installed", _install(facts, component))
    if not facts.has("deepspeed"):
        text = "deepspeed is not installed: saving a LoRA run imports it, also where it is not used"
        yield Finding("error", "deepspeed", text, _install(facts, "deepspeed"))


def _broken(facts: Facts):
    for component, error in facts.broken.items():
        if component in UPSTREAMS:
            missing = error.partition("No module named '")[2].partition("'")[0].partition(".")[0]
            mend = f"pip install {missing}" if missing and missing not in UPSTREAMS else "mend what the error names"
            yield Finding("error", component, f"importing its trainer fails: {error}", mend, (component,))
        else:
            level = "warning" if component in OPTIONAL else "error"
            yield Finding(level, component, f"importing it fails: {error}", _install(facts, component))


def _conflicts(facts: Facts):
    for component, requirement, installed in facts.conflicts:
        level = "error" if component == "transformers" else "warning"  # transformers checks at import, the others do not
        text = f"{component} {facts.versions[component]} requires {requirement}, installed is {installed}"
        yield Finding(level, component, text, f"pip install '{requirement}'")


def _ranges(facts: Facts):
    for component in ("python", "torch", *OPTIONAL):
        spec = SUPPORTED[component]["llava"]  # the same with Bunny
        if facts.has(component) and not facts.has(component, spec):
            mend = "create an environment with Python 3.10, 3.11 or 3.12" if component == "python" else f"pip install '{component}{spec}'"
            text = f"{component} {facts.versions[component]} is outside {spec}, the range that is supported"
            yield Finding("warning", component, text, mend)


def _transformers(facts: Facts):
    version = facts.versions.get("transformers")
    if version is None:
        return
    if not facts.has("transformers", ">=4.36,<4.42"):
        for upstream in _present(facts) or UPSTREAMS:
            text = f"transformers {version} is outside 4.36 to 4.41: the upstreams' trainers do not fit it"
            yield Finding("error", "transformers", text, _install(facts, "transformers", upstream), (upstream,))
        return
    if facts.has("llava") and facts.has("transformers", ">=4.38"):
        text = f"transformers {version} passes cache_position to forward, which LLaVA 1.2.2 does not take: generation and eval fail"
        yield Finding("warning", "transformers", text, _install(facts, "transformers", "llava"), ("llava",))
    elif facts.has("llava") and not facts.has("transformers", SUPPORTED["transformers"]["llava"]):
        text = f"LLaVA pins transformers 4.37.2; nobody tried {version} with it here"
        yield Finding("warning", "transformers", text, _install(facts, "transformers", "llava"), ("llava",))
    if facts.has("bunny") and not facts.has("transformers", SUPPORTED["transformers"]["bunny"]):
        text = f"Bunny was tried with transformers 4.39.3 to 4.41.2, not with {version}"
        yield Finding("warning", "transformers", text, _install(facts, "transformers", "bunny"), ("bunny",))
    if facts.has("transformers", "<4.38") and facts.has("torch", ">=2.6"):
        text = "transformers' own resume fails under torch >= 2.6 (weights_only); python -m llava_region.train covers it"
        yield Finding("note", "transformers", text)


def _accelerate(facts: Facts):
    if facts.has("accelerate", ">=1.0") and facts.has("transformers", "<4.39"):
        text = "accelerate >= 1.0 no longer takes dispatch_batches, which the trainer of transformers < 4.39 passes: TypeError at the start"
        yield Finding("error", "accelerate", text, _install(facts, "accelerate"))
    elif facts.has("accelerate", ">=1.0"):
        yield Finding("warning", "accelerate", "nobody tried accelerate 1.0 or newer with these upstreams", _install(facts, "accelerate"))
    if facts.has("accelerate", "<0.21"):
        yield Finding("error", "accelerate", "transformers' trainer refuses accelerate older than 0.21", _install(facts, "accelerate"))
    elif facts.has("accelerate", "<0.22") and not facts.gpus and facts.has("deepspeed"):
        text = "accelerate 0.21 hard-codes NCCL, so that ZeRO does not start on CPU"
        yield Finding("warning", "accelerate", text, _install(facts, "accelerate"))


def _peft(facts: Facts):
    if facts.has("peft", ">=0.14"):
        text = "peft >= 0.14 imports EncoderDecoderCache, which transformers before 4.42 does not have"
        yield Finding("error", "peft", text, _install(facts, "peft"))
    elif facts.has("peft") and not facts.has("peft", SUPPORTED["peft"]["llava"]):
        text = f"peft {facts.versions['peft']} is outside {SUPPORTED['peft']['llava']}, the range that is supported"
        yield Finding("warning", "peft", text, _install(facts, "peft"))


def _deepspeed(facts: Facts):
    if not facts.has("deepspeed"):
        if facts.environment.get("DS_BUILD_OPS", "0") != "0":
            yield Finding("warning", "deepspeed", "DS_BUILD_OPS is set: pip will compile every operator", "export DS_BUILD_OPS=0")
        return
    version, mend = facts.versions["deepspeed"], _install(facts, "deepspeed")
    if facts.has("deepspeed", ">=0.19.8"):
        text = f"deepspeed {version} no longer casts after zero.Init: the fp32 projector beside bf16 LoRA trips an assert in defragment"
        yield Finding("error", "deepspeed", text, mend)
    elif facts.has("deepspeed", "<0.14.4") and facts.has("torch", ">=2.4"):
        text = f"deepspeed {version} does not import under torch {facts.versions['torch']} (torch.distributed.elastic changed in 2.4)"
        yield Finding("error", "deepspeed", text, mend)
    elif facts.has("deepspeed", "<=0.15.4") and "numactl" not in facts.programs:
        yield Finding("warning", "deepspeed", f"deepspeed {version} wants numactl on CPU", f"apt install numactl, or {mend}")
    elif facts.has("deepspeed", "<0.16"):
        yield Finding("warning", "deepspeed", f"deepspeed {version} is older than the oldest that was tried, 0.16.9", mend)
    missing = [program for program in ("g++", "ninja") if program not in facts.programs]
    if missing and not facts.gpus:
        text = f"on CPU deepspeed builds shm_comm at the first run, for which {' and '.join(missing)} is missing"
        yield Finding(
            "warning", "deepspeed", text, " && ".join({"g++": "apt install g++", "ninja": "pip install ninja"}[m] for m in missing)
        )
    if facts.locks:
        text = "a lock file from a build hangs every later run, unless a build is running now"
        yield Finding("warning", "deepspeed", text, "rm " + " ".join(facts.locks))


def _numpy(facts: Facts):
    if facts.has("numpy", ">=2") and facts.has("torch", "<2.3"):
        text = f"torch {facts.versions['torch']} was built for numpy 1: 'Numpy is not available' when the first image is read"
        yield Finding("error", "numpy", text, "pip install 'numpy<2'")
    elif facts.has("numpy", ">=2"):
        yield Finding("warning", "numpy", "the upstreams' versions of transformers are from before numpy 2", "pip install 'numpy<2'")


def _gpu(facts: Facts):
    if facts.gpus or not facts.has("torch") or "torch" in facts.broken:
        return
    if facts.driver_gpus and facts.cuda is None:
        text = f"torch {facts.versions['torch']} is built for CPU, though there is {facts.driver_gpus[0]}"
        yield Finding("warning", "cuda", text, "install torch for your driver's CUDA: https://pytorch.org/get-started/locally")
    elif facts.driver_gpus:
        text = f"torch sees no GPU, though there is {facts.driver_gpus[0]}: driver too old for CUDA {facts.cuda}, or CUDA_VISIBLE_DEVICES"
        yield Finding("warning", "cuda", text, "nvidia-smi; echo $CUDA_VISIBLE_DEVICES")
    else:
        text = "no GPU: training runs on CPU, which is for tiny models only"
        yield Finding("warning", "cuda", text, "--use_cpu True for one process; DS_ACCELERATOR=cpu torchrun for several")


def _optional(facts: Facts):
    if not facts.has("bitsandbytes"):
        yield Finding("note", "bitsandbytes", "not installed: no QLoRA (--bits 4)", "pip install bitsandbytes")
    elif not facts.gpus:
        yield Finding("note", "bitsandbytes", "QLoRA needs a GPU")
    if not facts.has("flash-attn"):
        text = "not installed: train with LLaVA's train.py, as train_mem.py asks for flash attention"
        yield Finding("note", "flash-attn", text, "pip install flash-attn --no-build-isolation" if facts.gpus else "")


def _install(facts: Facts, component: str, upstream: str | None = None) -> str:
    """The pip command for a version of the component that ran with the upstream (without it: the first that is installed)."""
    upstream = upstream or next(iter(_present(facts)), "llava")
    pins = {
        "transformers": {"llava": "transformers==4.37.2 tokenizers==0.15.1", "bunny": "transformers==4.40.2 tokenizers==0.19.1"},
        "accelerate": {"llava": "accelerate==0.34.2", "bunny": "accelerate==0.30.1"},
        "deepspeed": {"llava": "deepspeed==0.16.9", "bunny": "deepspeed==0.18.9"},
        "peft": {"llava": "peft==0.10.0", "bunny": "peft==0.10.0"},
        "numpy": {"llava": "numpy==1.26.4", "bunny": "numpy==1.26.4"},
    }
    pin = pins[component][upstream] if component in pins else f"--force-reinstall {component}" if facts.has(component) else component
    build = component == "deepspeed"  # its setup.py imports torch, and compiles every operator unless told not to
    return f"{'DS_BUILD_OPS=0 ' * build}pip install {'--no-build-isolation ' * build}{pin}"


def collect() -> Facts:
    """Look at this machine. Takes some seconds: what is installed is imported, each in an interpreter of its own."""
    versions = {"python": platform.python_version()}
    for component in SUPPORTED:
        if component != "python" and (version := _version(component)):
            versions[component] = version
    for upstream in UPSTREAMS:
        if _trainer_file(upstream):
            versions[upstream] = next(filter(None, map(_version, DISTRIBUTIONS[upstream])), "")
    probes = {component: _start(code) for component, code in PROBES.items() if component in versions}
    ended = {component: _end(probes[component]) for component in track(list(probes), "Importing what is installed")}
    torch_lines = [line for line in ended["torch"][1].splitlines() if line] if "torch" in ended else []
    return Facts(
        versions=versions,
        broken={component: error for component, (error, _) in ended.items() if error},
        cuda=next((line for line in torch_lines[:1] if line != "None"), None),
        gpus=tuple(torch_lines[1:]),
        driver_gpus=_driver_gpus(),
        programs=tuple(program for program in ("g++", "ninja", "numactl") if shutil.which(program)),
        conflicts=tuple(_unmet(versions)),
        locks=_locks(),
        environment={name: os.environ[name] for name in ("BUNNY_ROOT", "DS_BUILD_OPS") if name in os.environ},
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _trainer_file(upstream: str) -> Path | None:
    """Its `train/train.py`, found without importing the package, whose `__init__` may load torch.

    The current folder counts too: `python -m` and the launchers search it, and the upstreams are often run from their checkout.
    """
    spec = util.find_spec(upstream)
    folders = [*(spec.submodule_search_locations or () if spec else ()), upstream]
    return next((path for folder in folders if (path := Path(folder) / "train" / "train.py").is_file()), None)


def _start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def _end(probe: subprocess.Popen, seconds: float = 180) -> tuple[str | None, str]:
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


def _unmet(versions: dict[str, str]):
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


def report(facts: Facts, findings: list[Finding]) -> dict:
    """The whole of it as JSON-ready data: `works`, `trains`, `tested`, `facts`, `findings`."""
    able = trains(facts, findings)
    return {
        "works": any(able.values()),
        "trains": able,
        "tested": TESTED,
        "facts": dataclasses.asdict(facts),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
