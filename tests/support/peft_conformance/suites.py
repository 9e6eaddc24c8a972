"""The suites of PEFT that run on OIALR."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from peft_conformance import custom_models, transformers_models
from peft_conformance.configurations import Deviation


class Suite(NamedTuple):
    """A test module of PEFT."""

    file: str
    deviations: list[Deviation]
    fewest_passed: int  # so that a suite that is not collected is not taken for one that passes
    # of its tests over all models and configurations: rows of model, class and arguments of the configuration
    cases: Sequence[Any] = ()
    tests_of_lora: Collection[str] = ()  # tests that name LoRA, but hold for every method
    sentinel: bool = False  # runs with every change: one suite of custom models, one of transformers models

    def deviation_of(self, test: str) -> Deviation | None:
        """The first deviation that covers a test, named with the case in brackets."""
        return next((deviation for deviation in self.deviations if deviation.covers(test)), None)


SUITES = [
    Suite(
        "test_custom_models.py",
        custom_models.DEVIATIONS,
        fewest_passed=2835,
        tests_of_lora=custom_models.TESTS_OF_LORA,
        sentinel=True,
    ),
    Suite(
        "test_decoder_models.py",
        transformers_models.DECODER_DEVIATIONS,
        fewest_passed=636,
        cases=transformers_models.DECODERS,
    ),
    Suite(
        "test_encoder_decoder_models.py",
        transformers_models.DEVIATIONS,
        fewest_passed=265,
        cases=transformers_models.ENCODER_DECODERS,
        tests_of_lora=["test_load_model_low_cpu_mem_usage", "test_save_shared_tensors"],
    ),
    Suite(
        "test_feature_extraction_models.py",
        transformers_models.FEATURE_DEVIATIONS,
        fewest_passed=199,
        cases=transformers_models.FEATURES,
        tests_of_lora=["test_load_model_low_cpu_mem_usage"],
    ),
    Suite(
        "test_seq_classifier.py",
        transformers_models.DEVIATIONS,
        fewest_passed=92,
        cases=transformers_models.CLASSIFIERS,
        sentinel=True,
    ),
]
