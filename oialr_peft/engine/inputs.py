"""What layers are given in the training steps before a check, so that a check can see what it removes.

`RecentInputs` keeps some inputs of the last step. `RecentOutputs` adds up, over several steps, which way the outputs go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oialr_peft.linalg.factors import DTYPES, compute_dtype
from oialr_peft.parallel.distributed import Processes
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear

POSITIONS = 512  # tokens or output pixels of a layer that are taken of one step, spread over the batch
SMALLEST = -1000  # exponent of nothing, below that of any number
STEPS = 16  # in which `RecentOutputs` records: it takes some thousand positions to tell directions apart


class Recorder:
    """Watches layers in the training steps before a check. This one keeps nothing: it is for rules that go by the weight.

    Forward hooks, made once, so that `torch.compile` traces them; outside the steps before a check they do nothing.

    Attributes:
        steps: before a check that are to be recorded.
        recording: whether the next step is recorded.
    """

    steps = 0

    def __init__(self, layers: Iterable[OIALRLinear] = ()) -> None:
        self.recording = False
        self._hooks = [layer.register_forward_pre_hook(self._watch) for layer in layers]

    def _watch(self, layer: OIALRLinear, arguments: tuple[Any, ...]) -> None:
        if self.recording and layer.training:
            self._record(layer, layer.form.sample(arguments[0].detach(), POSITIONS))

    def _record(self, layer: OIALRLinear, x: Tensor) -> None:
        """Take a sample of what the layer is given; what came before in the same step is replaced."""

    def count_step(self) -> None:
        """The step has come to its end."""

    def forget_step(self) -> None:
        """The step did not count."""

    def forget(self) -> None:
        """Free what was recorded."""

    def require_fitting(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError when a state is of other layers, or of layers in another phase or with another rank."""

    def state_dict(self) -> dict[str, Any]:
        """What was recorded in the steps that were counted."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any], device: torch.device) -> None:
        """Continue from there; without a state that holds it, begin anew."""
        self.forget()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


class RecentInputs(Recorder):
    """Keeps some inputs of each layer: those of the last forward pass before a check.

    Args:
        layers: to watch.

    Attributes:
        samples: by name of the layer, inputs that give at least `POSITIONS` output positions, if there were as many.
    """

    steps = 1

    def __init__(self, layers: Iterable[OIALRLinear]) -> None:
        super().__init__(layers)
        self.samples: dict[str, Tensor] = {}

    def _record(self, layer: OIALRLinear, x: Tensor) -> None:
        self.samples[layer.name] = x

    def forget_step(self) -> None:
        """The step did not count."""
        self.samples.clear()

    def forget(self) -> None:
        """Free what was recorded."""
        self.samples.clear()


class Recorded(NamedTuple):
    """A layer without its bias on recent inputs, each divided by the length of its output ‖y‖; in two halves of the batches.

    What directions lose on the half that they were not found on is what they will lose on other inputs.

    Attributes:
        covariances: (2, d, d), Σ g gᵀ / ‖y‖² over the positions of each half, divided by 4ᵉ. g is the smaller side of a dense
            layer: its input x if m ≥ n, its output y otherwise. Of a factored one it is the input Vᵀx of the core.
        positions: (2,), how many of each half had an output other than zero.
        exponent: e, scalar. Inputs of very small or large weights are far from their outputs, and their squares still further.
    """

    covariances: Tensor
    positions: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, rows: Tensor, exponent: Tensor) -> Recorded:
        """Of rows g / ‖y‖ that were divided by 2ᵉ."""
        # sequences of a batch follow one another, so halves share at most one
        halves = rows.tensor_split(2)
        covariances = torch.stack([half.mT @ half for half in halves])
        return cls(covariances, torch.stack([half.any(1).sum() for half in halves]), exponent)

    def divided(self, exponent: Tensor) -> Recorded:
        """The same with an exponent that is no smaller."""
        return Recorded(_times_power(self.covariances, 2 * (self.exponent - exponent)), self.positions, exponent)

    def and_of(self, other: Recorded) -> Recorded:
        """Of both together."""
        exponent = torch.maximum(self.exponent, other.exponent)
        ours, theirs = self.divided(exponent), other.divided(exponent)
        return Recorded(ours.covariances + theirs.covariances, ours.positions + theirs.positions, exponent)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x · 2ᵉ``."""
    return x * torch.exp2(exponent.to(x.dtype))


class RecentOutputs(Recorder):
    """Adds up which way the outputs of each layer go, over the last forward pass of every step.

    Args:
        layers: to watch, by name.
        adapter_name: whose weights give the outputs.

    Attributes:
        recorded: by name of the layer.
    """

    steps = STEPS

    def __init__(self, layers: Mapping[str, OIALRLinear], adapter_name: str) -> None:
        super().__init__(layers.values())
        self.recorded: dict[str, Recorded] = {}
        self._layers = layers
        self._adapter_name = adapter_name
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}

    def _record(self, layer: OIALRLinear, x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self._rows[layer.name] = self._scaled(layer, x)

    def _scaled(self, layer: OIALRLinear, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows g / ‖y‖, zero where y is, NaN where it is not finite; divided by 2ᵉ, so that none is above 1; and e."""
        form, name = layer.form, self._adapter_name
        dtype = compute_dtype(layer.trained_parameter(name))
        x = x.to(dtype)
        if layer.is_dense(name):
            output = form.rows(form.apply(x, layer.oialr_weight[name].to(dtype)))
            rows = output if layer.out_features < layer.in_features else form.patches(x)
        else:
            u, sigma, vh = (part[name].to(dtype) for part in (layer.oialr_u, layer.oialr_sigma, layer.oialr_vh))
            rows = form.rows(form.apply(x, vh))
            output = rows @ sigma.mT  # as long as U times it
            if layer.residual[name]:
                output = form.rows(layer.base_output(x)) + output @ u.mT
        # squares of numbers above 1e19 or below 1e-23 leave the range of float32
        energy = output.double().square().sum(1, keepdim=True)
        scale = torch.where(energy == 0, 0.0, torch.where(energy.isinf(), torch.nan, energy.rsqrt()))
        relative = rows.double() * scale
        largest = relative.abs().amax() if relative.numel() > 0 else relative.new_zeros(())
        exponent = torch.where(largest > 0, torch.log2(largest).ceil(), SMALLEST).to(torch.int64)
        return _times_power(relative, -exponent).to(dtype), exponent

    def count_step(self) -> None:
        """The step has come to its end."""
        for name, (rows, exponent) in self._rows.items():
            found = Recorded.of(rows, exponent)
            self.recorded[name] = self.recorded[name].and_of(found) if name in self.recorded else found
        self._rows.clear()

    def add_up(self, names: Sequence[str], processes: Processes) -> None:
        """Add what all processes have recorded of these layers up; each of them calls this."""
        mine = [self.recorded.get(name) or self._nothing(self._layers[name]) for name in names]
        largest = processes.largest(torch.stack([recorded.exponent for recorded in mine]))
        for name, recorded, exponent in zip(names, mine, largest, strict=True):
            covariances, positions, _ = recorded.divided(exponent)
            # a copy: a state that somebody keeps shares the tensor
            self.recorded[name] = Recorded(covariances, positions.clone(), exponent)
        processes.add_up([tensor for name in names for tensor in self.recorded[name][:2]])

    def _nothing(self, layer: OIALRLinear) -> Recorded:
        """Of a layer that was not called."""
        parameter, size = layer.trained_parameter(self._adapter_name), self._size_of(layer)
        covariances = torch.zeros(2, size, size, dtype=compute_dtype(parameter), device=parameter.device)
        positions = torch.zeros(2, dtype=torch.int64, device=parameter.device)
        return Recorded(covariances, positions, torch.full_like(positions[0], SMALLEST))

    def forget_step(self) -> None:
        """The step did not count."""
        self._rows.clear()

    def forget(self) -> None:
        """Free what was recorded."""
        self._rows.clear()
        self.recorded.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was recorded in the steps that were counted."""
        numbers = [torch.stack([*recorded.positions, recorded.exponent]) for recorded in self.recorded.values()]
        rows = torch.stack(numbers).tolist() if numbers else []
        return {
            "covariances": {name: recorded.covariances for name, recorded in self.recorded.items()},
            "positions": {name: row[:2] for name, row in zip(self.recorded, rows, strict=True)},
            "exponents": {name: row[2] for name, row in zip(self.recorded, rows, strict=True)},
        }

    def require_fitting(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError when a state is of other layers, or of layers in another phase or with another rank."""
        covered = [set(state_dict.get(key, {})) for key in ("covariances", "positions", "exponents")]
        incomplete = sorted(set.union(*covered) - set.intersection(*covered))
        if incomplete:
            raise ValueError(
                f"The controller state holds only a part of what was recorded of {', '.join(incomplete)}: covariances, positions "
                "and exponents belong together. Load a state as `state_dict()` gave it."
            )
        for name, covariances in state_dict.get("covariances", {}).items():
            size = self._size_of(self._layers[name]) if name in self._layers else None
            if tuple(covariances.shape) != (2, size, size) or covariances.dtype not in DTYPES:
                raise ValueError(
                    f"The controller state holds covariances of `{name}` with shape {tuple(covariances.shape)} and "
                    f"{covariances.dtype}, but that layer needs floating-point numbers of shape {(2, size, size)}. Load the "
                    "model's weights from the same checkpoint first."
                )

    def _size_of(self, layer: OIALRLinear) -> int:
        if layer.is_dense(self._adapter_name):
            return min(layer.out_features, layer.in_features)
        return layer.trained_parameter(self._adapter_name).shape[0]

    def load_state_dict(self, state_dict: Mapping[str, Any], device: torch.device) -> None:
        """Continue from there; without a state that holds it, begin anew."""
        self.forget()
        for name, covariances in state_dict.get("covariances", {}).items():
            positions, exponent = (
                torch.tensor(state_dict[key][name], device=device) for key in ("positions", "exponents")
            )
            self.recorded[name] = Recorded(covariances.to(device, copy=True), positions, exponent)


def recorder_of(config: OIALRConfig, layers: Mapping[str, OIALRLinear], adapter_name: str) -> Recorder:
    """What this configuration prunes by."""
    if config.prune_by == "outputs":
        return RecentOutputs(layers, adapter_name)
    return Recorder() if config.max_output_loss is None else RecentInputs(layers.values())
