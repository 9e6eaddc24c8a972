"""What is kept of a layer's last basis, and Stability measured against it.

A full basis costs as much memory as the weight. The alternatives keep less:

========== ================= ==========================================================================================
storage    kept              Stability
========== ================= ==========================================================================================
``full``   (m, n), float32   exact
``cpu``    (m, n), host      exact; costs the transfer
``bf16``   (m, n), bfloat16  rounding of the reference: about 2⁻⁹ relative per entry, averaged over m·n entries
``sketch`` (m, 32)           ``⟨B Z, B' Z⟩ / (k s)`` with s = 32 fixed random ±1 columns Z (n, s): unbiased
========== ================= ==========================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from oialr_peft.factors import compute_dtype, stability

SKETCH_COLUMNS = 32
_SKETCH_SEED = 0x01A1


def stored_basis(basis: Tensor, storage: str) -> Tensor:
    """What `storage` keeps of a basis (m, n); detached from the tensor it was made from.

    Args:
        basis: orthogonal polar factor of a weight.
        storage: ``"full"``, ``"cpu"``, ``"bf16"`` or ``"sketch"``.
    """
    if storage == "sketch":
        return basis.to(compute_dtype(basis)) @ _signs(basis)
    if storage == "bf16":
        return basis.to(torch.bfloat16)
    return basis.cpu() if storage == "cpu" else basis


def stability_against(basis: Tensor, kept: Tensor, storage: str) -> float:
    """Stability of `basis` (m, n) against what `stored_basis` kept of an earlier one.

    >>> basis = torch.eye(4)
    >>> stability_against(basis, stored_basis(basis, "sketch"), "sketch")
    1.0
    """
    if storage != "sketch":
        return stability(basis, kept)
    now = stored_basis(basis, storage)
    inner = (now * kept.to(now)).sum(dtype=torch.float64).item()
    return min(1.0, max(-1.0, inner / (min(basis.shape) * SKETCH_COLUMNS)))


def _signs(basis: Tensor) -> Tensor:
    # a generator of its own: the user's random state is not touched, and every run draws the same columns
    generator = torch.Generator().manual_seed(_SKETCH_SEED)
    signs = torch.randint(0, 2, (basis.shape[1], SKETCH_COLUMNS), generator=generator) * 2 - 1
    return signs.to(device=basis.device, dtype=compute_dtype(basis))
