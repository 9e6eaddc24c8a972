"""What layers are given in the training steps before a check, so that a check can see what it removes.

`RecentInputs` keeps some inputs of the last step. `RecentOutputs` adds up, over several steps, which way the outputs go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oialr_peft.config import OIALRConfig
from oialr_peft.distributed import Processes
from oialr_peft.factors import DTYPES, compute_dtype
from oialr_peft.layer import OIALRLinear

POSITIONS = 512  # tokens or output pixels of a layer that are taken of one step, spread over the batch
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
        covariances: (2, d, d), Σ g gᵀ / ‖y‖² over the positions of each half. g is the smaller side of a dense layer: its input
            x if m ≥ n, its output y otherwise. Of a factored one it is the input Vᵀx of the core.
        positions: (2,), how many of each half had an output other than zero.
    """

    covariances: Tensor
    positions: Tensor


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
        self._rows: dict[str, Tensor] = {}

    def _record(self, layer: OIALRLinear, x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self._rows[layer.name] = self._scaled(layer, x)

    def _scaled(self, layer: OIALRLinear, x: Tensor) -> Tensor:
        """The rows g / ‖y‖; zero where y is, NaN where it is not finite."""
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
        return (rows.double() * scale).to(dtype)

    def count_step(self) -> None:
        """The step has come to its end."""
        for name, rows in self._rows.items():
            # sequences of a batch follow one another, so halves share at most one
            halves = rows.tensor_split(2)
            covariances = torch.stack([half.mT @ half for half in halves])
            positions = torch.stack([half.any(1).sum() for half in halves])
            if name in self.recorded:
                covariances += self.recorded[name].covariances
                positions += self.recorded[name].positions
            self.recorded[name] = Recorded(covariances, positions)
        self._rows.clear()

    def add_up(self, names: Sequence[str], processes: Processes) -> None:
        """Add what all processes have recorded of these layers up; each of them calls this."""
        for name in names:
            # copies: a state that somebody keeps shares the tensors
            mine = self.recorded.get(name) or self._nothing(self._layers[name])
            self.recorded[name] = Recorded(mine.covariances.clone(), mine.positions.clone())
        processes.add_up([tensor for name in names for tensor in self.recorded[name]])

    def _nothing(self, layer: OIALRLinear) -> Recorded:
        """Of a layer that was not called."""
        parameter, size = layer.trained_parameter(self._adapter_name), self._size_of(layer)
        covariances = torch.zeros(2, size, size, dtype=compute_dtype(parameter), device=parameter.device)
        return Recorded(covariances, torch.zeros(2, dtype=torch.int64, device=parameter.device))

    def forget_step(self) -> None:
        """The step did not count."""
        self._rows.clear()

    def forget(self) -> None:
        """Free what was recorded."""
        self._rows.clear()
        self.recorded.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was recorded in the steps that were counted."""
        return {
            "covariances": {name: recorded.covariances for name, recorded in self.recorded.items()},
            "positions": {name: recorded.positions.tolist() for name, recorded in self.recorded.items()},
        }

    def require_fitting(self, state_dict: Mapping[str, Any]) -> None:
        """Raise a ValueError when a state is of other layers, or of layers in another phase or with another rank."""
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
            positions = torch.tensor(state_dict["positions"][name], device=device)
            self.recorded[name] = Recorded(covariances.to(device, copy=True), positions)


def recorder_of(config: OIALRConfig, layers: Mapping[str, OIALRLinear], adapter_name: str) -> Recorder:
    """What this configuration prunes by."""
    if config.prune_by == "outputs":
        return RecentOutputs(layers, adapter_name)
    return Recorder() if config.max_output_loss is None else RecentInputs(layers.values())
