"""Optimizer state that follows its parameter through a change of basis and of shape.

When a parameter X (m, n) is replaced by ``X' = Pᵀ X Q`` with orthonormal P (m, r) and Q (n, r):

- a first moment or momentum buffer M, an average of gradients, becomes ``Pᵀ M Q``. Exact, because the gradient itself
  transforms so.
- a second moment N, an average of squared gradients, becomes ``(P∘P)ᵀ N (Q∘Q)``: exact for uncorrelated entries, and
  never negative.
- scalars such as Adam's `step` stay.

Anything else that is shaped like the parameter or a part of it (8-bit blocks, factored moments) has no such rule: the
state of that parameter is reset as a whole, step included, and the caller is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import Size, Tensor, nn
from torch.optim import Optimizer

from oialr_peft.linalg.factors import compute_dtype

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


def transport_first(moment: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``Pᵀ M Q``: moment (m, n), p (m, r), q (n, r) → (r, r), in at least float32, returned in the moment's dtype.

    >>> import torch
    >>> transport_first(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)[:, 1:], torch.eye(2)[:, 1:])
    tensor([[2.]])
    """
    dtype = compute_dtype(moment)
    return (p.mT.to(dtype) @ moment.to(dtype) @ q.to(dtype)).to(moment.dtype).contiguous()


def transport_second(moment: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``(P∘P)ᵀ N (Q∘Q)``: the second moment under the same change of basis; entries stay ≥ 0."""
    return transport_first(moment, p.square(), q.square())


def transport_state(state: Mapping[str, Any], shape: Size, p: Tensor, q: Tensor) -> dict[str, Any] | None:
    """The optimizer state of ``Pᵀ X Q`` from that of X.

    Args:
        state: what the optimizer keeps for X, by name.
        shape: the shape (m, n) of X.
        p, q: (m, r) and (n, r) with orthonormal columns.

    Returns:
        The new state, or `None` when it holds something that no rule covers, and must be reset.
    """
    if not is_transportable(state, shape):
        return None
    rules = {key: transport_first for key in FIRST_MOMENTS} | {key: transport_second for key in SECOND_MOMENTS}
    return {key: rules[key](value, p, q) if is_moment(value) else value for key, value in state.items()}


def is_transportable(state: Mapping[str, Any], shape: Size) -> bool:
    """Whether the rules above cover everything that an optimizer keeps for a parameter of this shape."""
    return all(
        type(value) is Tensor
        and value.shape == shape
        and value.is_floating_point()
        and key in FIRST_MOMENTS | SECOND_MOMENTS
        for key, value in state.items()
        if is_moment(value)
    )


def empty_state(state: Mapping[str, Any], shape: Size, rank: int) -> dict[str, Any] | None:
    """What `transport_state` would return for p (m, rank), q (n, rank), with unset moments: to receive them into."""
    if not is_transportable(state, shape):
        return None
    return {key: value.new_empty(rank, rank) if is_moment(value) else value for key, value in state.items()}


def moments_of(state: Mapping[str, Any]) -> list[Tensor]:
    """The moments in a state, in its order: what changes with the basis."""
    return [value for value in state.values() if is_moment(value)]


def is_moment(value: Any) -> TypeGuard[Tensor]:
    """Whether an entry of an optimizer's state is a tensor with a shape; scalars such as Adam's `step` are not."""
    return isinstance(value, Tensor) and value.ndim > 0


class OptimizerSlots:
    """Where each parameter sits in an optimizer, so that it can be swapped without replacing the optimizer.

    Entries of `param_groups` and `state` are changed in place: learning-rate schedulers and Accelerate's wrapper, which
    hold on to the optimizer and its groups, stay valid.

    Args:
        optimizer: any `torch.optim.Optimizer`, or a wrapper that shows its `param_groups` and `state`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._slots = {
            id(parameter): (group["params"], index)
            for group in optimizer.param_groups
            for index, parameter in enumerate(group["params"])
        }

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._slots

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps for a parameter; nothing before its first step, or when it does not train it."""
        return dict(self.optimizer.state.get(parameter, {})) if parameter in self else {}

    def replace(self, old: nn.Parameter, new: nn.Parameter, state: dict[str, Any] | None) -> None:
        """Put `new` where `old` was, with `state`; `None` leaves it without state, as before its first step.

        A parameter that the optimizer does not train is left alone.
        """
        if old not in self:
            return
        if new is not old:
            parameters, index = self._slots.pop(id(old))
            parameters[index] = new
            self._slots[id(new)] = (parameters, index)
        self.optimizer.state.pop(old, None)
        if state:
            self.optimizer.state[new] = state
