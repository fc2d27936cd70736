"""One contract for the hooks of every upstream: they bind what they say, put it back, and refuse what they were not made for."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.training_runs import environment

HERE = Path(__file__).parent
# id: (argument of the contract, folder that goes first on the path)
UPSTREAMS = {
    "llava": ("llava", None),
    "bunny": ("bunny", os.environ.get("BUNNY_ROOT")),
    "bunny-standin": ("bunny", HERE / "standin_bunny"),
    "toy": ("toy=tests.patches.toy_upstream", HERE / "toy_codebase"),
}


@pytest.fixture(scope="module", params=UPSTREAMS)
def found(request) -> dict:
    """What the contract found in a process of its own."""
    name, folder = UPSTREAMS[request.param]
    if request.param == "llava" and find_spec("llava") is None:
        pytest.skip("llava is not installed")
    if request.param == "bunny" and folder is None:
        pytest.skip("BUNNY_ROOT does not name a checkout of BAAI-DCAI/Bunny at 08273ac")
    path = environment()["PYTHONPATH"]
    env = environment(PYTHONPATH=os.pathsep.join([str(folder), path]) if folder else path)
    command = [sys.executable, "-m", "tests.helpers.hook_contract", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_names_are_bound_within_and_put_back(found):
    assert found["unchanged within"] == ["train"] and len(found["hooked"]) >= 3
    for when in ("after", "after an error"):
        assert found[f"unchanged {when}"] == [*found["hooked"], "train"]
    assert found["error"] == "boom"


def test_hooks_are_not_nested(found):
    assert "hooks of a run on 'sparse:25%' are applied" in found["nested"]
    assert found["unchanged after a nested one"] == ["train"]


def test_a_missing_symbol_is_named(found):
    assert found["missing"].keys() >= {*found["hooked"], "ModelArguments"}
    if found["title"] != "toy":
        assert found["missing"].keys() >= {"get_peft_state_non_lora_maybe_zero_3", "conversation_lib"}
    for symbol, message in found["missing"].items():
        assert message.startswith(f"UnsupportedUpstream: {found['module']}.{symbol} is missing; tested with {found['tested']}")


def test_a_missing_part_of_the_tokenisation_is_named(found):
    if found["title"] == "toy":
        assert found["missing"].keys() >= {"ids_and_labels"}
        return
    for symbol in ("preprocess", "preprocess_multimodal"):
        message, data = found[f"no {symbol}"]
        assert message.startswith(f"UnsupportedUpstream: {data}.{symbol} is missing; tested with {found['tested']}")
    assert "preprocess takes ('sources', 'tokenizer'), expected ('sources', 'tokenizer', 'has_image')" in found["changed preprocess"]


def test_a_changed_signature_is_named(found):
    assert "takes ('args', 'model'), expected ('model',)" in found["changed"] and found["changed"].startswith("UnsupportedUpstream")


def test_a_missing_flag_is_named(found):
    for class_name, message in found["no field"].items():
        assert f"{found['module']}.{class_name} has no field '" in message


def test_an_unknown_script_is_refused(found):
    assert found["unknown script"].startswith("LlavaRegionError: 'pretrain.py' is not a known train script of " + found["title"])
