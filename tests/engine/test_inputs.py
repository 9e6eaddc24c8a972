"""What pruning goes by beside the weight: recent inputs and outputs, what they say, and what happens without them."""

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
from oialr_peft.engine import pruning
from oialr_peft.engine.inputs import POSITIONS, STEPS, Recorded
from oialr_peft.linalg.decompositions import principal_directions
from oialr_peft.linalg.factors import Rotation
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.matricization import matricization_of
from oialr_peft.tuner.model import adapter_layers

pytestmark = pytest.mark.usefixtures("float64")

BOUND = 0.01
MODES = {
    "freezing": {"freeze_when": "delay", "delay": 4},
    "factored": {"freeze_when": "delay", "delay": 0},
    "masked": {"freeze_when": "delay", "delay": 0, "shrink": "mask"},
    "residual": {"residual": True, "init_rank": 12},
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
    return get_peft_model(Tower(), OIALRConfig(target_modules=["convolution", "up", "down"], **config)).train()


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
        ({"max_output_loss": 1e-6, "residual": True, "init_rank": 12}, False),
    ],
)
def test_a_bound_that_keeps_nearly_everything_warns_once(settings, warns):
    model = adapted(**{**(MODES["freezing"] if "residual" not in settings else {}), **settings})
    optimizer, controller = controlled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, optimizer, controller, 12, batch())
    found = [str(warning.message) for warning in caught if "All layers are factored" in str(warning.message)]
    assert len(found) == warns
    assert all("`max_output_loss=1e-06` keeps 100% of their directions" in message for message in found)


@pytest.mark.parametrize("prune_by", ["weight", "outputs"])
def test_a_layer_that_was_not_called_keeps_its_rank(prune_by):
    model = adapted(**MODES["factored"], prune_by=prune_by)
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
@pytest.mark.parametrize("prune_by", ["weight", "outputs"])
def test_a_resumed_run_removes_the_same(prune_by, steps):
    model = adapted(**MODES["freezing"], prune_by=prune_by)
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


@pytest.mark.parametrize("prune_by", ["weight", "outputs"])
def test_hooks_go_with_the_controller(prune_by):
    model = adapted(**MODES["factored"], prune_by=prune_by)
    _, controller = controlled(model)
    layers = adapter_layers(model).values()
    assert all(len(layer._forward_pre_hooks) == 1 for layer in layers)
    del controller
    gc.collect()
    assert all(not layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("settings", [{}, {"prune_by": "outputs", "update_every": 20}], ids=str)
def test_recording_is_compiled_and_costs_one_more_graph(settings):
    torch._dynamo.reset()
    model = adapted(**MODES["factored"], **settings)
    plain = adapted(**MODES["factored"], **settings)
    graphs = CompileCounter()
    x = batch()
    histories = []
    for each, forward in ((model, torch.compile(model, backend=graphs, fullgraph=True)), (plain, plain)):
        optimizer, controller = controlled(each)
        for _ in range(4 * settings.get("update_every", 4)):
            (forward(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        histories.append([update.ranks for update in controller.history])
    assert histories[0] == histories[1]
    assert len({ranks for update in histories[0] for ranks in update.values()}) >= 4
    assert graphs.frame_count <= 4  # with and without recording, before and after ranks vary
    torch._dynamo.reset()


# ---- the outputs -----------------------------------------------------------------------------------------------------


def recorded_passes(model: nn.Module, optimizer, controller, steps: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs, and outputs without the bias, of every layer in some training steps, of which the last is not counted."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(layer: OIALRLinear, arguments: tuple[Tensor], output: Tensor) -> None:
        bias = layer.get_base_layer().bias
        own = output.detach() - (bias[:, None, None] if output.ndim == 4 else bias)
        found.setdefault(layer.name, []).append((arguments[0].detach(), layer.form.rows(own)))

    hooks = [layer.register_forward_hook(keep) for layer in adapter_layers(model).values()]
    for step in range(1, steps + 1):
        (model(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < steps:
            assert controller.step() is None
    for hook in hooks:
        hook.remove()
    return found


def mean_relative_error(layer: OIALRLinear, change: Tensor, passes: list[tuple[Tensor, Tensor]]) -> float:
    """E[‖ΔW x‖² / ‖y‖²] over all positions."""
    errors = [layer.form.rows(layer.form.apply(x, change)).square().sum(1) / y.square().sum(1) for x, y in passes]
    return float(torch.cat(errors).mean())


@pytest.mark.parametrize("mode", MODES)
def test_pruned_by_outputs_an_update_removes_no_more_of_them_than_the_bound(mode):
    model = adapted(**MODES[mode], prune_by="outputs")
    optimizer, controller = controlled(model)
    if mode != "freezing":
        run(model, optimizer, controller, 4, batch())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that outputs of earlier steps are those of the weight that is cut
    passes = recorded_passes(model, optimizer, controller, 4)
    layers = adapter_layers(model)
    before = {name: layer.adapter_weight("default") for name, layer in layers.items()}
    update = controller.step()
    for name, layer in layers.items():
        was, now = update.ranks[name]
        assert now < was
        lost = mean_relative_error(layer, layer.adapter_weight("default") - before[name], passes[name])
        assert 0 < lost <= BOUND * (1 + 1e-9)


def test_the_directions_of_the_outputs_lose_less_than_those_of_the_weight():
    lost: dict[str, dict[str, float]] = {}
    for prune_by in ("weight", "outputs"):
        model = adapted(freeze_when="delay", delay=4, prune_by=prune_by, max_output_loss=0.5, max_rank_drop=0.5)
        optimizer, controller = controlled(model, lr=0.0)
        passes = recorded_passes(model, optimizer, controller, 4)
        layers = adapter_layers(model)
        before = {name: layer.adapter_weight("default") for name, layer in layers.items()}
        ranks = controller.step().ranks
        assert all(after == 8 for _, after in ranks.values())
        lost[prune_by] = {
            name: mean_relative_error(layer, layer.adapter_weight("default") - before[name], passes[name])
            for name, layer in layers.items()
        }
    for name, error in lost["outputs"].items():
        assert error < lost["weight"][name]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_no_other_directions_lose_less(monkeypatch, shape):
    """Eckart and Young: the energy that is lost is that of the directions that go, and no projection loses less."""
    monkeypatch.setattr(pruning, "WHITE", 0.0)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(200, shape[1], generator=generator) * torch.logspace(0, -2, shape[1])
    y = x @ weight.T
    length = y.norm(dim=1, keepdim=True)
    wide = shape[0] < shape[1]
    rows = (y if wide else x) / length
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rotation = Rotation(u, s, vh.mT)
    recorded = Recorded(torch.stack([rows.mT @ rows] * 2), torch.tensor([len(x), len(x)]), torch.tensor(0))
    for bound in (0.2, 0.05, 0.01, 0.001):
        needed = pruning.needed_of_outputs("up", rotation, 0.999, bound, recorded, of_outputs=wide)
        rank, directions = int(needed.number), principal_directions(needed.covariance, "up")
        kept = rotation.onto(directions[:, :rank])
        cut = kept.p @ kept.core @ kept.q.mT
        assert torch.allclose(kept.p.mT @ weight @ kept.q, kept.core)
        for columns in (kept.p, kept.q):
            assert torch.allclose(columns.mT @ columns, torch.eye(rank))
        projector = u @ directions[:, :rank] @ directions[:, :rank].mT @ u.mT
        assert torch.allclose(cut, projector @ weight)
        lost = ((y - x @ cut.T) / length).square().sum(1).mean()
        assert lost <= bound
        if rank > 1:
            fewer = rotation.onto(directions[:, : rank - 1])
            assert ((y - x @ (fewer.p @ fewer.core @ fewer.q.mT).T) / length).square().sum(1).mean() > bound
        for _ in range(50):
            other = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator)).Q
            assert ((y - y @ other @ other.mT) / length).square().sum(1).mean() >= lost - 1e-12


def test_directions_that_recent_inputs_do_not_use_have_a_price():
    """One batch of few tokens must not empty a layer: what they do not show counts as white noise of a thousandth would."""
    weight = torch.eye(8)
    rows = torch.zeros(4, 8)
    rows[:, 0] = 1.0
    recorded = Recorded(torch.stack([rows.mT @ rows] * 2), torch.tensor([4, 4]), torch.tensor(0))
    rotation = Rotation(weight, torch.ones(8), weight)
    needed = {
        bound: int(pruning.needed_of_outputs("up", rotation, 0.999, bound, recorded, of_outputs=False).number)
        for bound in (0.01, 1.01e-3 * 5 / 8, 1.01e-3 * 2 / 8, 1e-5)
    }
    assert list(needed.values()) == [1, 3, 6, 8]


def test_a_layer_that_gives_nothing_keeps_its_rank():
    """A correction that has learned nothing yet: no direction of it is better than another."""
    model = adapted(**MODES["residual"], prune_by="outputs")
    optimizer, controller = controlled(model)
    for _ in range(4):
        model(batch())
        optimizer.step()  # without gradients
        update = controller.step()
    assert update.ranks == {name: (12, 12) for name in ("convolution", "up", "down")}


def test_directions_that_do_not_converge_are_found_by_a_second_method(monkeypatch):
    def failing(*_: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    weights = []
    for fails in (False, True):
        model = adapted(**MODES["freezing"], prune_by="outputs")
        optimizer, controller = controlled(model)
        run(model, optimizer, controller, 3, batch())
        if fails:
            monkeypatch.setattr(torch.linalg, "eigh", failing)
            with pytest.warns(UserWarning, match="The fast decomposition of `.*` did not converge"):
                run(model, optimizer, controller, 1, batch())
        else:
            run(model, optimizer, controller, 1, batch())
        weights.append([layer.adapter_weight("default") for layer in adapter_layers(model).values()])
    for one, other in zip(*weights, strict=True):
        assert torch.allclose(one, other)


def test_outputs_are_recorded_in_the_last_steps_before_a_check():
    model = adapted(freeze_when="delay", delay=40, update_every=20, prune_by="outputs")
    optimizer, controller = controlled(model)
    positions = {"convolution": 8 * 16, "up": 8 * 16, "down": 8 * 16}
    for step in range(1, 61):
        model.eval()(batch(99))
        model.train()(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        recent = controller._recent
        steps = 0 if step < 25 else max(0, (step - 1) % 20 - (20 - STEPS) + 1)
        expected = {name: count * (steps - 1) for name, count in positions.items()} if steps > 1 else {}
        assert {name: int(recorded.positions.sum()) for name, recorded in recent.recorded.items()} == expected
        sizes = {name: tuple(recorded.covariances.shape) for name, recorded in recent.recorded.items()}
        layers = adapter_layers(model)
        assert sizes == {name: (2, layers[name].rank("default"), layers[name].rank("default")) for name in sizes}
        controller.step()


def test_a_step_that_does_not_count_leaves_nothing():
    model = adapted(**MODES["factored"], prune_by="outputs")
    optimizer, controller = controlled(model)
    run(model, optimizer, controller, 1, batch())
    before = {name: recorded.covariances.clone() for name, recorded in controller._recent.recorded.items()}
    model(batch(2) * torch.inf)
    controller._fused_step.was_skipped = True
    assert controller.step() is None
    controller._fused_step.was_skipped = False
    run(model, optimizer, controller, 1, batch(3))
    for name, recorded in controller._recent.recorded.items():
        assert torch.isfinite(recorded.covariances).all()
        assert not torch.equal(recorded.covariances, before[name])


def test_a_state_of_outputs_of_other_layers_is_refused_and_one_without_them_begins_anew():
    model = adapted(**MODES["factored"], prune_by="outputs")
    optimizer, controller = controlled(model)
    run(model, optimizer, controller, 2, batch())
    state = controller.state_dict()
    assert (
        set(state["covariances"]) == set(state["positions"]) == set(state["exponents"]) == {"convolution", "up", "down"}
    )
    for name, covariances in {
        "up": torch.zeros(2, 3, 3),
        "upper": torch.zeros(2, 16, 16),
        "down": torch.zeros(2, 16, 16, dtype=torch.int64),
    }.items():
        wrong = {"covariances": {name: covariances}, "positions": {name: [1, 1]}, "exponents": {name: 0}}
        with pytest.raises(ValueError, match=f"holds covariances of `{name}` with shape"):
            controller.load_state_dict({**state, **wrong})
        assert set(controller._recent.recorded) == {"convolution", "up", "down"}
    for key in ("covariances", "positions", "exponents"):
        without_up = {name: value for name, value in state[key].items() if name != "up"}
        for part in ({key: without_up}, {key: {}}, {key: {**state[key], "upper": state[key]["up"]}}):
            with pytest.raises(ValueError, match="holds only a part of what was recorded of .*up"):
                controller.load_state_dict({**state, **part})
            assert set(controller._recent.recorded) == {"convolution", "up", "down"}
    older = {key: value for key, value in state.items() if key not in ("covariances", "positions", "exponents")}
    controller.load_state_dict(older)
    assert not controller._recent.recorded


@pytest.mark.parametrize("phase", ["dense", "factored"])
def test_what_is_recorded_does_not_depend_on_autocast(phase):
    """It is computed in float32 at least."""
    found = []
    for autocast in (False, True):
        delay = 0 if phase == "factored" else 4
        model = adapted(freeze_when="delay", delay=delay, prune_by="outputs").to(torch.float32)
        _, controller = controlled(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
            assert model.base_model.model.up(inputs).dtype == (torch.bfloat16 if autocast else torch.float32)
        controller._recent.count_step()
        assert controller._recent.recorded["up"].covariances.dtype == torch.float32
        found.append(controller._recent.recorded["up"].covariances)
    assert torch.equal(*found)
