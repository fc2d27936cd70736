"""Records and images that would end training after the weights are loaded: refused before, with the record's name."""

import json
from argparse import Namespace

import pytest
from PIL import Image

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import LlavaRegionError, processes
from llava_region import train as region_train
from llava_region.training.run_data import check_batch
from tests.helpers.command_line import run
from tests.helpers.training_runs import LORA, llava_flags


@pytest.fixture
def checked(tiny, tmp_path, capsys, monkeypatch):
    """Train on records with changed flags up to where weights would load; images are in `tmp_path`."""
    import llava.train.train as upstream

    monkeypatch.setattr(upstream, "train", lambda attn_implementation=None: print("went on to train"))
    monkeypatch.setattr("llava_region.training.finish.finish", lambda run: None)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    def check(records, **changes):
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records))
        flags = llava_flags(tiny, tmp_path / "out", **{**LORA, "data_path": path, "image_folder": tmp_path, **changes})
        return run(capsys, "llava", *flags, "--tune_layers", "1,6", main=region_train.main)

    return check


def refused(ran) -> str:
    assert ran.code == 2 and "went on to train" not in ran.out and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran
    return ran.err


def accepted(ran) -> str:
    assert ran.code == 0 and "went on to train" in ran.out and not ran.err, ran
    return ran.out


def record(question="<image>\nWhat is it?", answer="A circle", image="a.png", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**({"image": image} if image else {}), "conversations": turns, **more}


GOOD, TEXT = record(), record(question="Hi", image=None)


def test_half_a_character(checked):
    line = refused(checked([GOOD, record(answer="half \ud83d", id="h")]))
    assert "record 1 (id h) of" in line and "half of a character (a lone surrogate, such as '\\ud83d')" in line
    line = refused(checked([record(question="<image>\udfff")], dry_run=True))
    assert "record 0 of" in line and "half of a character" in line


@pytest.mark.parametrize("words", ["", " ", "\n\t\u3000"])
def test_records_without_a_word(checked, words):
    """LLaVA's sampler asserts that no record has a length of zero."""
    blank = record(question=words, answer=words, image=None, id=4)
    line = refused(checked([GOOD, GOOD, blank]))
    assert "record 2 (id 4) of" in line and "has no word in any turn, which --group_by_modality_length True does not take" in line
    accepted(checked([GOOD, GOOD, blank], group_by_modality_length=False))
    accepted(checked([GOOD, GOOD, record(question=words, answer="A circle", image=None)]))


def test_captions(checked):
    caption = {"version": "plain"}
    accepted(checked([record(question="<image>"), record(question="Describe\n<image>", answer="")], **caption))
    takes = "is not an image with its caption, two turns with '<image>' in the first, as --version plain takes them"
    more = record(id="three")
    more["conversations"] = more["conversations"] + [{"from": "human", "value": "And?"}]
    for bad in (TEXT, record(question="Describe"), more, record(question="Draw", answer="<image>")):
        line = refused(checked([record(question="<image>"), bad], **caption))
        assert "record 1" in line and takes in line
    line = refused(checked([GOOD, record(answer="or <image>", image=None)], **caption))
    assert "places '<image>' in both turns, which would shift the images of the samples after it" in line


def test_an_empty_question_first(checked):
    line = refused(checked([GOOD, record(question="", image=None)], version="llava_llama_2"))
    assert "record 1 of" in line and "begins with an empty question, which --version llava_llama_2 does not take" in line
    accepted(checked([GOOD, TEXT], version="llava_llama_2"))


def test_less_than_a_batch(checked, monkeypatch):
    line = refused(checked([GOOD] * 3, dataloader_drop_last=True))
    assert "has 3 records, which --dataloader_drop_last True leaves out, as a batch has 4" in line
    accepted(checked([GOOD] * 3))
    accepted(checked([GOOD] * 4, dataloader_drop_last=True, gradient_accumulation_steps=8))
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    args = Namespace(per_device_train_batch_size=4, dataloader_drop_last=True)
    check_batch(args, 8, "data.json")
    with pytest.raises(LlavaRegionError, match=r"as a batch has 8 \(--per_device_train_batch_size 4, 2 processes\)"):
        check_batch(args, 7, "data.json")


@pytest.mark.parametrize("size", [(30, 1), (1, 30), (30, 3), (1, 1), (30, 2), (3, 3)])
def test_flat_pictures(checked, tmp_path, size):
    """Their height is taken for colours, but where padding makes them square."""
    Image.new("RGB", size).save(tmp_path / "flat.png")
    records = [GOOD, record(image="flat.png")]
    for aspect, side in (("pad", max(size)), ("square", size[1])):
        ran = checked(records, image_aspect_ratio=aspect)
        if side in (1, 3):
            assert f"flat.png (of {size[0]} x {size[1]} pixels, a height that is taken for colour channels)" in refused(ran)
        else:
            accepted(ran)


def test_image_names(checked, tmp_path):
    assert "record 1 of" in (line := refused(checked([GOOD, record(image="b\ud800.png")]))) and "no file can be called" in line
    assert "'image' that is not a file name" in refused(checked([GOOD, record(image=None) | {"image": ""}]))
    (tmp_path / "a.png").rename(tmp_path / "a\udcff.png")
    accepted(checked([record(image="a\udcff.png")]))


def test_images_and_their_places(checked):
    line = next(
        line
        for line in accepted(checked([GOOD] * 3 + [record(question="What?", id="u")])).splitlines()
        if "places" in line or "place" in line
    )
    assert line.startswith("placeholders: 1 records have an image and no '<image>' in their text") and "(record 3 (id u))" in line
    assert "placeholders  " in checked([GOOD] * 3 + [record(image=None)], dry_run=True).out
    for bad in (record(question="What?"), record(image=None)):
        assert "2 records have" in refused(checked([GOOD] * 9 + [bad] * 2))
    assert "placeholders" not in accepted(checked([GOOD, TEXT]))


def test_a_text_of_ten_megabytes(checked):
    """Upstream cuts it, and trains the rest. Its slow tokenizer takes a minute for it, so the sample goes without."""
    said = accepted(checked([GOOD] * 3 + [record(answer="short words " * 870_000)]))
    assert "3 of 4 records: all have a label to train" in said and "0 cut to 512" in said
    said = accepted(checked([GOOD] * 3 + [record(answer="short words " * 2_000)]))
    assert "4 of 4 records: all have a label to train" in said and "1 cut to 512" in said
