"""Convolutions, and what else is read as a matrix: the low-rank forms compute what the module with the full weight does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from oialr_peft import OIALRConfig, OIALRController, factorize
from oialr_peft.linalg.ops import build, fold
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.matricization import matricization_of

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = {
    "dense": {},
    "factored": {"freeze_when": "delay", "delay": 0, "rank": 3},
    "masked": {"freeze_when": "delay", "delay": 0, "rank": 3, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 3},
}


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    """A convolution of any dimension and setting, and an input for it."""
    dimensions = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, dilation = sizes(1, 3), sizes(1, 2)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.just(sizes(0, 2))))
    stride = (1,) * dimensions if padding == "same" else sizes(1, 3)
    module = CLASSES[dimensions](
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        kernel,
        stride,
        padding,
        dilation,
        padding_mode=mode,
        bias=draw(st.booleans()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 99)))
        x = torch.randn(2, module.in_channels, *sizes(5, 7))
        nn.init.normal_(module.weight)
    return module.double(), x.double()


def matrix_of(module: nn.Module) -> Tensor:
    return module.weight.detach().flatten(1)


def with_weight(module: nn.Module, matrix: Tensor) -> nn.Module:
    """A copy of the convolution with another weight."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.copy_(matrix.view_as(other.weight))
    return other


def adapted(module: nn.Module, mode: str) -> OIALRLinear:
    layer = OIALRLinear(module, "layer")
    layer.add_adapter("default", OIALRConfig(**{"mode": "replace", **MODES[mode]}, init_weights=False))
    layer.set_adapter("default")
    return layer


@settings(max_examples=150)
@given(convolutions(), st.booleans())
def test_a_low_rank_convolution_is_one_with_the_product_of_its_factors(pair, batched):
    module, x = pair
    x = x if batched else x[0]
    form = matricization_of(module)
    assert (form.m, form.n) == matrix_of(module).shape
    factors = factorize(matrix_of(module), rank=min(2, *matrix_of(module).shape))
    sigma = torch.randn_like(factors.sigma, requires_grad=True)
    factors = factors._replace(sigma=sigma)
    reference = with_weight(module, factors.weight().detach())
    x.requires_grad_()
    expected = reference(x)
    upstream = torch.randn_like(expected)
    on_x, on_weight = torch.autograd.grad(expected, (x, reference.weight), upstream)
    on_sigma = factors.u.T @ on_weight.flatten(1) @ factors.vh.T
    bias = None if module.bias is None else module.bias.detach()
    for output in (form.chain(x, factors, bias), form.built(x, factors, build(factors), bias)):
        assert_close(output, expected)
        assert_close(torch.autograd.grad(output, (x, sigma), upstream), (on_x, on_sigma))
    left, right = fold(factors)
    assert_close(form.mix(form.apply(x, right), left, bias), expected)


@settings(max_examples=100)
@given(convolutions(), st.booleans())
def test_a_convolution_is_the_product_of_its_matrix_with_the_patches(pair, batched):
    module, x = pair
    x = x if batched else x[0]
    form = matricization_of(module)
    product = form.patches(x) @ matrix_of(module).T
    assert_close(product if module.bias is None else product + module.bias, form.rows(module(x)))


@settings(max_examples=50)
@given(convolutions(), st.sampled_from(sorted(MODES)))
def test_an_adapted_convolution_computes_with_its_own_weight_and_merges(pair, mode):
    module, x = pair
    assume(min(matrix_of(module).shape) > 1)
    module.requires_grad_(False)
    layer = adapted(copy.deepcopy(module), mode)
    weight = layer.adapter_weight("default") + (matrix_of(module) if mode == "residual" else 0)
    expected = with_weight(module, weight)(x)
    assert_close(layer(x), expected)
    with torch.no_grad():
        assert_close(layer.eval()(x), expected)
    layer.merge(safe_merge=True)
    assert_close(layer.base_layer.weight, weight.view_as(module.weight))
    assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, module.weight)
    assert_close(layer.get_delta_weight("default").flatten(1), weight - matrix_of(module))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rank", [2, 8, 16])
def test_the_way_that_runs_needs_the_fewest_operations(kernel, rank):
    module = nn.Conv2d(16, 16, kernel, padding=kernel // 2).requires_grad_(False)
    form = matricization_of(module)
    factors = factorize(matrix_of(module), rank=rank)
    factors.sigma.requires_grad_()
    x = torch.randn(2, 16, 32, 32, requires_grad=True)
    counts = {}
    for way, run in {"chain": form.chain, "built": lambda *args: form.built(*args[:2], build(factors), None)}.items():
        with FlopCounterMode(display=False) as counter:
            run(x, factors, None).sum().backward()
        counts[way] = counter.get_total_flops()
    assert form.route(rank, x) == min(counts, key=counts.get)
    positions = 2 * 32 * 32
    sizes = 16 + 16 * kernel**2
    assert counts["chain"] == 2 * positions * (2 * sizes * rank + 3 * rank**2)


def test_a_low_rank_convolution_keeps_only_narrow_activations():
    module = nn.Conv2d(8, 16, 3, padding=1).requires_grad_(False)
    layer = adapted(module, "factored")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    saved = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    positions = 2 * 6 * 6
    assert positions * 8 not in saved
    assert positions * 16 not in saved
    assert positions * 3 in saved


def test_channels_last_inputs_stay_so():
    module = nn.Conv2d(8, 16, 3, padding=1).requires_grad_(False)
    layer = adapted(module, "factored").to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "depthwise"])
def test_convolutions_with_groups_are_refused_and_nothing_is_replaced(groups):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=groups))
    with pytest.raises(ValueError, match=rf"`1` is a convolution with {groups} groups; only .* `exclude_modules`"):
        get_peft_model(model, OIALRConfig(mode="replace", target_modules=["0", "1"]))
    assert type(model[0]) is nn.Conv2d


def test_a_transposed_convolution_is_refused():
    with pytest.raises(ValueError, match="`0` is a ConvTranspose2d"):
        get_peft_model(nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), OIALRConfig(mode="replace", target_modules=["0"]))


def test_convolutions_are_never_chosen_by_default():
    with pytest.raises(ValueError, match=r"Sequential has no linear layer .* convolutions are never chosen by default"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1)), OIALRConfig(mode="replace"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 3),
        lambda: Conv1D(3, 4),
        lambda: nn.Conv1d(4, 3, 2),
        lambda: nn.Conv2d(4, 3, 2, padding="same", padding_mode="circular"),
    ],
    ids=["Linear", "Conv1D", "Conv1d", "Conv2d"],
)
def test_an_empty_module_of_the_same_kind_takes_the_weight_back(make):
    module = make()
    form = matricization_of(module)
    assert form.weight_shape == module.weight.shape
    empty = form.empty(bias=True)
    empty.weight, empty.bias = module.weight, module.bias
    x = torch.randn(2, 4, *(5,) * max(0, module.weight.ndim - 2))
    assert torch.equal(form.stored(form.matrix(module.weight)), module.weight)
    assert torch.equal(empty(x), module(x))
    assert repr(empty) == repr(module)


class Images(nn.Module):
    """A small convolutional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean(dim=(2, 3)))


@pytest.mark.parametrize("mode", ["replace", "pretraining"])
def test_convolutions_train_freeze_shrink_save_and_load(tmp_path, mode):
    base = Images()
    config = OIALRConfig(mode=mode,
        target_modules=["first", "second"], freeze_when="delay", delay=4, update_every=4,
        cutoff=0.6,
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = OIALRController(model, optimizer, total_steps=16)
    x, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 3
    losses = []
    for _ in range(16):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    layers = [module for module in model.modules() if isinstance(module, OIALRLinear)]
    assert not any(layer.is_dense("default") for layer in layers)
    assert any(layer.rank("default") < 8 for layer in layers)
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(loaded(x), model(x), rtol=0, atol=1e-12)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Conv2d
    assert_close(merged(x), loaded(x))
