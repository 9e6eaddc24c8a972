"""`RecentInputs`: what layers were given in the training step before a check, so that a check can see what it removes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from oialr_peft.layer import OIALRLinear

POSITIONS = 512  # tokens or output pixels of a layer that are kept, spread over the batch


class RecentInputs:
    """Keeps some inputs of each layer while `recording`: those of the last forward pass in training mode.

    Forward hooks, made once, so that `torch.compile` traces them; outside the steps before a check they do nothing.

    Args:
        layers: to watch.

    Attributes:
        recording: whether the next forward pass is recorded.
        samples: by name of the layer, inputs that give at least `POSITIONS` output positions, if there were as many.
    """

    def __init__(self, layers: Iterable[OIALRLinear]) -> None:
        self.recording = False
        self.samples: dict[str, Tensor] = {}
        self._hooks = [layer.register_forward_pre_hook(self._record) for layer in layers]

    def _record(self, layer: OIALRLinear, arguments: tuple[Any, ...]) -> None:
        if self.recording and layer.training:
            self.samples[layer.name] = layer.form.sample(arguments[0].detach(), POSITIONS)

    def forget(self) -> None:
        """Free what was recorded."""
        self.samples.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
