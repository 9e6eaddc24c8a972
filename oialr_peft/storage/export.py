"""Writes models in forms that others load: standalone low-rank checkpoints, dense ones, and LoRA adapters.

================ ============================== =============================== ==========================
function         what is written                needed to load it               which adapters
================ ============================== =============================== ==========================
`save_low_rank`  U, Σ, Vᵀ of each layer         transformers and this package   replace mode
`save_dense`     the merged weights             transformers                    all; base not quantized
`save_lora`      A = Vᵀ, B = U C of each layer  PEFT and the base model         adapter mode
================ ============================== =============================== ==========================

Nothing is merged into the model at hand, and nothing is written that is not finite.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, _is_key_under_prefixes
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oialr_peft.files.checkpoints import WEIGHT_FILES
from oialr_peft.files.writing import replacing_in
from oialr_peft.linalg.factors import first_not_finite
from oialr_peft.storage import hub
from oialr_peft.storage.low_rank import (
    LowRankConfig,
    LowRankLinear,
    LowRankQuantizer,
    join_attention,
    replace_by_low_rank,
)
from oialr_peft.tuner.attention import SplitAttention
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import active_adapter


def save_low_rank(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload low-rank model",
    **kwargs: Any,
) -> None:
    """Write a transformers checkpoint whose factored layers are stored as U, Σ, Vᵀ; other layers as they are.

    After ``import oialr_peft``, every ``AutoModelForX.from_pretrained(directory)`` loads it, with `dtype`, `device_map`
    and the rest. The result computes what `model` computes with this adapter, trains on, and can be saved again.
    `to_dense` makes it dense.

    Args:
        model: a transformers model with an OIALR adapter in replace mode, as a `PeftModel` or not.
        directory: where to write.
        adapter_name: which adapter; `None` means the active one.
        push_to_hub: whether to upload the directory, after it was written.
        repo_id: the repository, made if it does not exist; `None` means the name of the directory.
        private: whether a new repository is private; `None` means the default of the account.
        token: of the account; `None` means the one that is logged in.
        commit_message: of the upload.
        **kwargs: of `PreTrainedModel.save_pretrained`, such as `max_shard_size`.

    Raises:
        ValueError: the model is no transformers model, has no such adapter, has other adapters in it, a value is not
            finite, or a layer cannot be stored by its factors alone: of a correction, or merged.
        OSError: the files could not be written; what was in the directory before is unchanged.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses the upload.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> base = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **sizes))
        >>> config = OIALRConfig(task_type="SEQ_CLS", mode="replace", freeze_when="delay", delay=0, rank=8)
        >>> model = get_peft_model(base, config)
        >>> save_low_rank(model, "low-rank")
        >>> loaded = AutoModelForSequenceClassification.from_pretrained("low-rank")
        >>> loaded.bert.encoder.layer[0].intermediate.dense
        LowRankLinear(in_features=32, out_features=64, rank=8)
    """
    base = _transformers_model(model)
    stored = _state_of(base, adapter_name, dense=False)
    _warn_if_dense_is_smaller(base, stored.ranks)
    config = copy.deepcopy(base.config)
    config.quantization_config = LowRankConfig(stored.ranks, stored.split_attention)
    skeleton = _filled(base, config, stored)
    skeleton.hf_quantizer = LowRankQuantizer(config.quantization_config)  # type: ignore[assignment]
    with replacing_in(directory, WEIGHT_FILES) as unfinished:
        skeleton.save_pretrained(unfinished, **kwargs)
    if kwargs.get("is_main_process", True):
        target = hub.prepared_repository(directory, repo_id, private=private, token=token) if push_to_hub else None
        hub.write_low_rank_card(directory, base, adapter_name, repo_id=target)
        if target is not None:
            hub.upload(directory, target, token=token, commit_message=commit_message)


def _warn_if_dense_is_smaller(base: PreTrainedModel, ranks: Mapping[str, int]) -> None:
    layers = [cast(OIALRLinear, base.get_submodule(name)) for name in ranks]
    dense = sum(layer.form.m * layer.form.n for layer in layers)
    factored = sum(
        (layer.form.m + layer.form.n + rank) * rank for layer, rank in zip(layers, ranks.values(), strict=True)
    )
    if factored > dense:
        warnings.warn(
            f"The factors of the {len(layers)} layers hold {factored:,} numbers, their dense weights would hold "
            f"{dense:,}: the ranks are too high to save space. `save_dense` writes the smaller checkpoint.",
            stacklevel=3,
        )


class DenseExport(NamedTuple):
    """How far the outputs of a merged model, as loaded from its files, are from those of the model it was made of."""

    difference: float  # largest |merged − adapted| over all outputs
    scale: float  # largest |adapted|

    def __str__(self) -> str:
        return f"largest difference of an output: {self.difference:.3g}, of outputs up to {self.scale:.3g}"


def save_dense(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> DenseExport:
    """Write a plain transformers checkpoint with the adapter merged into its weights, and compare the outputs.

    Args:
        model: a transformers model with an OIALR adapter, or one that was loaded from a low-rank checkpoint. It is not
            changed.
        directory: where to write.
        adapter_name: which adapter; `None` means the active one.
        example_inputs: arguments of the model's `forward` to compare the outputs on; `None` means random tokens or
            pixels, where that is what the model takes.
        **kwargs: of `PreTrainedModel.save_pretrained`.

    Returns:
        The largest difference of an output, and the largest output.

    Raises:
        ValueError: a weight is not finite, in which case nothing is written; the base weights are quantized; there are
            other adapters in the model; or it takes inputs that cannot be made here.
        OSError: the files could not be written; what was in the directory before is unchanged.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> base = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **sizes))
        >>> config = OIALRConfig(task_type="SEQ_CLS", mode="replace", freeze_when="delay", delay=0, rank=8)
        >>> model = get_peft_model(base, config)
        >>> save_dense(model, "dense").difference < 1e-5
        True
        >>> type(AutoModelForSequenceClassification.from_pretrained("dense").bert.pooler.dense).__name__
        'Linear'
    """
    base = _transformers_model(model)
    inputs = _example_inputs(base) if example_inputs is None else dict(example_inputs)
    stored = _state_of(base, adapter_name, dense=True)
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)
    dense = _filled(base, config, stored)
    join_attention(dense)
    with replacing_in(directory, WEIGHT_FILES) as unfinished:
        dense.save_pretrained(unfinished, **kwargs)
    written = cast(Any, type(base).from_pretrained(directory, dtype=base.dtype)).to(base.device)
    return _compare(base, written, inputs)


def to_dense(model: nn.Module) -> nn.Module:
    """Make a model dense in place: merge its OIALR adapter, or multiply the factors of a low-rank checkpoint.

    Args:
        model: a `PeftModel` with an OIALR adapter, or a model that was loaded from a low-rank checkpoint.

    Returns:
        The plain model, which transformers saves and loads without this package.

    Raises:
        ValueError: it is neither, or a merged weight is not finite.

    Examples:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> model = get_peft_model(base, OIALRConfig(target_modules=["0"], mode="replace", freeze_when="delay", delay=0, rank=3))
        >>> to_dense(model)
        Sequential(
          (0): Linear(in_features=6, out_features=4, bias=True)
          (1): Tanh()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    if isinstance(model, PeftModel):
        return cast(nn.Module, model.merge_and_unload(safe_merge=True))
    if isinstance(model, PreTrainedModel) and isinstance(getattr(model, "hf_quantizer", None), LowRankQuantizer):
        return cast(nn.Module, model.dequantize())
    raise ValueError(
        f"`model` must be a PeftModel or be loaded from a low-rank checkpoint, but is a {type(model).__name__} that is "
        "neither. A dense model needs nothing."
    )


def save_lora(model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str | None = None) -> None:
    """Write an adapter that is a correction as a LoRA adapter that PEFT loads without this package: ``A = Vᵀ``, ``B = U C``.

    No decomposition is needed, each layer keeps its own rank, and the two compute the same up to rounding.

    Args:
        model: a `PeftModel` with an OIALR adapter of adapter mode.
        directory: where to write `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: which adapter; `None` means the active one.

    Raises:
        ValueError: the adapter is no correction, a value is not finite, or a layer is of a kind that LoRA has not: a
            projection of `nn.MultiheadAttention`, or a convolution with dilation or a padding mode.
        OSError: the files could not be written; what was in the directory before is unchanged.

    Examples:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> model = get_peft_model(copy.deepcopy(base), OIALRConfig(target_modules=["0"], rank=3))
        >>> save_lora(model, "lora")
        >>> lora = PeftModel.from_pretrained(base, "lora")
        >>> type(lora.peft_config["default"]).__name__, lora.base_model.model[0].r["default"]
        ('LoraConfig', 3)
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`model` must be a PeftModel, but is a {type(model).__name__}. Wrap it with `get_peft_model`."
        )
    name = adapter_name or model.active_adapter
    layers = {each.name: each for each in _layers_of(model, name).values()}
    config = cast(OIALRConfig, model.peft_config[name])
    if not config.resolved().is_correction:
        raise ValueError(
            'Only adapters with `mode="adapter"` are low-rank corrections of the base weights, as LoRA is, but this one replaces '
            "them. Use `save_low_rank` or `save_dense`; `peft.save_as_lora` approximates the difference."
        )
    for key, layer in layers.items():
        _require_lora_equivalent(key, layer, model)
    state = get_peft_model_state_dict(model, adapter_name=name)
    state = {key: value for key, value in state.items() if ".oialr_" not in key}
    for key, layer in layers.items():
        factors = layer.factors(name)
        prefix, ones = f"base_model.model.{key}.lora_", (1,) * (len(layer.form.weight_shape) - 2)
        b = factors.u @ factors.sigma
        state[f"{prefix}A.weight"] = layer.form.stored(factors.vh) if ones else factors.vh
        state[f"{prefix}B.weight"] = b.reshape(*b.shape, *ones)
    _require_finite(state)
    ranks = {key: layer.rank(name) for key, layer in layers.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        bias=cast(Any, {"oialr_only": "lora_only"}.get(config.bias, config.bias)),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    with replacing_in(directory) as unfinished:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in state.items()},
            unfinished / SAFETENSORS_WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        lora.save_pretrained(os.fspath(unfinished))


def _require_lora_equivalent(name: str, layer: OIALRLinear, model: nn.Module) -> None:
    in_attention = isinstance(model.get_submodule(f"base_model.model.{name}".rpartition(".")[0]), SplitAttention)
    settings = layer.form.settings
    plain = settings.get("padding_mode", "zeros") == "zeros" and set(settings.get("dilation", ())) <= {1}
    if in_attention or not plain:
        raise ValueError(
            f"`{name}` has no counterpart among PEFT's LoRA layers, which know neither single projections of "
            "nn.MultiheadAttention nor convolutions with dilation or a padding mode. Use `save_dense`."
        )


# ---- the state of a model under its own names ------------------------------------------------------------------------


class _Stored(NamedTuple):
    state_dict: dict[str, Tensor]
    ranks: dict[str, int]
    split_attention: list[str]


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`model` must be a transformers model with an OIALR adapter, but is a {type(base).__name__}. Save another "
            "model's adapter with `save_pretrained`."
        )
    return base


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, OIALRLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, OIALRLinear)}
    if not layers:
        raise ValueError("The model has no OIALR adapter, so there is nothing low-rank to save. Use `save_pretrained`.")
    for key, layer in layers.items():
        if not layer.has_adapter(adapter_name):
            raise ValueError(
                f"`{key}` has no adapter `{adapter_name}`. Pass the `adapter_name` of one that covers every layer."
            )
    return layers


def _state_of(base: PreTrainedModel, adapter_name: str | None, *, dense: bool) -> _Stored:
    """The state of the base model under its own names, with factors or merged weights in the place of adapted ones."""
    name, layers = "", {}
    if not (dense and any(isinstance(module, LowRankLinear) for module in base.modules())):
        name = adapter_name or active_adapter(base) or ""
        layers = _layers_of(base, name)
    state = base.state_dict()
    replaced: set[str] = set()
    ours: dict[str, Tensor] = {}
    for key, module in base.named_modules():
        if isinstance(module, OIALRLinear):
            replaced.add(key)
            ours |= _of_layer(key, module, name, dense=dense)
        elif isinstance(module, LowRankLinear) and dense:
            replaced.add(key)
            ours |= {f"{key}.{part}": value.detach() for part, value in module.to_dense().named_parameters()}
        elif isinstance(module, ModulesToSaveWrapper):
            replaced.add(key)
            trained = module.modules_to_save[name].state_dict()
            ours |= {f"{key}.{inside}": value for inside, value in trained.items()}
        elif isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)) and not _is_key_under_prefixes(
            key, replaced
        ):
            raise ValueError(
                f"`{key}` has an adapter of another kind ({type(module).__name__}). Merge that one first, with "
                "`merge_and_unload`."
            )
    state = {key: value for key, value in state.items() if not _is_key_under_prefixes(key, replaced)} | ours
    _require_finite(state)
    attention = [key for key, module in base.named_modules() if isinstance(module, SplitAttention)]
    ranks = {key: layer.rank(name) for key, layer in layers.items() if not dense and not layer.is_dense(name)}
    return _Stored(state, ranks, attention)


def _of_layer(key: str, layer: OIALRLinear, name: str, *, dense: bool) -> dict[str, Tensor]:
    nested = isinstance(layer.base_layer, BaseTunerLayer)
    if layer.merged or nested or (layer.is_correction[name] and not dense):
        raise ValueError(
            f"`{key}` is more than its factors: its adapter is a correction, merged, or on top of another one. Use "
            "`save_dense` for a correction, and unmerge a merged one."
        )
    bias = layer.get_base_layer().bias
    stored = {} if bias is None else {f"{key}.bias": cast(Tensor, bias).detach()}
    if dense:
        return stored | {f"{key}.weight": layer.merged_weight([name])}
    if layer.is_dense(name):
        return stored | {f"{key}.weight": layer.form.stored(layer.oialr_weight[name].detach()).contiguous()}
    return stored | {f"{key}.{part}": factor for part, factor in layer.factors(name)._asdict().items()}


def _require_finite(state: Mapping[str, Tensor]) -> None:
    name = first_not_finite({name: value for name, value in state.items() if value.is_floating_point()})
    if name is not None:
        raise ValueError(f"`{name}` holds NaN or Inf, so nothing is written. Go back to an earlier checkpoint.")


def _filled(base: PreTrainedModel, config: PreTrainedConfig, stored: _Stored) -> PreTrainedModel:
    """A model of the same class that holds the stored tensors themselves, with modules for their factors."""
    with torch.device("meta"):
        model = cast(PreTrainedModel, cast(Any, type(base))(config))
    replace_by_low_rank(model, stored.ranks, stored.split_attention)
    model.load_state_dict(stored.state_dict, assign=True, strict=False)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"`{left[0]}` of {type(base).__name__} has no value in this model, so it cannot be saved.")
    if getattr(base, "generation_config", None) is not None:
        model.generation_config = base.generation_config
    return model


# ---- comparing outputs -----------------------------------------------------------------------------------------------


def _example_inputs(base: PreTrainedModel) -> dict[str, Tensor]:
    """Random tokens or pixels, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    config = base.config.get_text_config()
    vocabulary, size = getattr(config, "vocab_size", None), getattr(base.config, "image_size", None)
    if base.main_input_name == "input_ids" and vocabulary is not None:
        tokens = torch.randint(vocabulary, (2, 8), generator=generator).to(base.device)
        return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
    if base.main_input_name == "pixel_values" and isinstance(size, int):
        pixels = torch.randn(2, base.config.num_channels, size, size, generator=generator)
        return {"pixel_values": pixels.to(base.device, base.dtype)}
    raise ValueError(
        f"{type(base).__name__} takes `{base.main_input_name}`, which cannot be made here. Pass `example_inputs` to "
        "compare the outputs on."
    )


@torch.no_grad()
def _compare(model: PreTrainedModel, merged: PreTrainedModel, inputs: dict[str, Any]) -> DenseExport:
    training = model.training
    model.eval()
    try:
        expected = _outputs(model(**inputs))
    finally:
        model.train(training)
    found = _outputs(merged.eval()(**inputs))
    return DenseExport(
        max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True)),
        max(float(each.abs().max()) for each in expected),
    )


def _outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returned, without caches."""
    values = output.values() if isinstance(output, Mapping) else output
    return [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
