"""pytest plugin that runs PEFT's tests of custom models on OIALR; loaded by `test_peft_conformance.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from peft_conformance import cases

from oialr_peft import OIALRConfig

SUITE = "test_custom_models.py"


@contextmanager
def _without_diffusers() -> Iterator[None]:
    """The suite imports one class of diffusers, for tests of other methods: an empty one will do."""
    placeholder = ModuleType("diffusers")
    placeholder.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    before = sys.modules.get("diffusers")
    sys.modules["diffusers"] = placeholder
    try:
        yield
    finally:
        del sys.modules["diffusers"]
        if before is not None:
            sys.modules["diffusers"] = before


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path) -> Any:
    """Replace the suite's lists of configurations after it is imported, before its tests are collected."""
    module = yield
    if module_path.name == SUITE:
        with _without_diffusers():
            suite = module.obj  # imports it
        _replace_cases(suite)
    return module


def _replace_cases(suite: ModuleType) -> None:
    # in place, because the marks of the tests hold the same lists
    suite.TEST_CASES[:] = cases.TEST_CASES
    suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = cases.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    suite.ALL_PEFT_CONFIG_CLASSES[:] = cases.CONFIG_CLASSES
    tests = suite.TestPeftCustomModel
    _values(tests.test_multiple_adapters_mixed_modules_to_save, "config_cls")[:] = cases.CONFIG_CLASSES
    _values(tests.test_multiple_adapters_mixed_modules_to_save_order_switched, "config_cls")[:] = cases.CONFIG_CLASSES
    _values(tests.test_adapter_name_makes_no_difference, "config0")[:] = cases.ADAPTER_NAME_CASES


def _values(test: Any, argument: str) -> list[Any]:
    """The list that a test is parametrized with."""
    (values,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == argument)
    return values


# ---- tests that name LoRA --------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test in `TESTS_OF_LORA` once per phase."""
    if metafunc.function.__name__ in cases.TESTS_OF_LORA:
        metafunc.parametrize("instead_of_lora", cases.INSTEAD_OF_LORA, indirect=True)


@pytest.fixture(autouse=True)
def instead_of_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test make OIALR configurations where it says LoRA, and know the names of OIALR's parameters."""
    if not hasattr(request, "param"):
        return
    settings = request.param
    trained = "oialr_sigma" if OIALRConfig(**settings).starts_factored else "oialr_weight"
    suite = request.module
    check = suite.TestRequiresGrad.check_requires_grad

    def check_requires_grad(self: Any, model: Any, *names: str) -> None:
        check(self, model, *(re.sub(r"lora_[AB]\.(\w+)\.weight", rf"{trained}.\1", name) for name in names))

    monkeypatch.setattr(suite, "LoraConfig", partial(_configuration, settings))
    monkeypatch.setattr(suite.TestRequiresGrad, "check_requires_grad", check_requires_grad)


def _configuration(
    settings: dict[str, Any], *, r: int = 8, init_lora_weights: bool = True, **common: Any
) -> OIALRConfig:
    return OIALRConfig(**settings, init_weights=init_lora_weights, **common)


# ---- selection -------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that got an OIALR configuration, and mark those that are expected to fail."""
    kept = [item for item in items if _is_on_oialr(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for deviation in cases.DEVIATIONS:
        if deviation.error is None:
            continue
        raises = pytest.RaisesExc(deviation.error, match=deviation.message)
        mark = pytest.mark.xfail(raises=raises, reason=deviation.reason, strict=True)
        for item in items:
            if matches(deviation, item.name):
                item.add_marker(mark)


def _is_on_oialr(item: pytest.Item) -> bool:
    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return "instead_of_lora" in values or any(
        value is OIALRConfig or isinstance(value, OIALRConfig) or getattr(value, "func", None) is OIALRConfig
        for value in values.values()
    )


def matches(deviation: cases.Deviation, test: str) -> bool:
    """Whether a test, by its name with the case in brackets, is one of a deviation's."""
    name, _, case = test.rstrip("]").partition("[")
    return name in deviation.tests and any(fnmatchcase(case, pattern) for pattern in deviation.cases)
