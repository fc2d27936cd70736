"""The activation metrics' formulas on plain tensors and hand-made cases, and the attention of every family of decoder layers."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from llava_region.decoder import find_decoder_layers
from llava_region.errors import LlavaRegionError
from llava_region.scores import image_attention as image_attention_module
from llava_region.scores.activations import forward_decoder, measure
from llava_region.scores.angular_distance import angular_distance, last_token
from llava_region.scores.attention_inputs import attention_of
from llava_region.scores.block_influence import block_influence, modality_cosines, multimodal_block_influence, token_cosines
from llava_region.scores.image_attention import image_attention
from llava_region.scores.metrics import ACTIVATION_METRICS
from llava_region.scores.sums import Sums


def bools(*rows):
    return torch.tensor(rows).bool()


def test_block_influence_leaves_padding_out_and_counts_every_token_alike():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [9.0, 9.0]], [[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    y = torch.tensor([[[5.0, 0.0], [0.0, 7.0], [-9.0, -9.0]], [[-1.0, 0.0], [0.0, 4.0], [2.0, 2.0]]])
    mask = bools([1, 1, 0], [1, 1, 1])
    assert block_influence(token_cosines(x, y), mask).tolist() == pytest.approx([0.5, 2 / 3])


def test_an_unused_value_on_padding_may_be_anything():
    x = torch.tensor([[[1.0, 0.0], [math.nan, math.inf]]])
    assert block_influence(token_cosines(x, x), bools([1, 0])).tolist() == pytest.approx([0])


def test_float16_norms_whose_product_overflows():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 5, 256) * 60, torch.randn(2, 5, 256) * 30
    x, y = x.half(), (x + noise).half()
    assert torch.isinf(x.norm(dim=-1) * y.norm(dim=-1)).all(), "the naive product has to overflow for this test to mean anything"
    reference = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    torch.testing.assert_close(token_cosines(x, y).double(), reference, atol=1e-6, rtol=0)


def test_modalities_are_averaged_apart():
    cosines = torch.tensor([[1.0, 0.5, 0.5, 0.25, 9.0], [0.3, 0.1, 9.0, 9.0, 9.0]])
    mask, image = bools([1, 1, 1, 1, 0], [1, 1, 0, 0, 0]), bools([0, 1, 1, 0, 1], [0, 0, 0, 0, 0])
    images, texts = modality_cosines(cosines, mask, image)
    assert images[0].item() == pytest.approx(0.5) and images[1].isnan()
    assert texts.tolist() == pytest.approx([0.625, 0.2])
    assert multimodal_block_influence(torch.tensor([0.5]), torch.tensor([0.7])).tolist() == pytest.approx([0.4])


def test_angular_distance_of_known_angles_and_tiny_ones():
    mask = bools([1, 1])
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0]]])
    for degrees in (0, 1e-5, 45, 90, 180):
        angle = math.radians(degrees)
        y = torch.tensor([[[0.0, 1.0], [3 * math.cos(angle), 3 * math.sin(angle)]]], dtype=torch.float64)
        assert angular_distance(x, y, mask).item() == pytest.approx(degrees / 180, rel=1e-9, abs=1e-15)


def test_the_angle_of_nearly_equal_float32_vectors_keeps_its_digits():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 256)
    y = x + torch.randn(1, 1, 256) * 1e-6
    u, d = x.double().flatten(), (y.double() - x.double()).flatten()
    along = d @ u / u.norm()
    across = (d - along * u / u.norm()).norm()
    assert angular_distance(x, y, bools([1])).item() == pytest.approx(math.atan2(across, u.norm() + along) / math.pi, rel=1e-6)


def test_a_zero_vector_is_at_a_right_angle_to_any_other():
    x, y = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert angular_distance(x, y, bools([1])).item() == 0.5
    assert block_influence(token_cosines(x, y), bools([1])).item() == 1


def test_the_last_token_is_the_last_that_is_not_padding():
    hidden = torch.arange(12.0).view(2, 6, 1)
    assert last_token(hidden, bools([1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1])).flatten().tolist() == [2, 11]


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_attention_forced_onto_the_image_tokens(monkeypatch, block):
    """Keys of image tokens are far ahead: every query that sees one gives them all its mass."""
    monkeypatch.setattr(image_attention_module, "BLOCK_ELEMENTS", {"cpu": block})
    image = bools([0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0])
    keys = torch.where(image, 100.0, 0.0)[:, None, :, None].expand(2, 2, 6, 4)
    score = image_attention(torch.ones(2, 4, 6, 4), keys, 0.5, bools([1] * 6, [1] * 6), image, first=1)
    assert score.tolist() == pytest.approx([5 / 2, 0])  # 5 of 6 queries (the first sees none), 2 image tokens


@pytest.mark.parametrize("block", [40, 1 << 20])
def test_without_a_mask_of_the_layer_attention_is_causal_and_passes_over_padding(monkeypatch, block):
    """As SDPA and flash attention run: they get no mask, or only the padding."""
    monkeypatch.setattr(image_attention_module, "BLOCK_ELEMENTS", {"cpu": block})
    torch.manual_seed(0)
    batch = random_batch(1)
    mask, image = batch.attention_mask, batch.image_mask
    image[1, 2:5] = image[2, 0:2] = True  # some of them on padding
    queries, keys = torch.randn(3, 4, 17, 8), torch.randn(3, 2, 17, 8)
    scores = queries.double() @ keys.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    visible = torch.ones(17, 17).bool().tril() & mask[:, None, None, :]
    attention = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() * mask[:, None, :, None]
    expected = [attention[i][:, :, image[i] & mask[i]].sum().item() / (int((image[i] & mask[i]).sum()) * 4) for i in range(3)]
    found = image_attention(queries, keys, 0.7, mask, image, first=2)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_uniform_attention_by_hand():
    image = bools([1, 0, 0])
    score = image_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4), 1.0, bools([1, 1, 1]), image)
    assert score.item() == pytest.approx(1 + 1 / 2 + 1 / 3)


def random_batch(size: int):
    """Three samples: right padding, left padding, none; images at different places, several in one."""
    mask, image = torch.ones(3, 17).bool(), torch.zeros(3, 17).bool()
    mask[1, 11:], mask[2, :4] = False, False
    image[0, 3:8] = image[0, 10:12] = image[2, 6:9] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    embeds = torch.randn(3, 17, size)
    return SimpleNamespace(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, image_mask=image)


def families():
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "llama-sdpa": ("Llama", {**common, "num_key_value_heads": 2}, "sdpa"),
        "llama-eager-linear-rope": ("Llama", {**common, "rope_scaling": {"type": "linear", "factor": 2.0}}, "eager"),
        "mistral-window": ("Mistral", {**common, "num_key_value_heads": 2, "sliding_window": 6}, "eager"),
        "phi-partial-rotary": ("Phi", {**common, "partial_rotary_factor": 0.5}, "eager"),
        "qwen2-sdpa": ("Qwen2", {**common, "num_key_value_heads": 2}, "sdpa"),
        "mpt-alibi": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "max_seq_len": 32}, "eager"),
    }


@pytest.mark.parametrize("family", families())
def test_image_attention_agrees_with_whole_matrices_in_every_family(family):
    import transformers

    name, settings, implementation = families()[family]
    config = getattr(transformers, f"{name}Config")(**settings, attn_implementation=implementation)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model)
    batch, sums = random_batch(32), Sums(2)
    with torch.no_grad():
        scored = measure(model, batch, ("image_attention",), sums)
        eager = copy.deepcopy(config)
        eager._attn_implementation = "eager"
        reference = type(model)(eager).eval()
        reference.load_state_dict(model.state_dict())
        attention = whole_attention(reference, batch)
    for row in (0, 2):
        asking = batch.attention_mask[row][None, :, None]
        images = batch.image_mask[row]
        expected = [((a[row].double() * asking)[:, :, images].sum() / (images.sum() * a.shape[1])).item() for a in attention]
        assert scored[row].tolist() == pytest.approx(expected, abs=1e-5)
        assert abs(expected[0] - expected[1]) > 1e-4, "layers that attend alike would not show a mix-up"
    assert scored[1].isnan().all() and sums.samples("image_attention") == 2


def randomise(model):
    """Weights large enough that layers differ and attention is not flat."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def whole_attention(model, batch):
    decoder = model.get_submodule(find_decoder_layers(model).prefix.rpartition(".")[0])
    positions = {} if type(model).__name__.startswith("Mpt") else {"position_ids": batch.position_ids}
    out = decoder(
        inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(), output_attentions=True, use_cache=False, **positions
    )  # fmt: skip
    return out.attentions


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**common, attn_implementation="eager")
    return randomise(LlamaForCausalLM(config)).eval()


def test_a_layer_that_is_the_identity_has_no_influence(llama):
    model = copy.deepcopy(llama)
    layer = model.model.layers[1]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    sums = Sums(3)
    with torch.no_grad():
        measure(model, random_batch(32), ACTIVATION_METRICS, sums)
    for metric in ("block_influence", "multimodal_block_influence", "angular_distance"):
        scores = sums.scores(metric)
        assert scores[1] == pytest.approx(0, abs=1e-6) and min(scores[0], scores[2]) > 1e-3


def test_the_last_layer_is_scored_before_the_final_norm(llama):
    """A final norm that turns everything must not show."""
    model = copy.deepcopy(llama)
    plain, turned = Sums(3), Sums(3)
    batch = random_batch(32)
    with torch.no_grad():
        measure(model, batch, ("block_influence",), plain)
        model.model.norm.weight.data.neg_()
        measure(model, batch, ("block_influence",), turned)
    assert plain.scores("block_influence") == turned.scores("block_influence")


def test_hooks_are_gone_afterwards_even_after_an_error(llama):
    model, batch = copy.deepcopy(llama), random_batch(32)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    with torch.no_grad():
        measure(model, batch, ACTIVATION_METRICS, Sums(3))
        assert hooks() == 0
        batch.inputs_embeds = batch.inputs_embeds[..., :5]
        with pytest.raises(RuntimeError):
            measure(model, batch, ACTIVATION_METRICS, Sums(3))
    assert hooks() == 0


def test_scoring_changes_nothing_in_the_forward_pass(llama):
    batch, seen = random_batch(32), []
    with torch.no_grad():
        hook = llama.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        forward_decoder(llama, batch)
        measure(llama, batch, ACTIVATION_METRICS, Sums(3))
        hook.remove()
    assert torch.equal(*seen)


def test_an_unknown_attention_is_refused_by_name(llama):
    with pytest.raises(LlavaRegionError, match=r"LlamaMLP.*q_proj and k_proj"):
        attention_of(llama.model.layers[0].mlp)


def test_projections_that_are_gone_round_are_refused(llama):
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        layer.self_attn.config.pretraining_tp = 2
    with torch.no_grad(), pytest.raises(LlavaRegionError, match="pretraining_tp"):
        measure(model, random_batch(32), ("image_attention",), Sums(3))


def test_scores_that_are_not_numbers_are_refused():
    sums = Sums(2)
    sums.add("block_influence", torch.tensor([[1.0], [math.nan]]), bools([1])[0])
    with pytest.raises(LlavaRegionError, match=r"block_influence of layer 1.*--dtype float32"):
        sums.scores("block_influence")
    with pytest.raises(LlavaRegionError, match="image_attention needs"):
        sums.scores("image_attention")
