"""`llava-region doctor`: every known bad set of versions, and one look at the machine the tests run on."""

import dataclasses
import json
import sys

import pytest

from llava_region.cli import main
from llava_region.doctor import rules as doctor
from llava_region.doctor.rules import Facts, diagnose, trains

LLAVA = {
    "python": "3.11.9", "torch": "2.13.0+cu126", "transformers": "4.37.2", "tokenizers": "0.15.1", "peft": "0.10.0",
    "accelerate": "0.34.2", "deepspeed": "0.16.9", "numpy": "1.26.4", "bitsandbytes": "0.45.0", "flash-attn": "2.7.0",
    "llava": "1.2.2.post1",
}  # fmt: skip
BUNNY = {**LLAVA, "transformers": "4.40.2", "tokenizers": "0.19.1", "accelerate": "0.30.1", "deepspeed": "0.18.9", "bunny": "1.0"}
del BUNNY["llava"]
GPU = {"cuda": "12.6", "gpus": ("NVIDIA A800",) * 8, "driver_gpus": ("NVIDIA A800",) * 8, "programs": ("g++", "ninja")}


def facts(base=LLAVA, without=(), conflicts=(), broken=None, machine=GPU, **versions) -> Facts:
    """The tested set of an upstream with some versions changed; `flash_attn` stands for flash-attn."""
    versions = {**base, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return Facts({k: v for k, v in versions.items() if k not in without}, broken=broken or {}, conflicts=conflicts, **machine)


def levels(f: Facts) -> dict[str, list[str]]:
    """level -> components with a finding of that level."""
    out: dict[str, list[str]] = {}
    for finding in diagnose(f):
        out.setdefault(finding.level, []).append(finding.component)
    return out


@pytest.mark.parametrize(("base", "upstream"), [(LLAVA, "llava"), (BUNNY, "bunny")])
def test_the_tested_sets_have_nothing_wrong(base, upstream):
    found = diagnose(facts(base))
    assert {f.level for f in found} <= {"note"}
    assert trains(facts(base), found) == {u: u == upstream for u in doctor.UPSTREAMS}


BAD = [
    # (facts, level, component, words of the text, words of the mending command)
    (facts(deepspeed="0.19.8"), "error", "deepspeed", "zero.Init", "deepspeed==0.16.9"),
    (facts(BUNNY, deepspeed="0.20.0"), "error", "deepspeed", "defragment", "deepspeed==0.18.9"),
    (facts(deepspeed="0.12.6"), "error", "deepspeed", "does not import under torch 2.13", "DS_BUILD_OPS=0 pip install --no-build"),
    (facts(deepspeed="0.14.4"), "warning", "deepspeed", "numactl", "numactl"),
    (facts(without=["deepspeed"]), "error", "deepspeed", "saving a LoRA run imports it", "DS_BUILD_OPS=0"),
    (facts(transformers="4.38.0"), "warning", "transformers", "cache_position", "transformers==4.37.2 tokenizers==0.15.1"),
    (facts(transformers="4.36.2"), "warning", "transformers", "pins transformers 4.37.2", "transformers==4.37.2"),
    (facts(transformers="4.45.0"), "error", "transformers", "outside 4.36 to 4.41", "transformers==4.37.2"),
    (facts(BUNNY, transformers="4.42.0"), "error", "transformers", "outside 4.36 to 4.41", "transformers==4.40.2"),
    (facts(BUNNY, transformers="4.37.2"), "warning", "transformers", "not with 4.37.2", "transformers==4.40.2"),
    (facts(numpy="2.1.0"), "warning", "numpy", "before numpy 2", "numpy<2"),
    (facts(numpy="2.1.0", torch="2.1.2+cu121"), "error", "numpy", "Numpy is not available", "numpy<2"),
    (facts(peft="0.9.0"), "warning", "peft", ">=0.10,<0.13", "peft==0.10.0"),
    (facts(peft="0.13.2"), "warning", "peft", ">=0.10,<0.13", "peft==0.10.0"),
    (facts(peft="0.14.0"), "error", "peft", "EncoderDecoderCache", "peft==0.10.0"),
    (facts(without=["peft"]), "error", "peft", "not installed", "peft==0.10.0"),
    (facts(accelerate="1.0.0"), "error", "accelerate", "dispatch_batches", "accelerate==0.34.2"),
    (facts(BUNNY, accelerate="1.2.0"), "warning", "accelerate", "nobody tried", "accelerate==0.30.1"),
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
def test_bad_sets_are_named_with_what_mends_them(bad, level, component, text, mend):
    found = [f for f in diagnose(bad) if (f.level, f.component) == (level, component) and text in f.text and mend in f.mend]
    assert len(found) == 1, diagnose(bad)
    able = trains(bad, diagnose(bad))
    assert any(able.values()) == (level != "error" and bad.has("deepspeed"))


def test_an_error_of_one_upstream_leaves_the_other():
    both = facts(BUNNY, llava="1.2.2.post1", broken={"bunny": "RuntimeError: operator torchvision::nms does not exist"})
    assert trains(both, diagnose(both)) == {"llava": True, "bunny": False}
    assert "warning" in levels(both)  # LLaVA's generation under transformers 4.40


def test_errors_come_first():
    order = [f.level for f in diagnose(facts(deepspeed="0.19.8", numpy="2.0.0", without=["flash-attn"]))]
    assert order == sorted(order, key=["error", "warning", "note"].index) and len(set(order)) == 3


def test_torch_load_under_the_old_trainer_is_noted_only_where_it_fails():
    def noted(f):
        return any("weights_only" in x.text for x in diagnose(f))

    assert noted(facts()) and not noted(facts(torch="2.5.1")) and not noted(facts(BUNNY))


def test_a_probe_that_fails_or_hangs_is_reported():
    assert doctor._end(doctor._start("print('x')")) == (None, "x\n")
    assert doctor._end(doctor._start("import no_such_module"))[0] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert doctor._end(doctor._start("import os; os.abort()"))[0] == "exit status -6"
    assert doctor._end(doctor._start("import time; time.sleep(60)"), seconds=0.2)[0] == "no end after 0.2 s"


def test_upstreams_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "bunny"
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert doctor._trainer_file("bunny") is None or "bunny" not in sys.modules
    (package / "train" / "train.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._trainer_file("bunny") == package / "train" / "train.py"


def test_locks_of_killed_builds_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    assert doctor._locks() == ()
    lock.touch()
    assert doctor._locks() == (str(lock),)


def test_unmet_requirements_are_found(monkeypatch):
    lines = ["tokenizers<0.19,>=0.14", "torch>=9; extra == 'torch'", "numpy>=1.17", "absent-package>=1"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: {"tokenizers": "0.20.0", "numpy": "1.26.4", "torch": "0.1"}[name])
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "absent-package" else doctor.metadata.version(name))
    assert list(doctor._unmet({"transformers": "4.37.2"})) == [("transformers", "tokenizers<0.19,>=0.14", "0.20.0")]


@pytest.mark.slow
def test_the_command_on_this_machine(capsys):
    code = main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["works"] == any(data["trains"].values()) == (code == 0)
    import torch
    import transformers

    versions = data["facts"]["versions"]
    assert (versions["torch"], versions["transformers"]) == (torch.__version__, transformers.__version__)
    assert len(data["facts"]["gpus"]) == torch.cuda.device_count()
    assert data["facts"]["broken"].keys() <= versions.keys()


def test_the_table_and_the_exit_status(capsys, monkeypatch):
    bad = facts(deepspeed="0.19.8")
    monkeypatch.setattr(doctor, "collect", lambda: bad)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "0.19.8" in text and "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.16.9" in text
    assert "LLaVA: training cannot work" in text and "Bunny: not installed" in text
    monkeypatch.setattr(doctor, "collect", lambda: dataclasses.replace(bad, versions=LLAVA))
    assert main(["doctor"]) == 0
    assert "LLaVA: training can work" in capsys.readouterr().out
