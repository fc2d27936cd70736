"""Runs at the start of every Python process that has this folder on PYTHONPATH: makes the real Bunny work on CPU in child processes."""

from tests.patches import bunny_shims

if bunny_shims.bunny_root() is not None:
    bunny_shims.apply()
