"""What a check finds for a layer, and what other processes expect of it."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

import oialr_peft.engine.check as check_module
from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.check import Check
from oialr_peft.engine.inputs import RecentInputs
from oialr_peft.engine.schedule import Schedule
from oialr_peft.engine.trained_layers import TrainedLayers
from oialr_peft.linalg.moments import OptimizerSlots, is_moment, moments_of


def two_layers(*, dtype=torch.float64, make=torch.optim.AdamW, **settings):
    """A model of two layers, called `0` and `2`, its optimizer, and its layers as checks see them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(140, 150, dtype=dtype), nn.Tanh(), nn.Linear(150, 7, dtype=dtype))
    model = get_peft_model(
        model,
        OIALRConfig(**{"mode": "replace", "target_modules": ["0", "2"], "update_every": 100, **settings}),
        autocast_adapter_dtype=False,
    )
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, TrainedLayers(model, optimizer, "default")


def check_of(trained, optimizer, *, step=1, due=(), bases=None, threshold=None, delay=0):
    schedule = Schedule(10, delay, 1, 1.0, threshold)
    bases = {} if bases is None else bases
    slots = OptimizerSlots(optimizer)
    return Check(
        trained,
        slots,
        schedule=schedule,
        step=step,
        due=due,
        bases=bases,
        processes=None,
        recent=RecentInputs(),
    )


@pytest.mark.parametrize(
    ("storage", "shrink", "dtype", "make"),
    [
        ("full", "physical", torch.float32, torch.optim.AdamW),
        ("bf16", "mask", torch.float32, torch.optim.AdamW),
        ("sketch", "physical", torch.bfloat16, torch.optim.AdamW),
        ("sketch", "mask", torch.float32, torch.optim.Adadelta),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_another_process_found_has_the_expected_form(storage, shrink, dtype, make):
    """Tensors are received into what `expected` makes of a name, a Stability and a rank."""
    settings = {"stability_storage": storage, "shrink": shrink, "cutoff": 0.9}
    model, optimizer, trained = two_layers(dtype=dtype, make=make, **settings)
    x = torch.randn(8, 140, dtype=dtype)
    bases, kinds = {}, set()
    for step in range(1, 6):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        check = check_of(trained, optimizer, step=step, due={"2"}, bases=bases, threshold=0.01, delay=3)
        with torch.no_grad():
            for outcome in check.found(["0", "2"]):
                rank = 0 if outcome.factors is None else outcome.factors.rank
                expected = check.expected(outcome.name, outcome.stability or 0.0, rank, outcome.broken)
                assert form_of(expected) == form_of(outcome)
                kinds.add((rank > 0, outcome.rank_before is not None, outcome.stability is not None))
                if outcome.kept is not None:
                    bases[outcome.name] = outcome.kept
                if outcome.factors is not None:
                    bases.pop(outcome.name, None)
                    trained.put(outcome.name, outcome.factors, outcome.state, check.slots)
    kept = {(False, False, measured) for measured in (False, True)}
    frozen = {(True, due, True) for due in (False, True)}
    assert kinds == kept | frozen | {(True, due, False) for due in (False, True)}


def form_of(outcome):
    """Everything but the values of tensors."""
    tensors = [outcome.kept, *(outcome.factors or ()), *moments_of(outcome.state or {})]
    scalars = {key: value for key, value in (outcome.state or {}).items() if not is_moment(value)}
    return (
        outcome.name,
        outcome.stability,
        [tensor is not None and (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors],
        outcome.state is not None and (list(outcome.state), scalars),
        outcome.rank_before,
    )


def test_finding_changes_neither_layers_nor_optimizer():
    model, optimizer, trained = two_layers(cutoff=0.9)
    model(torch.randn(8, 140, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    states = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    with torch.no_grad():
        outcomes = list(check_of(trained, optimizer, due={"0", "2"}).found(["0", "2"]))
    assert all(outcome.factors is not None and outcome.factors.rank < outcome.rank_before for outcome in outcomes)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for state, kept in zip(optimizer.state.values(), states, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in state.items())


@pytest.mark.parametrize("error", [0.0, 0.03])
def test_a_layer_freezes_when_its_stability_less_two_errors_reaches_the_threshold(monkeypatch, error):
    _, optimizer, trained = two_layers(stability_storage="sketch")
    monkeypatch.setattr(check_module, "stability_error", lambda *of: {(0.95, (3, 4), "sketch"): error}[of])
    check = check_of(trained, optimizer, threshold=0.9)
    found = SimpleNamespace(name="0", shape=(3, 4))
    assert check._freezes(found, 0.95) is (error == 0.0)
    assert check._freezes(found, None) is False


def test_rounding_never_takes_stability_out_of_its_range(monkeypatch):
    _, optimizer, trained = two_layers()
    bases = {}
    with torch.no_grad():
        bases |= {found.name: found.kept for found in check_of(trained, optimizer, delay=5).found(["0", "2"])}
        values = iter([1 + 1e-9, -1 - 1e-9, 0.5, -0.5])
        monkeypatch.setattr(
            check_module, "stability_of_kept", lambda *_: torch.tensor(next(values), dtype=torch.float64)
        )
        check = check_of(trained, optimizer, bases=bases, delay=5)
        found = [outcome.stability for _ in range(2) for outcome in check.found(["0", "2"])]
    assert sorted(found) == [-1.0, -0.5, 0.5, 1.0]


@pytest.mark.parametrize("broken", ["an input", "the state", "the optimizer"])
def test_a_warning_of_a_check_names_the_line_that_called_the_controller(broken):
    make = torch.optim.Adadelta if broken == "the optimizer" else torch.optim.AdamW
    model, optimizer, _ = two_layers(make=make, freeze_when="delay", delay=1, update_every=1, max_output_loss=0.01)
    controller = OIALRController(model, optimizer, total_steps=10)
    model(torch.randn(8, 140, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    if broken == "an input":
        for sample in controller._recent.samples.values():
            sample.fill_(math.inf)
    if broken == "the state":
        for state in optimizer.state.values():
            state["exp_avg"].fill_(math.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller.step()
    assert caught
    assert {warning.filename for warning in caught} == {__file__}
