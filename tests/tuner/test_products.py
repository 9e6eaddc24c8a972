"""Products of factors that a layer keeps between calls: never stale, and gone when they should be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg.ops import build, cheapest_route

pytestmark = pytest.mark.usefixtures("float64")

FACTORED = {"freeze_when": "delay", "delay": 0, "update_every": 5, "cutoff": 0.0}


def adapted(**settings):
    """A factored (12, 12) layer, its optimizer and its controller; at full rank and 400 tokens building pays."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 12)),
        OIALRConfig(target_modules=["0"], **{"mode": "replace", **FACTORED, **settings}),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    return model, optimizer, OIALRController(model, optimizer, total_steps=100)


def layer_of(model):
    return model.base_model.model[0]


def expected(model, x):
    layer = layer_of(model)
    return nn.functional.linear(x, layer.adapter_weight("default"), layer.get_base_layer().bias)


def train_step(model, optimizer, controller, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return controller.step()


@pytest.mark.parametrize("settings", [{}, {"rank": 5}, {"rank": 1}], ids=["built", "folded", "chain"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_follow_every_step_of_a_fused_optimizer(mode, settings):
    """Fused optimizers change a parameter without raising its version, so versions alone would not be enough."""
    model, optimizer, controller = adapted(**settings)
    x = torch.randn(400, 12)
    rank = settings.get("rank", 12)
    assert cheapest_route(12, 12, rank, 400) == {12: "built", 5: "folded", 1: "chain"}[rank]
    getattr(model, mode)()
    for _ in range(12):
        with torch.no_grad():
            assert_close(model(x), expected(model, x))
        assert_close(model(x), expected(model, x))
        train_step(model, optimizer, controller, x)


def test_the_weight_is_built_once_per_optimizer_step(monkeypatch):
    model, optimizer, controller = adapted()
    x = torch.randn(400, 12)
    assert cheapest_route(12, 12, 12, 400) == "built"
    built = []
    monkeypatch.setattr("oialr_peft.tuner.layer.build", lambda factors: built.append(1) or build(factors))
    for step in range(1, 4):
        for _ in range(4):  # micro-batches
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        assert len(built) == step


def test_without_a_controller_nothing_is_kept_in_training():
    model, _, _ = adapted()
    layer = layer_of(model)
    layer.controlled.clear()
    x = torch.randn(400, 12)
    model(x)
    model.eval()
    with torch.no_grad():
        model(x)
    assert not layer._products


def test_a_frozen_adapter_keeps_its_folded_product_in_evaluation():
    model, _, _ = adapted(rank=3)
    layer = layer_of(model)
    layer.controlled.clear()
    model.requires_grad_(False).eval()
    x = torch.randn(5, 12)
    assert_close(model(x), expected(model, x))
    assert [kind for kind, *_ in layer._products] == ["folded"]


def change_in_place(model):
    layer_of(model).oialr_sigma["default"].detach().mul_(2)


def load(model):
    state = {key: value * 2 if "sigma" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)


def other_bases(model):
    layer_of(model).oialr_u["default"].mul_(-1)


CHANGES = {
    "in place": change_in_place,
    "bases in place": other_bases,
    "load_state_dict": load,
    "to": lambda model: model.float().double(),
    "set_factors": lambda model: layer_of(model).set_factors("default", layer_of(model).factors("default").cut(2)),
    "set_dense": lambda model: layer_of(model).set_dense("default", torch.randn(12, 12)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_factors_is_noticed_in_evaluation(change):
    model, _, _ = adapted(rank=3)
    model.eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        model(x)
        assert layer_of(model)._products
        change(model)
        assert_close(model(x), expected(model, x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("settings", [{}, {"rank": 5}, {"rank": 1}], ids=["built", "folded", "chain"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_factors_is_noticed_under_autocast(change, settings, mode):
    """There the cast bases are kept as well."""
    model, _, _ = adapted(**settings)
    getattr(model.float(), mode)()
    x = torch.randn(400, 12, dtype=torch.float32)
    for changed in (False, True):
        if changed:
            with torch.no_grad():
                change(model)
            model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        exact = expected(model, x)
        assert_close(output.float(), exact, atol=0.03 * float(exact.detach().abs().max()), rtol=0)


def test_changes_that_versions_do_not_show_are_noticed_at_the_next_change_of_mode():
    model, _, _ = adapted(rank=3)
    model.eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        model(x)
        layer_of(model).oialr_sigma["default"].data.mul_(2)
        model.eval()
        assert_close(model(x), expected(model, x))


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use():
    model, _, _ = adapted()
    x = torch.randn(400, 12)
    with torch.inference_mode():
        model(x)
    assert layer_of(model)._products
    model(x).square().mean().backward()
    assert layer_of(model).oialr_sigma["default"].grad.isfinite().all()


def test_changing_the_mode_frees_the_products():
    model, _, _ = adapted()
    model.eval()
    with torch.no_grad():
        model(torch.randn(5, 12))
    assert layer_of(model)._products
    model.train()
    assert not layer_of(model)._products


def test_copies_and_pickles_start_without_products():
    model, _, _ = adapted()
    model.eval()
    with torch.no_grad():
        model(torch.randn(5, 12))
    assert layer_of(model)._products
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not layer_of(other)._products
    assert layer_of(model)._products


@pytest.mark.parametrize("settings", [{}, {"rank": 3}], ids=["built", "chain"])
def test_autocast_computes_in_its_own_dtype_and_gives_full_precision_gradients(settings):
    model, _, _ = adapted(**settings)
    model.float()
    x = torch.randn(400, 12, dtype=torch.float32)
    reference = expected(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), reference, atol=0.05, rtol=0.05)
    output.float().square().mean().backward()
    gradient = layer_of(model).oialr_sigma["default"].grad
    assert gradient.dtype == torch.float32
    model.zero_grad()
    model(x).square().mean().backward()
    exact = layer_of(model).oialr_sigma["default"].grad
    assert_close(gradient, exact, atol=0.02 * float(exact.abs().max()), rtol=0.05)


def test_gradient_checkpointing_uses_the_same_product(monkeypatch):
    model, _, _ = adapted()
    x = torch.randn(400, 12, requires_grad=True)
    built = []
    monkeypatch.setattr("oialr_peft.tuner.layer.build", lambda factors: built.append(1) or build(factors))
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().mean().backward()
    assert len(built) == 1
