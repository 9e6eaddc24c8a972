"""`GradientProbes`: the leading directions of every layer's gradient, from one training step, without ever storing it.

Beside each layer runs a zero weight whose own gradient, which autograd computes, is a sketch of the gradient of the layer's
weight. The outputs of the layer stay what they were.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from oialr_peft.linalg.decompositions import SVD, largest_entry, leading_svd, thin_svd
from oialr_peft.linalg.factors import compute_dtype
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.matricization import Matricization


class _Probe(Protocol):
    """Zero weights beside a layer whose gradients say where that of its weight points."""

    zeros: list[Tensor]

    def output(self, x: Tensor, form: Matricization) -> Tensor:
        """What they add to the layer's output: zero."""

    def leading(self, rank: int, name: str) -> SVD:
        """The `rank` leading directions of the gradient, once `zeros` have theirs."""


class _Whole:
    """The gradient itself, of a layer for which a sketch would be no smaller."""

    def __init__(self, form: Matricization, made: dict[str, Any]) -> None:
        self.zeros = [torch.zeros(form.m, form.n, requires_grad=True, **made)]

    def output(self, x: Tensor, form: Matricization) -> Tensor:
        return form.apply(x, self.zeros[0].to(x.dtype))

    def leading(self, rank: int, name: str) -> SVD:
        (gradient,) = _gradients_of(self.zeros)
        return leading_svd(gradient, rank, name)


class _Sketch:
    """``Y = G Ω`` and ``Z = Ψ G`` of the gradient G (m, n), as gradients of Y₀ and Z₀ in ``x Ω Y₀ᵀ + x Z₀ᵀ Ψ``.

    Sizes and reconstruction after Tropp, Yurtsever, Udell & Cevher, *Practical Sketching Algorithms for Low-Rank Matrix
    Approximation*, 2017 (algorithms 4 and 7).

    Args:
        form: the layer as a matrix.
        sizes: s and l, columns of Ω (n, s) and rows of Ψ (l, m).
        seed: of both, equal on all processes.
        made: dtype and device to compute in.
    """

    def __init__(self, form: Matricization, sizes: tuple[int, int], seed: int, made: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(seed)
        columns, rows = sizes
        self._omega_t = torch.randn(columns, form.n, generator=generator).to(**made)
        self._psi_t = torch.randn(form.m, rows, generator=generator).to(**made)
        self.zeros = [
            torch.zeros(form.m, columns, requires_grad=True, **made),
            torch.zeros(rows, form.n, requires_grad=True, **made),
        ]

    def output(self, x: Tensor, form: Matricization) -> Tensor:
        y, z = (zeros.to(x.dtype) for zeros in self.zeros)
        return form.mix(form.apply(x, self._omega_t.to(x.dtype)), y) + form.mix(
            form.apply(x, z), self._psi_t.to(x.dtype)
        )

    def leading(self, rank: int, name: str) -> SVD:
        y, z = _gradients_of(self.zeros)
        held = torch.linalg.qr(y).Q
        left, triangle = torch.linalg.qr(self._psi_t.mT @ held)
        u, s, vh = thin_svd(torch.linalg.solve_triangular(triangle, left.mT @ z, upper=True), name)
        return SVD(held @ u, s, vh).cut(rank)


class GradientProbes:
    """Watches the gradients of some layers until it is closed.

    Forward hooks: torch.compile traces them, autocast, gradient accumulation and checkpointing treat the probes as they do
    any weight. Nothing is registered with the layers, so optimizers and engines see no new parameters.

    Args:
        layers: to watch, factored, each at the rank that is wanted of its gradient.
        adapter_name: the adapter that says so.

    Attributes:
        recording: whether passes through the layers are watched.
    """

    def __init__(self, layers: Iterable[OIALRLinear], adapter_name: str) -> None:
        self.recording = True
        self._ranks: dict[str, int] = {}
        self._probes: dict[str, _Probe] = {}
        self._hooks = []
        for layer in layers:
            self._ranks[layer.name] = layer.rank(adapter_name)
            self._probes[layer.name] = _probe_of(layer, adapter_name)
            self._hooks.append(layer.register_forward_hook(self._watch))

    def _watch(self, layer: OIALRLinear, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.recording or layer.disable_adapters or not torch.is_grad_enabled():
            return None
        return output + self._probes[layer.name].output(arguments[0], layer.form).to(output.dtype)

    def sketches(self, names: Iterable[str]) -> list[Tensor]:
        """What was recorded of these layers, for the processes to add up: a change of these tensors counts."""
        return [sketch for name in names for sketch in _gradients_of(self._probes[name].zeros)]

    def usable(self) -> set[str]:
        """The layers whose gradient is finite and not zero; waits for the device once."""
        named = [(name, sketch) for name, probe in self._probes.items() for sketch in _gradients_of(probe.zeros)]
        sizes = torch.stack([largest_entry(sketch).double() for _, sketch in named]).tolist()
        return set(self._probes) - {
            name for (name, _), size in zip(named, sizes, strict=True) if not 0 < size < math.inf
        }

    def leading(self, name: str) -> SVD:
        """The leading directions of a usable gradient."""
        return self._probes[name].leading(self._ranks[name], name)

    def forget(self) -> None:
        """Start again, after a step that did not count."""
        for probe in self._probes.values():
            for zeros in probe.zeros:
                zeros.grad = None

    def close(self) -> None:
        """Remove the hooks, and free what was recorded."""
        self.recording = False
        self._probes.clear()
        for hook in self._hooks:
            hook.remove()


def _gradients_of(zeros: list[Tensor]) -> list[Tensor]:
    """Gradients of leaves; zero where no pass reached one."""
    for leaf in zeros:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    return [leaf.grad for leaf in zeros if leaf.grad is not None]


def _probe_of(layer: OIALRLinear, adapter_name: str) -> _Probe:
    form, rank, trained = layer.form, layer.rank(adapter_name), layer.trained_parameter(adapter_name)
    made = {"dtype": compute_dtype(trained), "device": trained.device}
    columns, rows = 2 * rank + 1, 4 * rank + 3
    if columns * form.m + rows * form.n >= form.m * form.n:
        return _Whole(form, made)
    return _Sketch(form, (columns, rows), zlib.crc32(layer.name.encode()), made)
