"""What the command line says of commands, options and values that it does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llava_region import train
from llava_region.training.arguments import did_you_mean
from tests.helpers.command_line import refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train llava", "Training is 'python -m llava_region.train (llava|bunny"),
        ("layer x", "Did you mean 'layers'?"),
        ("layers x --tune-layers 3", "it is a flag of training, 'python -m llava_region.train UPSTREAM FLAGS --tune-layers ...'"),
        ("score m --tune_layers 3 --out x", "it is a flag of training"),
        ("score m --bach-size 3 --out x", "--batch-size"),
        ("score m --attn_implementation eager --out x", "--attn-implementation"),
        ("report x --table 7", "--table is '7'; allowed: a number from 1 to 4"),
        ("report x --table 2 --table=0", "--table is '2' and '0'; allowed: a number from 1 to 4"),
        ("report x --figure one", "--figure is 'one'; allowed: a whole number from 1 to 5"),
        ("score m --batch-size 0 --out x", "--batch-size is '0'; allowed: a number, at least 1"),
        ("score m --eps=-1 --out x", "--eps is '-1'; allowed: a number, at least 0"),
    ],
)
def test_what_was_meant(argv, message, capsys):
    assert message in refused(capsys, *argv.split())


def test_misspelt_flags_of_training(capsys):
    pytest.importorskip("llava.train.train")
    given = ["llava", "--model_name_or_path", "m", "--output_dir", "o"]
    for misspelt, meant in (("--lora_enabel", "--lora_enable"), ("--tune-layers", "--tune_layers"), ("--vision_towr", "--vision_tower")):
        line = refused(capsys, *given, "--tune_layers", "1", misspelt, "True", main=train.main)
        assert f"unrecognized arguments: {misspelt} True; did you mean {meant}?" in line
    assert "unrecognized arguments: --lora_enabel; did you mean --lora_enable?" in refused(
        capsys, *given, "--lora_enabel", "True", main=train.main
    )
    assert "did you mean" not in refused(capsys, *given, "--something_else", "1", main=train.main)


def test_nothing_is_meant():
    assert did_you_mean(["--zzz"], ["--lora_enable"]) == "" and did_you_mean([], ["--lora_enable"]) == ""
    assert did_you_mean(["--lora-r", "--lora-R"], ["--lora_r"]) == "; did you mean --lora_r?"


def test_stdout_is_for_results(lora_run, tiny, tmp_path):
    """Whatever imports DeepSpeed, which logs to the stdout that it finds then: accelerate 0.21 does, at its own import."""
    code = (
        "import sys; from llava_region.cli import main; code = main(sys.argv[1:]); "
        "from deepspeed.utils import logger; logger.warning('of DeepSpeed'); sys.exit(code)"
    )
    command = ["merge", str(lora_run), "--out", str(tmp_path / "out"), "--base", str(tiny.backbone), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["merged"] and "of DeepSpeed" in done.stderr
