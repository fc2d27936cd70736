"""The preflight tokenises as training does: ids and labels equal those of the dataset that upstream's own train() builds."""

import json
from argparse import Namespace

import pytest
import torch

pytest.importorskip("llava.train.train")

import llava.train.train as upstream_module

from llava_region import upstreams
from llava_region.training import preflight
from llava_region.training.sampled_records import places
from tests.helpers.training_records import CAPTIONS, RECORDS
from tests.helpers.training_runs import llava_flags
from tests.helpers.upstream_data import what_train_builds


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"mm_use_im_start_end": True}, {"mm_use_im_patch_token": True}, {"version": "v0"}, {"version": "v0.5"}, {"version": "v1_mmtag"},
        {"version": "llava_llama_2"}, {"version": "llava_v0"}, {"version": "mpt"}, {"version": "plain"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "v1",
)  # fmt: skip
def test_ids_and_labels_are_those_of_train(tiny, tmp_path, monkeypatch, changes):
    records = CAPTIONS if changes.get("version") == "plain" else RECORDS
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = llava_flags(tiny, tmp_path / "out", **{"data_path": tmp_path / "data.json", "model_max_length": 400, **changes})
    built = what_train_builds(upstream_module, "LLaVATrainer", flags, monkeypatch)
    upstream = upstreams.get("llava")
    args = preflight.parse(upstream.argument_classes(), flags)
    before = upstream_module.conversation_lib.default_conversation
    with upstream.tokenisation(args, {}) as tokenisation:
        for number, record in enumerate(records):
            ids, labels = tokenisation.tokenise(record)
            theirs = built["train_dataset"][number]
            assert torch.equal(ids, theirs["input_ids"]) and torch.equal(labels, theirs["labels"]), record["id"]
    assert upstream_module.conversation_lib.default_conversation is before
    assert records[0]["conversations"] == json.loads((tmp_path / "data.json").read_text())[0]["conversations"]


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_places_after_the_images_are_those_of_the_model(tiny, tmp_path, monkeypatch, feature):
    """Where labels stand once image features are in, and what is cut: the model's own merge, on the batch of its own collator."""
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    changes = {"data_path": tmp_path / "data.json", "model_max_length": 200, "mm_vision_select_feature": feature}
    flags = llava_flags(tiny, tmp_path / "out", **changes)
    built = what_train_builds(upstream_module, "LLaVATrainer", flags, monkeypatch)
    model = built["model"].float()
    model.get_vision_tower().float()
    upstream = upstreams.get("llava")
    args = preflight.parse(upstream.argument_classes(), flags)
    cut = 0
    with upstream.tokenisation(args, {}) as tokenisation:
        assert tokenisation.tokens_per_image == 16 + (feature == "cls_patch")
        for number, record in enumerate(RECORDS):
            ids, labels = tokenisation.tokenise(record)
            at = places(ids, ids < 0, tokenisation.tokens_per_image)
            kept = (labels != -100) & (ids >= 0) & (at < 200)
            batch = built["data_collator"]([built["train_dataset"][number]])
            with torch.no_grad():
                *_, merged = model.prepare_inputs_labels_for_multimodal(
                    batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
                )
            assert (merged[0] != -100).nonzero().flatten().tolist() == at[kept].tolist(), record["id"]
            assert merged.shape[1] == min(200, int(at[-1]) + 1)
            cut += int(at[-1]) >= 200
    assert cut


def test_a_tower_that_is_not_here_counts_as_one_token(tiny, tmp_path):
    upstream = upstreams.get("llava")
    args = preflight.parse(upstream.argument_classes(), llava_flags(tiny, tmp_path / "out", vision_tower="openai/none"))
    with upstream.tokenisation(args, {}) as tokenisation:
        assert tokenisation.tokens_per_image == 1
    with upstream.tokenisation(args, {"mm_vision_tower": str(tiny.vision_tower)}) as tokenisation:  # a model that has a tower keeps it
        assert tokenisation.tokens_per_image == 16


def picture_problem(width: int, height: int, aspect: str | None) -> str | None:
    return upstreams.get("llava").picture_problem(Namespace(image_aspect_ratio=aspect), width, height)


@pytest.mark.parametrize("aspect", ["pad", "square", None])
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 40), (40, 2), (3, 40), (40, 3), (1, 1), (3, 3), (3, 1), (2, 2), (4, 4), (5, 9)])
def test_pictures_are_refused_where_upstream_garbles_them(tiny, tmp_path, monkeypatch, size, aspect):
    """Right is what the processor makes of the same picture when it is told where the colours are."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    picture = Image.effect_noise(size, 90).convert("RGB")
    processor = CLIPImageProcessor.from_pretrained(tiny.vision_tower)
    if aspect == "pad":
        from llava.mm_utils import expand2square

        picture = expand2square(picture, (0, 0, 0))
    right = processor.preprocess(picture, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
    try:
        theirs = processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
        good = torch.equal(theirs, right)
    except ValueError:
        good = False
    assert (picture_problem(*size, aspect) is None) == good
