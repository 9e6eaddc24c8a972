"""Which OIALR adapters a model has, and in which layers."""

from __future__ import annotations

from torch import nn

from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, OIALRLinear]:
    """The layers that have this adapter, by full module name in the base model, in module order."""
    return {
        module.name: module
        for module in model.modules()
        if isinstance(module, OIALRLinear) and module.has_adapter(adapter_name)
    }


def config_of(model: nn.Module, adapter_name: str) -> OIALRConfig:
    """The configuration of an adapter of the model.

    Raises:
        ValueError: the model has no OIALR adapter of this name.
    """
    for module in model.modules():
        config = module.__dict__.get("peft_config", {}).get(adapter_name)
        if isinstance(config, OIALRConfig):
            return config
    raise ValueError(
        f"The model has no OIALR adapter called `{adapter_name}`. Make it with get_peft_model(model, OIALRConfig()) "
        "first, or pass its `adapter_name`."
    )


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that is active in the first layer with one; `None` without any."""
    layers = (module for module in model.modules() if isinstance(module, OIALRLinear))
    return next((layer.active_adapters[0] for layer in layers if layer.active_adapters), None)
