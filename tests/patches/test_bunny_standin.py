"""`patches/bunny.py` on a stand-in with Bunny's seams (`standin_bunny/`), everywhere: Bunny itself is on no package index.

What the real Bunny does under the same hooks is in test_bunny_real.py. All runs here are in child processes, so that the
stand-in never hides a real Bunny.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("easy_vqa")
pytest.importorskip("deepspeed")  # saving a LoRA run imports it

from llava_region.data.tiny import easy_vqa_folder, easy_vqa_records, text_records
from tests.helpers.bunny_models import GPT, BunnyFiles, bunny_flags, write_siglip, write_tokenizer
from tests.helpers.training_runs import (
    LORA,
    adapter,
    environment,
    layers_of,
    needs_fp16,
    needs_zero_on_cpu,
    projector,
    same,
    torchrun,
    write_zero3,
)

pytestmark = needs_fp16  # the stand-in's tower is in fp32, but Bunny's is not, and a training is refused as it would be there
HERE = Path(__file__).parent
LINEAR = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
# at a constant rate, since the only warm-up step of two has none
SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def child_environment():
    path = os.pathsep.join([str(HERE / "standin_bunny"), environment()["PYTHONPATH"]])
    kept = {name: value for name, value in environment(PYTHONPATH=path).items() if name != "BUNNY_ROOT"}
    return kept


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random Phi of 8 decoder layers, a SigLIP tower, and easy-vqa data. Never write into it."""
    from transformers import PhiConfig, PhiForCausalLM

    folder = tmp_path_factory.mktemp("standin")
    made = BunnyFiles(folder / "phi-tiny", folder / "siglip-tiny", folder / "data.json", easy_vqa_folder() / "images", "phi-2", "bunny")
    tokenizer = write_tokenizer(made.backbone, "phi-2", GPT)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=512, partial_rotary_factor=0.5,
    )  # fmt: skip
    PhiForCausalLM(config).save_pretrained(made.backbone)
    write_siglip(made.vision_tower)
    made.data.write_text(json.dumps(easy_vqa_records(24) + text_records(4)))
    return made


def commands(files, folder) -> dict[str, list[str]]:
    """The runs of the fixture `runs`, in order."""

    def flags(name, tune_layers="1,6", **changes):
        own = [] if tune_layers is None else ["--tune_layers", tune_layers]
        return ["bunny", *bunny_flags(changes.pop("files", files), folder / name, **changes), *own]

    full = files._replace(backbone=folder / "full")
    return {
        "lora": flags("lora", **LORA, **SAVING),
        "untouched": flags("untouched", tune_layers=None, **{**LORA, "mm_projector_lr": None}),
        "unfrozen": flags("unfrozen", unfreeze_vision_tower=True, bf16=True, **LORA, **SAVING),
        "full": flags("full", unfreeze_vision_tower=True, bf16=True, learning_rate=1e-2),
        "left-out": flags("left-out", files=full, **LORA),
        "dry": flags("dry", dry_run=True, dry_run_gpus=8, **LORA),
        "llama": flags("llama", model_type="llama3-8b", **LORA),
        "template": flags("template", version="v1", **LORA),
        "beyond": flags("beyond", tune_layers="8", **LORA),
        "rates": flags("rates", max_steps=1, **SAVING, **LORA),
    }


def run_jobs(folder: Path, jobs: dict[str, list[str]]) -> dict[str, int]:
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"name": name, "arguments": arguments} for name, arguments in jobs.items()]))
    command = [sys.executable, str(HERE / "standin_runs.py"), str(path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "codes.json").read_text())


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """(folder of the runs' outputs, exit code of each)."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_jobs(folder, commands(files, folder))


def modules_of(tensors) -> set[str]:
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}


def region_modules(layers) -> set[str]:
    parents = {"fc1": "mlp", "fc2": "mlp"}
    return {f"model.layers.{layer}.{parents.get(name, 'self_attn')}.{name}" for layer in layers for name in LINEAR}


def test_lora_holds_exactly_the_region(runs):
    folder, codes = runs
    assert codes["lora"] == 0, (folder / "lora.err").read_text()[-3000:]
    out = folder / "lora"
    assert modules_of(adapter(out)) == region_modules((1, 6))
    said = (folder / "lora.out").read_text()
    assert "first step: layers 1,6 have gradients, no other; learning rates: llm 0.0002, projector 2e-05" in said
    region = json.loads((out / "region.json").read_text())
    assert (region["layers"], region["upstream"], region["mode"]) == ([1, 6], "bunny", "lora")
    assert json.loads((out / "config.json").read_text())["visual_region"]["layers"] == [1, 6]
    for number in (1, 2):
        checkpoint = out / f"checkpoint-{number}"
        assert layers_of(adapter(checkpoint)) == {1, 6} and len(projector(checkpoint)) == 4 and (checkpoint / "region.json").is_file()


def test_without_the_flag_the_upstream_is_untouched(runs):
    folder, codes = runs
    assert codes["untouched"] == 0 and not (folder / "untouched" / "region.json").exists()
    assert layers_of(adapter(folder / "untouched")) == set(range(8)), "leaf names match every layer"


def test_resume_ends_the_same(runs, files, tmp_path):
    """From checkpoint-1, with adapter and projector restored; the vision tower too where it trains."""
    changes = {"lora": LORA, "unfrozen": {**LORA, "unfreeze_vision_tower": True, "bf16": True}}
    for name in changes:
        shutil.copytree(runs[0] / name / "checkpoint-1", tmp_path / name / "checkpoint-1")
    flags = {name: bunny_flags(files, tmp_path / name, **SAVING, **extra) for name, extra in changes.items()}
    assert run_jobs(tmp_path, {name: ["bunny", *flags[name], "--tune_layers", "1,6"] for name in flags}) == {"lora": 0, "unfrozen": 0}
    for name in changes:
        assert same(adapter(tmp_path / name), adapter(runs[0] / name)) and same(projector(tmp_path / name), projector(runs[0] / name))


def test_learning_rates(runs):
    """Adam's first step moves B, which starts at zero, by its rate."""
    largest = max(tensor.abs().max() for name, tensor in adapter(runs[0] / "rates").items() if "lora_B" in name)
    assert largest == pytest.approx(2e-4, rel=1e-2)
    assert "llm 0.0002, projector 2e-05" in (runs[0] / "rates.out").read_text()


def test_unfrozen_tower(runs, files):
    folder, codes = runs
    assert codes["unfrozen"] == 0, (folder / "unfrozen.err").read_text()[-3000:]
    assert modules_of(adapter(folder / "unfrozen")) == region_modules((1, 6))
    tower = load_file(files.vision_tower / "model.safetensors")
    for place in (folder / "unfrozen", folder / "unfrozen" / "checkpoint-1"):
        assert sum("vision_tower" in name for name in projector(place)) == len(tower)
    assert not any("vision_tower" in name for name in projector(folder / "lora"))


def test_full_tuning_changes_the_region_projector_and_tower_alone(runs, files):
    base, saved = load_file(files.backbone / "model.safetensors"), load_file(runs[0] / "full" / "model.safetensors")
    assert layers_of(name for name in base if not torch.equal(base[name], saved[name])) == {1, 6}
    assert any("vision_tower" in name for name in saved) and any("mm_projector" in name for name in saved)


def test_continued_from_a_checkpoint(runs, files, tmp_path):
    """The tower is attached before PEFT: leaf names would put LoRA on it."""
    folder, codes = runs
    assert codes["left-out"] == 2 and '"continuous_training": true' in (folder / "left-out.err").read_text()
    assert not (folder / "left-out").exists()
    start = tmp_path / "start"
    shutil.copytree(folder / "full", start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "continuous_training": True}))
    flags = bunny_flags(files._replace(backbone=start), tmp_path / "again", **LORA)
    assert run_jobs(tmp_path, {"again": ["bunny", *flags, "--tune_layers", "0,3"]}) == {"again": 0}
    assert modules_of(adapter(tmp_path / "again")) == region_modules((0, 3))


def test_dry_run_writes_nothing(runs):
    folder, codes = runs
    said = (folder / "dry.out").read_text()
    assert codes["dry"] == 0 and ".#....#." in said and "8 GPUs" in said and not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama", "--model_type llama3-8b does not fit"),
        ("template", "--version v1 is not a conversation template"),
        ("beyond", "layer 8 in '8' is beyond the model"),
    ],
)
def test_refused_in_one_line(runs, name, message):
    folder, codes = runs
    errors = (folder / f"{name}.err").read_text().strip().splitlines()
    assert codes[name] == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (folder / name).exists()


def in_child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_bunny_says_where_to_get_it(files, tmp_path):
    flags = [*bunny_flags(files, tmp_path / "out", **LORA), "--tune_layers", "1,6"]
    kept = {name: value for name, value in environment().items() if name != "BUNNY_ROOT"}
    kept["PYTHONPATH"] = str(HERE.parents[1])
    command = [sys.executable, "-m", "llava_region.train", "bunny", *flags]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "put a checkout of BAAI-DCAI/Bunny at 08273ac on PYTHONPATH" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@needs_zero_on_cpu
def test_zero3_on_two_ranks(files, tmp_path):
    """By the path of the train script, as an existing launch line has it."""
    script = HERE / "standin_bunny" / "bunny" / "train" / "train.py"
    options = {"use_cpu": None, "bf16": True, "deepspeed": write_zero3(tmp_path), **LORA}
    flags = [*bunny_flags(files, tmp_path / "out", **options), "--tune_layers", "1,6"]
    kept = {**child_environment(), "PYTHONPATH": environment()["PYTHONPATH"]}
    command = [*torchrun(2, 29661), "llava_region.train", str(script), *flags]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    tensors = adapter(tmp_path / "out")
    assert modules_of(tensors) == region_modules((1, 6)) and all(tensor.numel() for tensor in tensors.values())
    assert (
        "learning rates: llm 0.0002, projector 2e-05" in done.stdout
        and json.loads((tmp_path / "out" / "cost.json").read_text())["gpus"] == 2
    )
