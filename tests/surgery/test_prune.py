"""A pruned model is the model with layers skipped, renumbered so that its cache works, and knows its old numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.checkpoints.whole_model import ModelFolder
from llava_region.cli import main
from llava_region.decoder import layer_index, with_layer_index
from llava_region.errors import LlavaRegionError
from llava_region.surgery.merge import merge
from llava_region.surgery.prune import layers_to_drop, prune, without_layers
from llava_region.surgery.self_check import self_test
from tests.helpers import command_line as helpers
from tests.surgery.test_merge import KILL

pytest.importorskip("llava.model")
PROMPT = torch.tensor([[1, 45, 67, 89, 23, 100]])
# lowest outside layers 1 and 6: 4, then 2 and 7 equal, then 5
ANGULAR = [0.9, 0.01, 0.2, 0.8, 0.1, 0.3, 0.02, 0.2]


@pytest.fixture(scope="module")
def merged(tiny, lora_run, tmp_path_factory) -> Path:
    """A full model with region 1, 6. Never write into it."""
    out = tmp_path_factory.mktemp("prune") / "llava-merged"
    merge(lora_run, out, tiny.backbone)
    return out


@pytest.fixture
def scores(tmp_path) -> Path:
    return write_scores(tmp_path / "scores.json", ANGULAR)


def write_scores(file: Path, values: list[float]) -> Path:
    metrics = {"angular_distance": {"scores": values}, "block_influence": {"scores": values[::-1]}}
    file.write_text(json.dumps({"num_layers": len(values), "metrics": metrics}))
    return file


def ours_loaded(folder: Path):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def skip_layers(model, layers):
    """The model with decoder layers that hand their input on: no tensor is renamed, no number changed."""
    for i in layers:
        model.get_model().layers[i].forward = lambda hidden_states, past_key_value=None, **kwargs: (hidden_states, past_key_value)
    return model


def logits(model) -> torch.Tensor:
    return helpers.logits(model, input_ids=PROMPT, use_cache=False)


@torch.inference_mode()
def answer_without_cache(model, ids, image, count: int) -> list[int]:
    """Greedy tokens, the whole sequence anew for each: upstream's `generate(use_cache=False)` forgets its own tokens."""
    embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, image)[4]
    tokens = []
    for _ in range(count):
        tokens.append(int(model(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens


@pytest.mark.parametrize("layer", range(8))
def test_pruning_a_layer_is_skipping_it(merged, tmp_path, layer):
    prune(merged, tmp_path / "out", layers=[layer], check=False)
    ours, whole = logits(ours_loaded(tmp_path / "out")), ours_loaded(merged)
    full = logits(whole)
    assert torch.allclose(ours, logits(skip_layers(whole, [layer])), atol=1e-5, rtol=0)
    assert (ours - full).abs().max() > 1e-3


@pytest.mark.parametrize(("drop", "expected"), [(1, [4]), (2, [2, 4]), (3, [2, 4, 7]), (4, [2, 4, 5, 7])])
def test_lowest_outside_the_region_load_upstream_and_generate(merged, scores, tmp_path, drop, expected):
    from llava.model.builder import load_pretrained_model

    from llava_region.patches.llava_model import drop_cache_position  # imports LLaVA

    out = tmp_path / "llava-pruned"
    report = prune(merged, out, drop=drop, scores=scores)
    assert report["dropped"] == expected and report["num_layers"] == 8 - drop
    _, model, _, _ = load_pretrained_model(str(out), None, "llava-pruned", device="cpu")
    model = model.float()
    if Version(transformers.__version__) >= Version("4.38"):
        drop_cache_position(model)  # upstream's own cannot generate there
    assert model.config.num_hidden_layers == 8 - drop
    assert [layer.self_attn.layer_idx for layer in model.get_model().layers] == list(range(8 - drop))
    ids = torch.cat([PROMPT[:, :3], torch.tensor([[-200]]), PROMPT[:, 3:]], dim=1)
    image = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)
    cached = model.generate(ids, images=image, max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert cached[0].tolist()[-6:] == answer_without_cache(model, ids, image, 6)
    assert torch.allclose(logits(model), logits(skip_layers(ours_loaded(merged).half().float(), expected)), atol=1e-4)


def test_old_and_new_numbers(merged, scores, tmp_path):
    report = prune(merged, tmp_path / "out", drop=3, scores=scores)
    region, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("region.json", "config.json"))
    assert report["new_to_old"] == [0, 1, 3, 5, 6] and report["layers"] == [1, 4]
    assert (region["layers"], region["num_layers"], region["spec"]) == ([1, 4], 5, "1,4")
    assert config["visual_region"] == {"layers": [1, 4], "num_layers": 5, "spec": "1,4"} and config["num_hidden_layers"] == 5
    assert region["pruned"] == {
        "dropped": [2, 4, 7], "original_num_layers": 8, "new_to_old": [0, 1, 3, 5, 6], "original_layers": [1, 6], "original_spec": "1,6"
    }  # fmt: skip
    before, after = Checkpoint(merged), Checkpoint(tmp_path / "out")
    for name in after:
        old = name if layer_index(name) is None else with_layer_index(name, region["pruned"]["new_to_old"][layer_index(name)])
        assert torch.equal(after.tensor(name), before.tensor(old)), name
    assert len(before) - len(after) == 3 * 9


def test_pruning_again_counts_in_the_first_models_numbers(merged, tmp_path):
    prune(merged, tmp_path / "one", layers="2,4", check=False)
    prune(tmp_path / "one", tmp_path / "two", layers="0,3", check=False)  # 0 and 5 of the first
    region = json.loads((tmp_path / "two/region.json").read_text())
    assert region["pruned"]["dropped"] == [0, 2, 4, 5] and region["pruned"]["new_to_old"] == [1, 3, 6, 7]
    assert region["layers"] == [0, 2] and region["pruned"]["original_layers"] == [1, 6]


def test_region_layers_go_only_where_named_or_unprotected(merged, scores, tmp_path):
    report = prune(merged, tmp_path / "named", layers="6", check=False)
    assert report["dropped"] == [6] and report["layers"] == [1]
    report = prune(merged, tmp_path / "none", drop=2, scores=scores, protect="none", check=False)
    assert report["dropped"] == [1, 6] and report["layers"] == []
    assert prune(merged, tmp_path / "spec", drop=2, scores=scores, protect="top:4", check=False)["dropped"] == [1, 2]
    assert prune(merged, tmp_path / "indices", drop=1, scores=scores, protect=[1, 4, 6], check=False)["dropped"] == [2]


def test_a_lora_run_is_merged_on_the_way(tiny, lora_run, merged, scores, tmp_path):
    report = prune(lora_run, tmp_path / "direct", drop=2, scores=scores, base=tiny.backbone)
    prune(merged, tmp_path / "by-hand", drop=2, scores=scores)
    assert report["dropped"] == [2, 4] and sorted(p.name for p in tmp_path.iterdir()) == ["by-hand", "direct", "scores.json"]
    for name in ("model.safetensors", "config.json", "region.json"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "by-hand" / name).read_bytes()


def folder_of(config: dict, region: dict | None = None) -> ModelFolder:
    return ModelFolder(Path("m"), config, {f"transformer.blocks.{i}.ffn.up_proj.weight": i for i in range(4)}, region)


def test_config_lists_and_names_of_other_backbones():
    config = {
        "n_layers": 4, "layer_types": list("abcd"), "architectures": [1, 2, 3, 4], "eos_token_id": [1, 2, 3, 4],
        "other": [1, 2, 3], "max_window_layers": 3, "reverted_layers": [0, 1, 3], "hidden_act": "gelu",
    }  # fmt: skip
    region = {"layers": [0, 3], "num_layers": 4, "spec": "hybrid:2", "reverted": {"layers": [0, 1, 3], "base": "b"}}
    pruned = without_layers(folder_of(config, region), [1])
    assert pruned.config == {
        **config, "n_layers": 3, "layer_types": list("acd"), "max_window_layers": 2, "reverted_layers": [0, 2],
        "visual_region": {"layers": [0, 2], "num_layers": 3, "spec": "0,2"},
    }  # fmt: skip
    assert pruned.region["reverted"] == {"layers": [0, 2], "base": "b"}
    names = [f"transformer.blocks.{i}.ffn.up_proj.weight" for i in range(3)]
    assert pruned.tensors == dict(zip(names, (0, 2, 3), strict=True))


def test_a_model_without_a_region_counts_as_tuned_in_all_layers(llava_checkpoint, scores, tmp_path):
    with pytest.raises(LlavaRegionError, match=r"holds no region.json.*--protect none"):
        prune(llava_checkpoint, tmp_path / "out", drop=1, scores=scores)
    prune(llava_checkpoint, tmp_path / "out", drop=1, scores=scores, protect="none", check=False)
    region = json.loads((tmp_path / "out/region.json").read_text())
    assert region["layers"] == list(range(7)) and region["pruned"]["dropped"] == [1]
    vision = [name for name in Checkpoint(llava_checkpoint) if "vision_tower" in name and ".layers.1." in name]
    assert vision and set(vision) < set(Checkpoint(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 7, "scores": 1}, r"cannot drop 7 layers: 6 of 8 lie outside.*--protect none"),
        ({"drop": 8, "scores": 1, "protect": "none"}, "allowed: 1 to 7"),
        ({"drop": 0, "scores": 1}, "cannot drop 0 layers"),
        ({"drop": 1, "scores": 1, "protect": "all"}, "0 of 8 lie outside the protected ones$"),
        ({"drop": 1}, "needs --scores"),
        ({}, "say what to drop"),
        ({"drop": 1, "layers": "1"}, "say what to drop"),
        ({"layers": "1", "protect": "none"}, "exactly those"),
        ({"layers": "all"}, "all 8 decoder layers"),
        ({"layers": "8"}, "beyond the model"),
        ({"drop": 1, "scores": 1, "protect": "9"}, "beyond the model"),
    ],
)
def test_arguments_that_do_not_fit(merged, scores, tmp_path, options, message):
    options = {**options, "scores": scores} if "scores" in options else options
    with pytest.raises(LlavaRegionError, match=message):
        prune(merged, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_other_inputs_that_do_not_fit(tiny, merged, tmp_path):
    for values, message in (([0.1] * 7, "scores 7 layers, the model has 8"), ([float("nan")] * 8, "not a list of finite")):
        with pytest.raises(LlavaRegionError, match=message):
            prune(merged, tmp_path / "out", drop=1, scores=write_scores(tmp_path / "s.json", values))
    with pytest.raises(LlavaRegionError, match="takes no base"):
        prune(merged, tmp_path / "out", layers="1", base=tiny.backbone)
    with pytest.raises(LlavaRegionError, match="would replace the input"):
        prune(merged, merged, layers="1", force=True)
    stale = folder_of({"n_layers": 4}, {"layers": [0], "num_layers": 8})
    for options in ({"drop": 1, "scores": tmp_path / "s.json"}, {"layers": "1"}):
        with pytest.raises(LlavaRegionError, match="is for 8 layers, the model has 4"):
            layers_to_drop(stale, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("layers", [[-1, 2], "1,6", [1, 1], [], True, [1.0], [8], None])
def test_a_region_that_cannot_be_true_protects_nothing_and_is_refused(merged, scores, tmp_path, layers):
    folder = Path(shutil.copytree(merged, tmp_path / "model"))
    region = json.loads((folder / "region.json").read_text())
    (folder / "region.json").write_text(json.dumps({**region, "layers": layers}))
    for options in ({"drop": 1, "scores": scores}, {"layers": "3"}):
        with pytest.raises(LlavaRegionError, match=r"'layers' in .*region.json"):
            prune(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_layers_of_its_region_is_pruned_again(merged, tmp_path):
    prune(merged, tmp_path / "one", layers="1,6", check=False)
    report = prune(tmp_path / "one", tmp_path / "two", drop=1, scores=write_scores(tmp_path / "s.json", ANGULAR[:6]), check=False)
    assert report["dropped"] == [1] and report["layers"] == []


def test_self_test_notices_a_cache_in_disorder(merged, tmp_path, monkeypatch):
    """What a model looks like whose layers kept their old numbers: the last one has no place in the cache."""
    from transformers.models.llama import modeling_llama

    self_test(merged)
    init = modeling_llama.LlamaDecoderLayer.__init__
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "__init__", lambda self, config, layer_idx: init(self, config, layer_idx + (layer_idx > 3))
    )
    with pytest.raises(LlavaRegionError, match=r"self test failed.*--no-self-test"):
        prune(merged, tmp_path / "out", layers="4")
    assert not list(tmp_path.iterdir())
    prune(merged, tmp_path / "out", layers="4", check=False)
    assert (tmp_path / "out").exists()


def test_self_test_notices_tokens_that_differ(merged, monkeypatch):
    monkeypatch.setattr("llava_region.surgery.self_check._without_cache", lambda model, batch: [1, 2, 3])
    with pytest.raises(LlavaRegionError, match=r"with the cache, \[1, 2, 3\] without"):
        self_test(merged)


@pytest.mark.parametrize("moment", [30, 0], ids=["middle", "before-rename"])
def test_killed_at_any_moment(merged, tmp_path, moment):
    out = tmp_path / "out"
    arguments = ["prune", str(merged), "--layers", "3", "--out", str(out), "--no-self-test"]
    killed = subprocess.run([sys.executable, "-c", KILL, str(moment), *arguments], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    assert main(arguments) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_command(merged, scores, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["prune", str(merged), "--drop", "2", "--scores", str(scores), "--out", str(out), "--no-self-test"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == [2, 4]
    assert main([*arguments, "--force"]) == 0
    assert "layers 2,4 dropped, 6 of 8 left" in capsys.readouterr().out
    assert main(["prune", str(merged), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("error: say what to drop")


@pytest.mark.parametrize("spoil", ["missing shard", "pickle"])
def test_broken_weights_end_in_one_line(merged, tmp_path, capsys, spoil):
    folder = Path(shutil.copytree(merged, tmp_path / "broken"))
    (folder / "model.safetensors").unlink()
    if spoil == "pickle":
        torch.save({"a": Path("/")}, folder / "pytorch_model.bin")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert main(["prune", str(folder), "--layers", "1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and ("missing" if spoil != "pickle" else "no code") in error
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
