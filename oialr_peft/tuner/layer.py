"""`OIALRLinear`: the adapter layer around one linear map, in its dense and its factored phase.

What a layer holds per adapter:

====== ==================== =========================================================
phase  trained              frozen
====== ==================== =========================================================
dense  ``oialr_weight`` W   (none)
factored ``oialr_sigma`` Σ  ``oialr_u`` U, ``oialr_vh`` Vᵀ
====== ==================== =========================================================

The frozen factors are parameters without gradient, not buffers: DDP does not broadcast them at every forward, and FSDP
shards them. When a layer changes phase, and who decides that, is in `controller.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oialr_peft.linalg.factors import DTYPES, Factors, compute_dtype, factorize
from oialr_peft.linalg.ops import Route, build, fold
from oialr_peft.parallel.sharding import like_shards_of, whole
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.matricization import LINEAR_MODULES, LinearModule, Matricization, matricization_of
from oialr_peft.tuner.quantities import rank_of
from oialr_peft.tuner.quantization import dequantized_dtype, dequantized_weight, is_quantized

NOISE = 0.5  # of the weight's own scale, for `init_weights=False`
FACTOR_NAMES = r".*oialr_(u|sigma|vh)\b.*"  # a regular expression for what torch.compile calls our factors


def supported_module(module: nn.Module, name: str, *, keeps_base: bool = True) -> LinearModule:
    """The linear module inside `module`, which may already carry adapters.

    Args:
        module: a target.
        name: its full name, for the error message.
        keeps_base: whether the adapter keeps the base weight, which may then be quantized.

    Raises:
        ValueError: it is of another kind, has groups, or its weight is not floating-point.
    """
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(inner, LINEAR_MODULES):
        hint = " Its rows are looked up, not multiplied." if isinstance(inner, nn.Embedding) else ""
        raise ValueError(
            "`target_modules` may name nn.Linear, transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
            f"nn.MultiheadAttention modules, but `{name}` is a {type(inner).__name__}.{hint} Leave it out, or list it in "
            "`exclude_modules`."
        )
    form = matricization_of(inner)
    if form is None:
        raise ValueError(
            f"`{name}` is a convolution with {inner.groups} groups; only those with one are supported, because a "
            "grouped weight is several matrices. Leave it out, or list it in `exclude_modules`."
        )
    released = isinstance(module, OIALRLinear) and module.base_released
    if is_quantized(inner):
        if not keeps_base:
            raise ValueError(
                f"The base weight of `{name}` is quantized, so only a correction beside it can be trained. Set "
                '`mode="adapter"`, or load the model without quantization.'
            )
    elif not released and not (inner.weight.dtype in DTYPES and inner.weight.shape == form.weight_shape):
        raise ValueError(
            f"The weight of `{name}` must be floating-point and {form.weight_shape}, but has dtype {inner.weight.dtype} "
            f"and shape {tuple(inner.weight.shape)}. It takes at least 16 bits; of quantized weights, those of bitsandbytes "
            "and torchao are supported."
        )
    if 0 in form.weight_shape:
        raise ValueError(
            f"The weight of `{name}` has no entries: its shape is {form.weight_shape}. Leave it out, or list it in "
            "`exclude_modules`."
        )
    return inner


def initial_rank(config: OIALRConfig, name: str, shape: Sequence[int]) -> int | None:
    """The rank with which a layer of this name and (m, n) shape starts; `None` when it starts dense."""
    pattern = config.rank_pattern or {}
    settings = config.resolved()
    if name not in pattern and (config.is_from_checkpoint or not settings.starts_factored):
        return None
    return rank_of(pattern.get(name, rank_of(settings.rank, min(shape))), min(shape))


class OIALRLinear(nn.Module, BaseTunerLayer):
    """A linear map whose weight is trained dense, then as ``W = U Σ Vᵀ`` with frozen U, V.

    With the base weight W₀ and bias b of `base_layer`, and the weights W_a of the active adapters::

        y = x (W₀ + Σ_a ΔW_a)ᵀ + b,    ΔW_a = W_a − W₀ (replace)  or  U C Vᵀ (adapter)

    so that one active adapter in replace mode gives ``y = x W_aᵀ + b`` and does not touch W₀. For a convolution, W is
    its weight read as a matrix, and x the patches of its input; see `matricization`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a convolution without groups.
        name: full module name in the base model; the key of this layer in `rank_pattern` and in reports.

    Attributes:
        out_features, in_features: m and n, the sizes of the matrix.
        form: how the stored weight is read as that matrix.
        oialr_weight: (m, n) dense weights by adapter.
        oialr_u, oialr_sigma, oialr_vh: (m, r), (r, r), (r, n) factors by adapter.
        is_correction: by adapter, whether its weight is added to the base weight instead of replacing it.
        full_rank: by adapter, the rank that the layer has just after it is factored.
        controlled: adapters whose phase and rank an `OIALRController` looks after.

    Raises:
        ValueError: the module is of another kind, has groups, or its weight is not floating-point.
    """

    adapter_layer_names = ("oialr_weight", "oialr_sigma")
    other_param_names = ("oialr_u", "oialr_vh", "is_correction", "full_rank", "ranks", "controlled")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        inner = supported_module(base_layer, name)
        self.base_layer = base_layer
        self.name = name
        self.form = cast(Matricization, matricization_of(inner))
        self.out_features, self.in_features = self.form.m, self.form.n
        self.quantized = is_quantized(inner)
        vars(self).update(self.form.settings)
        self.oialr_weight = nn.ParameterDict()
        self.oialr_u = nn.ParameterDict()
        self.oialr_sigma = nn.ParameterDict()
        self.oialr_vh = nn.ParameterDict()
        self.is_correction: dict[str, bool] = {}
        self.full_rank: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.controlled: dict[str, bool] = {}
        self.base_released = False
        self._products: dict[
            tuple[str, str, torch.dtype, bool], tuple[tuple[tuple[int, int], ...], tuple[Tensor, ...]]
        ] = {}
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self._disable_adapters = False

    # ---- creation ----------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, config: OIALRConfig, factors: Factors | None = None) -> None:
        """Give the layer a new adapter: dense or factored, as `config` says.

        No decomposition is computed when weights will follow from a checkpoint, or on the meta device.

        Args:
            adapter_name: what the adapter is called.
            config: its settings.
            factors: of the base weight, at the rank of `initial_rank`, if they were computed before.
        """
        if self.base_released:
            raise ValueError(
                f'The base weight of `{self.name}` was released by `mode="pretraining"`, so no second adapter fits. '
                'Load the base model again, or use `mode="replace"`.'
            )
        weight = self.base_matrix()
        settings = config.resolved()
        self.is_correction[adapter_name] = settings.is_correction
        self.full_rank[adapter_name] = rank_of(settings.rank, min(weight.shape))
        rank = initial_rank(config, self.name, weight.shape)
        if rank is None:
            self._add_dense(adapter_name, weight, config)
        elif config.is_from_checkpoint or weight.is_meta or parameters_become_meta():
            self.set_factors(adapter_name, self._placeholder_factors(weight, rank))
        else:
            # in float32 also for a half-precision base, since PEFT raises adapters to float32 afterwards; when it does
            # not, `OIALRModel` casts them down
            given = factors or factorize(weight.to(compute_dtype(weight)), rank=rank, name=self.name)
            self._add_factored(adapter_name, given, config)
        if settings.releases_base:
            self.release_base()

    def _add_dense(self, adapter_name: str, weight: Tensor, config: OIALRConfig) -> None:
        if config.is_from_checkpoint:
            # NaN as for factored layers, see `_placeholder_factors`
            self.oialr_weight[adapter_name] = nn.Parameter(torch.full_like(weight, torch.nan).contiguous())
            return
        # pretraining takes over the storage of the base weight instead of copying it
        releases = config.resolved().releases_base
        dense = weight.contiguous() if releases else weight.clone(memory_format=torch.contiguous_format)
        if not config.init_weights:
            dense = dense + _noise_like(dense)
        self.oialr_weight[adapter_name] = nn.Parameter(dense)

    def _add_factored(self, adapter_name: str, factors: Factors, config: OIALRConfig) -> None:
        if self.is_correction[adapter_name]:  # it begins at nothing
            factors = factors._replace(sigma=torch.zeros_like(factors.sigma))
        if not config.init_weights:
            factors = factors._replace(sigma=factors.sigma + _noise_of_core(factors))
        self.set_factors(adapter_name, factors)

    @staticmethod
    def _placeholder_factors(weight: Tensor, rank: int) -> Factors:
        # NaN, so that an adapter whose weights were never loaded cannot pass for a working one
        return Factors(
            weight.new_zeros(weight.shape[0], rank),
            weight.new_full((rank, rank), torch.nan),
            weight.new_zeros(rank, weight.shape[1]),
        )

    def release_base(self) -> None:
        """Free the base weight (pretraining): what is left is an empty buffer of the same dtype and device.

        It is not part of `state_dict()`, and not a parameter.
        """
        base = self.get_base_layer()
        empty = self.base_weight.new_empty(0)
        del base.weight
        base.register_buffer("weight", empty, persistent=False)
        self.base_released = True

    # ---- phase and rank ----------------------------------------------------------------------------------------------

    def is_dense(self, adapter_name: str) -> bool:
        """Whether the adapter still trains its full weight here."""
        return adapter_name in self.oialr_weight

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the adapter has weights in this layer."""
        return adapter_name in self.oialr_weight or adapter_name in self.oialr_sigma

    def rank(self, adapter_name: str) -> int:
        """Directions in use: the rank of a factored layer, min(m, n) of a dense one."""
        if self.is_dense(adapter_name):
            return min(self.out_features, self.in_features)
        return self.ranks[adapter_name]

    def trained_parameter(self, adapter_name: str) -> nn.Parameter:
        """W in the dense phase, Σ in the factored one."""
        return self.oialr_weight[adapter_name] if self.is_dense(adapter_name) else self.oialr_sigma[adapter_name]

    def factors(self, adapter_name: str) -> Factors:
        """The factors in use, detached: u (m, r), sigma (r, r), vh (r, n), cut to the rank.

        Sharded ones are gathered: every process must call this.
        """
        containers = (self.oialr_u, self.oialr_sigma, self.oialr_vh)
        stored = Factors(*(whole(container[adapter_name].detach()) for container in containers))
        return stored.cut(self.ranks[adapter_name])

    def set_factors(self, adapter_name: str, factors: Factors, *, size: int | None = None) -> nn.Parameter:
        """Store `factors`, ending the dense phase if there was one, and return the parameter that now holds Σ.

        Existing tensors of the right shape are overwritten in place; otherwise new parameters are made, because a
        parameter that shrinks in place breaks the next backward.

        Args:
            factors: u (m, r), sigma (r, r), vh (r, n); cast to the dtype that the layer trains in.
            size: store them in tensors of this many directions ≥ r, the rest zero. Zero directions get zero gradients,
                so they stay zero in training (``shrink="mask"``).
        """
        self.forget_products()
        rank = factors.rank
        trains = True
        if self.has_adapter(adapter_name):
            before = self.trained_parameter(adapter_name)
            trains = before.requires_grad
            factors = Factors(*(factor.to(before.dtype) for factor in factors))
        size = rank if size is None else size
        if self.is_dense(adapter_name):
            del self.oialr_weight[adapter_name]
            shrinks = size < self.full_rank[adapter_name]
        else:
            shrinks = adapter_name in self.oialr_sigma and size != self.oialr_sigma[adapter_name].shape[0]
        if shrinks:
            _let_ranks_vary()
        pad = size - rank
        _store(self.oialr_u, adapter_name, F.pad(factors.u, (0, pad)), requires_grad=False)
        _store(self.oialr_sigma, adapter_name, F.pad(factors.sigma, (0, pad, 0, pad)), requires_grad=trains)
        _store(self.oialr_vh, adapter_name, F.pad(factors.vh, (0, 0, 0, pad)), requires_grad=False)
        self.ranks[adapter_name] = rank
        return self.oialr_sigma[adapter_name]

    def set_dense(self, adapter_name: str, weight: Tensor) -> nn.Parameter:
        """Put the adapter (back) into the dense phase with this (m, n) weight, and return its parameter."""
        self.forget_products()
        trains = True
        if self.has_adapter(adapter_name):
            trains = self.trained_parameter(adapter_name).requires_grad
        for container in (self.oialr_u, self.oialr_sigma, self.oialr_vh):
            if adapter_name in container:
                del container[adapter_name]
        self.ranks.pop(adapter_name, None)
        _store(self.oialr_weight, adapter_name, weight, requires_grad=trains)
        return self.oialr_weight[adapter_name]

    def match_checkpoint(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Take the phase and the shapes that a checkpoint has, so that its tensors fit; values are loaded afterwards.

        Args:
            tensors: what the checkpoint holds for this layer, by ``"oialr_weight"``, ``"oialr_u"``, ….

        Raises:
            ValueError: as `check_checkpoint`. The layer is then unchanged.
        """
        self.check_checkpoint(tensors)
        if "oialr_weight" in tensors:
            self.resize(adapter_name, None)
            return
        self.resize(adapter_name, tensors["oialr_sigma"].shape[0])
        # a masked layer in training has zero rows beyond its rank
        used = int(tensors["oialr_vh"].abs().amax(dim=1).count_nonzero())
        self.ranks[adapter_name] = max(1, used)

    def resize(self, adapter_name: str, size: int | None) -> None:
        """Give the adapter tensors of `size` directions, or a dense weight (`None`); new ones hold no values yet."""
        old = self.trained_parameter(adapter_name)
        m, n = self.out_features, self.in_features
        empty = partial(torch.empty, dtype=old.dtype, device=old.device)
        if size is None:
            if not self.is_dense(adapter_name):
                self.set_dense(adapter_name, empty(m, n))
        elif self.is_dense(adapter_name) or old.shape[0] != size:
            self.set_factors(adapter_name, Factors(empty(m, size), empty(size, size), empty(size, n)))

    def check_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Whether a checkpoint's tensors make a layer of this shape, dense or factored.

        Raises:
            ValueError: they do not; the message says what the checkpoint holds.
        """
        m, n = self.out_features, self.in_features
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        size = found.get("oialr_sigma", (0,))[0]
        dense = {"oialr_weight": (m, n)}
        factored = {"oialr_u": (m, size), "oialr_sigma": (size, size), "oialr_vh": (size, n)}
        if found != dense and not (found == factored and 1 <= size <= min(m, n)):
            raise ValueError(
                f"The checkpoint does not fit `{self.name}`, a layer of {m}×{n}: it holds {found or 'nothing for it'}. "
                "It was saved from another model, or is damaged."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.forget_products()
        # any `load_state_dict`, Accelerate's `load_state` included, may bring other phases and ranks than the model has
        for adapter_name in self._get_available_adapters():
            names = ("oialr_weight", "oialr_u", "oialr_sigma", "oialr_vh")
            keys = {name: f"{prefix}{name}.{adapter_name}" for name in names}
            tensors = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
            # shards, and placeholders of what another process loads, come in the model's own shapes
            if tensors and not any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in tensors.values()):
                self.match_checkpoint(adapter_name, tensors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- computation -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """``y = x (W₀ + Σ_a ΔW_a)ᵀ + b``, in the dtype of the input.

        Args:
            x: (..., n), or what the convolution takes.
            adapter_names: the adapter of each sample, ``"__base__"`` for none; `None` means the active ones for all.
        """
        if adapter_names is not None:
            return self._mixed_output(x, adapter_names, *args, **kwargs)
        return self._output(x, self.active_adapters, *args, **kwargs)

    def _mixed_output(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. Name one adapter for each sample."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result: Tensor | None = None
        for name in dict.fromkeys(adapter_names):
            samples = [index for index, each in enumerate(adapter_names) if each == name]
            output = self._output(x[samples], [name], *args, **kwargs)
            if result is None:
                result = output.new_empty(len(x), *output.shape[1:])
            result[samples] = output
        return x if result is None else result

    def _output(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in adapter_names if self.has_adapter(name)]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        replacing = sum(not self.is_correction[name] for name in active)
        if replacing == 1:
            first = next(name for name in active if not self.is_correction[name])
            result = self._adapter_output(x, first, cast("Tensor | None", self.get_base_layer().bias))
            rest = [name for name in active if name != first]
        else:
            result = self.base_layer(x, *args, **kwargs)
            if replacing > 1:
                result = result - replacing * self.form.apply(x, self.base_matrix())
            rest = active
        for name in rest:
            result = result + self._adapter_output(x, name, None)
        return result

    def _adapter_output(self, x: Tensor, adapter_name: str, bias: Tensor | None) -> Tensor:
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):  # it knows nothing of that device
            if self.is_dense(adapter_name):
                # autocast keeps the cast weight for further calls
                return self.form.apply(x, self.oialr_weight[adapter_name], bias)
            # cast once here, so that every route, the custom functions included, computes in the autocast dtype
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return self._factored_output(dtype, x.to(dtype), adapter_name, bias)
        dtype = self.trained_parameter(adapter_name).dtype
        inputs = self._cast_input_dtype(x, dtype)
        if self.is_dense(adapter_name):
            result = self.form.apply(inputs, self.oialr_weight[adapter_name], None if bias is None else bias.to(dtype))
        else:
            result = self._factored_output(dtype, inputs, adapter_name, bias)
        return result if result.dtype == x.dtype else result.to(x.dtype)

    def _factored_output(self, dtype: torch.dtype, x: Tensor, adapter_name: str, bias: Tensor | None) -> Tensor:
        """The output of a factored adapter for inputs in `dtype`, by the cheapest route."""
        bias = None if bias is None else bias.to(dtype)
        sigma = self.oialr_sigma[adapter_name]
        if torch.compiler.is_compiling():
            u, vh = self.oialr_u[adapter_name], self.oialr_vh[adapter_name]
            # of all sizes only the rank may be dynamic
            assert u.shape[0] == self.out_features
            assert vh.shape[1] == self.in_features
            return self.form.chain(x, Factors(u.to(dtype), sigma.to(dtype), vh.to(dtype)), bias)
        route = self._route(adapter_name, x)
        if route == "chain" or (torch.is_grad_enabled() and sigma.requires_grad):
            u, vh = self._product("bases", adapter_name, dtype)
            factors = Factors(u, sigma.to(dtype), vh)
            if route == "chain":
                return self.form.chain(x, factors, bias)
            product = self._product(route, adapter_name, dtype)
            if route == "folded":
                return self.form.folded(x, factors, (product[0], product[1]), bias)
            return self.form.built(x, factors, product[0], bias)
        if route == "folded":
            left, right = self._product("folded", adapter_name, dtype)
            return self.form.mix(self.form.apply(x, right), left, bias)
        return self.form.apply(x, self._product("built", adapter_name, dtype)[0], bias)

    def _route(self, adapter_name: str, x: Tensor) -> Route:
        m, n = self.out_features, self.in_features
        sigma = self.oialr_sigma[adapter_name]
        rank = sigma.shape[0]
        # in training also without gradients: a checkpointed block is computed again with them, and needs one product
        if sigma.requires_grad and (torch.is_grad_enabled() or self.training):
            return self.form.route(rank, x)
        if not self._may_keep_products(adapter_name):
            return "chain"
        return "folded" if (m + n) * rank < m * n else "built"

    def _product(self, kind: str, adapter_name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What the routes need in `dtype`, kept until the factors change if that will be noticed.

        Changes through a parameter's `.data` are not; call `forget_products` after them.

        Args:
            kind: ``"bases"`` for U, Vᵀ; ``"folded"`` for the pair of `ops.fold`; ``"built"`` for W.
        """
        sigma = self.oialr_sigma[adapter_name]
        stored = Factors(self.oialr_u[adapter_name], sigma, self.oialr_vh[adapter_name])
        if kind == "bases" and stored.u.dtype == dtype:
            return stored.u, stored.vh
        # tensors made in inference mode cannot be used where gradients are recorded
        key = kind, adapter_name, dtype, torch.is_inference_mode_enabled()
        version = tuple((id(factor), factor._version) for factor in stored)
        kept = self._products.get(key)
        if kept is not None and kept[0] == version:
            return kept[1]
        # Σ alone may have been cast: TRL does that to what trains beside a quantized model
        exact = torch.promote_types(stored.u.dtype, sigma.dtype)
        stored = Factors(*(factor.to(exact) for factor in stored))
        if kind == "bases":
            product: tuple[Tensor, ...] = stored.u.detach().to(dtype), stored.vh.detach().to(dtype)
        elif kind == "folded":
            # one of the pair is U or Vᵀ itself
            u, vh = self._product("bases", adapter_name, dtype)
            left, right = fold(stored)
            product = (left.to(dtype), vh) if self.out_features <= self.in_features else (u, right.to(dtype))
        else:
            product = (build(stored).to(dtype),)
        if self._may_keep_products(adapter_name):
            self._products[key] = version, product
        return product

    def _may_keep_products(self, adapter_name: str) -> bool:
        # a fused optimizer changes Σ without raising its version; a controller is told of every optimizer step
        return adapter_name in self.controlled or not self.oialr_sigma[adapter_name].requires_grad

    def forget_products(self) -> None:
        """Drop the products of factors that are kept between calls, because a factor changed, or to free memory."""
        self._products.clear()

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; see `nn.Module.train`."""
        self.forget_products()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # casts and moves
        self.forget_products()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles start without products
        return {**super().__getstate__(), "_products": {}}

    # ---- merging -----------------------------------------------------------------------------------------------------

    def adapter_weight(self, adapter_name: str) -> Tensor:
        """The (m, n) matrix of one adapter: its weight, or its correction of the base weight."""
        if self.is_dense(adapter_name):
            return self.oialr_weight[adapter_name].detach()
        return self.factors(adapter_name).weight()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW_a, what merging adds to the base weight, in the base weight's layout and dtype."""
        if self.base_released:
            raise RuntimeError(
                f'`{self.name}` has no base weight to compare with: `mode="pretraining"` released it. Use '
                "`merge_and_unload`, which writes the adapter's own weight."
            )
        dtype = self.base_dtype
        delta = self.adapter_weight(adapter_name)
        if not self.is_correction[adapter_name]:
            base = self.base_matrix()
            delta = delta.to(compute_dtype(base)) - base.to(compute_dtype(base))
        return self.form.stored(delta).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write ``W₀ + Σ_a ΔW_a`` into the base layer; `unmerge` restores W₀ bit for bit.

        Args:
            safe_merge: refuse to merge weights that hold NaN or Inf.
            adapter_names: which adapters; `None` means the active ones.

        Raises:
            ValueError: with `safe_merge`, the merged weight is not finite; the base layer is then unchanged. Or the base
                weight is quantized, which a merged weight would have to be as well.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not new:
            return
        base_weight = self.base_weight
        merged = self.merged_weight(self.merged_adapters + new)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken: `{self.name}` "
                "would hold NaN or Inf. Go back to an earlier checkpoint."
            )
        if self._unmerged_weight is None:
            self._unmerged_weight = base_weight.data
        if self.base_released:
            del self.get_base_layer().weight
            self.get_base_layer().weight = nn.Parameter(merged, requires_grad=False)
        else:
            base_weight.data = merged
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Restore the base weight that `merge` replaced, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        if self.base_released:
            self.release_base()
        else:
            assert self._unmerged_weight is not None
            # the module may have been cast or moved while it was merged
            self.base_weight.data = self._unmerged_weight.to(self.base_weight)
        self._unmerged_weight = None

    def merged_weight(self, adapter_names: list[str]) -> Tensor:
        """``W₀ + Σ_a ΔW_a`` in the base weight's layout and dtype; a tensor of its own.

        Raises:
            ValueError: the base weight is quantized.
        """
        if self.quantized:
            raise ValueError(
                f"The base weight of `{self.name}` is quantized; merging would round the adapter away with it. Keep the "
                "adapter beside it, write a LoRA adapter with `save_lora`, or load the base model without quantization "
                "and merge into that."
            )
        merged = self.form.stored(self._merged_matrix(adapter_names)).to(self.base_weight.dtype)
        return merged.clone(memory_format=torch.contiguous_format)

    def _merged_matrix(self, adapter_names: list[str]) -> Tensor:
        weights = [self.adapter_weight(name) for name in adapter_names]
        replacing = sum(not self.is_correction[name] for name in adapter_names)
        if replacing == 1 and len(weights) == 1:
            return weights[0]
        if self.base_released:
            raise RuntimeError(
                f'`{self.name}` has no base weight; `mode="pretraining"` released it. Merge one adapter.'
            )
        base = self.base_matrix()
        total = (1 - replacing) * base.to(compute_dtype(base))
        for weight in weights:
            total = total + weight
        return total

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight as it is stored."""
        return cast(Tensor, self.get_base_layer().weight)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype that the base weight computes in; of a quantized one, that of its dequantized numbers."""
        return dequantized_dtype(self.get_base_layer()) if self.quantized else self.base_weight.dtype

    def base_output(self, x: Tensor) -> Tensor:
        """What the base layer alone computes, without its bias."""
        base = self.get_base_layer()
        if not self.quantized:
            return self.form.apply(x, self.base_matrix().to(x.dtype))
        result = cast(Tensor, base(x))
        return result if base.bias is None else result - cast(Tensor, base.bias)

    def base_matrix(self) -> Tensor:
        """W₀ (m, n), also while adapters are merged into the base layer."""
        if self.quantized:
            return self.form.matrix(dequantized_weight(self.get_base_layer()))
        weight = self.base_weight if self._unmerged_weight is None else self._unmerged_weight
        return self.form.matrix(weight.detach())

    # ---- PEFT's protocol ---------------------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; switching off a merged layer unmerges it first."""
        if not enabled and self.base_released:
            raise RuntimeError(
                'Adapters trained with `mode="pretraining"` cannot be disabled: the base weights were released. To '
                "compare with the model before training, keep a copy of it."
            )
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `BaseTunerLayer.delete_adapter`. transformers calls this without asking the tuner."""
        if self.base_released and self.has_adapter(adapter_name):
            raise RuntimeError(
                f'The adapter `{adapter_name}` of `{self.name}` cannot be deleted: `mode="pretraining"` released the base '
                "weight, so its own is the only one. `PeftModel.merge_and_unload` makes a model without adapters."
            )
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # to the device only: PEFT's own version would also cast to the base dtype and unfreeze U and V
        target = self.base_weight.device if device is None else device
        if target.type == "meta":
            return
        self.forget_products()
        for container in (self.oialr_weight, self.oialr_u, self.oialr_sigma, self.oialr_vh):
            if adapter_name in container and not container[adapter_name].is_meta:
                parameter = container[adapter_name]
                moved = nn.Parameter(parameter.data.to(target), requires_grad=parameter.requires_grad)
                container[adapter_name] = moved

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Give the adapter's parameters another dtype; what trains and what is frozen stays so."""
        self.forget_products()
        for container in (self.oialr_weight, self.oialr_u, self.oialr_sigma, self.oialr_vh):
            if adapter_name in container and container[adapter_name].dtype != dtype:
                parameter = container[adapter_name]
                cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                container[adapter_name] = cast

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's conversion to LoRA can start from ΔW: it is available, and a matrix."""
        return not self.base_released and len(self.form.weight_shape) == 2

    def extra_repr(self) -> str:
        """Phase and rank of each adapter."""
        return ", ".join(
            f"{name}: {'dense' if self.is_dense(name) else f'rank {self.ranks[name]}'}"
            for name in sorted(self._get_available_adapters())
        )


def _store(container: nn.ParameterDict, adapter_name: str, value: Tensor, *, requires_grad: bool) -> None:
    """Overwrite the parameter in place when the shape fits, else put a new one."""
    if adapter_name in container and container[adapter_name].shape == value.shape:
        with torch.no_grad():
            container[adapter_name].copy_(like_shards_of(container[adapter_name], value))
    else:
        container[adapter_name] = nn.Parameter(value.contiguous(), requires_grad=requires_grad)


def _let_ranks_vary() -> None:
    """From now on, torch.compile makes one graph for all ranks instead of one for each; see `docs/compile.md`."""
    config = torch.compiler.config
    if FACTOR_NAMES not in config.dynamic_sources:
        config.dynamic_sources = ",".join(filter(None, (config.dynamic_sources, FACTOR_NAMES)))


def _noise_like(matrix: Tensor) -> Tensor:
    return _noise_scale(matrix) * torch.randn_like(matrix)


def _noise_of_core(factors: Factors) -> Tensor:
    # that of a whole weight, seen in the basis: the signs of singular vectors differ between processors, and do not matter
    noise = torch.randn(len(factors.u), factors.vh.shape[1], dtype=factors.u.dtype, device=factors.u.device)
    return _noise_scale(factors.sigma) * (factors.u.mT @ noise @ factors.vh.mT)


def _noise_scale(matrix: Tensor) -> Tensor:
    scale = matrix.std() if matrix.numel() > 1 else matrix.abs().max()
    return NOISE * torch.where(scale > 0, scale, torch.ones_like(scale))


def parameters_become_meta() -> bool:
    """Whether we are inside PEFT's or Accelerate's `init_empty_weights`, which sends new parameters to meta."""
    probe = nn.Module()
    probe.probe = nn.Parameter(torch.empty(0))
    return probe.probe.is_meta
