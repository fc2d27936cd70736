"""Packaging: everything is in pyproject.toml but the folder of `llava_region.patches`, which lies at the top level."""

from setuptools import find_packages, setup

setup(
    packages=["llava_region", *(f"llava_region.{name}" for name in find_packages("llava_region")), "llava_region.patches"],
    package_dir={"llava_region.patches": "patches"},
)
