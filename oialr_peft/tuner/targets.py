"""Which modules are targets: every linear layer but the head, names as PEFT compares them, and weights that modules share."""

from __future__ import annotations

import re
import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oialr_peft.tuner.attention import ATTENTION
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import adapter_layers


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Full names of parameters that stand at more than one place of the model, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def require_own_weight(weight: Tensor, name: str, shared: dict[int, list[str]]) -> None:
    """Raise a ValueError for a target whose weight another module has as well."""
    if id(weight) in shared:
        raise ValueError(
            f"`{name}` shares its weight with another module ({', '.join(shared[id(weight)])}), which would keep the "
            "old weight. Leave it out with `exclude_modules`, or untie the weights (`tie_word_embeddings=False`)."
        )


def require_own_weights_to_save(model: nn.Module, config: OIALRConfig, shared: dict[int, list[str]]) -> None:
    """Raise a ValueError for a module of `modules_to_save` with a weight that another module has as well."""
    saved = config.modules_to_save or []
    for name, module in model.named_modules():
        tied = [shared[id(parameter)] for parameter in module.parameters() if id(parameter) in shared]
        if tied and any(name == key or name.endswith(f".{key}") for key in saved):
            raise ValueError(
                f"`modules_to_save` names `{name}`, whose weight is tied ({', '.join(tied[0])}): its copy would train, and "
                'the other end would stay as it is. Leave it out; `mode="pretraining"` trains and saves both as one.'
            )


def linear_modules_outside_the_head(model: nn.Module) -> list[str]:
    """Every `nn.Linear`, `Conv1D` and `nn.MultiheadAttention`, except the head and the inside of other adapters.

    Convolutions are left to be named, as in PEFT's other methods.
    """
    heads = tuple(f"{name}." for name in _head_names(model))
    inside = prefixes_inside(model, BaseTunerLayer, *ATTENTION)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, OIALRLinear, *ATTENTION))
        and not f"{name}.".startswith(heads)
        and not name.startswith(inside)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer outside its head. Name what `target_modules` shall be; "
            "convolutions are never chosen by default."
        )
    return names


def exactly(names: list[str], model: nn.Module) -> set[str] | str:
    """A value of `target_modules` that names these modules and no other."""
    targets = set(names)
    others = {name for name, _ in model.named_modules()} - targets
    # a name in a set also stands for those that end in it
    if any(not targets.isdisjoint(ends_of(other)) for other in others):
        return "|".join(re.escape(name) for name in names)
    return targets


def ends_of(name: str) -> list[str]:
    """``["b.c", "c"]`` of ``"a.b.c"``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def prefixes_inside(model: nn.Module, *kinds: type) -> tuple[str, ...]:
    """What the names of everything inside modules of these kinds begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def _head_names(model: nn.Module) -> list[str]:
    """What a transformers model has around its base model, and its output embedding."""
    if not isinstance(model, PreTrainedModel):
        return []
    heads = [name for name, child in model.named_children() if model.base_model not in (model, child)]
    output = model.get_output_embeddings()
    return heads + [name for name, module in model.named_modules() if output is not None and module is output]


def warn_about_untrained_head(model: nn.Module, config: OIALRConfig) -> None:
    """Warn when the head of a transformers model is neither a target nor saved."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return
    saved = set(config.modules_to_save or [])
    untrained = [
        name
        for name in _head_names(model)
        if name not in saved and any(True for _ in getattr(model, name).parameters())
    ]
    if untrained:
        warnings.warn(
            f"The head ({', '.join(untrained)}) is not a target and stays as it is. If it is new, pass "
            f"`modules_to_save={untrained}` or a `task_type`, so that it trains.",
            stacklevel=2,
        )


def warn_about_unknown_ranks(model: nn.Module, adapter_name: str, config: OIALRConfig) -> None:
    """Warn about keys of `rank_pattern` that name no target."""
    unknown = sorted(set(config.rank_pattern or {}) - set(adapter_layers(model, adapter_name)))
    if unknown:
        warnings.warn(
            f"`rank_pattern` names modules that are not targets, and are left out: {unknown}. Its keys are full module "
            "names.",
            RuntimeWarning,
            stacklevel=2,
        )
