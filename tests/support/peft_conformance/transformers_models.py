"""What PEFT's suites of transformers models are run on, and where OIALR departs from them.

Not every configuration meets every model: each model has some of the phases, and each suite has every phase.
"""

from __future__ import annotations

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
from peft_conformance.models import MODELS

from oialr_peft import OIALRConfig


def _case(name: str, model: str, **settings: Any) -> Any:
    """A row over `model_id` and `config_cls,config_kwargs`, the arguments of the suites' tests."""
    return pytest.param(MODELS[model].hub_id, OIALRConfig, settings, id=f"{name} {model}")


def _decoder(name: str, model: str, **settings: Any) -> Any:
    return _case(name, model, task_type="CAUSAL_LM", **settings)


def _encoder_decoder(name: str, model: str, **settings: Any) -> Any:
    return _case(name, model, task_type="SEQ_2_SEQ_LM", **settings)


def _features(name: str, model: str, **settings: Any) -> Any:
    # PEFT's model for features passes arguments that CLIP does not take
    task = {} if model == "CLIP" else {"task_type": "FEATURE_EXTRACTION"}
    return _case(name, model, **task, **settings)


def _classifier(name: str, model: str, **settings: Any) -> Any:
    return _case(name, model, task_type="SEQ_CLS", **settings)


QUERY_VALUE = ["q_proj", "v_proj"]
TOKENS = {"trainable_token_indices": [0, 1, 3]}

DECODERS = [
    _decoder("dense all-linear", "OPT", **DENSE),
    _decoder("dense", "GPT2", **DENSE, target_modules=["c_attn"]),
    _decoder("dense", "GPTJ", **DENSE, target_modules=QUERY_VALUE),
    _decoder("dense", "Llama", **DENSE, target_modules=QUERY_VALUE),
    _decoder("dense expression", "Qwen2", **DENSE, target_modules=r".*\.mlp\.(up|down)_proj"),
    _decoder("dense all-linear-but", "Gemma3", **DENSE, target_modules="all-linear", exclude_modules=["o_proj"]),
    _decoder("dense bias-all", "OPT", **DENSE, target_modules=["fc1", "fc2"], bias="all"),
    _decoder("dense tokens", "Llama", **DENSE, target_modules=QUERY_VALUE, **TOKENS),
    _decoder("factored", "OPT", **FACTORED, target_modules=QUERY_VALUE),
    _decoder("factored all-linear", "GPT2", **FACTORED),
    _decoder("factored", "GPTNeoX", **FACTORED, target_modules=["query_key_value", "dense_4h_to_h"]),
    _decoder("factored", "Qwen2", **FACTORED, target_modules=["q_proj", "k_proj", "v_proj"]),
    _decoder("factored head", "Llama", **FACTORED, target_modules=QUERY_VALUE, modules_to_save=["lm_head"]),
    _decoder("truncated", "Llama", **TRUNCATED, target_modules=["gate_proj", "up_proj", "down_proj"]),
    _decoder("truncated fraction", "GPTNeoX", **FACTORED, rank=0.5, target_modules=["query_key_value"]),
    _decoder("truncated mask", "Gemma3", **MASKED, target_modules=QUERY_VALUE),
    _decoder("residual", "OPT", **RESIDUAL, target_modules=QUERY_VALUE),
    _decoder("residual", "GPT2", **RESIDUAL, target_modules=["c_attn", "c_proj"]),
    _decoder("residual all-linear", "GPTJ", **RESIDUAL),
    _decoder("residual tokens", "Qwen2", **RESIDUAL, target_modules=QUERY_VALUE, **TOKENS),
    _decoder("residual mask", "Gemma3", **RESIDUAL, target_modules=QUERY_VALUE, shrink="mask"),
    _decoder("residual bias-own", "GPTJ", **RESIDUAL, target_modules=["fc_in"], bias="oialr_only"),
    _decoder("pretraining", "Llama", **PRETRAINING, target_modules=QUERY_VALUE),
    _decoder("pretraining all-linear", "GPT2", **PRETRAINING),
]

ENCODER_DECODERS = [
    _encoder_decoder("dense", "T5", **DENSE, target_modules=["q", "v"]),
    _encoder_decoder("dense all-linear", "BART", **DENSE),
    _encoder_decoder("dense bias-all", "BART", **DENSE, target_modules=QUERY_VALUE, bias="all"),
    _encoder_decoder("factored", "BART", **FACTORED, target_modules=["q_proj", "k_proj", "fc1"]),
    _encoder_decoder("factored all-linear", "T5", **FACTORED),
    _encoder_decoder("factored expression", "mT5", **FACTORED, target_modules=r".*\.(wi_0|wo)"),
    _encoder_decoder("truncated mask", "T5", **MASKED, target_modules=["q", "v"]),
    _encoder_decoder("truncated", "BART", **TRUNCATED, target_modules=[*QUERY_VALUE, "fc1"]),
    _encoder_decoder("residual", "BART", **RESIDUAL, target_modules=QUERY_VALUE),
    _encoder_decoder("residual tokens", "T5", **RESIDUAL, target_modules=["q", "v"], **TOKENS),
    _encoder_decoder("residual all-linear", "mT5", **RESIDUAL),
    _encoder_decoder("pretraining", "BART", **PRETRAINING, target_modules=QUERY_VALUE),
]

# the pooler's output is no part of what the suite trains
FEATURES = [
    _features("dense all-linear-but", "BERT", **DENSE, exclude_modules=["pooler.dense"]),
    _features("dense expression", "RoBERTa", **DENSE, target_modules=r".*\.(query|value)"),
    _features("dense", "DeBERTa", **DENSE, target_modules=["in_proj"]),
    _features("dense", "CLIP", **DENSE, target_modules=QUERY_VALUE),
    _features("dense tokens", "BERT", **DENSE, target_modules=["query", "value"], **TOKENS),
    _features("factored", "BERT", **FACTORED, target_modules=["query", "value"]),
    _features("factored all-linear", "CLIP", **FACTORED),
    _features("factored", "DeBERTa-v2", **FACTORED, target_modules=["query_proj", "value_proj"]),
    _features("truncated", "RoBERTa", **TRUNCATED, target_modules=["query", "value"]),
    _features("truncated mask", "DeBERTa", **MASKED, target_modules=["in_proj"]),
    _features("residual", "RoBERTa", **RESIDUAL, target_modules=["query", "value"]),
    _features("residual all-linear", "DeBERTa-v2", **RESIDUAL),
    _features("residual bias-own", "BERT", **RESIDUAL, target_modules=["query", "value"], bias="oialr_only"),
    _features("pretraining", "BERT", **PRETRAINING, target_modules=["query", "value"]),
]

CLASSIFIERS = [
    _classifier("dense all-linear", "BERT classifier", **DENSE),
    _classifier("dense", "Llama classifier", **DENSE, target_modules=QUERY_VALUE),
    _classifier("dense bias-all", "RoBERTa classifier", **DENSE, target_modules=["query", "value"], bias="all"),
    _classifier("factored", "BERT classifier", **FACTORED, target_modules=["query", "value"]),
    _classifier("factored all-linear", "RoBERTa classifier", **FACTORED),
    _classifier("truncated mask", "RoBERTa classifier", **MASKED, target_modules=["query", "value"]),
    _classifier("truncated", "Llama classifier", **TRUNCATED, target_modules=QUERY_VALUE),
    _classifier("residual all-linear", "Llama classifier", **RESIDUAL),
    _classifier("residual tokens", "BERT classifier", **RESIDUAL, target_modules=["query", "value"], **TOKENS),
    _classifier("pretraining", "BERT classifier", **PRETRAINING, target_modules=["query", "value"]),
]

# ---- deviations ------------------------------------------------------------------------------------------------------

WITH_A_SECOND_ADAPTER = (
    "test_add_adapter_no_autocast_adapter_dtype",
    "test_delete_adapter",
    "test_delete_inactive_adapter",
    "test_generate_with_mixed_adapter_batches",
    "test_merge_layers_multi",
    "test_mixed_adapter_batches",
    "test_save_pretrained_selected_adapters",
    "test_save_pretrained_selected_adapters_pickle",
)
TRAINING = ("test_training", "test_training_decoders", "test_training_encoder_decoders")
LAYER_INDEXING = tuple(f"{test}_layer_indexing" for test in TRAINING)
GRADIENT_CHECKPOINTING = tuple(f"{test}_gradient_checkpointing" for test in TRAINING)

DEVIATIONS = [
    # skipped by the suites
    Deviation(
        (
            "test_prompt_tuning_sample_vocab_prepare_for_training",
            "test_prompt_tuning_text_prepare_for_training",
            "test_training_prompt_learning_tasks",
        ),
        ("*",),
        "The suite skips it for every method but those that learn prompts.",
        None,
    ),
    Deviation(
        ("test_weighted_combination_of_adapters",),
        ("*",),
        "The suite skips it for every method but LoRA and IA3.",
        None,
    ),
    Deviation(
        (
            "test_generate_with_mixed_adapter_batches",
            "test_merge_layers_multi",
            "test_prepare_for_training_parametrized",
        ),
        ("*tokens*",),
        "The suite skips it when tokens of the embedding train.",
        None,
    ),
    # `bias`
    Deviation(
        WITH_A_SECOND_ADAPTER,
        ("*bias-*",),
        "PEFT allows one adapter with trained biases.",
        ValueError,
        "supports only 1 adapter with bias",
    ),
    Deviation(
        (*TRAINING, *LAYER_INDEXING, *GRADIENT_CHECKPOINTING),
        ("*bias-*",),
        "Expects that no parameter of the base trains; these biases do, for every method that has `bias`.",
        AssertionError,
    ),
    Deviation(
        ("test_lora_conversion",),
        ("*bias-*",),
        "PEFT converts no adapter with trained biases.",
        ValueError,
        "sets bias=",
    ),
    # `pretraining`
    Deviation(
        WITH_A_SECOND_ADAPTER,
        ("*pretraining *",),
        "`pretraining` releases the base weights, so there is one adapter.",
        ValueError,
        "such a model has exactly one adapter",
    ),
    Deviation(
        ("test_disable_adapter",),
        ("pretraining *",),
        "`pretraining` releases the base weights, so nothing is left when the adapter is disabled.",
        RuntimeError,
        "cannot be disabled",
    ),
    Deviation(
        ("test_unload_adapter",),
        ("pretraining *",),
        "`pretraining` releases the base weights, so nothing is left when the adapter is unloaded.",
        RuntimeError,
        "`unload` needs the base weights",
    ),
    Deviation(
        ("test_get_base_model_state_dict",),
        ("pretraining *",),
        "`pretraining` releases the base weights, so they are not in the base model's state.",
        AssertionError,
    ),
    Deviation(
        ("test_prepare_for_training_parametrized",),
        ("pretraining *",),
        "Expects that the embedding does not train; with `pretraining` it does.",
        AssertionError,
    ),
    # `layers_to_transform`
    Deviation(
        LAYER_INDEXING,
        ("*all-linear*", "*expression*"),
        "Adds `layers_to_transform`, which restricts a list of names; these targets are no list.",
        ValueError,
        "`layers_to_transform`",
    ),
    Deviation(
        (*TRAINING, *LAYER_INDEXING, *GRADIENT_CHECKPOINTING),
        ("*pretraining *",),
        "Expects that no parameter of the base trains; with `pretraining` all of them do.",
        AssertionError,
    ),
    # frozen factors
    Deviation(
        (*LAYER_INDEXING, *GRADIENT_CHECKPOINTING),
        ("*factored*", "*truncated*", "*residual*"),
        U_AND_V_ARE_FROZEN,
        AssertionError,
        "^$",  # before, a gradient that checkpointing changes fails with the name of the parameter
    ),
    PICKLES,
]

DECODER_DEVIATIONS = [
    *DEVIATIONS,
    Deviation(
        ("test_generate_with_mixed_adapter_batches", "test_mixed_adapter_batches"),
        ("*all-linear OPT",),
        "Before its MLP, OPT joins samples and positions in one dimension, so the layer cannot tell them apart.",
        ValueError,
        "Length of `adapter_names`",
    ),
]

FEATURE_DEVIATIONS = [
    *DEVIATIONS,
    Deviation(
        ("test_passing_input_embeds_works",),
        ("*CLIP",),
        "CLIP's text model takes no embeddings.",
        ValueError,
        "You have to specify input_ids",
    ),
]
