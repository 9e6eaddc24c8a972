"""Quantized base weights, of whatever library: what they are as numbers. Nothing is ever quantized here."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of this module is stored as quantized integers (bitsandbytes, torchao)."""
    return _library(module) is not None


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> Tensor:
    """The weight of a module that `is_quantized`, as floating-point numbers in its stored layout; a new tensor."""
    weight: Any = module.weight
    if _library(module) == "torchao":
        return weight.dequantize()
    if _is_repacked(weight):
        return _computed_weight(module)
    return dequantize_bnb_weight(weight, state=getattr(module, "state", None))


def dequantized_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of `dequantized_weight`, without computing it."""
    weight: Any = module.weight
    if _library(module) == "torchao":
        return weight.dtype
    if type(weight).__name__ == "Int8Params":
        return torch.float32
    return weight.quant_state.original_dtype if _is_repacked(weight) else weight.quant_state.dtype


def _library(module: nn.Module) -> str | None:
    kind = type(module.weight)
    if kind.__module__.startswith("torchao."):
        return "torchao"
    return "bitsandbytes" if kind.__name__ in ("Int8Params", "Params4bit") else None


def _is_repacked(weight: Any) -> bool:
    """Whether bitsandbytes has put 4-bit weights into the order that its kernel for some CPUs reads.

    It does so at the first forward pass without gradients, and then dequantizes them in the wrong order
    (bitsandbytes 0.50.2; its own inverse loses the scales' order unless they are quantized as well).
    """
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _computed_weight(module: Any) -> Tensor:
    """The weight that a linear module multiplies with, from its products with the unit vectors."""
    units = torch.eye(module.in_features, dtype=dequantized_dtype(module), device=module.weight.device)
    products = module(units)
    return (products if module.bias is None else products - module.bias).T.contiguous()
