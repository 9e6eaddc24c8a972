"""`OIALRUpdate`: what one check did, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OIALRUpdate:
    """What one check did.

    Attributes:
        step: optimizer step after which the check ran.
        stability: Stability by module name, for the dense layers that had an earlier basis to compare with.
        frozen: names of the layers factored in this check.
        ranks: rank (before, after) by module name, for the layers that took part in the Σ update.
        trainable: parameters that train after the check; of a masked layer, those of its rank.
        total: parameters of the dense model that this one stands for.
        seconds: duration of the check.

    Examples:
        >>> update = OIALRUpdate(step=40, frozen=["up"], ranks={"up": (10, 6)}, trainable=50, total=200)
        >>> update.trainable_percent
        25.0
    """

    step: int
    stability: dict[str, float] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def trainable_percent(self) -> float:
        """Trainable parameters in percent of the dense model's."""
        return 100 * self.trainable / self.total
