"""PEFT's own tests of custom models and of transformers models, run on OIALR.

The suites (`tests/test_custom_models.py` and others of the installed PEFT version) are no part of this repository:
`fetch_peft_tests.py` gets them. `peft_conformance/` runs them on OIALR, without a network:

- `suites.py` lists them;
- `models.py` makes tiny models in the place of those on the hub;
- `custom_models.py` and `transformers_models.py` hold the configurations, and in `DEVIATIONS` each test that does not
  pass, with the reason;
- `plugin.py` puts the configurations into a suite before its tests are collected.

What then runs is every test that got an OIALR configuration: those over all models and configurations, those over a list
of their own of which every method is a member, and those in a suite's `tests_of_lora`, which name LoRA but hold for every
method. The rest is about other methods, or about what OIALR does not have: weighted sums of adapters, an adapter per
sample, targets that are not linear layers; or it needs the hub.
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
from peft_conformance.choices import ADAPTERS, CASES, disturbed, texts_of
from peft_conformance.models import make_models
from peft_conformance.suites import SUITES, Suite

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


class Result(NamedTuple):
    """What pytest reports about one test of a suite."""

    name: str
    outcome: str  # "passed", "failed" (errors as well), "xfailed", "skipped"
    message: str


def _fetched() -> Path:
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


def _run(suite: Suite, report: Path) -> list[Result]:
    """Run the suite in a process of its own, because it changes PEFT's test modules and needs other settings."""
    peft = _fetched()
    command = [sys.executable, "-m", "pytest", str(peft / "tests" / suite.file), "-c", str(peft / "pytest.ini")]
    plugins = ("peft_conformance.plugin", "no:cacheprovider", "no:hypothesispytest")
    # other tracebacks parse the whole module for each of hundreds of expected failures: half of the time of a suite
    command += ["-q", "--tb=native", f"--junitxml={report}", *(part for name in plugins for part in ("-p", name))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(command, cwd=make_models(), env=environment, capture_output=True, text=True)
    print(process.stdout[-20_000:], process.stderr[-5_000:])  # shown when a test below fails
    # 0: all passed, 1: some failed; anything else: the suite did not run
    assert process.returncode in (0, 1), f"pytest ended with {process.returncode}"
    cases = ElementTree.parse(report).iter("testcase")
    return [Result(case.get("name", ""), *_outcome(case)) for case in cases]


def _unused(suite: Suite, results: list[Result]) -> list[str]:
    """Entries of deviations that no test of the suite needs; those for tests that only other suites have do not count."""
    tests = {result.name.partition("[")[0] for result in results}
    return [
        f"{test}[{pattern}]"
        for deviation in suite.deviations
        for test in deviation.tests
        for pattern in deviation.cases
        if test in tests
        and not any(
            deviation._replace(tests=(test,), cases=(pattern,)).covers(result.name)
            and result.outcome == ("skipped" if deviation.error is None else "xfailed")
            for result in results
        )
    ]


@pytest.mark.parametrize(
    "suite",
    [pytest.param(each, marks=pytest.mark.sentinel if each.sentinel else (), id=each.file) for each in SUITES],
)
def test_oialr_passes_the_tests_of_peft(suite: Suite, tmp_path: Path) -> None:
    results = _run(suite, tmp_path / "report.xml")

    assert [result for result in results if result.outcome == "failed"] == []

    named = [deviation for deviation in suite.deviations if deviation.error is None]
    skipped = [result for result in results if result.outcome == "skipped"]
    assert [result for result in skipped if not any(each.covers(result.name) for each in named)] == []
    assert _unused(suite, results) == []

    outcomes = Counter(result.outcome for result in results)
    assert outcomes["passed"] >= suite.fewest_passed, outcomes


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_rounding_turns_no_choice_of_the_models_that_generate(case):
    """The suites compare texts; a processor that rounds differently must not find others. Rounding is some 1e-7."""
    texts = texts_of(case)
    assert all(texts_of(case, change=disturbed)[name] == texts[name] for name in ADAPTERS)
