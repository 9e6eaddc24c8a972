"""The controller against the literal reference, and the properties that hold for every optimizer."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from reference import SGD, AdamW, Reference, Settings
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from oialr_peft import OIALRConfig, OIALRController, factorize
from oialr_peft.linalg import decompositions
from oialr_peft.linalg.moments import OptimizerSlots
from oialr_peft.tuner.lookup import adapter_layers

SHAPES = [(12, 8), (10, 12), (9, 10), (4, 9)]  # (out, in): tall, wide, nearly square
STEPS = 120


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    layers = []
    for m, n in SHAPES:
        layers += [nn.Linear(n, m, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, SHAPES[0][1], generator=generator, dtype=dtype)
    y = torch.randn(32, SHAPES[-1][0], generator=generator, dtype=dtype)
    return x, y


def train(model, optimizer, steps, controller=None, after_step=None, schedule=lambda step: 1.0):
    x, y = data(next(model.parameters()).dtype)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in range(steps):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()
        if after_step is not None:
            after_step()
    return model


def dense_weights(model):
    layers = adapter_layers(model).values()
    return [layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach() for layer in layers]


def largest_deviation(ours, reference):
    return max(float(np.abs(a.numpy() - b).max()) for a, b in zip(ours, reference))


OPTIMIZERS = {
    "sgd": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda: SGD(lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.01),
        lambda: AdamW(lr=0.02, weight_decay=0.01),
    ),
    "adam-amsgrad": (
        lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
        lambda: AdamW(lr=0.02, weight_decay=0.0, amsgrad=True),
    ),
}

RULES = {
    "stable": {"freeze_when": "stable", "delay": 20, "stability_threshold": 0.985, "cutoff": 0.2},
    "delay": {"freeze_when": "delay", "delay": 25, "cutoff": 0.2},
    "delay, last layers first": {"freeze_when": "delay", "delay": 10, "cutoff": 0.2, "layers_per_update": 0.1},
    "factored at creation": {"freeze_when": "delay", "delay": 0, "cutoff": 0.2, "rank": 3},
    "harsh cutoff": {"freeze_when": "delay", "delay": 10, "cutoff": 0.9, "max_rank_drop": 0.3, "min_rank": 2},
    "residual": {"mode": "adapter", "delay": 0, "cutoff": 0.2, "rank": 3},
    "bounded loss": {
        "freeze_when": "delay",
        "delay": 10,
        "cutoff": 0.6,
        "max_output_loss": 0.02,
        "max_rank_drop": 0.5,
    },
    "late": {"freeze_when": "delay", "delay": 80, "cutoff": 0.2, "max_rank_drop": 0.3},
    "own learning rate": {"freeze_when": "delay", "delay": 10, "cutoff": 0.2, "sigma_lr_scale": 0.7},
    "bounded loss, residual": {
        "mode": "adapter",
        "delay": 0,
        "cutoff": 0.6,
        "rank": 4,
        "max_output_loss": 0.005,
        "max_rank_drop": 0.5,
    },
}


def constant(step):
    return 1.0


def warmed_up_and_falling(step):
    return min((step + 1) / 12, (STEPS - step) / (STEPS - 12))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rule", "schedule"),
    [
        *((rule, constant) for rule in RULES),
        *((rule, warmed_up_and_falling) for rule in ("stable", "late", "residual", "own learning rate")),
    ],
)
def test_training_equals_the_literal_reference(rule, schedule, optimizer):
    settings = {"update_every": 10, "min_rank": 1, **RULES[rule]}
    make_torch, make_numpy = OPTIMIZERS[optimizer]
    base = mlp()
    linear = [module for module in base if isinstance(module, nn.Linear)]
    reference = Reference(
        [module.weight.detach().numpy() for module in linear],
        [module.bias.detach().numpy() for module in linear],
        make_numpy(),
        Settings(total_steps=STEPS, **settings),
        schedule,
    )
    model = get_peft_model(base, OIALRConfig(**{"mode": "replace", **settings}))
    torch_optimizer = make_torch([p for p in model.parameters() if p.requires_grad])
    controller = OIALRController(model, torch_optimizer, total_steps=STEPS)

    train(model, torch_optimizer, STEPS, controller, schedule=schedule)
    x, y = data()
    for _ in range(STEPS):
        reference.train_step(x.numpy(), y.numpy())

    assert largest_deviation(dense_weights(model), reference.weights()) < 1e-9
    names = list(controller.layers)
    assert len(controller.history) == len(reference.history)
    for update, (step, stability, frozen, ranks) in zip(controller.history, reference.history):
        assert update.step == step
        assert update.frozen == [names[i] for i in frozen]
        assert update.ranks == {names[i]: change for i, change in ranks.items()}
        assert update.stability == pytest.approx({names[i]: s for i, s in stability.items()}, abs=1e-9)
    assert any(after < before for update in controller.history for before, after in update.ranks.values())


def test_the_stable_rule_freezes_layers_one_by_one():
    """The oracle test above would prove little if all layers froze in the same check."""
    settings = {"update_every": 10, **RULES["stable"]}
    model = get_peft_model(mlp(), OIALRConfig(**{"mode": "replace", **settings}))
    optimizer = OPTIMIZERS["adamw"][0](model.parameters())
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, STEPS, controller)
    assert len([update for update in controller.history if update.frozen]) >= 2


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_without_a_cutoff_rotations_do_not_change_training(optimizer):
    """SGD with momentum and Muon do not depend on the basis, so Σ updates that drop nothing are invisible."""
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        "muon": lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0),
    }[optimizer]
    losses = {}
    for update_every in (5, STEPS):
        config = OIALRConfig(mode="replace", freeze_when="delay", delay=0, update_every=update_every, cutoff=0.0)
        model = get_peft_model(mlp(), config)
        torch_optimizer = make([p for p in model.parameters() if p.requires_grad])
        train(model, torch_optimizer, 40, OIALRController(model, torch_optimizer, total_steps=STEPS))
        losses[update_every] = dense_weights(model)
    # Muon orthogonalizes in bfloat16, so its steps are basis-independent only to that precision
    tolerance = {"sgd": 1e-10, "muon": 3e-2}[optimizer]
    for often, never in zip(losses[5], losses[STEPS]):
        assert_close(often, never, atol=tolerance, rtol=0)


def test_muon_momentum_follows_the_rotation_exactly():
    config = OIALRConfig(mode="replace", freeze_when="delay", delay=0, update_every=5, cutoff=0.0)
    model = get_peft_model(mlp(), config)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 4, controller)

    def momenta():
        return [
            layer.oialr_u["default"].detach()
            @ optimizer.state[layer.oialr_sigma["default"]]["momentum_buffer"]
            @ layer.oialr_vh["default"].detach()
            for layer in controller.layers.values()
        ]

    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = momenta()
    assert controller.step() is not None
    for old, new in zip(before, momenta()):
        assert_close(new, old)


def test_the_weight_is_unchanged_by_the_freeze_and_bases_stay_orthonormal():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, cutoff=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 4, controller)
    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    before = dense_weights(model)
    update = controller.step()
    assert update.frozen == list(controller.layers)
    for old, new in zip(before, dense_weights(model)):
        assert_close(new, old)
    train(model, optimizer, 40, controller)
    for layer in controller.layers.values():
        factors = layer.factors("default")
        identity = torch.eye(factors.rank, dtype=torch.float64)
        assert_close(factors.u.T @ factors.u, identity)
        assert_close(factors.vh @ factors.vh.T, identity)


def test_the_mask_trains_exactly_like_physical_shrinking():
    weights, ranks = [], []
    for shrink in ("physical", "mask"):
        model = get_peft_model(
            mlp(),
            OIALRConfig(mode="replace", freeze_when="delay", delay=10, update_every=10, cutoff=0.3, shrink=shrink),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        controller = OIALRController(model, optimizer, total_steps=STEPS)
        train(model, optimizer, STEPS, controller)
        weights.append(dense_weights(model))
        ranks.append([update.ranks for update in controller.history])
        shapes = [layer.oialr_sigma["default"].shape[0] for layer in controller.layers.values()]
        full = [min(shape) for shape in SHAPES]
        assert shapes == full if shrink == "mask" else shapes < full
    assert ranks[0] == ranks[1]
    for physical, masked in zip(*weights):
        assert_close(physical, masked, atol=1e-11, rtol=0)


def test_the_optimizer_object_its_groups_and_its_scheduler_survive():
    model = get_peft_model(
        mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=10, update_every=10, cutoff=0.3)
    )
    layers = list(adapter_layers(model).values())
    groups = [
        {"params": [layers[0].oialr_weight["default"]], "lr": 0.01},
        {"params": [layer.oialr_weight["default"] for layer in layers[1:]], "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups)
    group_objects = list(optimizer.param_groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, STEPS, controller, after_step=scheduler.step)
    assert all(a is b for a, b in zip(optimizer.param_groups, group_objects))
    assert optimizer.param_groups[0]["params"] == [layers[0].oialr_sigma["default"]]
    assert optimizer.param_groups[1]["params"] == [layer.oialr_sigma["default"] for layer in layers[1:]]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} == trained
    assert all(int(state["step"]) == STEPS for state in optimizer.state.values())
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.0)


def test_a_kept_loss_does_not_break_the_next_backward():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, cutoff=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    x, y = data()
    kept = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        kept.append(loss)
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert len(kept) == 20
    assert all(layer.rank("default") < min(s) for layer, s in zip(controller.layers.values(), SHAPES))


@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.Adadelta], ids=["Rprop", "Adadelta"])
def test_unknown_optimizer_state_is_reset_with_one_warning(make):
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, cutoff=0.3))
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 5, controller)
        assert all(not optimizer.state.get(layer.oialr_sigma["default"]) for layer in controller.layers.values())
        train(model, optimizer, 15, controller)
    assert len([w for w in caught if "cannot follow a change of basis" in str(w.message)]) == 1


def test_biases_go_on_training_after_the_freeze():
    model = get_peft_model(
        mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, bias="oialr_only")
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 10, controller)
    frozen_at = [layer.get_base_layer().bias.detach().clone() for layer in controller.layers.values()]
    train(model, optimizer, 10, controller)
    for layer, before in zip(controller.layers.values(), frozen_at):
        assert not torch.equal(layer.get_base_layer().bias, before)


@pytest.mark.parametrize("interrupted_at", [5, 10, 15, 37, 60, 80])
@pytest.mark.parametrize("storage", ["full", "bf16", "cpu", "sketch"])
def test_save_load_step_equals_no_interruption_bit_for_bit(interrupted_at, storage, tmp_path):
    config = OIALRConfig(
        mode="replace", update_every=10, delay=20, stability_threshold=0.985, cutoff=0.2, stability_storage=storage
    )

    def start():
        model = get_peft_model(mlp(torch.float32), copy.deepcopy(config))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        return model, optimizer, OIALRController(model, optimizer, total_steps=STEPS)

    whole = start()
    train(whole[0], whole[1], STEPS, whole[2])

    first = start()
    train(first[0], first[1], interrupted_at, first[2])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = start()
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(second[0], second[1], STEPS - interrupted_at, second[2])

    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key
    assert_same_optimizer_state(whole[1], second[1])
    assert without_seconds(whole[2]) == without_seconds(second[2])


def assert_same_optimizer_state(one, other):
    ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        assert state.keys() == theirs[index].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][key])), (index, key)


def without_seconds(controller):
    return [{**vars(update), "seconds": None} for update in controller.history]


def test_history_counts_what_trains():
    model = get_peft_model(
        mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=10, update_every=10, cutoff=0.3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, STEPS, controller)
    dense = sum(p.numel() for p in mlp().parameters())
    for update in controller.history:
        assert update.total == dense
        assert update.seconds > 0
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert controller.history[-1].trainable == trainable
    metrics = controller.metrics()
    assert metrics["oialr/trainable_percent"] == pytest.approx(100 * trainable / dense)
    assert metrics["oialr/frozen_layers"] == len(SHAPES)
    assert metrics["oialr/rank_mean"] == pytest.approx(
        np.mean([layer.rank("default") for layer in controller.layers.values()])
    )


def test_stability_of_an_untrained_layer_is_one():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", update_every=5, delay=100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 10, controller)
    assert controller.history[0].stability == {}
    assert list(controller.history[1].stability.values()) == pytest.approx([1.0] * len(SHAPES))


def test_freezing_halves_at_most_and_never_below_the_floor():
    config = OIALRConfig(mode="replace", freeze_when="delay", delay=0, update_every=5, cutoff=0.99, min_rank=2)
    model = get_peft_model(mlp(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 60, controller)
    for update in controller.history:
        for before, after in update.ranks.values():
            assert after >= max(2, before - math.floor(0.5 * before))
    assert all(layer.rank("default") == 2 for layer in controller.layers.values())


def test_two_adapters_train_one_after_the_other():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, cutoff=0.3))
    model.add_adapter("other", OIALRConfig(mode="replace", freeze_when="delay", delay=5, update_every=5, cutoff=0.6))
    x, _ = data()
    model.set_adapter("other")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=STEPS, adapter_name="other")
    train(model, optimizer, 20, controller)
    other = model(x)
    model.set_adapter("default")
    assert_close(model(x), mlp()(x))
    model.set_adapter("other")
    assert_close(model(x), other)


def test_a_nan_stops_the_check_and_names_the_module():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", update_every=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 4, controller)
    with torch.no_grad():
        controller.layers["4"].oialr_weight["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="`4` holds NaN or Inf"):
        controller.step()


def test_an_optimizer_made_before_the_adapter_is_refused():
    base = mlp()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.01)
    model = get_peft_model(base, OIALRConfig(mode="replace"))
    with pytest.raises(ValueError, match="does not train 4 of 4 OIALR layers.*Make the optimizer after the adapter"):
        OIALRController(model, optimizer, total_steps=STEPS)


def test_a_model_without_the_adapter_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="no OIALR adapter called `default`.*get_peft_model"):
        OIALRController(model, torch.optim.SGD(model.parameters(), lr=0.01), total_steps=STEPS)


@pytest.mark.parametrize(
    ("settings", "total_steps", "message"),
    [
        ({"delay": 200}, 100, "`delay` is 200 optimizer steps, but the whole run has 100"),
        ({"update_every": 200}, 100, "`update_every` is 200 optimizer steps, but the whole run has 100"),
        ({}, 0, "`total_steps` must be an int ≥ 1"),
        ({}, 10.0, "`total_steps` must be an int ≥ 1"),
        ({}, True, "`total_steps` must be an int ≥ 1"),
    ],
)
def test_steps_that_do_not_fit_into_the_run_are_refused(settings, total_steps, message):
    model = get_peft_model(mlp(), OIALRConfig(**{"mode": "replace", **settings}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=message):
        OIALRController(model, optimizer, total_steps=total_steps)


def test_a_parameter_replaced_behind_its_back_is_noticed():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", update_every=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    layer = controller.layers["0"]
    layer.set_factors("default", factorize(layer.oialr_weight["default"].detach()))
    with pytest.raises(RuntimeError, match="The parameter of `0` was replaced"):
        train(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0), 5, controller)


def test_metrics_before_the_first_check_are_refused():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace"))
    controller = OIALRController(model, torch.optim.SGD(model.parameters(), lr=0.01), total_steps=STEPS)
    with pytest.raises(ValueError, match="no check yet"):
        controller.metrics()


def test_the_random_state_of_the_user_is_not_touched():
    model = get_peft_model(
        mlp(), OIALRConfig(mode="replace", update_every=5, delay=10, stability_storage="sketch", cutoff=0.3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    before = torch.get_rng_state()
    train(model, optimizer, 30, controller)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_gives_no_warning():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", update_every=5, cutoff=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller = OIALRController(model, optimizer, total_steps=STEPS)
        train(model, optimizer, 30, controller)
    assert controller.history


class CountHostReads(TorchDispatchMode):
    """Counts how often a value leaves the device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("storage", ["sketch", "full"])
def test_a_check_of_dense_layers_waits_for_an_accelerator_no_more_often_with_more_layers(storage, monkeypatch):
    monkeypatch.setattr(decompositions, "_by_svd", decompositions._by_polar)  # what an accelerator uses
    reads = {}
    for depth in (2, 6):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth)))
        config = OIALRConfig(
            mode="replace",
            target_modules="all-linear",
            update_every=1,
            delay=5,
            stability_storage=storage,
            stability_threshold=1.0,
        )
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        controller = OIALRController(model, optimizer, total_steps=10)
        controller.step()  # the first bases
        with CountHostReads() as counted:
            update = controller.step()
        assert len(update.stability) == depth
        assert not update.frozen
        reads[depth] = counted.reads
    assert reads[2] == reads[6]


# ---- small rules -----------------------------------------------------------------------------------------------------


def controlled(settings=None, optimizer=None, base=None, **options):
    model = get_peft_model(base or mlp(), OIALRConfig(**{"mode": "replace", "update_every": 5, **(settings or {})}))
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.01))
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    return model, optimizer, OIALRController(model, optimizer, total_steps=STEPS, **options)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze_when": "stable", "delay": 12, "stability_threshold": 0.8}, (12, 0.8)),
        ({"freeze_when": "delay", "delay": 0.5}, (60, None)),
    ],
)
def test_the_schedule_is_that_of_the_configuration(settings, expected):
    _, _, controller = controlled({**settings, "layers_per_update": 0.7})
    schedule = controller.schedule
    assert (schedule.delay, schedule.threshold) == expected
    assert (schedule.total_steps, schedule.update_every, schedule.layers_per_update) == (STEPS, 5, 0.7)


def test_a_step_that_the_scaler_skipped_does_not_count():
    model, optimizer, _ = controlled()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(optimizer)
    controller = OIALRController(model, prepared, total_steps=STEPS)
    prepared._is_overflow = True
    assert controller.step() is None
    assert controller.steps == 0
    prepared._is_overflow = False
    controller.step()
    assert controller.steps == 1


def test_layers_that_do_not_train_need_no_optimizer_and_do_not_count():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace", update_every=5))
    layers = list(adapter_layers(model).values())
    layers[1].requires_grad_(False)
    optimizer = torch.optim.SGD([layer.oialr_weight["default"] for i, layer in enumerate(layers) if i != 1], lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    train(model, optimizer, 5, controller)
    assert controller.history[-1].trainable == sum(m * n for i, (m, n) in enumerate(SHAPES) if i != 1)
    with pytest.raises(ValueError, match="does not train 1 of 4 OIALR layers, such as `6`"):
        OIALRController(model, torch.optim.SGD(optimizer.param_groups[0]["params"][:2], lr=0.01), total_steps=STEPS)


@pytest.mark.parametrize(
    "settings",
    [
        {"shrink": "physical"},
        {"shrink": "mask"},
        {"mode": "adapter", "delay": 0},
        {"mode": "pretraining"},
        {"bias": "all", "shrink": "mask"},
    ],
    ids=str,
)
def test_every_mode_counts_what_trains_and_the_whole_dense_model(settings):
    settings = {"freeze_when": "delay", "delay": 5, "cutoff": 0.4, **settings}
    model, optimizer, controller = controlled(settings)
    train(model, optimizer, 10, controller)
    update = controller.history[-1]
    ranks = [layer.rank("default") for layer in controller.layers.values()]
    biases = sum(m for m, _ in SHAPES)
    trains = settings.get("bias") == "all" or settings.get("mode") == "pretraining"
    assert update.total == sum(m * n for m, n in SHAPES) + biases
    assert update.trainable == sum(rank**2 for rank in ranks) + trains * biases
    assert ranks < [min(shape) for shape in SHAPES]


def test_metrics_are_the_figures_of_the_last_check():
    model, optimizer, controller = controlled({"delay": 5, "stability_threshold": 0.0001, "cutoff": 0.4})
    train(model, optimizer, 10, controller)
    update = controller.history[-1]
    layers = controller.layers.values()
    assert len(update.stability) == len(SHAPES)
    assert controller.metrics() == {
        "oialr/trainable_percent": 100 * update.trainable / update.total,
        "oialr/rank_mean": sum(layer.rank("default") for layer in layers) / len(SHAPES),
        "oialr/frozen_layers": 4.0,
        "oialr/update_seconds": update.seconds,
        "oialr/stability_mean": pytest.approx(sum(update.stability.values()) / len(SHAPES)),
    }
    train(model, optimizer, 5, controller)
    assert "oialr/stability_mean" not in controller.metrics()


def test_products_are_forgotten_after_each_step_of_the_optimizer():
    model, optimizer, controller = controlled({"freeze_when": "delay", "delay": 0, "rank": 6})
    model.eval()
    with torch.no_grad():
        model(data()[0])
    layers = controller.layers.values()
    assert all(layer._products for layer in layers)
    optimizer.step()
    assert not any(layer._products for layer in layers)


def test_an_adapter_is_controlled_under_its_own_name():
    model = get_peft_model(mlp(), OIALRConfig(mode="replace"))
    model.add_adapter("other", OIALRConfig(mode="replace", update_every=7))
    model.set_adapter("other")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=STEPS, adapter_name="other", disable_tqdm=True)
    assert controller.schedule.update_every == 7
    assert controller.disable_tqdm is True
    assert [layer.controlled for layer in controller.layers.values()] == [{"other": True}] * len(SHAPES)


def test_a_basis_of_a_layer_that_is_not_dense_is_refused():
    model, optimizer, controller = controlled({"delay": 100})
    train(model, optimizer, 5, controller)
    other = controlled({"freeze_when": "delay", "delay": 0})[2]
    with pytest.raises(ValueError, match="holds a basis of 0, 2, 4, 6, which is not a dense layer"):
        other.load_state_dict(controller.state_dict())
    assert other.steps == 0


# ---- through Accelerate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", ["physical", "mask"])
@pytest.mark.parametrize("steps", [5, 20])
def test_a_state_that_accelerate_saved_is_matched_and_continued(tmp_path, shrink, steps):
    settings = {"freeze_when": "delay", "delay": 10, "cutoff": 0.4, "shrink": shrink}

    def start():
        model = get_peft_model(mlp(), OIALRConfig(update_every=5, **{"mode": "replace", **settings}))
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.02))
        controller = OIALRController(model, optimizer, total_steps=STEPS)
        controller.register(accelerator)
        return accelerator, model, optimizer, controller

    accelerator, model, optimizer, controller = start()
    train(model, optimizer, steps, controller)
    accelerator.save_state(str(tmp_path))
    other, resumed, second, matched = start()
    matched.match(tmp_path)
    for name, layer in controller.layers.items():
        ours = matched.layers[name]
        assert ours.is_dense("default") == layer.is_dense("default")
        assert ours.rank("default") == layer.rank("default")
        assert ours.trained_parameter("default").shape == layer.trained_parameter("default").shape
        assert ours.trained_parameter("default") in OptimizerSlots(second)
    other.load_state(str(tmp_path))
    train(model, optimizer, 10, controller)
    train(resumed, second, 10, matched)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert without_seconds(controller) == without_seconds(matched)
