"""The outlook of a basis: free of scale, and what makes layers freeze one by one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from oialr_peft import OIALRConfig, OIALRController, polar_factor, stability
from oialr_peft.engine.movement import Movement, basis_distance

pytestmark = pytest.mark.usefixtures("float64")


def test_the_distance_of_bases_is_that_of_their_matrices():
    a, b = polar_factor(torch.randn(7, 5)), polar_factor(torch.randn(7, 5))
    assert basis_distance(stability(a, b)) == pytest.approx(float((a - b).norm()) / math.sqrt(5))
    assert basis_distance(1.0 + 1e-12) == 0.0


def outlooks(checks: int, interval: int, rate: float, moved_per_rate: float) -> list[float]:
    """Of a basis that moves in proportion to a learning rate that falls in a line to zero."""
    movement, found, steps = Movement(), [], checks * interval
    for check in range(1, checks + 1):
        spent = 0.0
        for step in range((check - 1) * interval, check * interval):
            now = rate * (1 - step / steps)
            movement.count_step(now)
            spent += now
        s = 1 - (moved_per_rate * spent) ** 2 / 2
        found.append(movement.outlook("layer", s, movement.intervals_left(steps - check * interval)))
        movement.count_check({"layer": s})
    return found


def test_the_outlook_has_no_scale():
    reference = outlooks(checks=50, interval=10, rate=1e-2, moved_per_rate=1e-2)
    for checks, interval, rate, moved in ((50, 400, 1e-2, 1e-3), (50, 10, 1e-5, 1.0), (500, 10, 1e-2, 1e-3)):
        other = outlooks(checks=checks, interval=interval, rate=rate, moved_per_rate=moved)
        for share in (0.2, 0.5, 0.8):
            here, there = reference[round(share * 50) - 1], other[round(share * checks) - 1]
            assert there == pytest.approx(here, rel=0.1)


def test_the_outlook_is_what_the_basis_then_moves():
    """Where the assumption holds, the ratio of the movement to come to that so far."""
    checks = 200
    for check, outlook in enumerate(outlooks(checks=checks, interval=5, rate=1e-2, moved_per_rate=1e-2), start=1):
        left = 1 - check / checks
        if 0.1 < left < 0.9:
            assert outlook == pytest.approx(left**2 / (1 - left**2), rel=0.1)


def test_nothing_is_expected_where_nothing_moves():
    movement = Movement()
    assert movement.outlook("layer", 0.5, movement.intervals_left(100)) == 0.0  # no learning rate was spent
    movement.count_step(0.1)
    assert movement.outlook("layer", 1.0, movement.intervals_left(100)) == 0.0


def run(steps: int, **settings):
    """A training with a learning rate that falls in a line to zero, and its controller."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))
    model = get_peft_model(base, OIALRConfig(freeze_when="settled", delay=0.05, update_every=0.05, **settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    return model, optimizer, scheduler, OIALRController(model, optimizer, total_steps=steps)


def train(parts, steps: int) -> None:
    model, optimizer, scheduler, controller = parts
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 10, generator=generator), torch.randn(64, 4, generator=generator)
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        controller.step()


def frozen_at(controller: OIALRController) -> dict[str, float]:
    """When each layer was factored, as a fraction of the run."""
    total = controller.schedule.total_steps
    return {name: update.step / total for update in controller.history for name in update.frozen}


@pytest.mark.parametrize("steps", [100, 400, 1600])
def test_layers_freeze_within_the_run_whatever_its_length(steps):
    parts = run(steps)
    train(parts, steps)
    times = frozen_at(parts[3])
    assert len(times) == 3
    assert all(0.05 <= time <= 0.5 for time in times.values())


def test_a_larger_ratio_freezes_earlier():
    means = []
    for ratio in (0.2, 1.0, 5.0):
        parts = run(200, settle_ratio=ratio)
        train(parts, 200)
        times = frozen_at(parts[3])
        means.append(sum(times.values()) / len(times))
    assert means[0] > means[1] > means[2]


def test_a_resumed_run_freezes_at_the_same_checks():
    parts = run(200)
    train(parts, 33)
    model, optimizer, scheduler, controller = parts
    resumed = run(200)
    resumed[0].load_state_dict(copy.deepcopy(model.state_dict()))
    resumed[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed[2].load_state_dict(scheduler.state_dict())
    resumed[3].load_state_dict(copy.deepcopy(controller.state_dict()))
    train(parts, 167)
    train(resumed, 167)
    assert [update.frozen for update in resumed[3].history] == [update.frozen for update in controller.history]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))
