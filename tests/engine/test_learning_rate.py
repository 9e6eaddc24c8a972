"""The learning rate of Σ: what it is, that a step has it, and that nobody else sees it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.learning_rate import CEILING, RESTART_LIMIT, norm_scale, restart_scale, scales_entries

pytestmark = pytest.mark.usefixtures("float64")

M, N, RANK = 12, 27, 3  # √(M N) / RANK = 6, to the nearest power of √2: 5.66


def setting(make=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), **settings):
    """A model with one factored layer and one that is not adapted; its optimizer and controller."""
    base = nn.Sequential(nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 2))
    config = {"target_modules": ["0"], "modules_to_save": ["2"], "init_rank": RANK, "freeze_when": "delay", "delay": 0}
    model = get_peft_model(base, OIALRConfig(**{"update_every": 50, **config, **settings}))
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, OIALRController(model, optimizer, total_steps=100)


def backward(model):
    model(torch.randn(8, N)).square().mean().backward()


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 5), (64, 256, 10), (3, 3, 1), (1000, 4, 2)])
def test_the_scale_is_the_ratio_of_norms_to_within_a_fourth_root_of_two(m, n, rank):
    scale = norm_scale(m, n, rank)
    assert 2**-0.25 <= scale / (math.sqrt(m * n) / rank) <= 2**0.25
    assert 2 * math.log2(scale) == round(2 * math.log2(scale))


@pytest.mark.parametrize("fallen", [1.0, 1.2, math.sqrt(2), 2.0, 2.5, 3.3, 3.4, 8.0, 1e200, math.inf])
def test_the_restart_is_the_power_of_the_root_of_two_that_is_nearest_the_square_of_the_fall(fallen):
    scale = restart_scale(fallen)
    exact = min(max(fallen**2 / math.sqrt(2) if fallen < 100 else 8.0, 1.0), RESTART_LIMIT)
    assert 2**-0.25 <= scale / exact <= 2**0.25
    assert 2 * math.log2(scale) == pytest.approx(round(2 * math.log2(scale)))


def test_a_layer_that_is_factored_when_the_rate_has_halved_begins_at_the_ceiling():
    assert restart_scale(2) / 2 == pytest.approx(CEILING)


def trained_until(delay, steps=10, **settings):
    """A controller after these steps of ten, in which the learning rate is .01, and falls in a line from the sixth on."""
    base = nn.Sequential(nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 2))
    config = OIALRConfig(target_modules=["0"], freeze_when="delay", delay=delay, update_every=1, cutoff=0.0, **settings)
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (10 - step) / 5))
    controller = OIALRController(model, optimizer, total_steps=10)
    for _ in range(steps):
        backward(model)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        controller.step()
    return model, optimizer, controller


def rate_of(optimizer, parameter):
    """The learning rate that a parameter has in a step."""
    found = []
    hook = optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.extend(
            group["lr"] for group in optimizer.param_groups if any(p is parameter for p in group["params"])
        )
    )
    optimizer.zero_grad()
    optimizer.step()
    hook.remove()
    (rate,) = found
    return rate


@pytest.mark.parametrize(
    ("delay", "steps", "expected"),
    [
        (1, 1, 1.0),  # nothing has fallen
        (1, 8, 0.4),
        (5, 9, 0.2),
        (6, 6, 0.8),  # by a fifth: 1.25² / √2 is nearest to 1
        (7, 7, 0.6 * 2),  # 1.67² / √2 = 1.96
        (7, 9, 0.2 * 2),
        (8, 8, math.sqrt(2)),  # 2.5² / √2 = 4.4, so 4, but not above the ceiling
        (8, 9, 0.2 * 4),
        (9, 9, math.sqrt(2)),
        (9, 10, 0.0),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_layer_that_is_factored_late_restarts_up_to_a_ceiling(delay, steps, expected, resumed):
    model, optimizer, controller = trained_until(delay, steps)
    if resumed:
        state = controller.state_dict()
        controller = OIALRController(model, optimizer, total_steps=10)
        controller.load_state_dict(state)
    (layer,) = controller.layers.values()
    rate = rate_of(optimizer, layer.trained_parameter("default"))
    assert rate == pytest.approx(0.01 * expected * norm_scale(M, N, M), rel=1e-9)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_ceiling_is_that_of_the_highest_rate(kind):
    _, optimizer, controller = trained_until(9, 9)  # a restart of 8
    (layer,) = controller.layers.values()
    for rate in (0.01 / 16, 0.01 / 8, 0.01 / 4, 0.01, 0.02):
        optimizer.param_groups[0]["lr"] = kind(rate)
        found = float(rate_of(optimizer, layer.trained_parameter("default")))
        expected = min(8 * rate, math.sqrt(2) * max(rate, 0.01))
        assert found == pytest.approx(expected * norm_scale(M, N, M), rel=1e-6)


def test_norm_does_not_restart():
    _, optimizer, controller = trained_until(9, 9, sigma_lr_scale="norm")
    (layer,) = controller.layers.values()
    rate = rate_of(optimizer, layer.trained_parameter("default"))
    assert rate == pytest.approx(0.002 * norm_scale(M, N, M))


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_fall_of_the_learning_rate_is_from_its_highest(kind):
    rates = setting()[2]._sigma_rate
    for rate, fallen in ((0.5, 1.0), (2.0, 1.0), (1.0, 2.0), (0.25, 8.0), (4.0, 1.0), (0.0, math.inf)):
        rates.count_step(kind(rate))
        assert rates.fallen_to(kind(rate)) == fallen
    assert rates.state_dict()["highest_rate"] == 4.0
    assert rates.fallen_to(kind(5.0)) == 1.0  # of a step that is not counted yet


def test_a_first_adam_step_moves_a_weight_as_far_as_the_dense_one():
    model, optimizer, controller = setting(lambda p: torch.optim.Adam(p, lr=0.01))
    (layer,) = controller.layers.values()
    before = layer.get_delta_weight("default").detach().clone()
    backward(model)
    optimizer.step()
    moved = (layer.get_delta_weight("default").detach() - before).norm().item()
    assert moved == pytest.approx(0.01 * norm_scale(M, N, RANK) * RANK, rel=1e-3)
    assert 2**-0.25 <= moved / (0.01 * math.sqrt(M * N)) <= 2**0.25


@pytest.mark.parametrize("scale", ["norm", 1.7])
def test_a_step_equals_one_with_a_group_of_its_own(scale):
    model, optimizer, controller = setting(sigma_lr_scale=scale)
    (sigma,) = (layer.trained_parameter("default") for layer in controller.layers.values())
    others = [p for p in optimizer.param_groups[0]["params"] if p is not sigma]
    factor = norm_scale(M, N, RANK) if scale == "norm" else scale
    twins = {p: nn.Parameter(p.detach().clone()) for p in (sigma, *others)}
    expected = torch.optim.AdamW(
        [
            {"params": [twins[p] for p in others]},
            {"params": [twins[sigma]], "lr": 0.01 * factor, "weight_decay": 0.1 / factor},
        ],
        lr=0.01,
        weight_decay=0.1,
    )
    for _ in range(5):
        backward(model)
        for parameter, twin in twins.items():
            twin.grad = parameter.grad.clone()
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        controller.step()
    for parameter, twin in twins.items():
        torch.testing.assert_close(parameter.detach(), twin.detach(), rtol=1e-12, atol=1e-14)


def test_the_groups_are_the_users_between_steps():
    model, optimizer, controller = setting()
    groups = list(optimizer.param_groups)
    contents = [dict(group, params=list(group["params"])) for group in groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    contents = [{**group, "lr": 0.005, "initial_lr": 0.01} for group in contents]
    for _ in range(3):
        backward(model)
        optimizer.step()
        assert len(optimizer.param_groups) == len(groups)
        for group, same, content in zip(optimizer.param_groups, groups, contents):
            assert group is same
            assert all(p is q for p, q in zip(group["params"], content["params"], strict=True))
            assert {**group, "params": 0} == {**content, "params": 0}
        scheduler.step()
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 1, 2]
    assert controller.steps == 0


def test_a_step_that_raises_leaves_nothing_behind_for_the_next():
    model, optimizer, _ = setting()
    other, same, _ = copy.deepcopy((model, optimizer, None))
    group = optimizer.param_groups[0]
    group["betas"] = None
    backward(model)
    with pytest.raises(TypeError, match="unpack"):
        optimizer.step()
    group["betas"] = (0.9, 0.999)
    optimizer.step()
    assert optimizer.param_groups == [group]
    del other, same


def test_a_second_controller_does_not_scale_again():
    model, optimizer, first = setting(lambda p: torch.optim.Adam(p, lr=0.01))
    second = OIALRController(model, optimizer, total_steps=100)
    (sigma,) = (layer.trained_parameter("default") for layer in second.layers.values())
    before = sigma.detach().clone()
    backward(model)
    optimizer.step()
    assert (sigma.detach() - before).abs().max().item() == pytest.approx(0.01 * norm_scale(M, N, RANK), rel=1e-3)
    assert len(optimizer.param_groups) == 1
    assert first.layers.keys() == second.layers.keys()


def test_accelerates_wrapper_steps_with_it():
    model, optimizer, _ = setting(lambda p: torch.optim.Adam(p, lr=0.01))
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    controller = OIALRController(model, optimizer, total_steps=100)
    (sigma,) = (layer.trained_parameter("default") for layer in controller.layers.values())
    before = sigma.detach().clone()
    backward(model)
    optimizer.step()
    assert (sigma.detach() - before).abs().max().item() == pytest.approx(0.01 * norm_scale(M, N, RANK), rel=1e-3)


def test_dense_layers_keep_their_learning_rate():
    model, optimizer, controller = setting(lambda p: torch.optim.Adam(p, lr=0.01), delay=50)
    (weight,) = (layer.trained_parameter("default") for layer in controller.layers.values())
    assert weight.shape == (M, N)
    before = weight.detach().clone()
    backward(model)
    optimizer.step()
    assert (weight.detach() - before).abs().max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(torch.optim.SGD, False), (torch.optim.Muon, False), (torch.optim.Adam, True), (torch.optim.RMSprop, True)],
)
def test_optimizers_that_scale_entries_need_a_scale(make, expected):
    assert scales_entries(make([nn.Parameter(torch.zeros(2, 2))], lr=0.1)) is expected
