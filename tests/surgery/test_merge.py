"""A merged run is the model that PEFT and upstream make of it, written without holding it, or refused."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_region.checkpoints.model_source import locate
from llava_region.checkpoints.tensors import Checkpoint, Computed
from llava_region.checkpoints.whole_model import savable
from llava_region.cli import main
from llava_region.errors import LlavaRegionError
from llava_region.surgery.merge import _is_vocabulary, merge
from llava_region.surgery.revert import revert
from tests.helpers import command_line as helpers
from tests.helpers.command_line import refused_without_output
from tests.helpers.finished_models import llava_model, write_lora_run

pytest.importorskip("llava.model")
PROMPT = torch.tensor([[1, 45, 67, 89, 23, 100]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint}


def peft_merged(tiny, run: Path):
    """The merged model as PEFT makes it, on upstream's class with the run's projector, fp32."""
    from peft import PeftModel

    model = llava_model(tiny)
    trained = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    result = model.load_state_dict({k.removeprefix("base_model.model."): v for k, v in trained.items()}, strict=False)
    assert not result.unexpected_keys
    return PeftModel.from_pretrained(model, run).merge_and_unload().eval()


def ours_loaded(folder: Path):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def logits(model, ids=PROMPT) -> torch.Tensor:
    return helpers.logits(model, input_ids=ids)


def base_in(tiny, folder: Path, dtype=torch.float32, **options) -> Path:
    """The backbone saved another way."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny.backbone, torch_dtype=dtype).save_pretrained(folder, **options)
    for file in tiny.backbone.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def merged(tiny, lora_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "llava-merged"
    merge(lora_run, out, tiny.backbone)
    return out


def test_logits_equal_pefts(tiny, lora_run, merged):
    ours, theirs, plain = (logits(m) for m in (ours_loaded(merged), peft_merged(tiny, lora_run), llava_model(tiny).eval()))
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - plain).abs().max() > 1e-2  # the adapter is not idle


def test_only_the_region_changes(tiny, lora_run, merged):
    before, after = weights(tiny.backbone), weights(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {f"model.layers.{i}.{m}" for i in (1, 6) for m in ("self_attn.q_proj.weight", "mlp.down_proj.weight")}
    assert linear < changed and len(changed) == 14 and all(name.startswith(("model.layers.1.", "model.layers.6.")) for name in changed)
    trained = torch.load(lora_run / "non_lora_trainables.bin", weights_only=True)
    assert set(after) - set(before) == {name.removeprefix("base_model.model.") for name in trained}
    assert all(torch.equal(after[name.removeprefix("base_model.model.")], tensor) for name, tensor in trained.items())


def test_folder_is_complete(lora_run, tiny, merged):
    names = {file.name for file in merged.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "region.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "generation_config.json",
    } <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"}
    config = json.loads((merged / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["torch_dtype"]) == (["LlavaLlamaForCausalLM"], "llava_llama", "float32")
    assert config["visual_region"]["layers"] == [1, 6] and config["use_cache"] is True
    region = json.loads((merged / "region.json").read_text())
    assert region["layers"] == [1, 6] and region["merged_from"] == {"run": str(lora_run), "base": str(tiny.backbone)}


def test_equals_upstreams_own_merge(tiny, run, tmp_path):
    """Upstream's script: load_pretrained_model, then save_pretrained. It merges in fp16, adapter included, so that is what it gets."""
    from llava.model.builder import load_pretrained_model

    adapter = {name: tensor.half().float() for name, tensor in load_file(run / "adapter_model.safetensors").items()}
    save_file(adapter, run / "adapter_model.safetensors", {"format": "pt"})
    half = base_in(tiny, tmp_path / "half", torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, theirs, _, _ = load_pretrained_model(str(run), str(half), "llava-tiny-lora", device="cpu")
        merge(run, tmp_path / "out", half)
        tokenizer, ours, processor, _ = load_pretrained_model(str(tmp_path / "out"), None, "llava-merged", device="cpu")
    assert len(tokenizer) == 512 and processor is not None
    theirs, ours, before = theirs.state_dict(), ours.state_dict(), weights(half)
    assert set(theirs) == set(ours)
    merged = {name for name in before if not torch.equal(before[name], ours[name])}
    assert len(merged) == 14 and all(torch.equal(ours[name], theirs[name]) for name in set(ours) - merged)
    for name in merged:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora"
        delta = 2 * adapter[f"{stem}_B.weight"].double() @ adapter[f"{stem}_A.weight"].double()
        exact = before[name].double() + delta
        # fp16 keeps 11 bits: we round once, from fp32; upstream rounds delta, then the sum
        assert ((ours[name] - exact).abs() <= 2**-11 * exact.abs() + 1e-6).all(), name
        one_rounding = 2**-11 * delta.abs() + 2**-10 * exact.abs() + 1e-6
        assert ((ours[name].double() - theirs[name].double()).abs() <= one_rounding).all(), name


@pytest.mark.parametrize("kind", ["sharded", "bin", "bfloat16"])
def test_other_bases(tiny, lora_run, merged, tmp_path, kind):
    options = {"sharded": {"max_shard_size": "200KB"}, "bin": {"safe_serialization": False, "max_shard_size": "300KB"}, "bfloat16": {}}[
        kind
    ]
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    base = base_in(tiny, tmp_path / "base", dtype, **options)
    assert kind == "bfloat16" or len(Checkpoint(base).shards) > 1
    merge(lora_run, tmp_path / "out", base)
    expected, got = weights(merged), weights(tmp_path / "out")
    assert set(got) == set(expected) and {t.dtype for t in got.values()} == {dtype}
    for name, tensor in expected.items():
        if kind != "bfloat16":
            assert torch.equal(got[name], tensor)
    if kind == "bfloat16":
        name = "model.layers.6.mlp.up_proj.weight"
        delta = expected[name] - weights(tiny.backbone)[name]
        assert torch.equal(got[name], (weights(base)[name].float() + delta).bfloat16()) or torch.allclose(
            got[name].float(), weights(base)[name].float() + delta, rtol=2**-7, atol=0
        )
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4, "layers.6.mlp.up_proj": 2}},
        {"alpha_pattern": {"v_proj": 64, "model.layers.1.mlp.down_proj": 3}},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "rank", "alpha", "all-three", "fan-in-fan-out", "modules-to-save"],
)
def test_every_kind_of_lora_equals_peft(tiny, tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = write_lora_run(tiny, tmp_path / "x-lora", (1, 6), **options)
        if "modules_to_save" in options:
            _add_to_adapter(run, {"base_model.model.lm_head.weight": torch.randn(512, 64)})
        if "fan_in_fan_out" in options:  # PEFT notes its own fallback for nn.Linear in the config it saves; older files say True
            _edit(run / "adapter_config.json", fan_in_fan_out=True)
        merge(run, tmp_path / "out", tiny.backbone)
        theirs = peft_merged(tiny, run)
    assert torch.allclose(logits(ours_loaded(tmp_path / "out")), logits(theirs), atol=1e-5, rtol=0)


def _edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _add_to_adapter(run: Path, tensors: dict) -> None:
    save_file({**load_file(run / "adapter_model.safetensors"), **tensors}, run / "adapter_model.safetensors", {"format": "pt"})


def _add_beside(run: Path, tensors: dict) -> None:
    torch.save({**torch.load(run / "non_lora_trainables.bin", weights_only=True), **tensors}, run / "non_lora_trainables.bin")


@pytest.fixture
def run(lora_run, tmp_path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(lora_run, tmp_path / "run-lora"))


def test_fan_in_fan_out_where_the_weight_is_stored_so():
    from llava_region.checkpoints.adapter import LoraUpdate

    torch.manual_seed(0)
    a, b = torch.randn(2, 5), torch.randn(1030, 2)  # more rows than are updated at once
    update = LoraUpdate(Computed(a.dtype, (2, 5), lambda: a), Computed(b.dtype, (1030, 2), lambda: b), 0.5, fan_in_fan_out=True)
    assert torch.allclose(update.apply(torch.zeros(5, 1030)), 0.5 * (b @ a).T, atol=1e-6)
    assert torch.allclose(update.apply(torch.ones(1030, 5)), 1 + 0.5 * (b @ a), atol=1e-6)


def test_biases_trained_with_the_adapter(tiny, tmp_path):
    """bias='all' puts biases of the whole model, here the projector's, in the adapter's file; upstream loads them last."""
    run = write_lora_run(tiny, tmp_path / "x-lora", (1, 6), bias="all")
    bias = torch.randn(64)
    _add_to_adapter(run, {"base_model.model.model.mm_projector.0.bias": bias})
    merge(run, tmp_path / "out", tiny.backbone)
    assert torch.equal(weights(tmp_path / "out")["model.mm_projector.0.bias"], bias)


def test_a_weight_trained_whole_gets_its_update_too(tiny, run, merged, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = torch.randn(64, 64)
    _add_beside(run, {f"base_model.model.{name}": whole})
    merge(run, tmp_path / "out", tiny.backbone)
    update = weights(merged)[name] - weights(tiny.backbone)[name]
    assert torch.allclose(weights(tmp_path / "out")[name] - whole, update, atol=1e-6)


def test_tied_embeddings(tiny, run, tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny.backbone, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "tied")
    _edit(run / "config.json", tie_word_embeddings=True)
    merge(run, tmp_path / "out", tmp_path / "tied")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")
    loaded = ours_loaded(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    assert (tmp_path / "out/tokenizer.model").exists() is False  # neither folder holds one


def test_vocabulary_resized_by_training(tiny, run, tmp_path):
    rows = torch.randn(515, 64)
    _edit(run / "config.json", vocab_size=515)
    refused("vocabulary of 515", run, tmp_path / "out", tiny.backbone)
    _add_beside(run, {"base_model.model.model.embed_tokens.weight": rows, "base_model.model.lm_head.weight": rows + 1})
    (run / "tokenizer_config.json").write_text('{"of": "the run"}')
    merge(run, tmp_path / "out", tiny.backbone)
    got = weights(tmp_path / "out")
    assert torch.equal(got["model.embed_tokens.weight"], rows) and torch.equal(got["lm_head.weight"], rows + 1)
    assert "the run" in (tmp_path / "out/tokenizer_config.json").read_text()


def test_which_tensors_have_a_row_for_each_token():
    """Those that grow with the vocabulary: Phi's head has a bias; final norms and what is in layers or tower has none."""
    matrix, vector = (Computed(torch.float32, shape, lambda: None) for shape in ((512, 64), (512,)))
    tensors = {
        "model.embed_tokens.weight": matrix, "transformer.wte.weight": matrix, "lm_head.weight": matrix, "lm_head.bias": vector,
        "model.norm.weight": vector, "model.final_layernorm.bias": vector, "transformer.norm_f.weight": vector,
        "model.layers.0.mlp.up_proj.weight": matrix, "model.mm_projector.0.weight": matrix,
        "model.vision_tower.vision_tower.embed_tokens.weight": matrix,
    }  # fmt: skip
    assert [name for name in tensors if _is_vocabulary(name, tensors)] == list(tensors)[:4]


def test_qlora_is_said(tiny, run, tmp_path, capsys):
    _edit(run / "config.json", quantization_config={"load_in_4bit": True})
    assert main(["merge", str(run), "--base", str(tiny.backbone), "--out", str(tmp_path / "out")]) == 0
    assert "QLoRA" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_unfrozen_vision_tower_is_kept(tiny, run, tmp_path):
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    _add_beside(run, {f"base_model.model.{name}": torch.arange(32.0).bfloat16()})
    merge(run, tmp_path / "out", tiny.backbone)
    assert torch.equal(weights(tmp_path / "out")[name], torch.arange(32.0))


def test_checkpoint_of_a_run_and_base_from_the_run(lora_run, tiny, merged, tmp_path):
    folder = tmp_path / "run-lora"
    shutil.copytree(lora_run, folder / "checkpoint-3")
    shutil.copy(lora_run / "config.json", folder)
    (folder / "checkpoint-3/config.json").unlink()  # upstream's own checkpoints have none
    report = merge(folder / "checkpoint-3", tmp_path / "out")
    assert report["base"] == str(tiny.backbone)
    assert all(torch.equal(tensor, weights(merged)[name]) for name, tensor in weights(tmp_path / "out").items())


def test_a_run_that_starts_from_a_llava_checkpoint(lora_run, llava_checkpoint, tmp_path):
    merge(lora_run, tmp_path / "out", llava_checkpoint)
    got, before = weights(tmp_path / "out"), weights(llava_checkpoint)
    vision = [name for name in before if "vision_tower" in name]
    assert vision and set(got) == set(before) and all(torch.equal(got[name], before[name]) for name in vision)
    assert not torch.equal(got["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


def test_a_projector_that_was_not_trained_comes_from_the_base(run, tiny, llava_checkpoint, tmp_path):
    torch.save({}, run / "non_lora_trainables.bin")
    merge(run, tmp_path / "out", llava_checkpoint)
    name = "model.mm_projector.2.weight"
    assert torch.equal(weights(tmp_path / "out")[name], weights(llava_checkpoint)[name])
    refused("could not see", run, tmp_path / "other", tiny.backbone)


def test_the_cost_is_that_of_the_run(run, tiny, tmp_path):
    base = Path(shutil.copytree(tiny.backbone, tmp_path / "base"))
    (base / "cost.json").write_text('{"gpu_hours": 9}')
    merge(run, tmp_path / "without", base)
    assert not (tmp_path / "without/cost.json").exists()
    (run / "cost.json").write_text('{"gpu_hours": 1}')
    merge(run, tmp_path / "out", base)
    revert(tmp_path / "out", tiny.backbone, "1", tmp_path / "reverted")
    assert "1" in (tmp_path / "out/cost.json").read_text() and "1" in (tmp_path / "reverted/cost.json").read_text()


def test_generation_config_can_be_saved():
    from transformers import GenerationConfig

    sampling = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    assert savable(sampling) == {"max_length": 4096}
    assert savable({**sampling, "do_sample": True}) == {**sampling, "do_sample": True}
    GenerationConfig(**savable(sampling)).validate(is_init=False)


def test_json_and_force(tiny, lora_run, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["merge", str(lora_run), "--base", str(tiny.backbone), "--out", str(out), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [1, 6] and report["merged"] == 14 and report["bytes"] == sum(t.nbytes for t in weights(out).values())
    assert main(arguments) == 2 and "exists" in capsys.readouterr().err
    (out / "left over").write_text("x")
    assert main([*arguments, "--force"]) == 0
    assert not (out / "left over").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def refused(message: str, run: Path, out: Path, base) -> None:
    """`merge` says so, and nothing is written."""
    refused_without_output(message, out, lambda: merge(run, out, base))


def _without(data: dict, part: str) -> dict:
    return {name: tensor for name, tensor in data.items() if part not in name}


def _spoil_adapter(run: Path, change) -> None:
    save_file(change(load_file(run / "adapter_model.safetensors")), run / "adapter_model.safetensors")


Q = "base_model.model.model.layers.1.self_attn.q_proj"
SPOILS = {
    "no file of weights": (lambda run: (run / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "no projector": (lambda run: (run / "non_lora_trainables.bin").unlink(), "the trained projector"),
    "half a pair": (lambda run: _spoil_adapter(run, lambda d: _without(d, "1.self_attn.q_proj.lora_B")), "only lora_A"),
    "no pair": (lambda run: _spoil_adapter(run, lambda d: {f"{Q}.bias": torch.zeros(3)}), "nothing to merge"),
    "another rank": (lambda run: _edit(run / "adapter_config.json", r=4), "do not belong together"),
    "dora": (lambda run: _edit(run / "adapter_config.json", use_dora=True), "DoRA"),
    "magnitudes": (lambda run: _add_to_adapter(run, {f"{Q}.lora_magnitude_vector": torch.ones(64)}), "not merged here"),
    "embedding": (lambda run: _add_to_adapter(run, {f"{Q}.lora_embedding_A": torch.ones(64)}), "not merged here"),
    "prefix tuning": (lambda run: _edit(run / "adapter_config.json", peft_type="PREFIX_TUNING"), "peft_type LORA"),
    "two patterns": (
        lambda run: _edit(run / "adapter_config.json", rank_pattern={"q_proj": 8}, alpha_pattern={"self_attn.q_proj": 2}),
        "both match",
    ),
    "unknown module": (
        lambda run: _add_to_adapter(run, {f"{Q}x.lora_A.weight": torch.ones(8, 64), f"{Q}x.lora_B.weight": torch.ones(64, 8)}),
        "q_projx.weight', which",
    ),
    "unknown tensor": (lambda run: _add_beside(run, {"base_model.model.model.layers.1.x": torch.ones(1)}), "layers.1.x', which"),
    "a part nobody declared": (
        lambda run: _add_beside(run, {"base_model.model.model.memory_bank.weight": torch.ones(1)}),
        "memory_bank.weight' belongs to no part of a model that is known here",
    ),
    "another shape": (lambda run: _add_beside(run, {"base_model.model.model.norm.weight": torch.ones(65)}), "has shape"),
    "left by zero-3": (lambda run: _add_beside(run, {"base_model.model.model.mm_projector.0.weight": torch.ones(0)}), "ZeRO-3"),
    "another model type": (lambda run: _edit(run / "config.json", model_type="llama"), "not a LLaVA or Bunny run"),
    "no json": (lambda run: (run / "adapter_config.json").write_text("{"), "not valid JSON"),
    "only the adapter's projector": (
        lambda run: torch.save({"base_model.model.model.norm.weight": torch.ones(64)}, run / "non_lora_trainables.bin"),
        "could not see",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_spoiled_runs_are_refused(tiny, run, tmp_path, name):
    spoil, message = SPOILS[name]
    spoil(run)
    refused(message, run, tmp_path / "out", tiny.backbone)


def _put_into(run: Path, file: str, name: str, value: float, dtype: torch.dtype = torch.float32) -> None:
    """One number of a tensor of the run."""
    tensors = load_file(run / file) if file.endswith("safetensors") else torch.load(run / file, weights_only=True)
    tensors[name] = tensors[name].clone().to(dtype)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, run / file) if file.endswith("safetensors") else torch.save(tensors, run / file)


NOT_FINITE = [
    ("adapter_model.safetensors", f"{Q}.lora_A.weight", "'model.layers.1.self_attn.q_proj.lora_A' of the adapter holds NaN"),
    ("adapter_model.safetensors", f"{Q}.lora_B.weight", "'model.layers.1.self_attn.q_proj.lora_B' of the adapter holds NaN"),
    ("non_lora_trainables.bin", "base_model.model.model.mm_projector.2.bias", "'model.mm_projector.2.bias' in .* holds NaN"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("file", "name", "message"), NOT_FINITE, ids=["A", "B", "projector"])
def test_what_is_not_finite_is_refused(tiny, run, tmp_path, file, name, message, value):
    _put_into(run, file, name, value)
    refused(message, run, tmp_path / "out", tiny.backbone)


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("adapter_model.safetensors", f"{Q}.lora_B.weight", "'model.layers.1.self_attn.q_proj.weight' as merged holds NaN or infinity"),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector.2.bias", "'model.mm_projector.2.bias' as torch.float16 holds"),
    ],
)
def test_what_does_not_fit_into_fp16_is_refused(tiny, run, tmp_path, file, name, message):
    _put_into(run, file, name, 1e8)
    merge(run, tmp_path / "fp32", tiny.backbone)
    half = base_in(tiny, tmp_path / "half", torch.float16)
    refused(message, run, tmp_path / "out", half)


def test_what_the_base_holds_itself_is_copied_as_it_is(tiny, run, tmp_path):
    base = base_in(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge(run, tmp_path / "out", base)
    assert weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][3, 5] == float("inf")


def test_wrong_bases_are_refused(tiny, run, tmp_path):
    from llava_region.data.tiny import write_backbone

    write_backbone(tmp_path / "wide", num_layers=8, hidden_size=32)
    refused("hidden_size", run, tmp_path / "out", tmp_path / "wide")
    write_backbone(tmp_path / "deep", num_layers=9, hidden_size=64)
    refused("num_hidden_layers", run, tmp_path / "out", tmp_path / "deep")
    _edit(tmp_path / "wide/config.json", hidden_size=64, intermediate_size=128)  # a config that lies about its weights
    refused("has shape", run, tmp_path / "out", tmp_path / "wide")
    _edit(tmp_path / "deep/config.json", num_hidden_layers=8)
    refused("counts 8 decoder layers", run, tmp_path / "out", tmp_path / "deep")
    refused("is a LoRA run", run, tmp_path / "out", run)
    refused("Hugging Face cache", run, tmp_path / "out", "nobody/no-such-model")
    (run / "region.json").unlink()
    _edit(run / "adapter_config.json", base_model_name_or_path=None)
    refused("names no base model", run, tmp_path / "out", None)


def test_full_models_and_other_folders_are_refused(tiny, llava_checkpoint, tmp_path):
    refused("whole model already", llava_checkpoint, tmp_path / "out", tiny.backbone)
    refused("not a LoRA run", tiny.images, tmp_path / "out", tiny.backbone)
    refused("there is no folder", tmp_path / "none", tmp_path / "out", tiny.backbone)
    refused("is a file", tiny.data, tmp_path / "out", tiny.backbone)


def test_an_input_is_never_replaced(tiny, run):
    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    for out in (run, run.parent):
        with pytest.raises(LlavaRegionError, match="would replace the input"):
            merge(run, out, tiny.backbone, force=True)
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_hugging_face_names_come_from_the_cache(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, local_files_only: str(tmp_path / name) if local_files_only else None
    )
    assert locate("some/model") == tmp_path / "some/model"
    assert locate(tiny.backbone) == tiny.backbone


KILL = """
import os, signal, sys
import llava_region.checkpoints.tensors as weights, llava_region.files as atomic
from llava_region.cli import main
left, write_entry = int(sys.argv[1]), weights._write_entry
def write(entry, name, file):
    global left
    left -= 1
    if left == 0:
        os.write(file.fileno(), b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write_entry(entry, name, file)
weights._write_entry = write
if left == 0:
    atomic.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", [1, 40, 0], ids=["first-tensor", "middle", "before-rename"])
def test_killed_at_any_moment(tiny, lora_run, merged, tmp_path, moment):
    out = tmp_path / "out"
    arguments = ["merge", str(lora_run), "--base", str(tiny.backbone), "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILL, str(moment), *arguments], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists() and list(tmp_path.glob(".out.*.partial"))
    assert main(arguments) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_bad_input_is_one_line_and_exit_code_2(tiny, run, tmp_path):
    (run / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes()[:-10])
    command = [sys.executable, "-m", "llava_region", "merge", str(run), "--base", str(tiny.backbone), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "truncated" in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


def test_a_vision_tower_is_no_base(tiny, lora_run, llava_checkpoint, tmp_path, capsys):
    whole = tmp_path / "clip"  # as CLIP is published: with its text model
    shutil.copytree(tiny.vision_tower, whole)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps({"model_type": "clip", "text_config": {"num_hidden_layers": 12}, "vision_config": config})
    )
    for tower in (tiny.vision_tower, whole):
        for line in (
            helpers.refused(capsys, "merge", lora_run, "--base", tower, "--out", tmp_path / "out"),
            helpers.refused(capsys, "revert", llava_checkpoint, "--base", tower, "--layers", "1", "--out", tmp_path / "out"),
            helpers.refused(capsys, "prune", tower, "--layers", "1", "--out", tmp_path / "out"),
        ):
            assert f"{tower} is a vision tower (model_type 'clip" in line and "layer" not in line
