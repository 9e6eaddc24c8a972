"""The package as its users see it: public names, their examples, typing information, supported versions."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import oialr_peft

ROOT = Path(__file__).resolve().parents[1]

# a name that is added is a promise, a name that is removed breaks somebody's code: both belong into the changelog
PUBLIC_NAMES = [
    "Factors",
    "OIALRCallback",
    "OIALRConfig",
    "OIALRController",
    "OIALRModel",
    "OIALRTrainer",
    "OIALRTrainerMixin",
    "OIALRUpdate",
    "factorize",
    "plot_history",
    "polar_factor",
    "rank_table",
    "rediagonalize",
    "save_dense",
    "save_lora",
    "save_low_rank",
    "stability",
    "to_dense",
    "truncate",
]


def test_the_public_names_are_frozen():
    assert oialr_peft.__all__ == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_is_documented_with_an_example(name):
    documentation = inspect.getdoc(getattr(oialr_peft, name))
    assert ">>> " in documentation  # `make doctest` runs it


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: oialr_peft\.(\w+)$", page, re.MULTILINE)) == sorted(PUBLIC_NAMES)


def test_the_package_says_that_it_is_typed():
    assert (Path(oialr_peft.__file__).parent / "py.typed").is_file()


def test_the_extras_are_those_that_the_documentation_names():
    declared = {r.name: r for r in map(Requirement, requires("oialr-peft")) if r.marker is None}
    assert not {"matplotlib", "typer", "datasets", "evaluate", "trl", "bitsandbytes", "torchao"} & declared.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"].keys() == {"plots", "examples", "cli", "docs", "dev"}


def test_the_lowest_versions_are_the_lower_bounds_of_the_metadata():
    command = [sys.executable, ROOT / "tests" / "support" / "lowest.py"]
    lowest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert len(lowest) == len(pinned)
    for ours, newest in zip(lowest, pinned, strict=True):
        name, _, version = ours.partition("==")
        if name in ("transformers", "peft", "accelerate"):
            assert f">={version}" in map(str, bounds[name])
        else:
            assert ours == newest


def _python_that(name: str) -> SpecifierSet | None:
    try:
        return SpecifierSet(metadata(name).get("Requires-Python") or "")
    except PackageNotFoundError:  # for another platform, or a dependency of what was asked for there
        return None


def test_every_pinned_version_admits_the_oldest_python_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = SpecifierSet(project["requires-python"])
    assert bound.operator == ">="
    oldest = f"{bound.version}.0"  # 3.11 promises all of them, 3.11.2 of Debian 12 as well
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if "==" in line]
    allowed = {name: pythons for name in pinned if (pythons := _python_that(name)) is not None}
    assert len(allowed) > 0.9 * len(pinned)  # in an environment with less this test would look at nothing
    assert {name: str(pythons) for name, pythons in allowed.items() if oldest not in pythons} == {}
