"""What is kept of a basis: how exact Stability is against it, what it costs, and what it must not touch."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oialr_peft import polar_factor, stability
from oialr_peft.linalg import basis as basis_module
from oialr_peft.linalg.basis import SKETCH_COLUMNS, is_sketched, kept_of, stability_error, stability_of_kept
from oialr_peft.linalg.decompositions import Decomposition

pytestmark = pytest.mark.usefixtures("float64")

STORAGES = ["full", "cpu", "bf16", "sketch"]
SHAPES = [(12, 8), (8, 12), (10, 10), (1, 6), (6, 1)]
LARGE = [(192, 160), (160, 192), (640, 160), (160, 640), (160, 160)]  # sketched


@pytest.fixture(autouse=True)
def fresh_signs():
    yield
    basis_module._signs.cache_clear()


def nearby_bases(m: int, n: int, distance: float) -> tuple[Tensor, Tensor]:
    weight = torch.randn(m, n)
    return polar_factor(weight), polar_factor(weight + distance * torch.randn(m, n))


def kept(basis: Tensor, storage: str) -> Tensor:
    return kept_of(Decomposition("weight", basis, basis), storage, basis)


def measured(now: Tensor, before: Tensor, storage: str) -> float:
    return stability_of_kept(kept(now, storage), kept(before, storage), now.shape, storage).item()


@pytest.mark.parametrize("storage", ["full", "cpu"])
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_the_whole_basis_gives_the_exact_stability(shape, storage):
    now, before = nearby_bases(*shape, 0.3)
    assert measured(now, before, storage) == pytest.approx(stability(now, before), abs=1e-14)
    assert stability_error(0.5, shape, storage) == 0


@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_a_bfloat16_basis_costs_half_of_float32_and_little_accuracy(shape):
    now, before = nearby_bases(*shape, 0.3)
    assert kept(before, "bf16").dtype == torch.bfloat16
    # two roundings of at most 2⁻⁹ relative per entry, and the entries of both bases have norm √k
    assert measured(now, before, "bf16") == pytest.approx(stability(now, before), abs=2**-8)
    if shape in LARGE:
        assert measured(now, before, "bf16") == pytest.approx(stability(now, before), abs=1e-4)


@pytest.mark.parametrize("storage", ["full", "cpu", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_basis_that_did_not_move_has_stability_one(shape, storage):
    basis = polar_factor(torch.randn(shape))
    exact = 1e-12 if storage != "bf16" else 2**-8
    assert measured(basis, basis, storage) == pytest.approx(1.0, abs=exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_bases_are_kept_whole(shape):
    now, before = nearby_bases(*shape, 0.3)
    assert not is_sketched(shape, "sketch")
    assert kept(before, "sketch").shape == before.shape
    assert measured(now, before, "sketch") == pytest.approx(stability(now, before), abs=1e-14)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_a_sketch_keeps_a_fixed_number_of_columns(shape):
    assert kept(polar_factor(torch.randn(shape)), "sketch").shape == (max(shape), SKETCH_COLUMNS)


def test_the_sketch_of_a_wide_basis_is_that_of_its_transpose():
    basis = polar_factor(torch.randn(160, 400))
    assert torch.equal(kept(basis, "sketch"), kept(basis.T, "sketch"))


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_a_sketch_of_a_basis_that_did_not_move_is_nearly_exact(shape):
    basis = polar_factor(torch.randn(shape))
    # BᵀB = I has no off-diagonal part: Stability 1 is measured without spread
    assert measured(basis, basis, "sketch") == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("distance", [0.02, 0.3, 3.0])
def test_the_spread_of_a_sketch_stays_below_its_stated_error(shape, distance, monkeypatch):
    now, before = nearby_bases(*shape, distance)
    exact = stability(now, before)
    draws = []
    for seed in range(100):
        monkeypatch.setattr(basis_module, "_SKETCH_SEED", seed)
        basis_module._signs.cache_clear()
        draws.append(measured(now, before, "sketch"))
    spread = statistics.stdev(draws)
    # the estimate of a spread from 100 draws is itself off by 7 %
    assert spread <= 1.25 * stability_error(exact, shape, "sketch")
    assert statistics.mean(draws) == pytest.approx(exact, abs=4 * spread / math.sqrt(len(draws)))


def test_a_sketch_is_the_same_in_every_run_and_for_every_seed():
    basis = polar_factor(torch.randn(160, 160))
    torch.manual_seed(1)
    first = kept(basis, "sketch")
    basis_module._signs.cache_clear()
    torch.manual_seed(2)
    assert torch.equal(kept(basis, "sketch"), first)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_global_random_state_is_not_touched(storage):
    basis = polar_factor(torch.randn(160, 160))
    before = torch.get_rng_state()
    measured(basis, basis, storage)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(12, 8), (160, 160)], ids=str)
def test_narrow_bases_are_compared_in_float32(shape, storage, dtype):
    now, before = nearby_bases(*shape, 0.3)
    exact = measured(now, before, storage)
    narrow = measured(now.to(dtype).float(), before.to(dtype).float(), storage)
    assert narrow == pytest.approx(exact, abs=20 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(6, 4), (160, 160)], ids=str)
def test_what_is_kept_does_not_change_with_the_weight(shape, storage):
    basis = polar_factor(torch.randn(shape))
    stored = kept(basis, storage)
    copy = stored.clone()
    basis.zero_()
    assert_close(stored, copy, rtol=0, atol=0)
