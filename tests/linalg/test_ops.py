"""The factored forward: equal to the dense product in value and gradient, and sparing with memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from oialr_peft import Factors, factorize
from oialr_peft.linalg.ops import (
    build,
    build_cost,
    built_cost,
    built_linear,
    chain_cost,
    cheapest_route,
    factored_linear,
    fold,
    folded_cost,
    folded_linear,
    narrow_cost,
    wide_cost,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (4, 1, 1), (1, 4, 1)]  # (out, in, rank)


ROUTES = {
    "chain": factored_linear,
    "folded": lambda x, factors, bias=None: folded_linear(x, factors, fold(factors), bias),
    "built": lambda x, factors, bias=None: built_linear(x, factors, build(factors), bias),
}


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


def saved_for_backward(x: Tensor, factors: Factors, route: str = "chain") -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ROUTES[route](x, factors, torch.zeros(factors.u.shape[0]))
    return saved


@pytest.mark.parametrize("x_needs_gradient", [False, True])
@pytest.mark.parametrize("batch", [(11,), (2, 11)], ids=str)
@pytest.mark.parametrize("route", ["chain", "folded", "built"])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)], ids=str)
def test_only_the_narrow_activation_is_kept_for_the_backward(shape, x_needs_gradient, batch, route):
    (m, n), rank = shape, 2
    factors = trained_factors(m, n, rank)
    x = torch.randn(*batch, n).requires_grad_(x_needs_gradient)
    rows = x.numel() // n
    saved = saved_for_backward(x, factors, route)
    weights = {tensor.untyped_storage().data_ptr() for tensor in factors}
    others = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in weights]
    # products are needed for the gradient of x alone
    products = {"chain": [], "folded": [min(m, n) * rank] if m > n else [], "built": [m * n]}[route]
    products = products if x_needs_gradient else []
    assert sorted(tensor.numel() for tensor in others) == sorted([rows * rank, *products])
    assert x.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in saved}


@pytest.mark.parametrize("route", ROUTES)
def test_no_activation_is_kept_when_sigma_is_frozen_too(route):
    factors = trained_factors(9, 7, 2)
    frozen = factors._replace(sigma=factors.sigma.detach())
    assert saved_for_backward(torch.randn(11, 7), frozen, route) == []
    saved = saved_for_backward(torch.randn(11, 7).requires_grad_(), frozen, route)
    assert not [tensor for tensor in saved if tensor.shape[0] == 11]


def test_the_dtype_of_the_inputs_is_the_dtype_of_the_result():
    for dtype in (torch.float32, torch.bfloat16):
        factors = Factors(*(tensor.detach().to(dtype) for tensor in trained_factors(5, 4, 2)))
        assert factored_linear(torch.randn(3, 4, dtype=dtype), factors).dtype == dtype


# ---- the routes with products that are made once ---------------------------------------------------------------------


@pytest.mark.parametrize("route", ["folded", "built"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (40,)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (9, 8, 8), (8, 9, 7)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_route_equals_the_chain_in_value_and_gradient(shape, batch, with_bias, route):
    m, n, rank = shape
    factors = trained_factors(m, n, rank)
    bias = torch.randn(m).requires_grad_() if with_bias else None
    x = torch.randn(*batch, n).requires_grad_()
    inputs = [x, factors.sigma] + ([bias] if with_bias else [])
    chain = factored_linear(x, factors, bias)
    output = ROUTES[route](x, factors, bias)
    assert_close(output, chain)
    upstream = torch.randn_like(chain)
    assert_close(torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(chain, inputs, upstream))


@pytest.mark.parametrize("route", ["folded", "built"])
@pytest.mark.parametrize("frozen", ["x", "sigma"])
def test_gradients_that_nobody_needs_are_not_computed(route, frozen):
    factors = trained_factors(5, 4, 3)
    x = torch.randn(6, 4).requires_grad_(frozen != "x")
    factors = factors._replace(sigma=factors.sigma.detach().requires_grad_(frozen != "sigma"))
    ROUTES[route](x, factors).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (factors.sigma.grad is None) == (frozen == "sigma")


@pytest.mark.parametrize("shape", [(5, 4, 3), (4, 5, 3), (4, 4, 4)], ids=str)
def test_the_folded_route_passes_autograds_numerical_check(shape):
    m, n, rank = shape
    factors = trained_factors(m, n, rank)
    x, bias = torch.randn(6, n).requires_grad_(), torch.randn(m).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, sigma, bias: ROUTES["folded"](x, factors._replace(sigma=sigma), bias), (x, factors.sigma, bias)
    )


@pytest.mark.parametrize("tokens", [2, 60])
def test_both_sides_of_the_gradient_pass_autograds_numerical_check(tokens):
    m, n, rank = 5, 4, 4
    sides = narrow_cost(m, n, rank, tokens) <= wide_cost(m, n, rank, tokens)
    assert sides == (tokens == 2)
    factors = trained_factors(m, n, rank)
    x, bias = torch.randn(tokens, n).requires_grad_(), torch.randn(m).requires_grad_()

    def output(x: Tensor, sigma: Tensor, bias: Tensor) -> Tensor:
        moved = factors._replace(sigma=sigma)
        return built_linear(x, moved, build(moved), bias)

    assert torch.autograd.gradcheck(output, (x, factors.sigma, bias))


@pytest.mark.parametrize("route", ["folded", "built"])
def test_routes_without_a_second_derivative_refuse_it(route):
    factors = trained_factors(5, 4, 4)
    x = torch.randn(3, 4).requires_grad_()
    output = ROUTES[route](x, factors)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_chain_has_exact_second_derivatives():
    factors = trained_factors(4, 3, 2)
    x = torch.randn(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, sigma: factored_linear(x, factors._replace(sigma=sigma)), (x, factors.sigma)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_building_and_folding_give_the_weight(shape):
    factors = trained_factors(*shape)
    assert_close(build(factors), factors.weight().detach())
    left, right = fold(factors)
    assert_close(left @ right, factors.weight().detach())
    assert left.shape[1] == right.shape[0] == shape[2]


def counted(run) -> int:
    """Multiply-adds that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("tokens", [8, 200])
@pytest.mark.parametrize("shape", [(24, 24, 6), (24, 24, 24), (48, 12, 12), (12, 48, 9)], ids=str)
def test_the_cost_model_is_what_pytorch_counts(shape, tokens):
    m, n, rank = shape
    factors = trained_factors(m, n, rank)
    x = torch.randn(tokens, n).requires_grad_()
    assert counted(lambda: factored_linear(x, factors).sum().backward()) == chain_cost(m, n, rank, tokens)
    assert counted(lambda: build(factors)) == build_cost(m, n, rank)
    for route, cost in (("folded", folded_cost), ("built", built_cost)):
        assert counted(lambda route=route: ROUTES[route](x, factors).sum().backward()) == cost(m, n, rank, tokens)


def routes(m: int, n: int, tokens: int) -> list[tuple[str, float]]:
    """Each route that is taken as the rank grows, with r/k from which it is."""
    taken = [(cheapest_route(m, n, rank, tokens), rank / min(m, n)) for rank in range(1, min(m, n) + 1)]
    return [entry for before, entry in zip([("", 0.0), *taken], taken) if before[0] != entry[0]]


def test_the_route_changes_with_rank_and_tokens():
    # with unlimited tokens the products cost nothing: folded saves 5 % where r² ≥ .05 (4 r + 3 r²), in units of n
    square = routes(768, 768, 1_000_000)
    assert [route for route, _ in square] == ["chain", "folded", "built"]
    assert square[1][1] == pytest.approx(0.2 / 0.85, abs=0.01)
    assert square[2][1] == pytest.approx(0.581, abs=0.005)  # 4 r + 2 r² = 3 in units of n
    assert [route for route, _ in routes(3072, 768, 1_000_000)] == ["chain", "folded"]
    # with few tokens no product pays
    assert [route for route, _ in routes(768, 768, 64)] == ["chain"]
    assert [route for route, _ in routes(4096, 4096, 512)] == ["chain"]


@pytest.mark.parametrize("tokens", [16, 300, 5000, 200_000])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (96, 384)], ids=str)
def test_no_route_costs_much_less_than_the_one_that_is_taken(shape, tokens):
    costs = {"chain": chain_cost, "folded": folded_cost, "built": built_cost}
    for rank in range(1, min(shape) + 1, 7):
        each = {route: cost(*shape, rank, tokens) for route, cost in costs.items()}
        taken = cheapest_route(*shape, rank, tokens)
        assert each[taken] <= min(each.values()) / (0.95 if taken == "chain" else 1)


def test_a_full_rank_layer_costs_little_more_than_a_dense_one():
    n, tokens = 768, 100_000
    assert built_cost(n, n, n, tokens) < 1.02 * 3 * tokens * n * n
