"""The activation metrics on each of Bunny's language models against slow references. Needs the real Bunny (BUNNY_ROOT)."""

import json

import pytest
import torch

from llava_region.decoder import find_decoder_layers
from llava_region.models import load
from llava_region.scores.data import embed_inputs, read_samples
from llava_region.scores.metrics import ACTIVATION_METRICS
from llava_region.scores.pass_over_data import Plan, run_pass
from tests.helpers.bunny_models import MODEL_TYPES, write_bunny
from tests.helpers.scores_reference import mixed_records, reference_scores
from tests.surgery.test_merge_bunny import bunny_run  # skips where Bunny is not


def sharpen(loaded):
    """Make attention tell tokens and layers apart."""
    with torch.no_grad():
        for layer in find_decoder_layers(loaded.model).modules:
            for name, parameter in layer.self_attn.named_parameters():
                if parameter.dim() > 1 and any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                    parameter.mul_(6)
    return loaded


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "phi-1.5"])
def test_all_metrics_agree_with_the_reference(tmp_path, model_type):
    files = write_bunny(tmp_path / "tiny", model_type)
    run = bunny_run(files, tmp_path / "bunny-lora")
    data = tmp_path / "mixed.json"
    data.write_text(json.dumps(mixed_records([f"{i}.png" for i in range(6)])))
    loaded = sharpen(load(run, files.backbone, device="cpu"))
    eager = sharpen(load(run, files.backbone, device="cpu", attn_implementation="eager"))
    samples, _ = read_samples([data], files.images)
    plan = Plan([samples[i : i + 3] for i in range(0, len(samples), 3)], ACTIVATION_METRICS, None, 50, tmp_path / "scores.json", {})
    found = run_pass(loaded, plan, resumed=False)
    reference = reference_scores(eager, [embed_inputs(eager, sample, None) for sample in samples])
    for name in ACTIVATION_METRICS:
        assert found.sums.scores(name) == pytest.approx(reference[name], abs=1e-5), name
    assert max(reference["image_attention"]) - min(reference["image_attention"]) > 1e-3
