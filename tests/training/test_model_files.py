"""The files that a run names: backbone, tokenizer, vision tower, projector. Refused before weights load, in a dry run too."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import train as region_train
from tests.helpers.training_runs import llava_flags


@pytest.fixture(params=[False, True], ids=["run", "dry"])
def refused(request, line_of):
    """Run with changed flags, really or dry; returns the error line."""

    def run(**changes) -> str:
        line = line_of(**{"dry_run": request.param, **changes})
        assert line is not None, "went on to train"
        return line

    return run


@pytest.fixture
def backbone(tiny, tmp_path):
    """A copy of the backbone to spoil."""
    return shutil.copytree(tiny.backbone, tmp_path / "backbone")


@pytest.fixture
def tower(tiny, tmp_path):
    """A copy of the vision tower to spoil."""
    return shutil.copytree(tiny.vision_tower, tmp_path / "tower")


def edit_json(file, **changes):
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def in_cache(folder, name, cache, leave_out=()):
    """Put a folder under a hub name into a cache; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return shutil.copytree(folder, repository / "snapshots" / "abc", ignore=shutil.ignore_patterns(*leave_out))


# -- the backbone


def test_another_model_as_backbone(refused, tiny, tmp_path):
    line = refused(model_name_or_path=tiny.vision_tower)
    assert "is of model type 'clip_vision_model', which LLaVA would load as Llama" in line
    gemma = shutil.copytree(tiny.backbone, tmp_path / "gemma")  # its weights have Llama's names
    for kind in ("gemma", "qwen2", "mpt"):
        edit_json(gemma / "config.json", model_type=kind)
        assert f"is of model type '{kind}', which LLaVA would load as Llama" in refused(model_name_or_path=gemma)
    edit_json(gemma / "config.json", model_type="llama", num_hidden_layers=9)
    line = refused(model_name_or_path=gemma)
    assert "is no model that LLaVA loads as LlavaLlamaForCausalLM: its weights hold no model.layers.8" in line


def test_accepted_backbones(line_of, backbone, llava_checkpoint):
    assert line_of(model_name_or_path=llava_checkpoint) is None
    for kind in ("mistral", None):
        edit_json(backbone / "config.json", model_type=kind)
        assert line_of(model_name_or_path=backbone) is None
    edit_json(backbone / "config.json", model_type="llama")
    weights = load_file(backbone / "model.safetensors")
    # as old conversions of Llama are: pickled shards, with buffers that transformers passes over
    (backbone / "model.safetensors").unlink()
    for i in range(8):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    parts = {"pytorch_model-00001-of-00002.bin": list(weights)[:30], "pytorch_model-00002-of-00002.bin": list(weights)[30:]}
    for name, keys in parts.items():
        torch.save({key: weights[key] for key in keys}, backbone / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (backbone / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert line_of(model_name_or_path=backbone) is None
    torch.save(weights, backbone / "pytorch_model-00001-of-00002.bin", _use_new_zipfile_serialization=False)  # the old format
    assert line_of(model_name_or_path=backbone) is None


def test_a_backbone_with_tied_embeddings(line_of, backbone):
    """Its weights hold no head."""
    weights = load_file(backbone / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, backbone / "model.safetensors", {"format": "pt"})
    line = line_of(model_name_or_path=backbone)
    assert line and "its weights hold no lm_head.weight (1 such tensors" in line
    edit_json(backbone / "config.json", tie_word_embeddings=True)
    assert line_of(model_name_or_path=backbone) is None


def test_weights_that_do_not_fit(refused, backbone):
    weights = load_file(backbone / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, backbone / "model.safetensors", {"format": "pt"})
    line = refused(model_name_or_path=backbone)
    assert "no place in it for model.layers.0.self_attn.q_proj.bias (1 such tensors), which would be dropped" in line
    save_file({**weights, "lm_head.weight": torch.zeros(500, 64)}, backbone / "model.safetensors", {"format": "pt"})
    line = refused(model_name_or_path=backbone)
    assert "lm_head.weight has the shape (500, 64), and config.json asks for (512, 64)" in line


def test_missing_and_damaged_weights(refused, backbone):
    whole = (backbone / "model.safetensors").read_bytes()
    (backbone / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is truncated or not a safetensors file" in refused(model_name_or_path=backbone)
    (backbone / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n")
    assert "is truncated or not a safetensors file" in refused(model_name_or_path=backbone)
    (backbone / "model.safetensors").unlink()
    assert "it holds none of model.safetensors" in refused(model_name_or_path=backbone)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    (backbone / "model-00001-of-00002.safetensors").write_bytes(whole)
    assert "names model-00002-of-00002.safetensors, which is missing" in refused(model_name_or_path=backbone)
    (backbone / "model.safetensors.index.json").unlink()
    torch.save({"a": torch.zeros(1000)}, backbone / "pytorch_model.bin")
    damaged = (backbone / "pytorch_model.bin").read_bytes()
    (backbone / "pytorch_model.bin").write_bytes(damaged[:-100])
    assert "is damaged" in refused(model_name_or_path=backbone)


def test_a_hub_name_while_offline(refused, line_of, tiny, tmp_path):
    cache = tmp_path / "hub"
    in_cache(tiny.backbone, "someone/config-only", cache, leave_out=("*.safetensors",))
    line = refused(model_name_or_path="someone/config-only", cache_dir=cache)
    assert "its config.json is in the hub's cache, but not all of its weights" in line and "huggingface-cli download" in line
    in_cache(tiny.backbone, "someone/without-tokenizer", cache, leave_out=("tokenizer*", "special*"))
    assert "holds no tokenizer that can be loaded" in refused(model_name_or_path="someone/without-tokenizer", cache_dir=cache)
    in_cache(tiny.backbone, "someone/whole", cache)
    assert line_of(model_name_or_path="someone/whole", cache_dir=cache) is None


def test_a_hub_that_cannot_be_reached(line_of, tiny, tmp_path, monkeypatch):
    """Not known to be offline, with a config in the cache: transformers would look for the weights, and end in a traceback."""
    from huggingface_hub import HfApi, constants

    in_cache(tiny.backbone, "someone/config-only", tmp_path, leave_out=("*.safetensors",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def unreachable(self, name):
        raise ConnectionError(name)

    monkeypatch.setattr(HfApi, "list_repo_files", unreachable)
    flags = {"model_name_or_path": "someone/config-only", "cache_dir": tmp_path}
    assert "or cannot be reached" in line_of(**flags)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name: ["config.json", "flax_model.msgpack"])
    assert "has no weights on the hub" in line_of(**flags)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, name: ["config.json", "model.safetensors"])
    assert line_of(**flags) is None  # transformers fetches them


def test_mpt_in_a_path(refused, line_of, backbone, tmp_path, monkeypatch):
    """LLaVA loads a model as MPT by these letters: those of 'prompt' too."""
    folder = tmp_path / "prompt-tuning"
    folder.mkdir()
    backbone = shutil.move(backbone, folder / "vicuna")
    line = refused(model_name_or_path=backbone)
    assert "has 'mpt' in it, for which LLaVA would load it as MPT, but it is 'llama'" in line
    monkeypatch.chdir(folder)
    assert line_of(model_name_or_path="vicuna") is None


# -- tokenizer and vocabulary


def test_tokenizer_files(refused, backbone):
    whole = (backbone / "tokenizer.model").read_bytes()
    (backbone / "tokenizer.model").write_bytes(whole[:100])
    assert "holds no tokenizer that can be loaded" in refused(model_name_or_path=backbone)
    (backbone / "tokenizer.model").unlink()
    assert "holds no tokenizer that can be loaded" in refused(model_name_or_path=backbone)


def test_a_vocabulary_that_grows_under_lora(refused):
    """Upstream's default for --mm_use_im_patch_token. The new rows would be saved nowhere."""
    for value in (True, None):
        line = refused(mm_use_im_patch_token=value)
        assert "adds <im_patch> to the vocabulary (512 rows before, 513 after), and a LoRA run saves no rows" in line
        assert line.endswith("give --mm_use_im_patch_token False, as LLaVA's own scripts do")
    assert "adds <im_start>, <im_end> to" in refused(mm_use_im_start_end=True)
    assert "--version v0 adds [PAD] to the vocabulary" in refused(version="v0")


def test_a_vocabulary_that_grows_in_full_tuning(line_of):
    """The whole model is saved."""
    for flags in ({"mm_use_im_patch_token": True}, {"mm_use_im_start_end": True}, {"version": "v0"}):
        assert line_of(lora_enable=False, **flags) is None


def add_tokens(backbone, *tokens, rows=None, **special):
    """Add tokens to a model's tokenizer, and rows to its embeddings."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(backbone, use_fast=False)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if special:
        tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(backbone)
    if rows:
        model = LlamaForCausalLM.from_pretrained(backbone)
        model.resize_token_embeddings(rows)
        model.save_pretrained(backbone)


def test_tokens_that_are_there_already(line_of, backbone):
    """Of a model whose embeddings were resized before, nothing grows."""
    add_tokens(backbone, "<im_patch>", "<im_start>", "<im_end>", rows=516, pad_token="[PAD]")
    flags = {"mm_use_im_patch_token": True, "mm_use_im_start_end": True, "version": "v0", "model_name_or_path": backbone}
    assert line_of(**flags) is None


def test_rows_to_spare(line_of, backbone):
    """Embeddings with more rows than there are tokens: they would be cut. With exactly as many as there will be, nothing changes."""
    add_tokens(backbone, rows=520)
    line = line_of(mm_use_im_patch_token=True, model_name_or_path=backbone)
    assert line and "(520 rows before, 513 after)" in line
    assert line_of(model_name_or_path=backbone) is None
    add_tokens(backbone, rows=513)
    assert line_of(mm_use_im_patch_token=True, model_name_or_path=backbone) is None
    add_tokens(backbone, rows=514)
    assert "adds <im_start>, <im_end>" in line_of(mm_use_im_start_end=True, model_name_or_path=backbone)  # their rows are overwritten


def test_a_tokenizer_that_is_longer_than_the_embeddings(line_of, backbone):
    add_tokens(backbone, "<extra>")
    assert line_of(model_name_or_path=backbone) is None  # a token that nothing uses, such as a pad token of Vicuna's first version
    add_tokens(backbone, rows=500)
    line = line_of(model_name_or_path=backbone)
    assert line and "its tokenizer has 513 tokens, but its embeddings have 500 rows" in line and "(token 500) has none" in line
    assert line_of(model_name_or_path=backbone, lora_enable=False, mm_use_im_patch_token=True) is None  # resized


def test_a_tokenizer_without_an_unknown_token(line_of, backbone):
    (backbone / "special_tokens_map.json").unlink()
    settings = json.loads((backbone / "tokenizer_config.json").read_text())
    (backbone / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": None, "added_tokens_decoder": {}}))
    assert "has no unknown token, which LLaVA pads with" in line_of(model_name_or_path=backbone)


# -- the vision tower


def test_another_model_as_tower(refused, tiny, tower):
    assert "is no CLIP vision tower: its config.json says 'llama'; allowed: clip" in refused(vision_tower=tiny.backbone)
    edit_json(tower / "config.json", model_type="siglip_vision_model")
    assert "says 'siglip_vision_model'" in refused(vision_tower=tower)


def test_tower_files(refused, tower):
    edit_json(tower / "preprocessor_config.json", crop_size={"height": 112, "width": 112}, size={"shortest_edge": 112})
    line = refused(vision_tower=tower)
    assert "its image processor makes pictures of 112 x 112, but config.json says 56" in line
    (tower / "preprocessor_config.json").write_text("{}")  # the processor's defaults
    assert "pictures of 224 x 224" in refused(vision_tower=tower)
    (tower / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json that CLIPImageProcessor can use" in refused(vision_tower=tower)


def test_tower_weights(refused, tower):
    weights = load_file(tower / "model.safetensors")
    save_file({f"tower.{key}": value for key, value in weights.items()}, tower / "model.safetensors", {"format": "pt"})
    assert "is no CLIP vision tower: its weights hold no vision_model.embeddings.class_embedding" in refused(vision_tower=tower)
    (tower / "model.safetensors").unlink()
    assert "it holds none of model.safetensors" in refused(vision_tower=tower)


def test_the_layer_whose_features_are_taken(refused, line_of):
    for layer in (-5, 4):
        assert "has 3 layers; allowed: -4 to 3" in refused(mm_vision_select_layer=layer)
    for layer in (-4, 3, -1):
        assert line_of(mm_vision_select_layer=layer) is None


def test_hub_names_of_towers(refused, line_of, tiny, tmp_path, monkeypatch):
    name = "openai/clip-vit-large-patch14-336"
    line = refused(vision_tower=name)
    assert f"--vision_tower {name} is not a folder, and not in the hub's cache, and HF_HUB_OFFLINE is set" in line
    assert "LLaVA knows no hub name like it" in refused(vision_tower="google/siglip-so400m-patch14-384")
    # LLaVA looks for towers in the usual cache, not in --cache_dir
    in_cache(tiny.vision_tower, name, tmp_path / "elsewhere")
    assert "not in the hub's cache" in refused(vision_tower=name, cache_dir=tmp_path / "elsewhere")
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "usual"))
    in_cache(tiny.vision_tower, name, tmp_path / "usual")
    assert line_of(vision_tower=name) is None


def test_a_whole_clip_as_tower(line_of, tiny, tmp_path):
    """As openai's are: text and vision, both in one file."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig.from_pretrained(tiny.vision_tower).to_dict()
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "clip", safe_serialization=False)
    CLIPImageProcessor.from_pretrained(tiny.vision_tower).save_pretrained(tmp_path / "clip")
    assert line_of(vision_tower=tmp_path / "clip") is None


def test_going_on_from_a_llava_checkpoint(refused, line_of, llava_checkpoint, tower, tmp_path):
    """Its vision part stays what it is, while its config.json gets what the flags say."""
    start = shutil.copytree(llava_checkpoint, tmp_path / "start")
    config = json.loads((start / "config.json").read_text())
    for name, value in {"mm_projector_type": "linear", "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}.items():
        line = refused(model_name_or_path=start, **{name: value})
        assert f"--{name} {value} does not fit" in line and f"give --{name} {config.get(name, 'patch')}" in line
    assert line_of(model_name_or_path=start, vision_tower=tower) is None  # a copy of its tower
    edit_json(tower / "config.json", num_hidden_layers=2)
    assert "is another tower than the one" in refused(model_name_or_path=start, vision_tower=tower)
    edit_json(start / "config.json", mm_vision_tower=str(tmp_path / "gone"))
    line = refused(model_name_or_path=start)
    assert f"'mm_vision_tower' in {start}/config.json: {tmp_path / 'gone'} is not a folder" in line


# -- the projector


@pytest.fixture
def projector(tmp_path):
    """Writes a projector file as LLaVA's pretraining does; returns it."""

    def write(kind="mlp2x_gelu", tower_width=32, width=64, prefix="model.mm_projector.", **extra):
        torch.manual_seed(0)
        shapes = {"linear": {"": (width, tower_width)}, "mlp2x_gelu": {"0.": (width, tower_width), "2.": (width, width)}}[kind]
        tensors = {}
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}weight"], tensors[f"{prefix}{name}bias"] = torch.randn(shape), torch.randn(shape[0])
        torch.save({**tensors, **extra}, tmp_path / "mm_projector.bin")
        return tmp_path / "mm_projector.bin"

    return write


def test_accepted_projectors(line_of, projector, tiny, tmp_path):
    """Whatever stands before mm_projector, and other tensors beside; upstream loads each of them to the same weights."""
    import llava.train.train as upstream
    from transformers import HfArgumentParser

    from llava_region import upstreams

    for prefix in ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector.", "_orig_mod.module.mm_projector."):
        file = projector(prefix=prefix, **{"model.embed_tokens.weight": torch.zeros(2, 64)})
        assert line_of(pretrain_mm_mlp_adapter=file) is None
        flags = llava_flags(tiny, tmp_path / "out", pretrain_mm_mlp_adapter=file)
        model_args = HfArgumentParser(upstream.ModelArguments).parse_args_into_dataclasses(flags, return_remaining_strings=True)[0]
        config = json.loads((tiny.backbone / "config.json").read_text())
        model = upstream.LlavaLlamaForCausalLM(upstream.LlavaLlamaForCausalLM.config_class(**config))
        model.get_model().initialize_vision_modules(model_args)
        assert torch.equal(model.get_model().mm_projector[2].bias, torch.load(file)[f"{prefix}2.bias"])
    assert line_of(pretrain_mm_mlp_adapter=projector("linear"), mm_projector_type="linear") is None
    assert upstreams.get("llava").values["mm_projector_type"].holds("mlp2x_gelu")


def test_another_projector(refused, projector):
    line = refused(pretrain_mm_mlp_adapter=projector("linear"))
    assert "holds bias, weight of mm_projector, but --mm_projector_type mlp2x_gelu has 0.bias, 0.weight, 2.bias, 2.weight" in line
    assert line.endswith("give --mm_projector_type linear")
    assert refused(pretrain_mm_mlp_adapter=projector(), mm_projector_type="linear").endswith("give --mm_projector_type mlp2x_gelu")
    line = refused(pretrain_mm_mlp_adapter=projector(tower_width=48))
    assert "0.weight has the shape (64, 48), but the vision tower and the language model ask for (64, 32)" in line
    assert "0.weight has the shape (128, 32)" in refused(pretrain_mm_mlp_adapter=projector(width=128))
    assert "holds none of mm_projector" in refused(pretrain_mm_mlp_adapter=projector(prefix="multi_modal_projector."))
    assert "holds 'model.mm_projector_0.weight'" in refused(pretrain_mm_mlp_adapter=projector(prefix="model.mm_projector_"))
    nan = torch.full((64,), float("nan"))
    assert "2.bias holds values that are not finite" in refused(pretrain_mm_mlp_adapter=projector(**{"model.mm_projector.2.bias": nan}))


def test_no_file_of_tensors(refused, projector, tmp_path):
    file = projector()
    whole = file.read_bytes()
    spoilt = {
        "is empty": b"",
        "is a pointer of git-lfs; fetch the file with 'git lfs pull'": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a web page": b"<!DOCTYPE html><html></html>",
        "is truncated, or no file of tensors": whole[: len(whole) // 2],
    }
    for message, content in spoilt.items():
        file.write_bytes(content)
        assert message in refused(pretrain_mm_mlp_adapter=file)
    torch.save([1, 2], file)
    assert "is no file of named tensors" in refused(pretrain_mm_mlp_adapter=file)
    torch.save({"model.mm_projector": {"weight": torch.zeros(1)}}, file)
    assert "is no file of named tensors" in refused(pretrain_mm_mlp_adapter=file)
    assert "is not there" in refused(pretrain_mm_mlp_adapter=tmp_path)


def test_a_projector_without_the_rows_of_its_tokens(line_of, projector, backbone):
    flags = {"mm_use_im_start_end": True, "lora_enable": False}
    line = line_of(pretrain_mm_mlp_adapter=projector(), **flags)
    assert line and "takes the rows of its two tokens from --pretrain_mm_mlp_adapter" in line
    for rows in (2, 514):
        file = projector(**{"model.embed_tokens.weight": torch.zeros(rows, 64)})
        assert line_of(pretrain_mm_mlp_adapter=file, **flags) is None
    add_tokens(backbone, "<im_start>", "<im_end>", rows=514)
    assert "which the model must not have yet" in line_of(pretrain_mm_mlp_adapter=file, model_name_or_path=backbone, **flags)


def test_a_projector_that_changes_nothing(refused):
    assert "identity needs a vision tower as wide as the language model, not 32 and 64" in refused(mm_projector_type="identity")


def test_a_vocabulary_that_grows_is_saved_by_full_tuning(tiny, tmp_path):
    """For real: the new row is in the model that LLaVA loads."""
    from llava.model import LlavaLlamaForCausalLM

    flags = llava_flags(tiny, tmp_path / "out", mm_use_im_patch_token=True, max_steps=1)
    assert region_train.main(["llava", *flags, "--tune_layers", "1,6"]) == 0
    model = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 513 and model.get_input_embeddings().weight.shape[0] == 513
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"]) and saved["lm_head.weight"].shape[0] == 513


def test_a_token_without_a_row_in_a_text(line_of, backbone, tiny, tmp_path):
    """One record of many is enough to end training at its step, whether it is in the sample or not."""
    add_tokens(backbone, "<extra>")
    records = json.loads(tiny.data.read_text())
    records[-1]["conversations"][-1]["value"] += " <extra>"
    (path := tmp_path / "data.json").write_text(json.dumps(records))
    flags = {"model_name_or_path": backbone, "data_path": path, "check_records": 1}
    line = line_of(**flags)
    assert line and f"record {len(records) - 1}" in line and "holds '<extra>', token 512" in line
    assert line_of(**flags, lora_enable=False, mm_use_im_patch_token=True) is None  # resized
    add_tokens(backbone, rows=513)
    assert line_of(**flags) is None
