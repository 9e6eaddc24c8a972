"""What is kept of a basis: how exact Stability is against it, what it costs, and what it must not touch."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from oialr_peft import polar_factor, stability
from oialr_peft.basis import SKETCH_COLUMNS, stability_against, stored_basis

pytestmark = pytest.mark.usefixtures("float64")

STORAGES = ["full", "cpu", "bf16", "sketch"]
SHAPES = [(12, 8), (8, 12), (10, 10), (1, 6), (6, 1)]


def nearby_bases(m: int, n: int, distance: float) -> tuple[Tensor, Tensor]:
    weight = torch.randn(m, n)
    return polar_factor(weight), polar_factor(weight + distance * torch.randn(m, n))


@pytest.mark.parametrize("storage", ["full", "cpu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_whole_basis_gives_the_exact_stability(shape, storage):
    now, before = nearby_bases(*shape, 0.3)
    assert stability_against(now, stored_basis(before, storage), storage) == stability(now, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bfloat16_basis_costs_half_of_float32_and_little_accuracy(shape):
    now, before = nearby_bases(*shape, 0.3)
    kept = stored_basis(before, "bf16")
    assert kept.dtype == torch.bfloat16
    # rounding is at most 2⁻⁹ relative per entry, and the entries of both bases have norm √k
    assert stability_against(now, kept, "bf16") == pytest.approx(stability(now, before), abs=2**-8)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_basis_that_did_not_move_has_a_stability_near_one(shape, storage):
    basis = polar_factor(torch.randn(shape))
    # of a sketch, in rows only the mean of squares of sums is known, with a spread of √(2/s) / √k
    spread = {"sketch": 5 * math.sqrt(2 / SKETCH_COLUMNS / min(shape)), "bf16": 2**-8}.get(storage, 1e-12)
    assert stability_against(basis, stored_basis(basis, storage), storage) == pytest.approx(1.0, abs=spread)


@pytest.mark.parametrize("storage", STORAGES)
def test_stability_lies_between_minus_one_and_one(storage):
    for _ in range(20):
        basis = polar_factor(torch.randn(5, 4))
        for other in (basis, -basis, polar_factor(torch.randn(5, 4))):
            assert -1.0 <= stability_against(other, stored_basis(basis, storage), storage) <= 1.0


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("distance", [0.02, 0.3, 3.0])
def test_a_sketch_is_close_to_the_whole_basis(shape, distance):
    now, before = nearby_bases(*shape, distance)
    sketched = stability_against(now, stored_basis(before, "sketch"), "sketch")
    # one draw: five standard deviations, √(2/s) ‖BᵀB'‖_F / k ≤ √(2/(s k))
    assert sketched == pytest.approx(stability(now, before), abs=5 * math.sqrt(2 / SKETCH_COLUMNS / min(shape)))


def test_a_sketch_is_unbiased_over_its_random_columns(monkeypatch):
    now, before = nearby_bases(12, 8, 0.8)
    draws = []
    for seed in range(400):
        monkeypatch.setitem(stored_basis.__globals__, "_SKETCH_SEED", seed)
        draws.append(stability_against(now, stored_basis(before, "sketch"), "sketch"))
    exact = stability(now, before)
    assert max(draws) < 1  # no draw was clipped, which would bias the mean
    standard_error = statistics.stdev(draws) / math.sqrt(len(draws))
    assert statistics.mean(draws) == pytest.approx(exact, abs=4 * standard_error)


def test_a_sketch_keeps_a_fixed_number_of_columns():
    basis = polar_factor(torch.randn(50, 400))
    assert stored_basis(basis, "sketch").shape == (50, SKETCH_COLUMNS)


def test_a_sketch_is_the_same_in_every_run_and_for_every_seed():
    basis = polar_factor(torch.randn(12, 8))
    torch.manual_seed(1)
    first = stored_basis(basis, "sketch")
    torch.manual_seed(2)
    assert torch.equal(stored_basis(basis, "sketch"), first)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_global_random_state_is_not_touched(storage):
    basis = polar_factor(torch.randn(12, 8))
    before = torch.get_rng_state()
    stability_against(basis, stored_basis(basis, storage), storage)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_narrow_bases_are_compared_in_float32(storage, dtype):
    now, before = nearby_bases(12, 8, 0.3)
    exact = stability_against(now, stored_basis(before, storage), storage)
    narrow = stability_against(now.to(dtype), stored_basis(before.to(dtype), storage), storage)
    assert narrow == pytest.approx(exact, abs=20 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_kept_does_not_change_with_the_weight(storage):
    weight = torch.nn.Parameter(torch.randn(6, 4))
    with torch.no_grad():
        kept = stored_basis(polar_factor(weight), storage)
        copy = kept.clone()
        weight.zero_()
    assert not kept.requires_grad
    assert_close(kept, copy, rtol=0, atol=0)
