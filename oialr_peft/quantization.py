"""Quantized base weights, of whatever library: what they are as numbers. Nothing is ever quantized here."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of this module is stored as quantized integers (bitsandbytes, torchao)."""
    return _library(module) is not None


def dequantized_weight(module: nn.Module) -> Tensor:
    """The weight of a module that `is_quantized`, as floating-point numbers in its stored layout; a new tensor."""
    weight: Any = module.weight
    with torch.no_grad():
        if _library(module) == "torchao":
            return weight.dequantize()
        return dequantize_bnb_weight(weight, state=getattr(module, "state", None))


def dequantized_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of `dequantized_weight`, without computing it."""
    weight: Any = module.weight
    if _library(module) == "torchao":
        return weight.dtype
    return weight.quant_state.dtype if type(weight).__name__ == "Params4bit" else torch.float32


def _library(module: nn.Module) -> str | None:
    kind = type(module.weight)
    if kind.__module__.startswith("torchao."):
        return "torchao"
    return "bitsandbytes" if kind.__name__ in ("Int8Params", "Params4bit") else None
