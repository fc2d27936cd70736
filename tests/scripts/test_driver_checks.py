"""What the drivers of scripts/reproduce refuse before their first step, in a dry run too: one line, and nothing is run."""

import json
import sys

import pytest

from tests.scripts.test_launchers import SCRIPTS, run_script
from tests.scripts.test_reproduce import DRIVERS, REPRODUCE, listed, option, regions, training_inputs


def refused(driver, **settings):
    """The one error line of a driver that refuses its settings."""
    done = run_script(REPRODUCE / f"{driver}.sh", **{"PYTHON": sys.executable, "DRY_RUN": 1, "RESULTS": "r", **settings})
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_a_driver_sets_itself(driver):
    line = refused(driver, TUNE_LAYERS="sparse:4")
    assert "TUNE_LAYERS is 'sparse:4', but a driver chooses" in line and "unset it" in line and str(SCRIPTS / "train") in line
    assert "set RESULTS" in refused(driver, OUT="runs/llava-lora")
    assert listed(driver, TUNE_LAYERS="", OUT=""), "set to nothing they are not set"
    for flags in ("--bf16 False --tune_layers=all", "--output-dir x"):
        assert "which a driver sets for each run; leave it out" in refused(driver, TRAIN_FLAGS=flags)


@pytest.mark.parametrize(
    ("driver", "setting", "reads"),
    [
        ("table3", "SPECS", "LLAVA_13B_SPECS"), ("table4", "SPECS", "SPEC"), ("table2", "SPEC", "SPECS"), ("table2", "LAYERS", "SPECS"),
        ("table1", "SPECS", "LAYERS"), ("figure1", "SPEC", "MODELS"),
    ],
)  # fmt: skip
def test_what_another_driver_reads(driver, setting, reads):
    line = refused(driver, **{setting: "8"})
    assert f"{setting} is '8', and {driver}.sh has no such setting" in line and reads in line.split("reads")[1]


def test_models():
    assert "unknown model 'llava_13'; allowed: llava_7b" in refused("table3", MODELS="llava_7b llava_13")
    assert "unknown model 'lava'" in refused("figure5", MODELS="bunny_llama3_8b lava")
    assert "set BUNNY_LLAMA3_8B_SPECS" in refused("table3", MODELS="llava_7b bunny_llama3_8b")
    assert "table2.sh is about bunny_llama3_8b alone" in refused("table2", MODELS="llava_7b")
    others = {"LLAVA_7B_SPECS": "all", "DROPS": "1 2", "PERCENTS": "10", "SETS": "0-3"}
    assert listed("table2", MODELS="llava_7b bunny_llama3_8b", SPECS="all", **others), "one environment for all drivers"


@pytest.mark.parametrize(
    ("driver", "settings", "says"),
    [
        ("table1", {"LAYERS": "8x"}, "LAYERS for bunny_llama3_8b: '8x' in 'sparse:8x'"),
        ("table1", {"LAYERS": "17"}, "'upper-middle:17' starts at layer 16 of 32"),
        ("table2", {"SPECS": "all sparse:16 sparse:8 sparse:6 sparce:4"}, "SPECS for bunny_llama3_8b: unknown layer spec 'sparce:4'"),
        ("table2", {"SPECS": "all sparse:33"}, "makes 33 layers; allowed: 1 to 32"),
        ("table2", {"SPECS": "all none.json:m:8"}, "no scores file none.json"),
        ("table2", {"SPECS": "a.json:m:8 b.json:m:8"}, "'a.json:m:8' and 'b.json:m:8', whose runs would have one folder (...-m-8)"),
        ("table3", {"LLAVA_13B_SPECS": "all 0-40"}, "LLAVA_13B_SPECS for llava_13b: layer 40"),
        ("table4", {"SPEC": "0-32"}, "SPEC for bunny_llama3_8b: layer 32"),
        ("figure1", {"SETS": "0-3;;32"}, "SETS for llava_7b: layer 32 in '32'"),
        ("figure1", {"SETS": " ; "}, "SETS names no layers"),
        ("figure1", {"DROPS": "1 32"}, "DROPS has '32'; allowed: whole numbers of layers from 1 on, here at most 31"),
        ("figure1", {"RECORDS": "1e3"}, "RECORDS is '1e3'"),
        ("figure2", {"SPECS": "sparse:x"}, "'x' in 'sparse:x'"),
        ("figure2", {"PERCENTS": "100 x"}, "PERCENTS has 'x'"),
        ("figure2", {"PERCENTS": "0"}, "PERCENTS has '0'"),
        ("figure3", {"BUNNY_LLAMA3_8B_SPECS": "top:33"}, "BUNNY_LLAMA3_8B_SPECS for bunny_llama3_8b"),
        ("figure4", {"DROPS": "1,2"}, "DROPS has '1,2'"),
        ("figure4", {"DROPS": "25"}, "at most 24"),
        ("figure4", {"SPEC": "r/scores/none.json:angular_distance:8"}, "no scores file"),
        ("table4", {"TASKS": "mmlu,bhb"}, "unknown task 'bhb'"),
        ("table1", {"ATTENTION_TASKS": "docvqa tduic"}, "unknown task 'tduic'"),
        ("figure3", {"PAPER": "true"}, "PAPER is 'true'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [0, 1])
def test_regions_and_numbers(tmp_path, driver, settings, says, dry):
    assert says in refused(driver, DRY_RUN=dry, RESULTS=tmp_path / "results", NUM_GPUS=1, **training_inputs(tmp_path), **settings)
    assert not (tmp_path / "results").exists()


def test_a_dry_run_is_asked_for_by_a_number():
    """`DRY_RUN=yes` started the training."""
    assert "DRY_RUN is 'yes'; allowed: 1, or 0 or nothing" in refused("figure3", DRY_RUN="yes")


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_check_takes_what_the_driver_does_by_default(driver):
    """With this package to check against, and without."""
    assert listed(driver, PYTHON=sys.executable) == [
        [sys.executable if word == "false" else word for word in words] for words in listed(driver, PYTHON="false")
    ]


def test_layers_are_those_of_the_model_that_is_trained(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 8}))
    assert "makes 16 layers; allowed: 1 to 8" in refused("table2", MODEL=tmp_path)
    assert regions(listed("table2", MODEL=tmp_path, SPECS="all 7", PYTHON=sys.executable)) == ["all", "7"]
    # a model of unknown size: the training itself will see it
    assert regions(listed("table2", MODEL="lmsys/other", SPECS="0-39", PYTHON=sys.executable)) == ["0-39"]
    assert "SPECS is 'sparce:4'" in refused("table2", MODEL="lmsys/other", SPECS="sparce:4")


def test_figure4_may_choose_by_the_scores_that_it_makes():
    spec = "r/scores/llava-v1.5-7b-lora-all-angles.json:angular_distance:8"
    assert regions(listed("figure4", SPEC=spec, PYTHON=sys.executable)) == ["all", spec]
    assert "makes 33 layers" in refused("figure4", SPEC=spec.replace(":8", ":33"))


def test_a_part_of_the_data_may_be_a_decimal_number():
    """`((12.5 < 100))` is an error, and all of the data was taken."""
    commands = listed("figure2", PERCENTS="12.5 100", SPECS="all")
    assert [option(words, "--data_path") for words in commands if "--data_path" in words] == [
        ["r/data/bunny_695k-data-12.5pct.json"], ["data/finetune/bunny_695k.json"],
    ]  # fmt: skip
    assert option(commands[0], "--fraction") == ["12.5%"]


def test_a_dry_run_without_this_package_says_so():
    done = run_script(REPRODUCE / "table2.sh", DRY_RUN=1, SPECS="all", PYTHON="false")
    assert done.returncode == 0 and "has no llava_region" in done.stderr and len(done.stdout.splitlines()) == 3
    assert "cannot import llava_region" in refused("table2", PYTHON="false", DRY_RUN=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"LLAVA_13B_MODEL": "/none"}, "llava_13b would be trained with --model_name_or_path /none, which is not there"),
        ({"LLAVA_13B_PROJECTOR": "none.bin"}, "--pretrain_mm_mlp_adapter none.bin"),
        ({"LLAVA_13B_DATA": "none.json"}, "set LLAVA_13B_DATA or DATA"),
        ({"LLAVA_13B_IMAGES": "none"}, "--image_folder none"),
        ({"VISION_TOWER": "/none"}, "--vision_tower /none"),
        ({"TRAIN_FLAGS": "--data_path=none.json"}, "--data_path none.json"),
        ({"MODE": "dora"}, "MODE is 'dora'"),
        ({"BATCH": "3"}, "BATCH is 3"),
    ],
)
def test_what_the_last_model_is_trained_on(tmp_path, settings, says):
    """Found before the first model is trained."""
    settings = {**training_inputs(tmp_path), "NUM_GPUS": 1, "RESULTS": tmp_path / "results", "DRY_RUN": 0, **settings}
    assert says in refused("table3", **settings)
    assert not (tmp_path / "results").exists()


def test_a_training_that_is_submitted_has_its_files_elsewhere(tmp_path):
    """The driver stops at the first command that is run, which is not there."""
    settings = {"PYTHON": "true", "TRAIN_WITH": str(tmp_path / "submit"), "RESULTS": tmp_path, "NUM_GPUS": 1}
    done = run_script(REPRODUCE / "figure3.sh", **settings)
    assert done.returncode == 127 and "submit" in done.stderr.splitlines()[-1]


def test_slurm_file_explains_itself_and_checks_first(tmp_path):
    sbatch = SCRIPTS / "slurm" / "train.sbatch"
    for flags in (["--help"], ["-h"], [str(SCRIPTS / "train/llava_7b.sh"), "--help"]):
        done = run_script(sbatch, *flags)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: SETTING=VALUE ... sbatch [OPTIONS] ")
        assert "MAX_RESTARTS=100" in done.stdout and "#SBATCH" not in done.stdout and "set -euo" not in done.stdout
    copy = tmp_path / "slurm_script"  # as Slurm runs it
    copy.write_text(sbatch.read_text())
    assert "MAX_RESTARTS=100" in run_script(copy, "--help").stdout
    for settings, says in (({}, "not a Slurm job"), ({"SLURM_JOB_ID": 1}, "MAX_RESTARTS is 'often'")):
        done = run_script(sbatch, "launcher.sh", MAX_RESTARTS="often", **settings)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("setting", "value"), [("DRY_RUN", "true"), ("SAVE_STEPS", "5OO"), ("MASTER_PORT", "x")])
def test_launchers_read_their_numbers_first(setting, value):
    done = run_script(SCRIPTS / "train" / "llava_7b.sh", **{"DRY_RUN": 1, setting: value})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and f"{setting} is '{value}'" in done.stderr


def test_save_steps_may_be_a_part():
    for value in ("0.1", "500", ".5", "1e3"):
        assert f"--save_steps {value} " in run_script(SCRIPTS / "train" / "llava_7b.sh", DRY_RUN=1, SAVE_STEPS=value).stdout
