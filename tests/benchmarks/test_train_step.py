"""The benchmark of a training step, on the tiny shape: what it reports, not how fast this machine is."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from llava_region.decoder import layer_index
from tests.helpers.command_line import run

PATH = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("train_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(bench, name="tiny"):
    shape = bench.SHAPES[name]
    return bench.backbone(shape, torch.device("cpu")), shape


@pytest.fixture(scope="module")
def result(bench):
    return bench.run("tiny", region="sparse:25%", repeats=2, supervised=0.25, region_memory=None)


def test_every_mode_is_reported(bench, result, capsys, tmp_path):
    json.dumps(result)
    assert result["shape"] == "tiny" and result["device"] and list(result["modes"]) == list(bench.MODES)
    for mode in result["modes"].values():
        assert mode["seconds"] > 0 and mode["peak_bytes"] > 0 and mode["tokens_per_second"] == pytest.approx(128 / mode["seconds"])
    assert result["modes"]["upstream"]["ratio"] == 1.0
    recomputed = {name: mode["recomputed"] for name, mode in result["modes"].items()}
    every = list(range(8))
    assert recomputed == {"upstream": every, "paper": every, "region": [0, 7], "none": [], "auto": [], "full": []}
    bench.show(result)
    assert "upstream" in capsys.readouterr().out
    bench.plot(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000


def test_keeping_activations_takes_memory(result):
    peaks = {name: mode["peak_bytes"] for name, mode in result["modes"].items()}
    assert peaks["paper"] < peaks["region"] < peaks["none"] == peaks["auto"]


@pytest.mark.parametrize("limit", ["4500KB", "3500KB", "3MB"])
def test_auto_stays_under_a_limit(bench, result, limit):
    limited = bench.run("tiny", region="sparse:25%", repeats=1, supervised=1.0, region_memory=limit, modes=("upstream", "none", "auto"))
    auto = limited["modes"]["auto"]
    assert auto["recomputed"] and auto["peak_bytes"] <= limited["region_memory_bytes"] < limited["modes"]["none"]["peak_bytes"]


def test_all_modes_share_frozen_weights(bench):
    base, _ = small(bench)
    for layers, lora in ((range(8), True), ((0, 7), True), ((0, 7), False)):
        model = bench.variant(base, layers, lora)
        own = {name for name, p in model.named_parameters() if p.data_ptr() not in {q.data_ptr() for q in base.parameters()}}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert own == trained and {layer_index(name) for name in trained} == set(layers)


def test_modes_on_one_model_do_not_leak_into_each_other(bench):
    base, shape = small(bench)
    region = bench.Region.parse("sparse:25%", 8)
    model = bench.variant(base, region.layers, True)
    batch = bench.random_batch(shape, 0.5, torch.device("cpu"))
    names, losses = ("paper", "region", "none", "paper"), []
    for name in names:
        mode = bench.Mode(name, model, region, shape, None)
        mode.optimizer.step = lambda: None
        mode.prepare()
        torch.manual_seed(0)
        mode.step(batch)
        losses.append(mode.loss.item())
        assert ("logits" in model(**batch)) == (name == "paper")
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_true_shapes(bench):
    """Parameters of the published models, without their vision towers."""
    for name, billions in (("llava-7b", 6.74), ("llava-13b", 13.02), ("bunny-8b", 8.03)):
        model = bench.backbone(bench.SHAPES[name], torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["llava-7b", "llava-13b", "bunny-8b"])
def test_a_shape_that_does_not_fit_is_refused_before_it_is_allocated(bench, capsys, monkeypatch, name):
    """On a machine without a GPU, llava-7b took all memory until the kernel ended some process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "free_memory", lambda device: 20 * 10**9)
    code, out, err = run(capsys, "--shape", name, main=bench.main)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: --shape {name} takes ") and "20 GB are free on cpu" in err and "--shape cpu" in err


def test_memory_is_counted_as_it_is_taken(bench):
    """Against the bytes of a real run's weights, states and gradients."""
    region, modes = bench.Region.parse("sparse:25%", 8), bench.MODES
    models = bench.build(bench.SHAPES["tiny"], region, modes, torch.device("cpu"), torch.float32)
    batch = bench.random_batch(bench.SHAPES["tiny"], 0.5, torch.device("cpu"))
    weights = {p.data_ptr(): p.nbytes for model in models.values() for p in model.parameters()}
    states, gradients = 0, []
    for model in models.values():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(**batch).loss.backward()
        gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        optimizer.step()
        states += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    logits = 2 * 64 * 512 * 12
    assert (
        bench.least_memory(bench.SHAPES["tiny"], region, modes, torch.float32) == sum(weights.values()) + states + max(gradients) + logits
    )


def test_a_shape_that_fits_is_not_refused(bench, monkeypatch):
    """On a GPU of 80 GB in bf16 the published 7B shape has room, also with every mode."""
    region = bench.Region.parse("sparse:25%", 32)
    monkeypatch.setattr(bench, "free_memory", lambda device: 79 * 10**9)
    bench.check_memory("llava-7b", region, bench.MODES, torch.device("cuda"), torch.bfloat16)


def test_command_line(bench, capsys, tmp_path):
    figure = tmp_path / "step.png"
    code, out, _ = run(capsys, "--shape", "tiny", "--repeats", 1, "--json", "--plot", figure, main=bench.main)
    assert code == 0 and set(json.loads(out)["modes"]) == set(bench.MODES)
    assert figure.is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--region", "sparse:99"], "sparse:99"),
        (["--repeats", "0"], "--repeats must be 1 or more"),
        (["--region_memory", "1KB"], "--region_memory 1 KB is too little"),
        (["--plot", "step.jpeg"], "cannot be written as 'step.jpeg'; allowed: .png, .svg, .pdf"),
        (["--region_memory", "lots"], "'lots' is not a memory size"),
    ],
)
def test_bad_input_is_one_line(bench, capsys, flags, message):
    code, _, err = run(capsys, "--shape", "tiny", *flags, main=bench.main)
    error = err.strip().splitlines()[-1]  # what is above it is progress
    assert code == 2 and error.startswith("error: ") and message in error
