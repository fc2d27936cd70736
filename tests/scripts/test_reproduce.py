"""The drivers of scripts/reproduce: what they run, in which order, and that nothing is run twice."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts.test_launchers import SCRIPTS, flags_of, run_script

REPRODUCE = SCRIPTS / "reproduce"
DRIVERS = sorted(path.stem for path in REPRODUCE.glob("*.sh") if path.stem not in ("common", "checks"))
VISUAL = "ocrvqa,docvqa,refcocog,tdiuc,mmbench,gqa,scienceqa,textvqa"
SPARSE_32 = ["all", "sparse:16", "sparse:8", "sparse:6", "sparse:4", "sparse:2", "sparse:1"]
SPARSE_40 = ["all", "sparse:10", "sparse:9"]
# Stands in for Python: does nothing but note the command and write the file that the real one writes last.
FAKE_PYTHON = """#!/usr/bin/env bash
set -euo pipefail
args=("$@")
output() { # FLAG
    for ((i = 0; i < ${#args[@]}; i++)); do
        [[ ${args[i]} != "$1" ]] || echo "${args[i + 1]}"
    done
}
case " $* " in
    " -c "*) exit ;; # what is installed: nothing
    *" check "* | *" llava_region layers "*) exit ;;
    *" llava_region.train "*) out=$(output --output_dir)/cost.json text='{}' ;;
    *" llava_region eval "*)
        out=$(output --out)/results.json
        tasks=$(output --task)
        text=$(printf '    "%s": {\\n' ${tasks//,/ })
        [[ ! -f $out ]] || text+=$'\\n'$(cat "$out")
        ;;
    *" llava_region prune "*) out=$(output --out)/config.json text='{}' ;;
    *" llava_region report "*)
        out=$(output --out)
        name=$(basename "$out")
        [[ $name == figure* ]] && out=$out/$name.png || out=$out/$name.md
        text=report
        ;;
    *) out=$(output --out) text='{}' ;;
esac
echo "$*" >>"$FAKE_LOG"
[[ $(wc -l <"$FAKE_LOG") != "${FAKE_STOP:-}" ]] || exit 1
mkdir -p "$(dirname "$out")"
echo "$text" >"$out"
"""


def listed(driver, **env):
    """The commands of a driver's dry run, each as its words."""
    done = run_script(REPRODUCE / f"{driver}.sh", DRY_RUN=1, RESULTS="r", **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def kind(words):
    if "llava_region" in words:
        return words[words.index("llava_region") + 1]
    return "train" if "llava_region.train" in words else "data"


def of_kind(commands, name):
    return [words for words in commands if kind(words) == name]


def option(words, name):
    """Values of an option, as often as it is given."""
    return [words[i + 1] for i, word in enumerate(words) if word == name]


def regions(commands):
    return [option(words, "--tune_layers")[-1] for words in of_kind(commands, "train")]


def test_every_table_and_figure_has_a_driver():
    assert DRIVERS == ["figure1", "figure2", "figure3", "figure4", "figure5", "table1", "table2", "table3", "table4"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_training_is_the_launchers(driver):
    """The drivers add the region and the folder to the launchers' command lines and change nothing else."""
    for words in of_kind(listed(driver), "train"):
        flags = flags_of(words)
        model = {"llava-v1.5-7b": "llava_7b", "llava-v1.5-13b": "llava_13b", "bunny-llama3-8b": "bunny_llama3_8b"}[
            Path(flags["--output_dir"]).name.split("-lora-")[0]
        ]
        plain = run_script(SCRIPTS / "train" / f"{model}.sh", DRY_RUN=1, NUM_GPUS=1)
        expected = flags_of(shlex.split(plain.stdout))
        changed = {name for name in expected if expected[name] != flags.get(name)}
        assert changed <= {"--tune_layers", "--output_dir", "--data_path"} and flags.keys() == expected.keys()
        assert "--data_path" not in changed or driver == "figure2"


def test_table1_selects_by_place_and_by_importance():
    commands = listed("table1")
    heuristic = ["all", "sparse:8", "lower:8", "lower-middle:8", "upper-middle:8", "top:8", "hybrid:8"]
    scores = "r/scores/bunny-llama3-8b-lora-all"
    importance = [
        f"{scores}-attention.json:image_attention:8", f"{scores}-weights.json:parameter_change:8",
        f"{scores}-influence.json:block_influence:8", f"{scores}-influence.json:multimodal_block_influence:8",
        f"{scores}-weights.json:angular_distance_weights:8",
    ]  # fmt: skip
    assert regions(commands) == heuristic + importance
    assert all(option(words, "--task") == [VISUAL] for words in of_kind(commands, "eval"))
    scored = {option(words, "--out")[0]: words for words in of_kind(commands, "score")}
    assert set(scored) == {spec.split(":")[0] for spec in importance}
    for spec in importance:  # scored before they are trained by, on the model that tunes all layers
        file, metric, _ = spec.split(":")
        assert metric in option(scored[file], "--metrics")[0].split(",")
        assert scored[file][scored[file].index("score") + 1] == "r/runs/bunny-llama3-8b-lora-all"
        assert commands.index(scored[file]) < next(i for i, words in enumerate(commands) if spec in option(words, "--tune_layers"))
    assert option(scored[f"{scores}-influence.json"], "--limit") == ["1000"]
    assert (
        option(scored[f"{scores}-attention.json"], "--limit") == ["50"] and len(option(scored[f"{scores}-attention.json"], "--data")) == 4
    )
    report = commands[-1]
    assert kind(report) == "report" and option(report, "--table") == ["1"] and option(report, "--baseline") == ["bunny-llama3-8b-lora-all"]
    assert sum(word.startswith("r/eval/") for word in report) == 12


@pytest.mark.parametrize(
    ("driver", "specs", "tasks"),
    [
        ("table2", SPARSE_32, VISUAL),
        ("table3", SPARSE_32 + SPARSE_40, VISUAL),
        ("figure2", SPARSE_32 * 3, "ocrvqa,textvqa,tdiuc,gqa"),
        ("figure3", SPARSE_32 * 2 + SPARSE_40, None),
        ("table4", ["all", "sparse:8"] * 2, "mmlu,bbh"),
        ("figure1", ["all"], "ocrvqa,textvqa,docvqa,scienceqa"),
        ("figure4", ["all", "sparse:8"], "ocrvqa,textvqa,docvqa,scienceqa"),
    ],
)
def test_numbers_of_layers_and_tasks(driver, specs, tasks):
    commands = listed(driver)
    assert regions(commands) == specs
    assert {option(words, "--task")[0] for words in of_kind(commands, "eval")} == ({tasks} if tasks else set())
    number = driver[-1]
    full = ["bunny-llama3-8b", "llava-v1.5-7b", "llava-v1.5-13b"] if driver != "figure3" else []
    trained = {Path(option(words, "--output_dir")[0]).name for words in of_kind(commands, "train")}
    assert set(option(commands[-1], "--baseline")) == {f"{name}-lora-all" for name in full} & trained
    assert option(commands[-1], "--table" if driver.startswith("table") else "--figure") == [number]


def test_figure2_trains_on_nested_parts():
    commands = listed("figure2")
    parts = {option(words, "--out")[0]: option(words, "--fraction")[0] for words in of_kind(commands, "subset")}
    assert parts == {"r/data/bunny_695k-data-25pct.json": "25%", "r/data/bunny_695k-data-10pct.json": "10%"}
    assert {option(words, "--seed")[0] for words in of_kind(commands, "subset")} == {"0"}  # the seed makes them nested
    data = [flags_of(words)["--data_path"] for words in of_kind(commands, "train")]
    assert data == [path for path in ("data/finetune/bunny_695k.json", *parts) for _ in SPARSE_32]
    assert len({flags_of(words)["--output_dir"] for words in of_kind(commands, "train")}) == 21
    assert "bunny-llama3-8b-lora-sparse-8-data-10pct=10" in option(commands[-1], "--data-scale")


def test_figure3_reports_what_was_trained():
    commands = listed("figure3")
    trained = [flags_of(words)["--output_dir"] for words in of_kind(commands, "train")]
    assert [word for word in commands[-1] if word.startswith("r/runs/")] == trained and len(trained) == 17


def test_the_papers_cost_is_another_run():
    """PAPER=1 switches off what this package saves of its own, and mixes nothing with other runs."""
    flags = [flags_of(words) for words in of_kind(listed("figure3", PAPER=1, TRAIN_FLAGS="--max_steps 9"), "train")]
    assert all(each["--region_checkpointing"] == "all" and each["--supervised_logits"] == "False" for each in flags)
    assert all(each["--output_dir"].endswith("-paper") and each["--max_steps"] == "9" for each in flags) and len(flags) == 17
    assert not any("--supervised_logits" in flags_of(words) for words in of_kind(listed("figure3"), "train"))


def test_table4_asks_the_backbones_too():
    evals = of_kind(listed("table4"), "eval")
    assert [words[words.index("eval") + 1] for words in evals if "--base" not in words] == [
        "meta-llama/Meta-Llama-3-8B-Instruct", "lmsys/vicuna-7b-v1.5",
    ]  # fmt: skip


def test_figure4_prunes_outside_the_region():
    commands = listed("figure4")
    prunes = of_kind(commands, "prune")
    assert [option(words, "--drop")[0] for words in prunes] == ["1", "2", "3", "4"] * 2
    full, region = prunes[:4], prunes[4:]
    assert all(option(words, "--protect") == ["none"] for words in full)
    assert not any("--protect" in words for words in region)  # the region is protected without being named
    for words, spec in zip(prunes, ["all"] * 4 + ["sparse-8"] * 4, strict=True):
        assert option(words, "--scores") == [f"r/scores/llava-v1.5-7b-lora-{spec}-angles.json"]
        assert words[words.index("prune") + 1] == f"r/runs/llava-v1.5-7b-lora-{spec}"  # each anew from the whole model
    pruned = [words[words.index("eval") + 1] for words in of_kind(commands, "eval") if "--base" not in words]
    assert pruned == [option(words, "--out")[0] for words in prunes]
    assert len([word for word in commands[-1] if word.startswith("r/eval/")]) == 10


def test_figure1_measures_the_model_and_its_backbone(tmp_path):
    commands = listed("figure1", TEXT_FILES="wiki.txt news.txt", SETS="0-3;28-31", RECORDS=50)
    made = {option(words, "--out")[0]: words for words in of_kind(commands, "data") if "answers" in words or "text" in words}
    assert [Path(name).stem for name in made] == ["ocrvqa", "docvqa", "mmlu", "bbh", "texts"]
    assert all(option(words, "--limit") == ["50"] for words in made.values())
    assert made["r/data/answers/texts.json"][2:5] == ["text", "wiki.txt", "news.txt"]
    tuned, backbone = of_kind(commands, "perplexity")
    assert option(tuned, "--data") == list(made) and option(backbone, "--data") == list(made)[2:]
    assert option(tuned, "--revert-sweep") == ["0-3;28-31"] and option(tuned, "--base") == ["lmsys/vicuna-7b-v1.5"]
    assert backbone[backbone.index("perplexity") + 1] == "lmsys/vicuna-7b-v1.5" and option(backbone, "--template") == ["vicuna_v1"]
    assert option(commands[-1], "--perplexity") == [option(tuned, "--out")[0], option(backbone, "--out")[0]]
    prunes = of_kind(commands, "prune")
    assert [option(words, "--drop")[0] for words in prunes] == ["1", "2", "3", "4"]
    assert all(option(words, "--protect") == ["none"] for words in prunes)
    assert not of_kind(listed("figure1", TEXT_DATA=""), "perplexity")[1:], "without text there is no need of the backbone"


def test_figure5_scores_50_questions_of_each_benchmark():
    commands = listed("figure5")
    assert regions(commands) == ["all"] and of_kind(commands, "eval") == []
    (score,) = of_kind(commands, "score")
    assert option(score, "--limit") == ["50"] and len(option(score, "--data")) == 4
    assert option(commands[-1], "--figure") == ["5"] and option(commands[-1], "--scores") == option(score, "--out")


def test_settings_of_one_model_go_before_the_common_ones():
    commands = listed("table3", MODEL="/m/any", DATA="d.json", LLAVA_13B_MODEL="/m/vicuna 13b", LLAVA_13B_PROJECTOR="", IMAGES="im")
    flags = [flags_of(words) for words in of_kind(commands, "train")]
    small, large = flags[0], flags[-1]
    assert (small["--model_name_or_path"], large["--model_name_or_path"]) == ("/m/any", "/m/vicuna 13b")
    assert "--pretrain_mm_mlp_adapter" in small and "--pretrain_mm_mlp_adapter" not in large
    assert small["--data_path"] == large["--data_path"] == "d.json" and large["--image_folder"] == "im"
    bases = {option(words, "--base")[0] for words in of_kind(commands, "eval")}
    assert bases == {"/m/any", "/m/vicuna 13b"}


def test_gpus_and_a_bunny_checkout_reach_every_step():
    commands = listed("table1", NUM_GPUS=4, BUNNY_ROOT="/src/Bunny")
    assert all(words[:2] == ["env", "PYTHONPATH=/src/Bunny"] for words in commands if kind(words) != "data")
    for words in of_kind(commands, "eval") + of_kind(commands, "score"):
        assert option(words, "--nproc_per_node") == ["4"]
    assert "--nproc_per_node" not in commands[-1]


def training_inputs(folder):
    """Settings that name a data file and an image folder, which are there, and no projector."""
    data = folder / "records.json"
    data.touch()
    return {"DATA": data, "IMAGES": folder, "PROJECTOR": ""}


@pytest.fixture
def fake(tmp_path):
    """Run a driver with a stand-in for Python; returns the commands that were run."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "log"
    inputs = training_inputs(tmp_path)

    def run(driver, ok=True, **env):
        log.write_text("")
        env = {"PYTHON": python, "FAKE_LOG": log, "RESULTS": tmp_path / "results", "NUM_GPUS": 1, "LAUNCHER": "python", **inputs, **env}
        done = run_script(REPRODUCE / f"{driver}.sh", **env)
        assert (done.returncode == 0) == ok, done.stderr
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("driver", DRIVERS)
def test_finished_steps_are_not_run_again(fake, driver):
    first = fake(driver)
    assert [kind(words) for words in first] == [kind(words) for words in listed(driver, LAUNCHER="python", NUM_GPUS=1)]
    assert fake(driver) == []


@pytest.mark.parametrize("stop", [1, 2, 4, 9])
def test_driver_goes_on_at_the_step_that_failed(fake, stop):
    """A step that fails ends the driver; started again, it does that step and the ones after it."""
    before = fake("table2", ok=False, FAKE_STOP=stop)
    assert len(before) == stop
    after = fake("table2")
    assert after[0] == before[-1]
    assert len(before) - 1 + len(after) == 7 * 2 + 1


def test_tables_share_runs(fake):
    fake("table1")
    again = fake("table2")
    assert regions(again) == ["sparse:16", "sparse:6", "sparse:4", "sparse:2", "sparse:1"]
    assert regions(fake("figure3", MODELS="bunny_llama3_8b")) == []
    # the same models are asked the tasks that they have not been asked
    assert [kind(words) for words in fake("table4", MODELS="bunny_llama3_8b")] == ["eval"] * 3 + ["report"]


def test_finished_runs_need_no_data(fake, tmp_path):
    """What a run was trained on may be gone, as far as it is finished."""
    fake("figure3", MODELS="llava_7b")
    (tmp_path / "records.json").unlink()
    assert fake("figure3", MODELS="llava_7b") == []
    assert fake("figure3", ok=False, MODELS="llava_7b", LLAVA_7B_SPECS="all top:8") == []


def test_report_is_made_anew_from_a_younger_evaluation(fake, tmp_path):
    fake("table2", SPECS="all sparse:8")
    results = tmp_path / "results/eval/bunny-llama3-8b-lora-all/results.json"
    later = time.time() + 60
    os.utime(results, (later, later))
    assert [kind(words) for words in fake("table2", SPECS="all sparse:8")] == ["report"]


def test_step_without_its_output_is_an_error(tmp_path):
    inputs = training_inputs(tmp_path)
    done = run_script(REPRODUCE / "table2.sh", PYTHON="true", RESULTS=tmp_path, NUM_GPUS=1, LAUNCHER="python", **inputs)
    assert done.returncode == 2 and "ended without" in done.stderr


def test_missing_inputs_cost_no_training(tmp_path):
    from tests.helpers.data_roots import write_mmbench, write_scienceqa

    inputs = training_inputs(tmp_path)

    def refused(driver, **settings):
        given = {"PYTHON": sys.executable, "RESULTS": tmp_path / "results", "NUM_GPUS": 1, "EVAL_DATA": tmp_path, **inputs}
        done = run_script(REPRODUCE / f"{driver}.sh", **given, **settings)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "results").exists()
        return done.stderr

    assert "unknown task 'gqqa'" in refused("table3", TASKS="gqqa")
    assert "lacks mmlu/dev/" in refused("table4")
    assert "unknown task 'docqva'" in refused("figure5", ATTENTION_TASKS="tdiuc docqva")
    write_scienceqa(tmp_path)
    write_mmbench(tmp_path)
    assert "flickr holds no images" in refused("figure4", TASKS="scienceqa", FLICKR_IMAGES=tmp_path / "flickr")
    assert "lacks docvqa" in refused("table1", TASKS="scienceqa", ATTENTION_TASKS="docvqa")
    assert "mmbench keeps its images inside" in refused("figure5", ATTENTION_TASKS="mmbench")
    (tmp_path / "flickr").mkdir()
    (tmp_path / "flickr/1.jpg").touch()
    figure1 = {"TASKS": "scienceqa", "VISUAL_DATA": "scienceqa", "TEXT_DATA": "", "FLICKR_IMAGES": tmp_path / "flickr"}
    assert "cannot read none.txt" in refused("figure1", TEXT_FILES="none.txt", **figure1)


def test_training_can_be_submitted(fake, tmp_path):
    """TRAIN_WITH stands before every launcher, and nothing else."""
    submit = tmp_path / "submit"
    submit.write_text('#!/bin/sh\necho "submitted $*" >>"$FAKE_LOG"\nexec "$@"\n')
    submit.chmod(0o755)
    commands = fake("table2", SPECS="all", TRAIN_WITH=f"{submit}", TRAIN_FLAGS="--max_steps 5")
    assert commands[0][0] == "submitted" and commands[0][1].endswith("bunny_llama3_8b.sh") and commands[0][2:] == ["--max_steps", "5"]
    assert [kind(words) for words in commands[1:]] == ["train", "eval", "report"]


def test_scoring_and_evaluation_can_be_submitted():
    """Each on the GPUs of the machine where it runs: those of this one say nothing of it."""
    commands = listed("table1", EVAL_WITH="srun -p gpu", SCORE_WITH="srun --mem 64G", CUDA_VISIBLE_DEVICES="0,1")
    for name, submit in {"eval": ["srun", "-p", "gpu"], "score": ["srun", "--mem", "64G"]}.items():
        for words in of_kind(commands, name):
            assert words[: len(submit)] == submit and option(words, "--nproc_per_node") == ["gpu"]
    assert of_kind(commands, "eval") and of_kind(commands, "score")
    assert all("srun" not in words for name in ("train", "report", "data") for words in of_kind(commands, name))
    for given, expected in {"4": ["4"], "1": []}.items():
        words = of_kind(listed("table1", EVAL_WITH="srun", NUM_GPUS=given), "eval")[0]
        assert words[0] == "srun" and option(words, "--nproc_per_node") == expected
    here = listed("table1", CUDA_VISIBLE_DEVICES="0,1")
    assert all(option(words, "--nproc_per_node") == ["2"] for words in of_kind(here, "eval"))


def test_a_submitted_training_counts_its_own_gpus(fake, tmp_path):
    submit = tmp_path / "submit"
    submit.write_text('#!/bin/sh\necho "given ${NUM_GPUS-nothing}" >>"$FAKE_LOG"\nexec "$@"\n')
    submit.chmod(0o755)
    assert fake("table2", SPECS="all", TRAIN_WITH=f"{submit}", NUM_GPUS="")[0] == ["given", "nothing"]


@pytest.fixture
def tiny_driver(tiny, tmp_path):
    """Start a driver with the tiny model on CPU; returns (start, results): two regions, one benchmark of a few questions."""
    pytest.importorskip("llava.train.train")
    from tests.helpers.data_roots import write_scienceqa
    from tests.helpers.training_runs import environment

    write_scienceqa(tmp_path / "eval data")
    settings = {
        "LLAVA_7B_MODEL": tiny.backbone, "LLAVA_7B_SPECS": "all sparse:2", "MODELS": "llava_7b", "VISION_TOWER": tiny.vision_tower,
        "PROJECTOR": "", "DATA": tiny.data, "IMAGES": tiny.images, "EVAL_DATA": tmp_path / "eval data", "TASKS": "scienceqa",
        "RESULTS": tmp_path / "my results", "LAUNCHER": "python", "ZERO": "none", "NUM_GPUS": 1, "GLOBAL_BATCH": 4, "SAVE_STEPS": 2,
        "TRAIN_FLAGS": "--use_cpu True --bf16 False --tf32 False --dataloader_num_workers 0 --lora_r 8 --max_steps 8",
        "EVAL_FLAGS": "--device cpu", "SCORE_FLAGS": "--device cpu", "PERPLEXITY_FLAGS": "--device cpu", "PYTHON": sys.executable,
    }  # fmt: skip
    log = (tmp_path / "log").open("w")

    def start(driver="table3", **more):
        env = environment(**{name: str(value) for name, value in {**settings, **more}.items()})
        command = ["bash", str(REPRODUCE / f"{driver}.sh")]
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    yield start, tmp_path / "my results"
    log.close()


def kill_when(run, path):
    """SIGKILL to the driver and what it runs, as soon as the file is there."""
    deadline = time.monotonic() + 240
    while not path.is_file():
        assert run.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def ages(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_table3_for_real_killed_twice(tiny_driver, tmp_path):
    """Killed in a training and between two steps, the driver ends with all its outputs; started again it runs nothing."""
    start, results = tiny_driver
    runs = {spec: results / "runs" / f"llava-v1.5-7b-lora-{spec}" for spec in ("all", "sparse-2")}
    kill_when(start(), runs["all"] / "checkpoint-2" / "region.json")  # a checkpoint's last file
    assert not (runs["all"] / "cost.json").exists()
    kill_when(start(), runs["all"] / "cost.json")
    finished = ages(runs["all"])
    assert start().wait(timeout=400) == 0, (tmp_path / "log").read_text()[-3000:]

    assert ages(runs["all"]) == finished  # trained once
    assert json.loads((runs["all"] / "cost.json").read_text())["steps"] == 8
    second = (tmp_path / "log").read_text().split("step: env")[2]
    assert "{'loss'" in second and "'epoch': 0.06}" not in second, "the second start trained from the start"
    for spec, layers in (("all", list(range(8))), ("sparse-2", [0, 7])):
        evaluation = json.loads((results / "eval" / runs[spec].name / "results.json").read_text())
        assert evaluation["region"]["layers"] == layers and evaluation["tasks"]["scienceqa"]["n"] > 0
    assert "2 layers" in (results / "table3/table3.md").read_text()

    before = ages(results)
    assert start().wait(timeout=60) == 0
    assert ages(results) == before


@pytest.fixture
def eval_data(tmp_path) -> Path:
    """Questions of benchmarks with and without images, and some of Flickr30k's images, next to what `tiny_driver` has."""
    from tests.helpers.data_roots import save_picture, write_docvqa, write_mmlu, write_tdiuc

    root = tmp_path / "eval data"
    write_docvqa(root)
    write_tdiuc(root)
    write_mmlu(root)
    for number, colour in enumerate(("red", "green", "blue")):
        save_picture(tmp_path / "flickr" / f"{number}.jpg", colour)
    return root


def test_figure1_for_real_killed_once(tiny_driver, eval_data, tmp_path):
    """Killed while it measures, it goes on, and ends with both halves of the figure."""
    start, results = tiny_driver
    (tmp_path / "text.txt").write_text("\n\n".join(f"{word} " * 50 for word in ("one", "two", "three")))
    settings = {
        "SETS": "0-1;6", "VISUAL_DATA": "docvqa", "TEXT_DATA": "mmlu", "TEXT_FILES": tmp_path / "text.txt", "DROPS": "1 2",
        "FLICKR_IMAGES": tmp_path / "flickr",
    }  # fmt: skip
    kill_when(start("figure1", **settings), results / "data/answers/texts.json")
    assert start("figure1", **settings).wait(timeout=400) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (results / "figure1/figure1.png").is_file() and (results / "figure1/figure1.svg").is_file()
    tuned = json.loads((results / "perplexity/llava-v1.5-7b-lora-all.json").read_text())
    assert [(Path(row["data"]).stem, row["visual"], row["reverted"]) for row in tuned["rows"]] == [
        (name, name == "docvqa", layers) for layers in ([], [0, 1], [6]) for name in ("docvqa", "mmlu", "texts")
    ]
    backbone = json.loads((results / "perplexity/llava-v1.5-7b-lora-all-backbone.json").read_text())
    assert backbone["upstream"] is None and len(backbone["rows"]) == 2
    before = ages(results)
    assert start("figure1", **settings).wait(timeout=60) == 0
    assert ages(results) == before


def test_figure5_for_real(tiny_driver, eval_data, tmp_path):
    start, results = tiny_driver
    settings = {"ATTENTION_TASKS": "docvqa tdiuc"}
    kill_when(start("figure5", **settings), results / "data/attention-tdiuc.json")
    assert start("figure5", **settings).wait(timeout=400) == 0, (tmp_path / "log").read_text()[-3000:]
    assert {path.name for path in (results / "figure5").iterdir()} == {"figure5.png", "figure5.svg"}
