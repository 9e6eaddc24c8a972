"""Optimizer state under a change of basis: gradients are the yardstick, since moments are averages of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from oialr_peft.linalg.moments import (
    OptimizerSlots,
    empty_state,
    moments_of,
    transport_first,
    transport_second,
    transport_state,
)


@pytest.fixture
def bases():
    """p (6, 4) and q (5, 4) with orthonormal columns."""
    generator = torch.Generator().manual_seed(0)
    make = lambda rows: torch.linalg.qr(torch.randn(rows, 4, generator=generator, dtype=torch.float64)).Q  # noqa: E731
    return make(6), make(5)


def random_matrix(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_first_moment_transforms_like_the_gradient(bases):
    p, q = bases
    core = random_matrix(4, 4).requires_grad_()
    full = (p @ core.detach() @ q.T).requires_grad_()
    target = random_matrix(6, 5, seed=2)

    def loss(weight):
        return ((weight - target) ** 3).sum()

    loss(full).backward()
    loss(p @ core @ q.T).backward()
    assert_close(transport_first(full.grad, p, q), core.grad)


def test_a_second_moment_of_uncorrelated_entries_is_exact_in_expectation(bases):
    p, q = bases
    variances = random_matrix(6, 5, seed=3).abs()
    # E[(Pᵀ G Q)²] for independent entries of variance N, entry by entry
    expected = torch.einsum("mi,mn,nj->ij", p**2, variances, q**2)
    assert_close(transport_second(variances, p, q), expected)


def test_second_moments_stay_non_negative(bases):
    p, q = bases
    assert (transport_second(random_matrix(6, 5).abs(), p, q) >= 0).all()


def test_a_rotation_keeps_the_norm_of_a_first_moment_and_the_sum_of_a_second():
    rotation = torch.linalg.qr(random_matrix(5, 5)).Q
    other = torch.linalg.qr(random_matrix(5, 5, seed=4)).Q
    moment = random_matrix(5, 5, seed=5)
    assert_close(transport_first(moment, rotation, other).norm(), moment.norm())
    assert_close(transport_second(moment**2, rotation, other).sum(), (moment**2).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_moments_keep_their_dtype(dtype, bases):
    p, q = bases
    moment = random_matrix(6, 5).to(dtype)
    assert transport_first(moment, p, q).dtype == dtype
    assert transport_second(moment**2, p, q).dtype == dtype


def test_scalars_and_missing_buffers_stay(bases):
    state = {"step": torch.tensor(7.0), "momentum_buffer": None, "count": 3, "exp_avg": random_matrix(6, 5)}
    transported = transport_state(state, torch.Size((6, 5)), *bases)
    assert transported["step"] is state["step"]
    assert transported["momentum_buffer"] is None
    assert transported["count"] == 3
    assert transported["exp_avg"].shape == (4, 4)


@pytest.mark.parametrize(
    "state",
    [
        {"exp_avg": random_matrix(6, 5), "exp_inf": random_matrix(6, 5)},
        {"exp_avg_sq_row": random_matrix(6)},
        {"exp_avg": torch.zeros(6, 5, dtype=torch.uint8)},
        {"exp_avg": nn.Parameter(random_matrix(6, 5))},
    ],
    ids=["infinity norm", "factored", "8 bit", "tensor subclass"],
)
def test_state_without_a_rule_is_not_guessed(state, bases):
    assert transport_state(state, torch.Size((6, 5)), *bases) is None


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_continues_after_a_swap_as_if_it_had_always_trained_the_core(amsgrad):
    """With p and q the identity the transported state must be the old one."""
    old, new = nn.Parameter(random_matrix(4, 4)), nn.Parameter(torch.empty(4, 4, dtype=torch.float64))
    optimizer = torch.optim.Adam([old], amsgrad=amsgrad)
    for seed in range(3):
        old.grad = random_matrix(4, 4, seed=seed)
        optimizer.step()
    before = {key: torch.clone(value) for key, value in optimizer.state[old].items()}
    new.data.copy_(old.data)
    slots = OptimizerSlots(optimizer)
    slots.replace(old, new, slots.state_of(old))
    assert optimizer.param_groups[0]["params"] == [new]
    assert list(optimizer.state) == [new]
    for key, value in before.items():
        assert torch.equal(optimizer.state[new][key], value)


def test_a_parameter_that_the_optimizer_does_not_train_is_left_alone():
    other, foreign = nn.Parameter(torch.zeros(2)), nn.Parameter(random_matrix(6, 5))
    optimizer = torch.optim.SGD([other], lr=0.1)
    slots = OptimizerSlots(optimizer)
    assert slots.state_of(foreign) == {}
    slots.replace(foreign, nn.Parameter(torch.empty(4, 4)), {})
    assert optimizer.param_groups[0]["params"] == [other]
    assert not optimizer.state


def test_a_parameter_before_its_first_step_has_no_state_to_carry():
    old, new = nn.Parameter(random_matrix(6, 5)), nn.Parameter(random_matrix(4, 4))
    optimizer = torch.optim.AdamW([old])
    slots = OptimizerSlots(optimizer)
    assert slots.state_of(old) == {}
    slots.replace(old, new, {})
    assert optimizer.param_groups[0]["params"] == [new]
    assert not optimizer.state


def test_a_parameter_is_replaced_again_and_again_in_its_place():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)
    slots, old = OptimizerSlots(optimizer), parameters[2]
    for step in range(3):
        new = nn.Parameter(torch.ones(2))
        slots.replace(old, new, {"step": step})
        assert old not in slots
        assert slots.state_of(new) == {"step": step}
        assert list(optimizer.state) == [new]
        assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(parameters[1]), id(new)]
        old = new
    slots.replace(old, old, None)
    assert old in slots
    assert slots.state_of(old) == {}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
def test_an_empty_state_to_receive_into_has_the_form_of_the_transported_one(make, bases):
    parameter = nn.Parameter(random_matrix(6, 5))
    optimizer = make([parameter], lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    parameter.grad = random_matrix(6, 5, seed=2)
    optimizer.step()
    state = optimizer.state[parameter]
    transported, empty = transport_state(state, parameter.shape, *bases), empty_state(state, parameter.shape, 4)
    assert list(empty) == list(transported)
    shapes = [[(m.shape, m.dtype) for m in moments_of(found)] for found in (transported, empty)]
    assert shapes[0] == shapes[1]
    assert shapes[0]
    assert empty_state({"unknown": torch.zeros(6, 5)}, parameter.shape, 4) is None
