"""Steps and ranks as users write them: counts, and shares of all."""

from __future__ import annotations

import math

# fraction·steps is a product of decimal fractions: .1 * 30 is 3.0000000000000004 in binary, and its ceiling must still be 3
_ROUNDING = 1e-9


def steps_of(value: int | float, total_steps: int) -> int:
    """Optimizer steps meant by `value`, as `TrainingArguments` reads them.

    An int is a number of steps; a float in (0, 1) a fraction of `total_steps`, rounded up, at least 1.

    >>> steps_of(100, 1000), steps_of(0.04, 1000), steps_of(0, 1000)
    (100, 40, 0)
    """
    if isinstance(value, float) and 0 < value < 1:
        return max(1, math.ceil(value * total_steps - _ROUNDING))
    return int(value)


def rank_of(value: int | float | None, full_rank: int) -> int:
    """The rank meant by a count or a fraction of k = `full_rank`, rounded up, between 1 and k; `None` means k.

    >>> rank_of(8, 64), rank_of(0.25, 64), rank_of(None, 64), rank_of(100, 64)
    (8, 16, 64, 64)
    """
    if value is None:
        return full_rank
    if isinstance(value, float) and value < 1:
        value = math.ceil(value * full_rank - _ROUNDING)
    return max(1, min(full_rank, int(value)))
