"""The activation metrics on a LLaVA model with images at different places, against slow float64 references sample by sample."""

import json

import pytest
import torch

from llava_region.models import load
from llava_region.scores.data import embed_inputs, read_samples
from llava_region.scores.image_attention import image_attention
from llava_region.scores.metrics import ACTIVATION_METRICS
from llava_region.scores.pass_over_data import Plan, run_pass
from llava_region.scores.sums import Sums
from tests.helpers.scores_reference import mixed_records, reference_scores
from tests.helpers.training_runs import needs_fp16


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """A data file of mixed records: images first, in a later turn, two, none; a question without an answer."""
    file = tmp_path_factory.mktemp("scores") / "mixed.json"
    file.write_text(json.dumps(mixed_records([f"{i}.png" for i in range(6)])))
    return file


@pytest.fixture(scope="module")
def eager(llava_checkpoint):
    """The checkpoint with eager attention, its decoder layers made to attend and to turn their tokens more."""
    loaded = sharpen(load(llava_checkpoint, device="cpu", attn_implementation="eager"))
    assert type(loaded.model.get_model().layers[0].self_attn).__name__ == "LlamaAttention"
    return loaded


def sharpen(loaded):
    with torch.no_grad():
        for layer in loaded.model.get_model().layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(4)
    return loaded


@pytest.fixture(scope="module")
def reference(eager, data, tiny):
    samples, _ = read_samples([data], tiny.images)
    inputs = [embed_inputs(eager, sample, None) for sample in samples]
    assert sorted(len(images) for _, images in inputs) == [0, 0, 1, 1, 1, 1, 2]
    starts = {int((ids == -200).nonzero()[0]) for ids, images in inputs if images}
    assert len(starts) > 1, "the images have to stand at different places"
    return reference_scores(eager, inputs)


def scores_of(loaded, data, tiny, tmp_path, batch_size):
    samples, _ = read_samples([data], tiny.images)
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    plan = Plan(batches, ACTIVATION_METRICS, None, 50, tmp_path / "scores.json", {})
    found = run_pass(loaded, plan, resumed=False)
    return {name: found.sums.scores(name) for name in ACTIVATION_METRICS}, found


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_all_metrics_agree_with_the_reference(eager, data, tiny, reference, tmp_path, batch_size):
    scores, found = scores_of(eager, data, tiny, tmp_path, batch_size)
    for name in ACTIVATION_METRICS:
        assert scores[name] == pytest.approx(reference[name], abs=1e-5), name
        assert max(reference[name]) - min(reference[name]) > 1e-3, f"{name} has to tell the layers apart for this test to mean anything"
    counts = [found.sums.samples(name) for name in ACTIVATION_METRICS]
    assert counts == [7, 5, 7, 5]
    assert found.sums.count("text_cosine") == 7


def test_a_model_that_runs_sdpa_scores_the_same(llava_checkpoint, data, tiny, reference, tmp_path):
    loaded = sharpen(load(llava_checkpoint, device="cpu", attn_implementation="sdpa"))
    assert "Sdpa" in type(loaded.model.get_model().layers[0].self_attn).__name__
    scores, _ = scores_of(loaded, data, tiny, tmp_path, 4)
    for name in ACTIVATION_METRICS:
        assert scores[name] == pytest.approx(reference[name], abs=1e-5), name


@needs_fp16
def test_a_half_precision_model_whose_norms_overflow(llava_checkpoint, data, tiny, tmp_path):
    """Hidden states so large that the product of two norms passes 65504: the scores stay near the float32 model's."""

    def enlarged(dtype):
        loaded = load(llava_checkpoint, device="cpu", dtype=dtype)
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight.mul_(4000)
            loaded.model.get_model().mm_projector[-1].weight.mul_(4000)
            for layer in loaded.model.get_model().layers:
                layer.self_attn.o_proj.weight.mul_(100)
                layer.mlp.down_proj.weight.mul_(100)
        return loaded

    half, full = enlarged("float16"), enlarged("float32")
    norms = []
    hook = half.model.get_model().layers[3].register_forward_hook(lambda m, a, output: norms.append(output[0].norm(dim=-1)))
    scores, _ = scores_of(half, data, tiny, tmp_path, 3)
    hook.remove()
    assert (torch.cat([n.flatten() for n in norms]).float() ** 2 > 65504).any()
    expected, _ = scores_of(full, data, tiny, tmp_path, 3)
    for name in ACTIVATION_METRICS:
        assert scores[name] == pytest.approx(expected[name], abs=5e-3), name


def test_single_records_for_the_heat_map(eager, data, tiny, tmp_path):
    scores, found = scores_of(eager, data, tiny, tmp_path, 2)
    rows = found.attention["0"]
    assert sorted(rows) == ["0", "1", "3", "4", "6"]
    mean = torch.tensor([rows[key] for key in rows], dtype=torch.float64).mean(0)
    assert scores["image_attention"] == pytest.approx(mean.tolist(), abs=1e-12)


def test_a_sample_whose_image_was_cut_off_counts_as_text(eager, data, tiny, tmp_path, monkeypatch):
    samples, _ = read_samples([data], tiny.images)
    starts = [(embed_inputs(eager, sample, None)[0] == -200).nonzero().flatten().tolist() for sample in samples]
    last = max(range(len(starts)), key=lambda i: starts[i][0] if starts[i] else -1)
    monkeypatch.setattr(eager.model.config, "tokenizer_model_max_length", starts[last][0])
    scores, found = scores_of(eager, data, tiny, tmp_path, 3)
    assert str(last) not in found.attention["0"] and len(found.attention["0"]) == 4
    assert [found.sums.samples(name) for name in ACTIVATION_METRICS] == [7, 4, 7, 4]
    mean = torch.tensor(list(found.attention["0"].values()), dtype=torch.float64).mean(0)
    assert scores["image_attention"] == pytest.approx(mean.tolist(), abs=1e-12)


def test_memory_does_not_grow_with_layers_or_samples(eager, data, tiny, tmp_path, monkeypatch):
    """Queries and keys of one layer are gone when those of the next arrive; what stays a sample are the rows of the heat map."""
    import weakref

    from llava_region.scores import activations

    alive = []

    def watched(queries, *args, **kwargs):
        assert not [ref for ref in alive if ref() is not None], "an earlier layer's queries are still held"
        alive.append(weakref.ref(queries))
        return image_attention(queries, *args, **kwargs)

    monkeypatch.setattr(activations, "image_attention", watched)
    _, found = scores_of(eager, data, tiny, tmp_path, 2)
    assert len(alive) > 8
    assert found.sums.table.numel() == Sums(8).table.numel()
