"""One adapter layer: what it computes in each phase, how it changes phase, and how it merges and comes apart again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from oialr_peft import Factors, OIALRConfig, factorize
from oialr_peft.tuner.layer import OIALRLinear

pytestmark = pytest.mark.usefixtures("float64")

DENSE = {}
FACTORED = {"freeze_when": "delay", "delay": 0}
RESIDUAL = {"mode": "adapter"}
MODES = {"dense": DENSE, "factored": FACTORED, "residual": RESIDUAL}


def linear(m: int, n: int) -> nn.Linear:
    return nn.Linear(n, m)


def conv1d(m: int, n: int) -> Conv1D:
    layer = Conv1D(m, n)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def matrix(base: nn.Module) -> Tensor:
    """The (out, in) weight of a base layer."""
    return (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()


def adapted(base: nn.Module, **adapters: dict) -> OIALRLinear:
    """A layer with these adapters, of which the first one is active."""
    layer = OIALRLinear(base, "layer")
    for name, fields in adapters.items():
        layer.add_adapter(name, OIALRConfig(**{"mode": "replace", **fields}))
    layer.set_adapter(next(iter(adapters)))
    return layer


def train(layer: OIALRLinear, *names: str) -> None:
    """Moves the adapters away from where they started."""
    with torch.no_grad():
        for name in names or ["default"]:
            parameter = layer.trained_parameter(name)
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


@pytest.fixture(params=[linear, conv1d], ids=["Linear", "Conv1D"])
def make_base(request):
    return request.param


@pytest.fixture(params=[(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)], ids=str)
def base(request, make_base):
    return make_base(*request.param)


@pytest.fixture
def x(base):
    return torch.randn(3, 2, matrix(base).shape[1])


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    return request.param


# ---- creation --------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_does_not_change_the_output(base, x, mode):
    expected = base(x)
    assert_close(adapted(base, default=mode)(x), expected)


def test_a_fresh_adapter_without_its_initialization_changes_the_output(base, x, mode):
    expected = base(x)
    assert not torch.allclose(adapted(base, default={**mode, "init_weights": False})(x), expected)


def test_the_base_weight_is_not_changed_by_training_the_adapter(base, mode):
    before = matrix(base)
    layer = adapted(base, default=mode)
    train(layer)
    assert torch.equal(matrix(base), before)


def test_phase_and_rank_are_those_of_the_mode(base, mode):
    layer = adapted(base, default=mode)
    k = min(matrix(base).shape)
    assert layer.is_dense("default") == (mode is DENSE)
    assert layer.rank("default") == k
    trained = layer.trained_parameter("default")
    assert trained.shape == (matrix(base).shape if mode is DENSE else (k, k))
    assert [p for p in layer.parameters() if p.requires_grad and p is not base.weight and p is not base.bias] == [
        trained
    ]


@pytest.mark.parametrize("rank", [2, 0.4, 100])
def test_the_rank_bounds_that_of_a_factored_layer(make_base, rank):
    layer = adapted(make_base(7, 5), default={**FACTORED, "rank": rank})
    expected = {2: 2, 0.4: 2, 100: 5}[rank]
    assert layer.rank("default") == layer.full_rank["default"] == expected
    assert_close(layer.adapter_weight("default"), factorize(matrix(layer.base_layer), rank=expected).weight())


def test_rank_pattern_sets_the_rank_by_full_name(make_base):
    base = make_base(7, 5)
    layer = adapted(base, default={**FACTORED, "rank_pattern": {"layer": 3}})
    other = OIALRLinear(base, "another.layer")
    other.add_adapter("default", OIALRConfig(**{"mode": "replace", **FACTORED}, rank_pattern={"layer": 3}))
    assert (layer.rank("default"), other.rank("default")) == (3, 5)


def test_residual_factors_start_at_zero_in_the_bases_of_the_base_weight(base):
    layer = adapted(base, default=RESIDUAL)
    factors = layer.factors("default")
    assert not factors.sigma.any()
    reference = factorize(matrix(base))
    assert_close((factors.u, factors.vh), (reference.u, reference.vh))


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(3, 4, 1), nn.LayerNorm(4), nn.Bilinear(2, 3, 4)],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_refused_by_name(module):
    with pytest.raises(ValueError, match=rf"`encoder\.x` is a {type(module).__name__}\. Leave it out, or list it in"):
        OIALRLinear(module, "encoder.x")


def test_an_embedding_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"`encoder\.x` is a Embedding\. Its rows are looked up, not multiplied\. Leave"
    ):
        OIALRLinear(nn.Embedding(3, 4), "encoder.x")


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (12,)], ids=str)
def test_a_weight_that_is_not_a_floating_matrix_is_refused(shape):
    base = linear(4, 3)
    base.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    base.out_features, base.in_features = 4, 3
    with pytest.raises(
        ValueError, match=r"`encoder\.x` must be floating-point and \(4, 3\), but has dtype torch\.uint8"
    ):
        OIALRLinear(base, "encoder.x").add_adapter("default", OIALRConfig(mode="replace"))


def test_nan_in_the_base_weight_is_refused_with_the_name_of_the_layer():
    base = linear(4, 3)
    nn.init.constant_(base.weight, torch.nan)
    with pytest.raises(ValueError, match="`layer` holds NaN or Inf"):
        adapted(base, default=FACTORED)


def test_the_representation_shows_phase_and_rank():
    text = repr(adapted(linear(7, 5), default=DENSE, other={**FACTORED, "rank": 2}))
    assert "default: dense, other: rank 2" in text


# ---- training --------------------------------------------------------------------------------------------------------


def test_only_the_trained_matrix_and_the_input_get_gradients(base, x, mode):
    layer = adapted(base, default=mode)
    base.requires_grad_(False)
    layer(x.requires_grad_()).square().sum().backward()
    with_gradient = [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["oialr_weight.default" if mode is DENSE else "oialr_sigma.default"]
    assert x.grad is not None


def test_the_gradient_is_that_of_the_weight_it_stands_for(base, x, mode):
    layer = adapted(base, default=mode)
    train(layer)
    upstream = torch.randn_like(layer(x))
    (gradient,) = torch.autograd.grad(layer(x), layer.trained_parameter("default"), upstream)
    dense = upstream.flatten(0, -2).T @ x.flatten(0, -2)
    if not layer.is_dense("default"):
        factors = layer.factors("default")
        dense = factors.u.T @ dense @ factors.vh.T
    assert_close(gradient, dense)


def test_the_bias_of_the_base_layer_is_trained_when_it_asks_for_it(base, x, mode):
    layer = adapted(base, default=mode)
    layer(x).sum().backward()
    assert_close(base.bias.grad, torch.full_like(base.bias, x.numel() / x.shape[-1]))


def test_a_layer_without_bias_works(mode):
    base = nn.Linear(5, 4, bias=False)
    x = torch.randn(3, 5)
    assert_close(adapted(base, default=mode)(x), base(x))


# ---- change of phase -------------------------------------------------------------------------------------------------


def test_set_factors_ends_the_dense_phase_without_changing_the_output(base, x):
    layer = adapted(base, default=DENSE)
    train(layer)
    expected = layer(x)
    dense = layer.trained_parameter("default")
    sigma = layer.set_factors("default", factorize(layer.adapter_weight("default")))
    assert not layer.is_dense("default")
    assert sigma is layer.trained_parameter("default")
    assert sigma is not dense
    assert_close(layer(x), expected)
    assert dense.shape == matrix(base).shape  # an alive graph may still need it


def test_a_smaller_rank_makes_new_parameters_and_leaves_the_old_ones_alone():
    layer = adapted(linear(7, 5), default=FACTORED)
    old = layer.trained_parameter("default")
    x = torch.randn(3, 5)
    loss = layer(x).square().sum()
    layer.set_factors("default", factorize(layer.adapter_weight("default"), rank=2))
    loss.backward()
    assert old.grad.shape == (5, 5)
    assert layer.trained_parameter("default").shape == (2, 2)


def test_an_equal_rank_keeps_the_parameter_object():
    layer = adapted(linear(7, 5), default=FACTORED)
    old = layer.trained_parameter("default")
    assert layer.set_factors("default", factorize(torch.randn(7, 5))) is old


@pytest.mark.parametrize("trains", [False, True])
def test_a_change_of_phase_keeps_whether_the_layer_trains(trains):
    layer = adapted(linear(7, 5), default=DENSE)
    layer.trained_parameter("default").requires_grad_(trains)
    assert layer.set_factors("default", factorize(torch.randn(7, 5))).requires_grad is trains
    assert layer.set_factors("default", factorize(torch.randn(7, 5), rank=2)).requires_grad is trains
    assert layer.set_dense("default", torch.randn(7, 5)).requires_grad is trains
    assert not any(parameter.requires_grad for parameter in (*layer.oialr_u.values(), *layer.oialr_vh.values()))


def test_set_dense_returns_to_the_dense_phase(base, x):
    layer = adapted(base, default=FACTORED)
    weight = torch.randn(matrix(base).shape)
    layer.set_dense("default", weight)
    assert layer.is_dense("default")
    assert "default" not in layer.oialr_u
    assert_close(layer(x), x @ weight.T + base.bias)


def test_masked_factors_keep_their_size_and_train_only_their_rank():
    layer = adapted(linear(7, 5), default=FACTORED)
    weight = torch.randn(7, 5)
    cut = factorize(weight, rank=2)
    old = layer.trained_parameter("default")
    sigma = layer.set_factors("default", cut, size=5)
    assert sigma is old
    assert sigma.shape == (5, 5)
    assert layer.rank("default") == 2
    assert_close(layer.factors("default"), cut)
    x = torch.randn(3, 5)
    assert_close(layer(x), x @ cut.weight().T + layer.base_layer.bias)
    layer(x).square().sum().backward()
    assert sigma.grad[:2, :2].all()
    assert not sigma.grad[2:].any()
    assert not sigma.grad[:, 2:].any()


def test_factors_of_another_dtype_are_cast_to_the_one_that_trains():
    layer = adapted(linear(7, 5), default=FACTORED)
    layer.set_factors("default", Factors(*(factor.float() for factor in factorize(torch.randn(7, 5), rank=3))))
    assert {tensor.dtype for tensor in layer.factors("default")} == {torch.float64}


# ---- several adapters ------------------------------------------------------------------------------------------------

PAIRS = [(first, second) for first in MODES for second in MODES]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_active_adapters_add_their_changes(make_base, names):
    base = make_base(7, 5)
    x = torch.randn(4, 5)
    layer = adapted(base, a=MODES[names[0]], b=MODES[names[1]])
    train(layer, "a", "b")
    weight = matrix(base)
    for name in "ab":
        delta = layer.get_delta_weight(name)
        weight = weight + (delta.T if isinstance(base, Conv1D) else delta)
    layer.set_adapter(["a", "b"])
    assert_close(layer(x), x @ weight.T + base.bias)
    layer.set_adapter(["b", "a"])
    assert_close(layer(x), x @ weight.T + base.bias)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_merged_adapters_equal_two_active_ones(make_base, names):
    base = make_base(7, 5)
    x = torch.randn(4, 5)
    layer = adapted(base, a=MODES[names[0]], b=MODES[names[1]])
    train(layer, "a", "b")
    layer.set_adapter(["a", "b"])
    expected = layer(x)
    before = base.weight.detach().clone()
    layer.merge()
    assert layer.merged_adapters == ["a", "b"]
    assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(base.weight, before)
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="You are now additionally merging b"):
        layer.merge(adapter_names=["b"])
    assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_switching_adapters_switches_the_output_and_what_trains(base, x):
    layer = adapted(base, a=DENSE, b=FACTORED, c=RESIDUAL)
    train(layer, "a", "b", "c")
    outputs = {}
    for name in "abc":
        layer.set_adapter(name)
        outputs[name] = layer(x)
        assert [n for n in "abc" if layer.trained_parameter(n).requires_grad] == [name]
        assert not any(p.requires_grad for p in (*layer.oialr_u.values(), *layer.oialr_vh.values()))
    for first, second in ("ab", "ac", "bc"):
        assert not torch.allclose(outputs[first], outputs[second])


def test_disabled_adapters_give_the_base_output(base, x, mode):
    expected = base(x)
    layer = adapted(base, default=mode)
    train(layer)
    layer.enable_adapters(False)
    assert_close(layer(x), expected, rtol=0, atol=0)
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), expected)


def test_disabling_a_merged_layer_unmerges_it(base, x, mode):
    expected = base(x)
    layer = adapted(base, default=mode)
    train(layer)
    layer.merge()
    layer.enable_adapters(False)
    assert not layer.merged
    assert_close(layer(x), expected, rtol=0, atol=0)


def test_a_deleted_adapter_leaves_nothing_behind(base, x):
    layer = adapted(base, a=DENSE, b=FACTORED)
    train(layer, "a", "b")
    layer.set_adapter("b")
    expected = layer(x)
    layer.set_adapter("a")
    with pytest.warns(UserWarning, match="a was active which is now deleted"):
        layer.delete_adapter("a")
    layer.set_adapter("b")
    assert_close(layer(x), expected)
    assert not [name for name in layer.state_dict() if name.endswith(".a")]
    for attribute in OIALRLinear.other_param_names + OIALRLinear.adapter_layer_names:
        assert "a" not in getattr(layer, attribute)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_equals_unmerged(base, x, mode, safe_merge):
    layer = adapted(base, default=mode)
    train(layer)
    expected = layer(x)
    layer.merge(safe_merge=safe_merge)
    assert layer.merged
    assert_close(layer(x), expected)
    assert_close(base(x), expected)
    assert base.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unmerging_restores_the_base_weight_bit_for_bit(base, mode, dtype):
    base = base.to(dtype)
    before = base.weight.detach().clone()
    parameter = base.weight
    layer = adapted(base, default=mode)
    train(layer)
    for _ in range(3):
        layer.merge()
        assert base.weight.dtype == dtype
        assert not torch.equal(base.weight, before)
        layer.unmerge()
        assert torch.equal(base.weight, before)
        assert base.weight is parameter
        assert base.weight.stride() == before.stride()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_safe_merge_refuses_broken_weights_and_leaves_the_base_unchanged(base, mode, value):
    layer = adapted(base, default=mode)
    before = base.weight.detach().clone()
    with torch.no_grad():
        layer.trained_parameter("default")[0, 0] = value
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default .* `layer`"):
        layer.merge(safe_merge=True)
    assert torch.equal(base.weight, before)
    assert not layer.merged
    layer.merge()
    assert not torch.isfinite(base.weight).all()
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_merging_does_not_share_memory_with_the_adapter(make_base):
    layer = adapted(make_base(6, 6), default=DENSE)
    train(layer)
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    train(layer)
    assert torch.equal(layer.base_layer.weight, merged)


def test_merging_twice_and_unmerging_twice_warns(mode):
    layer = adapted(linear(5, 4), default=mode)
    layer.merge()
    with pytest.warns(UserWarning, match="(?i)already merged"):
        layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        layer.unmerge()


def test_a_copy_of_a_merged_layer_unmerges_by_itself(mode):
    layer = adapted(linear(5, 4), default=mode)
    before = layer.base_layer.weight.detach().clone()
    train(layer)
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.base_layer.weight, before)
    assert not torch.equal(layer.base_layer.weight, before)


def test_a_layer_that_changes_dtype_while_merged_unmerges_in_the_new_one(mode):
    layer = adapted(linear(5, 4), default=mode)
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.to(torch.float32)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.float())
    assert layer(torch.randn(2, 4, dtype=torch.float32)).dtype == torch.float32


def test_delta_weight_has_the_layout_and_dtype_of_the_base(base, mode):
    layer = adapted(base.to(torch.bfloat16), default=mode).to(torch.bfloat16)
    train(layer)
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    assert delta.dtype == torch.bfloat16


def test_the_delta_weight_of_a_merged_layer_refers_to_the_original_weight(base, mode):
    layer = adapted(base, default=mode)
    train(layer)
    expected = layer.get_delta_weight("default")
    layer.merge()
    assert_close(layer.get_delta_weight("default"), expected)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_dtype_of_the_input(base, mode, dtype):
    base = base.to(dtype)
    x = torch.randn(3, matrix(base).shape[1]).to(dtype)
    layer = adapted(base, default=mode)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert layer(x).dtype == dtype
    assert_close(layer(x), base(x), atol=tolerance, rtol=tolerance)
    # an adapter in float32 on a narrow base
    for container in (layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh):
        container.to(torch.float32)
    assert layer(x).dtype == dtype
    assert_close(layer(x), base(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_dtype_of_the_output(mode, dtype):
    base = linear(5, 4).float()
    x = torch.randn(3, 4, dtype=torch.float32)
    layer = adapted(base, default=mode)
    with torch.autocast("cpu", dtype=dtype):
        output, expected = layer(x), base(x)
    assert output.dtype == expected.dtype == dtype
    assert_close(output, expected, atol=0.1, rtol=0.1)


# ---- without the base weight -----------------------------------------------------------------------------------------


@pytest.fixture
def released(make_base):
    layer = adapted(make_base(7, 5), default={"mode": "pretraining"})
    train(layer)
    return layer


def test_pretraining_takes_over_the_memory_of_the_base_weight():
    base = linear(7, 5)
    pointer, before = base.weight.data_ptr(), matrix(base)
    layer = adapted(base, default={"mode": "pretraining"})
    assert layer.base_released
    assert base.weight.numel() == 0
    assert layer.trained_parameter("default").data_ptr() == pointer
    assert torch.equal(layer.adapter_weight("default"), before)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 7 * 5 + 7


def test_without_the_base_weight_the_adapter_still_computes_and_merges(released):
    x = torch.randn(3, 5)
    expected = released(x)
    assert_close(expected, x @ released.adapter_weight("default").T + released.base_layer.bias)
    released.merge(safe_merge=True)
    assert_close(released(x), expected)
    assert_close(released.base_layer(x), expected)
    released.unmerge()
    assert released.base_layer.weight.numel() == 0
    assert_close(released(x), expected)


def test_what_needs_the_base_weight_says_that_it_was_released(released):
    with pytest.raises(RuntimeError, match=r"cannot be disabled: the base weights were released\. To compare"):
        released.enable_adapters(False)
    with pytest.raises(RuntimeError, match=r"`layer` has no base weight to compare with: .* Use `merge_and_unload`"):
        released.get_delta_weight("default")
    with pytest.raises(
        ValueError, match=r"`layer` was released by `mode=.pretraining.`, so no second adapter fits\. Load"
    ):
        released.add_adapter("second", OIALRConfig(mode="replace"))
    assert not released.supports_lora_conversion()


# ---- loading ---------------------------------------------------------------------------------------------------------


def checkpoint(m: int, n: int, rank: int | None) -> dict[str, Tensor]:
    if rank is None:
        return {"oialr_weight": torch.randn(m, n)}
    factors = factorize(torch.randn(m, n), rank=rank)
    return {"oialr_u": factors.u, "oialr_sigma": factors.sigma, "oialr_vh": factors.vh}


@pytest.mark.parametrize("rank", [None, 1, 3, 5])
def test_a_layer_takes_phase_and_rank_of_any_state_dict(make_base, mode, rank):
    layer = adapted(make_base(7, 5), default=mode)
    tensors = checkpoint(7, 5, rank)
    layer.load_state_dict({f"{name}.default": tensor for name, tensor in tensors.items()}, strict=False)
    assert layer.is_dense("default") == (rank is None)
    assert layer.rank("default") == (rank or 5)
    weight = tensors["oialr_weight"] if rank is None else Factors(*tensors.values()).weight()
    assert_close(layer.adapter_weight("default"), weight)
    assert layer.trained_parameter("default").requires_grad


BAD_CHECKPOINTS = {
    "dense of another shape": {"oialr_weight": (5, 7)},
    "dense of another rank": {"oialr_weight": (7,)},
    "both phases": {"oialr_weight": (7, 5), "oialr_sigma": (5, 5)},
    "sigma alone": {"oialr_sigma": (3, 3)},
    "bases without sigma": {"oialr_u": (7, 3), "oialr_vh": (3, 5)},
    "sigma not square": {"oialr_u": (7, 3), "oialr_sigma": (3, 2), "oialr_vh": (3, 5)},
    "ranks that differ": {"oialr_u": (7, 2), "oialr_sigma": (3, 3), "oialr_vh": (3, 5)},
    "another input width": {"oialr_u": (7, 3), "oialr_sigma": (3, 3), "oialr_vh": (3, 4)},
    "rank above the full one": {"oialr_u": (7, 6), "oialr_sigma": (6, 6), "oialr_vh": (6, 5)},
    "rank zero": {"oialr_u": (7, 0), "oialr_sigma": (0, 0), "oialr_vh": (0, 5)},
    "sigma a vector": {"oialr_u": (7, 3), "oialr_sigma": (3,), "oialr_vh": (3, 5)},
}


@pytest.mark.parametrize("shapes", BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(make_base, mode, shapes):
    layer = adapted(make_base(7, 5), default=mode)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = {f"{name}.default": torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"The checkpoint does not fit `layer`, a layer of 7×5: it holds \{.*damaged"):
        layer.load_state_dict(state, strict=False)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("fields", [FACTORED, RESIDUAL], ids=["factored", "residual"])
def test_a_start_that_differs_from_the_base_does_not_depend_on_the_signs_of_singular_vectors(fields):
    """Processors give a pair of singular vectors either sign; a model made with a seed is the same on each of them."""
    base = linear(6, 4)
    factors = factorize(base.weight.detach(), rank=3)
    signs = torch.tensor([1.0, -1.0, -1.0])
    turned = factors._replace(u=factors.u * signs, vh=signs[:, None] * factors.vh)
    layer = OIALRLinear(base, "layer")
    for name, given in (("as found", factors), ("turned", turned)):
        torch.manual_seed(3)
        layer.add_adapter(name, OIALRConfig(**{"mode": "replace", **fields, "rank": 3}, init_weights=False), given)
    assert_close(layer.adapter_weight("turned"), layer.adapter_weight("as found"))
    assert not torch.allclose(layer.adapter_weight("turned"), factors.weight(), atol=0.01)
