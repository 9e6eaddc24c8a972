"""Hostile and unlucky matrices: any shape, dtype, spectrum, scale, layout or device gives what float64 NumPy gives, or an error.

The long forms of the property tests draw more examples of the same.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

from oialr_peft import (
    Factors,
    OIALRConfig,
    OIALRController,
    factorize,
    polar_factor,
    rediagonalize,
    stability,
    truncate,
)
from oialr_peft.linalg.factors import DTYPES, rotation_of
from oialr_peft.linalg.moments import transport_state
from oialr_peft.tuner.lookup import adapter_layers

# a few rounding errors of one entry; narrow dtypes are rounded once, at the end
ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = [1, 2, 3, 5, 8, 17]
SPECTRA = ["random", "deficient", "repeated", "zero", "graded", "one huge entry", "one entry"]
SCALES = [1.0, 1e30, 1e-30, 1e-40, 1e4, 1e-7]
LAYOUTS = ["contiguous", "transposed", "strided", "offset", "expanded"]


class Hostile(NamedTuple):
    """How a matrix is made; the values follow from the seed."""

    m: int
    n: int
    dtype: torch.dtype
    spectrum: str
    scale: float
    layout: str
    seed: int

    def exact(self) -> np.ndarray:
        random = np.random.default_rng(self.seed)
        k = min(self.m, self.n)
        entries = random.standard_normal((self.m, self.n))
        if self.spectrum == "one entry" or self.layout == "expanded":
            entries[:] = entries[0, 0] if self.spectrum == "one entry" else entries[:, :1]
        elif self.spectrum == "zero":
            entries[:] = 0
        elif self.spectrum == "one huge entry":
            entries *= 1e-3
            entries[-1, 0] = 1e3
        elif self.spectrum != "random":
            u, _, vh = np.linalg.svd(entries, full_matrices=False)
            values = {
                "deficient": np.where(np.arange(k) < max(1, k // 2), 1.0, 0.0),
                "repeated": np.ones(k),
                "graded": np.logspace(0, -12, k),
            }[self.spectrum]
            entries = (u * values) @ vh
        return entries * self.scale

    def tensor(self) -> Tensor:
        """The matrix in its dtype and layout; entries that the dtype cannot hold are Inf."""
        values = torch.from_numpy(self.exact()).to(self.dtype)
        if self.layout == "transposed":
            return values.mT.contiguous().mT
        if self.layout == "strided":
            return torch.stack((values, values), dim=-1)[..., 0]
        if self.layout == "offset":
            return torch.cat((values, values))[self.m :]
        if self.layout == "expanded":
            return values[:, :1].expand(self.m, self.n)
        return values


def matrices(sizes: list[int] = SIZES) -> st.SearchStrategy[Hostile]:
    return st.builds(
        Hostile,
        m=st.sampled_from(sizes),
        n=st.sampled_from(sizes),
        dtype=st.sampled_from(sorted(DTYPES, key=str)),
        spectrum=st.sampled_from(SPECTRA),
        scale=st.sampled_from(SCALES),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 9),
    )


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def resolution(dtype: torch.dtype) -> float:
    """Spacing of the subnormal numbers of a dtype: what one entry is rounded to at best."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def close(ours: np.ndarray, exact: np.ndarray, dtype: torch.dtype, size: float) -> bool:
    """Whether matrices are equal up to rounding relative to `size`, a norm; overflowing squares are avoided."""
    allowed = 10 * math.sqrt(exact.size) * (ROUNDING[dtype] * size + resolution(dtype))
    return bool(np.abs(ours - exact).max() <= allowed)


def orthonormal(columns: Tensor) -> bool:
    gram = numpy(columns).T @ numpy(columns)
    return bool(np.abs(gram - np.eye(len(gram))).max() <= 5 * ROUNDING[columns.dtype])


def largest_singular_value(matrix: np.ndarray) -> float:
    largest = np.abs(matrix).max()
    return float(np.linalg.norm(matrix / largest, 2) * largest) if largest > 0 else 0.0


def singular_values(matrix: np.ndarray) -> np.ndarray:
    largest = np.abs(matrix).max() or 1.0
    return np.linalg.svd(matrix / largest, compute_uv=False) * largest


# ---- one matrix ------------------------------------------------------------------------------------------------------


def check_linear_algebra(hostile: Hostile, rank: int | None) -> None:
    """Every function on one matrix: the right numbers, or an error that names it."""
    weight = hostile.tensor()
    before = weight.clone()
    if not bool(torch.isfinite(weight).all()):
        for function in (factorize, polar_factor):
            with pytest.raises(ValueError, match="`w` holds NaN or Inf"):
                function(weight, name="w")
        return
    exact, k, dtype = numpy(weight), min(hostile.m, hostile.n), hostile.dtype
    values, size = singular_values(exact), largest_singular_value(exact)

    check_polar_factor(polar_factor(weight), exact)
    if size > torch.finfo(dtype).max:
        with pytest.raises(ValueError, match="The largest singular value of `w` is .* too large for"):
            factorize(weight, name="w")
        return
    kept = k if rank is None else min(rank, k)
    factors = factorize(weight, rank=kept, name="w")
    assert torch.equal(weight, before)
    check_factors(factors, weight, kept)
    assert close(numpy(factors.sigma.diagonal()), values[:kept], dtype, size)
    if kept == k:
        assert close(numpy(factors.weight()), exact, dtype, size)
    # what is lost is what belongs to the dropped directions
    lost = largest_singular_value(exact - numpy(factors.u) @ numpy(factors.sigma) @ numpy(factors.vh))
    rest = float(values[kept]) if kept < k else 0.0
    assert lost <= rest + 20 * k * (ROUNDING[dtype] * size + resolution(dtype))
    check_update(factors, hostile.seed)


def check_factors(factors: Factors, like: Tensor, rank: int) -> None:
    m, n = like.shape
    assert [tuple(factor.shape) for factor in factors] == [(m, rank), (rank, rank), (rank, n)]
    assert {factor.dtype for factor in factors} == {like.dtype}
    assert orthonormal(factors.u)
    assert orthonormal(factors.vh.mT)
    diagonal = factors.sigma.diagonal()
    assert torch.equal(factors.sigma, torch.diag(diagonal))
    assert bool((diagonal >= 0).all())
    assert bool((diagonal[1:] <= diagonal[:-1]).all())


def check_polar_factor(basis: Tensor, exact: np.ndarray) -> None:
    """``Bᵀ W`` is symmetric and positive, which only the polar factor gives: σ = 0 leaves its directions open."""
    tall = basis if basis.shape[0] >= basis.shape[1] else basis.mT
    weight = exact if exact.shape[0] >= exact.shape[1] else exact.T
    assert basis.shape == exact.shape
    assert orthonormal(tall)
    scaled = weight / (np.abs(weight).max() or 1.0)
    positive = numpy(tall).T @ scaled
    allowed = 20 * len(positive) * ROUNDING[basis.dtype] * max(1.0, np.linalg.norm(scaled, 2))
    assert np.abs(positive - positive.T).max() <= allowed
    assert np.linalg.eigvalsh((positive + positive.T) / 2).min() >= -allowed
    assert stability(basis, basis) == pytest.approx(1.0, abs=5 * ROUNDING[basis.dtype])
    assert stability(basis, -basis) == pytest.approx(-1.0, abs=5 * ROUNDING[basis.dtype])


def check_update(factors: Factors, seed: int) -> None:
    """A Σ update of the factors with a core as training leaves it, and of what an optimizer keeps for it."""
    dtype, rank = factors.sigma.dtype, factors.rank
    scale = float(factors.sigma[0, 0].double()) or 1.0
    random = np.random.default_rng(seed + 100)
    core = torch.from_numpy(random.standard_normal((rank, rank)) * min(scale, torch.finfo(dtype).max / 100 / rank))
    trained = factors._replace(sigma=core.to(dtype))
    exact = numpy(trained.u) @ numpy(trained.sigma) @ numpy(trained.vh)
    size = largest_singular_value(numpy(trained.sigma))
    rotated = rediagonalize(trained)
    check_factors(rotated, torch.empty(len(trained.u), trained.vh.shape[1], dtype=dtype), rank)
    assert close(numpy(rotated.u) @ numpy(rotated.sigma) @ numpy(rotated.vh), exact, dtype, size)

    cut = truncate(rotated, cutoff=0.3, max_rank_drop=0.7)
    values = numpy(rotated.sigma.diagonal())
    above = int((values >= 0.3 * values[0]).sum())
    assert cut.rank == min(rank, max(above, rank - math.floor(0.7 * rank), 1))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(cut, rotated.cut(cut.rank), strict=True))

    rotation = rotation_of(trained.sigma)
    state = {"step": torch.tensor(3.0), "exp_avg": core.to(dtype), "exp_avg_sq": core.abs().to(dtype)}
    moved = transport_state(state, core.shape, rotation.p, rotation.q)
    p, q = numpy(rotation.p), numpy(rotation.q)
    assert moved["step"] == 3.0
    assert close(numpy(moved["exp_avg"]), p.T @ numpy(state["exp_avg"]) @ q, dtype, size)
    assert close(numpy(moved["exp_avg_sq"]), (p**2).T @ numpy(state["exp_avg_sq"]) @ q**2, dtype, size)
    assert bool((moved["exp_avg_sq"] >= 0).all())


@settings(max_examples=150)
@given(matrices(), st.sampled_from([None, 1, 2, 4]))
def test_any_matrix_is_decomposed_as_in_numpy_or_refused(hostile, rank):
    check_linear_algebra(hostile, rank)


@pytest.mark.slow
@settings(max_examples=1500)
@given(matrices([*SIZES, 33, 64]), st.sampled_from([None, 1, 2, 4, 16]))
def test_thousands_of_matrices_are_decomposed_as_in_numpy_or_refused(hostile, rank):
    check_linear_algebra(hostile, rank)


@settings(max_examples=8)
@given(matrices([129, 150]), st.sampled_from([None, 1, 32, 64]))
def test_matrices_that_take_the_fast_routes_are_decomposed_as_in_numpy(hostile, rank):
    check_linear_algebra(hostile, rank)


@pytest.mark.slow
@settings(max_examples=60)
@given(matrices([129, 150, 260]), st.sampled_from([None, 1, 32, 64]))
def test_many_matrices_that_take_the_fast_routes_are_decomposed_as_in_numpy(hostile, rank):
    check_linear_algebra(hostile, rank)


# ---- what is no matrix -----------------------------------------------------------------------------------------------

NO_MATRICES = {
    "meta": torch.empty(3, 2, device="meta"),
    "vector": torch.zeros(3),
    "batch": torch.zeros(2, 3, 2),
    "no rows": torch.zeros(0, 3),
    "no columns": torch.zeros(3, 0),
    "integers": torch.zeros(3, 2, dtype=torch.int32),
    "booleans": torch.zeros(3, 2, dtype=torch.bool),
    "complex": torch.zeros(3, 2, dtype=torch.complex64),
    "float8": torch.zeros(3, 2).to(torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
    "nan": torch.tensor([[1.0, math.nan]]),
    "inf": torch.tensor([[-math.inf, 1.0]]),
    "array": np.eye(3),
    "list": [[1.0]],
    "nothing": None,
}


@pytest.mark.parametrize("what", NO_MATRICES)
@pytest.mark.parametrize("function", [factorize, polar_factor, rotation_of], ids=lambda function: function.__name__)
def test_what_is_no_matrix_is_refused_by_name(function, what):
    with pytest.raises((TypeError, ValueError), match=r"`encoder\.dense` (must be|holds|is on the meta device)"):
        function(NO_MATRICES[what], name="encoder.dense")


@pytest.mark.parametrize("what", [what for what in NO_MATRICES if isinstance(NO_MATRICES[what], Tensor)])
def test_stability_of_what_is_no_basis_is_refused_and_never_a_number(what):
    basis = NO_MATRICES[what]
    good = torch.zeros(basis.shape)
    for pair in ((basis, good), (good, basis)):
        with pytest.raises(ValueError, match="`(basis|previous)` (must be|holds|is on the meta device)"):
            stability(*pair)


@pytest.mark.parametrize("rank", ["2", 2.0, math.nan, 0, -1, 4, [1]], ids=str)
def test_a_rank_that_is_none_is_refused_with_its_value(rank):
    with pytest.raises(ValueError, match=rf"`rank` must be .* but is {re.escape(repr(rank))}\. Choose"):
        factorize(torch.eye(3), rank=rank)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("cutoff", "max_rank_drop", "min_rank")
        for value in ("1", None, math.nan, math.inf, -1, 1.5, [0.5])
    ],
    ids=str,
)
def test_rules_that_are_no_numbers_in_range_are_refused_by_name(name, value):
    rules = {"cutoff": 0.1, name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .* but is {re.escape(repr(value))}"):
        truncate(factorize(torch.eye(3)), **rules)


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 2), (3, 3), (3, 5)],
        [(4, 3), (3, 2), (2, 5)],
        [(4, 3), (3, 3), (2, 5)],
        [(4,), (3, 3), (3, 5)],
        [(4, 3), (3,), (3, 5)],
        [(4, 3), (3, 3, 3), (3, 5)],
    ],
    ids=str,
)
def test_factors_that_do_not_fit_each_other_are_refused_with_their_shapes(shapes):
    factors = Factors(*map(torch.ones, shapes))
    for function in (rediagonalize, lambda factors: truncate(factors, cutoff=0.1)):
        with pytest.raises(ValueError, match=r"`factors` must be u .* but have the shapes \[\("):
            function(factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_core_whose_singular_value_leaves_its_dtype_is_refused_and_not_made_infinite(dtype):
    factors = factorize(torch.eye(4, dtype=dtype))
    core = torch.full((4, 4), 0.9 * torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    with pytest.raises(ValueError, match=r"The largest singular value of `dense` is .* too large for"):
        rediagonalize(factors._replace(sigma=core), name="dense")


def test_a_parameter_is_decomposed_without_a_warning():
    weight = nn.Parameter(torch.randn(5, 4))
    with torch.no_grad():
        expected = factorize(weight)
    for ours, theirs in zip(factorize(weight), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert polar_factor(weight).shape == (5, 4)


# ---- layers, models and checks ---------------------------------------------------------------------------------------

MODES: dict[str, dict[str, object]] = {
    "dense": {"delay": 4, "update_every": 1},
    "freeze": {"freeze_when": "delay", "delay": 1, "update_every": 1},
    "factored": {"freeze_when": "delay", "delay": 0, "update_every": 1},
    "masked": {"freeze_when": "delay", "delay": 0, "update_every": 1, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 1000, "update_every": 1},  # all directions
    "pretraining": {"mode": "pretraining", "freeze_when": "delay", "delay": 1, "update_every": 1},
    "bounded": {"freeze_when": "delay", "delay": 1, "update_every": 1, "max_output_loss": 0.5, "max_rank_drop": 0.5},
}


def linear(weight: Tensor) -> nn.Linear:
    """A layer that holds this tensor as it lies in memory."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    nn.init.uniform_(layer.bias)
    return layer


def inputs_of(weight: Tensor, kind: str) -> Tensor:
    """(tokens, n), so small or large that outputs stay near 1."""
    size = float(weight.double().abs().max()) or 1.0
    x = torch.randn(3, weight.shape[1], dtype=torch.float64) / size
    x = x.clamp(-torch.finfo(weight.dtype).max / 10, torch.finfo(weight.dtype).max / 10).to(weight.dtype)
    return {
        "rows": x,
        "none": x[:0],
        "vector": x[0],
        "batch": x.expand(2, 3, -1),
        "strided": torch.stack((x, x), dim=-1)[..., 1],
    }[kind]


def check_layer(hostile: Hostile, mode: str, kind: str) -> None:
    """An adapter on one layer: its outputs before and after a check, or an error that names the layer."""
    torch.manual_seed(hostile.seed)
    weight = hostile.tensor()
    exact, dtype = numpy(weight), hostile.dtype
    if not np.isfinite(exact).all() or largest_singular_value(exact) > torch.finfo(dtype).max / 100:
        return  # refused by name: tested above, and in test_numbers.py
    base = nn.Sequential(linear(weight))
    bias = numpy(base[0].bias)
    config = OIALRConfig(target_modules=["0"], cutoff=0.0, **{"mode": "replace", **MODES[mode]})
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    x = inputs_of(weight, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = OIALRController(model, optimizer, total_steps=10)
    for _ in range(3):
        with torch.no_grad():
            ours = model(x)
        theirs = numpy(x) @ exact.T + bias
        reach = float((np.abs(numpy(x)) @ np.abs(exact).T).max(initial=1.0))
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        # products of rounded factors err by a rounding for each of their entries
        few = 40 * max(exact.shape) * (ROUNDING[dtype] + np.abs(numpy(x)).max(initial=0.0) * resolution(dtype))
        assert np.abs(numpy(ours) - theirs).max(initial=0.0) <= few * reach
        update = controller.step()
        assert update is not None
        assert all(-1.0 <= value <= 1.0 for value in update.stability.values())
    layer = adapter_layers(model)["0"]
    assert layer.is_dense("default") is (mode == "dense")
    if mode != "dense":
        factors = layer.factors("default")
        assert factors.rank == min(exact.shape) or mode == "bounded"
        assert orthonormal(factors.u)
        assert orthonormal(factors.vh.mT)


@settings(max_examples=60)
@given(matrices(), st.sampled_from(sorted(MODES)), st.sampled_from(["rows", "none", "vector", "batch", "strided"]))
def test_a_layer_of_any_weight_computes_what_numpy_does_through_its_checks(hostile, mode, kind):
    check_layer(hostile, mode, kind)


@pytest.mark.slow
@settings(max_examples=400)
@given(matrices(), st.sampled_from(sorted(MODES)), st.sampled_from(["rows", "none", "vector", "batch", "strided"]))
def test_hundreds_of_layers_of_any_weight_compute_what_numpy_does(hostile, mode, kind):
    check_layer(hostile, mode, kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_a_layer_without_entries_is_refused_by_name(shape, mode):
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(shape[1], shape[0]))
    with pytest.raises(ValueError, match=r"The weight of `1` has no entries"):
        get_peft_model(base, OIALRConfig(target_modules=["0", "1"], **{"mode": "replace", **MODES[mode]}))
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_the_meta_device_is_adapted_and_its_training_refused_by_name(mode):
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model = get_peft_model(base, OIALRConfig(target_modules=["0", "1"], **{"mode": "replace", **MODES[mode]}))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.empty(5, 4, device="meta")).shape == (5, 3)
    with pytest.raises(ValueError, match=r"`.*0\..*` is on the meta device, so it holds no values"):
        OIALRController(model, torch.optim.SGD(model.parameters()), total_steps=10)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_another_kind_of_number_is_refused_by_name(mode, dtype):
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    base[1].weight = nn.Parameter(base[1].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"`1` must be floating-point .* but has dtype"):
        get_peft_model(base, OIALRConfig(target_modules=["0", "1"], **{"mode": "replace", **MODES[mode]}))
