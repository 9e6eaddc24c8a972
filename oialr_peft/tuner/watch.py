"""A warning for models that are trained without anybody who runs the schedule."""

from __future__ import annotations

import warnings
import weakref

from torch import Tensor, nn

from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import adapter_layers

STEPS_UNTIL_WARNING = 100  # without a controller, when `update_every` is a share of an unknown number of steps


class MissingControllerWatch:
    """Warns once when an adapter trains for a whole check interval and nobody calls `OIALRController.step`.

    A hook on one trained parameter, called when its gradient is ready. A new step began when the gradient is another
    tensor than before, because it was cleared, or the parameter's version was raised by an update; accumulating
    micro-batches does neither.
    """

    def __init__(self, layer: OIALRLinear, adapter_name: str, config: OIALRConfig) -> None:
        # not the layer itself: its parameter holds this hook, and the garbage collector does not see such a cycle
        self._controlled = layer.controlled
        self._adapter_name = adapter_name
        self._interval = config.update_every if isinstance(config.update_every, int) else STEPS_UNTIL_WARNING
        self._steps = 0
        self._warned = False
        self._last: tuple[weakref.ref[Tensor], int] | None = None  # gradient and version at the previous call

    @classmethod
    def attach(cls, model: nn.Module, adapter_name: str, config: OIALRConfig) -> None:
        """Watch the first layer of the adapter that trains, if any does."""
        for layer in adapter_layers(model, adapter_name).values():
            parameter = layer.trained_parameter(adapter_name)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(cls(layer, adapter_name, config))
                return

    def __call__(self, parameter: Tensor) -> None:
        """See whether a new step began, and warn once the interval is over."""
        if self._warned or self._adapter_name in self._controlled:
            return
        assert parameter.grad is not None
        if self._last is not None and (self._last[0]() is not parameter.grad or self._last[1] != parameter._version):
            self._steps += 1
        self._last = weakref.ref(parameter.grad), parameter._version
        if self._steps >= self._interval:
            self._warned = True
            warnings.warn(
                f"The OIALR adapter `{self._adapter_name}` has trained for {self._steps} optimizer steps without a "
                "controller: no layer is factored and no rank shrinks. Use OIALRTrainer, add OIALRCallback() to your "
                "Trainer, or call OIALRController.step() after each optimizer step.",
                stacklevel=2,
            )
