"""When things happen: which steps are checks, which layers may be factored, which take part in a Σ update.

Pure arithmetic on numbers; what happens then is in `controller.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# α·c·L is a product of decimal fractions: .1 * 3 * 10 is 3.0000000000000004 in binary, and its ceiling must still be 3
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The events of one run of `total_steps` optimizer steps.

    Args:
        total_steps: length of the run, ≥ 1.
        delay: optimizer steps before which no layer is factored, ≥ 0.
        update_every: ν, optimizer steps between two checks, ≥ 1.
        layers_per_update: α in (0, 1], share of the layers added per Σ update, from the last one back.
        threshold: Stability from which a dense layer is factored; `None` factors all of them at `delay`.
    """

    total_steps: int
    delay: int
    update_every: int
    layers_per_update: float
    threshold: float | None

    def is_check(self, step: int) -> bool:
        """Whether there is a check after optimizer step `step` (1, 2, …)."""
        return step > 0 and step % self.update_every == 0

    def next_check(self, step: int) -> int:
        """The first step after `step` with a check."""
        return (step // self.update_every + 1) * self.update_every

    def may_freeze(self, step: int) -> bool:
        """Whether any dense layer may be factored in the check at `step`."""
        return step >= self.delay

    def freezes(self, step: int, stability: float | None) -> bool:
        """Whether a dense layer with this Stability (`None`: no earlier basis) is factored at `step`."""
        if not self.may_freeze(step):
            return False
        if self.threshold is None:
            return True
        return stability is not None and stability >= self.threshold

    def layers_due(self, update: int, layers: int) -> range:
        """Indices of the layers, in module order, that take part in Σ update number `update` (1, 2, …).

        The last ``min(L, ⌈α·c·L⌉)`` of L layers.

        >>> list(Schedule(100, 0, 10, 0.1, None).layers_due(2, 10))
        [8, 9]
        """
        due = min(layers, math.ceil(self.layers_per_update * update * layers - _ROUNDING))
        return range(layers - due, layers)
