"""`OIALRModel`: the tuner that PEFT calls to put adapter layers into a model, and to save and load them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from oialr_peft.files.checkpoints import adapter_file, check_adapter_file
from oialr_peft.linalg.factors import Factors, factorize_all
from oialr_peft.parallel.progress import decomposition_bar
from oialr_peft.tuner.attention import ATTENTION, SplitAttention, avoid_fast_path, projections_of
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear, initial_rank, parameters_become_meta, supported_module
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.matricization import Matricization, matricization_of
from oialr_peft.tuner.quantization import is_quantized
from oialr_peft.tuner.registration import PREFIX
from oialr_peft.tuner.saved import fit_to_assign, outside_layers, padded, saving_of
from oialr_peft.tuner.targets import (
    ends_of,
    exactly,
    linear_modules_outside_the_head,
    prefixes_inside,
    require_own_weight,
    require_own_weights_to_save,
    shared_weights,
    warn_about_unknown_ranks,
    warn_about_untrained_head,
)
from oialr_peft.tuner.watch import MissingControllerWatch


class OIALRModel(BaseTuner):
    """Replaces the target modules of a model by `OIALRLinear` layers.

    Made by `peft.get_peft_model(model, OIALRConfig(...))`; not meant to be called directly.

    Raises:
        ValueError: a target is of an unsupported kind, shares its weight with another module, or the configuration does
            not fit the adapters that the model already has.

    Examples:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> config = OIALRConfig(target_modules=["0"], rank=3)
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
            # PEFT does not know the projections of an attention module; `warn_about_unknown_ranks` does
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        warn_about_unknown_ranks(model, adapter_name, config)
        if config.resolved().releases_base and config.inference_mode:
            model.requires_grad_(False)
        if not config.inference_mode:
            MissingControllerWatch.attach(model, adapter_name, config)

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
        if len(self.peft_config) > 1 and any(other.resolved().releases_base for other in self.peft_config.values()):
            raise ValueError(
                '`mode="pretraining"` releases the base weights, so such a model has exactly one adapter, but '
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
            config.target_modules = cast(Any, config.target_modules & {key, *ends_of(key)})
        return BaseTuner._check_target_module_exists(config, key)

    def _prepare_model(self, peft_config: OIALRConfig, model: nn.Module) -> None:  # type: ignore[override]
        settings = peft_config.resolved()
        target = peft_config.target_modules
        if isinstance(target, str) and target.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = exactly(linear_modules_outside_the_head(model), model)  # type: ignore[assignment]
            if not peft_config.inference_mode and not settings.releases_base:
                warn_about_untrained_head(model, peft_config)
        # before anything is replaced, so that a refused target leaves the model as it was
        shared = shared_weights(model)
        if settings.releases_base:
            require_own_weights_to_save(model, peft_config, shared)
        inside = prefixes_inside(model, BaseTunerLayer, *ATTENTION)
        self._factors: dict[str, Factors] = {}
        weights: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name):
                for full_name, projection in projections_of(module, name):
                    inner = supported_module(projection, full_name, keeps_base=settings.is_correction)
                    require_own_weight(inner.weight, full_name, shared)
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
        if not any(self.peft_config[name].resolved().releases_base for name in self.active_adapters):
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
            MissingControllerWatch.attach(self.model, adapter_name, self.peft_config[adapter_name])

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
            "turn adapters that are corrections into LoRA adapters with `save_lora`, and combine those."
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
        if any(config.resolved().releases_base for config in self.peft_config.values()):
            raise RuntimeError(
                f'`{what}` needs the base weights, but `mode="pretraining"` released them: the trained weights are the '
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
        config.expect_saving(saving_of(model, config, adapter_name))
        if config.resolved().releases_base:
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
                    tensors = padded(tensors, layer.full_rank[adapter_name])
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
        if config.resolved().releases_base:
            state_dict = fit_to_assign(model, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @staticmethod
    def _keys_of(module_key: str, state_dict: dict[str, Tensor]) -> list[str]:
        names = ("oialr_weight", "oialr_u", "oialr_sigma", "oialr_vh")
        prefixes = (module_key, f"base_model.model.{module_key}")
        return [f"{prefix}.{name}" for prefix in prefixes for name in names if f"{prefix}.{name}" in state_dict]

    @classmethod
    def _tensors_of(cls, module_key: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.rpartition(".")[2]: state_dict[key] for key in cls._keys_of(module_key, state_dict)}


def _initial_factors(jobs: list[tuple[str, Tensor, int]]) -> Iterator[tuple[str, Factors]]:
    """The factors of the layers that start factored, by name; those of the largest weights come first."""
    jobs = sorted(jobs, key=lambda job: -job[1].numel())
    return zip([name for name, _, _ in jobs], factorize_all(jobs), strict=True)


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
