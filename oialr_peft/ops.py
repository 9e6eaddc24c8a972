"""The computation of a factored layer. Pure functions of tensors: no parameters, no state.

Cost per token, in multiply-adds, for an (m, n) weight of rank r, forward and backward together: the chain
``4(m+n)r + 6r²`` against ``6mn`` for a dense layer, so the chain wins below r ≈ .535 n (square) or .94 n (4:1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from oialr_peft.factors import Factors


def factored_linear(x: Tensor, factors: Factors, bias: Tensor | None = None) -> Tensor:
    """``y = x V Σᵀ Uᵀ + b`` without forming the dense weight.

    With `u` and `vh` frozen, autograd keeps only the r-wide ``x V`` for the gradient of Σ, not the n-wide input.

    Args:
        x: (..., n).
        factors: u (m, r), sigma (r, r), vh (r, n).
        bias: (m,) or None.

    Returns:
        (..., m).

    >>> factors = Factors(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(2))
    >>> factored_linear(torch.tensor([[1.0, 1.0]]), factors)
    tensor([[2., 3.]])
    """
    return F.linear(F.linear(F.linear(x, factors.vh), factors.sigma), factors.u, bias)
