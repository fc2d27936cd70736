"""Logits only where labels are: the same loss and gradients as upstream's, and the same losses over 50 steps of training."""

import functools
import json
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from llava_region.training import supervised_loss
from tests.helpers.training_runs import needs_fp16

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=50)),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().train()


def batch(labelled: float = 0.3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (3, 20), generator=generator)
    keep = torch.rand(3, 20, generator=generator) < labelled
    keep[:, 0] = True  # has no position before it, so is never predicted
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(keep, -100)}


def step(model, inputs):
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows_seen(head: nn.Module) -> list[int]:
    """Rows that logits are computed for, call by call, noted from here on; to be called before install."""
    seen, forward = [], head.forward

    def noting(hidden):
        seen.append(hidden.shape[:-1].numel())
        return forward(hidden)

    head.forward = noting
    return seen


@pytest.mark.parametrize("labelled", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("head_trains", [True, False])
def test_loss_and_gradients_are_upstreams(model, labelled, head_trains, monkeypatch):
    monkeypatch.setattr(supervised_loss, "LOGITS_AT_ONCE", 7 * 50 + 3)  # slices of 7 positions
    model.lm_head.requires_grad_(head_trains)
    inputs = batch(labelled)
    loss, gradients = step(model, inputs)
    seen = rows_seen(model.lm_head)
    assert supervised_loss.install(model) is None
    ours, found = step(model, inputs)
    assert sum(seen) == (inputs["labels"][:, 1:] != -100).sum() and len(seen) == (1 if head_trains else -(-sum(seen) // 7))
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=needs_fp16)])
def test_half_precision(dtype, monkeypatch):
    monkeypatch.setattr(supervised_loss, "LOGITS_AT_ONCE", 7 * 50)
    model = FAMILIES["llama"]().to(dtype).train()
    model.lm_head.requires_grad_(False)
    inputs = batch()
    loss, gradients = step(model, inputs)
    seen = rows_seen(model.lm_head)
    supervised_loss.install(model)
    ours, found = step(model, inputs)
    assert (len(seen) == 1) == (dtype == torch.float16)  # whose gradients would vanish before they are scaled
    torch.testing.assert_close(ours, loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=1e-3, msg=name)


def test_logits_in_memory(model):
    model.lm_head.requires_grad_(False)
    slices = supervised_loss.LOGITS_AT_ONCE
    assert supervised_loss.logits_at_once(model, 100, True) == 5000
    assert supervised_loss.logits_at_once(model, slices, True) == slices
    assert supervised_loss.logits_at_once(model, slices, False) == 50 * slices
    model.lm_head.requires_grad_(True)
    assert supervised_loss.logits_at_once(model, slices, True) == 50 * slices


def test_a_batch_without_labels_is_as_under_upstream(model):
    inputs = batch()
    inputs["labels"][:] = -100
    loss, _ = step(model, inputs)
    supervised_loss.install(model)
    ours, gradients = step(model, inputs)
    assert loss.isnan() and ours.isnan()
    assert all(not gradient.any() for gradient in gradients.values())


def test_evaluation_and_calls_without_labels_are_untouched(model):
    supervised_loss.install(model)
    inputs = batch()
    evaluated = model.eval()(**inputs)
    assert evaluated.logits.shape == (3, 20, 50) and evaluated.loss.isfinite()
    del inputs["labels"]
    assert model.train()(**inputs).logits.shape == (3, 20, 50)


def test_install_twice_is_install_once_and_uninstall_restores(model):
    before, head = dict(vars(model)), dict(vars(model.lm_head))
    for _ in range(2):
        supervised_loss.install(model)
    assert model.lm_head.forward.args[2] == types.MethodType(nn.Linear.forward, model.lm_head)
    supervised_loss.uninstall(model)
    supervised_loss.uninstall(model)
    assert vars(model) == before and vars(model.lm_head) == head
    assert model(**batch()).logits.shape == (3, 20, 50)


def test_an_error_in_the_forward_pass_leaves_nothing_behind(model):
    supervised_loss.install(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(**{**batch(), "input_ids": torch.full((3, 20), 99)})
    assert model.eval()(**batch()).logits.shape == (3, 20, 50)


def test_hidden_states_that_do_not_fit_the_labels_are_refused(model):
    supervised_loss.install(model)
    with pytest.raises(ValueError, match=r"labels of shape \(3, 19\) do not fit hidden states of shape \(3, 20, 32\)"):
        model(**{**batch(), "labels": batch()["labels"][:, 1:]})


def intercepting(calls: list):
    """An upstream's `intercept_labels` that notes what it is given, and that it was undone."""

    def intercept(causal, receive):
        calls.append(receive)
        return lambda: calls.append("undone")

    return intercept


def test_labels_that_an_upstream_moves_are_waited_for():
    model, calls = FAMILIES["llama"](), []
    forward, inputs = model.forward, batch()
    loss, _ = step(model.train(), inputs)

    def merging(labels=None, merge=True, **kwargs):
        """Hands its labels over on the way, as an upstream's forward does where it puts image features in."""
        return forward(**kwargs, labels=calls[0](labels) if merge else labels)

    model.forward = functools.wraps(forward)(merging)
    assert supervised_loss.install(model, intercepting(calls)) is None
    assert calls[0](inputs["labels"]) is inputs["labels"]  # outside of a step
    torch.testing.assert_close(model(**inputs).loss, loss, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="did not put image features in where it was expected to; give --supervised_logits False"):
        model(**inputs, merge=False)
    supervised_loss.uninstall(model)
    assert calls[1:] == ["undone"] and model.forward.__wrapped__ == forward


def test_a_model_without_a_head_is_left_alone():
    model = FAMILIES["llama"]()
    model.get_output_embeddings = lambda: None
    assert "does not compute the plain cross-entropy of a head" in supervised_loss.why_not(model)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=2))


def changed(**settings):
    model = FAMILIES["llama"]()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: changed(pretraining_tp=2), "pretraining_tp is 2"),
        (lambda: changed(return_dict=False), "return_dict off"),
        (lambda: nn.DataParallel(changed()), "DataParallel"),
        (mixtral, "MixtralForCausalLM.forward does not compute the plain cross-entropy"),
    ],
)
def test_models_with_another_loss_are_left_alone(make, reason):
    model = make()
    assert reason in supervised_loss.install(model)
    assert "forward" not in vars(model)


@pytest.fixture
def llava_batch(tiny):
    """Upstream's LLaVA with LoRA on layers 1 and 6, and a batch of its own data pipeline, text-only records included."""
    train = pytest.importorskip("llava.train.train")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from llava_region.decoder import linear_modules
    from tests.helpers.finished_models import llava_model

    model = llava_model(tiny)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linear_modules(model, (1, 6)))).train()
    model.get_model().mm_projector.requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.backbone, use_fast=False, model_max_length=512, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    options = {"image_folder": str(tiny.images), "image_aspect_ratio": "pad", "is_multimodal": True, "mm_use_im_start_end": False}
    options["image_processor"] = model.get_vision_tower().image_processor
    data = train.LazySupervisedDataset(str(tiny.data), tokenizer, SimpleNamespace(**options))
    text = next(i for i, record in enumerate(data.list_data_dict) if "image" not in record)
    return model, train.DataCollatorForSupervisedDataset(tokenizer)([data[i] for i in (0, text, 1, 2)])


def test_upstreams_llava_under_peft(llava_batch):
    from llava_region.patches.llava import UPSTREAM

    model, inputs = llava_batch
    loss, gradients = step(model, inputs)
    assert any("mm_projector" in name for name in gradients) and any("lora_A" in name for name in gradients)
    seen = rows_seen(model.get_base_model().lm_head)
    assert supervised_loss.install(model, UPSTREAM.intercept_labels) is None
    ours, found = step(model, inputs)
    assert seen == [(inputs["labels"] != -100).sum()]
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7, msg=name)
    supervised_loss.uninstall(model)
    assert "prepare_inputs_labels_for_multimodal" not in vars(model.get_base_model())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_fifty_steps_of_upstreams_training_have_the_same_losses(tiny, tmp_path, mode):
    """Real train(): with our recomputation under a limit and our loss, against upstream's own of both."""
    pytest.importorskip("llava.train.train")
    from tests.helpers.training_runs import LORA, llava_flags, train

    ours = {"region_memory": "70MB"}
    upstreams = {"region_checkpointing": "all", "supervised_logits": False}
    losses = []
    for name, flags in (("ours", ours), ("upstream", upstreams)):
        settings = {**(LORA if mode == "lora" else {}), "lora_dropout": 0.0, "learning_rate": 1e-3, "max_steps": 50, **flags}
        done = train([*llava_flags(tiny, tmp_path / name, **settings), "--tune_layers", "1,6"])
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        assert ("supervised positions only" in done.stdout) == (name == "ours")
        assert ("8 of 8 layers are recomputed" in done.stdout) == (name == "upstream") and "no layer is recomputed" not in done.stdout
    assert len(losses[0]) == 50
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # logged with four decimals
    assert losses[0][-1] < losses[0][0] - 0.3
