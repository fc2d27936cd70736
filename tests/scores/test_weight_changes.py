"""The weight metrics against whole state dicts in float64, on checkpoints of every layout and on LoRA runs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.scores import weight_changes as module
from llava_region.scores.angular_distance_weights import angular_distance_weights
from llava_region.scores.parameter_change import masked, parameter_change
from llava_region.scores.weight_changes import weight_changes
from llava_region.surgery.merge import merge
from tests.helpers.finished_models import write_lora_run

EPS = 2.0**-13


def metrics(layers):
    forms = {form: [parameter_change(layer, form) for layer in layers] for form in ("elementwise", "norm", "l1")}
    return {**forms, "angle": [angular_distance_weights(layer) for layer in layers], "masked": [masked(layer) for layer in layers]}


def whole_state_dicts(tuned: dict, base: dict, eps: float = EPS):
    """The definitions, on float64 state dicts."""
    out = {name: [] for name in ("elementwise", "norm", "l1", "angle", "masked")}
    for layer in range(1 + max(layer_index(name) for name in base if layer_index(name) is not None)):
        names = [name for name in base if layer_index(name) == layer]
        old = [base[name].double().flatten() for name in names]
        new = [tuned[name].double().flatten() for name in names]
        a, b = torch.cat(old), torch.cat(new)
        kept = a.abs() >= eps
        out["elementwise"].append(((b - a)[kept] / a[kept]).abs().mean().item())
        out["norm"].append(((b - a).norm() / a.norm()).item())
        out["l1"].append(((b - a).abs().sum() / a.abs().sum()).item())
        cosines = [(u @ v / (u.norm() * v.norm())).clamp(-1, 1) for u, v in zip(old, new, strict=True)]
        out["angle"].append(sum(math.acos(c) / math.pi for c in cosines) / len(cosines))
        out["masked"].append(int((~kept).sum()))
    return out


def agree(found, expected, angle=1e-5):
    assert found["masked"] == expected["masked"]
    assert sum(found["masked"]) > 0, "some weights have to be masked for this test to mean anything"
    for name in ("elementwise", "norm", "l1"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-9), name
    assert found["angle"] == pytest.approx(expected["angle"], abs=angle)


@pytest.fixture(scope="module")
def states(tiny, llava_checkpoint):
    return load_file(llava_checkpoint / "model.safetensors"), load_file(tiny.backbone / "model.safetensors")


def checkpoint(folder, tensors, like, dtype=None, kind="safetensors", shards=1):
    """A checkpoint of these tensors in one of the layouts, with the config of `like`."""
    folder.mkdir()
    (folder / "config.json").write_text((like / "config.json").read_text())
    tensors = {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[i::shards]} for i in range(shards)]
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}.{kind}"] if shards == 1 else [f"{stem}-{i:05d}.{kind}" for i in range(shards)]
    for part, file in zip(parts, files, strict=True):
        save({name: tensor.contiguous() for name, tensor in part.items()}, folder / file)
    if shards > 1:
        weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_full_checkpoint(tiny, llava_checkpoint, states):
    agree(metrics(weight_changes(llava_checkpoint, tiny.backbone, EPS)), whole_state_dicts(*states))


@pytest.mark.parametrize(("dtype", "kind", "shards"), [("bfloat16", "safetensors", 3), ("float16", "bin", 2), ("bfloat16", "bin", 1)])
def test_layouts_and_precisions(tiny, llava_checkpoint, states, tmp_path, monkeypatch, dtype, kind, shards):
    """Small parts, so that tensors are read and summed in several; bf16 against an fp32 backbone too."""
    monkeypatch.setattr(module, "READ_ELEMENTS", 1000)
    monkeypatch.setattr(module, "SUM_ELEMENTS", 300)
    dtype = getattr(torch, dtype)
    tuned = checkpoint(tmp_path / "tuned", states[0], llava_checkpoint, dtype, kind, shards)
    base = checkpoint(tmp_path / "base", states[1], tiny.backbone, dtype, kind, shards)
    rounded = [{name: tensor.to(dtype) for name, tensor in state.items()} for state in states]
    agree(metrics(weight_changes(tuned, base, EPS)), whole_state_dicts(*rounded))
    agree(metrics(weight_changes(tuned, tiny.backbone, EPS)), whole_state_dicts(rounded[0], states[1]))


def test_a_lora_run_needs_no_merge(tiny, tmp_path):
    run = write_lora_run(tiny, tmp_path / "llava-tiny-lora", layers=(1, 6))
    base = load_file(tiny.backbone / "model.safetensors")
    tuned = merged_by_hand(run, base)
    found = metrics(weight_changes(run, tiny.backbone, EPS))
    agree(found, whole_state_dicts(tuned, base))
    for name in ("elementwise", "norm", "l1", "angle"):
        assert [score > 0 for score in found[name]] == [layer in (1, 6) for layer in range(8)]


def merged_by_hand(run, base):
    """W + alpha / r * B A in float64 for every LoRA module of the run."""
    config = json.loads((run / "adapter_config.json").read_text())
    adapter = load_file(run / "adapter_model.safetensors")
    tuned = {name: tensor.double() for name, tensor in base.items()}
    for key in adapter:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            b, a = adapter[key.replace("lora_A", "lora_B")].double(), adapter[key].double()
            tuned[name] = tuned[name] + config["lora_alpha"] / config["r"] * (b @ a)
    return tuned


def test_rslora_and_tensors_trained_beside_the_adapter(tiny, tmp_path):
    run = write_lora_run(tiny, tmp_path / "llava-tiny-lora", layers=(2,), use_rslora=True)
    base = load_file(tiny.backbone / "model.safetensors")
    beside = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    norm = "model.layers.2.input_layernorm.weight"
    torch.save({**beside, f"base_model.model.{norm}": base[norm] * 3}, run / "non_lora_trainables.bin")
    config = json.loads((run / "adapter_config.json").read_text())
    tuned = merged_by_hand(run, base)
    for name in tuned:
        if name != norm:
            tuned[name] = base[name].double() + (tuned[name] - base[name].double()) * math.sqrt(config["r"])
    tuned[norm] = base[norm].double() * 3
    agree(metrics(weight_changes(run, tiny.backbone, EPS)), whole_state_dicts(tuned, base))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_an_adapter_that_is_not_finite(tiny, tmp_path, half, value):
    run = write_lora_run(tiny, tmp_path / "llava-tiny-lora", layers=(2,))
    adapter = load_file(run / "adapter_model.safetensors")
    adapter[f"base_model.model.model.layers.2.mlp.up_proj.lora_{half}.weight"][0, 0] = value
    save_file(adapter, run / "adapter_model.safetensors")
    with pytest.raises(LlavaRegionError, match=f"'model.layers.2.mlp.up_proj.lora_{half}' of the adapter holds NaN or infinity"):
        weight_changes(run, tiny.backbone, EPS)


def test_a_tensor_in_both_files_of_a_run_counts_as_it_is_merged(tiny, tmp_path):
    """In the adapter's file and next to it: PEFT loads the adapter's last."""
    run, norm = write_lora_run(tiny, tmp_path / "llava-tiny-lora", layers=(2,)), "base_model.model.model.layers.2.input_layernorm.weight"
    for file, factor in ((run / "adapter_model.safetensors", 3.0), (run / "non_lora_trainables.bin", 2.0)):
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        (save_file if file.suffix == ".safetensors" else torch.save)({**stored, norm: torch.full((64,), factor)}, file)
    merge(run, tmp_path / "merged", tiny.backbone)
    assert load_file(tmp_path / "merged/model.safetensors")[norm.removeprefix("base_model.model.")].eq(3).all()
    found, expected = (metrics(weight_changes(folder, tiny.backbone, 0.0)) for folder in (run, tmp_path / "merged"))
    for name in ("elementwise", "norm", "l1", "angle"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_untouched_layers_score_exactly_zero(tiny, states, llava_checkpoint, tmp_path):
    tuned, base = states
    mixed = {name: base.get(name, tensor) if layer_index(name) != 5 else tensor for name, tensor in tuned.items()}
    found = metrics(weight_changes(checkpoint(tmp_path / "tuned", mixed, llava_checkpoint), tiny.backbone, EPS))
    for name in ("elementwise", "norm", "l1", "angle"):
        assert [layer for layer, score in enumerate(found[name]) if score != 0.0] == [5], name


def test_known_values_by_hand(tiny, states, llava_checkpoint, tmp_path):
    """Layer 0 doubled: ratio 1 and angle 0; layer 1 negated: ratio 2 and angle 1."""
    tuned, base = states
    factor = {0: 2.0, 1: -1.0}
    changed = {name: base.get(name, tensor) * factor.get(layer_index(name), 1.0) for name, tensor in tuned.items()}
    found = metrics(weight_changes(checkpoint(tmp_path / "tuned", changed, llava_checkpoint), tiny.backbone, EPS))
    for name in ("elementwise", "norm", "l1"):
        assert found[name][:3] == pytest.approx([1, 2, 0], abs=1e-5), name
    assert found["angle"][:3] == pytest.approx([0, 1, 0], abs=1e-6)


def test_zeros_in_the_backbone_are_masked_and_counted(tiny, states, llava_checkpoint, tmp_path):
    tuned, base = states
    name = "model.layers.3.mlp.up_proj.weight"
    holed = {**base, name: base[name].clone()}
    holed[name][0] = 0
    holed[name][1, 0] = EPS  # not below
    layers = weight_changes(llava_checkpoint, checkpoint(tmp_path / "base", holed, tiny.backbone), EPS)
    agree(metrics(layers), whole_state_dicts(tuned, holed))
    assert masked(layers[3]) >= base[name].shape[1]
    assert masked(weight_changes(llava_checkpoint, tmp_path / "base", 0.0)[3]) == base[name].shape[1]


def test_a_tensor_of_zeros_has_a_right_angle_to_anything_else(tiny, states, llava_checkpoint, tmp_path):
    base = states[1]
    names = [name for name in base if layer_index(name) == 4]
    zeroed = {**base, **{name: torch.zeros_like(base[name]) for name in names}}
    layers = weight_changes(llava_checkpoint, checkpoint(tmp_path / "base", zeroed, tiny.backbone), EPS)
    assert angular_distance_weights(layers[4]) == 0.5
    with pytest.raises(LlavaRegionError, match="layer 4 holds only zeros"):
        parameter_change(layers[4])


@pytest.mark.parametrize("case", ["missing", "extra", "shape", "nan", "no weights"])
def test_checkpoints_that_do_not_belong_together(tiny, states, llava_checkpoint, tmp_path, case):
    tuned = dict(states[0])
    name = "model.layers.3.mlp.up_proj.weight"
    expected = {
        "missing": rf"lacks {name}.*give the model's own backbone", "extra": r"lacks model.layers.3.extra.weight",
        "shape": rf"{name} is \[2, 2\]", "nan": rf"{name} holds numbers that are not finite", "no weights": "is not a checkpoint",
    }[case]  # fmt: skip
    if case == "missing":
        del tuned[name]
    elif case == "extra":
        tuned["model.layers.3.extra.weight"] = torch.ones(2)
    elif case == "shape":
        tuned[name] = torch.ones(2, 2)
    elif case == "nan":
        tuned[name] = tuned[name].clone()
        tuned[name][0, 0] = math.nan
    folder = checkpoint(tmp_path / "tuned", tuned, llava_checkpoint)
    if case == "no weights":
        (folder / "model.safetensors").unlink()
    with pytest.raises(LlavaRegionError, match=expected):
        weight_changes(folder, tiny.backbone, EPS)


def test_threads_are_put_back(tiny, llava_checkpoint):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weight_changes(llava_checkpoint, tiny.backbone, EPS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
