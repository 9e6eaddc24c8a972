"""`OIALRModel`: the tuner that PEFT calls to put adapter layers into a model, and to save and load them."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oialr_peft.files.card import SavedLayer, SavedModel
from oialr_peft.files.checkpoints import Elsewhere, adapter_file, check_adapter_file, without_wrappers
from oialr_peft.linalg.factors import Factors, factorize_all
from oialr_peft.parallel.progress import decomposition_bar
from oialr_peft.tuner.attention import ATTENTION, SplitAttention, avoid_fast_path, projections_of
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear, initial_rank, parameters_become_meta, supported_module
from oialr_peft.tuner.matricization import Matricization, matricization_of
from oialr_peft.tuner.quantization import is_quantized
from oialr_peft.tuner.registration import PREFIX

STEPS_UNTIL_WARNING = 100  # without a controller, when `update_every` is a fraction of an unknown number of steps


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, OIALRLinear]:
    """The layers that have this adapter, by full module name in the base model, in module order."""
    return {
        module.name: module
        for module in model.modules()
        if isinstance(module, OIALRLinear) and module.has_adapter(adapter_name)
    }


def config_of(model: nn.Module, adapter_name: str) -> OIALRConfig:
    """The configuration of an adapter of the model.

    Raises:
        ValueError: the model has no OIALR adapter of this name.
    """
    for module in model.modules():
        config = module.__dict__.get("peft_config", {}).get(adapter_name)
        if isinstance(config, OIALRConfig):
            return config
    raise ValueError(
        f"The model has no OIALR adapter called `{adapter_name}`. Make it with get_peft_model(model, OIALRConfig()) "
        "first, or pass its `adapter_name`."
    )


def active_adapter(model: nn.Module) -> str | None:
    """The adapter that is active in the first layer with one; `None` without any."""
    layers = (module for module in model.modules() if isinstance(module, OIALRLinear))
    return next((layer.active_adapters[0] for layer in layers if layer.active_adapters), None)


def saved_model(model: nn.Module, adapter_name: str = "default") -> SavedModel:
    """What a model card says of the model and its adapter."""
    layers = tuple(
        SavedLayer(
            name,
            layer.out_features,
            layer.in_features,
            None if layer.is_dense(adapter_name) else layer.rank(adapter_name),
        )
        for name, layer in adapter_layers(model, adapter_name).items()
    )
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None or not type(base).__module__.startswith("transformers."):
        return SavedModel(layers, adapter_name)
    class_name = type(base).__name__
    num_labels = base.config.num_labels if "Classification" in class_name else None
    return SavedModel(layers, adapter_name, class_name, num_labels)


class OIALRModel(BaseTuner):
    """Replaces the target modules of a model by `OIALRLinear` layers.

    Made by `peft.get_peft_model(model, OIALRConfig(...))`; not meant to be called directly.

    Raises:
        ValueError: a target is of an unsupported kind, shares its weight with another module, or the configuration does
            not fit the adapters that the model already has.

    Examples:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> config = OIALRConfig(target_modules=["0"], freeze_when="delay", delay=0, init_rank=3)
        >>> model = get_peft_model(base, config)
        >>> type(model.base_model).__name__
        'OIALRModel'
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['base_model.model.0.oialr_sigma.default']
    """

    prefix = PREFIX
    tuner_layer_cls = OIALRLinear
    peft_config: dict[str, OIALRConfig]  # type: ignore[assignment]
    # every architecture has the same default, see `_prepare_model`
    target_module_mapping: dict[str, list[str]] = {}

    # ---- injection ---------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter into the model; see `BaseTuner.inject_adapter`."""
        with warnings.catch_warnings(), self._decomposing():
            # PEFT does not know the projections of an attention module; `_warn_about_unknown_ranks` does
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        _warn_about_unknown_ranks(model, adapter_name, config)
        if config.pretraining and config.inference_mode:
            model.requires_grad_(False)
        if not config.inference_mode:
            _MissingControllerWatch.attach(model, adapter_name, config)

    @contextmanager
    def _decomposing(self) -> Iterator[None]:
        """With a progress bar, of which nothing is left in the model afterwards: it could not be copied."""
        with decomposition_bar() as self._bar:
            try:
                yield
            finally:
                del self._bar

    def _check_new_adapter_config(self, config: OIALRConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1 and any(other.pretraining for other in self.peft_config.values()):
            raise ValueError(
                "`pretraining=True` releases the base weights, so such a model has exactly one adapter, but "
                f"{sorted(self.peft_config)} were asked for. Load the base model again for a second one."
            )

    def _prepare_adapter_config(self, peft_config: OIALRConfig, model_config: dict[str, Any]) -> OIALRConfig:  # type: ignore[override]
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return peft_config

    @staticmethod
    def _check_target_module_exists(config: OIALRConfig, key: str) -> bool | re.Match[str] | None:  # type: ignore[override]
        # PEFT compares a module with each target, of which there may be thousands; only these can be it
        if isinstance(config.target_modules, set):
            config = copy.copy(config)
            config.target_modules = cast(Any, config.target_modules & {key, *_ends_of(key)})
        return BaseTuner._check_target_module_exists(config, key)

    def _prepare_model(self, peft_config: OIALRConfig, model: nn.Module) -> None:  # type: ignore[override]
        target = peft_config.target_modules
        if isinstance(target, str) and target.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = _exactly(_linear_modules_outside_the_head(model), model)  # type: ignore[assignment]
            if not peft_config.inference_mode and not peft_config.pretraining:
                _warn_about_untrained_head(model, peft_config)
        # before anything is replaced, so that a refused target leaves the model as it was
        shared = _shared_weights(model)
        if peft_config.pretraining:
            _require_own_weights_to_save(model, peft_config, shared)
        inside = _prefixes_inside(model, BaseTunerLayer, *ATTENTION)
        self._factors: dict[str, Factors] = {}
        weights: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name):
                for full_name, projection in projections_of(module, name):
                    inner = supported_module(projection, full_name, residual=peft_config.residual)
                    _require_own_weight(inner.weight, full_name, shared)
                    form = cast(Matricization, matricization_of(inner))
                    shapes[full_name] = form.m, form.n
                    if not is_quantized(inner) and inner.weight.numel():
                        weights[full_name] = (
                            projection.base_matrix()
                            if isinstance(projection, OIALRLinear)
                            else form.matrix(inner.weight)
                        )
        if peft_config.is_from_checkpoint and peft_config.source is not None:
            source = peft_config.source
            file = adapter_file(source.path, source.subfolder, **source.hub)
            if file is None:
                raise ValueError(
                    f"`{source.path}` has the configuration of a saved adapter, but not its weights. Copy the whole "
                    "directory, or set `rank_pattern` and `format_version` to None to start a new adapter."
                )
            if not shapes:
                raise ValueError(
                    f"Target modules of the adapter in `{source.path}` not found in the base model: "
                    f"{peft_config.target_modules!r}. Load the model that it was trained on."
                )
            elsewhere = outside_layers(model, peft_config, shapes)
            check_adapter_file(file, peft_config.rank_pattern or {}, shapes, elsewhere)
        if not peft_config.is_from_checkpoint and not parameters_become_meta():
            ranks = {name: initial_rank(peft_config, name, shape) for name, shape in shapes.items()}
            self._bar.total = sum(rank is not None for rank in ranks.values())
            jobs = [
                (name, weight.detach(), rank)
                for name, weight in weights.items()
                if (rank := ranks[name]) is not None and not weight.is_meta
            ]
            for name, factors in _initial_factors(jobs):
                self._factors[name] = factors
                self._bar.update()

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: OIALRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, (nn.MultiheadAttention, SplitAttention)):
            # its projections are adapted together, when it is a target itself
            if not self._check_target_module_exists(peft_config, current_key.rpartition(".")[0]):
                warnings.warn(
                    f"`{current_key}` is skipped: nn.MultiheadAttention reads the weights of its projections without "
                    "calling them. To adapt them, name the attention module itself.",
                    stacklevel=2,
                )
            return
        if isinstance(target, (nn.MultiheadAttention, SplitAttention)):
            attention = target if isinstance(target, SplitAttention) else SplitAttention(target)
            for full_name, projection in projections_of(attention, current_key):
                self._adapt(peft_config, adapter_name, projection, full_name.rpartition(".")[2], attention, full_name)
            if attention is not target:
                setattr(parent, target_name, attention)
        else:
            self._adapt(peft_config, adapter_name, target, target_name, parent, current_key)
        avoid_fast_path(parent)

    def _adapt(
        self,
        config: OIALRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        full_name: str,
    ) -> None:
        factors = self._factors.pop(full_name, None)
        layer = target if isinstance(target, OIALRLinear) else OIALRLinear(target, full_name)
        layer.add_adapter(adapter_name, config, factors)
        if factors is None and self._bar.total and not layer.is_dense(adapter_name):
            self._bar.update()  # a quantized weight, which was decomposed just now
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, OIALRLinear):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # unloading: the module has its own weights. PEFT's version would assign it the tensor that a wrapper for
            # trainable tokens shows as its weight
            setattr(parent, child_name, new_module)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        if not any(self.peft_config[name].pretraining for name in self.active_adapters):
            super()._mark_only_adapters_as_trainable(model)
            return
        # what the user froze (sinusoidal positions, for instance) stays frozen; the originals of wrapped modules would
        # otherwise train beside their trained copies
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.original_module.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # ours first: PEFT's own version, which other layers may need, would make U and V trainable
        layers = list(adapter_layers(self.model, adapter_name).values())
        watched = [layer.trained_parameter(adapter_name) for layer in layers[:1]]
        for layer in layers:
            exact = torch.promote_types(layer.base_dtype, torch.float32)
            layer.cast_adapter(adapter_name, exact if autocast_adapter_dtype else layer.base_dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if layers and layers[0].trained_parameter(adapter_name) is not watched[0]:
            _MissingControllerWatch.attach(self.model, adapter_name, self.peft_config[adapter_name])

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: weighted sums of adapters are made for LoRA.

        Raises:
            NotImplementedError: always; the message says what does the same.
        """
        raise NotImplementedError(
            "OIALR has no weighted sum of adapters: each has bases of its own, and their sum is neither in one pair of "
            "bases nor of one of their ranks. `model.base_model.set_adapter([...])` adds the changes of several "
            "adapters, `merge_and_unload(adapter_names=[...])` writes that sum into the base model; for other weights, "
            "turn residual adapters into LoRA adapters with `save_lora`, and combine those."
        )

    # ---- what cannot work without base weights -----------------------------------------------------------------------

    def unload(self) -> nn.Module:
        """The base model without adapters; see `BaseTuner.unload`."""
        self._require_base("unload", "`merge_and_unload`")
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `BaseTuner.delete_adapter`."""
        if adapter_name in self.peft_config:
            self._require_base("delete_adapter", "`merge_and_unload`")
        super().delete_adapter(adapter_name)

    def _require_base(self, what: str, remedy: str) -> None:
        if any(config.pretraining for config in self.peft_config.values()):
            raise RuntimeError(
                f"`{what}` needs the base weights, but `pretraining=True` released them: the trained weights are the "
                f"only ones. Use {remedy}."
            )

    # ---- an adapter for each sample ----------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams")
        repeats = beams if isinstance(beams, int) else 1
        encoder = _encoder_of(self.model)
        # beam search repeats each sample, but not in the encoder
        unrepeated = set() if encoder is None else set(encoder.modules())
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (OIALRLinear, AuxiliaryTrainingWrapper)):
                    own = list(names) if module in unrepeated else [name for name in names for _ in range(repeats)]
                    hook = module.register_forward_pre_hook(partial(_name_adapters, own), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def _check_adapter_names(self, names: list[str]) -> None:
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first."
            )
        if not isinstance(names, (list, tuple)):
            raise TypeError(
                f"`adapter_names` must be a list of str, one for each sample, but is {type(names).__name__}."
            )
        unknown = set(names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. There are "
                f"{', '.join(sorted(self.peft_config))}, and `__base__` for none."
            )
        if "__base__" in names:
            self._require_base("adapter_names", "the adapter's own name")

    # ---- saving and loading ------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: OIALRConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        layers = {
            key: layer
            for key, layer in model.named_modules()
            if isinstance(layer, OIALRLinear) and layer.has_adapter(adapter_name)
        }
        for key, layer in layers.items():
            if layer.is_dense(adapter_name):
                continue
            rank = layer.rank(adapter_name)
            # a masked layer is cut to its rank here
            for name, cut in (("oialr_u", (None, rank)), ("oialr_sigma", (rank, rank)), ("oialr_vh", (rank, None))):
                full_key = f"{key}.{name}.{adapter_name}"
                if full_key in tensors:
                    tensors[full_key] = tensors[full_key][: cut[0], : cut[1]].contiguous()
        config.record_saved(saved_model(model, adapter_name))
        if config.pretraining:
            tensors.update(cls._untargeted_state_dict(model, layers, state_dict))
        return tensors

    @staticmethod
    def _untargeted_state_dict(
        model: nn.Module, layers: dict[str, OIALRLinear], state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Everything outside the adapter: embeddings, norms, biases, heads, buffers. Not the released base weights."""
        released = {f"{key}.base_layer.weight" for key in layers}
        wrapped = {key for key, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
        adapter = _get_tuner_state_dict_key_prefixes(model)
        # a tied weight is stored under each of its names: transformers' `load_adapter` replaces parameters one by one and
        # does not tie them afterwards
        return {
            key: value
            for key, value in state_dict.items()
            if key not in released and not _is_key_under_prefixes(key, wrapped | adapter)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: OIALRConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # the layers must have the checkpoint's phases and ranks before PEFT looks which keys the model has
        state_dict = dict(state_dict)
        matched: list[tuple[OIALRLinear, dict[str, Tensor]]] = []
        for key, layer in model.named_modules():
            if isinstance(layer, OIALRLinear) and layer.has_adapter(adapter_name):
                tensors = cls._tensors_of(key, state_dict)
                if config.shrink == "mask" and not config.inference_mode and "oialr_sigma" in tensors:
                    tensors = _padded(tensors, layer.full_rank[adapter_name])
                    state_dict.update(
                        {full: tensors[full.rpartition(".")[2]] for full in cls._keys_of(key, state_dict)}
                    )
                matched.append((layer, tensors))
        matched = [(layer, tensors) for layer, tensors in matched if tensors]
        # all are checked before the first is changed
        for layer, tensors in matched:
            layer.check_checkpoint(tensors)
        for layer, tensors in matched:
            layer.match_checkpoint(adapter_name, tensors)
        if config.pretraining:
            state_dict = _fit_to_assign(model, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @staticmethod
    def _keys_of(module_key: str, state_dict: dict[str, Tensor]) -> list[str]:
        names = ("oialr_weight", "oialr_u", "oialr_sigma", "oialr_vh")
        prefixes = (module_key, f"base_model.model.{module_key}")
        return [f"{prefix}.{name}" for prefix in prefixes for name in names if f"{prefix}.{name}" in state_dict]

    @classmethod
    def _tensors_of(cls, module_key: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.rpartition(".")[2]: state_dict[key] for key in cls._keys_of(module_key, state_dict)}


def outside_layers(model: nn.Module, config: OIALRConfig, targets: Collection[str]) -> Elsewhere:
    """What a saved adapter may hold outside its layers, and what it must.

    Args:
        model: with or without the adapter.
        config: of the adapter.
        targets: full names of its layers.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    integers: set[str] = set()
    names_of: dict[int, set[str]] = {}  # several where modules share a parameter, of which transformers saves one
    state = _as_adapted(model, config)
    for key, value in state.items():
        if isinstance(value, Tensor) and f".{PREFIX}" not in key:
            name = without_wrappers(key)
            shapes[name] = tuple(value.shape)
            names_of.setdefault(id(value), set()).add(name)
            integers |= set() if value.is_floating_point() else {name}
    for name in targets:
        shapes.pop(f"{name}.weight", None)
    tokens: Any = config.trainable_token_indices or {}
    by_module = tokens.values() if isinstance(tokens, dict) else [tokens]
    # transformers has made integers, such as positions, part of the state and removed them again
    saved = {name for name in shapes if name not in integers and _is_saved(name, config, targets)}
    required = [frozenset(names) for names in names_of.values() if not names.isdisjoint(saved)]
    return Elsewhere(shapes, integers, required, {len(indices) for indices in by_module})


def _as_adapted(model: nn.Module, config: OIALRConfig) -> dict[str, Any]:
    """The state of the model, that of attention modules that are targets under the names of their projections."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and check_target_module_exists(config, name):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": value for key, value in SplitAttention(module).state_dict().items()}
    return state


def _is_saved(name: str, config: OIALRConfig, targets: Collection[str]) -> bool:
    """Whether a parameter outside the layers is in the file of an adapter."""
    module, _, part = name.rpartition(".")
    if config.pretraining or (part == "bias" and config.bias == "all"):
        return True
    if part == "bias" and config.bias == "oialr_only" and module in targets:
        return True
    return any(f".{key}." in f".{name}" for key in config.modules_to_save or [])


def _initial_factors(jobs: list[tuple[str, Tensor, int]]) -> Iterator[tuple[str, Factors]]:
    """The factors of the layers that start factored, by name; those of the largest weights come first."""
    jobs = sorted(jobs, key=lambda job: -job[1].numel())
    return zip([name for name, _, _ in jobs], factorize_all(jobs), strict=True)


def _fit_to_assign(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies outside the adapter, with dtypes and devices of the model, and as one parameter where weights are tied.

    `low_cpu_mem_usage=True` puts loaded tensors in the place of the model's own; others are copied into these.
    """
    places = model.state_dict(keep_vars=True)
    parameters: dict[int, nn.Parameter] = {}
    fitted = dict(state_dict)
    for key, tensor in state_dict.items():
        place = places.get(key, places.get(key.removeprefix("base_model.model.")))
        if isinstance(place, nn.Parameter) and not place.is_meta and not isinstance(place, DTensor):
            parameter = nn.Parameter(tensor.to(place), requires_grad=False)
            fitted[key] = parameters.setdefault(id(place), parameter)
    return fitted


def _padded(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    pad = max(0, size - tensors["oialr_sigma"].shape[0])
    widths = {"oialr_u": (0, pad), "oialr_sigma": (0, pad, 0, pad), "oialr_vh": (0, 0, 0, pad)}
    return {name: F.pad(tensor, widths[name]) for name, tensor in tensors.items()}


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Full names of parameters that stand at more than one place of the model, by identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: found for key, found in names.items() if len(found) > 1}


def _require_own_weight(weight: Tensor, name: str, shared: dict[int, list[str]]) -> None:
    if id(weight) in shared:
        raise ValueError(
            f"`{name}` shares its weight with another module ({', '.join(shared[id(weight)])}), which would keep the "
            "old weight. Leave it out with `exclude_modules`, or untie the weights (`tie_word_embeddings=False`)."
        )


def _require_own_weights_to_save(model: nn.Module, config: OIALRConfig, shared: dict[int, list[str]]) -> None:
    saved = config.modules_to_save or []
    for name, module in model.named_modules():
        tied = [shared[id(parameter)] for parameter in module.parameters() if id(parameter) in shared]
        if tied and any(name == key or name.endswith(f".{key}") for key in saved):
            raise ValueError(
                f"`modules_to_save` names `{name}`, whose weight is tied ({', '.join(tied[0])}): its copy would train, and "
                "the other end would stay as it is. Leave it out; `pretraining=True` trains and saves both as one."
            )


def _linear_modules_outside_the_head(model: nn.Module) -> list[str]:
    """Every `nn.Linear`, `Conv1D` and `nn.MultiheadAttention`, except the head and the inside of other adapters.

    Convolutions are left to be named, as in PEFT's other methods.
    """
    heads = tuple(f"{name}." for name in _head_names(model))
    inside = _prefixes_inside(model, BaseTunerLayer, *ATTENTION)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, OIALRLinear, *ATTENTION))
        and not f"{name}.".startswith(heads)
        and not name.startswith(inside)
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no linear layer outside its head. Name what `target_modules` shall be; "
            "convolutions are never chosen by default."
        )
    return names


def _exactly(names: list[str], model: nn.Module) -> set[str] | str:
    """A value of `target_modules` that names these modules and no other."""
    targets = set(names)
    others = {name for name, _ in model.named_modules()} - targets
    # a name in a set also stands for those that end in it
    if any(not targets.isdisjoint(_ends_of(other)) for other in others):
        return "|".join(re.escape(name) for name in names)
    return targets


def _ends_of(name: str) -> list[str]:
    """``["b.c", "c"]`` of ``"a.b.c"``."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _prefixes_inside(model: nn.Module, *kinds: type) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def _head_names(model: nn.Module) -> list[str]:
    """What a transformers model has around its base model, and its output embedding."""
    if not isinstance(model, PreTrainedModel):
        return []
    heads = [name for name, child in model.named_children() if model.base_model not in (model, child)]
    output = model.get_output_embeddings()
    return heads + [name for name, module in model.named_modules() if output is not None and module is output]


def _warn_about_untrained_head(model: nn.Module, config: OIALRConfig) -> None:
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return
    saved = set(config.modules_to_save or [])
    untrained = [
        name
        for name in _head_names(model)
        if name not in saved and any(True for _ in getattr(model, name).parameters())
    ]
    if untrained:
        warnings.warn(
            f"The head ({', '.join(untrained)}) is not a target and stays as it is. If it is new, pass "
            f"`modules_to_save={untrained}` or a `task_type`, so that it trains.",
            stacklevel=2,
        )


def _name_adapters(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook that gives `names` to the layer."""
    return args, {**kwargs, "adapter_names": names}


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return None
    return model.get_encoder()


def _warn_about_unknown_ranks(model: nn.Module, adapter_name: str, config: OIALRConfig) -> None:
    unknown = sorted(set(config.rank_pattern or {}) - set(adapter_layers(model, adapter_name)))
    if unknown:
        warnings.warn(
            f"`rank_pattern` names modules that are not targets, and are left out: {unknown}. Its keys are full module "
            "names.",
            RuntimeWarning,
            stacklevel=2,
        )


class _MissingControllerWatch:
    """Warns once when an adapter trains for a whole check interval and nobody calls `OIALRController.step`.

    A hook on one trained parameter, called when its gradient is ready. A new step began when the gradient is another
    tensor than before, because it was cleared, or the parameter's version was raised by an update; accumulating
    micro-batches does neither.
    """

    def __init__(self, layer: OIALRLinear, adapter_name: str, config: OIALRConfig) -> None:
        # not the layer itself: its parameter holds this hook, and the garbage collector does not see such a cycle
        self._controlled = layer.controlled
        self._adapter_name = adapter_name
        self._interval = config.update_every if isinstance(config.update_every, int) else STEPS_UNTIL_WARNING
        self._steps = 0
        self._warned = False
        self._last: tuple[weakref.ref[Tensor], int] | None = None  # gradient and version at the previous call

    @classmethod
    def attach(cls, model: nn.Module, adapter_name: str, config: OIALRConfig) -> None:
        """Watch the first layer of the adapter that trains, if any does."""
        for layer in adapter_layers(model, adapter_name).values():
            parameter = layer.trained_parameter(adapter_name)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(cls(layer, adapter_name, config))
                return

    def __call__(self, parameter: Tensor) -> None:
        if self._warned or self._adapter_name in self._controlled:
            return
        assert parameter.grad is not None
        if self._last is not None and (self._last[0]() is not parameter.grad or self._last[1] != parameter._version):
            self._steps += 1
        self._last = weakref.ref(parameter.grad), parameter._version
        if self._steps >= self._interval:
            self._warned = True
            warnings.warn(
                f"The OIALR adapter `{self._adapter_name}` has trained for {self._steps} optimizer steps without a "
                "controller: no layer is factored and no rank shrinks. Use OIALRTrainer, add OIALRCallback() to your "
                "Trainer, or call OIALRController.step() after each optimizer step.",
                stacklevel=2,
            )
