"""What training keeps in memory between forward and backward: bytes counted exactly, parameters left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg.ops import build, build_cost, built_cost, cheapest_route, fold, narrow_cost, wide_cost
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import adapter_layers

TOKENS, M, N, RANK = 40, 24, 16, 3
FACTORED = {"freeze_when": "delay", "delay": 0, "update_every": 100}
MODES = {"replace": FACTORED, "residual": {"mode": "adapter", "update_every": 100}}
FLOAT, HALF = 4, 2  # bytes


def stored(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Saved:
    """Tensors that autograd keeps while this is active, each storage once, parameters of `model` left out."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {stored(parameter) for parameter in model.parameters()}
        self.tensors: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if stored(tensor) not in self.parameters:
            self.tensors[stored(tensor)] = tensor
        return tensor

    def __enter__(self) -> Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def linear(m: int, n: int, bias: bool) -> nn.Module:
    return nn.Linear(n, m, bias=bias)


def conv1d(m: int, n: int, bias: bool) -> nn.Module:
    return Conv1D(m, n)


def adapted(base: nn.Module, rank: int = RANK, **settings) -> tuple[nn.Module, OIALRLinear]:
    """A model of one factored layer, with a controller, so that products are kept; and that layer."""
    config = OIALRConfig(target_modules=["0"], rank=rank, init_weights=False, **{"mode": "replace", **settings})
    model = get_peft_model(nn.Sequential(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    OIALRController(model, optimizer, total_steps=1000)
    return model, model.base_model.model[0]


def saved_by(model: nn.Module, x: Tensor) -> tuple[Saved, Tensor]:
    with Saved(model) as saved:
        output = model(x)
    return saved, output


# ---- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_needs_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [linear, conv1d], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("mode", MODES)
def test_the_chain_keeps_the_narrow_activation_alone(mode, make, bias, x_needs_gradient):
    model, layer = adapted(make(M, N, bias), **MODES[mode])
    if bias:
        layer.base_layer.bias.requires_grad_()
    x = torch.randn(2, TOKENS // 2, N).requires_grad_(x_needs_gradient)
    assert cheapest_route(M, N, RANK, TOKENS) == "chain"
    saved, _ = saved_by(model, x)
    assert saved.bytes == TOKENS * RANK * FLOAT
    assert stored(x) not in saved.tensors


@pytest.mark.parametrize("x_needs_gradient", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_the_folded_route_keeps_the_narrow_activation_and_one_product(shape, x_needs_gradient):
    (m, n), rank, tokens = shape, 12, 2000
    model, layer = adapted(linear(m, n, True), rank, **FACTORED)
    assert cheapest_route(m, n, rank, tokens) == "folded"
    saved, _ = saved_by(model, torch.randn(tokens, n).requires_grad_(x_needs_gradient))
    # folded into U, the product serves the forward pass alone; folded into Vᵀ, the gradient of x needs it
    product = n * rank if m > n and x_needs_gradient else 0
    assert saved.bytes == (tokens * rank + product) * FLOAT
    assert {stored(tensor) for tensor in saved.tensors.values() if tensor.shape[0] != tokens} <= {
        stored(tensor) for _, product in layer._products.values() for tensor in product
    }


@pytest.mark.parametrize("x_needs_gradient", [False, True])
def test_the_built_route_keeps_the_input_itself_as_a_dense_layer_does(x_needs_gradient):
    m, n, rank, tokens = 24, 24, 24, 2000
    assert cheapest_route(m, n, rank, tokens) == "built"
    model, _ = adapted(linear(m, n, True), rank, **FACTORED)
    x = torch.randn(tokens, n).requires_grad_(x_needs_gradient)
    saved, _ = saved_by(model, x)
    assert saved.bytes == (tokens * n + m * n * x_needs_gradient) * FLOAT
    assert stored(x) in saved.tensors


@pytest.mark.parametrize("shape", [(24, 24), (24, 36), (48, 12)], ids=str)
def test_where_the_built_route_is_cheapest_so_is_the_gradient_from_the_weight(shape):
    """The narrow side of `built_linear` would save memory, but some other route is then cheaper."""
    for rank, tokens in itertools.product(range(1, min(shape) + 1), (10, 30, 100, 1000, 100_000)):
        if cheapest_route(*shape, rank, tokens) == "built":
            assert wide_cost(*shape, rank, tokens) < narrow_cost(*shape, rank, tokens)


def test_a_frozen_adapter_keeps_no_activation():
    model, _ = adapted(linear(M, N, True), **FACTORED)
    model.requires_grad_(False)
    saved, output = saved_by(model, torch.randn(TOKENS, N).requires_grad_())
    assert output.requires_grad
    assert all(TOKENS not in tensor.shape for tensor in saved.tensors.values())


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_keeps_narrow_activations_in_half_and_the_cast_factors_once(mode, calls):
    model, layer = adapted(linear(M, N, True), **MODES[mode])
    x = torch.randn(TOKENS, N).requires_grad_()
    with Saved(model) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model(x) for _ in range(calls)]
    activations = calls * TOKENS * RANK
    cores = calls * RANK**2
    bases = (M + N) * RANK
    # a frozen nn.Linear casts its weight in every call
    of_the_base = calls * M * N if mode == "residual" else 0
    assert saved.bytes == (activations + cores + bases + of_the_base) * HALF
    assert layer.oialr_sigma["default"].dtype == torch.float32
    assert outputs[0].dtype == torch.bfloat16


def test_without_a_controller_autocast_casts_the_factors_in_every_call():
    model, layer = adapted(linear(M, N, True), **FACTORED)
    layer.controlled.clear()
    x = torch.randn(TOKENS, N).requires_grad_()
    with Saved(model) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            model(x)
    assert saved.bytes == 2 * (TOKENS * RANK + RANK**2 + (M + N) * RANK) * HALF


@pytest.mark.parametrize(("rank", "route"), [(12, "folded"), (24, "built")])
def test_autocast_keeps_each_product_once(rank, route):
    m, n, tokens = 24, 24, 2000
    assert cheapest_route(m, n, rank, tokens) == route
    model, _ = adapted(linear(m, n, True), rank, **FACTORED)
    x = torch.randn(tokens, n).requires_grad_()
    with Saved(model) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            model(x)
    # U and Vᵀ; folded into U: Σ as well, cast in each call; built: W
    weights = (m + n) * rank + (2 * rank**2 if route == "folded" else m * n)
    assert saved.bytes == (2 * tokens * (rank if route == "folded" else n) + weights) * HALF


def test_the_dense_phase_keeps_under_autocast_what_a_linear_layer_keeps():
    config = OIALRConfig(mode="replace", target_modules=["0"], update_every=100)
    model = get_peft_model(nn.Sequential(nn.Linear(N, M)), config)
    layer = nn.Linear(N, M)
    counts = []
    for module in (model, layer):
        x = torch.randn(TOKENS, N).requires_grad_() * 1  # autocast would keep the cast of a leaf
        with Saved(module) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                module(x)
        counts.append(saved.bytes)
    assert counts[0] == counts[1] == (2 * TOKENS * N + M * N) * HALF


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_keeps_the_input_until_the_backward_and_then_the_narrow_activation(mode, reentrant, autocast):
    model, _ = adapted(linear(M, N, True), **MODES[mode])
    x = torch.randn(TOKENS, N).requires_grad_()
    recomputed: list[Saved] = []

    def block(x: Tensor) -> Tensor:
        recomputed.append(Saved(model))
        with recomputed[-1]:
            return model(x)

    with Saved(model) as saved, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = checkpoint(block, x, use_reentrant=reentrant)
    assert set(saved.tensors) <= {stored(x)}
    # reentrant, the first pass records nothing; otherwise autograd is told to keep nothing of it
    output.float().sum().backward()
    size = HALF if autocast else FLOAT
    activations = [tensor for tensor in recomputed[-1].tensors.values() if tensor.shape[0] == TOKENS]
    assert [tensor.untyped_storage().nbytes() for tensor in activations] == [TOKENS * RANK * size]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("rank", "tokens", "route"), [(6, 40, "chain"), (12, 2000, "folded"), (24, 2000, "built")])
def test_checkpointing_gives_the_same_gradients(rank, tokens, route, reentrant):
    assert cheapest_route(24, 24, rank, tokens) == route
    model, layer = adapted(linear(24, 24, True), rank, **FACTORED)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 1, tokens * 24).reshape(tokens, 24).requires_grad_()
        run(x).square().mean().backward()
        gradients.append((x.grad, layer.oialr_sigma["default"].grad))
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1])


# ---- products are made once per optimizer step -----------------------------------------------------------------------

RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda model, x: model(x),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "checkpointed, reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("rank", "route"), [(12, "folded"), (24, "built")])
def test_a_product_is_made_once_per_optimizer_step(rank, route, run, autocast, monkeypatch):
    tokens = 2000
    assert cheapest_route(24, 24, rank, tokens) == route
    config = OIALRConfig(target_modules=["0"], rank=rank, **{"mode": "replace", **FACTORED})
    model = get_peft_model(nn.Sequential(nn.Linear(24, 24)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    controller = OIALRController(model, optimizer, total_steps=1000)
    made: list[str] = []
    monkeypatch.setattr("oialr_peft.tuner.layer.fold", lambda factors: made.append("folded") or fold(factors))
    monkeypatch.setattr("oialr_peft.tuner.layer.build", lambda factors: made.append("built") or build(factors))
    x = torch.randn(tokens, 24).requires_grad_()
    for step in range(1, 4):
        for _ in range(3):  # micro-batches
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = RUNS[run](model, x)
            output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        assert made == step * [route]


def test_a_step_of_several_micro_batches_costs_what_the_cost_model_says():
    m, n, rank, tokens, batches = 24, 24, 24, 2000, 3
    model, _ = adapted(linear(m, n, True), rank, **FACTORED)
    x = torch.randn(tokens, n).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        for _ in range(batches):
            model(x).square().mean().backward()
    built_once = batches * (built_cost(m, n, rank, tokens) - build_cost(m, n, rank)) + build_cost(m, n, rank)
    assert counter.get_total_flops() // 2 == built_once


# ---- a transformer ---------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_in_a_transformer_each_layer_adds_its_narrow_activation(mode, autocast):
    """Against the same model with Σ frozen too, where no layer needs an activation of its own."""
    ids = torch.randint(0, 50, (2, 10))
    tokens, rank, size = 20, 4, HALF if autocast else FLOAT
    base = llama().requires_grad_(False)
    model = get_peft_model(base, OIALRConfig(rank=rank, **{"mode": "replace", **MODES[mode]}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    OIALRController(model, optimizer, total_steps=1000)
    model.enable_input_require_grads()
    layers = adapter_layers(model)
    assert len(layers) == 14
    assert all(cheapest_route(each.out_features, each.in_features, rank, tokens) == "chain" for each in layers.values())
    narrow: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        before = layer.forward

        def forward(x: Tensor, *, name: str = name, before: Callable[[Tensor], Tensor] = before) -> Tensor:
            with Saved(model) as saved:
                output = before(x)
            narrow[name] = list(saved.tensors.values())
            return output

        layer.forward = forward
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(input_ids=ids)
    for name, layer in layers.items():
        activations = [
            tensor for tensor in narrow[name] if tensor.numel() * tensor.element_size() == tokens * rank * size
        ]
        others = [tensor for tensor in narrow[name] if not any(tensor is each for each in activations)]
        assert len(activations) == 1, name
        m, n = layer.out_features, layer.in_features
        casts = [(m + n) * rank, rank**2, m * n if mode == "residual" else 0] if autocast else [0]
        assert sum(tensor.numel() for tensor in others) == sum(casts), name


def test_a_factored_transformer_keeps_less_than_a_dense_one():
    ids = torch.randint(0, 50, (2, 10))
    kept = {}
    for name, settings in (("dense", {}), ("factored", {**FACTORED, "rank": 4})):
        model = get_peft_model(llama(), OIALRConfig(mode="pretraining", **settings))
        with Saved(model) as saved:
            model(input_ids=ids)
        kept[name] = saved.bytes
    # inputs of q, k, v; of gate and up; of down. That of o is kept by the attention as well
    inputs = 2 * 20 * (32 + 32 + 48)
    narrow = 2 * 20 * 7 * 4
    assert kept["dense"] - kept["factored"] == (inputs - narrow) * FLOAT
