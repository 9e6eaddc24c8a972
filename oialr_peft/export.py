"""Standalone low-rank checkpoints: a transformers model whose target layers are stored, loaded and run as factors.

`save_low_rank` writes them; after ``import oialr_peft``, ``AutoModelForX.from_pretrained(directory)`` loads them. The way
in is transformers' registry of quantizers, which changes a model's modules before its weights are read: neither a base
model nor a dense weight of a factored layer is ever made.
"""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _is_key_under_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from oialr_peft import hub
from oialr_peft.factors import Factors
from oialr_peft.layer import OIALRLinear
from oialr_peft.ops import build, factored_linear

METHOD = "oialr_low_rank"
FORMAT_VERSION = 1


class LowRankLinear(nn.Module):
    """``y = x V Σᵀ Uᵀ + b``, a linear module that has only its factors; Σ and b train, U and V are frozen.

    Args:
        in_features, out_features: n and m.
        rank: r, between 1 and min(m, n).
        bias: whether there is a b.
        transposed: whether it stands for a transformers `Conv1D`, which `to_dense` then makes again.
        device, dtype: of the parameters.

    Attributes:
        u, sigma, vh: (m, r), (r, r), (r, n).
        bias: (m,) or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.transposed = in_features, out_features, rank, transposed
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.zeros(out_features, rank, **made), requires_grad=False)
        self.sigma = nn.Parameter(torch.zeros(rank, rank, **made))
        self.vh = nn.Parameter(torch.zeros(rank, in_features, **made), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, **made)) if bias else None

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the dense weight, which does not exist: a tensor without values."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return torch.empty(shape, dtype=self.sigma.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) → (..., m)."""
        return factored_linear(x, Factors(self.u, self.sigma, self.vh), self.bias)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """The dense module that computes the same."""
        dense: nn.Linear | Conv1D
        with torch.device("meta"):
            if self.transposed:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = build(Factors(self.u, self.sigma, self.vh))
        dense.weight = nn.Parameter((weight.T if self.transposed else weight).contiguous())
        if self.bias is not None:
            dense.bias = self.bias
        return dense

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConfig(QuantizationConfigMixin):
    """What a standalone checkpoint says of its layers, in `config.json` under `quantization_config`.

    Args:
        ranks: full module name → rank of the factored layers.
        format_version: of the checkpoint.

    Raises:
        ValueError: the checkpoint is of a later format, or a rank is no positive integer.
    """

    def __init__(self, ranks: dict[str, int], format_version: int = FORMAT_VERSION, **_: Any) -> None:
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has format {format_version}; this release reads up to {FORMAT_VERSION}. Upgrade "
                "oialr-peft."
            )
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"`ranks` must hold positive integers, but has {rank!r} for `{name}`.")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks = ranks
        self.format_version = format_version


class LowRankQuantizer(HfQuantizer):
    """Puts `LowRankLinear` modules into a model before its weights are loaded; nothing is quantized."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        replace_by_low_rank(model, self.quantization_config.ranks)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.u.requires_grad_(False)
                module.vh.requires_grad_(False)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRankLinear):
                model.set_submodule(name, module.to_dense().to(dtype or module.sigma.dtype))
        return model

    def is_serializable(self) -> bool:
        """Such a model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Such a model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The Trainer may train it without an adapter."""
        return True


def register() -> None:
    """Make transformers know the format; calling again replaces the classes of an earlier import."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LowRankConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = LowRankQuantizer


def replace_by_low_rank(model: PreTrainedModel, ranks: dict[str, int]) -> None:
    """Put a `LowRankLinear` of the given rank in the place of each named linear module; values are not set.

    Names may have the prefix of the base model (``bert.``) or lack it, as the checkpoint of a model with a head does when
    its base model is loaded, and the other way round. Layers that this model does not have, such as a head, are left out.

    Raises:
        ValueError: none of the names fits, or a module is not linear or too small for its rank.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    found = 0
    for recorded, rank in ranks.items():
        names = (recorded, recorded.removeprefix(prefix), prefix + recorded)
        name = next((name for name in names if name in modules), None)
        if name is None:
            continue
        module = modules[name]
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(
                f"`{name}` is stored as factors, but is a {type(module).__name__} here: not the same model."
            )
        transposed = isinstance(module, Conv1D)
        out_features, in_features = module.weight.T.shape if transposed else module.weight.shape
        if rank > min(out_features, in_features):
            raise ValueError(f"`{name}` is stored at rank {rank}, more than its {out_features}×{in_features} can have.")
        made = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=module.bias is not None,
            transposed=transposed,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        model.set_submodule(name, made)
        found += 1
    if ranks and not found:
        raise ValueError(
            f"None of the {len(ranks)} factored layers of the checkpoint, such as `{next(iter(ranks))}`, is in a "
            f"{type(model).__name__}. Load it as the class that it was saved from."
        )


class _Standalone(NamedTuple):
    state_dict: dict[str, Tensor]
    ranks: dict[str, int]


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
    ``model.dequantize()`` makes it dense.

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
        ValueError: the model is no transformers model, has no such adapter, has other adapters in it, or a layer cannot be
            stored by its factors alone: in residual mode, or merged.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses the upload.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`model` must be a transformers model with an OIALR adapter, but is a {type(base).__name__}. Save another "
            "model's adapter with `save_pretrained`."
        )
    stored = _standalone(base, adapter_name)
    config = copy.deepcopy(base.config)
    config.quantization_config = LowRankConfig(stored.ranks)
    with torch.device("meta"):
        skeleton = type(base)(config)
    replace_by_low_rank(skeleton, stored.ranks)
    skeleton.load_state_dict(stored.state_dict, assign=True, strict=False)
    skeleton.tie_weights()
    left = [name for name, parameter in skeleton.named_parameters() if parameter.is_meta]
    if left:
        raise ValueError(f"`{left[0]}` of {type(base).__name__} has no value in this model, so it cannot be saved.")
    skeleton.hf_quantizer = LowRankQuantizer(config.quantization_config)  # type: ignore[assignment]
    if getattr(base, "generation_config", None) is not None:
        skeleton.generation_config = base.generation_config
    skeleton.save_pretrained(directory, **kwargs)
    if kwargs.get("is_main_process", True):
        target = hub.prepared_repository(directory, repo_id, private=private, token=token) if push_to_hub else None
        hub.write_low_rank_card(directory, base, adapter_name, repo_id=target)
        if target is not None:
            hub.upload(directory, target, token=token, commit_message=commit_message)


def _standalone(base: PreTrainedModel, adapter_name: str | None) -> _Standalone:
    """The state of the base model under its own names, with factors in the place of adapted weights."""
    state = base.state_dict()
    ranks: dict[str, int] = {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, OIALRLinear)}
    if not layers:
        raise ValueError("The model has no OIALR adapter, so there is nothing low-rank to save. Use `save_pretrained`.")
    name = adapter_name or next(iter(layers.values())).active_adapters[0]
    replaced: set[str] = set()
    ours: dict[str, Tensor] = {}
    for key, module in base.named_modules():
        if isinstance(module, OIALRLinear):
            replaced.add(key)
            ours |= _of_layer(key, module, name, ranks)
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
    return _Standalone(state, ranks)


def _of_layer(key: str, layer: OIALRLinear, name: str, ranks: dict[str, int]) -> dict[str, Tensor]:
    if not layer.has_adapter(name):
        raise ValueError(f"`{key}` has no adapter `{name}`. Pass the `adapter_name` of one that covers every layer.")
    if layer.residual[name] or layer.merged or not isinstance(layer.base_layer, (nn.Linear, Conv1D)):
        raise ValueError(
            f"`{key}` is more than its factors: its adapter is residual, merged, or on top of another one. Use "
            "`merge_and_unload` and save the dense model."
        )
    bias = layer.get_base_layer().bias
    stored = {} if bias is None else {f"{key}.bias": cast(Tensor, bias).detach()}
    if layer.is_dense(name):
        weight = layer.oialr_weight[name].detach()
        return stored | {f"{key}.weight": (weight.T if layer.transposed else weight).contiguous()}
    ranks[key] = layer.rank(name)
    return stored | {f"{key}.{part}": factor for part, factor in layer.factors(name)._asdict().items()}
