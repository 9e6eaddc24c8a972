"""The computation of a factored layer ``y = x Wᵀ + b`` with ``W = U Σ Vᵀ``, by the cheaper of two routes.

Pure functions of tensors: no parameters, no state. Costs in multiply-adds for T tokens, an (m, n) weight and rank r:

====== ===================================== ===================================================================
route  forward and backward                  when it wins
====== ===================================== ===================================================================
chain  ``T (2(m+n)r + 3r²)``                 r below about .535 n (square) or .94 n (4:1); a dense layer costs 3Tmn
built  ``T · 2mn`` + the gradient of Σ,      above, because no rank makes it much dearer than a dense layer
       W once: ``mnr + r²·min(m, n)``
====== ===================================== ===================================================================

The built route takes the gradient of Σ from the cheaper side: from the narrow activations, ``(∂y U)ᵀ (x V)`` for
``T ((m+n)r + r²)``, or from the gradient of W, ``Uᵀ (∂yᵀ x) V`` for ``T mn + mnr + r²·min(m, n)``.

Without gradients there is one product less: ``T (m+n) r`` with Σ folded into its smaller neighbour, or ``T mn`` with W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oialr_peft.factors import Factors


def chain_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of `factored_linear`, forward and backward.

    >>> round(chain_cost(768, 768, 192, 1) / (3 * 768 * 768), 3)  # of a dense layer
    0.396
    """
    return tokens * (2 * (m + n) * rank + 3 * rank**2)


def build_cost(m: int, n: int, rank: int) -> int:
    """Multiply-adds of U Σ Vᵀ, multiplied in the cheaper order; also those of Uᵀ G V for an (m, n) G."""
    return m * n * rank + rank**2 * min(m, n)


def narrow_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of Σ's gradient from the r-wide activations."""
    return tokens * ((m + n) * rank + rank**2)


def wide_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of Σ's gradient from the gradient of W."""
    return tokens * m * n + build_cost(m, n, rank)


def built_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of `built_linear`, forward and backward, with building W."""
    gradient = min(narrow_cost(m, n, rank, tokens), wide_cost(m, n, rank, tokens))
    return 2 * tokens * m * n + gradient + build_cost(m, n, rank)


def building_pays(m: int, n: int, rank: int, tokens: int) -> bool:
    """Whether `built_linear` costs less than `factored_linear` in training.

    >>> building_pays(768, 768, 192, 4096), building_pays(768, 768, 768, 4096)
    (False, True)
    """
    return built_cost(m, n, rank, tokens) < chain_cost(m, n, rank, tokens)


def build(factors: Factors) -> Tensor:
    """The dense (m, n) weight, without gradient, multiplied in the cheaper order in the factors' dtype."""
    u, sigma, vh = (factor.detach() for factor in factors)
    return u @ (sigma @ vh) if u.shape[0] > vh.shape[1] else (u @ sigma) @ vh


def fold(factors: Factors) -> tuple[Tensor, Tensor]:
    """(m, r) and (r, n) whose product is the weight: Σ multiplied into the smaller of U and Vᵀ, without gradient."""
    u, sigma, vh = (factor.detach() for factor in factors)
    return (u @ sigma, vh) if u.shape[0] <= vh.shape[1] else (u, sigma @ vh)


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


def built_linear(x: Tensor, factors: Factors, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x Wᵀ + b`` with a weight that was built before, and the gradient of Σ as the chain would give it.

    Args:
        x: (..., n).
        factors: u (m, r), sigma (r, r), vh (r, n); u and vh frozen.
        weight: (m, n), ``build(factors)``.
        bias: (m,) or None.

    Returns:
        (..., m). Differentiable once, with respect to x, sigma and bias.

    >>> factors = Factors(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(2))
    >>> built_linear(torch.tensor([[1.0, 1.0]]), factors, build(factors))
    tensor([[2., 3.]])
    """
    return _BuiltLinear.apply(x, factors.sigma, weight, factors.u, factors.vh, bias)


class _BuiltLinear(torch.autograd.Function):
    """See `built_linear`; what is saved for Σ is ``x V`` or x, whichever leads to the cheaper gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, weight: Tensor, u: Tensor, vh: Tensor, bias: Tensor | None
    ) -> Tensor:
        m, n = weight.shape
        tokens = x.numel() // n
        ctx.from_narrow = narrow_cost(m, n, sigma.shape[0], tokens) <= wide_cost(m, n, sigma.shape[0], tokens)
        saved = None
        if ctx.needs_input_grad[1]:
            saved = F.linear(x, vh) if ctx.from_narrow else x
        ctx.save_for_backward(saved, weight, u, vh)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, u, vh = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        grad_sigma = None
        if ctx.needs_input_grad[1]:
            inputs = saved.reshape(-1, saved.shape[-1])
            if ctx.from_narrow:
                grad_sigma = (rows @ u).mT @ inputs
            else:
                of_weight = rows.mT @ inputs
                m, n = of_weight.shape
                grad_sigma = u.mT @ (of_weight @ vh.mT) if m <= n else (u.mT @ of_weight) @ vh.mT
        grad_bias = rows.sum(0) if ctx.needs_input_grad[5] else None
        return grad_x, grad_sigma, None, None, None, grad_bias
