"""`python -m llava_region.train`, whose ranks send themselves signals: SIGNALS names `RANK:MICRO_BATCH:NUMBER,...`; `*` is every rank.

For tests under a launcher, which cannot know when a rank is in which step.
"""

import os
import sys

from llava_region.train import main
from llava_region.training.trainer import RegionTrainerMixin


def send_signals() -> None:
    """Wrap the trainer's step."""
    plan = [entry.split(":") for entry in os.environ.get("SIGNALS", "").split(",") if entry]
    mine = {int(micro_batch): int(number) for rank, micro_batch, number in plan if rank in ("*", os.environ["RANK"])}
    step, count = RegionTrainerMixin.training_step, 0

    def counted(self, *args):
        nonlocal count
        count += 1
        if count in mine:
            os.kill(os.getpid(), mine[count])
        return step(self, *args)

    RegionTrainerMixin.training_step = counted


if __name__ == "__main__":
    send_signals()
    sys.exit(main())
