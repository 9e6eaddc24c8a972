"""What is saved of a model with an adapter: described for its card, expected of a file, and fitted to what is loaded."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch.nn.functional as F
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from oialr_peft.files.card import directory_of, write_adapter_card
from oialr_peft.files.checkpoints import Elsewhere, without_wrappers
from oialr_peft.files.described import SavedLayer, SavedModel, SavedSettings
from oialr_peft.tuner.attention import SplitAttention
from oialr_peft.tuner.config import OIALRConfig, Saving
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.registration import PREFIX


def saved_model(model: nn.Module, adapter_name: str = "default") -> SavedModel:
    """What a model card says of the model and its adapter."""
    layers = tuple(
        SavedLayer(
            name,
            layer.out_features,
            layer.in_features,
            None if layer.is_dense(adapter_name) else layer.rank(adapter_name),
        )
        for name, layer in adapter_layers(model, adapter_name).items()
    )
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None or not type(base).__module__.startswith("transformers."):
        return SavedModel(layers, adapter_name)
    class_name = type(base).__name__
    num_labels = base.config.num_labels if "Classification" in class_name else None
    return SavedModel(layers, adapter_name, class_name, num_labels)


def settings_for_card(config: OIALRConfig) -> SavedSettings:
    """What a model card says of a configuration."""
    settings = config.resolved()
    return SavedSettings(
        base_model=config.base_model_name_or_path,
        revision=config.revision,
        is_correction=settings.is_correction,
        from_scratch=settings.releases_base,
        shown=settings.shown(),
    )


def saving_of(model: nn.Module, config: OIALRConfig, adapter_name: str) -> Saving:
    """What the configuration of an adapter is told when its weights are saved: ranks, and that a card follows."""
    saved = saved_model(model, adapter_name)
    ranks = {layer.name: layer.rank for layer in saved.layers if layer.rank is not None}
    return Saving(ranks, partial(_write_card, saved, settings_for_card(config)))


def _write_card(saved: SavedModel, settings: SavedSettings, directory: str) -> None:
    write_adapter_card(directory_of(directory, saved.adapter_name), settings, saved)


def outside_layers(model: nn.Module, config: OIALRConfig, targets: Collection[str]) -> Elsewhere:
    """What a saved adapter may hold outside its layers, and what it must.

    Args:
        model: with or without the adapter.
        config: of the adapter.
        targets: full names of its layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    integers: set[str] = set()
    names_of: dict[int, set[str]] = {}  # several where modules share a parameter, of which transformers saves one
    state = _as_adapted(model, config)
    for key, value in state.items():
        if isinstance(value, Tensor) and f".{PREFIX}" not in key:
            name = without_wrappers(key)
            shapes[name] = tuple(value.shape)
            names_of.setdefault(id(value), set()).add(name)
            integers |= set() if value.is_floating_point() else {name}
    for name in targets:
        shapes.pop(f"{name}.weight", None)
    tokens: Any = config.trainable_token_indices or {}
    by_module = tokens.values() if isinstance(tokens, dict) else [tokens]
    # transformers has made integers, such as positions, part of the state and removed them again
    saved = {name for name in shapes if name not in integers and _is_saved(name, config, targets)}
    required = [frozenset(names) for names in names_of.values() if not names.isdisjoint(saved)]
    return Elsewhere(shapes, integers, required, {len(indices) for indices in by_module})


def _as_adapted(model: nn.Module, config: OIALRConfig) -> dict[str, Any]:
    """The state of the model, that of attention modules that are targets under the names of their projections."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and check_target_module_exists(config, name):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in SplitAttention(module).state_dict().items()}
    return state


def _is_saved(name: str, config: OIALRConfig, targets: Collection[str]) -> bool:
    """Whether a parameter outside the layers is in the file of an adapter."""
    module, _, part = name.rpartition(".")
    if config.resolved().releases_base or (part == "bias" and config.bias == "all"):
        return True
    if part == "bias" and config.bias == "oialr_only" and module in targets:
        return True
    return any(f".{key}." in f".{name}" for key in config.modules_to_save or [])


def fit_to_assign(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies outside the adapter, with dtypes and devices of the model, and as one parameter where weights are tied.

    `low_cpu_mem_usage=True` puts loaded tensors in the place of the model's own; others are copied into these.
    """
    places = model.state_dict(keep_vars=True)
    parameters: dict[int, nn.Parameter] = {}
    fitted = dict(state_dict)
    for key, tensor in state_dict.items():
        place = places.get(key, places.get(key.removeprefix("base_model.model.")))
        if isinstance(place, nn.Parameter) and not place.is_meta and not isinstance(place, DTensor):
            parameter = nn.Parameter(tensor.to(place), requires_grad=False)
            fitted[key] = parameters.setdefault(id(place), parameter)
    return fitted


def padded(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Factors of a masked layer, with zeros for the directions beyond its rank."""
    pad = max(0, size - tensors["oialr_sigma"].shape[0])
    widths = {"oialr_u": (0, pad), "oialr_sigma": (0, pad, 0, pad), "oialr_vh": (0, 0, 0, pad)}
    return {name: F.pad(tensor, widths[name]) for name, tensor in tensors.items()}
