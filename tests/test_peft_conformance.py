"""PEFT's own tests of custom models, run on OIALR.

The suite (`tests/test_custom_models.py` of the installed PEFT version) is no part of this repository:
`fetch_peft_tests.py` gets it. A plugin, `peft_conformance/plugin.py`, puts OIALR configurations into the suite's lists
before they are collected. What then runs is every test that got such a configuration: those over `TEST_CASES`,
`MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES` and `ALL_PEFT_CONFIG_CLASSES`, those over a list of their own of which every
method is a member, and those in `TESTS_OF_LORA`, which name LoRA but hold for every method. The rest is about other
methods, or about what OIALR does not have: weighted sums of adapters, an adapter per sample, targets that are not
linear layers; or it needs the hub.

`peft_conformance/cases.py` holds the configurations, and in `DEVIATIONS` each test that does not pass, with the reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from fetch_peft_tests import fetch
from peft_conformance.cases import DEVIATIONS, Deviation
from peft_conformance.plugin import SUITE, matches

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
FEWEST_PASSED = 2128  # so that a suite that is not collected is not taken for one that passes


class Result(NamedTuple):
    """What pytest reports about one test of the suite."""

    name: str
    outcome: str  # "passed", "failed" (errors as well), "xfailed", "skipped"
    message: str


def _suite() -> Path:
    try:
        return fetch()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"PEFT's tests cannot be fetched: {error}")


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for tag in ("failure", "error", "skipped"):
        element = case.find(tag)
        if element is not None:
            expected = element.get("type") == "pytest.xfail"
            outcome = "failed" if tag != "skipped" else "xfailed" if expected else "skipped"
            return outcome, element.get("message", "")
    return "passed", ""


def _run(suite: Path, report: Path) -> list[Result]:
    """Run the suite in a process of its own, because it changes PEFT's test modules and needs other settings."""
    command = [sys.executable, "-m", "pytest", f"tests/{SUITE}", "-q", "-n", "2", "--tb=short"]
    command += ["-p", "peft_conformance.plugin", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(HERE),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
    print(process.stdout[-20_000:], process.stderr[-5_000:])  # shown when a test below fails
    # 0: all passed, 1: some failed; anything else: the suite did not run
    assert process.returncode in (0, 1), f"pytest ended with {process.returncode}"
    cases = ElementTree.parse(report).iter("testcase")
    return [Result(case.get("name", ""), *_outcome(case)) for case in cases]


def _unused(deviation: Deviation, not_passed: list[Result]) -> list[str]:
    """Entries of a deviation that no test of the suite has anything to do with."""
    return [
        f"{test}[{pattern}]"
        for test in deviation.tests
        for pattern in deviation.cases
        if not any(
            matches(deviation._replace(tests=(test,), cases=(pattern,)), result.name)
            and (result.outcome == "skipped") == (deviation.error is None)
            for result in not_passed
        )
    ]


def test_oialr_passes_the_tests_of_peft(tmp_path: Path) -> None:
    results = _run(_suite(), tmp_path / "report.xml")

    assert [result for result in results if result.outcome == "failed"] == []

    not_passed = [result for result in results if result.outcome != "passed"]
    named = [deviation for deviation in DEVIATIONS if deviation.error is None]
    skipped = [result for result in not_passed if result.outcome == "skipped"]
    assert [result for result in skipped if not any(matches(each, result.name) for each in named)] == []
    assert [entry for deviation in DEVIATIONS for entry in _unused(deviation, not_passed)] == []

    outcomes = Counter(result.outcome for result in results)
    assert outcomes["passed"] >= FEWEST_PASSED, outcomes
