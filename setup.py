"""Packaging: everything is in pyproject.toml but the folder of `llava_region.patches`, which lies at the top level."""

from setuptools import setup

setup(
    packages=["llava_region", "llava_region.commands", "llava_region.scores", "llava_region.tasks", "llava_region.patches"],
    package_dir={"llava_region.patches": "patches"},
)
