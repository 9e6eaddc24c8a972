"""The learning rate of Σ: why it differs from that of a dense weight, and how an optimizer step gets it.

An optimizer that scales every entry on its own, such as Adam, moves all entries of a matrix by about the learning rate η: a dense
W (m, n) by ``η √(mn)`` in Frobenius norm, but a W that is stored as U Σ Vᵀ by ``η r`` only, since U and V keep norms. So Σ learns
too slowly by ``√(mn) / r``, the more so the lower its rank. Multiplied by that scale, the learning rate means the same before and
after a layer is factored. Optimizers that are linear in the gradient (SGD), or that give all directions of a matrix the same length
(Muon), move W alike in both forms and need no scale.

Weight decay is divided by the scale: what an optimizer step takes off Σ follows the schedule, not the rank.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from oialr_peft.tuner.layer import OIALRLinear

SPLIT = "oialr_split"  # marks a group that exists only during a step


def norm_scale(out_features: int, in_features: int, rank: int) -> float:
    """``√(mn) / r``, rounded to a power of √2 so that the layers of a model share few values.

    >>> norm_scale(64, 64, 64), norm_scale(64, 64, 16), norm_scale(3072, 768, 48)
    (1.0, 4.0, 32.0)
    """
    return 2.0 ** (round(2 * math.log2(math.sqrt(out_features * in_features) / rank)) / 2)


def scales_entries(optimizer: Optimizer) -> bool:
    """Whether an optimizer scales every entry of a gradient on its own: all do but SGD and Muon."""
    return not isinstance(optimizer, (torch.optim.SGD, torch.optim.Muon))


class SigmaLearningRate:
    """Gives every Σ its learning rate for the duration of each optimizer step.

    The groups of the optimizer are split when its step begins and are as before when it ends: schedulers, checkpoints and
    everyone else see the groups that the user made.

    Args:
        optimizer: trains the layers; a plain `torch.optim.Optimizer`.
        layers: the adapter layers. They are not kept alive.
        adapter_name: which adapter.
        scale: of the learning rate; `"norm"` is `norm_scale` for optimizers that scale every entry, and 1 for others.
    """

    def __init__(
        self, optimizer: Optimizer, layers: Iterable[OIALRLinear], adapter_name: str, scale: float | str
    ) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._adapter_name = adapter_name
        self._scale = scale
        self._groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # as they were before the step
        if not isinstance(scale, str) or scales_entries(optimizer):
            optimizer.register_step_pre_hook(self._split)
            optimizer.register_step_post_hook(self._restore)

    def scale_of(self, layer: OIALRLinear) -> float:
        """By what the learning rate of a factored layer is multiplied."""
        if not isinstance(self._scale, str):
            return self._scale
        return norm_scale(layer.out_features, layer.in_features, layer.rank(self._adapter_name))

    def _split(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore(optimizer)  # a step that raised has left them split
        if any(SPLIT in group for group in optimizer.param_groups):
            return  # another controller has
        scales = self._scales()
        for group in list(optimizer.param_groups):
            by_scale: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_scale.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
            self._groups.append((group, group["params"]))
            group["params"] = by_scale.pop(1.0, [])
            for scale, parameters in by_scale.items():
                split = {**group, "params": parameters, "lr": group["lr"] * scale, SPLIT: True}
                if "weight_decay" in group:
                    split["weight_decay"] = group["weight_decay"] / scale
                optimizer.param_groups.append(split)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        if self._groups:
            optimizer.param_groups[:] = [group for group, _ in self._groups]
            for group, parameters in self._groups:
                group["params"] = parameters
            self._groups.clear()

    def _scales(self) -> dict[int, float]:
        """Scale of the learning rate by the identity of a parameter; parameters without one keep theirs."""
        layers = [layer for reference in self._layers if (layer := reference()) is not None]
        return {
            id(layer.trained_parameter(self._adapter_name)): self.scale_of(layer)
            for layer in layers
            if not layer.is_dense(self._adapter_name)
        }
