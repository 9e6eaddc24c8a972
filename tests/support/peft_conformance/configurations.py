"""What the suites have in common: the phases of OIALR as settings, and the form of a deviation."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

# the phases a layer can be in, by the settings that lead there
DENSE: dict[str, Any] = {"mode": "replace"}
FACTORED: dict[str, Any] = {**DENSE, "freeze_when": "delay", "delay": 0}
TRUNCATED: dict[str, Any] = {**FACTORED, "rank": 2}
MASKED: dict[str, Any] = {**TRUNCATED, "shrink": "mask"}
RESIDUAL: dict[str, Any] = {"mode": "adapter", "rank": 2}
PRETRAINING: dict[str, Any] = {"mode": "pretraining"}


class Deviation(NamedTuple):
    """Tests that do not pass, and why that is right.

    They run all the same: one that passes, or fails with anything but this error, is a failure.
    """

    tests: tuple[str, ...]
    cases: tuple[str, ...]  # patterns of the part of a test's name that is in brackets
    reason: str
    error: type[BaseException] | None  # None: the suite itself skips them
    message: str | None = None  # regular expression that the error's message matches

    def covers(self, test: str) -> bool:
        """Whether a test, by its name with the case in brackets, is one of these."""
        name, _, case = test.rstrip("]").partition("[")
        return name in self.tests and any(fnmatchcase(case, pattern) for pattern in self.cases)


PICKLES = Deviation(
    ("test_save_pretrained_pickle", "test_save_pretrained_selected_adapters_pickle"),
    ("*",),
    "Loads pickled weights, which are refused.",
    ValueError,
    "no safetensors file",
)

U_AND_V_ARE_FROZEN = "Expects that every tensor of an adapter trains; U and V are frozen."
