"""The suites of PEFT that run on OIALR."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from peft_conformance import custom_models
from peft_conformance.configurations import Deviation


class Suite(NamedTuple):
    """A test module of PEFT."""

    file: str
    deviations: list[Deviation]
    fewest_passed: int  # so that a suite that is not collected is not taken for one that passes
    tests_of_lora: Collection[str] = ()  # tests that name LoRA, but hold for every method

    def deviation_of(self, test: str) -> Deviation | None:
        """The first deviation that covers a test, named with the case in brackets."""
        return next((deviation for deviation in self.deviations if deviation.covers(test)), None)


SUITES = [
    Suite(
        "test_custom_models.py",
        custom_models.DEVIATIONS,
        fewest_passed=2128,
        tests_of_lora=custom_models.TESTS_OF_LORA,
    ),
]
