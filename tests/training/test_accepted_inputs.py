"""What LLaVA's own dataset makes a sample of is accepted, what it fails on is refused by name: records, templates and pictures."""

from __future__ import annotations

import contextlib
import io
import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llava.train.train")

import llava.train.train as upstream
import numpy as np
from llava.train.llava_trainer import get_modality_length_grouped_indices
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from llava_region import LlavaRegionError
from llava_region.data.check import check_data
from llava_region.patches import llava

QUESTION, ANSWER = "<image>\nwhat is it", "a blue circle"
VERSIONS = ("v1", "v1_mmtag", "llava_v0", "v0_mmtag", "plain", "llava_llama_2", "mistral_instruct", "mpt", "chatml_direct")


def human(value: Any, speaker: Any = "human", **more: Any) -> dict:
    return {"from": speaker, "value": value, **more}


def gpt(value: Any, speaker: Any = "gpt") -> dict:
    return {"from": speaker, "value": value}


def pictured(*turns: Any, **more: Any) -> dict:
    return {"id": "x", "image": "a.png", "conversations": list(turns), **more}


def talked(*turns: Any) -> dict:
    return {"id": "x", "conversations": list(turns)}


GOOD = (human(QUESTION), gpt(ANSWER))
RECORDS = {
    "as LLaVA's own": pictured(*GOOD),
    "text alone": talked(human("what"), gpt(ANSWER)),
    "four turns": pictured(*GOOD, human("and"), gpt("b")),
    "id of a number": pictured(*GOOD, id=7),
    "id of a fraction": pictured(*GOOD, id=7.5),
    "id of a list": pictured(*GOOD, id=[1]),
    "id of null": pictured(*GOOD, id=None),
    "no id": {"image": "a.png", "conversations": [*GOOD]},
    "further keys": pictured(*GOOD, model="x", width=3),
    "further keys of a turn": pictured(human(QUESTION, weight=1), gpt(ANSWER)),
    "image of null": pictured(*GOOD, image=None),
    "image without a name": pictured(*GOOD, image=""),
    "image of a number": pictured(*GOOD, image=3),
    "one image in a list": pictured(*GOOD, image=["a.png"]),
    "two images": pictured(*GOOD, image=["a.png", "a.png"]),
    "a slash at the end": pictured(*GOOD, image="a.png/"),
    "the folder": pictured(*GOOD, image="."),
    "no such file": pictured(*GOOD, image="b.png"),
    "a dot": pictured(*GOOD, image="./a.png"),
    "a folder up": pictured(*GOOD, image="../images/a.png"),
    "a name too long": pictured(*GOOD, image="a" * 300 + ".png"),
    "a line feed": pictured(*GOOD, image="a\nb.png"),
    "a null byte": pictured(*GOOD, image="a\0.png"),
    "another alphabet": pictured(*GOOD, image="形-é.png"),
    "bytes that are not UTF-8": pictured(*GOOD, image=os.fsdecode(b"\xe9.png")),
    "Human and GPT": pictured(human(QUESTION, "Human"), gpt(ANSWER, "GPT")),
    "user and assistant": pictured(human(QUESTION, "user"), gpt(ANSWER, "assistant")),
    "system first": pictured(human("be good", "system"), *GOOD),
    "gpt first": pictured(gpt("hello"), *GOOD),
    "gpt alone": pictured(gpt(QUESTION)),
    "gpt before the image": talked(gpt(QUESTION)),
    "gpt twice at first": pictured(gpt(QUESTION), gpt(ANSWER)),
    "gpt twice": pictured(*GOOD, gpt("x")),
    "human alone": pictured(human(QUESTION)),
    "human twice": pictured(human(QUESTION), *GOOD[1:], human("x"), human("y")),
    "human last": pictured(*GOOD, human("and")),
    "nobody speaks": pictured({"value": QUESTION}, {"value": ANSWER}),
    "null speaks": pictured(human(QUESTION, None), gpt(ANSWER)),
    "a list speaks": pictured(human(QUESTION, ["human"]), gpt(ANSWER)),
    "no text": pictured({"from": "human"}, gpt(ANSWER)),
    "text of null": pictured(human(QUESTION), gpt(None)),
    "text of a number": pictured(human(QUESTION), gpt(3)),
    "text of a list": pictured(human(QUESTION), gpt(["a"])),
    "text of true": pictured(human(QUESTION), gpt(True)),
    "empty question": pictured(human(""), gpt(ANSWER)),
    "empty question, text alone": talked(human(""), gpt(ANSWER)),
    "empty answer": pictured(human(QUESTION), gpt("")),
    "all empty": talked(human(""), gpt("")),
    "spaces": talked(human("  "), gpt(" ")),
    "turns of null": pictured() | {"conversations": None},
    "turns of an object": pictured() | {"conversations": {"a": 1}},
    "a turn of a list": pictured(["human", QUESTION], ["gpt", ANSWER]),
    "a turn of text": pictured(QUESTION, ANSWER),
    "no turns": pictured(),
    "image at the end": pictured(human("what is it <image>"), gpt(ANSWER)),
    "image amid": pictured(human("what <image> is"), gpt(ANSWER)),
    "image twice in a turn": pictured(human("<image><image> what"), gpt(ANSWER)),
    "image in the answer": pictured(human("what"), gpt("<image> a")),
    "image in both turns": pictured(human(QUESTION), gpt("<image> a")),
    "image inside image": pictured(human("<im<image>age> what"), gpt(ANSWER)),
    "image not placed": pictured(human("what"), gpt(ANSWER)),
    "place without an image": talked(*GOOD),
    "a tab": pictured(human("<image>\twhat"), gpt(ANSWER)),
    "another tag": pictured(human("<Image>\nwhat"), gpt(ANSWER)),
    "marks of the template": pictured(human(QUESTION + " ASSISTANT: x </s> [/INST]"), gpt(ANSWER)),
    "special tokens": pictured(human(QUESTION), gpt("<s> a </s> b")),
    "a long answer": pictured(human(QUESTION), gpt("a " * 2000)),
    "any characters": pictured(human(QUESTION + " é 模型 \U0001f600"), gpt(ANSWER)),
    "half a character": pictured(human(QUESTION), gpt("\ud83d")),
    "a list": [1],
    "null": None,
    "a text": "a.png",
}
# What LLaVA makes a sample of without an error, and trains wrongly: the templates for which that is so, and why it is refused.
WRONG = {
    "image in both turns": (VERSIONS, "would shift the images"),
    "image inside image": (VERSIONS, "would shift the images"),
    # their questions would be trained like answers: only those of 'human' are masked
    "Human and GPT": (("llava_v0", "v0_mmtag"), "not {'from': 'human'"),
    "user and assistant": (("llava_v0", "v0_mmtag"), "not {'from': 'human'"),
    "system first": (("llava_v0", "v0_mmtag"), "not {'from': 'human'"),
    "no turns": (("llava_v0", "v0_mmtag"), "has no 'conversations'"),
}


@pytest.fixture(scope="module")
def parts(tiny, tmp_path_factory) -> SimpleNamespace:
    """Tokenizer and image processor as LLaVA's train() sets them up, and a folder of images."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.backbone, use_fast=False, model_max_length=512, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    images = tmp_path_factory.mktemp("root") / "images"
    images.mkdir()
    for name in ("a.png", "a\nb.png", "形-é.png", os.fsdecode(b"\xe9.png")):
        Image.new("RGB", (20, 12), "red").save(images / name)
    return SimpleNamespace(tokenizer=tokenizer, processor=CLIPImageProcessor.from_pretrained(tiny.vision_tower), images=images)


def sampled(parts, path: Path, version: str, aspect: str, images: str | None) -> dict | Exception:
    """What LLaVA's dataset and collator make of the first record of a file; or what they, or its sampler, raise."""
    args = SimpleNamespace(
        is_multimodal=True, mm_use_im_start_end=False, image_folder=images, image_processor=parts.processor, image_aspect_ratio=aspect
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(upstream.conversation_lib, "default_conversation", upstream.conversation_lib.conv_templates[version])
        try:
            data = upstream.LazySupervisedDataset(str(path), parts.tokenizer, args)
            get_modality_length_grouped_indices(data.modality_lengths * 4, 2, 1)
            return upstream.DataCollatorForSupervisedDataset(parts.tokenizer)([data[0], data[0]])
        except Exception as e:
            return e


def refused(path: Path, version: str, aspect: str, images: str | None) -> str | None:
    """What we say of a file; None: it is accepted."""
    args = SimpleNamespace(version=version, group_by_modality_length=True, image_aspect_ratio=aspect)
    picture_problem = partial(llava.UPSTREAM.picture_problem, args)
    try:
        check_data(path, images, "all", llava.UPSTREAM.record_check(args), picture_problem)
    except LlavaRegionError as e:
        return str(e)
    return None


def both(
    parts, folder: Path, record: Any, version: str = "v1", aspect: str = "pad", images: Any = True
) -> tuple[dict | Exception, str | None]:
    path = folder / "data.json"
    path.write_text(json.dumps([record]))
    where = str(parts.images) if images is True else images
    return sampled(parts, path, version, aspect, where), refused(path, version, aspect, where)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RECORDS)
def test_records(parts, tmp_path, name, version):
    made, said = both(parts, tmp_path, RECORDS[name], version)
    versions, why = WRONG.get(name, ((), ""))
    if version in versions and not isinstance(made, Exception):
        assert said and why in said
    else:
        assert isinstance(made, Exception) == (said is not None), (made, said)
    if said:
        assert "\n" not in said and ("record 0" in said or "1 images" in said or "1 of 1 images" in said), said


@pytest.mark.parametrize(
    ("name", "images"),
    [("a.png", ""), ("{}/a.png", ""), ("{}/a.png", "/nowhere"), ("{}/a.png", None), ("a.png", "/nowhere"), ("a.png", None)],
)
def test_folders_of_images(parts, tmp_path, monkeypatch, name, images):
    """The names are joined to the folder: absolute ones need none, and an empty one is the current one."""
    monkeypatch.chdir(parts.images)
    made, said = both(parts, tmp_path, pictured(*GOOD, image=name.format(parts.images)), images=images)
    assert isinstance(made, Exception) == (said is not None), (made, said)


def noise(mode: str, size: tuple[int, int] = (20, 12)) -> Image.Image:
    """A picture of any mode, with transparency where the mode can have it."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(values[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 200)
    if mode == "P;transparent":
        picture = Image.fromarray(values[..., :3]).quantize(16)
        picture.info["transparency"] = 3
        return picture
    return Image.fromarray(values, "RGBA").convert("P" if mode == "P" else mode) if mode != "RGBA" else Image.fromarray(values, "RGBA")


MODES = {
    "png": ("1", "L", "LA", "P", "P;transparent", "RGB", "RGBA", "I;16"),
    "jpg": ("L", "RGB", "CMYK"),
    "gif": ("1", "L", "P", "P;transparent"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "ppm": ("L", "RGB"),
    "ico": ("RGBA",),
    "jp2": ("L", "RGB", "RGBA"),
}


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_modes_of_pictures(parts, tmp_path, kind, mode, aspect):
    extra = {"transparency": 3} if mode == "P;transparent" else {}
    noise(mode).save(tmp_path / f"a.{kind}", **extra)
    made, said = both(parts, tmp_path, pictured(*GOOD, image=f"a.{kind}"), aspect=aspect, images=str(tmp_path))
    assert said is None and made["images"].shape[1:] == (3, *[parts.processor.crop_size["height"]] * 2), (made, said)


def animated(path: Path) -> None:
    noise("RGB").save(path, save_all=True, append_images=[noise("RGB").rotate(90), noise("L")], duration=50)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise("RGB").save(path, exif=exif)


def cut_off(path: Path) -> None:
    noise("RGB", (200, 120)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def misnamed(path: Path) -> None:
    noise("RGB").save(path, format="PNG")


def no_picture(path: Path) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (animated, "a.gif"),
        (animated, "a.webp"),
        (animated, "a.png"),
        (animated, "a.tiff"),
        (turned, "a.jpg"),
        (turned, "a.webp"),
        (turned, "a.png"),
        (cut_off, "a.jpg"),
        (cut_off, "a.png"),
        (cut_off, "a.gif"),
        (cut_off, "a.webp"),
        (cut_off, "a.bmp"),
        (cut_off, "a.tiff"),
        (misnamed, "a.jpg"),
        (misnamed, "a"),
        (no_picture, "a.jpg"),
        (Path.touch, "a.png"),
        (Path.mkdir, "a.png"),
    ],
)
def test_files_of_pictures(parts, tmp_path, write, name, aspect):
    write(tmp_path / name)
    made, said = both(parts, tmp_path, pictured(*GOOD, image=name), aspect=aspect, images=str(tmp_path))
    assert isinstance(made, Exception) == (said is not None), (made, said)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 2), (2, 1), (1, 20), (20, 1), (3, 3), (3, 20), (20, 3), (2, 2), (4, 4), (1000, 2), (2, 1000)], ids=str
)
def test_sizes_of_pictures(parts, tmp_path, size, aspect):
    """A height of 1 or 3 is taken for colour channels: an error, or a garbled picture."""
    noise("RGB", size).save(tmp_path / "a.png")
    made, said = both(parts, tmp_path, pictured(*GOOD, image="a.png"), aspect=aspect, images=str(tmp_path))
    if isinstance(made, Exception):
        assert said and "a height that is taken for colour channels" in said
    else:
        square = Image.open(tmp_path / "a.png").convert("RGB")
        if aspect == "pad":
            side, colour = max(size), tuple(int(x * 255) for x in parts.processor.image_mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(Image.open(tmp_path / "a.png"), ((side - size[0]) // 2, (side - size[1]) // 2))
        right = parts.processor.preprocess(np.asarray(square), input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
        garbled = not bool((made["images"][0] == right).all())
        assert garbled == (said is not None), (garbled, said)
