"""What layers are given in the training steps before a check, so that a check can see what it removes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from oialr_peft.tuner.layer import OIALRLinear

POSITIONS = 512  # tokens or output pixels of a layer that are taken of one step, spread over the batch


class RecentInputs:
    """Keeps some inputs of layers: those of the last forward pass before a check.

    Forward hooks, made once, so that `torch.compile` traces them; outside the step before a check they do nothing.

    Args:
        layers: to watch; none where pruning goes by the weight alone.

    Attributes:
        recording: whether the next step is recorded.
        samples: by name of the layer, inputs that give at least `POSITIONS` output positions, if there were as many.
    """

    def __init__(self, layers: Iterable[OIALRLinear] = ()) -> None:
        self.recording = False
        self.samples: dict[str, Tensor] = {}
        self._hooks = [layer.register_forward_pre_hook(self._watch) for layer in layers]

    def _watch(self, layer: OIALRLinear, arguments: tuple[Any, ...]) -> None:
        if self.recording and layer.training:
            self.samples[layer.name] = layer.form.sample(arguments[0].detach(), POSITIONS)

    def forget(self) -> None:
        """Free what was recorded: after a check, and when the step did not count."""
        self.samples.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
