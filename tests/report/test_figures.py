"""The figures: the series, and what is drawn of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.report.figures import FIGURES, draw, figure_data
from llava_region.report.runs import read_runs
from llava_region.report.series import TASKS_OVER_LAYERS, TASKS_OVER_PRUNED
from llava_region.report.sources import Sources, read_perplexities, read_scores
from tests.helpers.pictures import png_size, readable_svg
from tests.helpers.report_runs import VICUNA, VICUNA_13B, WHOLE, cost, evaluated, region_of


def test_figure_2_has_a_line_per_data_scale(scaled: list[Path]) -> None:
    data, remarks = figure_data(FIGURES[2], Sources(read_runs(scaled)))
    (lines,) = data.values()
    assert remarks == [] and len(lines) == 12
    line = next(x for x in lines if x["task"] == "textvqa" and x["data_percent"] == 25)
    assert line == {
        "task": "textvqa", "data_percent": 25, "layers": [4, 8, 32], "scores": pytest.approx([60.74, 60.43, 60.11]),
        "full": pytest.approx(60.11), "paper": False,
    }  # fmt: skip
    with_paper, _ = figure_data(FIGURES[2], Sources(read_runs(scaled)), with_paper=True)
    theirs = [x for x in next(iter(with_paper.values())) if x["paper"]]
    assert [x["task"] for x in theirs] == list(TASKS_OVER_LAYERS)
    assert theirs[0]["layers"] == [1, 2, 4, 6, 8, 16, 32] and theirs[0]["scores"][-1] == 64.26
    assert {line["of"] for line in theirs} == {"Bunny-Llama-3-8B-V (Table 2)"}


@pytest.mark.parametrize(
    ("base", "model", "layers", "gqa"),
    [
        ("lmsys/vicuna-7b-v1.5", "LLaVA-1.5-7B (Table 3)", [1, 2, 4, 6, 8, 16, 32], 62.98),
        ("/models/vicuna-13b-v1.5", "LLaVA-1.5-13B (Table 3)", [9, 10, 40], 63.29),
        ("models--meta-llama--Meta-Llama-3-8B-Instruct", "Bunny-Llama-3-8B-V (Table 2)", [1, 2, 4, 6, 8, 16, 32], 64.29),
        ("meta-llama/Llama-3.1-8B-Instruct", None, [], 0),
        ("lmsys/vicuna-7b-v1.3", None, [], 0),
        ("microsoft/Phi-3-mini-4k-instruct", None, [], 0),
    ],
)
def test_the_paper_s_line_is_of_the_same_model(tmp_path: Path, base: str, model: str | None, layers: list[int], gqa: float) -> None:
    folder = evaluated(tmp_path, "a", WHOLE, region_of("sparse:8", base=base))
    data, remarks = figure_data(FIGURES[2], Sources(read_runs([folder])), with_paper=True)
    ((family, lines),) = data.items()
    theirs = [line for line in lines if line["paper"]]
    if model is None:
        assert not theirs and remarks == [f"the paper has no numbers of {family}"]
        return
    assert remarks == [] and {line["of"] for line in theirs} == {model}
    line = next(line for line in theirs if line["task"] == "gqa")
    assert (line["full"], line["layers"]) == (gqa, layers)
    with readable_svg():
        draw(FIGURES[2], data, tmp_path / "out")
    assert model in (tmp_path / "out" / "figure2.svg").read_text()


def test_figures_take_the_uniform_selection_and_say_what_they_leave_out(scaled: list[Path], tmp_path: Path) -> None:
    top = evaluated(tmp_path, "top-8", dict.fromkeys(tasks.VISUAL, 1.0), region_of("top:8"), cost=cost(695_000, 99))
    for order in ([top, *scaled], [*scaled, top]):
        data, remarks = figure_data(FIGURES[2], Sources(read_runs(order)))
        assert remarks == ["left out, as another run tuned as many layers: top-8"]
        assert min(s for line in next(iter(data.values())) for s in line["scores"]) > 1


def test_figure_3_is_of_the_whole_models_on_all_the_data(scaled: list[Path], tmp_path: Path) -> None:
    note = {"original_layers": [0, 31], "original_num_layers": 32, "dropped": [30]}
    pruned = evaluated(tmp_path, "pruned", WHOLE, region_of("0,30", 31, pruned=note), cost=cost(695_000, 99))
    data, _ = figure_data(FIGURES[3], Sources(read_runs([*scaled, pruned])))
    (line,) = data["Meta-Llama-3-8B-Instruct"]
    assert line == {"layers": [4, 8, 32], "gpu_hours": [14, 18, 42], "full": 42, "device": "8 × NVIDIA A800"}


def test_figure_4_compares_full_with_region(pruned: list[Path]) -> None:
    data, _ = figure_data(FIGURES[4], Sources(read_runs(pruned)))
    lines = {(x["task"], x["full"]): x for x in data["vicuna-7b-v1.5"]}
    assert set(lines) == {(task, full) for task in TASKS_OVER_PRUNED for full in (True, False)}
    assert lines["ocrvqa", True]["scores"] == pytest.approx([64.26, 61.26, 58.26]) and lines["ocrvqa", True]["layers_tuned"] == 32
    assert lines["ocrvqa", False]["scores"] == pytest.approx([64.26, 63.26, 62.26]) and lines["ocrvqa", False]["layers_tuned"] == 8
    assert lines["textvqa", False]["pruned"] == [0, 1]


def test_incomplete_scores_are_not_drawn(tmp_path: Path) -> None:
    part = {"gqa": {"score": 60.0, "n": 5, "missing": 0, "limit": 5}}
    folder = evaluated(tmp_path, "a", {}, region_of("all"), results=part)
    for number in (2, 3, 4):
        with pytest.raises(LlavaRegionError, match=f"figure {number} needs runs with"):
            figure_data(FIGURES[number], Sources(read_runs([folder])))


def test_figures_are_drawn_with_what_they_show(scaled: list[Path], pruned: list[Path], tmp_path: Path) -> None:
    with readable_svg():
        for number, folders in ((2, scaled), (3, scaled), (4, pruned)):
            data, _ = figure_data(FIGURES[number], Sources(read_runs(folders)), with_paper=True)
            files = draw(FIGURES[number], data, tmp_path / "out")
            assert [file.name for file in files] == [f"figure{number}.png", f"figure{number}.svg"]
            assert min(png_size(files[0])) > 500
    texts = {n: (tmp_path / "out" / f"figure{n}.svg").read_text() for n in (2, 3, 4)}
    shown = {
        2: ["OCRVQA", "TextVQA", "TDIUC", "GQA", "100 % of the data", "25 % of the data", "98 % of all layers", "(Table 2)"],
        3: ["Meta-Llama-3-8B-Instruct", "8 × NVIDIA A800", "GPU hours", "42.0", "18.0", "−57 %"],
        4: ["ScienceQA", "all 32 layers tuned", "region of 8 layers tuned", "layers pruned"],
    }
    shown[2] += ["layers tuned"]
    for number, words in shown.items():
        assert [word for word in words if word not in texts[number]] == []


def test_figure_4_is_dashed_for_the_full_model(pruned: list[Path]) -> None:
    data, _ = figure_data(FIGURES[4], Sources(read_runs(pruned)))
    drawn = FIGURES[4].draw(data)
    styles = {line.get_label(): line.get_linestyle() for axis in drawn.axes for line in axis.lines}
    assert styles == {"all 32 layers tuned": "--", "region of 8 layers tuned": "-"}


def test_figure_2_without_an_all_layers_run_has_no_98_percent_line(scaled: list[Path]) -> None:
    def horizontal(folders: list[Path]) -> list[float]:
        data, _ = figure_data(FIGURES[2], Sources(read_runs(folders)))
        axes = FIGURES[2].draw(data).axes
        return [line.get_ydata()[0] for line in axes[0].lines if len(line.get_ydata()) == 2 and line.get_linestyle() == "--"]

    assert horizontal(scaled) == pytest.approx([0.98 * (64.26 - less) for less in (0, 2, 4)])
    assert horizontal([folder for folder in scaled if not folder.name.startswith("32-")]) == []


def test_figures_of_several_families_have_files_of_their_own(scaled: list[Path], tmp_path: Path) -> None:
    other = evaluated(tmp_path, "13b", WHOLE, region_of("all", 40, VICUNA_13B), cost=cost(665_000, 90))
    runs = read_runs([*scaled, other])
    names = [file.name for file in draw(FIGURES[2], figure_data(FIGURES[2], Sources(runs))[0], tmp_path / "out")]
    assert names[::2] == ["figure2-Meta-Llama-3-8B-Instruct.png", "figure2-vicuna-13b-v1.5.png"]
    assert [file.name for file in draw(FIGURES[3], figure_data(FIGURES[3], Sources(runs))[0], tmp_path / "out")] == [
        "figure3.png",
        "figure3.svg",
    ]


ROWS = [
    ("in/vqa.json", True, [], 2.0), ("in/vqa.json", True, [0, 1], 3.0), ("in/wiki.json", False, [], 5.5),
    ("in/wiki.json", False, [0, 1], None),
]  # fmt: skip


def perplexities(folder: Path, rows: list[tuple] = ROWS, **more: object) -> Path:
    """A file of `llava-region perplexity`."""
    path = folder / f"perplexity-{len(list(folder.glob('perplexity-*')))}.json"
    listed = [dict(zip(("data", "visual", "reverted", "perplexity"), row, strict=True)) for row in rows]
    path.write_text(json.dumps({"model": "/runs/llava", "upstream": "llava", "base": VICUNA, "template": "v1", "rows": listed, **more}))
    return path


def backbone(folder: Path) -> Path:
    return perplexities(folder, [("elsewhere/wiki.json", False, [], 5.0)], model=VICUNA, upstream=None, base=None)


def test_figure_1_compares_images_with_the_trained_model_and_text_with_the_backbone(tmp_path: Path, pruned: list[Path]) -> None:
    sources = Sources(read_runs(pruned), read_perplexities([perplexities(tmp_path), backbone(tmp_path)]))
    data, remarks = figure_data(FIGURES[1], sources)
    ((family, found),) = data.items()
    assert remarks == [] and family == "vicuna-7b-v1.5"
    bars = [one for one in found if "perplexity" in one]
    assert [(Path(bar["data"]).stem, bar["backbone"], bar["reverted"], bar["rise"]) for bar in bars] == [
        ("vqa", False, [], None), ("vqa", False, [0, 1], pytest.approx(50)),
        ("wiki", True, [], None), ("wiki", False, [], pytest.approx(10)), ("wiki", False, [0, 1], None),
    ]  # fmt: skip
    lines = [one for one in found if "perplexity" not in one]
    assert [line["task"] for line in lines] == list(TASKS_OVER_PRUNED) and all(line["layers_tuned"] == 32 for line in lines)
    drawn = FIGURES[1].draw(data)
    left, right = drawn.axes
    assert [bar.get_height() for bar in left.patches] == [2, 3, 5, 5.5, 1] and len(right.lines) == 4
    assert {text.get_text() for text in left.texts} == {"2", "3\n+50 %", "5", "5.5\n+10 %", "not\nfinite"}
    with readable_svg():
        (_, svg) = draw(FIGURES[1], data, tmp_path / "out")
    for word in ("as trained", "reverted: 0-1", "the backbone", "wiki", "layers pruned", "TextVQA"):
        assert f">{word}<" in svg.read_text(), word


def test_either_half_of_figure_1_may_be_missing(tmp_path: Path, pruned: list[Path]) -> None:
    for sources in (Sources(read_runs(pruned)), Sources([], read_perplexities([perplexities(tmp_path)]))):
        (panel,) = FIGURES[1].draw(figure_data(FIGURES[1], sources)[0]).axes
        assert bool(panel.lines) == bool(sources.runs) and bool(panel.patches) == bool(sources.perplexities)
    # without the backbone's own file a rise of text is not known
    data, _ = figure_data(FIGURES[1], sources)
    assert [bar["rise"] for bar in data["vicuna-7b-v1.5"]] == [None, pytest.approx(50), None, None]


def test_figure_5_has_a_row_per_instance(tmp_path: Path) -> None:
    blocks = [{"data": name, "scores": [[n + layer for layer in range(4)] for n in range(3)]} for name in ("docvqa", "tdiuc")]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"num_layers": 4, "model": {"folder": "/runs/bunny-all"}, "base": None, "instances": blocks}))
    data, _ = figure_data(FIGURES[5], Sources([], scores=read_scores([path])))
    drawn = FIGURES[5].draw(data)
    assert drawn.axes[0].images[0].get_array().shape == (6, 4) and "bunny-all" in drawn.get_suptitle()
    assert [file.name for file in draw(FIGURES[5], data, tmp_path / "out")] == ["figure5.png", "figure5.svg"]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_perplexities, {"model": "m"}, "is not what"),
        (read_perplexities, {"model": "m", "rows": [{"data": "a.json", "reverted": [], "perplexity": 2.0}]}, "make it again"),
        (read_perplexities, {"model": "m", "rows": [{"data": "a", "visual": True, "reverted": [], "perplexity": 0.5}]}, "make it again"),
        (read_perplexities, {"model": 3, "rows": []}, "'model' in"),
        (read_perplexities, [1], "in place of an object"),
        (read_scores, {"num_layers": 4, "instances": []}, "no image attention by instance"),
        (read_scores, {"num_layers": 4, "instances": [{"data": "a", "scores": [[1, 2]]}]}, "score again"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, read: Callable[[list[Path]], list], content: object, message: str) -> None:
    (tmp_path / "file.json").write_text(json.dumps(content))
    with pytest.raises(LlavaRegionError, match=message):
        read([tmp_path / "file.json"])
