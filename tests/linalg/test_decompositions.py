"""The routes of a decomposition against the SVD in float64: what they return, how exactly, and when they hand on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oialr_peft import stability
from oialr_peft.linalg import decompositions as routes
from oialr_peft.linalg.decompositions import (
    SVD,
    Decomposition,
    decompose,
    leading_svd,
    map_concurrently,
    polar_iteration,
    svd_by_polar,
    thin_svd,
)

SHAPES = [(256, 256), (512, 192), (192, 512)]


def with_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    u = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64)).Q
    return ((u * s) @ v.T).float()


def spectra(k: int) -> dict[str, Tensor]:
    return {
        "random": torch.linalg.svdvals(torch.randn(k, k, dtype=torch.float64)),
        "decaying": torch.logspace(0, -4, k, dtype=torch.float64),
        "steep": torch.logspace(0, -6, k, dtype=torch.float64),
        "equal": torch.ones(k, dtype=torch.float64),
    }


def exact(matrix: Tensor) -> SVD:
    return SVD(*torch.linalg.svd(matrix.double(), full_matrices=False))


def product(found: SVD) -> Tensor:
    return (found.u * found.s) @ found.vh


def assert_orthonormal(found: SVD, atol: float = 1e-5) -> None:
    eye = torch.eye(len(found.s), dtype=found.u.dtype)
    assert_close(found.u.mT @ found.u, eye, atol=atol, rtol=0)
    assert_close(found.vh @ found.vh.mT, eye, atol=atol, rtol=0)


# ---- the polar iteration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "decaying", "steep", "equal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stability_of_the_polar_iteration_is_that_of_the_svd(shape, kind):
    weight = with_spectrum(*shape, spectra(min(shape))[kind])
    moved = weight + 0.3 * weight.std() * torch.randn_like(weight)
    bases = [polar_iteration(matrix)[0] for matrix in (weight, moved)]
    references = [found.u @ found.vh for found in map(exact, (weight, moved))]
    assert stability(*bases) == pytest.approx(stability(*references), abs=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_polar_iteration_is_orthogonal_at_every_scale(shape, scale):
    basis, deviation = polar_iteration(torch.randn(shape) * scale)
    tall = basis if shape[0] >= shape[1] else basis.mT
    assert_close(tall.mT @ tall, torch.eye(min(shape)), atol=1e-5, rtol=0)
    assert deviation <= 1e-5


def test_the_polar_iteration_is_exact_in_float64():
    weight = torch.randn(96, 64, dtype=torch.float64)
    found = exact(weight)
    assert_close(polar_iteration(weight)[0], found.u @ found.vh, atol=1e-13, rtol=0)


def test_a_batch_gives_what_each_matrix_gives():
    weights = torch.randn(3, 160, 130) * torch.tensor([1.0, 1e-4, 50.0])[:, None, None]
    bases, deviations = polar_iteration(weights)
    for weight, basis, deviation in zip(weights, bases, deviations, strict=True):
        alone, its_deviation = polar_iteration(weight)
        assert_close(basis, alone, atol=1e-5, rtol=0)
        assert max(deviation, its_deviation) < 1e-5


@pytest.mark.parametrize("weight", [torch.zeros(8, 8), torch.ones(8, 8)], ids=["zero", "rank one"])
def test_a_deficient_matrix_is_reported_as_not_orthogonal(weight):
    basis, deviation = polar_iteration(weight)
    assert torch.isfinite(basis).all()
    assert deviation > 0.1


def test_the_polar_iteration_leaves_the_users_precision_of_products():
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            polar_iteration(torch.randn(4, 4))
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# ---- SVDs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [thin_svd, svd_by_polar])
@pytest.mark.parametrize("kind", ["random", "decaying", "steep", "equal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_route_returns_the_svd(shape, kind, route):
    weight = with_spectrum(*shape, spectra(min(shape))[kind])
    found = route(weight, "weight")
    assert_orthonormal(found)
    assert torch.equal(found.s, found.s.clamp_min(0).sort(descending=True).values)
    assert_close(found.s.double(), exact(weight).s, atol=1e-5 * float(exact(weight).s[0]), rtol=0)
    assert (product(found) - weight).norm() <= 1e-5 * weight.norm()


@pytest.mark.parametrize("weight", [torch.zeros(160, 150), torch.ones(150, 160)], ids=["zero", "rank one"])
def test_the_polar_route_hands_a_deficient_matrix_to_the_svd(weight):
    found = svd_by_polar(weight, "weight")
    assert_orthonormal(found)
    assert (product(found) - weight).norm() <= 1e-5 * weight.norm()


@pytest.mark.parametrize("kind", ["random", "decaying", "steep"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_leading_directions_lose_no_more_than_the_best_ones(shape, kind):
    weight = with_spectrum(*shape, spectra(min(shape))[kind])
    rank = min(shape) // 4
    found = leading_svd(weight, rank, "weight")
    reference = exact(weight)
    assert_orthonormal(found)
    assert_close(found.s.double(), reference.s[:rank], atol=1e-5 * float(reference.s[0]), rtol=0)
    lost = (weight.double() - product(found).double()).norm()
    assert lost <= (1 + 1e-6) * reference.s[rank:].norm()


@pytest.mark.parametrize(("rank", "via_gram"), [(64, True), (128, True), (129, False), (256, False)])
def test_the_gram_route_serves_up_to_half_of_the_directions(rank, via_gram, monkeypatch):
    used = []
    monkeypatch.setattr(routes, "thin_svd", lambda *args: used.append("svd") or thin_svd(*args))
    leading_svd(torch.randn(256, 256), rank, "weight")
    assert used == ([] if via_gram else ["svd"])


def test_directions_that_the_gram_matrix_cannot_resolve_come_from_the_svd(monkeypatch):
    used = []
    monkeypatch.setattr(routes, "thin_svd", lambda *args: used.append("svd") or thin_svd(*args))
    weight = with_spectrum(256, 256, torch.logspace(0, -6, 256, dtype=torch.float64))
    leading_svd(weight, 128, "weight")  # down to σ = 1e-3 σ_max
    assert used == ["svd"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", pytest.param("decaying", marks=pytest.mark.sentinel)])
def test_subspace_iteration_finds_few_directions_of_a_large_weight(kind, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)  # neither the Gram matrix nor a whole SVD
    monkeypatch.setattr(routes, "thin_svd", None)
    weight = with_spectrum(1536, 1024, spectra(1024)[kind])
    found = leading_svd(weight, 32, "weight")
    reference = torch.linalg.svdvals(weight.double())
    assert_orthonormal(found)
    assert found.s.square().sum() >= 0.995 * reference[:32].square().sum()


def test_subspace_iteration_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    routes._leading_subspace(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_leading_directions_at_extreme_scales(scale):
    weight = torch.randn(256, 256)
    found, reference = leading_svd(weight * scale, 32, "weight"), leading_svd(weight, 32, "weight")
    assert_close(found.s / scale, reference.s, rtol=1e-5, atol=0)
    assert_orthonormal(found)


# ---- many at a time --------------------------------------------------------------------------------------------------


def test_decompose_returns_every_weight_once_in_bounded_groups(monkeypatch):
    monkeypatch.setattr(routes, "WORKSPACE_BYTES", 3 * 4 * 40 * 30 * 4)  # three of the largest
    weights = [(f"{shape}{i}", torch.randn(shape)) for shape in [(40, 30), (30, 40), (5, 7)] for i in range(4)]
    groups = list(decompose(weights))
    assert sorted(found.name for group in groups for found in group) == sorted(name for name, _ in weights)
    assert all(len(group) <= 3 for group in groups if group[0].shape != (5, 7))
    by_name = dict(weights)
    for group in groups:
        assert len({found.shape for found in group}) == 1
        for found in group:
            assert_close(product(found.svd()), by_name[found.name])
            assert_close(found.basis(), thin_svd(by_name[found.name], "").u @ thin_svd(by_name[found.name], "").vh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [routes._by_svd, routes._by_polar])
def test_narrow_weights_are_decomposed_in_float32(batch, dtype):
    weights = [(str(i), torch.randn(24, 16).to(dtype)) for i in range(2)]
    for found, (_, weight) in zip(batch(weights), weights, strict=True):
        assert found.basis().dtype == torch.float32
        assert_orthonormal(found.svd())
        assert_close(product(found.svd()), weight.float())


@pytest.mark.parametrize("shape", [(160, 140), (140, 160)], ids=str)
def test_the_polar_batch_gives_the_same_as_the_svd(shape):
    weights = [(str(i), torch.randn(shape)) for i in range(3)]
    weights.append(("deficient", torch.ones(shape)))
    signs = torch.randn(140, 8)
    for polar, svd in zip(routes._by_polar(weights), routes._by_svd(weights), strict=True):
        assert polar.name == svd.name
        assert_close(polar.basis(), svd.basis(), atol=1e-4, rtol=0)
        assert_close(polar.sketch(signs), svd.sketch(signs), atol=1e-3, rtol=0)
        assert_close(polar.svd().s, svd.svd().s, atol=1e-3, rtol=0)


def test_a_basis_is_a_copy():
    polar = polar_iteration(torch.randn(6, 4))[0]
    basis = Decomposition("weight", torch.randn(6, 4), polar).basis()
    assert basis.data_ptr() != polar.data_ptr()


def test_concurrent_calls_keep_order_threads_and_errors(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    names = set()

    def square(x: int) -> int:
        names.add(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        return x * x

    assert list(map_concurrently(square, list(range(20)))) == [x * x for x in range(20)]
    assert threading.main_thread().name not in names
    assert (counts[-1], set(counts[:-1])) == (4, {1})

    def fail(x: int) -> int:
        raise ValueError(f"item {x}")

    with pytest.raises(ValueError, match="item 0"):
        list(map_concurrently(fail, [0, 1]))
    assert counts[-1] == 4
