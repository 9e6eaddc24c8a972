"""NaN, Inf and overflow in weights, gradients, optimizer state and inputs; decompositions that fail; thousands of updates.

What is not finite stops the check or is left out with a warning. Either way it stays in its layer, and never gets into a
basis.
"""

from __future__ import annotations

import copy
import math
import re
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg import decompositions as routes
from oialr_peft.linalg.decompositions import SVD, Decomposition, leading_svd, polar_iteration, svd_by_polar
from oialr_peft.linalg.factors import count_above, not_finite
from oialr_peft.tuner.lookup import adapter_layers

NOT_FINITE = [math.nan, math.inf, -math.inf]
SHAPES = [(6, 4), (5, 6), (3, 5)]
NAMES = ["0", "2", "4"]
PHASES = {
    "first check": {"update_every": 2, "delay": 2},
    "dense": {"update_every": 1, "delay": 50},
    "freeze": {"update_every": 2, "freeze_when": "delay", "delay": 2},
    "factored": {"update_every": 2, "freeze_when": "delay", "delay": 0},
    "masked": {"update_every": 2, "freeze_when": "delay", "delay": 0, "shrink": "mask"},
    "residual": {"update_every": 2, "mode": "adapter", "rank": 3},
}
CHANGING = ["freeze", "factored", "masked", "residual"]
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
}


class Run:
    """A small network, its optimizer and its controller, one step before a check."""

    def __init__(self, phase: str, optimizer: str = "adamw", **fields: object) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(n, m, dtype=torch.float64) for m, n in SHAPES]
        base = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        config = OIALRConfig(target_modules=NAMES, **{"mode": "replace", "cutoff": 0.2, **PHASES[phase], **fields})
        self.model = get_peft_model(base, config)
        self.optimizer = OPTIMIZERS[optimizer]([p for p in self.model.parameters() if p.requires_grad])
        self.controller = OIALRController(self.model, self.optimizer, total_steps=100)
        self.layers = adapter_layers(self.model)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(16, 3, generator=generator, dtype=torch.float64)
        self.train(1)

    def optimize(self) -> None:
        """One optimizer step."""
        nn.functional.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimize()
            self.controller.step()

    def parameter(self, name: str) -> nn.Parameter:
        return self.layers[name].trained_parameter("default")

    def everything(self) -> dict[str, object]:
        """Copies of all that a check may change."""
        return copy.deepcopy(
            {
                "weights": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "bases": self.controller.state_dict()["bases"],
                "history": self.controller.history,
            }
        )

    def states(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.optimizer.state.get(self.parameter(name), {}) for name in self.layers}


def is_finite(run: Run) -> bool:
    tensors = [*run.model.state_dict().values(), *run.controller.state_dict()["bases"].values()]
    tensors += [value for state in run.states().values() for value in state.values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def assert_same(ours: object, theirs: object) -> None:
    assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ---- weights, gradients and losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_weight_that_is_not_finite_stops_the_check_before_it_changes_anything(phase, name, value):
    run = Run(phase)
    run.optimize()
    entry = run.parameter(name)[0, 1].item()
    with torch.no_grad():
        run.parameter(name)[0, 1] = value
    before = run.everything()
    with pytest.raises(ValueError, match=rf"`{name}` holds NaN or Inf.*lower the learning rate, clip gradients"):
        run.controller.step()
    after = run.everything()
    assert before.pop("history") == after.pop("history")
    assert_same(before, after)
    # a user who repairs the weight may go on
    with torch.no_grad():
        run.parameter(name)[0, 1] = entry
    run.train(4)
    assert is_finite(run)
    assert run.controller.history


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_a_gradient_that_is_not_finite_ends_in_a_check_that_names_its_layer(phase, optimizer, value):
    run = Run(phase, optimizer)
    nn.functional.mse_loss(run.model(run.x), run.y).backward()
    run.parameter("2").grad[0, 0] = value
    run.optimizer.step()
    run.optimizer.zero_grad()
    others = {name: copy.deepcopy(state) for name, state in run.states().items() if name != "2"}
    with pytest.raises(ValueError, match="`2` holds NaN or Inf"):
        run.controller.step()
    assert_same(others, {name: run.states()[name] for name in others})
    assert not not_finite({name: run.parameter(name) for name in others})


@pytest.mark.parametrize("phase", PHASES)
def test_a_loss_that_is_not_finite_ends_in_a_check_that_stops(phase):
    run = Run(phase)
    run.y[0, 0] = math.inf
    run.optimize()
    bases = copy.deepcopy(run.controller.state_dict()["bases"])
    with pytest.raises(ValueError, match="`0` holds NaN or Inf"):
        run.controller.step()
    assert_same(bases, run.controller.state_dict()["bases"])


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_that_the_user_leaves_out_moves_nothing(phase):
    run, expected = Run(phase), Run(phase)
    loss = nn.functional.mse_loss(run.model(run.x * math.nan), run.y)
    loss.backward()
    assert not math.isfinite(loss.item())
    run.optimizer.zero_grad()  # neither a step of the optimizer nor one of the controller
    for each in (run, expected):
        each.train(5)
    ours, theirs = run.everything(), expected.everything()
    assert [update.step for update in ours.pop("history")] == [update.step for update in theirs.pop("history")]
    assert_same(ours, theirs)


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("fields", [{}, {"freeze_when": "delay", "delay": 0}, {"mode": "adapter"}], ids=str)
def test_a_pretrained_weight_that_is_not_finite_is_refused_by_name_before_training(fields, value):
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with torch.no_grad():
        base[1].weight[2, 0] = value

    def start() -> None:
        model = get_peft_model(base, OIALRConfig(target_modules=["0", "1"], **{"mode": "replace", **fields}))
        OIALRController(model, torch.optim.SGD(model.parameters()), total_steps=10)

    with pytest.raises(ValueError, match="`1` holds NaN or Inf"):
        start()


def test_large_float64_weights_are_not_taken_for_infinite():
    assert not_finite({"large": torch.full((2, 2), 1e300, dtype=torch.float64)}) == []
    run = Run("factored")
    with torch.no_grad():
        for name in NAMES:
            run.parameter(name).mul_(1e60)
    run.controller.step()
    assert is_finite(run)


def test_a_basis_that_is_not_finite_is_not_loaded():
    run = Run("dense")
    run.train(2)
    state = copy.deepcopy(run.controller.state_dict())
    state["bases"]["2"][0, 0] = math.nan
    with pytest.raises(ValueError, match="`2` holds NaN or Inf"):
        run.controller.load_state_dict(state)
    assert is_finite(run)


# ---- optimizer state -------------------------------------------------------------------------------------------------

MOMENTS = [("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("adamw", "max_exp_avg_sq"), ("sgd", "momentum_buffer")]


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize(("optimizer", "moment"), MOMENTS)
@pytest.mark.parametrize("phase", CHANGING)
def test_a_moment_that_is_not_finite_is_reset_in_its_layer_alone(phase, optimizer, moment, value):
    run, expected = Run(phase, optimizer), Run(phase, optimizer)
    for each in (run, expected):
        each.optimize()
    run.states()["2"][moment][0, 0] = value
    kind = type(run.optimizer).__name__
    with pytest.warns(UserWarning, match=rf"The state that {kind} keeps for `2` holds NaN or Inf, so it is reset"):
        run.controller.step()
    expected.controller.step()
    assert run.controller.history[-1].ranks == expected.controller.history[-1].ranks
    assert run.states()["2"] == {}
    for name in ("0", "4"):
        assert_same(run.states()[name], expected.states()[name])
    assert_same(run.model.state_dict(), expected.model.state_dict())
    run.train(5)
    assert is_finite(run)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_a_layer_that_stays_dense_is_left_to_the_optimizer(moment):
    run = Run("dense")
    run.states()["2"][moment][0, 0] = math.inf
    before = copy.deepcopy(run.states())
    run.controller.step()
    assert_same(run.states(), before)
    assert not_finite(run.controller.state_dict()["bases"]) == []


@pytest.mark.parametrize("phase", CHANGING)
def test_a_gradient_whose_square_overflows_does_not_stop_the_rest_of_its_layer(phase):
    """Adam's second moment becomes Inf and its entry stops; spread by the rotation, the whole layer would."""
    run = Run(phase)
    nn.functional.mse_loss(run.model(run.x), run.y).backward()
    run.parameter("2").grad[0, 0] = 1e200
    run.optimizer.step()
    run.optimizer.zero_grad()
    assert not_finite({name: state["exp_avg_sq"] for name, state in run.states().items()}) == ["2"]
    with pytest.warns(UserWarning, match="keeps for `2` holds NaN or Inf"):
        run.controller.step()
    rank = run.layers["2"].rank("default")
    before = run.parameter("2").detach().clone()
    run.optimize()
    assert bool((run.parameter("2") != before)[:rank, :rank].all())
    assert is_finite(run)


# ---- what layers are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["freeze", "factored", "residual"])
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_inputs_that_are_not_finite_let_a_layer_keep_its_rank(phase, value):
    run = Run(phase, cutoff=0.9, max_output_loss=0.5, max_rank_drop=0.5)
    run.optimize()
    inputs = torch.randn(16, run.layers["2"].in_features, dtype=torch.float64)
    inputs[3, 1] = value
    run.layers["2"](inputs)  # the last forward pass of this layer in this step
    full = run.layers["2"].full_rank["default"]
    with pytest.warns(UserWarning, match=r"Recent inputs of `2` give outputs of NaN or Inf"):
        update = run.controller.step()
    assert update.ranks["2"] == (full, full)
    assert update.ranks["0"][1] < update.ranks["0"][0]
    assert is_finite(run)


@pytest.mark.parametrize("phase", ["freeze", "factored", "residual"])
def test_an_empty_batch_before_a_check_lets_every_layer_keep_its_rank(phase):
    run = Run(phase, cutoff=0.9, max_output_loss=0.5, max_rank_drop=0.5)
    run.controller._recent.forget()
    run.x, run.y = run.x[:0], run.y[:0]
    run.model(run.x).sum().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    update = run.controller.step()
    assert all(before == after for before, after in update.ranks.values())
    assert is_finite(run)


@pytest.mark.parametrize("phase", ["freeze", "factored", "residual"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_bound_on_the_output_keeps_does_not_depend_on_the_scale_of_inputs(phase, scale, dtype):
    """Squares of such numbers are 0 or Inf in float32: the bound would drop what it must keep."""
    changes = []
    for factor in (1.0, scale):
        run = Run(phase, cutoff=0.9, max_output_loss=0.02, max_rank_drop=1.0)
        run.model.to(dtype)
        run.controller = OIALRController(run.model, run.optimizer, total_steps=100)
        run.controller._recent.recording = True
        generator = torch.Generator().manual_seed(2)
        for layer in run.layers.values():
            if phase == "residual":  # a correction as large as the base weight
                nn.init.normal_(layer.oialr_sigma["default"], generator=generator)
            inputs = torch.randn(64, layer.in_features, generator=generator).to(dtype)
            layer(inputs * torch.tensor(factor, dtype=dtype))
        run.controller._state.steps = 1
        ranks = run.controller.step().ranks
        changes.append((ranks, [layer.adapter_weight("default").float() for layer in run.layers.values()]))
    assert changes[0][0] == changes[1][0]
    assert any(1 < after < before for before, after in changes[0][0].values())
    assert_close(*(weights for _, weights in changes), rtol=0, atol={torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_subnormal_singular_values_are_compared_with_the_cutoff_exactly(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([3 * smallest, smallest, 0.0], dtype=torch.float64).to(dtype)
    assert [int(count_above(values, cutoff)) for cutoff in (0.1, 0.3, 0.5)] == [2, 2, 1]


# ---- decompositions that fail ----------------------------------------------------------------------------------------


def refuse(*args: object, **kwargs: object) -> None:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def product(found: SVD) -> Tensor:
    return (found.u * found.s) @ found.vh


@pytest.mark.parametrize("failing", ["eigh", "qr"])
@pytest.mark.parametrize("shape", [(160, 140), (140, 160)], ids=str)
def test_the_fast_route_for_few_directions_hands_on_and_says_so(failing, shape, monkeypatch):
    weight = torch.randn(shape, dtype=torch.float64)
    expected = torch.linalg.svdvals(weight)[:20]
    monkeypatch.setattr(torch.linalg, failing, refuse)
    with pytest.warns(
        UserWarning, match=r"The fast decomposition of `encoder\.dense` did not converge; computing its SVD"
    ):
        found = leading_svd(weight, 20, "encoder.dense")
    assert_close(found.s, expected)
    assert_close(found.u.mT @ weight @ found.vh.mT, torch.diag(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(160, 140), (140, 160)], ids=str)
def test_the_polar_route_hands_on_and_says_so(shape, monkeypatch):
    weight = torch.randn(shape, dtype=torch.float64)
    basis, _ = polar_iteration(weight)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    for decompose in (svd_by_polar, lambda weight, name: Decomposition(name, weight, basis).svd()):
        with pytest.warns(UserWarning, match="The fast decomposition of `dense` did not converge"):
            found = decompose(weight, "dense")
        assert_close(product(found), weight)


def test_every_route_but_the_last_may_fail(monkeypatch):
    weight = torch.randn(160, 140, dtype=torch.float64)
    expected = torch.linalg.svdvals(weight)[:20]
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = leading_svd(weight, 20, "dense")
    said = [str(warning.message) for warning in caught]
    assert [re.match(r"The (\w+).* of `dense` did not converge", message)[1] for message in said] == ["fast", "SVD"]
    assert_close(found.s, expected)


@pytest.mark.parametrize("phase", PHASES)
def test_a_check_whose_decompositions_fail_falls_back_and_says_so_for_every_layer(phase, monkeypatch):
    run, expected = Run(phase, cutoff=0.0), Run(phase, cutoff=0.0)
    for each in (run, expected):
        each.optimize()
    expected.controller.step()
    with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patched.setattr(torch.linalg, "svd", refuse)
        update = run.controller.step()
    said = {str(warning.message).partition("`")[2].partition("`")[0] for warning in caught}
    assert said == set(NAMES)
    assert update.ranks == expected.controller.history[-1].ranks
    assert update.frozen == expected.controller.history[-1].frozen
    for name, layer in run.layers.items():
        assert_close(layer.adapter_weight("default"), expected.layers[name].adapter_weight("default"))
    for name, basis in run.controller.state_dict()["bases"].items():
        assert_close(basis, expected.controller.state_dict()["bases"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("phase", PHASES)
def test_a_check_in_which_everything_fails_names_the_module_and_leaves_every_layer_sound(phase, monkeypatch):
    run = Run(phase)
    run.optimize()
    weights = {name: layer.adapter_weight("default").clone() for name, layer in run.layers.items()}
    calls = []

    def fail_for_the_second(matrix: Tensor, name: str) -> SVD:
        calls.append(name)
        return thin_svd(matrix * math.nan if name == "2" else matrix, name)

    thin_svd = routes.thin_svd
    monkeypatch.setattr(routes, "thin_svd", fail_for_the_second)
    with (
        pytest.warns(UserWarning, match="The SVD of `2` did not converge"),
        pytest.raises(torch.linalg.LinAlgError, match="Neither the SVD of `2` nor that of its Gram matrix"),
    ):
        run.controller.step()
    monkeypatch.undo()
    assert "2" in calls
    assert is_finite(run)
    assert_close(run.layers["2"].adapter_weight("default"), weights["2"], rtol=0, atol=0)
    run.train(4)
    assert is_finite(run)


def test_a_core_that_its_dtype_cannot_hold_stops_the_check_by_name():
    run = Run("factored")
    run.model.to(torch.float16)
    run.controller = OIALRController(run.model, run.optimizer, total_steps=100)
    run.controller._state.steps = 1
    with torch.no_grad():
        run.parameter("2").fill_(4e4)
    with pytest.raises(ValueError, match=r"The largest singular value of `2` is .* too large for torch\.float16"):
        run.controller.step()
    assert bool(torch.isfinite(run.parameter("2")).all())


# ---- gradient scaling ------------------------------------------------------------------------------------------------


def scaled_run(fused: bool, wrapped: bool) -> tuple[OIALRController, list[bool]]:
    """Twelve steps of which the first overflow; the controller, and for each step whether it was skipped."""
    torch.manual_seed(0)
    config = OIALRConfig(mode="replace", target_modules=["0"], freeze_when="delay", delay=2, update_every=2)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100, backoff_factor=2.0**-6)
    if wrapped:
        Accelerator(cpu=True)  # its optimizer asks it whether gradients are being accumulated
    optimizer = AcceleratedOptimizer(plain, scaler=scaler) if wrapped else plain
    controller = OIALRController(model, optimizer, total_steps=12)
    skipped = []
    for _ in range(12):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.scale((model(torch.randn(8, 4)) * 1e3).square().mean()).backward()
        if wrapped:
            optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        skipped.append(all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)))
        # the documented loop leaves the call out; a fused optimizer and Accelerate need not be asked
        if wrapped or fused or scaler.get_scale() >= scale:
            controller.step()
    return controller, skipped


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_steps_that_overflow_do_not_move_the_schedule(fused, wrapped):
    controller, skipped = scaled_run(fused, wrapped)
    assert 2 <= sum(skipped) <= 8
    assert controller.steps == 12 - sum(skipped)
    assert [update.step for update in controller.history] == list(range(2, controller.steps + 1, 2))
    assert not not_finite(dict(controller.model.named_parameters()))


# ---- thousands of updates --------------------------------------------------------------------------------------------

# largest entry of UᵀU − I and VᵀV − I; then, relative to ‖W‖_F, what one update changes of W, and what n do together
BOUNDS = {
    torch.float32: (1e-6, 2e-6, lambda n: 2e-7 * n),
    torch.bfloat16: (2**-7, 2**-7, lambda n: 2**-7 * math.sqrt(n)),
}


def random_walk(dtype: torch.dtype, updates: int) -> tuple[float, float, float]:
    """Errors of a layer (24, 16) whose core moves by about 1 % before each Σ update.

    Returns:
        The largest deviation of a basis from orthonormality, the largest change of W by one update, and the distance of W
        from the sum of its movements in float64 after all updates; the last two relative to ‖W‖_F.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24, bias=False, dtype=dtype))
    config = OIALRConfig(mode="replace", target_modules=["0"], freeze_when="delay", delay=0, update_every=1, cutoff=0.0)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = adapter_layers(model)["0"]
    optimizer = torch.optim.SGD([layer.oialr_sigma["default"]], lr=1.0)
    controller = OIALRController(model, optimizer, total_steps=updates)

    def weight() -> Tensor:
        u, sigma, vh = (factor.double() for factor in layer.factors("default"))
        return u @ sigma @ vh

    exact = weight()
    length = exact.norm()
    orthonormality = changed = 0.0
    for _ in range(updates):
        before = weight()
        sigma = layer.oialr_sigma["default"]
        # back to the length of the start, or the walk would leave
        target = sigma.detach().double() + 0.01 * length * torch.randn(16, 16, dtype=torch.float64) / 16
        sigma.grad = (sigma.detach() - target * (length / target.norm())).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        moved = weight()
        exact += moved - before
        controller.step()
        changed = max(changed, float((weight() - moved).norm() / length))
        u, _, vh = (factor.double() for factor in layer.factors("default"))
        for gram in (u.mT @ u, vh @ vh.mT):
            orthonormality = max(orthonormality, float((gram - torch.eye(16, dtype=torch.float64)).abs().max()))
    assert len(controller.history) == updates
    return orthonormality, changed, float((weight() - exact).norm() / length)


def check_random_walk(dtype: torch.dtype, updates: int) -> None:
    orthonormality, changed, drift = random_walk(dtype, updates)
    of_bases, of_one, of_all = BOUNDS[dtype]
    assert orthonormality <= of_bases
    assert changed <= of_one
    assert drift <= of_all(updates)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_updates_keep_bases_orthonormal_and_the_weight(dtype):
    check_random_walk(dtype, 150)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_five_thousand_updates_keep_bases_orthonormal_and_the_weight(dtype):
    check_random_walk(dtype, 5000)
