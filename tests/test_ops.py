"""The factored forward: equal to the dense product in value and gradient, and sparing with memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from oialr_peft import Factors, factorize
from oialr_peft.ops import factored_linear

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (4, 1, 1), (1, 4, 1)]  # (out, in, rank)


def trained_factors(m: int, n: int, rank: int) -> Factors:
    factors = factorize(torch.randn(m, n), rank=rank)
    return factors._replace(sigma=torch.randn(rank, rank).requires_grad_())


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_dense_product(shape, batch, with_bias):
    m, n, rank = shape
    factors = trained_factors(m, n, rank)
    bias = torch.randn(m).requires_grad_() if with_bias else None
    x = torch.randn(*batch, n).requires_grad_()
    inputs = [x, factors.sigma] + ([bias] if with_bias else [])

    dense = F.linear(x, factors.u @ factors.sigma @ factors.vh, bias)
    output = factored_linear(x, factors, bias)
    assert output.shape == (*batch, m)
    assert_close(output, dense)

    upstream = torch.randn_like(output)
    assert_close(torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(dense, inputs, upstream))


def test_the_gradient_of_sigma_is_the_gradient_of_the_weight_seen_from_the_bases():
    factors = trained_factors(7, 5, 3)
    x, upstream = torch.randn(6, 5), torch.randn(6, 7)
    (gradient,) = torch.autograd.grad(factored_linear(x, factors), factors.sigma, upstream)
    of_weight = upstream.mT @ x
    assert_close(gradient, factors.u.mT @ of_weight @ factors.vh.mT)


def test_autograd_passes_its_numerical_check():
    factors = trained_factors(4, 3, 2)
    x, bias = torch.randn(2, 3).requires_grad_(), torch.randn(4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, sigma, bias: factored_linear(x, factors._replace(sigma=sigma), bias), (x, factors.sigma, bias)
    )


def saved_for_backward(x: Tensor, factors: Factors) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        factored_linear(x, factors, torch.zeros(factors.u.shape[0]))
    return saved


@pytest.mark.parametrize("x_needs_gradient", [False, True])
@pytest.mark.parametrize("batch", [(11,), (2, 11)], ids=str)
def test_only_the_narrow_activation_is_kept_for_the_backward(x_needs_gradient, batch):
    m, n, rank = 9, 7, 2
    factors = trained_factors(m, n, rank)
    x = torch.randn(*batch, n).requires_grad_(x_needs_gradient)
    saved = saved_for_backward(x, factors)
    weights = {tensor.untyped_storage().data_ptr() for tensor in factors}
    activations = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in weights]
    rows = x.numel() // n
    assert [tensor.numel() for tensor in activations] == [rows * rank]
    assert x.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in saved}


def test_nothing_is_kept_when_sigma_is_frozen_too():
    factors = trained_factors(9, 7, 2)
    frozen = factors._replace(sigma=factors.sigma.detach())
    assert saved_for_backward(torch.randn(11, 7), frozen) == []


def test_the_dtype_of_the_inputs_is_the_dtype_of_the_result():
    for dtype in (torch.float32, torch.bfloat16):
        factors = Factors(*(tensor.detach().to(dtype) for tensor in trained_factors(5, 4, 2)))
        assert factored_linear(torch.randn(3, 4, dtype=dtype), factors).dtype == dtype
