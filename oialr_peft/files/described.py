"""What is said of a saved model and of the run that made it: plain data, for cards, records and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class SavedLayer(NamedTuple):
    """A target layer in a checkpoint."""

    name: str  # full module name
    out_features: int  # m
    in_features: int  # n
    rank: int | None  # None: dense

    @property
    def dense_parameters(self) -> int:
        """m·n."""
        return self.out_features * self.in_features

    @property
    def rank_or_full(self) -> int:
        """r, or min(m, n) of a dense layer."""
        return min(self.out_features, self.in_features) if self.rank is None else self.rank

    @property
    def stored_parameters(self) -> int:
        """(m + n + r)·r, or m·n of a dense layer."""
        if self.rank is None:
            return self.dense_parameters
        return (self.out_features + self.in_features + self.rank) * self.rank


class LayerKind(NamedTuple):
    """Layers of one shape whose names differ in indices only."""

    name: str  # with `*` for indices
    out_features: int  # m
    in_features: int  # n
    layers: list[SavedLayer]

    @property
    def ranks(self) -> list[int]:
        """Of the factored layers."""
        return [layer.rank for layer in self.layers if layer.rank is not None]

    @property
    def compression(self) -> float:
        """Numbers of the dense weights over those that are stored."""
        dense = len(self.layers) * self.out_features * self.in_features
        return dense / sum(layer.stored_parameters for layer in self.layers)


@dataclass(frozen=True)
class SavedModel:
    """What a card says of a model with an adapter, or of a standalone low-rank model.

    Attributes:
        layers: the target layers, in module order.
        adapter_name: under which PEFT saved it; every name but "default" is also that of its folder.
        base_class: class of the model that was adapted, if it is one of transformers.
        num_labels: of its head, if it is a classifier.
    """

    layers: tuple[SavedLayer, ...]
    adapter_name: str = "default"
    base_class: str | None = None
    num_labels: int | None = None


@dataclass(frozen=True)
class SavedSettings:
    """What a card says of an adapter's configuration.

    Attributes:
        base_model: repository or directory of the base model, if it has one.
        revision: of that repository; `None` means its main branch.
        is_correction: whether the adapter is added to the base weights.
        from_scratch: whether the adapter holds everything that trained.
        shown: settings of the method, by name.
    """

    base_model: str | None
    revision: str | None
    is_correction: bool
    from_scratch: bool
    shown: Mapping[str, Any]


class Check(Protocol):
    """What a card says of a check: an `OIALRUpdate` has all of it."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def frozen(self) -> list[str]: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def trainable_percent(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """What a card says of a training run.

    Attributes:
        steps: optimizer steps.
        history: every check.
        metrics: of the last evaluation, by name; empty if there was none.
    """

    steps: int
    history: Sequence[Check]
    metrics: Mapping[str, float]


def layer_group(name: str) -> str:
    """The module name with layer indices replaced.

    >>> layer_group("bert.encoder.layer.11.attention.self.query")
    'bert.encoder.layer.*.attention.self.query'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def layer_kinds(layers: Sequence[SavedLayer]) -> list[LayerKind]:
    """The layers by kind, in the order of the first of each."""
    groups: dict[tuple[str, int, int], list[SavedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer_group(layer.name), layer.out_features, layer.in_features), []).append(layer)
    return [LayerKind(*key, members) for key, members in groups.items()]
