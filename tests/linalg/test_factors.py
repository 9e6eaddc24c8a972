"""Linear algebra on plain tensors: shapes, dtypes, extreme values, and decompositions that fail."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from oialr_peft import Factors, factorize, polar_factor, rediagonalize, stability, truncate
from oialr_peft.linalg.factors import (
    compute_dtype,
    count_needed,
    factorize_all,
    first_not_finite,
    rank_to_keep,
    rotate,
    rotation_of,
)

SHAPES = [(7, 3), (3, 7), (5, 5), (1, 6), (6, 1), (1, 1)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# rounding of one entry near 1, a few times over
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

pytestmark = pytest.mark.usefixtures("float64")


def rank_deficient(m: int, n: int, rank: int) -> Tensor:
    return torch.randn(m, rank) @ torch.randn(rank, n)


def with_singular_values(m: int, n: int, values: Tensor) -> Tensor:
    factors = factorize(torch.randn(m, n))
    return factors.u @ torch.diag(values) @ factors.vh


def trained(factors: Factors) -> Factors:
    """The same bases around a full Σ, as after some optimizer steps."""
    return factors._replace(sigma=torch.randn_like(factors.sigma))


def assert_orthonormal_columns(matrix: Tensor, atol: float = 1e-12) -> None:
    identity = torch.eye(matrix.shape[1], dtype=torch.float64)
    assert_close(matrix.double().mT @ matrix.double(), identity, atol=atol, rtol=0)


def assert_orthonormal_bases(factors: Factors, atol: float = 1e-12) -> None:
    assert_orthonormal_columns(factors.u, atol)
    assert_orthonormal_columns(factors.vh.mT, atol)


def assert_diagonal_and_descending(sigma: Tensor) -> None:
    values = sigma.diagonal()
    assert torch.equal(sigma, torch.diag(values))
    assert bool((values.diff() <= 0).all())
    assert bool((values >= 0).all())


# ---- factorize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_have_the_documented_form_and_give_the_weight_back(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    factors = factorize(weight)
    k = min(shape)
    assert factors.rank == k
    assert (factors.u.shape, factors.sigma.shape, factors.vh.shape) == ((shape[0], k), (k, k), (k, shape[1]))
    assert {tensor.dtype for tensor in factors} == {dtype}
    assert all(tensor.is_contiguous() for tensor in factors)
    assert_diagonal_and_descending(factors.sigma)
    assert_orthonormal_bases(factors, TOLERANCE[dtype])
    assert factors.weight().dtype == dtype
    assert_close(factors.weight(), weight, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_weights_are_decomposed_in_float32(dtype):
    weight = torch.randn(9, 6).to(dtype)
    narrow, exact = factorize(weight), factorize(weight.float())
    for mine, reference in zip(narrow, exact):
        assert torch.equal(mine, reference.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_dtype_is_at_least_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert compute_dtype(torch.empty(1, dtype=dtype)) == expected


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)], ids=str)
def test_dropping_directions_costs_exactly_their_singular_values(shape):
    weight = torch.randn(shape)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape) + 1):
        factors = factorize(weight, rank=rank)
        assert factors.rank == rank
        assert_orthonormal_bases(factors)
        assert_close(torch.linalg.norm(weight - factors.weight()), torch.linalg.norm(values[rank:]))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_deficient_weights_get_full_orthonormal_bases(shape, rank):
    weight = rank_deficient(*shape, rank)
    factors = factorize(weight)
    assert_orthonormal_bases(factors)
    assert_close(factors.weight(), weight)
    assert int((factors.sigma.diagonal() > 1e-10).sum()) == rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_weight_has_orthonormal_bases_and_zero_sigma(shape, dtype):
    factors = factorize(torch.zeros(shape, dtype=dtype))
    assert not factors.sigma.any()
    assert_orthonormal_bases(factors, TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_the_memory_layout_of_a_weight_does_not_matter(layout):
    weight = {
        "transposed": torch.randn(4, 6).mT,
        "strided": torch.randn(12, 8)[::2, ::2],
        "expanded": torch.randn(6, 1).expand(6, 4),
    }[layout]
    assert not weight.is_contiguous()
    before = weight.clone()
    assert_close(factorize(weight).weight(), before)
    assert_close(polar_factor(weight), polar_factor(before))
    assert torch.equal(weight, before)


def test_the_weight_of_narrow_factors_is_multiplied_in_float32():
    factors = Factors(*(tensor.to(torch.bfloat16) for tensor in factorize(torch.randn(8, 6))))
    exact = factors.u.float() @ factors.sigma.float() @ factors.vh.float()
    assert torch.equal(factors.weight(), exact.to(torch.bfloat16))


@pytest.mark.parametrize("rank", [0, -1, 4])
def test_a_rank_outside_the_matrix_is_refused(rank):
    with pytest.raises(
        ValueError, match=rf"`rank` must be between 1 and .* = 3 for `weight` .* but is {rank}\. Choose"
    ):
        factorize(torch.randn(3, 5), rank=rank)


def test_many_weights_are_factorized_in_their_order_and_in_at_least_float32(monkeypatch):
    weights = [("a", torch.randn(5, 4), 2), ("b", torch.randn(3, 6).bfloat16(), 3), ("c", torch.randn(4, 4).float(), 1)]
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = list(factorize_all(weights))
        assert [factors.rank for factors in found] == [2, 3, 1]
        assert [factors.sigma.dtype for factors in found] == [torch.float64, torch.float32, torch.float32]
        for (_, weight, rank), factors in zip(weights, found, strict=True):
            for ours, alone in zip(factors, factorize(weight.to(factors.u.dtype), rank=rank), strict=True):
                assert torch.equal(ours, alone)
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match="`b` holds NaN or Inf"):
        list(factorize_all([weights[0], ("b", torch.full((2, 2), math.nan), 1)]))
    assert list(factorize_all([])) == []


# ---- input checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [factorize, polar_factor])
def test_nan_and_inf_are_refused_with_the_name_of_the_weight(function, value):
    weight = torch.randn(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"`encoder\.dense` holds NaN or Inf.*lower the learning rate"):
        function(weight, name="encoder.dense")


def test_rediagonalize_refuses_nan_with_the_name_of_the_layer():
    factors = factorize(torch.randn(4, 4))
    broken = factors._replace(sigma=torch.full_like(factors.sigma, math.nan))
    with pytest.raises(ValueError, match=r"`encoder\.dense` holds NaN or Inf"):
        rediagonalize(broken, name="encoder.dense")


@pytest.mark.parametrize(
    ("function", "name"),
    [(factorize, "weight"), (polar_factor, "weight"), (rotation_of, "sigma")],
    ids=["factorize", "polar_factor", "rotation_of"],
)
def test_a_matrix_without_a_name_is_called_by_its_part(function, name):
    with pytest.raises(ValueError, match=f"^`{name}` holds NaN or Inf"):
        function(torch.full((2, 2), math.nan))


def test_rediagonalize_calls_the_core_sigma():
    broken = Factors(torch.eye(2), torch.full((2, 2), math.nan), torch.eye(2))
    with pytest.raises(ValueError, match="^`sigma` holds NaN or Inf"):
        rediagonalize(broken)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_number_of_a_dtype_is_a_singular_value(dtype):
    largest = torch.finfo(dtype).max
    assert factorize(torch.full((1, 1), largest, dtype=dtype)).sigma.item() == largest
    if dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match="largest singular value of `w` is .* too large for torch.float"):
            factorize(torch.full((2, 2), largest, dtype=dtype), name="w")


def test_the_first_tensor_that_is_not_finite_is_named():
    whole, empty = torch.ones(2, 2), torch.empty(0, 3)
    assert first_not_finite({}) is None
    assert first_not_finite({"a": empty}) is None
    assert first_not_finite({"a": whole}) is None
    assert first_not_finite({"a": torch.tensor(math.nan)}) == "a"
    assert first_not_finite({"a": empty, "b": whole, "c": torch.tensor([-math.inf]), "d": whole * math.nan}) == "c"
    assert first_not_finite({"a": whole.bfloat16(), "b": whole.float(), "c": whole * math.inf}) == "c"


def test_truncate_refuses_nan():
    factors = factorize(torch.randn(4, 4))
    with pytest.raises(ValueError, match="`sigma` holds NaN or Inf"):
        truncate(factors._replace(sigma=torch.full_like(factors.sigma, math.nan)), cutoff=0.1)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(0, 3), torch.zeros(2, 2, dtype=torch.int64)],
    ids=["vector", "3-d", "empty", "integer"],
)
@pytest.mark.parametrize("function", [factorize, polar_factor, rotation_of])
def test_what_is_not_a_floating_matrix_is_refused(function, weight):
    with pytest.raises(ValueError, match=r"`w` must be a non-empty floating-point matrix, .* Reshape it"):
        function(weight, name="w")


# ---- polar factor and stability --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_polar_factor_is_u_times_vh(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    basis = polar_factor(weight)
    assert basis.dtype == dtype
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert_close(basis.double(), u @ vh, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_the_polar_factor_is_orthogonal_and_leaves_a_positive_part(shape):
    weight = torch.randn(shape)
    basis = polar_factor(weight)
    thin = basis if shape[0] >= shape[1] else basis.mT
    assert_orthonormal_columns(thin)
    positive = basis.mT @ weight if shape[0] >= shape[1] else weight @ basis.mT
    assert_close(positive, positive.mT)
    assert bool((torch.linalg.eigvalsh(positive) > 0).all())


def test_the_polar_factor_does_not_depend_on_the_scale():
    weight = torch.randn(5, 4)
    assert_close(polar_factor(3.7 * weight), polar_factor(weight))


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zero", "rank one"])
def test_the_polar_factor_of_a_deficient_weight_is_still_orthogonal(value):
    assert_orthonormal_columns(polar_factor(torch.full((4, 3), value)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stability_of_a_basis_with_itself_is_one_and_with_its_negative_minus_one(shape):
    basis = polar_factor(torch.randn(shape))
    assert stability(basis, basis) == pytest.approx(1.0, abs=1e-12)
    assert stability(basis, -basis) == pytest.approx(-1.0, abs=1e-12)
    assert -1.0 <= stability(basis, -basis) <= stability(basis, basis) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stability_stays_between_minus_one_and_one_and_is_symmetric(shape, dtype):
    first, second = (polar_factor(torch.randn(shape).to(dtype)) for _ in range(2))
    assert -1.0 <= stability(first, second) <= 1.0
    assert stability(first, second) == stability(second, first)
    expected = (first.double() * second.double()).sum().item() / min(shape)
    assert stability(first, second) == pytest.approx(max(-1.0, min(1.0, expected)), abs=1e-6)


def test_stability_is_the_mean_cosine_of_the_paired_directions():
    angle = torch.tensor(0.3)
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    assert stability(rotation, torch.eye(2)) == pytest.approx(math.cos(0.3))


def test_stability_is_summed_in_float64():
    first, second = (torch.randn(70, 50, dtype=torch.float32) for _ in range(2))
    assert stability(first / 70, second / 70) == ((first / 70) * (second / 70)).double().sum().item() / 50


def test_the_polar_factor_has_no_negative_zeros():
    basis = polar_factor(torch.diag(torch.tensor([2.0, -5.0])))
    assert basis.signbit().tolist() == [[False, False], [False, True]]


def test_stability_of_bases_of_different_weights_is_refused():
    with pytest.raises(ValueError, match=r"`basis` and `previous` must have one shape, but have \(2, 3\) and \(3, 2\)"):
        stability(torch.zeros(2, 3), torch.zeros(3, 2))


# ---- rediagonalize, rotate, truncate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rediagonalize_keeps_the_weight(shape):
    factors = trained(factorize(torch.randn(shape)))
    rotated = rediagonalize(factors)
    assert_close(rotated.weight(), factors.weight())
    assert_orthonormal_bases(rotated)
    assert_diagonal_and_descending(rotated.sigma)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rediagonalize_returns_the_dtype_it_was_given(dtype):
    factors = Factors(*(tensor.to(dtype) for tensor in trained(factorize(torch.randn(8, 5)))))
    rotated = rediagonalize(factors)
    assert {tensor.dtype for tensor in rotated} == {dtype}
    assert all(tensor.is_contiguous() for tensor in rotated)
    assert_close(rotated.weight(), factors.weight(), atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rediagonalize_keeps_wide_bases_when_only_sigma_is_narrow():
    factors = trained(factorize(torch.randn(6, 4)))
    rotated = rediagonalize(factors._replace(sigma=factors.sigma.to(torch.bfloat16)))
    assert [tensor.dtype for tensor in rotated] == [torch.float64, torch.bfloat16, torch.float64]
    assert_orthonormal_bases(rotated, atol=1e-5)  # Σ is decomposed in float32


def test_rediagonalize_survives_a_zero_sigma():
    factors = factorize(torch.randn(5, 4))
    rotated = rediagonalize(factors._replace(sigma=torch.zeros_like(factors.sigma)))
    assert not rotated.sigma.any()
    assert_orthonormal_bases(rotated)


def test_a_rotation_rebuilds_the_core():
    sigma = torch.randn(5, 5)
    rotation = rotation_of(sigma)
    assert_close(rotation.p @ torch.diag(rotation.singular_values) @ rotation.q.mT, sigma)
    assert_orthonormal_columns(rotation.p)
    assert_orthonormal_columns(rotation.q)


def test_a_cut_rotation_truncates_in_the_same_step():
    factors = trained(factorize(torch.randn(6, 5)))
    rotation = rotation_of(factors.sigma)
    cut = rotate(factors, rotation.cut(3))
    whole = rotate(factors, rotation)
    assert cut.rank == 3
    assert_close(cut, Factors(whole.u[:, :3], whole.sigma[:3, :3], whole.vh[:3]))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_the_truncation_error_is_the_norm_of_the_dropped_singular_values(shape):
    factors = rediagonalize(trained(factorize(torch.randn(shape))))
    values = factors.sigma.diagonal()
    for cutoff in (0.0, 0.2, 0.5, 0.99):
        cut = truncate(factors, cutoff=cutoff, max_rank_drop=1.0)
        assert cut.rank == int((values >= cutoff * values[0]).sum())
        assert_close(torch.linalg.norm(factors.weight() - cut.weight()), torch.linalg.norm(values[cut.rank :]))
        assert_orthonormal_bases(cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncate_returns_the_dtype_it_was_given(dtype):
    factors = factorize(with_singular_values(6, 4, torch.tensor([8.0, 4.0, 0.25, 0.125])).to(dtype))
    cut = truncate(factors, cutoff=0.1)
    assert cut.rank == 2
    assert {tensor.dtype for tensor in cut} == {dtype}


def test_a_zero_core_keeps_every_direction():
    factors = factorize(torch.randn(6, 4))
    zero = factors._replace(sigma=torch.zeros_like(factors.sigma))
    assert truncate(zero, cutoff=0.5).rank == 4


def test_a_cutoff_of_zero_drops_nothing():
    factors = factorize(rank_deficient(6, 5, 2))
    assert truncate(factors, cutoff=0.0, max_rank_drop=1.0).rank == 5


def test_truncated_factors_own_their_memory():
    factors = factorize(torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.01])))
    cut = truncate(factors, cutoff=0.05)
    assert all(tensor.is_contiguous() for tensor in cut)
    assert sum(tensor.untyped_storage().nbytes() for tensor in cut) < sum(t.untyped_storage().nbytes() for t in factors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutoff": 1.0}, r"`cutoff` must be in \[0, 1\), but is 1\.0"),
        ({"cutoff": -0.1}, r"`cutoff` must be in \[0, 1\), but is -0\.1"),
        ({"cutoff": math.nan}, r"`cutoff` must be in \[0, 1\), but is nan"),
        ({"cutoff": 0.1, "max_rank_drop": 1.5}, r"`max_rank_drop` must be in \[0, 1\], but is 1\.5"),
        ({"cutoff": 0.1, "max_rank_drop": -0.5}, r"`max_rank_drop` must be in \[0, 1\], but is -0\.5"),
        ({"cutoff": 0.1, "min_rank": 0}, r"`min_rank` must be at least 1, but is 0"),
    ],
    ids=["cutoff 1", "cutoff below 0", "cutoff nan", "drop above 1", "drop below 0", "min_rank 0"],
)
def test_truncate_refuses_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        truncate(factorize(torch.randn(4, 4)), **arguments)


@pytest.mark.parametrize("sigma", [torch.ones(2, 2), torch.diag(torch.tensor([1.0, 2.0]))], ids=["full", "ascending"])
def test_truncate_asks_for_a_diagonal_descending_sigma(sigma):
    with pytest.raises(ValueError, match="must be diagonal and descending. Call `rediagonalize` first"):
        truncate(Factors(torch.eye(2), sigma, torch.eye(2)), cutoff=0.1)


# ---- the rank rule ---------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    cutoff=st.floats(0, 1, exclude_max=True),
    max_rank_drop=st.floats(0, 1),
    min_rank=st.integers(1, 40),
)
@example(values=[0.0, 0.0, 0.0], cutoff=0.5, max_rank_drop=1.0, min_rank=1)
@example(values=[1.0], cutoff=0.5, max_rank_drop=1.0, min_rank=40)
@example(values=[1.0] * 10, cutoff=0.0, max_rank_drop=1.0, min_rank=1)
def test_the_rank_kept_follows_the_formula(values, cutoff, max_rank_drop, min_rank):
    values = sorted(values, reverse=True)
    kept = rank_to_keep(
        torch.tensor(values, dtype=torch.float64), cutoff=cutoff, max_rank_drop=max_rank_drop, min_rank=min_rank
    )
    r = len(values)
    above = len([value for value in values if value >= cutoff * values[0]])
    assert kept == min(r, max(above, r - math.floor(max_rank_drop * r), min_rank))
    assert 1 <= kept <= r


def test_by_default_a_rank_is_halved_at_most_and_one_direction_stays():
    values = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert rank_to_keep(values, cutoff=0.5) == 2
    assert rank_to_keep(values[:1], cutoff=0.5) == 1
    assert rank_to_keep(values, cutoff=0.5, max_rank_drop=1.0) == 1
    factors = Factors(torch.eye(4), torch.diag(values), torch.eye(4))
    assert truncate(factors, cutoff=0.5).rank == 2
    assert truncate(factors, cutoff=0.5, max_rank_drop=1.0).rank == 1


@pytest.mark.parametrize(("largest_loss", "needed"), [(0.0, 2), (0.4, 2), (0.5, 1), (0.6, 1)])
def test_what_is_lost_may_be_as_much_as_the_bound(largest_loss, needed):
    assert count_needed(torch.tensor([4.0, 4.0]), torch.tensor(8.0), largest_loss) == needed


@given(
    rank=st.integers(1, 12),
    cutoff=st.floats(0, 1, exclude_max=True),
    max_rank_drop=st.floats(0, 1),
    min_rank=st.integers(1, 12),
    seed=st.integers(0, 10),
)
def test_truncate_keeps_the_rank_of_the_rule(rank, cutoff, max_rank_drop, min_rank, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = factorize(torch.randn(12, rank, generator=generator, dtype=torch.float64))
    rule = {"cutoff": cutoff, "max_rank_drop": max_rank_drop, "min_rank": min_rank}
    assert truncate(factors, **rule).rank == rank_to_keep(factors.sigma.diagonal(), **rule)


# ---- extreme scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.float64, 1e-310),
        (torch.float32, 1e37),
        (torch.float32, 1e-30),
        (torch.float32, 1e-40),
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e38),
        (torch.bfloat16, 1e-38),
    ],
    ids=str,
)
def test_huge_and_subnormal_weights_have_exact_bases(shape, dtype, scale):
    weight = (torch.rand(shape) * 2 - 1).mul(scale).to(dtype)
    factors = factorize(weight)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in factors)
    assert_orthonormal_bases(factors, TOLERANCE[dtype])
    # compare at scale 1: the products of such entries leave the range
    u, values, vh = torch.linalg.svd(weight.double() / scale, full_matrices=False)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / scale  # of subnormal numbers
    atol = max(4 * TOLERANCE[dtype], 10 * spacing)
    assert_close(factors.sigma.double().diagonal() / scale, values, atol=atol, rtol=0)
    assert_close(polar_factor(weight).double(), u @ vh, atol=50 * max(TOLERANCE[dtype], spacing), rtol=0)


def test_one_huge_entry_among_small_ones_is_decomposed():
    weight = torch.randn(5, 4)
    weight[0, 0] = 1e200
    factors = factorize(weight)
    assert_orthonormal_bases(factors)
    assert_close(factors.sigma[0, 0].item(), 1e200)


# ---- decompositions that fail ----------------------------------------------------------------------------------------


def refuse(*args, **kwargs):
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_failed_svd_is_retried_with_a_warning_and_the_right_result(monkeypatch, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    expected = polar_factor(weight)
    values = torch.linalg.svdvals(weight.double())
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with pytest.warns(UserWarning, match=r"The SVD of `encoder\.dense` did not converge; retrying"):
        factors = factorize(weight, name="encoder.dense")
    with pytest.warns(UserWarning, match=r"The SVD of `encoder\.dense` did not converge"):
        basis = polar_factor(weight, name="encoder.dense")
    assert {tensor.dtype for tensor in factors} == {dtype}
    assert_orthonormal_bases(factors, TOLERANCE[dtype])
    assert_diagonal_and_descending(factors.sigma)
    # the products of rounded factors err by about r roundings
    assert_close(factors.weight(), weight, atol=6 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_close(factors.sigma.double().diagonal(), values, atol=4 * max(TOLERANCE[dtype], 1e-10), rtol=0)
    assert_close(basis.double(), expected.double(), atol=max(2 * TOLERANCE[dtype], 1e-10), rtol=0)


@pytest.mark.parametrize("values", [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1e-6, 1e-12, 0]], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)], ids=str)
def test_the_retry_gives_orthonormal_bases_for_deficient_weights(monkeypatch, shape, values):
    weight = with_singular_values(*shape, torch.tensor(values, dtype=torch.float64))
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with pytest.warns(UserWarning, match="did not converge"):
        factors = factorize(weight)
    assert_orthonormal_bases(factors)
    assert_close(factors.weight(), weight, atol=1e-7, rtol=0)


def test_the_retry_serves_the_sigma_update(monkeypatch):
    factors = trained(factorize(torch.randn(6, 5)))
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with pytest.warns(UserWarning, match="The SVD of `dense` did not converge"):
        rotated = rediagonalize(factors, name="dense")
    assert_close(rotated.weight(), factors.weight())
    assert_diagonal_and_descending(rotated.sigma)


def test_an_svd_that_returns_nan_is_retried(monkeypatch):
    weight = torch.randn(5, 4)
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: [part * math.nan for part in svd(*a, **k)])
    with pytest.warns(UserWarning, match="did not converge"):
        factors = factorize(weight)
    assert_close(factors.weight(), weight)


def test_an_svd_whose_basis_holds_nan_is_retried(monkeypatch):
    weight = torch.randn(5, 4)
    svd = torch.linalg.svd

    def broken(*args, **kwargs):
        u, values, vh = svd(*args, **kwargs)
        return u * math.nan, values, vh

    monkeypatch.setattr(torch.linalg, "svd", broken)
    with pytest.warns(UserWarning, match="did not converge"):
        factors = factorize(weight)
    assert_close(factors.weight(), weight)


def test_the_error_of_the_second_method_is_not_swallowed(monkeypatch):
    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    for function in (factorize, polar_factor, rotation_of):
        with (
            pytest.warns(UserWarning, match="did not converge"),
            pytest.raises(torch.linalg.LinAlgError, match=r"Neither the SVD of `dense` nor .* Gram") as failure,
        ):
            function(torch.randn(4, 4), name="dense")
        assert "did not converge" in str(failure.value.__cause__)


def test_a_second_method_that_returns_nan_raises(monkeypatch):
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: [part * math.nan for part in eigh(*a, **k)])
    with (
        pytest.warns(UserWarning, match="did not converge"),
        pytest.raises(torch.linalg.LinAlgError, match="encoder.dense"),
    ):
        factorize(torch.randn(4, 4), name="encoder.dense")


def test_other_errors_of_the_svd_are_not_swallowed(monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.linalg, "svd", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        factorize(torch.randn(4, 4))


def test_a_normal_decomposition_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape, dtype in itertools.product(SHAPES, DTYPES):
            factorize(torch.randn(shape).to(dtype))


def test_gradients_are_not_needed_and_the_weight_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(5, 4))
    before = weight.detach().clone()
    with torch.no_grad():
        factors = factorize(weight)
    assert not any(tensor.requires_grad for tensor in factors)
    assert torch.equal(weight, before)


def test_a_thousand_rotations_leave_the_basis_orthonormal():
    factors = factorize(torch.randn(96, 64, dtype=torch.float32), rank=32)
    for _ in range(1000):
        factors = rediagonalize(factors._replace(sigma=factors.sigma + 0.1 * torch.randn(32, 32, dtype=torch.float32)))
    eye = torch.eye(32, dtype=torch.float32)
    assert_close(factors.u.mT @ factors.u, eye, atol=1e-5, rtol=0)
    assert_close(factors.vh @ factors.vh.mT, eye, atol=1e-5, rtol=0)
