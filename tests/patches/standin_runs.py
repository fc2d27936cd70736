"""Several trainings in one process, which spares each the seconds of its imports: `python standin_runs.py JOBS.json`.

JOBS.json is a list of `{"name", "arguments"}`; what each prints goes to NAME.out and NAME.err beside it, the exit codes
to codes.json.
"""

import contextlib
import json
import sys
from pathlib import Path

from llava_region.train import main


def run(jobs: Path) -> None:
    codes = {}
    for job in json.loads(jobs.read_text()):
        out, err = (jobs.parent / f"{job['name']}.{kind}" for kind in ("out", "err"))
        with out.open("w") as o, err.open("w") as e, contextlib.redirect_stdout(o), contextlib.redirect_stderr(e):
            codes[job["name"]] = main(job["arguments"])
    (jobs.parent / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
