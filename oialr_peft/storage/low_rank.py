"""The standalone low-rank format: a transformers model whose target layers are stored, loaded and run as factors.

After ``import oialr_peft``, ``AutoModelForX.from_pretrained(directory)`` reads it. The way in is transformers' registry of
quantizers, which changes a model's modules before its weights are read: neither a base model nor a dense weight of a
factored layer is ever made. What writes it is in `export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from oialr_peft.files.checkpoints import check_low_rank_files
from oialr_peft.files.values import is_count
from oialr_peft.linalg.factors import Factors
from oialr_peft.linalg.ops import build
from oialr_peft.tuner.attention import SplitAttention
from oialr_peft.tuner.matricization import LinearModule, Matricization, matricization_of

METHOD = "oialr_low_rank"
FORMAT_VERSION = 1


class LowRankLinear(nn.Module):
    """``y = x V Σᵀ Uᵀ + b``, a linear map that has only its factors; Σ and b train, U and V are frozen.

    Args:
        form: what it stands for: sizes m, n, and how the dense weight would be stored.
        rank: r, between 1 and min(m, n).
        bias: whether there is a b.
        device, dtype: of the parameters.

    Attributes:
        u, sigma, vh: (m, r), (r, r), (r, n).
        bias: (m,) or None.
    """

    def __init__(
        self,
        form: Matricization,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form, self.rank = form, rank
        self.in_features, self.out_features = form.n, form.m
        vars(self).update(form.settings)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.zeros(form.m, rank, **made), requires_grad=False)
        self.sigma = nn.Parameter(torch.zeros(rank, rank, **made))
        self.vh = nn.Parameter(torch.zeros(rank, form.n, **made), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(form.m, **made)) if bias else None

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the dense weight, which does not exist: a tensor without values."""
        return torch.empty(self.form.weight_shape, dtype=self.sigma.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) → (..., m), or what the convolution takes and gives."""
        return self.form.chain(x, Factors(self.u, self.sigma, self.vh), self.bias)

    @torch.no_grad()
    def to_dense(self) -> LinearModule:
        """The dense module that computes the same."""
        dense = self.form.empty(bias=self.bias is not None)
        weight = build(Factors(self.u, self.sigma, self.vh))
        dense.weight = nn.Parameter(self.form.stored(weight).contiguous())
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
        split_attention: full names of `nn.MultiheadAttention` modules whose projections are stored one by one.
        format_version: of the checkpoint.

    Raises:
        ValueError: the checkpoint is of a later format, or a rank is no positive integer.
    """

    def __init__(
        self,
        ranks: dict[str, int],
        split_attention: Sequence[str] = (),
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if isinstance(format_version, int) and format_version > FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has format {format_version}; this release reads up to {FORMAT_VERSION}. Upgrade "
                "oialr-peft."
            )
        known = isinstance(format_version, int) and format_version >= 1
        listed = isinstance(split_attention, (list, tuple)) and all(isinstance(name, str) for name in split_attention)
        if not (known and listed and isinstance(ranks, dict)):
            raise ValueError(
                "`quantization_config` in config.json must have an object `ranks`, a list of names `split_attention` and "
                f"an int `format_version` ≥ 1, but has {ranks!r}, {split_attention!r} and {format_version!r}. Restore it."
            )
        for name, rank in ranks.items():
            if not is_count(rank):
                raise ValueError(
                    f"`ranks` in config.json must hold positive integers, but has {rank!r} for `{name}`. Restore it."
                )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.ranks = ranks
        self.split_attention = list(split_attention)
        self.format_version = format_version


class LowRankQuantizer(HfQuantizer):
    """Puts `LowRankLinear` modules into a model before its weights are loaded; nothing is quantized."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        check_low_rank_files(kwargs.get("checkpoint_files") or [], config.ranks, model.name_or_path or "")
        replace_by_low_rank(model, config.ranks, config.split_attention)
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
        join_attention(model)
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


def replace_by_low_rank(model: PreTrainedModel, ranks: dict[str, int], split_attention: Sequence[str] = ()) -> None:
    """Put a `LowRankLinear` of the given rank in the place of each named linear module; values are not set.

    Names may have the prefix of the base model (``bert.``) or lack it, as the checkpoint of a model with a head does when
    its base model is loaded, and the other way round. Layers that this model does not have, such as a head, are left out.

    Args:
        model: changed in place, unless an error is raised.
        ranks: full module name → rank.
        split_attention: full names of the `nn.MultiheadAttention` modules that become `SplitAttention` first.

    Raises:
        ValueError: none of the names fits, or a module is of another kind or too small for its rank.
    """
    attention = {}
    for recorded in split_attention:
        name = _name_here(model, recorded)
        if name is not None:
            attention[name] = SplitAttention(model.get_submodule(name))  # type: ignore[arg-type]
    made = {}
    for recorded, rank in ranks.items():
        parent, _, child = recorded.rpartition(".")
        inside = _name_here(model, parent)
        if inside in attention:
            made[f"{inside}.{child}"] = _low_rank_of(attention[inside].get_submodule(child), rank, recorded)
        elif (name := _name_here(model, recorded)) is not None:
            made[name] = _low_rank_of(model.get_submodule(name), rank, recorded)
    if ranks and not made:
        raise ValueError(
            f"None of the {len(ranks)} factored layers in config.json, such as `{next(iter(ranks))}`, is in a "
            f"{type(model).__name__}. Load it as the class that it was saved from."
        )
    for name, module in (attention | made).items():
        model.set_submodule(name, module)


def join_attention(model: nn.Module) -> None:
    """Make each `SplitAttention`, whose projections must be dense, an `nn.MultiheadAttention` again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitAttention):
            model.set_submodule(name, module.to_multihead())


def _name_here(model: PreTrainedModel, recorded: str) -> str | None:
    prefix = f"{model.base_model_prefix}."
    for name in (recorded, recorded.removeprefix(prefix), prefix + recorded):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def _low_rank_of(module: nn.Module, rank: int, name: str) -> LowRankLinear:
    form = matricization_of(module)
    if form is None:
        raise ValueError(
            f"`{name}` has a rank in config.json, but is a {type(module).__name__}, which has none. Restore it, or load it "
            "as the class that it was saved from."
        )
    if rank > min(form.m, form.n):
        raise ValueError(
            f"`{name}` has rank {rank} in config.json, more than its {form.m}×{form.n} can have. Restore it."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LowRankLinear(form, rank, bias=module.bias is not None, device=weight.device, dtype=weight.dtype)
