"""Names of decoder layers, in every model that LLaVA and Bunny build, and the search in real modules."""

import pytest
import torch
from torch import nn

from llava_region import LlavaRegionError
from llava_region.decoder import find_decoder_layers, is_projector, is_vision, layer_index, linear_modules, parent_of

NAMES = [
    ("model.layers.1.self_attn.q_proj", 1),
    ("model.layers.10.self_attn.q_proj", 10),
    ("base_model.model.model.layers.3.mlp.down_proj.lora_A.default.weight", 3),
    ("module.model.layers.4.input_layernorm.weight", 4),
    ("module.base_model.model.model.layers.4.self_attn.q_proj.base_layer.weight", 4),
    ("transformer.blocks.7.attn.Wqkv", 7),
    ("model.layers.2", 2),
    ("model.layers", None),
    ("model.mm_projector.0.weight", None),
    ("model.mm_projector.layers.0.weight", None),
    ("model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", None),
    ("model.vision_tower.vision_tower.model.layers.3.mlp.fc1.weight", None),
    ("transformer.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", None),
    ("vision_model.encoder.layers.3.mlp.fc1.weight", None),
    ("lm_head.weight", None),
    ("model.embed_tokens.weight", None),
    ("my_model.layers.3.weight", None),
]


@pytest.mark.parametrize(("name", "layer"), NAMES)
def test_layer_index(name, layer):
    assert layer_index(name) == layer


def test_parts():
    assert is_vision("model.vision_tower.x") and not is_vision("model.layers.0")
    assert is_projector("base_model.model.model.mm_projector.2.bias") and is_projector("model.image_newline")
    assert not is_projector("model.mm_projector_norm.weight")


def block(width=4):
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj = nn.Linear(width, width)
    layer.norm = nn.LayerNorm(width)
    return layer


def multimodal(layers=3):
    """A LLaVA-shaped module tree: decoder layers, a projector, and a tower whose own layers must not be found."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(block() for _ in range(layers))
    model.model.mm_projector = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    model.model.vision_tower = nn.Module()
    model.model.vision_tower.encoder = nn.Module()
    model.model.vision_tower.encoder.layers = nn.ModuleList(block() for _ in range(5))
    model.lm_head = nn.Linear(4, 4)
    return model


def test_search_finds_the_language_model():
    prefix, modules = find_decoder_layers(multimodal())
    assert prefix == "model.layers" and len(modules) == 3
    wrapped = nn.Module()
    wrapped.module = multimodal(4)
    assert len(find_decoder_layers(wrapped).modules) == 4


def test_search_refuses_what_it_does_not_know():
    with pytest.raises(LlavaRegionError, match="0 lists of decoder layers"):
        find_decoder_layers(nn.Linear(2, 2))


def test_linear_modules_are_those_of_the_region_alone():
    assert linear_modules(multimodal(), [0, 2]) == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    with pytest.raises(LlavaRegionError, match=r"\[7\]"):
        linear_modules(multimodal(), [0, 7])


def test_quantised_linear_modules_are_found():
    """bitsandbytes' Linear4bit is a subclass of nn.Linear; the real one where it is installed, else one of that form."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:

        class Linear4bit(nn.Linear):
            pass

    model = multimodal()
    model.model.layers[1].self_attn.q_proj = Linear4bit(4, 4)
    assert linear_modules(model, [1]) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("family", ["llama", "mistral", "mpt"])
def test_llavas_model_families(family):
    pytest.importorskip("llava.model")
    with torch.device("meta"):
        if family == "mpt":
            from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM

            model = LlavaMptForCausalLM(LlavaMptConfig(d_model=32, n_heads=2, n_layers=3, vocab_size=64))
        elif family == "mistral":
            from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

            config = LlavaMistralConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=3, vocab_size=64)
            model = LlavaMistralForCausalLM(config)
        else:
            from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

            model = LlavaLlamaForCausalLM(LlavaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, vocab_size=64))
    assert len(find_decoder_layers(model).modules) == 3
    names = linear_modules(model, [1])
    assert len(names) == (4 if family == "mpt" else 7) and {layer_index(name) for name in names} == {1}


def test_parent_is_the_module_that_holds_the_layers():
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Linear(2, 2)])
    assert parent_of(model) is model.model and parent_of(nn.DataParallel(model)) is model.model
