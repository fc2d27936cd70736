"""Packaging: everything is in pyproject.toml but the two packages whose folders lie at the top level of the repository."""

from __future__ import annotations

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class RecipesAreData(build_py):
    """`llava_region.recipes` (the folder `scripts/`) holds files to copy: its package data is all of it, no module is added."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [] if package == "llava_region.recipes" else super().find_package_modules(package, package_dir)


setup(
    packages=[
        "llava_region",
        *(f"llava_region.{name}" for name in find_packages("llava_region")),
        "llava_region.patches",
        *(f"llava_region.patches.{name}" for name in find_packages("patches")),
        "llava_region.recipes",
    ],
    package_dir={"llava_region.patches": "patches", "llava_region.recipes": "scripts"},
    package_data={"llava_region.recipes": ["launching.sh", "train/*", "reproduce/*", "slurm/*", "deepspeed/*"]},
    cmdclass={"build_py": RecipesAreData},
)
