"""Which decoder layers are chosen to be recomputed, from numbers alone."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava_region.errors import LlavaRegionError
from llava_region.training.recompute_plan import POLICIES, Activations, BatchPlans, Choice, Levels, Workload, check_flags, make_plan


def test_choosing_needs_no_torch():
    code = "import sys, llava_region.training.recompute_plan; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("policy", "limit", "checkpointing", "message"),
    [
        ("some", None, True, "--region_checkpointing 'some' is unknown; allowed: auto, all, region, none"),
        ("auto", "2 potatoes", True, "'2 potatoes' is not a memory size"),
        ("none", "2GB", True, "it needs that policy"),
        ("auto", "2GB", False, "--gradient_checkpointing True"),
        ("region", None, False, "--region_checkpointing region needs --gradient_checkpointing True"),
    ],
)
def test_bad_flags_are_refused(policy, limit, checkpointing, message):
    with pytest.raises(LlavaRegionError, match=message):
        check_flags(policy, limit, checkpointing)


def test_good_flags_are_accepted():
    for policy in POLICIES:
        check_flags(policy, None, True)
    check_flags("auto", None, False)
    check_flags("auto", "2GB", True)


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


@pytest.mark.parametrize(("bf16", "fp16", "dtype"), [(True, False, "bfloat16"), (False, True, "float16"), (False, False, "float32")])
def test_workload_of_flags(bf16, fp16, dtype):
    args = SimpleNamespace(per_device_train_batch_size=3, bf16=bf16, fp16=fp16, supervised_logits=False)
    assert Workload.of(args, 20) == Workload(3, 20, dtype, False) and Workload.of(args, 20).tokens == 60


def activations(samples: int, length: int, lean: bool = True) -> Activations:
    """Six layers that keep 10 bytes a token, 6 of them where they are lean."""
    tokens = samples * length
    return Activations((10 * tokens,) * 6, (1.0,) * 6, tokens, lean=(6 * tokens,) * 6 if lean else None)


def test_levels_give_up_a_little_more_each():
    levels = Levels.of(activations(1, 1))
    assert levels.choice(0) == Choice(frozenset()) and levels.choice(1) == Choice(frozenset(), True)
    assert levels.choice(7) == Choice(frozenset(range(6)), True)
    peaks = [activations(1, 1).peak(levels.choice(n).recompute, levels.choice(n).lean) for n in range(8)]
    for peak in peaks:
        assert levels.least(activations(1, 1), peak) == next(n for n in range(8) if peaks[n] <= peak)
    assert levels.least(activations(1, 1), 0) == peaks.index(min(peaks)) == 6  # the last layer is not lean where it is run again
    without = Levels.of(activations(1, 1, lean=False))
    assert without.choice(1) == Choice(frozenset({0})) and without.least(activations(1, 1, lean=False), 17) == 5


def test_every_batch_by_its_size():
    plans = BatchPlans(activations, Levels.of(activations(1, 1)), budget=1000)
    assert plans.choose(1, 10) == Choice(frozenset()) and plans.choose(1, 20) == Choice(frozenset(), True)
    assert plans.choose(2, 15) == plans.choose(1, 30) and 0 < len(plans.choose(1, 30).recompute) < 6
    assert sum(plans.counts.values()) == 5 and plans.counts[0] == 2


def test_ranks_that_agree_change_the_order_seldom():
    """What another rank needs is done here too; a little more than is needed is better than another order of ZeRO-3's gathers."""
    others = iter([5, 4, 5, 6, 0, 0])
    layers = 16
    plans = BatchPlans(
        lambda *_: Activations((10,) * layers, (1.0,) * layers, 1), Levels(tuple(range(layers))), 10**6, lambda ours: next(others)
    )
    assert [len(plans.choose(1, 1).recompute) for _ in range(6)] == [5, 5, 5, 6, 0, 0]
