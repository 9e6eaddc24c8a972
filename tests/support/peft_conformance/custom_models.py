"""What PEFT's suite of custom models is run on, in the form of its own lists, and where OIALR departs from it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from peft_conformance.configurations import (
    DENSE,
    FACTORED,
    MASKED,
    PICKLES,
    PRETRAINING,
    RESIDUAL,
    TRUNCATED,
    U_AND_V_ARE_FROZEN,
    Deviation,
)

from oialr_peft import OIALRConfig


def _case(name: str, model: str, **settings: Any) -> Any:
    """A row of the suite's `TEST_CASES`: name, model, class and arguments of the configuration."""
    return pytest.param(name, model, OIALRConfig, settings, id=f"{name} {model}")


TEST_CASES = [
    _case("dense one-module", "MLP", **DENSE, target_modules=["lin0"]),
    _case("dense expression", "MLP", **DENSE, target_modules=".*lin1"),
    _case("dense all-linear", "MLP", **DENSE),
    _case("dense modules_to_save", "MLP", **DENSE, target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("dense exclude", "MLP", **DENSE, target_modules="all-linear", exclude_modules=["lin1"]),
    _case("dense bias-all", "MLP", **DENSE, target_modules=["lin0", "lin1"], bias="all"),
    _case("dense bias-own", "MLP", **DENSE, target_modules=["lin0"], bias="oialr_only"),
    _case("dense sketch", "MLP", **DENSE, target_modules=["lin0"], stability_storage="sketch"),
    _case("dense mask", "MLP", **DENSE, target_modules=["lin0", "lin1"], shrink="mask"),
    _case("dense conv1d", "EmbConv1D", **DENSE, target_modules=["conv1d"]),
    _case("dense conv1d+linear", "EmbConv1D", **DENSE, target_modules=["conv1d", "lin0"]),
    _case("dense tokens", "EmbConv1D", **DENSE, target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]}),
    _case("dense modules_to_save", "EmbConv1D", **DENSE, target_modules=["conv1d"], modules_to_save=["emb", "lin0"]),
    _case("dense beside-convolution", "Conv2d", **DENSE, target_modules=["lin0"]),
    _case("dense convolution", "Conv2d", **DENSE, target_modules=["conv2d"]),
    _case("dense convolution+linear", "Conv2d", **DENSE, target_modules=["conv2d", "lin0"]),
    _case("dense convolution", "Conv1d", **DENSE, target_modules=["conv1d"]),
    _case("dense convolution", "Conv3d", **DENSE, target_modules=["conv3d", "lin0"]),
    _case("dense attention", "MHA", **DENSE, target_modules=["mha"]),
    _case("dense attention+linear", "MHA", **DENSE, target_modules=["mha", "lin0"]),
    _case("dense beside-norm", "MLP_LayerNorm", **DENSE, target_modules=["lin0"], modules_to_save=["layernorm1"]),
    _case("dense beside-attention", "MHA", **DENSE, target_modules=["lin0"]),
    _case("factored one-module", "MLP", **FACTORED, target_modules=["lin0"]),
    _case("factored all-linear", "MLP", **FACTORED),
    _case("factored modules_to_save", "MLP", **FACTORED, target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("factored bias-all", "MLP", **FACTORED, target_modules=["lin0", "lin1"], bias="all"),
    _case("factored bias-own", "MLP", **FACTORED, target_modules=["lin0"], bias="oialr_only"),
    _case("factored mask", "MLP", **FACTORED, target_modules=["lin0", "lin1"], shrink="mask"),
    _case("factored conv1d+linear", "EmbConv1D", **FACTORED, target_modules=["conv1d", "lin0"]),
    _case("factored convolution+linear", "Conv2d", **FACTORED, target_modules=["conv2d", "lin0"]),
    _case("factored convolution", "Conv1d", **FACTORED, target_modules=["conv1d"]),
    _case("factored attention+linear", "MHA", **FACTORED, target_modules=["mha", "lin0"]),
    _case("truncated convolution+linear", "Conv2d", **TRUNCATED, target_modules=["conv2d", "lin0"]),
    _case("truncated one-module", "MLP", **TRUNCATED, target_modules=["lin0"]),
    _case("truncated fraction", "MLP2", **FACTORED, target_modules=["lin0", "lin1"], rank=0.5),
    _case("truncated modules_to_save", "MLP", **TRUNCATED, target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("truncated mask", "MLP", **MASKED, target_modules=["lin0", "lin1"]),
    _case("truncated conv1d+linear", "EmbConv1D", **TRUNCATED, target_modules=["conv1d", "lin0"]),
    _case("residual one-module", "MLP", **RESIDUAL, target_modules=["lin0"]),
    _case("residual two-modules", "MLP", **RESIDUAL, target_modules=["lin0", "lin1"]),
    _case("residual modules_to_save", "MLP", **RESIDUAL, target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("residual bias-all", "MLP", **RESIDUAL, target_modules=["lin0", "lin1"], bias="all"),
    _case("residual bias-own", "MLP", **RESIDUAL, target_modules=["lin0"], bias="oialr_only"),
    _case("residual mask", "MLP", **RESIDUAL, target_modules=["lin0", "lin1"], shrink="mask"),
    _case("residual full-rank", "MLP", mode="adapter", target_modules=["lin0", "lin1"]),
    _case("residual conv1d", "EmbConv1D", **RESIDUAL, target_modules=["conv1d"]),
    _case("residual conv1d+linear", "EmbConv1D", **RESIDUAL, target_modules=["conv1d", "lin0"]),
    _case("residual convolution", "Conv2d", **RESIDUAL, target_modules=["conv2d"]),
    _case("residual convolution+linear", "Conv3d", **RESIDUAL, target_modules=["conv3d", "lin0"]),
    _case("residual attention+linear", "MHA", **RESIDUAL, target_modules=["mha", "lin0"]),
    _case(
        "residual tokens", "EmbConv1D", **RESIDUAL, target_modules=["lin0"], trainable_token_indices={"emb": [0, 10]}
    ),
    _case("pretraining two-modules", "MLP", **PRETRAINING, target_modules=["lin0", "lin1"]),
    _case("pretraining convolution", "Conv2d", **PRETRAINING, target_modules=["conv2d"]),
    _case("pretraining attention", "MHA", **PRETRAINING, target_modules=["mha"]),
    _case("pretraining conv1d", "EmbConv1D", **PRETRAINING, target_modules=["conv1d"]),
]


def _pair(name: str, first: dict[str, Any], second: dict[str, Any]) -> Any:
    """A row of `MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES`: name, method, class and arguments of both configurations."""
    settings = [{"init_weights": False, **each} for each in (first, second)]
    return pytest.param(name, "oialr", OIALRConfig, *settings, id=name)


LIN0 = {"target_modules": ["lin0"]}
LIN1 = {"target_modules": ["lin1"]}

MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    _pair("dense same", {**DENSE, **LIN0}, {**DENSE, **LIN0}),
    _pair("dense different", {**DENSE, **LIN0}, {**DENSE, **LIN1}),
    _pair("factored same", {**FACTORED, **LIN0}, {**FACTORED, **LIN0}),
    _pair("factored different", {**FACTORED, **LIN0}, {**TRUNCATED, **LIN1}),
    _pair("residual same", {**RESIDUAL, **LIN0}, {**RESIDUAL, **LIN0}),
    _pair("residual different", {**RESIDUAL, **LIN0}, {**RESIDUAL, **LIN1}),
    _pair("dense+residual same", {**DENSE, **LIN0}, {**RESIDUAL, **LIN0}),
    _pair("residual+factored same", {**RESIDUAL, **LIN0}, {**FACTORED, **LIN0}),
    _pair("mask+dense same", {**MASKED, **LIN0}, {**DENSE, **LIN0}),
]

# for the tests that make their configurations themselves and ask only for a class
CONFIG_CLASSES = [
    pytest.param(partial(OIALRConfig, **DENSE), id="dense"),
    pytest.param(partial(OIALRConfig, **FACTORED), id="factored"),
    pytest.param(partial(OIALRConfig, **RESIDUAL), id="residual"),
]

ADAPTER_NAME_CASES = [
    pytest.param(OIALRConfig(**DENSE, **LIN0, init_weights=False), id="dense"),
    pytest.param(OIALRConfig(**FACTORED, **LIN0, init_weights=False), id="factored"),
    pytest.param(OIALRConfig(**RESIDUAL, **LIN0, init_weights=False), id="residual"),
]

# tests that name LoRA, but hold for every method
TESTS_OF_LORA = {
    "test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_existing_model_card",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    "test_load_does_not_overwrite_similarly_named_sibling",
    "test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
    "test_multiple_active_adapters_with_different_trainable_token_indices_works",
    "test_multiple_active_adapters_with_same_trainable_token_indices_raises",
    "test_non_existing_model_card",
    "test_requires_grad_follows_inference_mode_modules_to_save",
    "test_requires_grad_follows_inference_mode_trainable_token_indices",
    "test_requires_grad_lora_different_targets",
    "test_requires_grad_lora_same_targets",
    "test_requires_grad_modules_to_save_default",
    "test_requires_grad_modules_to_save_disabling",
    "test_requires_grad_modules_to_save_multiple_adapters",
    "test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_set_adapter_non_overlapping_trainable_token_indices",
    "test_weight_bias_attributes",
}


WITH_A_SECOND_ADAPTER = (
    "test_active_adapter",
    "test_adapter_dtype_autocast",
    "test_delete_adapter",
    "test_delete_inactive_adapter",
    "test_delete_merged_adapter_only_rejects_the_merged_one",
    "test_load_model_low_cpu_mem_usage",
    "test_load_multiple_adapters",
    "test_save_pretrained_adapter_name_substring",
)

DEVIATIONS = [
    Deviation(
        ("test_disable_adapter_with_bias_warns",),
        ("*",),
        "The suite skips it for every method.",
        None,
    ),
    Deviation(
        ("test_active_adapter",),
        ("*modules_to_save*", "*tokens*", "*beside-norm*"),
        "The suite skips it: such adapters cannot be active together.",
        None,
    ),
    Deviation(
        ("test_disable_adapters", "test_disable_adapters_with_merging"),
        ("truncated * MLP", "truncated * MLP2", "truncated convolution*"),
        "Expects a fresh adapter to be the identity; one that replaces the weight by a truncated one is not.",
        AssertionError,
    ),
    Deviation(
        WITH_A_SECOND_ADAPTER,
        ("*bias-*",),
        "PEFT allows one adapter with trained biases.",
        ValueError,
        "supports only 1 adapter with bias",
    ),
    Deviation(
        (
            "test_disable_adapters",
            "test_disable_adapters_with_merging",
            "test_only_params_are_updated",
            "test_training_custom_models",
        ),
        ("*bias-*",),
        "Expects that no parameter of the base trains; these biases do, for every method that has `bias`.",
        AssertionError,
    ),
    Deviation(
        (
            "test_loading_model_requires_grad_set_correctly",
            "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
        ),
        ("True-factored", "True-residual"),
        U_AND_V_ARE_FROZEN,
        AssertionError,
    ),
    Deviation(
        ("test_loading_model_with_trainble_tokens_requires_grad_set_correctly",),
        ("factored-True", "residual-True"),
        U_AND_V_ARE_FROZEN,
        AssertionError,
    ),
    Deviation(
        ("test_loading_model_requires_grad_set_correctly",),
        ("False-factored", "False-residual"),  # loads one more adapter, to be trained
        U_AND_V_ARE_FROZEN,
        AssertionError,
    ),
    Deviation(
        ("test_add_adapter_rejects_duplicate_name_without_mutation",),
        ("*-True",),
        "`PeftMixedModel` takes only methods that PEFT lists as compatible with each other.",
        ValueError,
        "not compatible with the `PeftMixedModel`",
    ),
    Deviation(
        WITH_A_SECOND_ADAPTER,
        ("*pretraining *",),
        "`pretraining` releases the base weights, so there is one adapter.",
        ValueError,
        "such a model has exactly one adapter",
    ),
    Deviation(
        (
            "test_disable_adapter_is_reentrant",
            "test_disable_adapters",
            "test_disable_adapters_exiting_context_restores_previous_state",
            "test_disable_adapters_with_merging",
        ),
        ("pretraining *",),
        "`pretraining` releases the base weights, so nothing is left when the adapter is disabled.",
        RuntimeError,
        "cannot be disabled",
    ),
    Deviation(
        ("test_disable_adapters_exiting_context_irregular_state",),
        ("pretraining two-modules *", "pretraining attention *"),
        "`pretraining` releases the base weights, so nothing is left when the adapter is disabled.",
        RuntimeError,
        "cannot be disabled",
    ),
    Deviation(
        (
            "test_delete_adapter_properly_cleans_up_after_itself",
            "test_delete_merged_adapter_raises_without_mutation",
        ),
        ("pretraining *",),
        "`pretraining` releases the base weights, so nothing is left when the adapter is deleted.",
        RuntimeError,
        "`delete_adapter` needs the base weights",
    ),
    Deviation(
        ("test_get_base_model_state_dict",),
        ("pretraining *",),
        "`pretraining` releases the base weights, so they are not in the base model's state.",
        AssertionError,
    ),
    Deviation(
        ("test_only_params_are_updated", "test_training_custom_models"),
        ("pretraining *",),
        "Expects that no parameter of the base trains; with `pretraining` all of them do.",
        AssertionError,
    ),
    Deviation(
        ("test_get_base_model_state_dict",),
        ("* attention *", "* attention+linear *"),
        "While adapters are on it, the projections of an nn.MultiheadAttention are modules with other names.",
        AssertionError,
    ),
    PICKLES,
]
