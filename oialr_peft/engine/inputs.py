"""What layers are given in the training steps before a check, so that a check can see what it removes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear

POSITIONS = 512  # tokens or output pixels of a layer that are taken of one step, spread over the batch


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

    def forget_step(self) -> None:
        """The step did not count."""

    def forget(self) -> None:
        """Free what was recorded."""

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


def recorder_of(config: OIALRConfig, layers: Iterable[OIALRLinear]) -> Recorder:
    """What this configuration prunes by."""
    return Recorder() if config.max_output_loss is None else RecentInputs(layers)
