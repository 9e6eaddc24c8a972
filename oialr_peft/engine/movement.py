"""`Movement`: how far the bases of dense layers have moved, and how far they may be expected to move still.

Between two checks the basis of a layer moves by ``d = ‖B − B'‖_F / √k = √(2 (1 − S))``. What it will move until the end of the
run is taken to be d per learning rate spent, times the learning rate that is left, which is taken to fall in a line to zero:

    outlook = d · (lr · steps left / 2) / (sum of lr since the last check) / (sum of all d so far)

A number without a scale: neither the length of the run, nor the distance of checks, nor the learning rate changes what a given
value means.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def basis_distance(stability: float) -> float:
    """Distance √(2 (1 − S)) of two bases, in [0, 2], as a share of their length √k.

    >>> basis_distance(1.0), basis_distance(-1.0)
    (0.0, 2.0)
    """
    return math.sqrt(2 * max(0.0, 1 - stability))


class Movement:
    """What the outlook of each layer follows from.

    Attributes:
        travelled: sum of distances between consecutive bases, by layer.
        spent: sum of learning rates since the last check.
    """

    def __init__(self) -> None:
        self.travelled: dict[str, float] = {}
        self.spent: float | Tensor = 0.0
        self._rate: float | Tensor = 0.0

    def count_step(self, rate: float | Tensor) -> None:
        """Count an optimizer step at this learning rate."""
        self._rate = rate
        self.spent = self.spent + rate

    def intervals_left(self, steps_left: int) -> float:
        """Learning rate that is left over that spent since the last check; 0 when none was. Waits for the device once."""
        spent = float(self.spent)
        return float(self._rate) * steps_left / 2 / spent if spent else 0.0

    def outlook(self, name: str, stability: float, intervals_left: float) -> float:
        """Movement still to be expected of a layer, as a share of what it has moved; 0 when nothing moves."""
        distance = basis_distance(stability)
        return distance * intervals_left / (self.travelled.get(name, 0.0) + distance) if distance else 0.0

    def count_check(self, stability: dict[str, float]) -> None:
        """Add the distances that a check measured, and begin a new interval."""
        for name, value in stability.items():
            self.travelled[name] = self.travelled.get(name, 0.0) + basis_distance(value)
        self.spent = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"travelled": dict(self.travelled), "spent": float(self.spent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.travelled = {name: float(value) for name, value in state["travelled"].items()}
        self.spent = float(state["spent"])
