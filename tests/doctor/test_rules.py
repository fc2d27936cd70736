"""Every known bad set of versions, and what doctor says of it."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llava_region import upstreams
from llava_region.doctor.facts import Facts
from llava_region.doctor.rules import diagnose, trains
from llava_region.patches.upstream import Upstream
from tests.helpers.version_sets import BUNNY, GPU, LLAVA, facts


def levels(f: Facts) -> dict[str, list[str]]:
    """level -> components with a finding of that level."""
    out: dict[str, list[str]] = {}
    for finding in diagnose(f):
        out.setdefault(finding.level, []).append(finding.component)
    return out


def sets(upstream: str) -> list[dict[str, str]]:
    """The sets that the upstream was tested with."""
    base = {"llava": LLAVA, "bunny": BUNNY}[upstream]
    return [base, *({**base, **versions} for versions in upstreams.get(upstream).also_tested.values())]


@pytest.mark.parametrize("name", upstreams.get("llava").also_tested)
def test_the_other_tested_sets_have_nothing_wrong(name: str) -> None:
    """But for LLaVA's own scripts beside a newer transformers than it pins."""
    set_ = facts(upstreams.get("llava").also_tested[name], python="3.11.9", llava="1.2.2.post1")
    found = [f for f in diagnose(set_) if f.level != "note"]
    assert [f.component for f in found] == ["transformers"] * (name == "newest")
    assert trains(set_, found)["llava"]


@pytest.mark.parametrize(("base", "upstream"), [(LLAVA, "llava"), (BUNNY, "bunny")])
def test_the_tested_sets_have_nothing_wrong(base: dict[str, str], upstream: str) -> None:
    found = diagnose(facts(base))
    assert {f.level for f in found} <= {"note"}
    assert trains(facts(base), found) == {u: u == upstream for u in upstreams.names()}


BAD = [
    # (facts, level, component, words of the text, words of the command that fixes it)
    (facts(deepspeed="0.19.8"), "error", "deepspeed", "zero.Init", "deepspeed==0.16.9"),
    (facts(BUNNY, deepspeed="0.20.0"), "error", "deepspeed", "defragment", "deepspeed==0.18.9"),
    (facts(deepspeed="0.12.6"), "error", "deepspeed", "does not import under torch 2.13", "DS_BUILD_OPS=0 pip install --no-build"),
    (facts(deepspeed="0.14.4", machine={"programs": ("g++", "ninja")}), "warning", "deepspeed", "numactl", "numactl"),
    (facts(without=["deepspeed"]), "error", "deepspeed", "saving a LoRA run imports it", "DS_BUILD_OPS=0"),
    (facts(transformers="4.38.0"), "warning", "transformers", "cache_position", "transformers==4.37.2 tokenizers==0.15.1"),
    (facts(transformers="4.36.2"), "warning", "transformers", "pins transformers 4.37.2", "transformers==4.37.2"),
    (facts(transformers="4.45.0"), "error", "transformers", "outside 4.36 to 4.41", "transformers==4.37.2"),
    (facts(BUNNY, transformers="4.42.0"), "error", "transformers", "outside 4.36 to 4.41", "transformers==4.40.2"),
    (facts(BUNNY, transformers="4.37.2"), "warning", "transformers", "not with 4.37.2", "transformers==4.40.2"),
    (facts(numpy="2.1.0"), "warning", "numpy", "before numpy 2", "numpy<2"),
    (facts(numpy="2.1.0", torch="2.1.2+cu121"), "error", "numpy", "Numpy is not available", "numpy<2"),
    (facts(peft="0.9.0"), "warning", "peft", ">=0.10,<0.14", "peft==0.10.0"),
    (facts(BUNNY, peft="0.13.2"), "warning", "peft", ">=0.10,<0.13", "peft==0.10.0"),
    (facts(peft="0.14.0"), "error", "peft", "EncoderDecoderCache", "peft==0.10.0"),
    (facts(without=["peft"]), "error", "peft", "not installed", "peft==0.10.0"),
    (facts(accelerate="1.0.0"), "error", "accelerate", "dispatch_batches", "accelerate==0.34.2"),
    (facts(BUNNY, accelerate="1.2.0"), "warning", "accelerate", "outside >=0.21,<1.0", "accelerate==0.30.1"),
    (facts(accelerate="0.20.3"), "error", "accelerate", "refuses", "accelerate==0.34.2"),
    (facts(accelerate="0.21.0", machine={"programs": ("g++", "ninja")}), "warning", "accelerate", "NCCL", "accelerate==0.34.2"),
    (facts(machine={"programs": ("g++",)}), "warning", "deepspeed", "ninja is missing", "pip install ninja"),
    (facts(machine={**GPU, "locks": ("/e/shm_comm/lock",)}), "warning", "deepspeed", "hangs every later run", "rm /e/shm_comm/lock"),
    (facts(without=["deepspeed"], machine={"environment": {"DS_BUILD_OPS": "1"}}), "warning", "deepspeed", "DS_BUILD", "OPS=0"),
    (facts(torch="2.0.1"), "warning", "torch", ">=2.1", "torch>=2.1"),
    (facts(python="3.13.0"), "warning", "python", ">=3.10,<3.13", "3.12"),
    (facts(without=["torch"]), "error", "torch", "not installed", "pip install torch"),
    (facts(machine={"programs": ("g++", "ninja")}), "warning", "cuda", "no GPU", "--use_cpu True"),
    (facts(torch="2.13.0+cpu", machine={**GPU, "cuda": None, "gpus": ()}), "warning", "cuda", "built for CPU", "pytorch.org"),
    (facts(machine={**GPU, "gpus": ()}), "warning", "cuda", "driver too old for CUDA 12.6", "nvidia-smi"),
    (facts(without=["llava"]), "error", "llava", "neither", "llava-torch==1.2.2.post1"),
    (facts(without=["llava"], machine={**GPU, "environment": {"BUNNY_ROOT": "/b"}}), "error", "bunny", "neither", "PYTHONPATH=/b"),
    (facts(BUNNY, broken={"bunny": "ModuleNotFoundError: No module named 'xformers.ops'"}), "error", "bunny", "xformers", "pip install x"),
    (facts(broken={"deepspeed": "ImportError: libfoo"}), "error", "deepspeed", "libfoo", "deepspeed==0.16.9"),
    (facts(broken={"flash-attn": "ImportError: undefined symbol"}), "warning", "flash-attn", "undefined symbol", "pip install"),
    (facts(conflicts=(("transformers", "tokenizers<0.19", "0.20.0"),)), "error", "transformers", "0.20.0", "tokenizers<0.19"),
    (facts(conflicts=(("peft", "safetensors>=9", "0.4"),)), "warning", "peft", "safetensors>=9", "safetensors>=9"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "level", "component", "text", "mend"), BAD, ids=[f"{b[1]}-{b[2]}-{i}" for i, b in enumerate(BAD)])
def test_bad_sets_are_named_with_what_fixes_them(bad: Facts, level: str, component: str, text: str, mend: str) -> None:
    found = [f for f in diagnose(bad) if (f.level, f.component) == (level, component) and text in f.text and mend in f.mend]
    assert len(found) == 1, diagnose(bad)
    able = trains(bad, diagnose(bad))
    assert any(able.values()) == (level != "error" and bad.has("deepspeed"))


def test_an_error_of_one_upstream_leaves_the_other() -> None:
    both = facts(BUNNY, llava="1.2.2.post1", broken={"bunny": "RuntimeError: operator torchvision::nms does not exist"})
    assert trains(both, diagnose(both)) == {"llava": True, "bunny": False}
    assert "warning" in levels(both)  # LLaVA's generation under transformers 4.40


def test_errors_come_first() -> None:
    order = [f.level for f in diagnose(facts(deepspeed="0.19.8", numpy="2.0.0", without=["flash-attn"]))]
    assert order == sorted(order, key=["error", "warning", "note"].index) and len(set(order)) == 3


def test_torch_load_under_the_old_trainer_is_noted_only_where_it_fails() -> None:
    def noted(f: Facts) -> bool:
        return any("weights_only" in x.text for x in diagnose(f))

    assert noted(facts()) and not noted(facts(torch="2.5.1")) and not noted(facts(BUNNY))


def last_before(bound: str) -> str:
    """A version just below the bound: 4.41.999 below 4.42."""
    *first, last = Version(bound.removesuffix(".0")).release
    return ".".join(map(str, (*first, last - 1, 999)))


def edges() -> list[tuple[str, str, str, bool]]:
    """(upstream, component, version at an edge of its supported range, whether the version is inside)."""
    found = []
    for upstream in upstreams.every():
        for component, spec in upstream.supported.items():
            for part in SpecifierSet(spec):
                at, below = part.version, last_before(part.version)
                inside, outside = (at, below) if part.operator == ">=" else (below, at)
                found += [(upstream.name, component, inside, True), (upstream.name, component, outside, False)]
    return found


@pytest.mark.parametrize(("upstream", "component", "version", "inside"), edges())
def test_the_rules_agree_with_the_supported_ranges(upstream: str, component: str, version: str, inside: bool) -> None:
    machines = [facts({**base, component: version}) for base in sets(upstream)]
    ignored = () if component == "transformers" else ("transformers",)  # LLaVA's own scripts want one minor release of it
    found = min(([f for f in diagnose(machine) if f.level != "note" and f.component not in ignored] for machine in machines), key=len)
    if inside:  # next to one of the sets at least: accelerate 1 goes with the newest transformers, deepspeed 0.12 with torch 2.1
        assert {f.level for f in found} <= ({"warning"} if component == "transformers" else set())
        assert any(trains(machine, diagnose(machine))[upstream] for machine in machines)
    elif component != "tokenizers":  # which is what transformers requires, and is found as a conflict
        assert [f.component for f in found] == [component]


def test_a_range_of_one_upstream_concerns_it_alone(third: Upstream) -> None:
    both = facts(third="1.0", torch="2.6.0")
    (found,) = [f for f in diagnose(both) if f.component == "torch"]
    assert (found.level, found.upstreams) == ("warning", ("third",))
    assert found.text == "torch 2.6.0 is outside >=2.7, the range that is supported with Third"
    assert found.mend == "pip install 'torch>=2.7'"
    assert not [f for f in diagnose(facts(torch="2.6.0")) if f.component == "torch"]


def test_how_each_upstream_is_got(third: Upstream) -> None:
    found = [f for f in diagnose(facts(without=["llava"])) if f.level == "error"]
    assert {f.text for f in found} == {"neither LLaVA, Bunny nor Third can be imported"}
    assert {f.component: f.mend for f in found} == {
        "llava": "pip install --no-deps llava-torch==1.2.2.post1",
        "bunny": "clone github.com/BAAI-DCAI/Bunny at 08273ac, and put it on PYTHONPATH",
        "third": "write to its authors",
    }


def test_what_an_upstream_does_without_is_its_own_word(third: Upstream) -> None:
    (note,) = [f for f in diagnose(facts(without=["flash-attn"])) if f.component == "flash-attn"]
    assert note.text == "not installed: train with LLaVA's train.py, as train_mem.py asks for flash attention; Third is slow"
