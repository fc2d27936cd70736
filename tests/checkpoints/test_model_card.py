"""The card of a run, a checkpoint, a merged, pruned and reverted model: what the hub reads, nothing of this machine, code that works."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")

from huggingface_hub import ModelCard

from llava_region import LlavaRegionError, merge, prune, revert
from llava_region.checkpoints.model_card import MARK, hub_name, write_card
from tests.helpers.model_cards import code_of, run_code
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
    assert (data.library_name, "lora" in data.tags) == (("peft", True) if name in ("run", "checkpoint") else ("llava_region", False))
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
    loaded = run_code(models[name], {"PATH/TO/vicuna-tiny": tiny.backbone})
    assert [len(layers) for layers in loaded] == [7 if name == "llava-pruned" else 8] * (3 if name == "run" else 2)


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
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (data.license, data.license_name, data.license_link) == (
        "other", "that-of-the-base-model", "https://huggingface.co/lmsys/vicuna-tiny",
    )  # fmt: skip


def test_a_licence_that_is_a_file_next_to_the_bases_card(run, tiny, tmp_path):
    """Llama 3's is: the link would lead nowhere from another repository."""
    for parent, link in (("models--meta--llama/snapshots/0a1b", "https://huggingface.co/meta/llama/blob/main/LICENSE"), ("llama", None)):
        base = tmp_path / parent
        base.mkdir(parents=True)
        (base / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n# Llama\n")
        shutil.copytree(run, tmp_path / f"{base.name}-run")
        write_card(tmp_path / f"{base.name}-run", base=base)
        data = ModelCard.load(tmp_path / f"{base.name}-run" / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "llama3", link)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"), ("/models/vicuna", None), ("./vicuna", None), ("a/b/c", None), ("vicuna", None),
        ("./models/vicuna", None), ("/elsewhere/hub/models--lmsys--vicuna-7b-v1.5/snapshots/0a1b", "lmsys/vicuna-7b-v1.5"),
    ],
)  # fmt: skip
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


def changed(source: Path, folder: Path, /, **files: dict) -> str:
    """The card of a copy of a run in which the given files (`region`, `run`, ...) say something else."""
    shutil.copytree(source, folder)
    for name, changes in files.items():
        (folder / f"{name}.json").write_text(json.dumps(json.loads((folder / f"{name}.json").read_text()) | changes))
    write_card(folder)
    return (folder / "README.md").read_text()


def test_no_secret_and_no_path_within_a_text(run, tmp_path):
    flags = {
        "optim_args": "file=/home/me/x.json,rank=8", "kwargs": {"a": "~/me/b", "c": "../me/d"}, "hub": "org/name", "note": "./me/e.py",
        "hf_token": "abc", "api_key": "0123", "mm_use_im_patch_token": False, "other": "hf_abcdefghijklmnop", "url": "https://me:pw@host/x",
        "page": "https://host/x",
    }  # fmt: skip
    text = changed(run, tmp_path / "run", run={"flags": flags})
    for line in (
        "--optim_args file=x.json,rank=8", """--kwargs '{"a": "b", "c": "d"}'""", "--hub org/name", "--note e.py",
        "--mm_use_im_patch_token false", "--page https://host/x",
    ):  # fmt: skip
        assert f"\n{line}\n" in text, text
    assert not any(word in text for word in ("/me/", "abc", "0123", "hf_", "pw@"))


def test_names_that_markdown_would_read(run, tmp_path):
    base = "/models/my*model*[1]<b>|x_"
    text = changed(
        run, tmp_path / "run", region={"base_model": base, "spec": "a`b.json:m:2"}, config={"mm_vision_tower": "/t/a|b"},
        run={"flags": {"note": "```\n# heading"}},
    )  # fmt: skip
    assert "# my\\*model\\*\\[1\\]\\<b\\>\\|x\\_, visual region of 2 layers\n" in text
    assert "| vision tower | a\\|b |\n" in text and "(`` a`b.json:m:2 ``)" in text
    assert text.count("\n````\n") == 2 and "load('FOLDER', 'PATH/TO/my*model*[1]<b>|x_')" in text
    assert ModelCard(text).data.tags


def test_a_base_with_code_of_its_own(run, tiny, tmp_path):
    """As MiniCPM, which Bunny trains: transformers asks before it runs it."""
    base = tmp_path / "minicpm"
    shutil.copytree(tiny.backbone, base)
    code_free = changed(run, tmp_path / "run", region={"base_model": str(base)})
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"auto_map": {}}))
    text = changed(run, tmp_path / "other", region={"base_model": str(base)})
    assert "from_pretrained('PATH/TO/minicpm', trust_remote_code=True)" in text and "trust_remote_code" not in code_free


def test_a_run_without_cost_or_flags_and_with_many_layers(run, tiny, tmp_path):
    """A run of an earlier version, and a spec that names each of many layers."""
    shutil.copytree(run, tmp_path / "old")
    for name in ("cost.json", "run.json", "README.md"):
        (tmp_path / "old" / name).unlink()
    layers = list(range(0, 160, 2))
    text = changed(tmp_path / "old", tmp_path / "run", region={"layers": layers, "num_layers": 160, "spec": ",".join(map(str, layers))})
    assert "cost" not in text and "Flags" not in text and "80 of 160 decoder layers" in text
    assert max(map(len, text.split("---")[1].splitlines())) < 80, "nothing of it in what the hub indexes"


def test_a_relative_base_is_no_hub_name_later(tiny, tmp_path, monkeypatch):
    from llava_region.train import _named

    (tmp_path / "models" / "vicuna").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert _named("models/vicuna") == "./models/vicuna" and hub_name(_named("models/vicuna")) is None
    assert [_named(name) for name in ("lmsys/vicuna", "./models/vicuna", str(tmp_path), None)] == [
        "lmsys/vicuna", "./models/vicuna", str(tmp_path), None,
    ]  # fmt: skip


def test_full_runs_and_adapters_on_a_llava_model(tiny, tmp_path):
    """The code of each card loads: a full run, what is pruned of it, and a LoRA run that started from a LLaVA model."""
    out = tmp_path / "llava-full"
    done = train([*llava_flags(tiny, out, max_steps=1, dry_run_step=False), "--tune_layers", "1,6"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    prune(out, tmp_path / "llava-less", layers="3")
    lora = tmp_path / "llava-lora-second"
    done = train([*llava_flags(tiny, lora, **LORA, model_name_or_path=out, max_steps=1, dry_run_step=False), "--tune_layers", "2"])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for folder, mode in ((out, "full tuning"), (tmp_path / "llava-less", "full tuning"), (lora, "LoRA")):
        assert f"| tuned by | {mode} |" in (folder / "README.md").read_text()
        places = {"PATH/TO/vicuna-tiny": tiny.backbone, "PATH/TO/llava-full": out}
        loaded = run_code(folder, places)
        assert len(loaded) == (3 if folder == lora else 2)
        assert all(len(layers) == (7 if folder.name == "llava-less" else 8) for layers in loaded)
    peft = code_of(lora, places)[-1]
    assert "PeftModel" in peft
    done = subprocess.run([sys.executable, "-c", peft], capture_output=True, text=True)  # where nothing has imported LLaVA yet
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_damaged_record_is_an_error(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(LlavaRegionError, match="not valid JSON"):
        write_card(folder)


def test_a_region_of_which_pruning_left_nothing(models, tmp_path):
    prune(models["llava-merged"], tmp_path / "out", layers="1,6")
    assert "None of the 6 decoder layers that are left was tuned." in (tmp_path / "out" / "README.md").read_text()
