"""bfloat16 and float16: autocast, pure half precision, gradient scaling; Σ updates are computed in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from oialr_peft import Factors, OIALRConfig, OIALRController, factorize, rediagonalize, truncate
from oialr_peft.linalg.ops import build, built_linear, cheapest_route, factored_linear, fold, folded_linear
from oialr_peft.tuner.lookup import adapter_layers

HALF = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # largest relative rounding error
SCHEDULES = {
    "replace": {"delay": 20, "update_every": 10, "stability_threshold": 0.5, "cutoff": 0.1},
    "residual": {"mode": "adapter", "update_every": 10, "cutoff": 0.1},
}
STEPS = 60


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Points of a cloud in 12 dimensions, of which two planes decide the class."""
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


class Run:
    """A loop with Accelerate's optimizer, whose gradient scaler may skip steps."""

    def __init__(
        self,
        schedule: str,
        *,
        model_dtype: torch.dtype = torch.float32,
        autocast_dtype: torch.dtype | None = None,
        scale: float | None = None,
    ) -> None:
        config = OIALRConfig(
            target_modules=["0", "2"], modules_to_save=["4"], **{"mode": "replace", **SCHEDULES[schedule]}
        )
        self.model = get_peft_model(network().to(model_dtype), config, autocast_adapter_dtype=False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        Accelerator(cpu=True)  # its optimizer asks it whether gradients are being accumulated
        self.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        self.optimizer = AcceleratedOptimizer(torch.optim.AdamW(trained, lr=1e-2), scaler=self.scaler)
        self.controller = OIALRController(self.model, self.optimizer, total_steps=STEPS)
        self.model_dtype, self.autocast_dtype = model_dtype, autocast_dtype
        self.skipped: list[bool] = []

    def autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.autocast_dtype)

    def step(self, seed: int) -> float:
        x, labels = batch(seed, self.model_dtype)
        with self.autocast():
            loss = F.cross_entropy(self.model(x).float(), labels)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.controller.step()
        self.skipped.append(self.optimizer.step_was_skipped)
        return loss.item()

    def train(self) -> list[float]:
        return [self.step(seed) for seed in range(STEPS)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("precision", ["autocast bf16", "pure bf16", "autocast fp16 with scaling"])
def test_the_loss_falls_as_in_float32(precision, schedule):
    settings = {
        "autocast bf16": {"autocast_dtype": torch.bfloat16},
        "pure bf16": {"model_dtype": torch.bfloat16},
        "autocast fp16 with scaling": {"autocast_dtype": torch.float16, "scale": 2.0**12},
    }[precision]
    run = Run(schedule, **settings)
    losses, reference = run.train(), Run(schedule).train()
    assert mean(losses[-10:]) < 0.6 * losses[0]
    assert mean(losses[-10:]) == pytest.approx(mean(reference[-10:]), rel=0.1)
    assert {p.dtype for p in run.model.parameters()} == {run.model_dtype}
    layers = adapter_layers(run.model)
    assert all(not layer.is_dense("default") for layer in layers.values())
    assert any(after < before for update in run.controller.history for before, after in update.ranks.values())
    for state in run.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == run.model_dtype
    bound = 4 * UNIT[torch.bfloat16] if run.model_dtype == torch.bfloat16 else 1e-5
    for layer in layers.values():
        u, _, vh = (factor.float() for factor in layer.factors("default"))
        assert_close(u.mT @ u, torch.eye(u.shape[1]), atol=bound, rtol=0)
        assert_close(vh @ vh.mT, torch.eye(u.shape[1]), atol=bound, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_that_the_scaler_skips_advance_nothing(schedule):
    """Scaled by 2⁴⁰ the first gradients overflow in float16; the scale is halved until they do not."""
    run = Run(schedule, autocast_dtype=torch.float16, scale=2.0**40)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step(0)
    assert run.skipped == [True]
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    for seed in range(1, STEPS):
        x, _ = batch(seed, torch.float32)
        run.step(seed)
        with torch.no_grad():
            for layer in adapter_layers(run.model).values():
                inputs = torch.randn(x.shape[0], layer.in_features)
                expected = F.linear(inputs, layer.adapter_weight("default"), layer.base_layer.bias)
                if schedule == "residual":
                    expected = expected + F.linear(inputs, layer.base_layer.weight)
                assert_close(layer(inputs), expected, atol=1e-5, rtol=1e-5)
    assert 10 < sum(run.skipped) < STEPS / 2
    assert run.controller.steps == STEPS - sum(run.skipped)
    assert [update.step for update in run.controller.history] == list(range(10, run.controller.steps + 1, 10))


# ---- Σ updates -------------------------------------------------------------------------------------------------------


def half_factors(m: int, n: int, rank: int, dtype: torch.dtype) -> Factors:
    """Orthonormal bases and a trained core, stored in `dtype`."""
    factors = factorize(torch.randn(m, n), rank=rank)
    sigma = factors.sigma + 0.1 * torch.randn(rank, rank)
    return Factors(*(factor.to(dtype) for factor in factors._replace(sigma=sigma)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_updates_of_half_precision_factors_are_those_of_float32_rounded(dtype):
    factors = half_factors(40, 30, 20, dtype)
    in_float32 = Factors(*(factor.float() for factor in factors))
    updated, exact = rediagonalize(factors), rediagonalize(in_float32)
    for ours, theirs in zip(updated, exact):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))
    assert truncate(updated, cutoff=0.5).rank == truncate(exact, cutoff=0.5).rank < 20


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_bases_in_half_precision_stay_orthonormal_through_many_updates(dtype):
    """They are made orthonormal in float32 each time, so that only the last rounding is left of all errors."""
    factors = half_factors(96, 64, 48, dtype)
    eye, errors = torch.eye(48), []
    for _ in range(200):
        sigma = factors.sigma + 0.02 * factors.sigma[0, 0] * torch.randn(48, 48).to(dtype)
        factors = rediagonalize(factors._replace(sigma=sigma / sigma.float().norm().to(dtype)))
        u, vh = factors.u.float(), factors.vh.float()
        errors.append(max(float((u.mT @ u - eye).abs().max()), float((vh @ vh.mT - eye).abs().max())))
    assert max(errors) < UNIT[dtype]
    assert mean(errors[-50:]) < 1.2 * mean(errors[:50])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_update_in_half_precision_changes_the_weight_by_a_rounding_error(dtype):
    factors = half_factors(96, 64, 48, dtype)
    weight = Factors(*(factor.float() for factor in factors)).weight()
    updated = Factors(*(factor.float() for factor in rediagonalize(factors))).weight()
    assert (updated - weight).norm() < 2 * UNIT[dtype] * weight.norm()


# ---- routes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 32, 32), (32, 48, 32), (40, 40, 36), (64, 64, 24)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_route_is_as_exact_as_the_chain_in_half_precision(dtype, shape):
    m, n, rank = shape
    factors = half_factors(m, n, rank, dtype)
    x, upstream = torch.randn(300, n).to(dtype), torch.randn(300, m).to(dtype)

    def gradients(route: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        stored = Factors(*(factor.to(dtype) for factor in factors))
        stored = stored._replace(sigma=stored.sigma.detach().requires_grad_())
        output = {
            "chain": lambda: factored_linear(inputs, stored),
            "folded": lambda: folded_linear(inputs, stored, fold(stored)),
            "built": lambda: built_linear(inputs, stored, build(stored)),
        }[route]()
        return [output, *torch.autograd.grad(output, (inputs, stored.sigma), upstream.to(dtype))]

    exact = gradients("chain", torch.float64)
    chain = gradients("chain", dtype)
    for route in ("folded", "built"):
        for ours, theirs, reference in zip(gradients(route, dtype), chain, exact):
            assert ours.dtype == dtype
            error, usual = ((each.double() - reference).norm() / reference.norm() for each in (ours, theirs))
            assert error < 2 * UNIT[dtype]
            assert error < 1.5 * usual


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("rank", "route"), [(6, "chain"), (24, "folded"), (48, "built")])
def test_autocast_gives_the_gradient_of_float32_by_every_route(rank, route, dtype):
    tokens, n = 3000 if route != "chain" else 40, 48
    assert cheapest_route(n, n, rank, tokens) == route
    config = OIALRConfig(mode="replace", target_modules=["0"], rank=rank, freeze_when="delay", delay=0)
    model = get_peft_model(nn.Sequential(nn.Linear(n, n)), config)
    sigma = model.base_model.model[0].oialr_sigma["default"]
    x = torch.randn(tokens, n)
    gradients = []
    for enabled in (False, True):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(inputs)
        (output.float().square().sum() / 100).backward()  # a mean would give gradients too small for float16
        gradients.append([inputs.grad, sigma.grad])
        model.zero_grad()
    for exact, ours in zip(*gradients):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 4 * UNIT[dtype] * exact.norm()
