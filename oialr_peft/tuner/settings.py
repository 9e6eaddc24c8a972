"""`Settings`: what is decided. A configuration says what the user asked; every value that it leaves open is decided here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Mode = Literal["adapter", "replace", "pretraining"]
FreezeWhen = Literal["stable", "delay"]
StabilityStorage = Literal["full", "sketch", "bf16", "cpu"]
Shrink = Literal["physical", "mask"]

ADAPTER_RANK = 16  # of a correction: what LoRA is commonly used with

# Dense phase, as a share of all steps (docs/benchmarks.md has the measurements)
PRETRAINING_DELAY = 0.1  # 0.2 was no better
FINETUNING_DELAY = 0.7  # little is pruned, so an early freeze gains no time, but costs accuracy

# How pruning is set when nothing is said about it (docs/benchmarks.md has the measurements)
ADAPTER_CUTOFF = 0.01
BOUND_CUTOFF = 0.9  # beside a bound, which then decides
PRETRAINING_OUTPUT_LOSS = 3e-3  # weights in training make up for what is removed
FINETUNING_OUTPUT_LOSS = 5e-5  # twice that: 1.3 % more loss when all layers of Gemma-3 270M are truncated at once
RANK_DROP = 0.5
BOUND_RANK_DROP = 0.1  # while a rank falls slowly, training moves what is worth keeping into the directions that stay

# how values are kept, not what they are
NOT_SHOWN = ("stability_storage", "shrink", "init_weights")


@dataclass(frozen=True)
class Settings:
    """Every setting of the method, with a value; `OIALRConfig.resolved` makes it. Fields are those of the configuration.

    Attributes:
        mode: what is adapted.
        rank: kept when a layer is factored: a count, a share of k, or `None` for all.
        freeze_when: the rule that ends the dense phase.
        delay: steps before which no layer is factored.
        stability_threshold: Stability from which a layer counts as stable.
        update_every: steps between two checks.
        cutoff: β in [0, 1).
        layers_per_update: α in (0, 1].
        max_output_loss: bound on the share of a layer's output energy that an update removes; `None` for no bound.
        max_rank_drop: largest share of a rank lost in one update.
        min_rank: floor of the rank.
        sigma_lr_scale: of the learning rate of Σ.
        stability_storage: what is kept of the last basis.
        shrink: whether tensors get smaller or are masked.
        init_weights: whether a fresh adapter is the base model.
    """

    mode: Mode
    rank: int | float | None
    freeze_when: FreezeWhen
    delay: int | float
    stability_threshold: float
    update_every: int | float
    cutoff: float
    layers_per_update: float
    max_output_loss: float | None
    max_rank_drop: float
    min_rank: int | float
    sigma_lr_scale: float | str
    stability_storage: StabilityStorage
    shrink: Shrink
    init_weights: bool

    def shown(self) -> dict[str, Any]:
        """What a model card and a record show: all that decides what comes out."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_SHOWN}

    @property
    def is_correction(self) -> bool:
        """Whether adapters are added to the base weights instead of taking their place."""
        return self.mode == "adapter"

    @property
    def releases_base(self) -> bool:
        """Whether the base weights of target layers are given up, and everything else trains and is saved."""
        return self.mode == "pretraining"

    @property
    def starts_factored(self) -> bool:
        """Whether fresh layers are factored when the adapter is made, without a dense phase."""
        return self.is_correction or (self.freeze_when == "delay" and self.delay == 0)


def decided(asked: dict[str, Any]) -> Settings:
    """The settings that follow from what was asked, `None` where nothing was; all values are valid.

    Args:
        asked: by the names of `Settings`.
    """
    decisions = dict(asked)
    is_correction, from_scratch = asked["mode"] == "adapter", asked["mode"] == "pretraining"
    if asked["rank"] is None and is_correction:
        decisions["rank"] = ADAPTER_RANK
    if asked["delay"] is None:
        decisions["delay"] = 0 if is_correction else PRETRAINING_DELAY if from_scratch else FINETUNING_DELAY
    if asked["cutoff"] is None and asked["max_output_loss"] is None and not is_correction:
        decisions["max_output_loss"] = PRETRAINING_OUTPUT_LOSS if from_scratch else FINETUNING_OUTPUT_LOSS
    is_bounded = decisions["max_output_loss"] is not None
    if asked["cutoff"] is None:
        decisions["cutoff"] = BOUND_CUTOFF if is_bounded else ADAPTER_CUTOFF
    if asked["max_rank_drop"] is None:
        decisions["max_rank_drop"] = BOUND_RANK_DROP if is_bounded else RANK_DROP
    return Settings(**decisions)
