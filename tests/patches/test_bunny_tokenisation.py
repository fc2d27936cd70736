"""The preflight tokenises as the real Bunny's train() does, for each of its model types. Needs BUNNY_ROOT."""
# ruff: noqa: E402 - Bunny can be imported only after the shims

import json

import pytest
import torch

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

import bunny.train.train as upstream_module

from llava_region import train as region_train
from llava_region import upstreams
from llava_region.training import preflight
from llava_region.training.sampled_records import places
from tests.helpers.bunny_models import MODEL_TYPES, bunny_flags, write_bunny
from tests.helpers.command_line import run
from tests.helpers.training_records import CAPTIONS, RECORDS
from tests.helpers.upstream_data import what_train_builds


@pytest.fixture(scope="module")
def tiny_bunny(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("bunny"), {}

    def files(model_type):
        if model_type not in made:
            made[model_type] = write_bunny(folder, model_type)
        return made[model_type]

    return files


@pytest.mark.parametrize("plain", [False, True], ids=["own", "plain"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ids_labels_and_places_are_those_of_train(tiny_bunny, tmp_path, monkeypatch, model_type, plain):
    records = CAPTIONS if plain else RECORDS
    (tmp_path / "data.json").write_text(json.dumps(records))
    files = tiny_bunny(model_type)
    changes = {"data_path": tmp_path / "data.json", "model_max_length": 200, **({"version": "plain"} if plain else {})}
    flags = bunny_flags(files, tmp_path / "out", **changes)
    built = what_train_builds(upstream_module, "BunnyTrainer", flags, monkeypatch)
    model = built["model"].float()
    model.get_vision_tower().float()
    upstream = upstreams.get("bunny")
    args = preflight.parse(upstream.argument_classes(), flags)
    with upstream.tokenisation(args, {}) as tokenisation:
        assert tokenisation.tokens_per_image == 16
        for number, record in enumerate(records):
            ids, labels = tokenisation.tokenise(record)
            theirs = built["train_dataset"][number]
            assert torch.equal(ids, theirs["input_ids"]) and torch.equal(labels, theirs["labels"]), record["id"]
            at = places(ids, ids < 0, tokenisation.tokens_per_image)
            batch = built["data_collator"]([theirs])
            with torch.no_grad():
                *_, merged = model.prepare_inputs_labels_for_multimodal(
                    batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
                )
            kept = (labels != -100) & (ids >= 0) & (at < 200)
            assert (merged[0] != -100).nonzero().flatten().tolist() == at[kept].tolist(), record["id"]


def test_all_masked_is_refused(tiny_bunny, tmp_path, capsys):
    """Phi-2's template with Llama 3's tokenizer, which begins texts with a token of its own and knows no <|endoftext|>."""
    flags = bunny_flags(tiny_bunny("llama3-8b"), tmp_path / "out", version="bunny", dry_run=True)
    ran = run(capsys, "bunny", *flags, "--tune_layers", "1", main=region_train.main)
    assert ran.code == 2 and "have no label to train: " in ran.err and "as --version does not fit the tokenizer" in ran.err


def test_dry_run_says_what_the_sample_becomes(tiny_bunny, tmp_path, capsys):
    flags = bunny_flags(tiny_bunny("phi-2"), tmp_path / "out", dry_run=True)
    ran = run(capsys, "bunny", *flags, "--tune_layers", "1", main=region_train.main)
    assert ran.code == 0 and "28 of 28 records: all have a label to train" in ran.out and "0 in 4, 1 in 24" in ran.out
