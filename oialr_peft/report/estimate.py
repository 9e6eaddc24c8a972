"""What training a model would take, from its configuration alone: nothing is allocated, and nothing is measured.

The adapter is put into the model on the meta device, and its parameters are counted there. Memory is that of weights,
gradients and AdamW's two moments; activations come on top. FLOPs are those of products with weights, two for each
multiply-add, forward and backward; attention scores and convolutions that are no targets come on top and are the same
for all.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oialr_peft.linalg.ops import crossover_rank, inference_crossover_rank, route_cost
from oialr_peft.storage.inspection import require_source
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.matricization import matricization_of
from oialr_peft.tuner.quantities import rank_of
from oialr_peft.tuner.settings import Mode


class Phase(NamedTuple):
    """A way to train the model, or a phase of it."""

    name: str
    parameters: int  # held, trained or not
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int  # AdamW: two for each trained parameter
    training_flops: float  # per token
    inference_flops: float  # per token

    @property
    def total_bytes(self) -> int:
        """Weights, gradients and moments."""
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes


class Shape(NamedTuple):
    """Target layers of one shape, and the ranks below which factors are cheaper."""

    out_features: int
    in_features: int
    layers: int  # of this shape
    rank: int  # that was asked for
    training_below: float
    inference_below: float


class Estimate(NamedTuple):
    """What `estimate` found."""

    model: str  # class
    mode: Mode
    phases: list[Phase]
    shapes: list[Shape]

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "model": self.model,
            "mode": self.mode,
            "phases": [phase._asdict() | {"total_bytes": phase.total_bytes} for phase in self.phases],
            "shapes": [shape._asdict() for shape in self.shapes],
        }


def estimate(
    model: str,
    *,
    rank: int | float = 0.25,
    mode: Mode = "adapter",
    tokens: int = 8192,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Parameters, memory, FLOPs and crossover ranks of dense training and of OIALR.

    Args:
        model: a directory with a `config.json`, or a repository of the Hub.
        rank: after the freeze: a count, or a fraction of each layer's full rank.
        mode: of the adapter.
        tokens: in an optimizer step, over which building weights once per step is spread.
        dtype: of parameters, gradients and moments.

    Raises:
        ValueError: the model has no linear layers to adapt, or `rank` is out of range.
        OSError: there is no such configuration.
    """
    require_source(model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    dense, name = _dense(config, tokens, dtype)
    phases = [dense]
    if mode != "adapter":
        phases.append(_adapted("OIALR, dense phase", config, {"mode": mode}, tokens, dtype)[0])
    settings = {"mode": mode, "rank": rank, "freeze_when": "delay", "delay": 0}
    factored, shapes = _adapted("OIALR, factored", config, settings, tokens, dtype)
    return Estimate(name, mode, [*phases, factored], _shapes(shapes, rank, mode))


def _made(config: PreTrainedConfig) -> Any:
    """The model on the meta device: of the class that the configuration names, or without a head."""
    named = next(iter(config.architectures or []), None)
    model_class = getattr(transformers, named or "", None)
    known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)  # the name is from a file
    with torch.device("meta"):
        return cast(Any, model_class)(config) if known else transformers.AutoModel.from_config(config)


def _dense(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> tuple[Phase, str]:
    model = _made(config)
    return _phase("dense", model, {}, tokens, dtype), type(model).__name__


def _adapted(
    name: str, config: PreTrainedConfig, settings: Mapping[str, Any], tokens: int, dtype: torch.dtype
) -> tuple[Phase, Counter[tuple[int, int]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that do not train, and of tiny ranks
        model = get_peft_model(_made(config), OIALRConfig(**settings))
    layers = adapter_layers(model)
    ranks = {key: None if layer.is_dense("default") else layer.rank("default") for key, layer in layers.items()}
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers.values())
    return _phase(name, model, ranks, tokens, dtype), shapes


def _phase(name: str, model: nn.Module, ranks: Mapping[str, int | None], tokens: int, dtype: torch.dtype) -> Phase:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    layers = adapter_layers(model)
    training = inference = 0.0
    for key, layer in layers.items():
        products = _layer_products(
            layer.out_features, layer.in_features, ranks[key], tokens, layer.is_correction["default"]
        )
        training, inference = training + products[0], inference + products[1]
    for module in _other_linear_modules(model):
        form = matricization_of(module)
        assert form is not None
        trained = any(parameter.requires_grad for parameter in module.parameters())
        training += (3 if trained else 2) * form.m * form.n
        inference += form.m * form.n
    size = dtype.itemsize
    return Phase(
        name,
        parameters,
        trainable,
        size * parameters,
        size * trainable,
        2 * size * trainable,
        2 * training,
        2 * inference,
    )


def _layer_products(m: int, n: int, rank: int | None, tokens: int, is_correction: bool) -> tuple[float, float]:
    """Multiply-adds per token, in training and in inference before a correction is merged."""
    if rank is None:
        return 3 * m * n, m * n
    training, inference = route_cost(m, n, rank, tokens) / tokens, float(min((m + n) * rank, m * n))
    return (training + 2 * m * n, inference + m * n) if is_correction else (training, inference)


def _other_linear_modules(model: nn.Module) -> list[nn.Module]:
    """Linear layers outside the adapter, such as heads."""
    inside = {part for layer in adapter_layers(model).values() for part in layer.modules()}
    return [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module not in inside]


def _shapes(found: Counter[tuple[int, int]], rank: int | float, mode: Mode) -> list[Shape]:
    return [
        Shape(
            m,
            n,
            count,
            rank_of(rank, min(m, n)),
            crossover_rank(m, n, beside_base=mode == "adapter"),
            inference_crossover_rank(m, n),
        )
        for (m, n), count in found.items()
    ]
