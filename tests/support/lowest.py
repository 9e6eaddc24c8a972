"""Prints constraints.txt with the oldest supported transformers, peft and accelerate; `make test-lowest` installs them.

All other packages, torch among them, stay at their pinned versions.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("transformers", "peft", "accelerate")


def lower_bounds() -> dict[str, str]:
    """Package name → the version of its `>=` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return {
        requirement.name: bound.version
        for requirement in requirements
        for bound in requirement.specifier
        if requirement.name in PACKAGES and bound.operator == ">="
    }


def main() -> None:
    lowest = lower_bounds()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        print(f"{name}=={lowest.get(name, version)}" if version else line)


if __name__ == "__main__":
    main()
