"""Recomputing some decoder layers: what is measured, what is chosen, and that gradients are those of full recomputation."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from llava_region import activation_memory as memory
from llava_region import checkpointing as ckpt
from llava_region.activation_memory import KeptBytes, measure, parse_size, saved_peak
from llava_region.checkpointing import Activations, Plan, install, make_plan, set_up, uninstall
from llava_region.decoder import find_decoder_layers, linear_modules
from llava_region.errors import LlavaRegionError, UnsupportedUpstream

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 50}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**SHAPE, "num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SHAPE, "num_key_value_heads": 2}),
    "phi": (PhiForCausalLM, PhiConfig, {**SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "mpt": (MptForCausalLM, MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 6, "vocab_size": 50, "expansion_ratio": 2}),
}


def build(family="llama", region=(1, 4), *, lora=True, dropout=0.0, reentrant=True, projector_trains=True, attention=None):
    """A model as upstream has it when training starts: LoRA or full tuning on the region, embeddings made to require grad."""
    from peft import LoraConfig, get_peft_model

    model_class, config_class, shape = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**shape)
    if attention:
        config._attn_implementation = attention
    model = model_class(config)
    names = linear_modules(model, region)
    layers = find_decoder_layers(model).modules
    model.enable_input_require_grads()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=names))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    else:
        model.requires_grad_(False)
        for layer in region:
            layers[layer].requires_grad_(True)
    if projector_trains:
        model.get_input_embeddings().weight.requires_grad_(True)  # stands for the projector: something in front of the layers
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


def batch(samples=2, length=24, vocab=50):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model, inputs=None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    model(**(inputs or batch())).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_forwards(model) -> list[int]:
    """Times each decoder layer is run, counted on from here."""
    counts = [0] * len(find_decoder_layers(model).modules)
    for index, layer in enumerate(find_decoder_layers(model).modules):
        # before, not after: recomputation without reentrance stops at the last tensor it needs
        layer.register_forward_pre_hook(lambda *_, i=index: counts.__setitem__(i, counts[i] + 1))
    return counts


def plan_of(recompute, first=0) -> Plan:
    return Plan(tuple(recompute), "auto", "", 0, None, first)


def arguments(policy="auto", limit=None, samples=2, length=24):
    batch_of = {"per_device_train_batch_size": samples, "model_max_length": length}
    return SimpleNamespace(
        region_checkpointing=policy,
        region_memory=limit,
        gradient_checkpointing=True,
        supervised_logits=False,
        bf16=False,
        fp16=False,
        **batch_of,
    )


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8), ("4096", 4096), (".5KB", 500)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "two GB", "2 GBit", "-1GB", "0", "1e9", "2GB 3MB", "nan"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(LlavaRegionError, match="no memory size; allowed"):
        parse_size(text)


@pytest.mark.parametrize(
    ("policy", "limit", "checkpointing", "message"),
    [
        ("some", None, True, "--region_checkpointing 'some' is unknown; allowed: auto, all, region, none"),
        ("auto", "2 potatoes", True, "'2 potatoes' is no memory size"),
        ("none", "2GB", True, "it needs that policy"),
        ("auto", "2GB", False, "--gradient_checkpointing True"),
        ("region", None, False, "--region_checkpointing region needs --gradient_checkpointing True"),
    ],
)
def test_bad_flags_are_refused(policy, limit, checkpointing, message):
    with pytest.raises(LlavaRegionError, match=message):
        ckpt.check_flags(policy, limit, checkpointing)


def test_good_flags_are_accepted():
    for policy in ckpt.POLICIES:
        ckpt.check_flags(policy, None, True)
    ckpt.check_flags("auto", None, False)
    ckpt.check_flags("auto", "2GB", True)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("phi", "eager"), ("mpt", "eager")])
def test_measured_bytes_are_what_a_longer_batch_keeps(family, attention, lora):
    """One layer kept more than none: the difference in peak is what was measured on short sequences."""
    model = build(family, region=(4,), lora=lora, dropout=0.1, attention=attention)
    inputs = batch(samples=3, length=16 * 12 + 1)
    for layer, kept in measure(model, (2, 4)).items():
        peaks = []
        for recompute in (range(6), [i for i in range(6) if i != layer]):
            install(model, plan_of(recompute))
            peaks.append(_forward_bytes(model, inputs))
        assert kept.at(3, 16 * 12 + 1) == pytest.approx(peaks[1] - peaks[0], rel=1e-2)  # the rotary angles do not grow with the samples
    assert measure(model, (4,))[4].per_token > measure(model, (2,))[2].per_token
    assert (measure(model, (2,))[2].per_token_squared > 0) == (attention != "sdpa")


def _forward_bytes(model, inputs) -> int:
    """Bytes kept when the forward pass of the decoder layers ends."""
    with saved_peak() as peak:
        hidden = model.get_input_embeddings()(inputs["input_ids"])
        output = memory.parent_of(model)(inputs_embeds=hidden, attention_mask=inputs["attention_mask"])
        found = peak()
    del output
    return found


def test_measuring_leaves_model_and_random_state_alone():
    model = build(dropout=0.2)
    model.get_input_embeddings().eval()
    before, expected = torch.get_rng_state(), gradients(model)
    state = copy.copy(memory.parent_of(model).__dict__)
    torch.set_rng_state(before)
    measure(model, (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert memory.parent_of(model).__dict__ == state
    assert not model.get_input_embeddings().training
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_a_sample_of_two_layers_keeps_what_the_model_keeps(family, lora):
    from peft import LoraConfig

    model = build(family, lora=lora, dropout=0.05)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05) if lora else None
    sample = memory.sample_model(memory.parent_of(model).config, FAMILIES[family][0], lora=config)
    assert list(measure(sample, (0, 1)).values()) == list(measure(model, (2, 4)).values())


def test_a_model_on_the_meta_device_is_planned_as_the_real_one():
    model = build(region=(1, 4), dropout=0.05)
    expected = ckpt.activations_of(model, arguments())
    assert ckpt.activations_of(model.to("meta"), arguments()) == expected


def test_fit_recovers_all_three_terms():
    sizes = [1000 + 2 * length * (30 + 5 * length) for length in memory.LENGTHS]
    assert KeptBytes.fit(sizes) == KeptBytes(1000, 30, 5)
    assert KeptBytes.fit(sizes).at(4, 10) == 1000 + 40 * (30 + 50)


KEPT = (10, 10, 40, 10, 40, 10)


@pytest.mark.parametrize(
    ("policy", "budget", "recompute"),
    [
        ("all", None, (0, 1, 2, 3, 4, 5)),
        ("region", None, (2, 4)),
        ("none", None, ()),
        ("auto", 126, ()),  # 120 kept and 6 inputs
        ("auto", 125, (2,)),
        ("auto", 86, (2,)),
        ("auto", 85, (2, 4)),
        ("auto", 75, (2, 4)),  # while layer 4 is run again: its 40, 3 frozen layers below it, 5 inputs
        ("auto", 74, (0, 2, 4)),
        ("auto", 55, (0, 1, 2, 4)),
        ("auto", 40, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_policies_choose(policy, budget, recompute):
    plan = make_plan(policy, (2, 4), Activations(KEPT, (1.0,) * 6, 1), budget, "a test")
    assert plan.recompute == recompute
    assert plan.policy == policy and f"--region_checkpointing {policy}" in plan.reason


def test_time_decides_between_layers_of_equal_bytes():
    activations = Activations((10, 10, 10), (1.0, 0.5, 2.0), 0)
    assert make_plan("auto", (1,), activations, 25, "a test").recompute == (1,)


def test_logits_and_mask_count_against_the_budget():
    activations = Activations((10, 10), (1.0, 1.0), 1, mask=5, head=7)
    assert activations.peak(()) == 5 + 22 + 7
    assert activations.peak((1,)) == 5 + 11 + 1 + 10  # the logits are gone when layer 1 is run again
    assert make_plan("auto", (), activations, 34, "a test").recompute == ()
    assert make_plan("auto", (), activations, 33, "a test").recompute == (0,)


def test_auto_does_not_touch_layers_that_keep_nothing():
    plan = make_plan("auto", (2, 4), Activations(KEPT, (1.0,) * 6, 1, first=2), 1, "a test")
    assert plan.recompute == (2, 3, 4, 5) and plan.first == 2
    assert "which may not be enough" in plan.reason and "below 2" in plan.reason


def test_a_limit_by_hand_that_cannot_be_met_is_refused():
    with pytest.raises(LlavaRegionError, match=r"--region_memory 40 B is too little.*take 45 B"):
        make_plan("auto", (2, 4), Activations(KEPT, (1.0,) * 6, 1), 40, "--region_memory")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("lora", "dropout"), [(True, 0.0), (True, 0.3), (False, 0.0)])
def test_gradients_equal_full_recomputation_to_the_bit(family, reentrant, lora, dropout):
    model = build(family, lora=lora, dropout=dropout, reentrant=reentrant)
    expected = gradients(model)
    counts = count_forwards(model)
    for recompute in ((), (1, 4), (0, 1, 2, 3, 4, 5), (2,)):
        install(model, plan_of(recompute))
        counts[:] = [0] * 6
        assert_equal(gradients(model), expected)
        assert counts == [2 if i in recompute else 1 for i in range(6)]


def test_install_replaces_and_uninstall_restores():
    model = build()
    parent = memory.parent_of(model)
    upstream = parent._gradient_checkpointing_func
    install(model, plan_of((1,)))
    install(model, plan_of((1, 2)))
    assert parent._gradient_checkpointing_func.upstream is upstream
    uninstall(model)
    uninstall(model)
    assert parent._gradient_checkpointing_func is upstream
    counts = count_forwards(model)
    gradients(model)
    assert counts == [2] * 6


def test_evaluation_recomputes_nothing():
    model = build()
    install(model, plan_of(range(6)))
    counts = count_forwards(model)
    model.eval()
    model(**batch()).loss.backward()
    assert counts == [1] * 6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recompute", [(), (2, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("lora", [True, False])
def test_nothing_below_the_region_is_differentiated_when_the_projector_is_frozen(reentrant, recompute, lora):
    model = build(region=(2, 5), lora=lora, reentrant=reentrant, projector_trains=False)
    expected = gradients(model)
    assert {ckpt.layer_index(name) for name in expected} == {2, 5}
    assert _differentiated(model) == [0, 1, 2, 3, 4, 5]  # upstream's waste
    first = ckpt.lowest_differentiated(model)
    assert first == 2
    install(model, plan_of(recompute, first))
    assert _differentiated(model) == [2, 3, 4, 5]
    assert_equal(gradients(model), expected)


def _differentiated(model) -> list[int]:
    """Decoder layers whose output receives a gradient in one step."""
    reached, handles = set(), []

    def watch(layer, args, output, index):
        if output[0].requires_grad:
            output[0].register_hook(lambda grad: reached.add(index))

    for i, layer in enumerate(find_decoder_layers(model).modules):
        handles.append(layer.register_forward_hook(lambda *a, i=i: watch(*a, i)))
    gradients(model)
    for handle in handles:
        handle.remove()
    return sorted(reached)


@pytest.mark.parametrize(
    ("trains", "lowest"),
    [((), 1), (("norm",), 1), (("lm_head",), 1), (("embed_tokens",), 0), (("mm_projector",), 0), (("image_newline",), 0)],
)
def test_lowest_differentiated_layer(trains, lowest):
    model = build(lora=False, projector_trains=False)
    parent = model.get_decoder()
    parent.mm_projector, parent.image_newline = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    for module in (parent.mm_projector, parent.image_newline):
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(trains):
            parameter.requires_grad_(True)
    assert ckpt.lowest_differentiated(model) == lowest


@pytest.mark.parametrize(("policy", "recompute"), [("all", range(6)), ("region", (1, 4)), ("none", ()), ("auto", ())])
def test_set_up_with_memory_to_spare(policy, recompute):
    model = build(dropout=0.1)
    expected = gradients(model)
    plan = set_up(model, (1, 4), arguments(policy))
    assert plan.recompute == tuple(recompute)
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.45])
def test_auto_stays_under_a_limit_set_by_hand(share):
    model, inputs = build(), batch(samples=2, length=64)
    everything = set_up(model, (1, 4), arguments("none", length=64)).bytes_kept
    limit = int(everything * share)
    plan = set_up(model, (1, 4), arguments("auto", f"{limit}B", length=64))
    fewer = set_up(model, (1, 4), arguments("auto", f"{everything}B", length=64))
    assert not fewer.recompute and bool(plan.recompute) == (share < 1)
    install(model, plan)
    with saved_peak() as peak:
        gradients(model, inputs)
    assert 0.5 * limit < peak() <= limit


def test_a_model_that_checkpoints_by_itself_is_told_apart():
    class OldStyle(type(build().get_decoder())):
        def forward(self, hidden_states):
            return torch.utils.checkpoint.checkpoint(self.layers[0], hidden_states)

    model = build(lora=False)
    memory.parent_of(model).__class__ = OldStyle
    plan = set_up(model, (1, 4), arguments("auto"))
    assert plan.recompute == tuple(range(6)) and "OldStyle.forward calls torch.utils.checkpoint itself" in plan.reason
    with pytest.raises(UnsupportedUpstream, match=r"--region_checkpointing region is not possible here.*allowed: all"):
        set_up(model, (1, 4), arguments("region"))
    with pytest.raises(UnsupportedUpstream, match="OldStyle"):
        install(model, plan_of(()))


def test_data_parallel_keeps_upstreams_checkpointing():
    model = nn.DataParallel(build())
    plan = set_up(model, (1, 4), arguments("auto"))
    assert plan.policy == "all" and "DataParallel" in plan.reason


def test_install_needs_gradient_checkpointing():
    model = build()
    model.base_model.model.gradient_checkpointing_disable()
    with pytest.raises(UnsupportedUpstream, match="--gradient_checkpointing True"):
        install(model, plan_of(()))


@pytest.mark.parametrize(
    ("policy", "hint"),
    [("none", "--region_checkpointing region or all"), ("auto", "--region_memory"), ("all", "--per_device_train_batch_size")],
)
def test_out_of_memory_names_the_flag(policy, hint):
    error = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    with pytest.raises(error, match=f"CUDA out of memory.*{hint}"), ckpt.out_of_memory_hint(arguments(policy)):
        raise error("CUDA out of memory.")
    with pytest.raises(RuntimeError, match=r"^another$"), ckpt.out_of_memory_hint(arguments(policy)):
        raise RuntimeError("another")


def test_free_memory_on_cpu_minds_ranks_and_control_group(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory._group_memory(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_memory(tmp_path) == float("inf")
    monkeypatch.setattr(memory, "_available_memory", lambda: 10_000)
    monkeypatch.setattr(memory, "_group_memory", lambda: 8_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory(torch.device("cpu")) == 4_000


def _rank(rank: int, folder: str) -> None:
    """One of two ranks, the second with less memory free."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = build()
    full = set_up(model, (1, 4), arguments("none")).bytes_kept
    largest = max(ckpt.activations_of(model, arguments()).kept)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * ckpt.TRAINABLE_BYTES
    ckpt.free_memory = lambda device: int((full * (3.0, 0.9)[rank] + largest + trainable) / (1 - ckpt.MARGIN))
    plan = set_up(nn.parallel.DistributedDataParallel(model), (1, 4), arguments("auto"))
    with open(f"{folder}/{rank}", "w") as out:
        out.write(f"{plan.recompute} {plan.budget}")
    torch.distributed.destroy_process_group()


def test_two_ranks_come_to_the_same_plan(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first == second and not first.startswith("()")
