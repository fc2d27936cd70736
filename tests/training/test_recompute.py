"""Recomputing some decoder layers: gradients are those of full recomputation."""

import re

import pytest
import torch
from torch import nn

from llava_region.decoder import find_decoder_layers, layer_index, parent_of
from llava_region.errors import UnsupportedUpstream
from llava_region.training import kept_memory as memory
from llava_region.training.kept_tensors import saved_peak
from llava_region.training.recompute import install, out_of_memory_hint, set_up, uninstall
from llava_region.training.recompute_plan import Workload
from tests.helpers.region_models import FAMILIES, assert_equal, batch, build, count_forwards, gradients, plan_of, workload


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
    parent = parent_of(model)
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
    assert {layer_index(name) for name in expected} == {2, 5}
    assert _differentiated(model) == [0, 1, 2, 3, 4, 5]  # upstream's waste
    first = memory.lowest_differentiated(model)
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


@pytest.mark.parametrize(("policy", "recompute"), [("all", range(6)), ("region", (1, 4)), ("none", ()), ("auto", ())])
def test_set_up_with_memory_to_spare(policy, recompute):
    model = build(dropout=0.1)
    expected = gradients(model)
    plan = set_up(model, (1, 4), workload(), policy)
    assert plan.recompute == tuple(recompute)
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.45])
def test_auto_stays_under_a_limit_set_by_hand(share):
    model, inputs = build(), batch(samples=2, length=64)
    everything = set_up(model, (1, 4), workload(length=64), "none").bytes_kept
    limit = int(everything * share)
    plan = set_up(model, (1, 4), workload(length=64), "auto", f"{limit}B")
    fewer = set_up(model, (1, 4), workload(length=64), "auto", f"{everything}B")
    assert not fewer.recompute and bool(plan.recompute) == (share < 1)
    install(model, plan)
    with saved_peak() as peak:
        gradients(model, inputs)
    assert 0.5 * limit < peak() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_chooses_for_each_batch(dtype):
    """The largest batch needs every layer recomputed, the shortest none; each stays under the limit, with the same gradients."""
    model = build(dropout=0.3).to(dtype)
    size = Workload(2, 96, str(dtype).removeprefix("torch."), supervised_logits=False)
    expected = {length: gradients(model, batch(length=length)) for length in (96, 40, 8)}
    least = set_up(model, (1, 4), size, "all").bytes_kept
    plan = set_up(model, (1, 4), size, "auto", f"{int(1.2 * least)}B")
    recomputed = []
    for length, wanted in expected.items():
        counts = count_forwards(model)
        with saved_peak() as peak:
            assert_equal(gradients(model, batch(length=length)), wanted)
        recomputed.append(sum(count == 2 for count in counts))
        assert peak() <= 1.2 * least
    assert recomputed[0] == len(plan.recompute) and recomputed[0] > recomputed[1] > recomputed[2] == 0
    assert plan.batches.counts == dict.fromkeys(recomputed, 1)


def test_a_model_that_checkpoints_by_itself_is_told_apart():
    class OldStyle(type(build().get_decoder())):
        def forward(self, hidden_states):
            return torch.utils.checkpoint.checkpoint(self.layers[0], hidden_states)

    model = build(lora=False)
    parent_of(model).__class__ = OldStyle
    plan = set_up(model, (1, 4), workload(), "auto")
    assert plan.recompute == tuple(range(6)) and "OldStyle.forward calls torch.utils.checkpoint itself" in plan.reason
    with pytest.raises(UnsupportedUpstream, match=r"--region_checkpointing region is not possible here.*allowed: all"):
        set_up(model, (1, 4), workload(), "region")
    with pytest.raises(UnsupportedUpstream, match="OldStyle"):
        install(model, plan_of(()))


def test_data_parallel_keeps_upstreams_checkpointing():
    model = nn.DataParallel(build())
    plan = set_up(model, (1, 4), workload(), "auto")
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
    for error, text in (
        (torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "CUDA error: out of memory"),
    ):
        with pytest.raises(error, match=f"^to train in less memory, give .*{hint}.* {re.escape(text)}$"), out_of_memory_hint(policy, True):
            raise error(text)
    with pytest.raises(RuntimeError, match=r"^another$"), out_of_memory_hint(policy, True):
        raise RuntimeError("another")


def _rank(rank: int, folder: str) -> None:
    """One of two ranks, the second with less memory free."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = build()
    full = set_up(model, (1, 4), workload(), "none").bytes_kept
    largest = max(memory.activations_of(model, workload()).kept)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * memory.TRAINABLE_BYTES
    memory.free_memory = lambda device: int((full * (3.0, 0.6)[rank] + largest + trainable) / (1 - memory.MARGIN))
    plan = set_up(nn.parallel.DistributedDataParallel(model), (1, 4), workload(), "auto")
    with open(f"{folder}/{rank}", "w") as out:
        out.write(f"{plan.recompute} {plan.budget}")
    torch.distributed.destroy_process_group()


def test_two_ranks_come_to_the_same_plan(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first == second and not first.startswith("()")
