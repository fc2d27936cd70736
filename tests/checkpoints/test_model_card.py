"""The card of a run, a checkpoint, a merged, pruned and reverted model: what the hub reads, nothing of this machine, code that works."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")

from huggingface_hub import ModelCard

from llava_region import LlavaRegionError, merge, prune, revert
from llava_region.checkpoints.model_card import MARK, hub_name, write_card
from tests.helpers.training_runs import LORA, llava_flags, train


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A real run with a checkpoint."""
    out = tmp_path_factory.mktemp("card") / "llava-lora-card"
    flags = llava_flags(tiny, out, **LORA, max_steps=2, save_strategy="steps", save_steps=1, dry_run_step=False)
    done = train([*flags, "--tune_layers", "1,6"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


@pytest.fixture(scope="module")
def models(run, tiny, tmp_path_factory) -> dict[str, Path]:
    """The run, its checkpoint, and what is made of it."""
    folder = tmp_path_factory.mktemp("made")
    merge(run, folder / "llava-merged")
    prune(folder / "llava-merged", folder / "llava-pruned", layers="3")
    revert(folder / "llava-merged", tiny.backbone, "6", folder / "llava-reverted")
    return {"run": run, "checkpoint": run / "checkpoint-1", **{path.name: path for path in folder.iterdir()}}


NAMES = ("run", "checkpoint", "llava-merged", "llava-pruned", "llava-reverted")


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_reads_it_and_it_names_no_folder_of_this_machine(models, tiny, name):
    text = (models[name] / "README.md").read_text()
    data = ModelCard(text).data
    assert MARK in text and "[More Information Needed]" not in text
    assert data.pipeline_tag == "image-text-to-text" and {"llava_region", "visual-region", "llava"} <= set(data.tags)
    assert (data.library_name, "lora" in data.tags) == (("peft", True) if name in ("run", "checkpoint") else (None, False))
    assert data.base_model is None, "a folder's name is none of the hub"
    assert str(tiny.backbone.parent) not in text and str(models[name].parent) not in text and "/tmp" not in text
    assert "vicuna-tiny" in text and "aclanthology.org/2025.acl-long.1484" in text


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "run",
            [
                "2 of 8 decoder layers, `1,6` (`1,6`)",
                "    .#....#.",
                "| tuned by | LoRA |",
                "| vision tower | clip-tiny |",
                "| steps | 2 |",
                "--lora_r 8",
                "--tune_layers 1,6",
            ],
        ),
        ("checkpoint", ["    .#....#.", "| steps | 1 |", "| samples per step | 4 (4 x 1 accumulated x 1 devices) |"]),
        ("llava-merged", ["    .#....#.", "| steps | 2 |", "--learning_rate 0.0002"]),
        (
            "llava-pruned",
            ["    .#...#.", "Of what were 8 decoder layers, 3 have been removed, and the others renumbered.", "--lora_alpha 16"],
        ),
        ("llava-reverted", ["    .#....#.", "Decoder layers 6 have been put back to the weights before visual tuning."]),
    ],
)
def test_what_it_says(models, name, lines):
    text = (models[name] / "README.md").read_text()
    for line in lines:
        assert line in text, (line, text)


@pytest.mark.parametrize("name", NAMES[:1] + NAMES[2:])
def test_its_code_loads_the_model(models, tiny, name):
    """As it stands, with the two places filled in: this package, LLaVA, and for an adapter PEFT."""
    blocks = re.findall(r"```python\n(.*?)```", (models[name] / "README.md").read_text(), re.S)
    assert len(blocks) == (3 if name == "run" else 2)
    for code in blocks:
        code = code.replace("FOLDER", str(models[name])).replace("PATH/TO/vicuna-tiny", str(tiny.backbone))
        code = code.replace(")\n", ", device='cpu')\n") if "load_pretrained_model(" in code else code  # there is no GPU here
        found: dict = {}
        exec(code, found)
        model = found["loaded"].model if "loaded" in found else found["model"]
        layers = [name for name, _ in model.named_parameters() if name.endswith("input_layernorm.weight")]
        assert len(layers) == (7 if name == "llava-pruned" else 8)


def test_a_base_from_the_hub_and_its_licence(run, tiny, tmp_path):
    base = tmp_path / "models--lmsys--vicuna-tiny" / "snapshots" / "0a1b"
    shutil.copytree(tiny.backbone, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny\n---\n# Vicuna\n")
    out = merge(run, tmp_path / "out", base)["out"]
    text = (Path(out) / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("lmsys/vicuna-tiny", "finetune")
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny", "https://example.org/tiny")
    assert "# vicuna-tiny, visual region of 2 layers" in text and "That of lmsys/vicuna-tiny (tiny)" in text
    shutil.copytree(run, tmp_path / "run")
    write_card(tmp_path / "run", base=base)
    text = (tmp_path / "run" / "README.md").read_text()
    assert ModelCard(text).data.base_model_relation == "adapter" and "load('FOLDER', 'lmsys/vicuna-tiny')" in text
    (base / "README.md").write_text("---\n: [\n---\n")
    write_card(tmp_path / "run", base=base)
    assert ModelCard.load(tmp_path / "run" / "README.md").data.license is None


@pytest.mark.parametrize(
    ("model", "name"),
    [("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"), ("/models/vicuna", None), ("./vicuna", None), ("a/b/c", None), ("vicuna", None)],
)
def test_hub_names(model, name):
    assert hub_name(model) == name


def test_only_cards_of_ours_and_of_peft_are_replaced(lora_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(lora_run, folder)
    card = folder / "README.md"
    assert "[More Information Needed]" in card.read_text() and str(lora_run.parent.parent) in card.read_text()
    write_card(folder)
    written = card.read_text()
    assert MARK in written
    card.write_text(written + "changed")
    write_card(folder)
    assert card.read_text() == written
    card.write_text("# mine\n")
    write_card(folder)
    assert card.read_text() == "# mine\n"


def test_paths_and_odd_values_of_flags(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    record = json.loads((folder / "run.json").read_text())
    record["flags"] |= {"plugin": "/home/me/secret place/x.py", "note": "a b", "empty": None, "sizes": [1, 2]}
    (folder / "run.json").write_text(json.dumps(record))
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "--plugin x.py\n" in text and "--note 'a b'\n" in text and "--empty" not in text and "--sizes '[1, 2]'\n" in text


def test_a_spec_that_names_a_file_and_a_tower_of_the_hub(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name, changes in (
        ("region.json", {"spec": "/home/me/scores.json:image_attention:2"}),
        ("config.json", {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert (
        "(`scores.json:image_attention:2`)" in text and "--tune_layers scores.json:image_attention:2\n" in text and "/home/me" not in text
    )
    assert "| vision tower | openai/clip-vit-large-patch14-336 |" in text


def test_a_damaged_record_is_an_error(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(LlavaRegionError, match="not valid JSON"):
        write_card(folder)


def test_a_region_of_which_pruning_left_nothing(models, tmp_path):
    prune(models["llava-merged"], tmp_path / "out", layers="1,6")
    assert "None of the 6 decoder layers that are left was tuned." in (tmp_path / "out" / "README.md").read_text()
