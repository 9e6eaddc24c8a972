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
from oialr_peft.engine.learning_rate import norm_scale, scales_entries

pytestmark = pytest.mark.usefixtures("float64")

M, N, RANK = 12, 27, 3  # √(M N) / RANK = 6, to the nearest power of √2: 5.66


def setting(make=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), **settings):
    """A model with one factored layer and one that is not adapted; its optimizer and controller."""
    base = nn.Sequential(nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 2))
    config = {"target_modules": ["0"], "modules_to_save": ["2"], "rank": RANK, "freeze_when": "delay", "delay": 0}
    model = get_peft_model(base, OIALRConfig(**{"mode": "replace", "update_every": 50, **config, **settings}))
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, OIALRController(model, optimizer, total_steps=100)


def backward(model):
    model(torch.randn(8, N)).square().mean().backward()


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 5), (64, 256, 10), (3, 3, 1), (1000, 4, 2)])
def test_the_scale_is_the_ratio_of_norms_to_within_a_fourth_root_of_two(m, n, rank):
    scale = norm_scale(m, n, rank)
    assert 2**-0.25 <= scale / (math.sqrt(m * n) / rank) <= 2**0.25
    assert 2 * math.log2(scale) == round(2 * math.log2(scale))


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
