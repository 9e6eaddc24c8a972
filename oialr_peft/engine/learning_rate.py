"""The learning rate of Σ: why it differs from that of a dense weight, and how an optimizer step gets it.

An optimizer that scales every entry on its own, such as Adam, moves all entries of a matrix by about the learning rate η: a dense
W (m, n) by ``η √(mn)`` in Frobenius norm, but a W that is stored as U Σ Vᵀ by ``η r`` only, since U and V keep norms. So Σ learns
too slowly by ``√(mn) / r``, the more so the lower its rank. Multiplied by that scale, the learning rate means the same before and
after a layer is factored. Optimizers that are linear in the gradient (SGD), or that give all directions of a matrix the same length
(Muon), move W alike in both forms and need no scale.

A layer that is factored late finds few steps and little of the learning rate left, and only r × r numbers to use them on. So its Σ
begins again higher, by `restart_scale`, and follows the schedule down from there, but never above √2 times where that was highest.

Weight decay is divided by the scale: what an optimizer step takes off Σ follows the schedule, not the rank.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr_peft.tuner.layer import OIALRLinear

RESTART_LIMIT = 8.0
CEILING = math.sqrt(2)  # of the learning rate of a restarted layer, times the highest of the schedule
SPLIT = "oialr_split"  # marks a group that exists only during a step


def norm_scale(out_features: int, in_features: int, rank: int) -> float:
    """``√(mn) / r``, rounded to a power of √2 so that the layers of a model share few values.

    >>> norm_scale(64, 64, 64), norm_scale(64, 64, 16), norm_scale(3072, 768, 48)
    (1.0, 4.0, 32.0)
    """
    return 2.0 ** (round(2 * math.log2(math.sqrt(out_features * in_features) / rank)) / 2)


def restart_scale(fallen: float) -> float:
    """By how much the learning rate of a layer that is factored now is higher from here on: the square of its fall over √2, at most 8.

    Rounded to a power of √2: where the schedule has hardly begun to fall, as from scratch, there is no restart. A layer that is
    factored when the learning rate has halved begins at the ceiling of √2 times the highest. Later ones stay at the ceiling for a
    while. Measured, see `docs/benchmarks.md`.

    Args:
        fallen: highest learning rate so far over the current one, ≥ 1.

    >>> restart_scale(1.2), restart_scale(1 / 0.3), restart_scale(math.inf)
    (1.0, 8.0, 8.0)
    """
    return 2.0 ** (round(2 * math.log2(min(max(fallen * fallen / CEILING, 1.0), RESTART_LIMIT))) / 2)


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
        scale: of the learning rate; `"norm"` is `norm_scale` for optimizers that scale every entry, 1 for others, and
            `"restart"` that times the layer's restart, up to the ceiling.
        group: index of the parameter group whose learning rate stands for that of all layers.

    Attributes:
        restarts: `restart_scale` by name, of the layers that were factored in this run.
    """

    def __init__(
        self, optimizer: Optimizer, layers: Iterable[OIALRLinear], adapter_name: str, scale: float | str, group: int
    ) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._adapter_name = adapter_name
        self._scale = scale
        self._group = group
        self.restarts: dict[str, float] = {}
        self._highest: float | Tensor = 0.0
        self._groups: list[tuple[dict[str, Any], list[nn.Parameter]]] = []  # as they were before the step
        if not isinstance(scale, str) or scales_entries(optimizer):
            optimizer.register_step_pre_hook(self._split)
            optimizer.register_step_post_hook(self._restore)

    def scale_of(self, layer: OIALRLinear, largest_restart: float) -> float:
        """By what the learning rate of a factored layer is multiplied."""
        if not isinstance(self._scale, str):
            return self._scale
        scale = norm_scale(layer.out_features, layer.in_features, layer.rank(self._adapter_name))
        return scale * min(self.restarts.get(layer.name, 1.0), largest_restart)

    def count_step(self, rate: float | Tensor) -> None:
        """Count an optimizer step, after which the learning rate of the schedule is this."""
        self._highest = _larger(self._highest, rate)

    def fallen_to(self, rate: float | Tensor) -> float:
        """The highest learning rate so far over this one, ≥ 1; infinite when this is 0."""
        rate = float(rate)
        return max(1.0, float(self._highest) / rate) if rate > 0 else math.inf

    def restart(self, names: list[str], rate: float | Tensor) -> None:
        """These layers are factored now, when the learning rate of the schedule is this."""
        if names:
            self.restarts.update(dict.fromkeys(names, restart_scale(self.fallen_to(rate))))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"highest_rate": float(self._highest), "restarts": dict(self.restarts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; states of earlier releases hold nothing of it."""
        self._highest = float(state.get("highest_rate") or 0.0)
        self.restarts = dict(state.get("restarts") or {})

    def _split(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore(optimizer)  # a step that raised has left them split
        if any(SPLIT in group for group in optimizer.param_groups):
            return  # another controller has
        scales = self._scales(optimizer.param_groups[self._group]["lr"])
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

    def _scales(self, rate: float | Tensor) -> dict[int, float]:
        """Scale of the learning rate by the identity of a parameter; parameters without one keep theirs.

        Once a layer has restarted, the host waits for a learning rate of the schedule that is a tensor on a device.
        """
        restarted = self._scale == "restart" and any(restart > 1 for restart in self.restarts.values())
        largest_restart = CEILING * self.fallen_to(rate) if restarted else 1.0
        layers = [layer for reference in self._layers if (layer := reference()) is not None]
        return {
            id(layer.trained_parameter(self._adapter_name)): self.scale_of(layer, largest_restart)
            for layer in layers
            if not layer.is_dense(self._adapter_name)
        }


def _larger(known: float | Tensor, rate: float | Tensor) -> float | Tensor:
    """Without waiting for the device."""
    if isinstance(rate, Tensor):
        return torch.maximum(torch.as_tensor(known, dtype=rate.dtype, device=rate.device), rate)
    return max(float(known), rate)
