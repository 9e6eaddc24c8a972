"""What is kept of a layer's last basis, how Stability follows from it, and how far that may be off.

A full basis costs as much memory as the weight. The alternatives keep less:

========== ======================= ====================================================================================
storage    kept                    Stability
========== ======================= ====================================================================================
``full``   (m, n), float32         exact
``cpu``    (m, n), host memory     exact; costs the transfer
``bf16``   (m, n), bfloat16        rounding of the reference, at most 2⁻⁹ relative per entry and averaged over m·n
``sketch`` (max(m, n), 32)         ``⟨B Z, B' Z⟩ / (k s)`` with s = 32 fixed random ±1 columns Z (k, s): unbiased
========== ======================= ====================================================================================

Up to k = 128 a sketch would save little, so the basis is kept in full there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Size, Tensor

from oialr_peft.linalg.factors import compute_dtype

SKETCH_COLUMNS = 32
SKETCHED_FROM = 128  # smaller k keep the whole basis
_SKETCH_SEED = 0x01A1


class Basis(Protocol):
    """The orthogonal polar factor B (m, n) of a weight, or a way to it, such as `decompositions.Decomposition`."""

    shape: Size

    def basis(self) -> Tensor:
        """B (m, n)."""

    def sketch(self, signs: Tensor) -> Tensor:
        """``B Z`` (m, s), or ``Bᵀ Z`` (n, s) when m < n, for Z (k, s)."""


def is_sketched(shape: Sequence[int], storage: str) -> bool:
    """Whether `storage` keeps a sketch, and not the whole basis, of a weight of this shape."""
    return storage == "sketch" and min(shape) > SKETCHED_FROM


def kept_of(basis: Basis, storage: str, like: Tensor) -> Tensor:
    """What `storage` keeps of a basis, in a tensor of its own.

    Args:
        basis: of a weight (m, n).
        storage: ``"full"``, ``"cpu"``, ``"bf16"`` or ``"sketch"``.
        like: the weight, for dtype and device.
    """
    if is_sketched(basis.shape, storage):
        return basis.sketch(_signs(min(basis.shape), compute_dtype(like), like.device))
    if storage == "bf16":
        return basis.basis().to(torch.bfloat16)
    return basis.basis().cpu() if storage == "cpu" else basis.basis()


def kept_shape(shape: Sequence[int], storage: str) -> tuple[int, int]:
    """The shape of what `kept_of` keeps of a basis of this shape."""
    return (max(shape), SKETCH_COLUMNS) if is_sketched(shape, storage) else (shape[0], shape[1])


def stability_of_kept(now: Tensor, before: Tensor, shape: Sequence[int], storage: str) -> Tensor:
    """Stability between what `kept_of` kept of two bases of one weight of `shape` (m, n): a float64 scalar.

    Nothing waits for the device here. A sketched value may lie slightly outside [-1, 1].
    """
    columns = SKETCH_COLUMNS if is_sketched(shape, storage) else 1
    dtype = compute_dtype(now)
    inner = (now.to(dtype) * before.to(device=now.device, dtype=dtype)).sum(dtype=torch.float64)
    return inner / (min(shape) * columns)


def stability_error(value: float, shape: Sequence[int], storage: str) -> float:
    """An upper bound of the standard deviation of a Stability S measured in `storage`.

    Of a sketch: ``√(2 (1 − S²) / (k s))``. With ``M = Bᵀ B'``, the variance over the random signs is twice the energy
    of M's symmetric off-diagonal part over k² s; M has at most energy k, of which the diagonal holds at least k S².

    >>> round(stability_error(0.98, (768, 768), "sketch"), 4), stability_error(0.98, (768, 768), "full")
    (0.0018, 0.0)
    """
    if not is_sketched(shape, storage):
        return 0.0
    return math.sqrt(2 * max(0.0, 1 - value**2) / (min(shape) * SKETCH_COLUMNS))


@lru_cache(maxsize=32)
def _signs(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a generator of its own: the user's random state is not touched, and every run draws the same columns
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    signs = torch.randint(0, 2, (k, SKETCH_COLUMNS), generator=generator) * 2 - 1
    return signs.to(device=device, dtype=dtype)
