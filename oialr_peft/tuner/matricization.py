"""How the weight of a module is read as a matrix, and what multiplying by such a matrix means.

==================== ======================= ========================================================
module               weight as it is stored  matrix (m, n)
==================== ======================= ========================================================
`nn.Linear`          (out, in)               the same
transformers Conv1D  (in, out)               the transpose
`nn.Conv1d, 2d, 3d`  (out, in, *kernel)      (out, in·kernel): a×b×c×d is read as a×(bcd), as in the paper
==================== ======================= ========================================================

A convolution with ``W = U Σ Vᵀ`` is a convolution with the r filters Vᵀ and two of kernel size 1, Σ and U. At T output
positions it costs what a linear layer of this matrix costs for T tokens, so the table of `ops` holds for it as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from transformers.pytorch_utils import Conv1D

from oialr_peft.linalg.factors import Factors
from oialr_peft.linalg.ops import (
    Route,
    built_linear,
    built_weight,
    chain_cost,
    cheapest_route,
    factored_linear,
    folded_linear,
)

LinearModule = nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d | nn.Conv3d
LINEAR_MODULES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)

CONVOLUTION_SETTINGS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_GRADIENT_OF_INPUT = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}


def matricization_of(module: nn.Module) -> Matricization | None:
    """How the weight of this module is read as a matrix; `None` when it is no linear map that the method knows."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None if module.groups > 1 else Convolution(module)
    if isinstance(module, Conv1D):
        return Transposed(module.nx, module.nf)
    if isinstance(module, nn.Linear):
        return Matricization(module.in_features, module.out_features)
    return None


class Matricization:
    """A weight that is stored as its matrix, and acts on the last dimension: `nn.Linear`.

    Args:
        n, m: sizes of the matrix: inputs, outputs.

    Attributes:
        settings: what the module says of itself that models ask for, such as a stride.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, n: int, m: int) -> None:
        self.m, self.n = m, n

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is stored."""
        return (self.m, self.n)

    def matrix(self, weight: Tensor) -> Tensor:
        """Stored weight → (m, n), a view."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """(m, n) → the layout in which the weight is stored, a view."""
        return matrix

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the module computes with this (q, n) matrix and (q,) bias in the place of its own."""
        return F.linear(x, matrix, bias)

    def mix(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply the channels of `x` at each position by this (q, r) matrix, and add the (q,) bias."""
        return F.linear(x, matrix, bias)

    def rows(self, y: Tensor) -> Tensor:
        """Outputs as (positions, channels)."""
        return y.reshape(-1, y.shape[-1])

    def patches(self, x: Tensor) -> Tensor:
        """What the matrix is multiplied with, as (positions, n)."""
        return x.reshape(-1, self.n)

    def sample(self, x: Tensor, positions: int) -> Tensor:
        """Some of the inputs, spread evenly, that give about this many output positions; a copy."""
        rows = x.reshape(-1, self.n)
        return rows[:: max(1, rows.shape[0] // positions)].clone()

    def route(self, rank: int, x: Tensor) -> Route:
        """The cheapest way to train a factored weight on these inputs."""
        return cheapest_route(self.m, self.n, rank, x.numel() // self.n)

    def chain(self, x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        """The three products one after the other; see `ops.factored_linear`."""
        return factored_linear(x, factors, bias)

    def folded(self, x: Tensor, factors: Factors, pair: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """Two products with the gradient of Σ; see `ops.folded_linear`."""
        return folded_linear(x, factors, pair, bias)

    def built(self, x: Tensor, factors: Factors, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One product with the gradient of Σ; see `ops.built_linear`."""
        return built_linear(x, factors, weight, bias)

    def empty(self, *, bias: bool) -> LinearModule:
        """A module of this kind on the meta device, for its weight to be set."""
        return nn.Linear(self.n, self.m, bias=bias, device="meta")


class Transposed(Matricization):
    """A weight that is stored transposed: transformers' `Conv1D`, which is a linear layer."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is stored."""
        return (self.n, self.m)

    def matrix(self, weight: Tensor) -> Tensor:
        """Stored weight → (m, n), a view."""
        return weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        """(m, n) → the layout in which the weight is stored, a view."""
        return matrix.T

    def empty(self, *, bias: bool) -> LinearModule:
        """A module of this kind on the meta device, for its weight to be set."""
        assert bias, "a Conv1D has a bias"
        with torch.device("meta"):
            return Conv1D(self.m, self.n)


class Convolution(Matricization):
    """A convolution without groups, of any stride, padding, dilation and padding mode.

    Args:
        module: the convolution, of which everything but its weight is kept.
    """

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self._kernel = (module.in_channels, *module.kernel_size)
        super().__init__(torch.Size(self._kernel).numel(), module.out_channels)
        self._class = type(module)
        self.settings = {name: getattr(module, name) for name in CONVOLUTION_SETTINGS}
        self.dimensions = len(module.kernel_size)
        # what the convolution itself cannot pad evenly, or with anything but zeros, is padded before
        self._pads_before = module.padding_mode != "zeros" or module.padding == "same"
        self._pad = module._reversed_padding_repeated_twice
        self._pad_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inside = (0,) * self.dimensions if self._pads_before or isinstance(module.padding, str) else module.padding
        self._arguments = module.stride, inside, module.dilation

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape in which the weight is stored."""
        return (self.m, *self._kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        """Stored weight → (m, n); a view unless its memory is ordered by channels."""
        return weight.reshape(weight.shape[0], -1)

    def stored(self, matrix: Tensor) -> Tensor:
        """(q, n) → (q, in, *kernel)."""
        return matrix.reshape(matrix.shape[0], *self._kernel)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the module computes with this (q, n) matrix and (q,) bias in the place of its own."""
        if self._pads_before:
            x = F.pad(x, self._pad, mode=self._pad_mode)
        return self._convolve(x, self.stored(matrix), bias, *self._arguments)

    def mix(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """A convolution with kernel size 1, as the product of matrices that it is, which libraries compute faster."""
        channels = -1 - self.dimensions
        if x.is_contiguous():
            result = matrix @ x.flatten(channels + 1)
            return (result if bias is None else result + bias[:, None]).unflatten(-1, x.shape[channels + 1 :])
        # of channels-last memory, which the result keeps
        return F.linear(x.movedim(channels, -1), matrix, bias).movedim(-1, channels)

    def rows(self, y: Tensor) -> Tensor:
        """Outputs as (positions, channels)."""
        return y.movedim(-1 - self.dimensions, -1).reshape(-1, y.shape[-1 - self.dimensions])

    def patches(self, x: Tensor) -> Tensor:
        """What the matrix is multiplied with, as (positions, n)."""
        return self.rows(self.apply(x, torch.eye(self.n, dtype=x.dtype, device=x.device)))

    def sample(self, x: Tensor, positions: int) -> Tensor:
        """Some of the images, spread evenly, that give at least this many output positions; a copy."""
        images = x.reshape(-1, *x.shape[-1 - self.dimensions :])
        each = math.prod(x.shape[-self.dimensions :]) // math.prod(self.settings["stride"]) or 1
        wanted = -(-positions // each)
        return images[:: max(1, images.shape[0] // wanted)].clone()

    def route(self, rank: int, x: Tensor) -> Route:
        """The cheapest way to train a factored weight; there are many more positions than make building it matter."""
        return "chain" if chain_cost(self.m, self.n, rank, 1) <= 3 * self.m * self.n else "built"

    def chain(self, x: Tensor, factors: Factors, bias: Tensor | None) -> Tensor:
        """Three convolutions one after the other, two of them with kernel size 1."""
        return self.mix(self.mix(self.apply(x, factors.vh), factors.sigma), factors.u, bias)

    def built(self, x: Tensor, factors: Factors, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One convolution; the gradient of the weight leads to that of Σ."""
        return self.apply(x, built_weight(factors, weight), bias)

    def empty(self, *, bias: bool) -> LinearModule:
        """A module of this kind on the meta device, for its weight to be set."""
        return self._class(bias=bias, device="meta", **self.settings)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        unbatched = x.ndim < weight.ndim
        if trains or unbatched or torch.compiler.is_compiling():
            return _CONVOLVE[self.dimensions](x, weight, bias, *arguments)
        return _FrozenConvolution.apply(x, weight, bias, *arguments)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution with frozen weight that does not keep its input, which PyTorch's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.arguments = x.shape, arguments
        return _CONVOLVE[weight.ndim - 2](x, weight, bias, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        nothing = (None,) * (2 + len(ctx.arguments))
        if weight is None:
            return None, *nothing
        return _GRADIENT_OF_INPUT[weight.ndim - 2](ctx.shape, weight, grad, *ctx.arguments), *nothing
