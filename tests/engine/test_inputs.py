"""What pruning goes by beside the weight: recent inputs, what they say, and what happens without them."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.inputs import POSITIONS
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.matricization import matricization_of

pytestmark = pytest.mark.usefixtures("float64")

BOUND = 0.01
MODES = {
    "freezing": {"freeze_when": "delay", "delay": 4},
    "factored": {"freeze_when": "delay", "delay": 0},
    "masked": {"freeze_when": "delay", "delay": 0, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 12},
}


class Tower(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, stride=2)
        self.up = nn.Linear(16, 20)
        self.down = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.convolution(x).relu().flatten(2).mT).relu())


def adapted(**settings) -> nn.Module:
    torch.manual_seed(0)
    config = {"cutoff": 0.9, "max_rank_drop": 1.0, "update_every": 4, "max_output_loss": BOUND, **settings}
    return get_peft_model(
        Tower(),
        OIALRConfig(target_modules=["convolution", "up", "down"], **{"mode": "replace", **config}),
    ).train()


def controlled(model: nn.Module, lr: float = 3e-2, **options) -> tuple[torch.optim.Optimizer, OIALRController]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    return optimizer, OIALRController(model, optimizer, total_steps=100, **options)


def batch(seed: int = 1) -> Tensor:
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, optimizer, controller, steps: int, x: Tensor) -> None:
    for _ in range(steps):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of every layer, without its bias, for the inputs that it has in this pass."""
    found = {}

    def keep(layer: OIALRLinear, arguments: tuple[Tensor], output: Tensor) -> None:
        bias = layer.get_base_layer().bias
        found[layer.name] = output - (bias[:, None, None] if output.ndim == 4 else bias)

    hooks = [layer.register_forward_hook(keep) for layer in adapter_layers(model).values()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_an_update_removes_no_more_of_the_output_than_the_bound(mode):
    model = adapted(**MODES[mode])
    x = batch()
    optimizer, controller = controlled(model)
    run(model, optimizer, controller, 3, x)
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    inputs = {name: sample.clone() for name, sample in controller._recent.samples.items()}
    layers = adapter_layers(model)
    bases = {name: layer.base_output(inputs[name]) if mode == "residual" else 0 for name, layer in layers.items()}
    before = {
        name: bases[name] + layer.form.apply(inputs[name], layer.adapter_weight("default"))
        for name, layer in layers.items()
    }
    update = controller.step()
    for name, layer in layers.items():
        after = bases[name] + layer.form.apply(inputs[name], layer.adapter_weight("default"))
        lost = (after - before[name]).square().sum() / before[name].square().sum()
        was, now = update.ranks[name]
        assert now < was
        assert lost <= BOUND * (1 + 1e-9)


def test_without_a_bound_the_same_update_removes_more():
    ranks = {}
    for bound in (None, 0.1, BOUND, 1e-4, 0.0):
        model = adapted(**MODES["freezing"], max_output_loss=bound)
        run(model, *controlled(model), 4, batch())
        ranks[bound] = [layer.rank("default") for layer in adapter_layers(model).values()]
    for looser, tighter in ((None, 0.1), (0.1, BOUND), (BOUND, 1e-4), (1e-4, 0.0)):
        assert all(a <= b for a, b in zip(ranks[looser], ranks[tighter], strict=True))
        assert ranks[looser] != ranks[tighter] or looser == 1e-4
    assert ranks[0.0] == [16, 16, 16]


def test_only_the_training_pass_before_a_check_is_recorded():
    model = adapted(**MODES["factored"])
    optimizer, controller = controlled(model)
    for step in range(1, 9):
        model(batch(step)).sum().backward()
        recorded = set(controller._recent.samples)
        assert recorded == (set(adapter_layers(model)) if step % 4 == 0 else set())
        kept = {name: sample.clone() for name, sample in controller._recent.samples.items()}
        model.eval()(batch(99))
        model.train()
        assert all(torch.equal(sample, kept[name]) for name, sample in controller._recent.samples.items())
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        assert not controller._recent.samples


def test_nothing_is_recorded_before_a_check_that_cannot_truncate():
    model = adapted(freeze_when="delay", delay=5)
    optimizer, controller = controlled(model)
    recorded = []
    for step in range(1, 9):
        model(batch(step)).sum().backward()
        recorded.append(bool(controller._recent.samples))
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert recorded == [False] * 7 + [True]  # layers are dense at step 4, and stay so


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"max_output_loss": 1e-6}, True),
        ({"max_output_loss": 0.3}, False),
        ({"max_output_loss": None, "cutoff": 0.0}, False),
        ({"max_output_loss": 1e-6, "mode": "adapter", "rank": 12}, False),
    ],
)
def test_a_bound_that_keeps_nearly_everything_warns_once(settings, warns):
    model = adapted(**{**(MODES["freezing"] if "mode" not in settings else {}), **settings})
    optimizer, controller = controlled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, optimizer, controller, 12, batch())
    found = [str(warning.message) for warning in caught if "All layers are factored" in str(warning.message)]
    assert len(found) == warns
    assert all("`max_output_loss=1e-06` keeps 100% of their directions" in message for message in found)


def test_a_layer_that_was_not_called_keeps_its_rank():
    model = adapted(**MODES["factored"])
    optimizer, controller = controlled(model)
    x = torch.randn(8, 5, 16)
    for _ in range(4):
        (model.base_model.model.up(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update = controller.step()
    assert update.ranks["down"] == (16, 16)
    assert update.ranks["up"][1] < 16


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(3, 4), torch.randn(40, 50, 3)),
        (nn.Linear(3, 4), torch.randn(2, 3)),
        (nn.Conv2d(3, 4, 3, stride=2), torch.randn(64, 3, 16, 16)),
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 8)),
    ],
    ids=["many tokens", "few tokens", "many images", "few sequences"],
)
def test_a_sample_is_spread_over_the_batch_and_small(module, x):
    form = matricization_of(module)
    sample = form.sample(x, POSITIONS)
    positions = form.rows(module.to(x.dtype)(sample)).shape[0]
    everything = form.rows(module(x)).shape[0]
    assert min(POSITIONS // 2, everything) <= positions <= 2 * POSITIONS
    assert sample.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_resumed_run_removes_the_same(steps):
    model = adapted(**MODES["freezing"])
    optimizer, controller = controlled(model)
    run(model, optimizer, controller, steps, batch())
    resumed = copy.deepcopy(model)
    other, second = controlled(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(controller.state_dict()))
    run(model, optimizer, controller, 5, batch())
    run(resumed, other, second, 5, batch())
    assert [update.ranks for update in second.history] == [update.ranks for update in controller.history]
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_hooks_go_with_the_controller():
    model = adapted(**MODES["factored"])
    _, controller = controlled(model)
    layers = adapter_layers(model).values()
    assert all(len(layer._forward_pre_hooks) == 1 for layer in layers)
    del controller
    gc.collect()
    assert all(not layer._forward_pre_hooks for layer in layers)


def test_recording_is_compiled_and_costs_one_more_graph():
    torch._dynamo.reset()
    model = adapted(**MODES["factored"])
    plain = adapted(**MODES["factored"])
    graphs = CompileCounter()
    x = batch()
    histories = []
    for each, forward in ((model, torch.compile(model, backend=graphs, fullgraph=True)), (plain, plain)):
        optimizer, controller = controlled(each)
        for _ in range(16):
            (forward(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        histories.append([update.ranks for update in controller.history])
    assert histories[0] == histories[1]
    assert len({ranks for update in histories[0] for ranks in update.values()}) >= 4
    assert graphs.frame_count <= 4  # with and without recording, before and after ranks vary
    torch._dynamo.reset()
