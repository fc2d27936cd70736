"""`python -m tests.helpers.recorded_plans FOLDER UPSTREAM ...`: `llava_region.train`, of which each rank writes down its plans.

`FOLDER/RANK.json` is a list with an item for each batch: samples, tokens of each, the level that this rank needs, and the number of
layers that were recomputed.
"""

import json
import os
import sys
from pathlib import Path

from llava_region.train import main
from llava_region.training.recompute_plan import BatchPlans, Choice


def record(folder: Path, argv: list[str]) -> int:
    """Train; returns the exit status."""
    batches: list[list[int]] = []
    choose = BatchPlans.choose

    def recorded(self: BatchPlans, samples: int, length: int) -> Choice:
        choice = choose(self, samples, length)
        batches.append([samples, length, self._needed(samples, length), len(choice.recompute)])
        return choice

    BatchPlans.choose = recorded
    status = main(argv)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(batches))
    return status


if __name__ == "__main__":
    sys.exit(record(Path(sys.argv[1]), sys.argv[2:]))
