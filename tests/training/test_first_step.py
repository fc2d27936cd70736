"""The first step of a run: what is set up before it, judged after it, and said."""

from types import SimpleNamespace

import pytest
import torch

from llava_region.errors import LlavaRegionError
from llava_region.patches.upstream import Recipe
from llava_region.region import Region
from llava_region.training import first_step
from llava_region.training.first_step import FirstStep
from llava_region.training.learning_rates import name_and_drop_groups
from tests.helpers.region_models import batch, build

REGION = Region((1, 4), 6, "1,4")
RATE = 2e-4


def trainer(model, rank: int = 0, projector_rate: float | None = None, **flags) -> SimpleNamespace:
    """As much of a trainer as the first step looks at; collectives of one rank are noted in `reduced`."""
    args = {
        "gradient_checkpointing": True, "region_checkpointing": "auto", "region_memory": None, "supervised_logits": True, "bf16": False,
        "fp16": False, "per_device_train_batch_size": 2, "learning_rate": RATE, "device": torch.device("cpu"), **flags,
    }  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    name_and_drop_groups(optimizer, model)
    upstream = SimpleNamespace(
        recipe=lambda args: Recipe(max_length=24, projector_rate=projector_rate), image_tokens=lambda inputs: inputs["input_ids"] < 0,
        intercept_labels=None,
    )  # fmt: skip
    reduced: list[str] = []
    return SimpleNamespace(
        model=model, args=SimpleNamespace(**args), run=SimpleNamespace(upstream=upstream), optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), is_world_process_zero=lambda: rank == 0,
        accelerator=SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False)), reduced=reduced,
        over_ranks=lambda tensor, how: reduced.append(how) or tensor,
    )  # fmt: skip


def micro_step(first: FirstStep, inputs: dict) -> None:
    model = first.trainer.model
    first.before(model, inputs)
    model(**inputs).loss.backward()
    first.after()


def test_set_up_judged_said_and_idle(capsys):
    made = trainer(build())
    first = FirstStep(made, REGION)
    micro_step(first, batch())
    plan, logits, rates = capsys.readouterr().out.splitlines()
    assert plan.startswith("--region_checkpointing auto: no layer is recomputed") and logits == "logits at supervised positions only"
    # the embeddings train in the projector's place, at the language model's rate
    assert rates == "first step: layers 1,4 have gradients, no other; learning rates: llm 0.0002"
    assert first.passed and made.reduced == ["max"]
    micro_step(first, batch())
    assert capsys.readouterr().out == "" and made.reduced == ["max"] and first.audit is None


def test_a_step_without_labels_puts_the_judgement_off_but_not_the_set_up(capsys):
    made = trainer(build())
    first = FirstStep(made, REGION)
    unlabelled = batch()
    unlabelled["labels"] = torch.full_like(unlabelled["labels"], -100)
    first.before(made.model, unlabelled)
    first.after()
    assert len(capsys.readouterr().out.splitlines()) == 2 and not first.passed
    micro_step(first, batch())
    assert capsys.readouterr().out.startswith("first step: ") and first.passed and made.reduced == ["max", "max"]


def test_flags_switch_the_set_up_off(capsys):
    model = build()
    micro_step(FirstStep(trainer(model, gradient_checkpointing=False, supervised_logits=False), REGION), batch())
    assert len(capsys.readouterr().out.splitlines()) == 1 and "forward" not in vars(model.get_base_model())


def test_other_ranks_judge_and_are_silent(capsys):
    first = FirstStep(trainer(build(), rank=1), REGION)
    micro_step(first, batch())
    assert first.passed and capsys.readouterr().out == ""


def test_setting_up_leaves_the_random_state_alone(monkeypatch):
    def drawing(*args):
        torch.rand(3)
        return SimpleNamespace(reason="drawn")

    monkeypatch.setattr(first_step.recompute, "set_up", drawing)
    made = trainer(build())
    before = torch.get_rng_state()
    FirstStep(made, REGION).before(made.model, batch())
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_gradients_and_wrong_rates_stop():
    with pytest.raises(LlavaRegionError, match=r"region layers without a gradient: \[2\]; other layers with one: \[4\]"):
        micro_step(FirstStep(trainer(build()), Region((1, 2), 6, "1,2")), batch())
    made = trainer(build(), learning_rate=1e-3)
    with pytest.raises(LlavaRegionError, match=r"the llm would train at 0\.0002, not at 0\.001"):
        micro_step(FirstStep(made, REGION), batch())
