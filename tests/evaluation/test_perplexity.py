"""Perplexity against an independent computation, and the sweep against models whose layers were overwritten by hand."""

import json
import math

import pytest

pytest.importorskip("llava.model")

import torch
from PIL import Image

from llava_region.cli import main
from llava_region.errors import LlavaRegionError
from llava_region.evaluation.perplexity import Likelihood, parse_sweep, perplexity, sweep
from llava_region.evaluation.perplexity_plot import rises
from llava_region.models import load
from tests.helpers.command_line import refused
from tests.helpers.finished_models import without_base


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """A file with 10 records with an image, of which one with two turns and one with a long question, and a file with 5 without."""
    records = json.loads(tiny.data.read_text())
    visual = [r for r in records if "image" in r][:10]
    visual[3]["conversations"] += [{"from": "human", "value": "And its colour?"}, {"from": "gpt", "value": "a long shade of blue"}]
    visual[5]["conversations"][0]["value"] += " please" * 20
    folder = tmp_path_factory.mktemp("perplexity")
    (folder / "visual.json").write_text(json.dumps(visual))
    (folder / "text.json").write_text(json.dumps([r for r in records if "image" not in r][:5]))
    return folder


@pytest.fixture(scope="module")
def loaded(llava_checkpoint):
    return load(llava_checkpoint, device="cpu")


def by_hand(loaded, file, images) -> tuple[float, int]:
    """Sum of negative log-likelihoods and tokens, a record at a time through LLaVA's own forward, in float64."""
    nll, tokens = 0.0, 0
    for record in json.loads(file.read_text()):
        ids, labels = loaded.example(record)
        mask = torch.ones_like(ids, dtype=torch.bool)
        pixels = loaded.pixel_values(Image.open(images / record["image"])) if "image" in record else torch.zeros(3, 56, 56)
        with torch.no_grad():
            embeds, labels, *_ = loaded.side.embed(loaded.model, ids[None], labels[None], mask[None], pixels[None])
            logs = loaded.model(inputs_embeds=embeds).logits[0].double().log_softmax(-1)
        for position in range(1, labels.shape[1]):
            if labels[0, position] != -100:
                nll -= logs[position - 1, labels[0, position]].item()
                tokens += 1
    return nll, tokens


@pytest.mark.parametrize("name", ["visual", "text"])
def test_equals_an_independent_computation(loaded, tiny, data, name):
    file = data / f"{name}.json"
    nll, tokens = by_hand(loaded, file, tiny.images)
    ours = perplexity(loaded, file, tiny.images, batch_size=4)
    assert ours.tokens == tokens > 10 and ours.unlabelled == 0
    assert ours.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_does_not_depend_on_the_batch(loaded, tiny, data):
    single = perplexity(loaded, data / "visual.json", tiny.images, batch_size=1)
    batched = perplexity(loaded, data / "visual.json", tiny.images, batch_size=4, workers=1)
    assert batched.nll == pytest.approx(single.nll, rel=1e-6) and batched.tokens == single.tokens


def overwritten(llava_checkpoint, backbone, layers):
    """The checkpoint with the layers' weights set by hand to the backbone's."""
    from transformers import LlamaForCausalLM

    model = load(llava_checkpoint, device="cpu")
    source = LlamaForCausalLM.from_pretrained(backbone)
    for layer in layers:
        model.model.get_model().layers[layer].load_state_dict(source.model.layers[layer].state_dict())
    return model


def test_a_sweeps_rows_equal_models_overwritten_by_hand(llava_checkpoint, tiny, data):
    files = [data / "visual.json", data / "text.json"]
    rows = sweep(llava_checkpoint, files, image_folder=tiny.images, base=tiny.backbone, revert="0-2;2,5;all;5,2", device="cpu")["rows"]
    assert [row["reverted"] for row in rows[::2]] == [[], [0, 1, 2], [2, 5], list(range(8))]
    assert [row["data"] for row in rows] == [str(file) for file in files] * 4
    for row in rows:
        model = overwritten(llava_checkpoint, tiny.backbone, row["reverted"])
        expected = perplexity(model, files[rows.index(row) % 2], tiny.images)
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6) and row["tokens"] == expected.tokens
    assert len({row["perplexity"] for row in rows}) == 8


def test_the_sweep_equals_the_folder_that_revert_writes(llava_checkpoint, tiny, data, tmp_path):
    from llava_region.surgery.revert import revert

    revert(llava_checkpoint, tiny.backbone, "1,6", tmp_path / "reverted")
    file = data / "visual.json"
    row = sweep(llava_checkpoint, [file], image_folder=tiny.images, base=tiny.backbone, revert="1,6", device="cpu")["rows"][1]
    assert row["perplexity"] == perplexity(load(tmp_path / "reverted", device="cpu"), file, tiny.images).perplexity


def test_a_lora_run_reverted_at_its_region_loses_what_it_learnt(lora_run, tiny, data):
    options = {"image_folder": tiny.images, "base": tiny.backbone, "device": "cpu"}
    as_trained, region, rest = sweep(lora_run, [data / "text.json"], revert="1,6;0,2-5,7", **options)["rows"]
    backbone = perplexity(load(tiny.backbone, device="cpu"), data / "text.json", None)
    assert region["perplexity"] == pytest.approx(backbone.perplexity, rel=1e-6) != as_trained["perplexity"]
    assert rest["perplexity"] == as_trained["perplexity"]


def test_a_lora_run_names_its_base(lora_run, tiny, data, tmp_path):
    options = {"image_folder": tiny.images, "device": "cpu", "revert": "1;all"}
    given = sweep(lora_run, [data / "text.json"], base=tiny.backbone, **options)["rows"]
    assert sweep(lora_run, [data / "text.json"], **options)["rows"] == given
    adapter_alone = without_base(lora_run, tmp_path / "llava-tiny-lora", tiny.backbone)
    (adapter_alone / "region.json").unlink()  # a run of the upstream by itself
    assert sweep(adapter_alone, [data / "text.json"], **options)["rows"] == given
    # what is given counts, not what is named
    elsewhere = without_base(lora_run, tmp_path / "moved-lora")
    assert sweep(elsewhere, [data / "text.json"], base=tiny.backbone, **options)["rows"] == given


def test_a_lora_run_on_a_whole_model_takes_two_bases(lora_run, llava_checkpoint, tiny, data):
    options = {"image_folder": tiny.images, "lora_base": llava_checkpoint, "device": "cpu"}
    plain = sweep(lora_run, [data / "text.json"], **options)["rows"]
    rows = sweep(lora_run, [data / "text.json"], base=tiny.backbone, revert="all", **options)["rows"]
    assert rows[0] == plain[0]
    backbone = sweep(lora_run, [data / "text.json"], image_folder=tiny.images, base=tiny.backbone, revert="all", device="cpu")["rows"]
    assert rows[1]["perplexity"] == pytest.approx(backbone[1]["perplexity"], rel=1e-6) and rows[0] != backbone[0]


def test_records_cut_away_are_counted(loaded, tiny, data):
    loaded.model.config.tokenizer_model_max_length = 150
    try:
        cut = perplexity(loaded, data / "visual.json", tiny.images)
    finally:
        loaded.model.config.tokenizer_model_max_length = 512
    whole = perplexity(loaded, data / "visual.json", tiny.images)
    assert cut.unlabelled == 1 and 0 < cut.tokens < whole.tokens


def test_wrong_input_is_one_line(llava_checkpoint, lora_run, tiny, data, tmp_path, capsys):
    model, base = str(llava_checkpoint), str(tiny.backbone)
    visual, text = ["--data", str(data / "visual.json")], ["--data", str(data / "text.json")]
    assert "give it with --base" in refused(capsys, "perplexity", model, *text, "--revert-sweep", "0")
    assert "leave it out" in refused(capsys, "perplexity", model, *text, "--base", base)
    assert "leave out --lora-base" in refused(capsys, "perplexity", model, *text, "--lora-base", base)
    assert "takes one base" in refused(capsys, "perplexity", str(lora_run), *text, "--lora-base", base, "--base", base)
    gone = without_base(lora_run, tmp_path / "llava-tiny-lora")
    assert "trained on with --base: /gone/base is not here" in refused(capsys, "perplexity", gone, *text)
    assert "give it with --base" in refused(capsys, "perplexity", gone, *text, "--revert-sweep", "0")
    visual_base = without_base(lora_run, tmp_path / "on-llava-lora", llava_checkpoint)  # what it was trained on is no backbone
    assert "give it with --base" in refused(capsys, "perplexity", visual_base, *text, "--revert-sweep", "0")
    assert "layer 8 in '8'" in refused(capsys, "perplexity", model, *text, "--revert-sweep", "0;8", "--base", base)
    assert "names no set" in refused(capsys, "perplexity", model, *text, "--revert-sweep", ";", "--base", base)
    assert "--image-folder" in refused(capsys, "perplexity", model, *visual)
    assert "10 images are missing" in refused(capsys, "perplexity", model, *visual, "--image-folder", str(tmp_path))
    assert "give text only" in refused(capsys, "perplexity", base, *visual, "--image-folder", str(tiny.images))
    assert "allowed: .png" in refused(capsys, "perplexity", model, *text, "--plot", "figure.jpeg2")
    (tmp_path / "out.json").write_text("kept")
    assert "--force" in refused(capsys, "perplexity", model, *text, "--out", str(tmp_path / "out.json"))
    (tmp_path / "odd.json").write_text(json.dumps([{"conversations": [{"from": "user", "value": "?"}]}]))
    assert "record 0" in refused(capsys, "perplexity", model, "--data", str(tmp_path / "odd.json"))


def test_a_corrupt_picture_is_named(loaded, data, tmp_path):
    record = json.loads((data / "visual.json").read_text())[0]
    (tmp_path / record["image"]).write_bytes(b"\x89PNG no more")
    (tmp_path / "one.json").write_text(json.dumps([record]))
    with pytest.raises(LlavaRegionError, match=f"cannot read .*{record['image']}"):
        perplexity(loaded, tmp_path / "one.json", tmp_path)


def test_the_command_prints_writes_and_draws(llava_checkpoint, tiny, data, tmp_path, capsys):
    out, plot = tmp_path / "rows.json", tmp_path / "figures" / "figure1.png"
    argv = ["perplexity", str(llava_checkpoint), "--data", str(data / "visual.json"), "--data", str(data / "text.json"), "--device", "cpu"]
    argv += ["--image-folder", str(tiny.images), "--revert-sweep", "0-3;lower:25%;all", "--base", str(tiny.backbone), "--out", str(out)]
    assert main([*argv, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8 and len(table.splitlines()) == 9 and "0-3" in table and f"{rows[2]['perplexity']:.4f}" in table
    assert Image.open(plot).size[0] > 400 and [p.name for p in plot.parent.iterdir()] == ["figure1.png"]
    assert main([*argv, "--json", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_helpers():
    assert [r.layers for r in parse_sweep("0; 1,2 ;2,1", 4)] == [(0,), (1, 2)]
    rows = [{"data": "a", "reverted": [], "perplexity": 2.0}, {"data": "a", "reverted": [1], "perplexity": 3.0}]
    assert rises([*rows, {"data": "a", "reverted": [2], "perplexity": None}]) == [0, 50, None]
    assert Likelihood(2000.0, 1).perplexity == math.inf
