"""What is known to break, and how to fix it: `diagnose` judges `Facts` and looks at nothing else.

The numbers in here are those of the libraries: the release in which one began or ceased to do something. What an upstream is
expected to work with is read off the table of versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_region import upstreams
from llava_region.doctor import versions
from llava_region.doctor.facts import Facts

LEVELS = ("error", "warning", "note")
REQUIRED = ("torch", "transformers", "peft", "accelerate", "numpy", "deepspeed")
OPTIONAL = ("bitsandbytes", "flash-attn")


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        level: `error` (training does not work), `warning` (something else does not, or was not tested), `note`.
        component: the row of the table it belongs to.
        text: what breaks.
        mend: the command that fixes it, or what to do; its name is the key in `--json`.
        upstreams: names of the upstreams that it concerns.
    """

    level: str
    component: str
    text: str
    mend: str = ""
    upstreams: tuple[str, ...] = field(default_factory=upstreams.names)


def diagnose(facts: Facts) -> list[Finding]:
    """Everything known to be wrong with these versions, the errors first."""
    rules = (_upstreams, _required, _broken, _conflicts, _ranges, _transformers, _accelerate, _peft, _deepspeed, _numpy, _gpu, _optional)
    findings = [finding for rule in rules for finding in rule(facts)]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def trains(facts: Facts, findings: list[Finding]) -> dict[str, bool]:
    """For each upstream, whether training with it can work: it is installed, and no error concerns it."""
    wrong = {upstream for finding in findings if finding.level == "error" for upstream in finding.upstreams}
    return {upstream: facts.has(upstream) and upstream not in wrong for upstream in upstreams.names()}


def report(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """The whole of it as JSON-ready data: `works`, `trains`, `tested`, `facts`, `findings`."""
    able = trains(facts, findings)
    return {
        "works": any(able.values()),
        "trains": able,
        "tested": {upstream: versions.tested(upstream) for upstream in upstreams.names()},
        "facts": dataclasses.asdict(facts),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _upstreams(facts: Facts) -> Iterator[Finding]:
    if not any(map(facts.has, upstreams.names())):
        for upstream in upstreams.every():
            text = f"neither {upstreams.titles('nor')} can be imported"
            yield Finding("error", upstream.name, text, upstream.get_command(facts.environment), (upstream.name,))


def _required(facts: Facts) -> Iterator[Finding]:
    for component in REQUIRED:
        if not facts.has(component):
            why = ": saving a LoRA run imports it, also where it is not used" if component == "deepspeed" else ""
            yield Finding("error", component, f"{component} is not installed{why}", _install(facts, component))


def _broken(facts: Facts) -> Iterator[Finding]:
    for component, error in facts.broken.items():
        if component in upstreams.names():
            missing = error.partition("No module named '")[2].partition("'")[0].partition(".")[0]
            fix = f"pip install {missing}" if missing and missing not in upstreams.names() else "fix what the error names"
            yield Finding("error", component, f"importing its trainer fails: {error}", fix, (component,))
        else:
            level = "warning" if component in OPTIONAL else "error"
            yield Finding(level, component, f"importing it fails: {error}", _install(facts, component))


def _conflicts(facts: Facts) -> Iterator[Finding]:
    for component, requirement, installed in facts.conflicts:
        level = "error" if component == "transformers" else "warning"  # transformers checks at import, the others do not
        text = f"{component} {facts.versions[component]} requires {requirement}, installed is {installed}"
        yield Finding(level, component, text, f"pip install '{requirement}'")


def _ranges(facts: Facts) -> Iterator[Finding]:
    *others, last = versions.minors(versions.span("python"))
    pythons = " or ".join(filter(None, (", ".join(others), last)))
    yield from _outside(facts, "python", f"create an environment with Python {pythons}")
    for component in ("torch", *OPTIONAL):
        yield from _outside(facts, component)


def _transformers(facts: Facts) -> Iterator[Finding]:
    version = facts.versions.get("transformers")
    if version is None:
        return
    span = versions.span("transformers")
    if not facts.has("transformers", span):
        minors = versions.minors(span)
        for upstream in _concerned(facts):
            text = f"transformers {version} is outside {minors[0]} to {minors[-1]}: the upstreams' trainers do not fit it"
            yield Finding("error", "transformers", text, _install(facts, "transformers", upstream), (upstream,))
        return
    for upstream in upstreams.every():
        if facts.has(upstream.name) and (text := upstream.transformers_finding(version)):
            yield Finding("warning", "transformers", text, _install(facts, "transformers", upstream.name), (upstream.name,))
    if facts.has("transformers", "<4.38") and facts.has("torch", ">=2.6"):
        text = "transformers' own resume fails under torch >= 2.6 (weights_only); python -m llava_region.train covers it"
        yield Finding("note", "transformers", text)


def _accelerate(facts: Facts) -> Iterator[Finding]:
    fix = _install(facts, "accelerate")
    if facts.has("accelerate", ">=1.0") and facts.has("transformers", "<4.39"):
        text = "accelerate >= 1.0 no longer takes dispatch_batches, which the trainer of transformers < 4.39 passes: TypeError at the start"
        yield Finding("error", "accelerate", text, fix)
    elif facts.has("accelerate", "<0.21"):
        yield Finding("error", "accelerate", "transformers' trainer refuses accelerate older than 0.21", fix)
    elif facts.has("accelerate", "<0.22") and not facts.gpus and facts.has("deepspeed"):
        yield Finding("warning", "accelerate", "accelerate 0.21 hard-codes NCCL, so that ZeRO does not start on CPU", fix)
    else:
        yield from _outside(facts, "accelerate", fix)


def _peft(facts: Facts) -> Iterator[Finding]:
    fix = _install(facts, "peft")
    if facts.has("peft", ">=0.14"):
        text = "peft >= 0.14 imports EncoderDecoderCache, which transformers before 4.42 does not have"
        yield Finding("error", "peft", text, fix)
    else:
        yield from _outside(facts, "peft", fix)


def _deepspeed(facts: Facts) -> Iterator[Finding]:
    if not facts.has("deepspeed"):
        if facts.environment.get("DS_BUILD_OPS", "0") != "0":
            yield Finding("warning", "deepspeed", "DS_BUILD_OPS is set: pip will compile every operator", "export DS_BUILD_OPS=0")
        return
    version, fix = facts.versions["deepspeed"], _install(facts, "deepspeed")
    if facts.has("deepspeed", ">=0.19.8"):
        text = f"deepspeed {version} no longer casts after zero.Init: the fp32 projector next to bf16 LoRA trips an assert in defragment"
        yield Finding("error", "deepspeed", text, fix)
    elif facts.has("deepspeed", "<0.14.4") and facts.has("torch", ">=2.4"):
        text = f"deepspeed {version} does not import under torch {facts.versions['torch']} (torch.distributed.elastic changed in 2.4)"
        yield Finding("error", "deepspeed", text, fix)
    elif facts.has("deepspeed", "<=0.15.4") and "numactl" not in facts.programs and not facts.gpus:
        yield Finding("warning", "deepspeed", f"deepspeed {version} wants numactl on CPU", f"apt install numactl, or {fix}")
    else:
        yield from _outside(facts, "deepspeed", fix)
    yield from _deepspeed_builds(facts)


def _deepspeed_builds(facts: Facts) -> Iterator[Finding]:
    missing = [program for program in ("g++", "ninja") if program not in facts.programs]
    if missing and not facts.gpus:
        text = f"on CPU deepspeed builds shm_comm at the first run, for which {' and '.join(missing)} is missing"
        fixes = {"g++": "apt install g++", "ninja": "pip install ninja"}
        yield Finding("warning", "deepspeed", text, " && ".join(fixes[program] for program in missing))
    if facts.locks:
        text = "a lock file from a build hangs every later run, unless a build is running now"
        yield Finding("warning", "deepspeed", text, "rm " + " ".join(facts.locks))


def _numpy(facts: Facts) -> Iterator[Finding]:
    for spec, names in _missed(facts, "numpy").items():
        fix = f"pip install 'numpy{spec}'"
        if facts.has("numpy", ">=2") and facts.has("torch", "<2.3"):
            text = f"torch {facts.versions['torch']} was built for numpy 1: 'Numpy is not available' when the first image is read"
            yield Finding("error", "numpy", text, fix, names)
        else:
            yield Finding("warning", "numpy", "the upstreams' versions of transformers are from before numpy 2", fix, names)


def _gpu(facts: Facts) -> Iterator[Finding]:
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


def _optional(facts: Facts) -> Iterator[Finding]:
    if not facts.has("bitsandbytes"):
        yield Finding(
            "note", "bitsandbytes", "not installed: no QLoRA, which needs it for a backbone in 4 bits", "pip install bitsandbytes"
        )
    elif not facts.gpus:
        yield Finding("note", "bitsandbytes", "QLoRA needs a GPU")
    if not facts.has("flash-attn"):
        advice = [upstream.without["flash-attn"] for upstream in upstreams.every() if "flash-attn" in upstream.without]
        text = ": ".join(filter(None, ("not installed", "; ".join(advice))))
        yield Finding("note", "flash-attn", text, "pip install flash-attn --no-build-isolation" if facts.gpus else "")


def _concerned(facts: Facts) -> tuple[str, ...]:
    """The upstreams that are installed; all of them, where none is."""
    return tuple(filter(facts.has, upstreams.names())) or upstreams.names()


def _missed(facts: Facts, component: str) -> dict[str, tuple[str, ...]]:
    """The supported ranges that the installed version is not in, with their upstreams; those of upstreams that are absent left out."""
    if not facts.has(component):
        return {}
    concerned = set(_concerned(facts))
    return {spec: names for spec, names in versions.ranges(component).items() if concerned & {*names} and not facts.has(component, spec)}


def _outside(facts: Facts, component: str, fix: str = "") -> Iterator[Finding]:
    for spec, names in _missed(facts, component).items():
        whose = "" if names == upstreams.names() else f" with {', '.join(upstreams.get(name).title for name in names)}"
        text = f"{component} {facts.versions[component]} is outside {spec}, the range that is supported{whose}"
        yield Finding("warning", component, text, fix or f"pip install '{component}{spec}'", names)


def _install(facts: Facts, component: str, upstream: str | None = None) -> str:
    """The pip command for a version of the component that ran with the upstream (without it: the first that is installed)."""
    upstream = upstream or _concerned(facts)[0]
    # transformers takes few versions of tokenizers; which build of torch is right depends on the machine
    together = {"transformers": ("transformers", "tokenizers"), "torch": ()}.get(component, (component,))
    table = versions.versions()
    pins = [f"{name}=={pin}" for name in together if name in table and (pin := table[name][upstream].pinned)]
    what = " ".join(pins) or ("--force-reinstall " * facts.has(component) + component)
    build = component == "deepspeed"  # its setup.py imports torch, and compiles every operator unless told not to
    return f"{'DS_BUILD_OPS=0 ' * build}pip install {'--no-build-isolation ' * build}{what}"
