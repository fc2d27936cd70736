"""Runs read from evaluation folders: names, families, costs, parts of the data; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_region import tasks
from llava_region.data.tiny import TinyFiles
from llava_region.errors import LlavaRegionError
from llava_region.report.figures import FIGURES, figure_data
from llava_region.report.runs import read_runs
from llava_region.report.sources import Sources
from tests.helpers.report_runs import VICUNA_13B, WHOLE, cost, evaluated, region_of, table_of


def test_data_scales_come_from_the_samples_seen(tmp_path: Path) -> None:
    folders = [
        evaluated(tmp_path, "all", WHOLE, region_of("all"), cost=cost(695_012)),
        evaluated(tmp_path, "quarter", WHOLE, region_of("all"), cost=cost(173_760)),
        evaluated(tmp_path, "tenth", WHOLE, region_of("sparse:8"), cost=cost(69_504)),
        evaluated(tmp_path, "13b", WHOLE, region_of("all", 40, VICUNA_13B), cost=cost(665_000)),
        evaluated(tmp_path, "unknown", WHOLE, region_of("sparse:4")),
    ]
    scales = {run.name: run.data_scale for run in read_runs(folders)}
    assert scales == {"all": 100, "quarter": 25, "tenth": 10, "13b": 100, "unknown": 100}
    assert read_runs(folders, scales={"unknown": "10%"})[-1].data_scale == 10
    labels = {line.run: line.label for line in table_of(2, folders).lines}
    assert labels["tenth"] == "8 layers, 10% of the data" and labels["all"] == "32 layers"
    with pytest.raises(LlavaRegionError, match="allowed: above 0 to 100"):
        read_runs(folders, scales={"unknown": "0"})
    with pytest.raises(LlavaRegionError, match="--data-scale names 'x', which is not a run"):
        read_runs(folders, scales={"x": "10"})


def test_cost_is_found_in_the_models_folder(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "run", WHOLE, region_of("all"))
    model = tmp_path / "models" / "run"
    assert read_runs([folder])[0].cost is None
    (model / "cost.json").write_text(json.dumps(cost(10, 1.0)))
    assert read_runs([folder])[0].cost["gpu_hours"] == 1.0
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text(json.dumps(cost(10, 2.0)))
    assert read_runs([folder], costs={"run": str(elsewhere)})[0].cost["gpu_hours"] == 2.0
    assert read_runs([folder], costs={"run": str(model)})[0].cost["gpu_hours"] == 1.0
    # of a checkpoint: the run's
    data = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**data, "model": str(model / "checkpoint-9")}))
    assert read_runs([folder])[0].cost["gpu_hours"] == 1.0
    # the model was moved, the evaluation lies in the run's folder
    moved = model / "eval"
    moved.mkdir()
    (moved / "results.json").write_text(json.dumps({**data, "model": "/gone"}))
    assert read_runs([moved])[0].cost["gpu_hours"] == 1.0


def test_training_runs_without_evaluation_are_enough_for_figure_3(scaled: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / "models" / name for name in ("32-100", "8-100")]
    runs = read_runs(folders)
    assert [(run.name, len(run.layers), run.scores) for run in runs] == [("32-100", 32, {}), ("8-100", 8, {})]
    data, _ = figure_data(FIGURES[3], Sources(runs))
    assert data["Meta-Llama-3-8B-Instruct"][0]["gpu_hours"] == [18, 42]
    (folders[0] / "cost.json").unlink()  # not finished
    with pytest.raises(LlavaRegionError, match="or a finished training run"):
        read_runs(folders)


def test_a_backbone_from_the_hubs_cache_is_of_its_models_family(tmp_path: Path) -> None:
    cached = "/cache/models--meta-llama--Meta-Llama-3-8B-Instruct/snapshots/0a1b2c"
    folders = [
        evaluated(tmp_path, "8", {"mmlu": 60.0}, region_of("sparse:8")),
        evaluated(tmp_path, "backbone", {"mmlu": 60.0}, None, upstream=None, model=cached),
    ]
    assert {run.family for run in read_runs(folders)} == {"Meta-Llama-3-8B-Instruct"}


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / run, "eval", WHOLE, region_of("all")) for run in ("a", "b") if (tmp_path / run).mkdir() is None]
    assert [run.name for run in read_runs(folders)] == ["a/eval", "b/eval"]
    with pytest.raises(LlavaRegionError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_what_eval_writes_is_what_report_reads(
    tiny: TinyFiles, llava_checkpoint: Path, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_region.evaluation.evaluate import evaluate
    from tests.helpers.data_roots import write_bbh, write_gqa

    real = tasks.load
    monkeypatch.setattr(tasks, "load", lambda name: replace(real(name), max_new_tokens=4))  # untrained, it seldom ends an answer
    write_gqa(tmp_path / "data")
    write_bbh(tmp_path / "data")
    evaluate(llava_checkpoint, ["bbh", "gqa"], tmp_path / "data", tmp_path / "full", limit=1, device="cpu")
    evaluate(lora_run, ["gqa"], tmp_path / "data", tmp_path / "region", base=tiny.backbone, device="cpu")
    evaluate(tiny.backbone, ["bbh"], tmp_path / "data", tmp_path / "backbone", device="cpu")
    runs = read_runs([tmp_path / name for name in ("full", "region", "backbone")])
    assert [(run.layers, run.num_layers, run.family) for run in runs] == [
        (tuple(range(8)), 8, "vicuna-tiny"), ((1, 6), 8, "vicuna-tiny"), (None, None, "vicuna-tiny"),
    ]  # fmt: skip
    assert [sorted(run.scores) for run in runs] == [[], ["gqa"], ["bbh"]]
    assert {task: why for task, (_, why) in runs[0].partial.items()} == {"bbh": "limited to the first 1", "gqa": "limited to the first 1"}
