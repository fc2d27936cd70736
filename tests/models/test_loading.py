"""Finished models against upstream LLaVA's own loader, preprocessing and generation, on the tiny model."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("llava.model")

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_region.checkpoints.model_source import ModelSource
from llava_region.data.labels import IGNORE_INDEX
from llava_region.errors import LlavaRegionError
from llava_region.models import load
from llava_region.training.trainer_flags import computes_fp16_on_cpu
from tests.helpers import command_line as helpers

PATCHES = 16  # image tokens an image has in the tiny vision tower


@pytest.fixture(scope="module")
def loaded(llava_checkpoint):
    return load(llava_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def records(tiny):
    return json.loads(tiny.data.read_text())


def picture(tiny, record):
    return Image.open(tiny.images / record["image"])


def questions(loaded, tiny, records, count):
    """Prompts and pixel values of the first records, with and without images, of different lengths."""
    ids, images = [], []
    for i, record in enumerate(records[:count]):
        text = "".join(turn["value"] for turn in record["conversations"][:1]).replace("<image>\n", "") + " please" * i
        images.append([loaded.pixel_values(picture(tiny, record))] if "image" in record else [])
        ids.append(loaded.input_ids(loaded.prompt(text, images=len(images[-1]))))
    return ids, images


def logits(model, ids, images):
    return helpers.logits(model, input_ids=ids.unsqueeze(0), images=images)


def test_logits_equal_those_of_upstreams_own_loader(llava_checkpoint, tiny, records):
    from llava.model.builder import load_pretrained_model

    theirs_tokenizer, theirs, processor, _ = load_pretrained_model(str(llava_checkpoint), None, "llava-tiny", device_map=None, device="cpu")
    ours = load(llava_checkpoint, device="cpu", dtype="fp16")
    record = next(r for r in records if "image" in r)
    ids = ours.input_ids(ours.prompt("What shape is it?", images=1))
    pixels = ours.pixel_values(picture(tiny, record)).unsqueeze(0).half()
    assert ours.model.dtype == ours.model.get_vision_tower().dtype == torch.float16
    assert len(ours.tokenizer) == len(theirs_tokenizer)
    if not computes_fp16_on_cpu():  # the numbers are in fp16 all the same
        theirs, pixels = theirs.float(), pixels.float()
        ours.model.float()
    assert torch.equal(logits(ours.model, ids, pixels), logits(theirs, ids, pixels))
    assert processor.image_mean == ours.image_processor.image_mean


def test_a_lora_run_on_its_base_equals_pefts_merge(lora_run, tiny):
    from peft import PeftModel

    from tests.helpers.finished_models import llava_model

    ours = load(lora_run, tiny.backbone, device="cpu")
    theirs = PeftModel.from_pretrained(llava_model(tiny), lora_run).merge_and_unload().eval()
    ids = ours.input_ids(ours.prompt("What shape?", images=1))
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.allclose(logits(ours.model, ids, pixels), logits(theirs, ids, pixels), atol=1e-5)
    assert not torch.allclose(logits(ours.model, ids, pixels), logits(llava_model(tiny).eval(), ids, pixels), atol=1e-2)


def test_a_lora_run_is_merged_in_the_asked_dtype(lora_run, tiny, monkeypatch):
    from peft import PeftModel

    real = PeftModel.from_pretrained

    def with_fp32_adapters(*args, **options):
        """As newer PEFT loads them."""
        model = real(*args, **options)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", with_fp32_adapters)
    ours = load(lora_run, tiny.backbone, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in ours.model.parameters()) and not ours.model.training


def test_a_qlora_run_goes_onto_the_base_unquantised(lora_run, tiny, tmp_path):
    shutil.copytree(lora_run, tmp_path / "run")
    config = json.loads((lora_run / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    ours = load(tmp_path / "run", tiny.backbone, device="cpu")
    theirs = load(lora_run, tiny.backbone, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_any_folder_name_will_do_and_a_checkpoint_borrows_the_runs_config(lora_run, tiny, tmp_path):
    run = tmp_path / "mpt-mistral"
    shutil.copytree(lora_run, run / "checkpoint-3")
    (run / "checkpoint-3" / "config.json").rename(run / "config.json")
    ours = load(run / "checkpoint-3", tiny.backbone, device="cpu")
    assert ours.upstream == "llava" and ours.template == "vicuna_v1" and ours.num_layers == 8
    assert ModelSource.of(tiny.backbone).upstream is None


def test_a_pretrained_projector_loads_on_its_backbone(lora_run, tiny, tmp_path):
    projector = torch.load(lora_run / "non_lora_trainables.bin", weights_only=True)
    shutil.copy(lora_run / "config.json", tmp_path)
    torch.save({k.removeprefix("base_model.model."): v + 1 for k, v in projector.items()}, tmp_path / "mm_projector.bin")
    ours = load(tmp_path, tiny.backbone, device="cpu")
    stored = projector["base_model.model.model.mm_projector.0.bias"] + 1
    assert torch.equal(ours.model.get_model().mm_projector[0].bias, stored)


def test_refused_before_weights_load(lora_run, llava_checkpoint, tiny, tmp_path):
    with pytest.raises(LlavaRegionError, match="give the model it was trained on with --base"):
        load(lora_run)
    with pytest.raises(LlavaRegionError, match="leave out --base"):
        load(llava_checkpoint, tiny.backbone)
    with pytest.raises(LlavaRegionError, match=r"unknown template 'vicuna'; allowed: .*vicuna_v1"):
        load(llava_checkpoint, template="vicuna")
    with pytest.raises(LlavaRegionError, match="unknown dtype 'int4'"):
        load(llava_checkpoint, dtype="int4")
    with pytest.raises(LlavaRegionError, match="unknown device 'gpu'; give cpu"):
        load(llava_checkpoint, device="gpu")
    with pytest.raises(LlavaRegionError, match=r"no device 'cuda:99': torch sees \d+ GPUs"):
        load(llava_checkpoint, device="cuda:99")
    with pytest.raises(LlavaRegionError, match=r"holds no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {}, "model_type": "llava"}, "llava-hf"),
        ({"model_type": "llava_mpt"}, "model type 'llava_mpt'"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"mm_vision_tower": "/no/such/tower"}, "vision tower /no/such/tower"),
        ({"num_hidden_layers": 9}, r"lacks model\.layers\.8"),
        ({"num_hidden_layers": 7}, "beyond the layers"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(llava_checkpoint, tmp_path, change, message):
    for file in llava_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((llava_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LlavaRegionError, match=message):
        load(tmp_path, device="cpu")


def test_an_adapter_that_does_not_fit_is_refused(lora_run, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    tensors = load_file(run / "adapter_model.safetensors")
    module = next(iter(tensors)).partition(".lora_")[0]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.")}
    save_file(rest, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlavaRegionError, match="does not fit its base: base_model"):
        load(run, tiny.backbone, device="cpu")
    (run / "non_lora_trainables.bin").unlink()
    with pytest.raises(LlavaRegionError, match="non_lora_trainables"):
        load(run, tiny.backbone, device="cpu")


class Ran(Exception):
    """Raised by code that a pickle carried."""


class Carrier:
    def __reduce__(self):
        return exec, ("from tests.models.test_loading import Ran; raise Ran",)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("-inf"), "float32"), (1e8, "float16")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.lora_B", "model.mm_projector.2.bias"])
def test_what_is_not_finite_is_refused(lora_run, tiny, tmp_path, name, value, dtype):
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    file = run / ("adapter_model.safetensors" if "lora" in name else "non_lora_trainables.bin")
    tensors = load_file(file) if "lora" in name else torch.load(file, weights_only=True)
    tensors[f"base_model.model.{name}{'.weight' if 'lora' in name else ''}"].view(-1)[0] = value
    save_file(tensors, file) if "lora" in name else torch.save(tensors, file)
    if dtype == "float16":
        load(run, tiny.backbone, device="cpu", dtype="float32")
    with pytest.raises(LlavaRegionError, match=f"'{name.partition('.lora_')[0]}' .* holds NaN or infinity"):
        load(run, tiny.backbone, device="cpu", dtype=dtype)


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "adapter_model.bin", "pytorch_model.bin"])
def test_no_code_in_a_file_is_run(lora_run, llava_checkpoint, tiny, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(llava_checkpoint if name == "pytorch_model.bin" else lora_run, folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink() if name != "non_lora_trainables.bin" else None
    torch.save({"model.norm.weight": Carrier()}, folder / name)
    with pytest.raises(LlavaRegionError, match="no code of it was run"):
        load(folder, None if name == "pytorch_model.bin" else tiny.backbone, device="cpu")


def test_a_damaged_checkpoint_is_refused(llava_checkpoint, tmp_path):
    shutil.copytree(llava_checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LlavaRegionError, match="truncated"):
        load(tmp_path / "model", device="cpu")


def test_pixels_are_upstreams_padded_square(loaded, tiny):
    wide = Image.new("L", (80, 20), 255)
    pixels = loaded.pixel_values(wide)
    assert pixels.shape == (3, 56, 56)
    assert pixels[:, 0, 0].abs().max() < 0.02  # the processor's mean colour, in whole steps of 1/255
    assert pixels[:, 28, 28].gt(1).all()


def test_an_upstream_whose_script_does_not_pad(loaded, monkeypatch):
    """As Bunny's for ScienceQA; LLaVA's pad for every benchmark."""
    wide = Image.linear_gradient("L").resize((80, 20)).convert("RGB")
    assert loaded.side.unpadded_tasks == () and torch.equal(loaded.pixel_values(wide, "scienceqa"), loaded.pixel_values(wide))
    monkeypatch.setattr(type(loaded.side), "unpadded_tasks", ("scienceqa",))
    plain = loaded.image_processor.preprocess(wide, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(loaded.pixel_values(wide, "scienceqa"), plain)
    assert not torch.equal(loaded.pixel_values(wide, "mmbench"), plain) and loaded.model.config.image_aspect_ratio == "pad"


@pytest.mark.parametrize("side", ["right", "left"])
def test_image_mask_has_the_true_positions(loaded, side):
    """Images at the start, in the middle, at the end, two of them, none: one padded batch."""
    text = torch.arange(5, 12)
    image = torch.tensor([-200])
    rows = [torch.cat(parts) for parts in ([image, text], [text, image, text], [text, image], [image, text[:2], image, text], [text[:3]])]
    torch.manual_seed(0)
    pictures = [[torch.randn(3, 56, 56) for _ in range(int((row == -200).sum()))] for row in rows]
    labels = [torch.where(row == -200, IGNORE_INDEX, row + 100) for row in rows]
    batch = loaded.embed(rows, pictures, labels, padding_side=side)
    longest = 2 * PATCHES + 9
    assert batch.inputs_embeds.shape == (5, longest, 64) and batch.image_mask.dtype == torch.bool
    for i, row in enumerate(rows):
        expected = torch.cat([torch.full((PATCHES,), -200) if t == -200 else t.view(1) for t in row])
        pad = torch.zeros(longest - len(expected), dtype=torch.long)
        full = torch.cat([expected, pad] if side == "right" else [pad, expected])
        assert torch.equal(batch.image_mask[i], full == -200)
        assert torch.equal(batch.attention_mask[i], full != 0)
        assert torch.equal(batch.position_ids[i][full != 0], torch.arange(len(expected)))
        assert torch.equal(batch.labels[i], torch.where(full > 0, full + 100, IGNORE_INDEX))
        embedded = loaded.model.get_model().embed_tokens(full[full > 0])
        assert torch.equal(batch.inputs_embeds[i][full > 0], embedded)
        features = loaded.model.encode_images(torch.stack(pictures[i])).flatten(0, 1) if pictures[i] else torch.zeros(0, 64)
        assert torch.allclose(batch.inputs_embeds[i][full == -200], features, atol=1e-5)
        assert batch.inputs_embeds[i][full == 0].eq(0).all()
    assert loaded.model.config.tokenizer_padding_side == "right"


def test_a_text_batch_equals_upstreams_with_blank_images(loaded):
    rows = [torch.arange(5, 12), torch.arange(9, 12)]
    ours = loaded.embed(rows, [[], []], rows, padding_side="left")
    theirs = loaded.embed([*rows, torch.tensor([7, -200])], [[], [], [torch.zeros(3, 56, 56)]], [*rows, torch.tensor([7, 7])], "left")
    for i, row in enumerate(rows):
        assert torch.equal(ours.inputs_embeds[i, -len(row) :], theirs.inputs_embeds[i, -len(row) :])
        assert torch.equal(ours.labels[i, -len(row) :], theirs.labels[i, -len(row) :])
    assert not ours.image_mask.any() and ours.attention_mask.sum().item() == 10
    assert ours.position_ids[1].tolist() == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("with_image", [True, False])
def test_cut_at_the_models_maximum_length(loaded, with_image):
    row = torch.cat([torch.arange(5, 9), torch.tensor([-200] if with_image else [9]), torch.arange(5, 12)])
    pictures = [[torch.zeros(3, 56, 56)] if with_image else []]
    loaded.model.config.tokenizer_model_max_length = 10
    try:
        batch = loaded.embed([row], pictures, [row])
    finally:
        loaded.model.config.tokenizer_model_max_length = 512
    assert batch.inputs_embeds.shape[:2] == batch.labels.shape == (1, 10)
    assert batch.image_mask[0].tolist() == [False] * 4 + [with_image] * 6


def test_images_and_placeholders_must_agree(loaded):
    with pytest.raises(LlavaRegionError, match="sample 1 has 1 image placeholders and 0 images"):
        loaded.embed([torch.arange(3, 5), torch.tensor([-200, 4])], [[], []])


@pytest.mark.parametrize("template", [None, "plain", "mistral_instruct", "mpt"])
def test_an_example_equals_upstreams_training_sample(llava_checkpoint, loaded, records, template):
    from llava import conversation
    from llava.train.train import preprocess, preprocess_multimodal

    name = template or "vicuna_v1"
    ours = copy.copy(loaded)
    ours.template = name
    before = conversation.default_conversation
    conversation.default_conversation = conversation.conv_templates[name]
    try:
        late = {"image": "x", "conversations": [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "red"}]}
        for record in (r for r in [late, *records[:20]] if template != "plain" or "image" in r):
            turns = copy.deepcopy([record["conversations"]])
            if "image" in record:
                turns = preprocess_multimodal(turns, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
            theirs = preprocess(turns, ours.tokenizer, has_image="image" in record)
            conversation.default_conversation = conversation.conv_templates["v0"]  # ours must not depend on it
            ids, labels = ours.example(record)
            assert conversation.default_conversation is conversation.conv_templates["v0"]
            conversation.default_conversation = conversation.conv_templates[name]
            assert torch.equal(ids, theirs["input_ids"][0]) and torch.equal(labels, theirs["labels"][0])
    finally:
        conversation.default_conversation = before


def test_labels_are_the_answer_and_eos(loaded, records):
    ids, labels = loaded.example(next(r for r in records if r["id"] == "sum-3"))
    answer = ids[labels != IGNORE_INDEX]
    assert loaded.tokenizer.decode(answer, skip_special_tokens=True).strip() == "7"
    assert answer[-1] == loaded.tokenizer.eos_token_id and torch.equal(labels[labels != IGNORE_INDEX], answer)
    assert (ids == -200).sum() == 0


def test_a_batch_generates_what_single_prompts_do(loaded, tiny, records):
    ids, images = questions(loaded, tiny, records, 6)
    assert len({len(i) for i in ids}) > 3 and any(images) and not all(images)
    single = [loaded.generate([i], [p], 12)[0] for i, p in zip(ids, images, strict=True)]
    assert loaded.generate(ids, images, 12) == single
    assert len(set(single)) > 1 and all(single)


def test_generation_equals_upstreams(loaded, tiny, records):
    record = next(r for r in records if "image" in r)
    ids = loaded.input_ids(loaded.prompt("What shape is it?", images=1))
    pixels = loaded.pixel_values(picture(tiny, record))
    theirs = loaded.model.generate(ids.unsqueeze(0), images=pixels.unsqueeze(0), do_sample=False, max_new_tokens=12, use_cache=True)
    assert loaded.generate([ids], [[pixels]], 12) == [loaded.tokenizer.batch_decode(theirs, skip_special_tokens=True)[0].strip()]


def test_answers_end_at_eos_and_at_the_templates_stop_text(loaded, tiny, records):
    ids, images = questions(loaded, tiny, records, 4)
    pixels = torch.stack(images[0])
    tokens = loaded.model.generate(ids[0].unsqueeze(0), images=pixels, do_sample=False, max_new_tokens=12)[0, 1:].tolist()
    long = loaded.generate(ids, images, 12)
    before = loaded.model.generation_config.eos_token_id
    loaded.model.generation_config.eos_token_id = [tokens[4], 2]
    try:
        short = loaded.generate(ids, images, 12)
    finally:
        loaded.model.generation_config.eos_token_id = before
    assert short[0] == loaded.tokenizer.decode(tokens[: tokens.index(tokens[4]) + 1], skip_special_tokens=True).strip() != long[0]
    stop = long[0][len(long[0]) // 2]
    cut = copy.copy(loaded)
    cut.side = SimpleNamespace(stop_text=lambda template: stop, embed=loaded.side.embed)
    assert cut.generate(ids, images, 12)[0] == long[0].split(stop)[0].strip()


def test_a_plain_language_model_takes_text_only(tiny, records):
    backbone = load(tiny.backbone, device="cpu")
    assert backbone.upstream is None and backbone.image_processor is None and backbone.num_layers == 8
    ids, labels = backbone.example(next(r for r in records if "image" not in r))
    batch = backbone.embed([ids], [[]], [labels])
    with torch.no_grad():
        ours = backbone.model(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask).logits
        assert torch.allclose(ours, backbone.model(input_ids=ids.unsqueeze(0)).logits, atol=1e-5)
    with pytest.raises(LlavaRegionError, match="give it text only"):
        backbone.pixel_values(Image.new("RGB", (8, 8)))
    assert load(tiny.backbone, device="cpu", template="plain").prompt("a", 0) == "a\n"
