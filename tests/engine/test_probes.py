"""Bases from the first step's gradients: the directions of the dense weight's gradient, and a step that changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer
from oialr_peft.tuner.matricization import matricization_of
from oialr_peft.tuner.model import adapter_layers

pytestmark = pytest.mark.usefixtures("float64")

GRADIENT = {"residual": True, "init_basis": "gradient"}


def gradient_of(module: nn.Module, batches: list[Tensor], upstream: nn.Module) -> Tensor:
    """∂loss/∂W (m, n) of the dense module, summed over the batches."""
    dense = copy.deepcopy(module).requires_grad_()
    for x in batches:
        upstream(dense(x)).backward()
    return matricization_of(dense).matrix(dense.weight.grad)


class Cubes(nn.Module):
    """A loss whose gradient differs from entry to entry."""

    def forward(self, y: Tensor) -> Tensor:
        return (y**3).mean() + y.square().sum()


def begin(base: nn.Module, *, lr: float = 0.1, **settings: object):
    """An adapted model before its first optimizer step, with its controller."""
    model = get_peft_model(base, OIALRConfig(**{**GRADIENT, "update_every": 50, **settings}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    return model, OIALRController(model, optimizer, total_steps=100)


def run(module: nn.Module, batches: list[Tensor], **settings: object):
    """The adapted module after its first optimizer step, with its layer and controller."""
    model, controller = begin(nn.Sequential(copy.deepcopy(module)), target_modules=["0"], **settings)
    for x in batches:
        Cubes()(model(x)).backward()
    controller.optimizer.step()
    controller.optimizer.zero_grad()
    controller.step()
    (layer,) = adapter_layers(model, "default").values()
    return model, layer, controller


MODULES = {
    "linear": (lambda: nn.Linear(60, 50), (1, 60)),
    "transposed": (lambda: Conv1D(50, 60), (1, 60)),
    "without bias": (lambda: nn.Linear(60, 50, bias=False), (1, 60)),
    **{
        f"convolution in {d}D": (
            lambda d=d: getattr(nn, f"Conv{d}d")(6, 24, 3, stride=2, padding=1),
            (1, 6, *([3] * d)),
        )
        for d in (1, 2)
    },
    "reflecting": (lambda: nn.Conv2d(6, 30, 3, padding=1, padding_mode="reflect"), (1, 6, 2, 2)),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("basis", ["singular", "axes"])
@pytest.mark.parametrize("kind", MODULES)
def test_a_gradient_of_few_directions_is_held_whole(kind, basis, accumulated):
    make, shape = MODULES[kind]
    torch.manual_seed(0)
    module = make()
    batches = [torch.randn(shape) for _ in range(accumulated)]
    gradient = gradient_of(module, batches, Cubes())
    rank = int(torch.linalg.matrix_rank(gradient))
    assert rank < min(gradient.shape)
    _, layer, _ = run(module, batches, init_rank=rank, sigma_basis=basis)
    u, sigma, vh = layer.factors("default")
    assert not sigma.any()
    eye = torch.eye(rank)
    assert_close((u.T @ u, vh @ vh.T), (eye, eye))
    assert_close(u @ (u.T @ gradient @ vh.T) @ vh, gradient)


@pytest.mark.parametrize(("m", "n", "share"), [(300, 200, 0.9), (200, 300, 0.9), (36, 40, 1 - 1e-9)])
def test_a_gradient_of_all_directions_is_held_nearly_as_well_as_by_its_svd(m, n, share):
    torch.manual_seed(0)
    module = nn.Linear(n, m)
    # a spectrum that falls slowly, as gradients have it
    inputs = torch.randn(400, n) * torch.arange(1, n + 1) ** -0.5
    gradient = gradient_of(module, [inputs], Cubes())
    _, layer, _ = run(module, [inputs], init_rank=12)
    u, _, vh = layer.factors("default")
    best = torch.linalg.svdvals(gradient)[:12].square().sum()
    held = (u.T @ gradient @ vh.T).square().sum()
    assert share * best <= held <= (1 + 1e-9) * best  # of a small layer the gradient is kept whole
    of_weight = run(module, [inputs], init_rank=12, init_basis="weight")[1].factors("default")
    assert (of_weight.u.T @ gradient @ of_weight.vh.T).square().sum() < 0.5 * held


def test_the_first_step_leaves_a_layer_as_it_was_and_the_next_ones_train_it():
    torch.manual_seed(0)
    module, x = nn.Linear(20, 30), torch.randn(8, 20)
    model, layer, controller = run(module, [x], init_rank=4)
    assert_close(model(x), module(x), rtol=0, atol=0)
    sigma = layer.oialr_sigma["default"]
    assert sigma not in controller.optimizer.state
    before = Cubes()(model(x)).item()
    for _ in range(5):
        Cubes()(model(x)).backward()
        controller.optimizer.step()
        controller.optimizer.zero_grad()
        controller.step()
    assert controller.optimizer.state[sigma]["step"] == 5
    assert Cubes()(model(x)).item() < before
    assert not layer._forward_hooks


def test_it_descends_faster_than_a_basis_of_the_weight():
    torch.manual_seed(0)
    module, x = nn.Linear(40, 50), torch.randn(16, 40)
    losses = {}
    for basis in ("gradient", "weight"):
        model, _, controller = run(module, [x], lr=1e-3, init_rank=4, init_basis=basis)
        for _ in range(20):
            Cubes()(model(x)).backward()
            controller.optimizer.step()
            controller.optimizer.zero_grad()
            controller.step()
        losses[basis] = Cubes()(model(x)).item()
    start = Cubes()(module(x)).item()
    assert start - losses["gradient"] > 1.5 * (start - losses["weight"]) > 0


def test_an_adapter_that_has_learned_something_keeps_its_bases():
    torch.manual_seed(0)
    x = torch.randn(8, 20)
    model, layer, first = run(nn.Linear(20, 30), [x], init_rank=4)
    Cubes()(model(x)).backward()
    first.optimizer.step()
    before = [factor.clone() for factor in layer.factors("default")]
    controller = OIALRController(model, first.optimizer, total_steps=100)
    Cubes()(model(x)).backward()
    controller.step()
    assert_close(list(layer.factors("default")), before, rtol=0, atol=0)


def test_a_skipped_step_does_not_count(monkeypatch):
    torch.manual_seed(0)
    module, x, other = nn.Linear(20, 30), torch.randn(2, 20), torch.randn(2, 20)
    expected = run(module, [x], init_rank=2)[1].factors("default")
    model, controller = begin(nn.Sequential(module), target_modules=["0"], init_rank=2)
    (Cubes()(model(other)) * torch.inf).backward()  # what makes a gradient scaler skip a step
    monkeypatch.setattr(controller, "_step_was_skipped", lambda: True)
    assert controller.step() is None
    monkeypatch.undo()
    Cubes()(model(x)).backward()
    controller.step()
    (layer,) = adapter_layers(model, "default").values()
    assert_close(list(layer.factors("default")), list(expected))


class Branches(nn.Module):
    """Of its two layers the second is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("scale", [1.0, 0.0, torch.nan], ids=["unused", "zero", "NaN"])
def test_a_layer_without_a_usable_gradient_keeps_the_basis_of_its_weight(scale):
    torch.manual_seed(0)
    model, controller = begin(Branches(), init_rank=2)
    layers = adapter_layers(model, "default")
    before = {name: [factor.clone() for factor in layer.factors("default")] for name, layer in layers.items()}
    (scale * Cubes()(model(torch.randn(4, 6)))).backward()
    without = 1 if scale == 1 else 2
    with pytest.warns(UserWarning, match=f"{without} of 2 layers had no finite gradient other than zero"):
        controller.step()
    for name, layer in layers.items():
        kept = all(torch.equal(*pair) for pair in zip(layer.factors("default"), before[name]))
        assert kept == (name == "unused" or scale != 1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_are_counted_once(reentrant):
    torch.manual_seed(0)
    module, batches = nn.Linear(20, 30), torch.randn(2, 2, 20)
    plain = run(module, list(batches), init_rank=4)[1].factors("default")

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(module)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, controller = begin(Recomputed(), target_modules=["inner"], init_rank=4)
    for x in batches.requires_grad_():
        Cubes()(model(x)).backward()
    controller.step()
    (layer,) = adapter_layers(model, "default").values()
    u, _, vh = layer.factors("default")
    assert_close((u @ u.T, vh.T @ vh), (plain.u @ plain.u.T, plain.vh.T @ plain.vh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_weights_find_the_same_directions(dtype):
    torch.manual_seed(0)
    module, x = nn.Linear(40, 30).float(), torch.randn(3, 40).float()
    exact = gradient_of(module, [x], Cubes())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        _, layer, _ = run(module.to(dtype), [x.to(dtype)], init_rank=3)
    u, _, vh = (factor.float() for factor in layer.factors("default"))
    assert layer.oialr_sigma["default"].dtype == torch.float32
    held = (u.T @ exact @ vh.T).square().sum() / exact.square().sum()
    assert held > 0.999


def test_a_disabled_adapter_and_passes_without_gradients_are_not_watched():
    torch.manual_seed(0)
    module, x, other = nn.Linear(20, 30), torch.randn(2, 20), torch.randn(2, 20)
    expected = run(module, [x], init_rank=2)[1].factors("default")
    model, controller = begin(nn.Sequential(module), target_modules=["0"], init_rank=2)
    with model.disable_adapter():
        Cubes()(model(other.requires_grad_())).backward()
    with torch.no_grad():
        model(other)
    Cubes()(model(x)).backward()
    controller.step()
    (layer,) = adapter_layers(model, "default").values()
    assert_close(list(layer.factors("default")), list(expected))


@pytest.mark.parametrize("shrink", ["physical", "mask"])
def test_trainer_trains_and_prunes_such_an_adapter(tmp_path, shrink):
    torch.manual_seed(0)

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.down(torch.tanh(self.up(x)))
            return {"loss": (y - labels).square().mean(), "y": y}

    settings = {**GRADIENT, "init_rank": 3, "update_every": 5, "cutoff": 0.3, "shrink": shrink}
    model = get_peft_model(Regression().float(), OIALRConfig(**settings))
    x = torch.randn(64, 12).float()
    target = x @ torch.randn(12, 4).float()
    data = [{"x": row, "labels": label} for row, label in zip(x, target, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=0.01, per_device_train_batch_size=16, report_to="none",
        save_strategy="no", logging_steps=1, use_cpu=True, dataloader_pin_memory=False, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = OIALRTrainer(model, arguments, train_dataset=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.oialr_controller.history[-1].ranks
