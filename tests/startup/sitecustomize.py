"""Runs at the start of every Python process that has this folder on PYTHONPATH: what training processes on CPU need. For the tests only."""

import os

if "RANK" in os.environ:
    from llava_region.training.gloo_order import wait_for_every_gather

    wait_for_every_gather()

if os.environ.get("BUNNY_ROOT"):
    from tests.helpers import bunny_shims

    if bunny_shims.why_not() is None:
        bunny_shims.apply()
