"""The config of a pruned model: lists are cut or renumbered by their names, not by their length, and the model is built from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from llava_region.decoder import layer_index, with_layer_index
from llava_region.surgery.prune import prune
from llava_region.surgery.pruned_config import pruned_config, unknown_lists

KEPT = [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("bad_words", list("abcdefgh"), list("abcdefgh")),
        ("bad_words_ids", [[i] for i in range(8)], [[i] for i in range(8)]),
        ("architectures", ["A"] * 8, ["A"] * 8),
        ("suppress_tokens", list(range(8)), list(range(8))),
        ("vision_feature_layers", list(range(8)), list(range(8))),
        ("layer_types", list("abcdefgh"), list("abcegh")),
        ("layer_types", list("abcdefghXY"), list("abceghXY")),  # layers behind the decoder's
        ("num_attention_heads_per_layer", [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 7, 8]),
        ("num_key_value_heads", [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 5, 7, 8]),
        ("num_key_value_heads", 8, 8),
        ("sliding_window", [1, None, 3, 4, None, 6, 7, 8], [1, None, 3, None, 7, 8]),
        ("intermediate_size", [1, 2], [1, 2]),
        ("mlp_only_layers", [1, 3, 6], [1, 4]),
        ("mlp_only_layers", list(range(8)), list(range(6))),
        ("mlp_only_layers", [], []),
        ("full_attention_layers", [3, 7], [5]),
        ("cross_attention_layers", [4, 5], [3]),
        ("moe_layers", [3], []),
        ("ple_layer_ids", [1, 4, 8], [1, 6]),  # counted from one
        ("reverted_layers", [0, 4, 5], [0, 3]),
        ("max_window_layers", 4, 3),
        ("max_window_layers", 28, 6),
        ("first_k_dense_replace", 6, 4),
        ("num_hidden_layers", 8, 6),
        ("my_layer_gates", list("abcdefgh"), list("abcegh")),
        ("my_layer_gates", list("abc"), list("abc")),
    ],
)
def test_lists_of_layers_are_known_by_name(key, before, after):
    assert pruned_config({"x": 1, key: before}, KEPT, 8) == {"x": 1, key: after}
    nested = pruned_config({"text_config": {key: before}, "vision_config": {key: before}}, KEPT, 8)
    assert nested == {"text_config": {key: after}, "vision_config": {key: before}}


def test_lists_that_are_not_known_are_said():
    of_eight = ("my_layer_gates", "other", "layer_types", "bad_words", "mlp_only_layers")
    config = {**{key: [0] * 8 for key in of_eight}, "short": [0]}
    remarks = unknown_lists(config, 8)
    assert "'my_layer_gates'" in remarks[0] and "were removed" in remarks[0]
    assert "'other'" in remarks[1] and "left as it is" in remarks[1]
    assert len(remarks) == 2 and unknown_lists({"text_config": {"other": [0] * 8}}, 8) == remarks[1:]


def qwen2() -> tuple[type, dict]:
    return transformers.Qwen2Config, {"max_window_layers": 5, "use_sliding_window": True}


def qwen3_moe() -> tuple[type, dict]:
    if not hasattr(transformers, "Qwen3MoeConfig"):
        pytest.skip("this transformers has no such model")
    return transformers.Qwen3MoeConfig, {"mlp_only_layers": [1, 3, 6], "num_experts": 4, "moe_intermediate_size": 32}


def llama() -> tuple[type, dict]:
    return transformers.LlamaConfig, {"bad_words": list("abcdefgh")}


@pytest.mark.parametrize("family", [llama, qwen2, qwen3_moe])
def test_the_model_of_the_pruned_config_has_the_pruned_tensors(family):
    kind, more = family()
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind(**sizes, num_hidden_layers=8, **more)

    def shapes(config) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    expected = {}
    for name, shape in shapes(config).items():
        layer = layer_index(name)
        if layer is None or layer in KEPT:
            expected[name if layer is None else with_layer_index(name, KEPT.index(layer))] = shape
    assert shapes(kind(**pruned_config(config.to_dict(), KEPT, 8))) == expected


def test_a_folder_with_such_lists(llava_checkpoint, tmp_path):
    folder = Path(shutil.copytree(llava_checkpoint, tmp_path / "llava-lists"))
    config = json.loads((folder / "config.json").read_text())
    lists = {"bad_words": list("abcdefgh"), "mlp_only_layers": [1, 3, 6], "tower_grid": [1] * 8}
    (folder / "config.json").write_text(json.dumps({**config, **lists}))
    report = prune(folder, tmp_path / "out", layers="3,5")
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: after[key] for key in lists} == {**lists, "mlp_only_layers": [1, 4]} and after["num_hidden_layers"] == 6
    assert ["tower_grid" in remark for remark in report["remarks"]] == [True]
