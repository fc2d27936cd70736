"""`llava-region report`: averages and percentages, what is incomplete, labels, formats, figures.

Evaluation folders are made here in the form that `llava-region eval` writes; the paper's tables serve as known results.
"""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from llava_region import tasks
from llava_region.cli import main
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.report import figures as plots
from llava_region.report import formats as tables
from llava_region.report import paper
from llava_region.report import tables as report
from llava_region.report.formats import rounded
from llava_region.report.runs import read_runs

LLAMA, VICUNA, VICUNA_13B = "meta-llama/Meta-Llama-3-8B-Instruct", "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5"
SPECS = ("sparse:8", "lower:8", "lower-middle:8", "upper-middle:8", "top:8", "hybrid:8")
WHOLE = dict(zip(tasks.VISUAL, paper.TABLE_2[0].scores, strict=True))


def region_of(spec, num_layers=32, base=LLAMA, **more):
    return {**Region.parse(spec, num_layers).to_dict(), "base_model": base, "upstream": "llava", **more}


def evaluated(root, name, scores, region=None, *, cost=None, upstream="llava", results=None, **record):
    """An evaluation folder `root/name`, and the model's folder in `root/models` where its cost lies."""
    model = root / "models" / name
    model.mkdir(parents=True)
    if region:
        (model / "region.json").write_text(json.dumps(region))
    if cost:
        (model / "cost.json").write_text(json.dumps(cost))
    entries = {
        task: {"metric": "accuracy", "score": score, "n": 100, "missing": 0, "unreadable_images": 0} for task, score in scores.items()
    }
    data = {"model": str(model), "base": None, "upstream": upstream, "num_layers": 32, "region": region}
    (root / name).mkdir()
    (root / name / "results.json").write_text(json.dumps({**data, "tasks": {**entries, **(results or {})}, **record}))
    return root / name


def printed(root, rows, num_layers, base, prefix):
    """Evaluation folders with the scores of rows of the paper's Table 2 or 3."""
    out = []
    for row in rows:
        count = int(row.label.split()[0])
        spec = "all" if count == num_layers else f"sparse:{count}"
        out.append(
            evaluated(root, f"{prefix}-{count}", dict(zip(tasks.VISUAL, row.scores, strict=True)), region_of(spec, num_layers, base))
        )
    return out


def table_of(number, folders, *baselines, with_paper=False, **options):
    runs = read_runs(folders, **options)
    return report.build_table(number, runs, report.find_baselines(runs, list(baselines)), with_paper)


@pytest.fixture
def table_2(tmp_path):
    return printed(tmp_path, paper.TABLE_2, 32, LLAMA, "bunny")


# Printed averages that do not follow from the printed row: what the row gives.
NOT_FROM_THE_ROW = {"Sparse & Uniform": "62.87", "Consecutive Top": "59.33", "8 layers": "62.87", "6 layers": "62.77"}
# 57.68 or 57.69: within what rounding of the eight scores can do.
ROUNDING = {(paper.LLAVA_7B, "6 layers"): "57.68"}


def test_table_1_of_the_paper_reproduces(tmp_path):
    metrics = [
        {"scores": {"file": "s.json", "metric": metric}} for metric in report.METRICS if metric != "angular_distance_weights"
    ]  # the five of Table 1, in its order
    regions = [region_of("all"), *map(region_of, SPECS)]
    regions += [region_of(",".join(map(str, layers)), **more) for layers, more in zip(paper.IMPORTANCE_SETS.values(), metrics, strict=True)]
    folders = [
        evaluated(tmp_path, f"run{i}", dict(zip(tasks.VISUAL, row.scores, strict=True)), region)
        for i, (row, region) in enumerate(zip(paper.TABLE_1, regions, strict=True))
    ]
    table = table_of(1, folders[::-1], "run0")  # the order given does not matter
    assert [(line.section, line.label) for line in table.lines] == [(row.section, row.label) for row in paper.TABLE_1]
    for line, row in zip(table.lines, paper.TABLE_1, strict=True):
        assert rounded(line.average) == NOT_FROM_THE_ROW.get(row.label, f"{row.average:.2f}")
    assert rounded(table.lines[5].average) == "59.33" and paper.TABLE_1[5].average == 58.08
    best = {(table.lines[i].label, column) for i, column in tables.mark_best(table)}
    assert best == {
        ("Parameter Change Ratio", "ocrvqa"), ("Hybrid Top-Lower", "docvqa"), ("Sparse & Uniform", "refcocog"),
        ("Image Attention Score", "tdiuc"), ("Sparse & Uniform", "mmbench"), ("Angular Distance", "mmbench"),
        ("Sparse & Uniform", "gqa"), ("Consecutive Upper-middle", "scienceqa"), ("Angular Distance", "textvqa"),
        ("Sparse & Uniform", "average"),
    }  # fmt: skip


@pytest.mark.parametrize("number", [2, 3])
def test_tables_2_and_3_of_the_paper_reproduce(tmp_path, number):
    families = {paper.BUNNY: (32, LLAMA), paper.LLAVA_7B: (32, VICUNA), paper.LLAVA_13B: (40, VICUNA_13B)}
    folders = []
    for family, (num_layers, base) in families.items():
        rows = [row for row in paper.TABLES[number] if row.section == family]
        folders += printed(tmp_path, rows[::-1], num_layers, base, family)
    table = table_of(number, folders)
    assert [line.label for line in table.lines] == [row.label for row in paper.TABLES[number]]
    full = None
    for line, row in zip(table.lines, paper.TABLES[number], strict=True):
        exception = ROUNDING.get((row.section, row.label)) or (NOT_FROM_THE_ROW.get(row.label) if number == 2 else None)
        assert rounded(line.average) == (exception or f"{row.average:.2f}")
        if row.percent is None:
            full, base_average = row, line.average
            assert line.baseline and line.relative == 100
            continue
        # The paper divided averages: its printed ones give its percentages to the last digit but one of rounding.
        assert report.relative(row.average, full.average) == pytest.approx(row.percent, abs=0.0101)
        assert line.relative == pytest.approx(100 * line.average / base_average)
        assert line.relative == pytest.approx(row.percent, abs=0.0101 if not exception and row.label != "9 layers" else 0.026)


def test_the_papers_tables_are_whole():
    assert [len(table) for table in paper.TABLES.values()] == [12, 7, 10, 6]
    for number, table in paper.TABLES.items():
        assert {len(row.scores) for row in table} == {2 if number == 4 else 8}
    assert paper.TABLE_1[0].scores == paper.TABLE_2[0].scores and paper.TABLE_1[1].scores == paper.TABLE_2[2].scores


def test_the_papers_rows_are_marked_and_never_best(table_2):
    table = table_of(2, table_2, with_paper=True)
    own, theirs = table.lines[:7], table.lines[7:]
    assert not any(line.paper for line in own) and all(line.paper and line.section.startswith("The paper's numbers") for line in theirs)
    assert [line.average for line in theirs] == [row.average for row in paper.TABLE_2]
    assert {i for i, _ in tables.mark_best(table)} <= set(range(1, 7))
    assert "the paper prints an average of 62.78 for 6 layers; its row gives 62.77" in table.notes
    assert "not measured here" in table.notes[-1]
    assert any("58.08 for Consecutive Top; its row gives 59.33" in note for note in table_of(1, table_2, with_paper=True).notes)


def test_rounding_is_half_up():
    assert [rounded(x) for x in (62.8575, 50.2925, 0.005, 100, 59.325)] == ["62.86", "50.29", "0.01", "100.00", "59.33"]


def without(task):
    return {name: score for name, score in WHOLE.items() if name != task}


@pytest.mark.parametrize(
    ("scores", "results", "cell", "note"),
    [
        (without("gqa"), {}, "-", "GQA not evaluated"),
        (WHOLE, {"gqa": {"score": 99.5, "n": 50, "missing": 0, "limit": 50}}, "(99.50)", "GQA limited to the first 50"),
        (WHOLE, {"gqa": {"score": 99.5, "n": 12578, "missing": 1200}}, "(99.50)", "GQA 1,200 answers missing"),
    ],
)
def test_an_incomplete_run_is_shown_as_such_and_never_averaged(tmp_path, scores, results, cell, note):
    folders = [
        evaluated(tmp_path, "full", WHOLE, region_of("all")),
        evaluated(tmp_path, "whole-8", WHOLE, region_of("sparse:8")),
        evaluated(tmp_path, "whole-6", WHOLE, region_of("sparse:6")),
        evaluated(tmp_path, "part", scores, region_of("sparse:4"), results=results),
    ]
    table = table_of(2, folders)
    line = table.lines[-1]
    assert (line.label, line.average, line.relative) == ("4 layers", None, None)
    cells = tables.cells(table, 3, str)
    assert cells[tasks.VISUAL.index("gqa")] == cell and cells[-2:] == ["incomplete", "-"]
    assert f"4 layers is incomplete, not averaged: {note}" in table.notes
    assert (3, "gqa") not in tables.mark_best(table) and (1, "gqa") in tables.mark_best(table)
    row = list(csv.DictReader(io.StringIO(tables.comma_separated(table))))[-1]
    assert (row["gqa"], row["average"], row["percent_of_baseline"], row["incomplete"]) == ("", "", "", note)


def test_an_incomplete_baseline_gives_no_percentages(tmp_path):
    folders = [evaluated(tmp_path, "full", without("gqa"), region_of("all")), evaluated(tmp_path, "8", WHOLE, region_of("sparse:8"))]
    table = table_of(2, folders)
    assert [line.relative for line in table.lines] == [None, None] and table.lines[1].average is not None
    assert any("full, is incomplete, so there are no percentages" in note for note in table.notes)


def test_flaws_of_whole_scores_are_said(tmp_path):
    flawed = {"gqa": {"score": 60.0, "n": 12578, "missing": 0, "unreadable_images": 3, "cut_prompts": 2}}
    table = table_of(2, [evaluated(tmp_path, "a", WHOLE, region_of("all"), results=flawed)])
    assert "32 layers, GQA: 3 unreadable images and 2 prompts cut" in table.notes and table.lines[0].average is not None


def test_baselines(tmp_path):
    runs = read_runs(
        [
            evaluated(tmp_path, "all", WHOLE, region_of("all")),
            evaluated(tmp_path, "8", WHOLE, region_of("sparse:8")),
            evaluated(tmp_path, "all-pruned", WHOLE, region_of("0-29", 30, pruned={"original_layers": list(range(32)),
                      "original_num_layers": 32, "dropped": [28, 29]})),
            evaluated(tmp_path, "13b-10", WHOLE, region_of("sparse:10", 40, VICUNA_13B)),
        ]
    )  # fmt: skip
    found = report.find_baselines(runs, [])
    assert {family: run.name for family, run in found.items()} == {"Meta-Llama-3-8B-Instruct": "all"}
    assert report.find_baselines(runs, ["8"])["Meta-Llama-3-8B-Instruct"].name == "8"
    assert report.find_baselines(runs, [str(tmp_path / "8")])["Meta-Llama-3-8B-Instruct"].name == "8"
    with pytest.raises(LlavaRegionError, match="'none' is no run; allowed: all, 8, all-pruned, 13b-10"):
        report.find_baselines(runs, ["none"])
    with pytest.raises(LlavaRegionError, match="one baseline a model"):
        report.find_baselines(runs, ["8", "all"])
    notes = report.build_table(2, runs, found).notes
    assert "vicuna-13b-v1.5 has no baseline: name one with --baseline" in notes


def test_the_baseline_is_not_a_run_on_less_data(scaled):
    (base,) = report.find_baselines(read_runs(scaled), []).values()
    assert base.name == "32-100"


def test_best_is_within_a_family_and_among_several(tmp_path):
    worse = {task: score - 1 for task, score in WHOLE.items()}
    regions = [region_of("all", 40, VICUNA_13B), region_of("sparse:10", 40, VICUNA_13B), region_of("sparse:9", 40, VICUNA_13B)]
    regions += [region_of("all"), region_of("sparse:8")]
    scores = [WHOLE, WHOLE, worse, worse, worse]
    table = table_of(3, [evaluated(tmp_path, f"r{i}", *pair) for i, pair in enumerate(zip(scores, regions, strict=True))])
    assert tables.mark_best(table) == {(1, column) for column in (*tasks.VISUAL, "average")}  # a lone candidate is not best
    regions = [region_of("sparse:6"), region_of("sparse:4")]
    more = [evaluated(tmp_path, f"more{i}", {**worse, "gqa": 10 + i}, region) for i, region in enumerate(regions)]
    table = table_of(3, [*(tmp_path / f"r{i}" for i in range(5)), *more])
    assert {i for i, column in tables.mark_best(table) if column == "gqa"} == {1, 4}


def test_percentages_are_of_the_named_baseline(tmp_path):
    half = {task: score / 2 for task, score in WHOLE.items()}
    folders = [evaluated(tmp_path, "all", WHOLE, region_of("all")), evaluated(tmp_path, "half", half, region_of("sparse:8"))]
    assert [line.relative for line in table_of(2, folders, "half").lines] == [pytest.approx(100), pytest.approx(200)]


def test_labels(tmp_path):
    pruned = {"original_layers": Region.parse("sparse:8", 32).to_dict()["layers"], "original_num_layers": 32, "dropped": [25, 27, 29]}
    regions = {
        "a": region_of("0,4,8,12,18,22,26,30"),  # what sparse:8 means, written out
        "b": region_of("1,2,3,4,5,27,29,31"),
        "c": region_of("1,2,9"),
        "d": region_of("0,4,8,12,18,22,24,27", 29, pruned=pruned),
        "e": region_of("top:8", reverted={"layers": [24, 25]}),
        "f": region_of("16-23"),
        "g": region_of("16-23"),
        "h": region_of("30"),
    }
    folders = [evaluated(tmp_path, name, WHOLE, region) for name, region in regions.items()]
    labels = {line.run: line.label for line in table_of(1, folders).lines}
    assert labels == {
        "a": "Sparse & Uniform",
        "b": "Image Attention Score (the paper's layers)",
        "c": "layers 1,2,9",
        "d": "Sparse & Uniform, 3 pruned",
        "e": "Consecutive Top, 2 reverted",
        "f": "Consecutive Upper-middle (f)",
        "g": "Consecutive Upper-middle (g)",
        "h": "layers 30",
    }
    labels = {line.run: line.label for line in table_of(3, folders).lines}
    assert labels["h"] == "1 layer" and labels["c"] == "3 layers" and labels["d"] == "8 layers, 3 pruned"


def test_table_4_has_the_backbone_beside_its_models(tmp_path):
    text = {"mmlu": 50.52, "bbh": 26.85}
    folders = [
        evaluated(tmp_path, "vicuna-7b-v1.5", {"mmlu": 49.78, "bbh": 29.33}, None, upstream=None),
        evaluated(tmp_path, "8", {"mmlu": 50.74, "bbh": 31.64}, region_of("sparse:8", base=VICUNA)),
        evaluated(tmp_path, "all", {**text, "gqa": 1.0}, region_of("all", base=VICUNA)),
        evaluated(tmp_path, "released", text, None, upstream="llava"),  # upstream's own: no region.json, all layers
    ]
    table = table_of(4, folders, "all")
    assert [line.label for line in table.lines] == [
        "Fully-trained (32 layers) (all)", "Fully-trained (32 layers) (released)", "Partial-trained (8 layers)", "LLM backbone",
    ]  # fmt: skip
    assert len({line.family for line in table.lines}) == 1 and not table.averaged
    assert tables.heads(table) == ["MMLU", "BIG-bench-Hard"]
    assert not any("incomplete" in note for note in table.notes)
    assert "vicuna-7b-v1.5" not in {line.run for line in table_of(2, folders).lines}  # it answers no visual task


def cost(samples, hours=4.0, **more):
    return {"gpus": 8, "hours": hours / 8, "gpu_hours": hours, "samples": samples, "device": "NVIDIA A800", **more}


def test_data_scales_come_from_the_samples_seen(tmp_path):
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
    with pytest.raises(LlavaRegionError, match="--data-scale names 'x', which is no run"):
        read_runs(folders, scales={"x": "10"})


def test_cost_is_found_beside_the_model(tmp_path):
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


def test_training_runs_stand_for_themselves_in_figure_3(scaled, tmp_path):
    folders = [tmp_path / "models" / name for name in ("32-100", "8-100")]
    runs = read_runs(folders)
    assert [(run.name, len(run.layers), run.scores) for run in runs] == [("32-100", 32, {}), ("8-100", 8, {})]
    data, _ = plots.figure_data(3, runs)
    assert data["Meta-Llama-3-8B-Instruct"][0]["gpu_hours"] == [18, 42]
    (folders[0] / "cost.json").unlink()  # not finished
    with pytest.raises(LlavaRegionError, match="or a finished training run"):
        read_runs(folders)


def test_a_backbone_from_the_hubs_cache_is_of_its_models_family(tmp_path):
    cached = "/cache/models--meta-llama--Meta-Llama-3-8B-Instruct/snapshots/0a1b2c"
    folders = [
        evaluated(tmp_path, "8", {"mmlu": 60.0}, region_of("sparse:8")),
        evaluated(tmp_path, "backbone", {"mmlu": 60.0}, None, upstream=None, model=cached),
    ]
    assert {run.family for run in read_runs(folders)} == {"Meta-Llama-3-8B-Instruct"}


def test_names_tell_runs_apart(tmp_path):
    folders = [evaluated(tmp_path / run, "eval", WHOLE, region_of("all")) for run in ("a", "b") if (tmp_path / run).mkdir() is None]
    assert [run.name for run in read_runs(folders)] == ["a/eval", "b/eval"]
    with pytest.raises(LlavaRegionError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_markdown_and_latex_hold_the_same_cells(table_2):
    table = table_of(2, table_2, "bunny-32")
    rows = [line for line in tables.markdown(table).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[4] == "| 8 layers | **62.65** | 29.51 | 48.33 | 83.68 | 73.88 | 63.68 | 78.78 | 62.43 | **62.87** | 98.99 |"
    text = tables.latex(table)
    row = next(line for line in text.splitlines() if line.startswith("8 layers"))
    assert row == r"8 layers & \textbf{62.65} & 29.51 & 48.33 & 83.68 & 73.88 & 63.68 & 78.78 & 62.43 & \textbf{62.87} & 98.99 \\"
    assert {line.count("&") for line in text.splitlines() if "&" in line} == {10}
    assert text.count("{") == text.count("}")


def test_latex_escapes_names(tmp_path):
    text = tables.latex(table_of(0, [evaluated(tmp_path, "run_8&50%", WHOLE, region_of("all"))]))
    assert r"run\_8\&50\% & 64.26" in text and not re.search(r"(?<!\\)%(?! needs)", text)


def test_csv_is_unrounded_and_says_whose_numbers(table_2):
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(table_of(2, table_2, with_paper=True)))))
    assert [row["source"] for row in rows] == ["own"] * 7 + ["paper"] * 7
    assert float(rows[2]["average"]) == pytest.approx(62.8675, abs=1e-9) and rows[2]["run"] == "bunny-8" and rows[0]["baseline"] == "1"


@pytest.fixture
def scaled(tmp_path):
    """Runs of 32, 8 and 4 layers on 100, 25 and 10 % of the data; scores fall by 2 and 4."""
    folders = []
    for row in (paper.TABLE_2[0], paper.TABLE_2[2], paper.TABLE_2[4]):
        for percent, less in ((100, 0), (25, 2), (10, 4)):
            count = int(row.label.split()[0])
            scores = {task: score - less for task, score in zip(tasks.VISUAL, row.scores, strict=True)}
            hours = count + percent / 10
            region = region_of("all" if count == 32 else f"sparse:{count}")
            folders.append(evaluated(tmp_path, f"{count}-{percent}", scores, region, cost=cost(6950 * percent, hours)))
    return folders


def test_figure_2_has_a_line_a_data_scale(scaled):
    data, remarks = plots.figure_data(2, read_runs(scaled))
    (lines,) = data.values()
    assert remarks == [] and len(lines) == 12
    line = next(x for x in lines if x["task"] == "textvqa" and x["data_percent"] == 25)
    assert line == {
        "task": "textvqa", "data_percent": 25, "layers": [4, 8, 32], "scores": pytest.approx([60.74, 60.43, 60.11]),
        "full": pytest.approx(60.11), "paper": False,
    }  # fmt: skip
    with_paper, _ = plots.figure_data(2, read_runs(scaled), with_paper=True)
    theirs = [x for x in next(iter(with_paper.values())) if x["paper"]]
    assert [x["task"] for x in theirs] == list(plots.PANELS[2])
    assert theirs[0]["layers"] == [1, 2, 4, 6, 8, 16, 32] and theirs[0]["scores"][-1] == 64.26


def test_figures_take_the_uniform_selection_and_say_what_they_leave_out(scaled, tmp_path):
    top = evaluated(tmp_path, "top-8", dict.fromkeys(tasks.VISUAL, 1.0), region_of("top:8"), cost=cost(695_000, 99))
    for order in ([top, *scaled], [*scaled, top]):
        data, remarks = plots.figure_data(2, read_runs(order))
        assert remarks == ["left out, as another run tuned as many layers: top-8"]
        assert min(s for line in next(iter(data.values())) for s in line["scores"]) > 1


def test_figure_3_is_of_the_whole_models_on_all_the_data(scaled, tmp_path):
    note = {"original_layers": [0, 31], "original_num_layers": 32, "dropped": [30]}
    pruned = evaluated(tmp_path, "pruned", WHOLE, region_of("0,30", 31, pruned=note), cost=cost(695_000, 99))
    data, _ = plots.figure_data(3, read_runs([*scaled, pruned]))
    (line,) = data["Meta-Llama-3-8B-Instruct"]
    assert line == {"layers": [4, 8, 32], "gpu_hours": [14, 18, 42], "full": 42, "device": "8 × NVIDIA A800"}


@pytest.fixture
def pruned(tmp_path):
    """Full and region runs with 0, 1 and 2 layers pruned; of the region's, the one with 2 has no TextVQA."""
    folders = []
    for spec, less in (("all", 3.0), ("sparse:8", 1.0)):
        layers = list(Region.parse(spec, 32).layers)
        for count in (0, 1, 2):
            note = {"original_layers": layers, "original_num_layers": 32, "dropped": [29, 27][:count]}
            # in new numbers, as `prune` writes them: only how many there are matters here
            region = region_of(spec if spec != "all" else "all", 32 - count, VICUNA, **({"pruned": note} if count else {}))
            scores = {task: score - less * count for task, score in WHOLE.items() if (spec, count, task) != ("sparse:8", 2, "textvqa")}
            folders.append(evaluated(tmp_path, f"{spec.replace(':', '-')}-p{count}", scores, region))
    return folders


def test_figure_4_sets_full_against_region(pruned):
    data, _ = plots.figure_data(4, read_runs(pruned))
    lines = {(x["task"], x["full"]): x for x in data["vicuna-7b-v1.5"]}
    assert set(lines) == {(task, full) for task in plots.PANELS[4] for full in (True, False)}
    assert lines["ocrvqa", True]["scores"] == pytest.approx([64.26, 61.26, 58.26]) and lines["ocrvqa", True]["layers_tuned"] == 32
    assert lines["ocrvqa", False]["scores"] == pytest.approx([64.26, 63.26, 62.26]) and lines["ocrvqa", False]["layers_tuned"] == 8
    assert lines["textvqa", False]["pruned"] == [0, 1]


def test_incomplete_scores_are_not_drawn(tmp_path):
    part = {"gqa": {"score": 60.0, "n": 5, "missing": 0, "limit": 5}}
    folder = evaluated(tmp_path, "a", {}, region_of("all"), results=part)
    for number in (2, 3, 4):
        with pytest.raises(LlavaRegionError, match=f"figure {number} needs runs with"):
            plots.figure_data(number, read_runs([folder]))


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_figures_are_drawn_with_what_they_show(scaled, pruned, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text, to be read back
        for number, folders in ((2, scaled), (3, scaled), (4, pruned)):
            data, _ = plots.figure_data(number, read_runs(folders), with_paper=True)
            files = plots.draw(number, data, tmp_path / "out")
            assert [file.name for file in files] == [f"figure{number}.png", f"figure{number}.svg"]
            assert min(png_size(files[0])) > 500
    texts = {n: (tmp_path / "out" / f"figure{n}.svg").read_text() for n in (2, 3, 4)}
    shown = {
        2: [
            "OCRVQA",
            "TextVQA",
            "TDIUC",
            "GQA",
            "100 % of the data",
            "25 % of the data",
            "98 % of all layers",
            "(Table 2)",
            "layers tuned",
        ],
        3: ["Meta-Llama-3-8B-Instruct", "8 × NVIDIA A800", "GPU hours", "42.0", "18.0", "−57 %"],
        4: ["ScienceQA", "all 32 layers tuned", "region of 8 layers tuned", "layers pruned"],
    }
    for number, words in shown.items():
        assert [word for word in words if word not in texts[number]] == []


def test_figure_4_is_dashed_for_the_full_model(pruned):
    data, _ = plots.figure_data(4, read_runs(pruned))
    (drawn,) = [plots._draw_tasks(4, *item) for item in data.items()]
    styles = {line.get_label(): line.get_linestyle() for axis in drawn.axes for line in axis.lines}
    assert styles == {"all 32 layers tuned": "--", "region of 8 layers tuned": "-"}


def test_figure_2_without_an_all_layers_run_has_no_98_percent_line(scaled):
    def horizontal(folders):
        data, _ = plots.figure_data(2, read_runs(folders))
        axes = plots._draw_tasks(2, *next(iter(data.items()))).axes
        return [line.get_ydata()[0] for line in axes[0].lines if len(line.get_ydata()) == 2 and line.get_linestyle() == "--"]

    assert horizontal(scaled) == pytest.approx([0.98 * (64.26 - less) for less in (0, 2, 4)])
    assert horizontal([folder for folder in scaled if not folder.name.startswith("32-")]) == []


def test_figures_of_several_families_have_files_of_their_own(scaled, tmp_path):
    other = evaluated(tmp_path, "13b", WHOLE, region_of("all", 40, VICUNA_13B), cost=cost(665_000, 90))
    runs = read_runs([*scaled, other])
    names = [file.name for file in plots.draw(2, plots.figure_data(2, runs)[0], tmp_path / "out")]
    assert names[::2] == ["figure2-Meta-Llama-3-8B-Instruct.png", "figure2-vicuna-13b-v1.5.png"]
    assert [file.name for file in plots.draw(3, plots.figure_data(3, runs)[0], tmp_path / "out")] == ["figure3.png", "figure3.svg"]


def run(capsys, *argv):
    code = main(["report", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_prints_markdown_and_json(table_2, capsys):
    code, text, _ = run(capsys, *table_2, "--baseline", "bunny-32", "--table", 2)
    assert code == 0 and "| 16 layers |" in text and "98.97" in text
    code, text, _ = run(capsys, *table_2, "--table", 2, "--table", 1, "--json")
    data = json.loads(text)
    assert set(data["tables"]) == {"1", "2"} and data["files"] == []
    assert data["tables"]["2"]["lines"][1]["relative"] == pytest.approx(100 * 62.8575 / 63.51125)
    code, text, error = run(capsys, *table_2, "--paper")
    assert code == 0 and "bunny-32" in text and "go with --table" in error  # all tasks, run by run


def test_command_writes_every_form(scaled, tmp_path, capsys):
    out = tmp_path / "report"
    code, text, error = run(capsys, *scaled, "--table", 2, "--figure", 2, "--figure", 3, "--paper", "--out", out)
    names = {"table2.md", "table2.csv", "table2.tex", "figure2.png", "figure2.svg", "figure3.png", "figure3.svg"}
    assert code == 0 and {path.name for path in out.iterdir()} == names and len(text.splitlines()) == len(names)
    assert error == "figure 3: the paper's text gives no numbers for it\n"
    code, text, _ = run(capsys, *scaled, "--table", 4, "--format", "csv", "--out", tmp_path / "csv")
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["table4.csv"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--baseline", "none"], "the baseline 'none' is no run"),
        (["--table", "5"], "--table"),
        (["--figure", "1"], "--figure"),
        (["--figure", "2"], "--out DIR"),
        (["--format", "html"], "unknown format 'html'; allowed: markdown, csv, latex, all"),
        (["--format", "all"], "--out DIR"),
        (["--cost", "bunny-8"], "has no '='"),
        (["--cost", "x=cost.json"], "--cost names 'x'"),
        (["--cost", "bunny-8=/nowhere/cost.json"], "cannot read"),
        (["--figure", "4", "--out", "OUT", "--table", "2"], "figure 4 needs runs with layers pruned"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(table_2, tmp_path, capsys, argv, message):
    before = sorted(tmp_path.iterdir())
    code, text, error = run(capsys, *table_2, *[str(tmp_path / "out") if a == "OUT" else a for a in argv])
    assert code == 2 and text == "" and message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no 'tasks'"),
        ('{"model": "m", "tasks": {"vqa": {"score": 1, "n": 1}}}', "unknown task 'vqa'"),
        ('{"model": "m", "tasks": {"gqa": {"score": 140, "n": 1}}}', "the score of gqa in"),
        ('{"model": "m", "tasks": {"gqa": {"n": 1}}}', "is None; allowed: 0 to 100"),
        ('{"model": "m", "tasks": {"gqa": 3}}', "the score of gqa in"),
        ('{"model": "m", "tasks": {}, "region": {"layers": [1]}}', "names no 'layers' or 'num_layers'"),
    ],
)
def test_malformed_results_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "results.json").write_text(content)
    code, _, error = run(capsys, tmp_path)
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_folder_without_results(tmp_path, capsys):
    code, _, error = run(capsys, tmp_path)
    assert code == 2 and "holds no results.json; give the --out folder of 'llava-region eval'" in error


def test_tables_need_neither_torch_nor_matplotlib(table_2):
    code = "import sys; from llava_region.cli import main; main(sys.argv[1:]); print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "report", *map(str, table_2)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_eval_writes_is_what_report_reads(tiny, llava_checkpoint, lora_run, tmp_path, monkeypatch):
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
