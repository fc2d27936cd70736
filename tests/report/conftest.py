"""Sets of runs that several tests report on."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_region import tasks
from llava_region.region import Region
from llava_region.report import paper_numbers as paper
from tests.helpers.report_runs import LLAMA, VICUNA, WHOLE, cost, evaluated, printed, region_of


@pytest.fixture
def table_2(tmp_path: Path) -> list[Path]:
    """The runs of the paper's Table 2, `bunny-32` to `bunny-1`."""
    return printed(tmp_path, list(paper.TABLE_2), 32, LLAMA, "bunny")


@pytest.fixture
def scaled(tmp_path: Path) -> list[Path]:
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


@pytest.fixture
def pruned(tmp_path: Path) -> list[Path]:
    """Full and region runs with 0, 1 and 2 layers pruned; of the region's, the one with 2 has no TextVQA."""
    folders = []
    for spec, less in (("all", 3.0), ("sparse:8", 1.0)):
        layers = list(Region.parse(spec, 32).layers)
        for count in (0, 1, 2):
            note = {"original_layers": layers, "original_num_layers": 32, "dropped": [29, 27][:count]}
            # in new numbers, as `prune` writes them: only how many there are matters here
            region = region_of(spec, 32 - count, VICUNA, **({"pruned": note} if count else {}))
            scores = {task: score - less * count for task, score in WHOLE.items() if (spec, count, task) != ("sparse:8", 2, "textvqa")}
            folders.append(evaluated(tmp_path, f"{spec.replace(':', '-')}-p{count}", scores, region))
    return folders
