"""The computation of a factored layer ``y = x Wᵀ + b`` with ``W = U Σ Vᵀ``, by the cheapest of three routes.

Pure functions of tensors: no parameters, no state. Costs in multiply-adds for T tokens, an (m, n) weight and rank r; a
dense layer costs 3Tmn. The last column is paid once per optimizer step, wherever products may be kept that long.

====== ================================== ======================== ========================
route  forward and backward               once                     when it wins
====== ================================== ======================== ========================
chain  ``T (2(m+n)r + 3r²)``              nothing                  small r, or few tokens
folded ``T (2(m+n)r + 2r²)``              ``min(m, n) r²``         T well above min(m, n)
built  ``T 2mn`` + the gradient of Σ      ``mnr + min(m, n) r²``   large r
====== ================================== ======================== ========================

Folded, Σ is multiplied into the smaller of its neighbours: into U, which saves a product in the forward pass, or into
Vᵀ, which saves one in the backward pass. Built, W is; the gradient of Σ then comes from the cheaper side: from the narrow
activations, ``(∂y U)ᵀ (x V)`` for ``T ((m+n)r + r²)``, or from the gradient of W, ``Uᵀ (∂yᵀ x) V`` for
``T mn + mnr + min(m, n) r²``.

Without gradients there is one product less: ``T (m+n) r`` with Σ folded, or ``T mn`` with W.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from oialr_peft.linalg.factors import Factors

Route = Literal["chain", "folded", "built"]

_WORTH_KEEPING = 0.95  # of the chain's cost, for a folded product that takes up memory


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


def folded_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of `folded_linear`, forward and backward, with folding Σ."""
    return tokens * (2 * (m + n) * rank + 2 * rank**2) + min(m, n) * rank**2


def cheapest_route(m: int, n: int, rank: int, tokens: int) -> Route:
    """Which of the three costs least in training; a folded product must save 5 % of the chain to be worth its memory.

    Products are counted as if they were made for these tokens alone, which is a little too much when several
    micro-batches share them.

    >>> [cheapest_route(768, 768, rank, 8192) for rank in (96, 384, 640)]
    ['chain', 'folded', 'built']
    """
    costs: dict[Route, int] = {
        "chain": chain_cost(m, n, rank, tokens),
        "folded": folded_cost(m, n, rank, tokens),
        "built": built_cost(m, n, rank, tokens),
    }
    if costs["folded"] > _WORTH_KEEPING * costs["chain"]:
        del costs["folded"]
    return min(costs, key=costs.__getitem__)


def route_cost(m: int, n: int, rank: int, tokens: int) -> int:
    """Multiply-adds of the cheapest route."""
    costs = {"chain": chain_cost, "folded": folded_cost, "built": built_cost}
    return costs[cheapest_route(m, n, rank, tokens)](m, n, rank, tokens)


def crossover_rank(m: int, n: int, *, beside_base: bool = False) -> float:
    """The rank below which the chain trains with fewer multiply-adds than a dense layer: ``2(m+n)r + 3r² = 3mn``.

    Args:
        m, n: sizes of the weight.
        beside_base: whether the frozen base weight is computed as well, forward and backward for x: ``… = mn``.

    >>> round(crossover_rank(1000, 1000)), round(crossover_rank(4000, 1000))
    (535, 937)
    """
    budget = m * n if beside_base else 3 * m * n
    return (math.sqrt((m + n) ** 2 + 3 * budget) - (m + n)) / 3


def inference_crossover_rank(m: int, n: int) -> float:
    """The rank below which inference with Σ folded costs less than with a dense weight: ``(m+n) r = mn``.

    >>> inference_crossover_rank(1000, 1000)
    500.0
    """
    return m * n / (m + n)


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


def folded_linear(x: Tensor, factors: Factors, folded: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
    """``y = x Vᵀ' U'ᵀ + b`` with a pair that was folded before, and the gradient of Σ as the chain would give it.

    Only the r-wide ``x V`` is kept for the backward pass.

    Args:
        x: (..., n).
        factors: u (m, r), sigma (r, r), vh (r, n); u and vh frozen.
        folded: (m, r) and (r, n), ``fold(factors)``.
        bias: (m,) or None.

    Returns:
        (..., m). Differentiable once, with respect to x, sigma and bias.

    >>> factors = Factors(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.eye(2))
    >>> folded_linear(torch.tensor([[1.0, 1.0]]), factors, fold(factors))
    tensor([[2., 3.]])
    """
    return _FoldedLinear.apply(x, factors.sigma, *folded, factors.u, factors.vh, bias)


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


def built_weight(factors: Factors, weight: Tensor) -> Tensor:
    """A weight that was built before, with the gradient of Σ as the product ``U Σ Vᵀ`` would give it.

    Args:
        factors: u (m, r), sigma (r, r), vh (r, n); u and vh frozen.
        weight: (m, n), ``build(factors)``.

    Returns:
        (m, n), the same numbers. Differentiable once, with respect to sigma.
    """
    return _BuiltWeight.apply(factors.sigma, weight, factors.u, factors.vh)


def _core_gradient(u: Tensor, of_weight: Tensor, vh: Tensor) -> Tensor:
    """Gradient ``Uᵀ G V`` of Σ for an (m, n) gradient G of W, multiplied in the cheaper order."""
    m, n = of_weight.shape
    return u.mT @ (of_weight @ vh.mT) if m <= n else (u.mT @ of_weight) @ vh.mT


class _BuiltWeight(torch.autograd.Function):
    """See `built_weight`."""

    @staticmethod
    def forward(ctx: Any, sigma: Tensor, weight: Tensor, u: Tensor, vh: Tensor) -> Tensor:
        ctx.save_for_backward(u, vh)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, vh = ctx.saved_tensors
        return _core_gradient(u, grad, vh), None, None, None


class _FoldedLinear(torch.autograd.Function):
    """See `folded_linear`; of the folded pair, one is U or Vᵀ itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, left: Tensor, right: Tensor, u: Tensor, vh: Tensor, bias: Tensor | None
    ) -> Tensor:
        narrow = F.linear(x, vh)
        ctx.into_u = u.shape[0] <= vh.shape[1]
        for_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(
            narrow if ctx.needs_input_grad[1] else None,
            sigma if for_x and ctx.into_u else None,
            u,
            right if for_x else None,
        )
        return F.linear(narrow, left, bias) if ctx.into_u else F.linear(F.linear(narrow, sigma), u, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, sigma, u, right = ctx.saved_tensors
        grad_narrow = grad @ u
        grad_x = grad_sigma = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_narrow @ sigma if ctx.into_u else grad_narrow) @ right
        if ctx.needs_input_grad[1]:
            rank = narrow.shape[-1]
            grad_sigma = grad_narrow.reshape(-1, rank).mT @ narrow.reshape(-1, rank)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[6] else None
        return grad_x, grad_sigma, None, None, None, None, grad_bias


class _BuiltLinear(torch.autograd.Function):
    """See `built_linear`; what is saved for Σ is ``x V`` or x, whichever leads to the cheaper gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, weight: Tensor, u: Tensor, vh: Tensor, bias: Tensor | None
    ) -> Tensor:
        m, n = weight.shape
        tokens = x.numel() // n
        ctx.from_narrow = narrow_cost(m, n, sigma.shape[0], tokens) <= wide_cost(m, n, sigma.shape[0], tokens)
        for_x, for_sigma = ctx.needs_input_grad[:2]
        saved = (F.linear(x, vh) if ctx.from_narrow else x) if for_sigma else None
        ctx.save_for_backward(
            saved,
            weight if for_x else None,
            u if for_sigma else None,
            vh if for_sigma and not ctx.from_narrow else None,
        )
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
            grad_sigma = (rows @ u).mT @ inputs if ctx.from_narrow else _core_gradient(u, rows.mT @ inputs, vh)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[5] else None
        return grad_x, grad_sigma, None, None, None, grad_bias
