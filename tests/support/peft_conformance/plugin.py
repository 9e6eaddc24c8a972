"""pytest plugin that runs PEFT's suites on OIALR; loaded by `test_peft_conformance.py`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft_conformance import custom_models
from peft_conformance.configurations import DENSE, FACTORED, RESIDUAL
from peft_conformance.suites import SUITES, Suite

from oialr_peft import OIALRConfig

# settings put in the place of LoRA in a suite's `tests_of_lora`
INSTEAD_OF_LORA = [
    pytest.param(DENSE, id="dense"),
    pytest.param(FACTORED, id="factored"),
    pytest.param(RESIDUAL, id="residual"),
]

# functions that skip tests which OIALR can pass: those with GPT-2's Conv1D, with a model without biases, and with
# embeddings passed in the place of tokens
SKIPS_NOT_FOR_OIALR = {"_skip_if_conv1d_not_supported", "check_beft_config", "skip_non_prompt_learning"}

# tests of custom models that ask for equal outputs by tolerances near the rounding of float32: a weight that is stored as
# U Σ Vᵀ, or merged, is equal to rounding, which on some processors is more. In float64 they ask for no less.
TESTS_IN_FLOAT64 = {"test_disable_adapters", "test_safe_merge"}

# tests that run the cases of every method, but skip those that are not LoRA's
TESTS_THAT_ADMIT_ONLY_LORA = {"test_generate_with_mixed_adapter_batches", "test_mixed_adapter_batches"}


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
    """Replace the suite's configurations after it is imported, before its tests are collected."""
    module = yield
    suite = _suite_of(module_path)
    if suite is not None:
        with _without_diffusers():
            tests = module.obj  # imports it
        if suite.cases:
            _replace_cases(tests, suite.cases)
        else:
            _replace_lists(tests)
        for each in (tests, _common_tests(tests)):
            for name in vars(each).keys() & SKIPS_NOT_FOR_OIALR:
                setattr(each, name, lambda *args: None)
    return module


def _suite_of(path: Path) -> Suite | None:
    return next((suite for suite in SUITES if suite.file == path.name), None)


def _common_tests(tests: ModuleType) -> Any:
    """The module that holds the bodies of the tests that suites have in common."""
    return importlib.import_module(f"{tests.__package__}.testing_common")


def _replace_cases(tests: ModuleType, cases: Sequence[Any]) -> None:
    """Run `cases` where a test has one mark for all models and another for all configurations."""
    instead = pytest.mark.parametrize(("model_id", "config_cls", "config_kwargs"), cases).mark
    for test in _functions(tests):
        marks = getattr(test, "pytestmark", [])
        models = [mark for mark in marks if mark.args[:1] == ("model_id",)]
        configurations = [mark for mark in marks if len(mark.args) > 1 and mark.args[1] is tests.ALL_CONFIGS]
        if models and configurations:
            test.pytestmark = [mark for mark in marks if mark not in models + configurations] + [instead]


def _functions(tests: ModuleType) -> list[Any]:
    classes = [value for name, value in vars(tests).items() if name.startswith("Test")]
    return [value for each in classes for name, value in vars(each).items() if name.startswith("test_")]


def _replace_lists(tests: ModuleType) -> None:
    # in place, because the marks of the tests hold the same lists
    tests.TEST_CASES[:] = custom_models.TEST_CASES
    tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = custom_models.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    tests.ALL_PEFT_CONFIG_CLASSES[:] = custom_models.CONFIG_CLASSES
    of = tests.TestPeftCustomModel
    _values(of.test_multiple_adapters_mixed_modules_to_save, "config_cls")[:] = custom_models.CONFIG_CLASSES
    _values(of.test_multiple_adapters_mixed_modules_to_save_order_switched, "config_cls")[:] = (
        custom_models.CONFIG_CLASSES
    )
    _values(of.test_adapter_name_makes_no_difference, "config0")[:] = custom_models.ADAPTER_NAME_CASES


def _values(test: Any, argument: str) -> list[Any]:
    """The list that a test is parametrized with."""
    (values,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == argument)
    return values


# ---- tests that name LoRA --------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each of `tests_of_lora` once per phase."""
    suite = _suite_of(metafunc.definition.path)
    if suite is not None and metafunc.function.__name__ in suite.tests_of_lora:
        metafunc.parametrize("instead_of_lora", INSTEAD_OF_LORA, indirect=True)


@pytest.fixture(autouse=True)
def instead_of_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test make OIALR configurations where it says LoRA, and know the names of OIALR's parameters."""
    tests = request.module
    if request.function.__name__ in TESTS_THAT_ADMIT_ONLY_LORA:
        for module in (tests, _common_tests(tests)):
            monkeypatch.setattr(module, "LoraConfig", OIALRConfig)
    if not hasattr(request, "param"):
        return
    settings = request.param
    monkeypatch.setattr(tests, "LoraConfig", partial(_configuration, settings))
    if hasattr(tests, "TestRequiresGrad"):
        trained = "oialr_sigma" if OIALRConfig(**settings).resolved().starts_factored else "oialr_weight"
        check = tests.TestRequiresGrad.check_requires_grad

        def check_requires_grad(self: Any, model: Any, *names: str) -> None:
            check(self, model, *(re.sub(r"lora_[AB]\.(\w+)\.weight", rf"{trained}.\1", name) for name in names))

        monkeypatch.setattr(tests.TestRequiresGrad, "check_requires_grad", check_requires_grad)


@pytest.fixture(autouse=True)
def in_float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `TESTS_IN_FLOAT64` make their models in float64."""
    if request.function.__name__ not in TESTS_IN_FLOAT64 or not hasattr(request.module, "MockTransformerWrapper"):
        return
    wrapper = request.module.MockTransformerWrapper
    made = wrapper.from_pretrained

    def from_pretrained(model_id: str) -> Any:
        model = made(model_id, dtype=torch.float64)
        model.dtype = torch.float64  # of what the model turns its inputs into
        return model

    monkeypatch.setattr(wrapper, "from_pretrained", from_pretrained)


def _configuration(
    settings: dict[str, Any],
    *,
    r: int = 8,
    lora_alpha: int = 8,
    lora_dropout: float = 0,
    init_lora_weights: bool = True,
    **common: Any,
) -> OIALRConfig:
    return OIALRConfig(**settings, **common, init_weights=init_lora_weights)


# ---- selection -------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that got an OIALR configuration, and mark those that are expected to fail."""
    kept = [item for item in items if _is_on_oialr(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in items:
        suite = _suite_of(item.path)
        assert suite is not None  # the plugin is loaded for a run of one suite
        deviation = suite.deviation_of(item.name)
        if deviation is not None and deviation.error is not None:
            raises = pytest.RaisesExc(deviation.error, match=deviation.message)
            item.add_marker(pytest.mark.xfail(raises=raises, reason=deviation.reason, strict=True))


def _is_on_oialr(item: pytest.Item) -> bool:
    values = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return "instead_of_lora" in values or any(
        value is OIALRConfig or isinstance(value, OIALRConfig) or getattr(value, "func", None) is OIALRConfig
        for value in values.values()
    )
