"""What the tiny models generate in PEFT's tests of mixed batches, in float64, and with weights that are a little off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft_conformance.models import make_models
from peft_conformance.transformers_models import DECODERS, ENCODER_DECODERS
from torch import nn

ADAPTERS = ("__base__", "adapter0", "adapter1")
DISTURBANCE = 1e-5  # relative, of each weight: some fifty times what float32 rounds
AUTO = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM}


def _has_two_adapters(settings: dict[str, Any]) -> bool:
    """Whether the tests of mixed batches run: not in pretraining, with trained biases or with trained tokens."""
    return settings["mode"] != "pretraining" and not {"bias", "trainable_token_indices"} & settings.keys()


CASES = [case for case in (*DECODERS, *ENCODER_DECODERS) if _has_two_adapters(case.values[2])]


def disturbed(model: nn.Module) -> nn.Module:
    """The model with each weight changed by a random 1e-5 of itself."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + DISTURBANCE * noise)
    return model


def texts_of(case: Any, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> dict[str, list[list[int]]]:
    """Tokens that the base and two adapters generate, as `test_generate_with_mixed_adapter_batches` asks for them."""
    model_id, config_class, settings = case.values
    base = AUTO[settings["task_type"]].from_pretrained(make_models() / model_id)
    configs = [config_class(**settings, init_weights=False) for _ in range(2)]
    torch.manual_seed(0)
    model = get_peft_model(base, configs[0], adapter_name="adapter0")
    model.add_adapter("adapter1", configs[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.base_model.prefix in name:
                parameter.mul_(10)  # as the suite does, for more effect
    model = change(model.double().eval())
    return {name: _texts(model, name, settings["task_type"]) for name in ADAPTERS}


def _texts(model: PeftModel, adapter: str, task: str) -> list[list[int]]:
    tokens, mask = torch.tensor([[1, 1, 1], [1, 2, 1]]), torch.tensor([[1, 1, 1], [1, 0, 1]])
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = tokens
    settings = {"max_length": 15, "num_beams": 4, "early_stopping": True}
    with torch.inference_mode():
        if adapter == "__base__":
            with model.disable_adapter():
                return model.generate(**inputs, **settings).tolist()
        model.set_adapter(adapter)
        return model.generate(**inputs, **settings).tolist()
