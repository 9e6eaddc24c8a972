"""`OIALRConfig`: what the user asked. It is checked when it is made, and never changed afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from oialr_peft.tuner.rules import require_present_names, require_valid
from oialr_peft.tuner.settings import Settings, decided

FORMAT_VERSION = 1  # of adapter checkpoints; raised when older releases could no longer read new files


class SavedAdapter(NamedTuple):
    """Where an adapter is saved."""

    path: str  # a directory, or a repository of the Hub
    subfolder: str | None
    hub: dict[str, Any]  # arguments of `hf_hub_download`, such as `revision`


class Saving(NamedTuple):
    """What is known of weights that are about to be saved beside a configuration."""

    ranks: dict[str, int]  # of factored layers, by full module name
    finish: Callable[[str], None]  # called once with the directory, after the file was written


@dataclass
class OIALRConfig(PeftConfig):
    """Configuration of orthogonality-informed adaptive low-rank training.

    What is left at `None` is decided by the mode, see `resolved`. Steps follow `transformers.TrainingArguments`: an int ≥ 1
    is a number of optimizer steps, a float in (0, 1) a share of all optimizer steps. Ranks and floors: an int ≥ 1 is a
    count, a float in (0, 1) a share of k = min(out, in) of each layer, rounded up.

    Args:
        target_modules: names (suffixes), a regular expression, or `"all-linear"`; `None` means `"all-linear"`: every
            linear layer except the output head of a transformers model.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: restricts `target_modules` to these layer indices, as in LoRA.
        layers_pattern: name of the module list that `layers_to_transform` counts in, as in LoRA.
        modules_to_save: modules trained and saved in full beside the adapter, such as a new classification head.
        bias: which biases train: `"none"`, `"all"`, or `"oialr_only"` (those of the target layers).
        trainable_token_indices: token rows of the embedding that train, as in LoRA.
        mode: what is adapted. `"adapter"`: a low-rank correction of the base weight, which stays as it is and may be
            quantized; it starts at zero and has no dense phase. `"replace"`: the weight itself is trained, factored and
            pruned; the base weight stays for `disable_adapter` and unmerging. `"pretraining"`: the same from scratch;
            everything that is not targeted trains and is saved as well, and the base copies of the target weights are
            released.
        rank: rank of the correction, 16 if `None`; in the other modes the rank kept when a layer is factored, all k
            directions if `None`.
        freeze_when: `"stable"` factors each layer once its Stability reaches `stability_threshold`; `"delay"` factors all
            layers at `delay`, as the paper does.
        delay: step before which no layer is factored; 0 with `freeze_when="delay"` factors when the adapter is made.
            `None` means 0 in adapter mode, 0.1 in pretraining, 0.7 in replace.
        stability_threshold: Stability, in (0, 1], from which a layer counts as stable.
        update_every: ν, steps between two checks.
        cutoff: β in [0, 1): directions with σ < β·σ_max are dropped; the paper's rule. `None` means 0.9 with a bound
            `max_output_loss`, which then decides, and 0.01 in adapter mode. The paper's is 0.1.
        layers_per_update: α in (0, 1]: share of the layers added at each Σ update, from the last one back; 1 = all.
        max_output_loss: largest share of a layer's output energy on recent inputs, in [0, 1), that one Σ update may
            remove. `None` means no bound where `cutoff` is given, the paper's rule alone. When neither is given, it
            means 0.003 in pretraining, no bound in adapter mode, and 0.00005 in replace.
        max_rank_drop: largest share of a rank lost in one update, in (0, 1]. `None` means 0.1 with a bound `max_output_loss`,
            otherwise 0.5.
        min_rank: floor of the rank.
        sigma_lr_scale: learning rate of Σ (r, r) over that of its parameter group, > 0; `"norm"` is √(m n) / r, with which
            an update of a factored weight is as long as that of the dense one, for optimizers that scale every entry on
            its own (Adam and its relatives), and 1 for SGD and Muon.
        stability_storage: what is kept of the last basis: `"sketch"` (its product with 32 random ±1 columns; Stability
            is then off by about .002, which the decision to freeze allows for), `"bf16"`, `"cpu"`, or `"full"` (exact).
        init_weights: `False` makes a fresh adapter differ from the base model (for tests).
        shrink: `"physical"` makes the tensors smaller when the rank falls; `"mask"` keeps their shapes during training
            and cuts them when the adapter is saved.
        rank_pattern: full module name → rank of layers that start factored. Written by the method when it saves an
            adapter: then a layer that is missing in it is dense.
        format_version: written when an adapter is saved; leave it at `None`.

    Raises:
        ValueError: a field has the wrong type, is out of range, contradicts another one, or goes by another name now.

    Examples:
        >>> OIALRConfig(rank=8).resolved().rank, OIALRConfig().resolved().rank
        (8, 16)
        >>> OIALRConfig(mode="replace", cutoff=1.5)
        Traceback (most recent call last):
        ...
        ValueError: `cutoff` must be a number in [0, 1) or None, but is 1.5. 0.1 drops directions below a tenth of the largest.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": 'Names, a regular expression, or "all-linear" (the default).'}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices that `target_modules` is restricted to."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that `layers_to_transform` counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved in full beside the adapter."}
    )
    bias: str = field(default="none", metadata={"help": 'Biases that train: "none", "all" or "oialr_only".'})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token rows of the embedding that train."}
    )
    mode: str = field(
        default="adapter",
        metadata={
            "help": '"adapter": a correction of the base weight; "replace": the weight itself; "pretraining": from scratch.'
        },
    )
    rank: int | float | None = field(
        default=None,
        metadata={"help": "Rank of the correction (None: 16), or the rank kept when a layer is factored (None: all)."},
    )
    freeze_when: str = field(
        default="stable",
        metadata={"help": '"stable": per layer, by its basis; "delay": all layers at `delay`.'},
    )
    delay: int | float | None = field(
        default=None,
        metadata={
            "help": "Step before which no layer is factored; None: 0 (adapter), 0.1 (pretraining), 0.7 (replace)."
        },
    )
    stability_threshold: float = field(
        default=0.9, metadata={"help": "Stability, in (0, 1], from which a layer counts as stable."}
    )
    update_every: int | float = field(default=0.04, metadata={"help": "Steps between two checks."})
    cutoff: float | None = field(
        default=None,
        metadata={
            "help": "Directions with σ < cutoff·σ_max are dropped; None: 0.9 with a bound, 0.01 in adapter mode."
        },
    )
    layers_per_update: float = field(
        default=1.0, metadata={"help": "Share of the layers added at each Σ update, from the last one back."}
    )
    max_output_loss: float | None = field(
        default=None,
        metadata={
            "help": "Largest share of a layer's output energy that one update may remove; None: no bound beside a "
            "cutoff or in adapter mode, 0.003 in pretraining, 0.00005 in replace."
        },
    )
    max_rank_drop: float | None = field(
        default=None, metadata={"help": "Largest share of a rank lost in one update; None: 0.1 with a bound, else 0.5."}
    )
    min_rank: int | float = field(default=0.01, metadata={"help": "Floor of the rank: count, or fraction of k."})
    sigma_lr_scale: float | str = field(
        default="norm", metadata={"help": 'Learning rate of Σ over that of its group, or "norm": √(m n) / r.'}
    )
    stability_storage: str = field(
        default="sketch", metadata={"help": 'What is kept of the last basis: "sketch", "bf16", "cpu" or "full".'}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False makes a fresh adapter differ from the base model (for tests)."}
    )
    shrink: str = field(
        default="physical", metadata={"help": '"physical", or "mask": keep shapes in training and cut at save.'}
    )
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "Full module name → rank; written by the method when it saves."}
    )
    format_version: int | None = field(
        default=None, metadata={"help": "Version of the adapter's file format; written when it is saved."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Tell who writes a former name which one it has now."""
        require_present_names(kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("OIALR")
        require_valid(vars(self))
        self._use_collections_that_files_have()
        if self.format_version is not None and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of this adapter is {self.format_version}, but this release reads up to "
                f"{FORMAT_VERSION}. Upgrade oialr-peft."
            )

    def resolved(self) -> Settings:
        """Every setting of the method with its value, also where this configuration leaves it open."""
        return decided({setting.name: getattr(self, setting.name) for setting in fields(Settings)})

    @property
    def is_from_checkpoint(self) -> bool:
        """Whether this configuration was saved with an adapter, whose weights say what each layer is."""
        return self.format_version is not None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary; sets become sorted lists, so that equal settings give equal files."""
        fields = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> OIALRConfig:
        """Read a saved configuration; see `PeftConfig.from_pretrained`.

        Adapters that are made from it are checked against the weights beside it before the model is changed.
        """
        file = Path(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        try:
            config = cast(OIALRConfig, super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs))
        except (ValueError, TypeError, KeyError) as error:
            if not file.is_file():
                raise
            raise ValueError(f"The configuration in `{file}` cannot be used: {error}") from error
        hub, *_ = cls._split_kwargs(kwargs)
        cast(Any, config)._source = SavedAdapter(os.fspath(pretrained_model_name_or_path), subfolder, hub)
        return config

    @property
    def source(self) -> SavedAdapter | None:
        """Where this configuration was read from, if it was read by `OIALRConfig.from_pretrained`."""
        return self.__dict__.get("_source")

    def expect_saving(self, saving: Saving) -> None:
        """Be told what the weights are that are about to be saved beside this file."""
        cast(Any, self)._saving = saving

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; see `PeftConfig.save_pretrained`.

        After an adapter's weights were collected for saving, the file also holds their ranks as `rank_pattern`. PEFT calls
        this last when it saves an adapter, and only in the main process.
        """
        saving: Saving | None = self.__dict__.get("_saving")
        if saving is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        before = self.rank_pattern, self.format_version
        self.rank_pattern, self.format_version = saving.ranks, FORMAT_VERSION
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.rank_pattern, self.format_version = before
        saving.finish(save_directory)
        self.expect_saving(saving._replace(finish=_nothing))

    def _use_collections_that_files_have(self) -> None:
        """Sets for names that may come in any order, as in LoRA; lists elsewhere, as they are read back."""
        values: Any = vars(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], Collection) and not isinstance(values[name], str):
                values[name] = set(values[name])
        for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"):
            values[name] = _with_lists(values[name])


def _nothing(directory: str) -> None:
    """A card is written once for each time that weights are saved."""


def _with_lists(value: Any) -> Any:
    """The value with lists in the place of other collections; those of sets are sorted."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
