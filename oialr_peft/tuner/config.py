"""`OIALRConfig`: the settings of the method, checked when they are made."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from oialr_peft.files import card
from oialr_peft.files.values import is_collection_of, is_count, is_index, is_int, is_number
from oialr_peft.tuner.registration import PREFIX

FORMAT_VERSION = 1  # of adapter checkpoints; raised when older releases could no longer read new files

FreezeWhen = Literal["stable", "delay"]
StabilityStorage = Literal["full", "sketch", "bf16", "cpu"]
Shrink = Literal["physical", "mask"]
Bias = Literal["none", "all", "oialr_only"]

# what a model card shows of the settings
CARD_SETTINGS = (
    "residual",
    "pretraining",
    "init_rank",
    "freeze_when",
    "delay",
    "stability_threshold",
    "update_every",
    "cutoff",
    "max_output_loss",
    "layers_per_update",
    "max_rank_drop",
    "min_rank",
    "sigma_lr_scale",
)

# Dense phase, as a share of all steps (docs/benchmarks.md has the measurements)
PRETRAINING_DELAY = 0.1  # .2 was no better
FINETUNING_DELAY = 0.7  # little is pruned, so an early freeze gains no time, but costs accuracy

# How pruning is set when nothing is said about it (docs/benchmarks.md has the measurements)
RESIDUAL_CUTOFF = 0.01
BOUND_CUTOFF = 0.9  # beside a bound, which then decides
PRETRAINING_OUTPUT_LOSS = 3e-3  # weights in training make up for what is removed
FINETUNING_OUTPUT_LOSS = 5e-5  # twice that: 1.3 % more loss when all layers of Gemma-3 270M are truncated at once
RANK_DROP = 0.5
BOUND_RANK_DROP = 0.1  # while a rank falls slowly, training moves what is worth keeping into the directions that stay


class SavedAdapter(NamedTuple):
    """Where an adapter is saved."""

    path: str  # a directory, or a repository of the Hub
    subfolder: str | None
    hub: dict[str, Any]  # arguments of `hf_hub_download`, such as `revision`


@dataclass
class OIALRConfig(PeftConfig):
    """Configuration of orthogonality-informed adaptive low-rank training.

    Steps follow `transformers.TrainingArguments`: an int ≥ 1 is a number of optimizer steps, a float in (0, 1) a
    fraction of all optimizer steps. Ranks and floors: an int ≥ 1 is a count, a float in (0, 1) a fraction of
    k = min(out, in) of each layer, rounded up.

    Args:
        target_modules: names (suffixes), a regular expression, or `"all-linear"`; `None` means `"all-linear"`: every
            linear layer except the output head of a transformers model.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: restricts `target_modules` to these layer indices, as in LoRA.
        layers_pattern: name of the module list that `layers_to_transform` counts in, as in LoRA.
        modules_to_save: modules trained and saved in full beside the adapter, such as a new classification head.
        bias: which biases train: `"none"`, `"all"`, or `"oialr_only"` (those of the target layers).
        trainable_token_indices: token rows of the embedding that train, as in LoRA.
        residual: keep the base weight and train a low-rank correction of it, from zero; no dense phase. For large
            pretrained models.
        pretraining: train from scratch: everything that is not targeted trains and is saved as well, and the base copies
            of the target weights are released.
        init_rank: rank kept when a layer is factored; `None` keeps all k directions.
        freeze_when: `"stable"` factors each layer once its Stability reaches `stability_threshold`; `"delay"` factors all
            layers at `delay`, as the paper does.
        delay: step before which no layer is factored; 0 with `freeze_when="delay"` factors when the adapter is made.
            `None` means 0 with `residual`, 0.1 with `pretraining`, otherwise 0.7.
        stability_threshold: Stability, in (0, 1], from which a layer counts as stable.
        update_every: ν, steps between two checks.
        cutoff: β in [0, 1): directions with σ < β·σ_max are dropped; the paper's rule. `None` means 0.9 with a bound
            `max_output_loss`, which then decides, and 0.01 with `residual`. The paper's is 0.1.
        layers_per_update: α in (0, 1]: share of the layers added at each Σ update, from the last one back; 1 = all.
        max_output_loss: largest share of a layer's output energy on recent inputs, in [0, 1), that one Σ update may
            remove. `None` means no bound where `cutoff` is given, the paper's rule alone. When neither is given, it
            means 0.003 with `pretraining`, no bound with `residual`, and otherwise 0.00005.
        max_rank_drop: largest share of a rank lost in one update, in (0, 1]. `None` means 0.1 with a bound `max_output_loss`,
            otherwise 0.5.
        sigma_lr_scale: learning rate of Σ (r, r) over that of its parameter group, > 0; `"norm"` is √(m n) / r, with which
            an update of a factored weight is as long as that of the dense one, for optimizers that scale every entry on
            its own (Adam and its relatives), and 1 for SGD and Muon.
        min_rank: floor of the rank.
        stability_storage: what is kept of the last basis: `"sketch"` (its product with 32 random ±1 columns; Stability
            is then off by about .002, which the decision to freeze allows for), `"bf16"`, `"cpu"`, or `"full"` (exact).
        init_weights: `False` makes a fresh adapter differ from the base model (for tests).
        shrink: `"physical"` makes the tensors smaller when the rank falls; `"mask"` keeps their shapes during training
            and cuts them when the adapter is saved.
        rank_pattern: full module name → rank of layers that start factored. Written by the method when it saves an
            adapter: then a layer that is missing in it is dense.
        format_version: written when an adapter is saved; leave it at `None`.

    Raises:
        ValueError: a field has the wrong type, is out of range, or contradicts another one.

    Examples:
        >>> OIALRConfig(cutoff=0.2).cutoff
        0.2
        >>> OIALRConfig(cutoff=1.5)
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
    residual: bool = field(
        default=False, metadata={"help": "Keep the base weight and train a low-rank correction of it."}
    )
    pretraining: bool = field(
        default=False, metadata={"help": "Train and save everything; release the base copies of the target weights."}
    )
    init_rank: int | float | None = field(
        default=None, metadata={"help": "Rank kept at factorization: count, or fraction of k; None keeps all."}
    )
    freeze_when: str = field(
        default="stable",
        metadata={"help": '"stable": per layer, by its basis; "delay": all layers at `delay`.'},
    )
    delay: int | float | None = field(
        default=None,
        metadata={"help": "Step before which no layer is factored; None: 0 if residual, 0.1 if pretraining, else 0.7."},
    )
    stability_threshold: float = field(
        default=0.9, metadata={"help": "Stability, in (0, 1], from which a layer counts as stable."}
    )
    update_every: int | float = field(default=0.04, metadata={"help": "Steps between two checks."})
    cutoff: float | None = field(
        default=None,
        metadata={"help": "Directions with σ < cutoff·σ_max are dropped; None: 0.9 with a bound, 0.01 if residual."},
    )
    layers_per_update: float = field(
        default=1.0, metadata={"help": "Share of the layers added at each Σ update, from the last one back."}
    )
    max_output_loss: float | None = field(
        default=None,
        metadata={
            "help": "Largest share of a layer's output energy that one update may remove; None: no bound beside a "
            "cutoff or if residual, else 0.003 if pretraining, 0.00005 if not."
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("OIALR")
        self._check_modules()
        self._use_collections_that_files_have()
        self._check_method()
        if self.delay is None:
            self.delay = 0 if self.residual else PRETRAINING_DELAY if self.pretraining else FINETUNING_DELAY
        self._set_pruning()
        self._check_combinations()
        self._check_format()

    @property
    def starts_factored(self) -> bool:
        """Whether fresh layers are factored when the adapter is made, without a dense phase."""
        return self.residual or (self.freeze_when == "delay" and self.delay == 0)

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

    def record_saved(self, saved: card.SavedModel) -> None:
        """Remember what the weights are that are about to be saved beside this file."""
        self._saved, self._card_is_due = saved, True

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; see `PeftConfig.save_pretrained`.

        After an adapter's weights were collected for saving, the file also holds their ranks as `rank_pattern`, and the
        model card says what they are. PEFT calls this last when it saves an adapter, and only in the main process.
        """
        saved: card.SavedModel | None = self.__dict__.get("_saved")
        if saved is None:
            super().save_pretrained(save_directory, **kwargs)
            return
        before = self.rank_pattern, self.format_version
        self.rank_pattern = {layer.name: layer.rank for layer in saved.layers if layer.rank is not None}
        self.format_version = FORMAT_VERSION
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.rank_pattern, self.format_version = before
        if self._card_is_due:
            self._card_is_due = False
            card.write_adapter_card(card.directory_of(save_directory, saved.adapter_name), self.card_settings(), saved)

    def shown_settings(self) -> dict[str, Any]:
        """The settings that a model card and a record show."""
        return {name: getattr(self, name) for name in CARD_SETTINGS}

    def card_settings(self) -> card.SavedSettings:
        """What a model card says of this configuration."""
        return card.SavedSettings(
            base_model=self.base_model_name_or_path,
            revision=self.revision,
            residual=self.residual,
            from_scratch=self.pretraining,
            shown=self.shown_settings(),
        )

    def _use_collections_that_files_have(self) -> None:
        """Sets for names that may come in any order, as in LoRA; lists elsewhere, as they are read back."""
        values: Any = vars(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], Collection) and not isinstance(values[name], str):
                values[name] = set(values[name])
        for name in ("layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"):
            values[name] = _with_lists(values[name])

    def _set_pruning(self) -> None:
        """The measured rule where the user names none."""
        if self.cutoff is None and self.max_output_loss is None and not self.residual:
            self.max_output_loss = PRETRAINING_OUTPUT_LOSS if self.pretraining else FINETUNING_OUTPUT_LOSS
        if self.cutoff is None:
            self.cutoff = RESIDUAL_CUTOFF if self.max_output_loss is None else BOUND_CUTOFF
        if self.max_rank_drop is None:
            self.max_rank_drop = RANK_DROP if self.max_output_loss is None else BOUND_RANK_DROP

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or is_collection_of(str, value)):
                raise ValueError(
                    f"`{name}` must be a list of module names, a regular expression or None, but is {value!r}. "
                    'For every linear layer, write "all-linear".'
                )
        if isinstance(self.target_modules, Collection) and len(self.target_modules) == 0:
            raise ValueError(
                "`target_modules` must name at least one module, but is empty. Leave it out to target every linear "
                "layer."
            )
        layers: Any = self.layers_to_transform
        if not (layers is None or is_index(layers) or _are_indices(layers)):
            raise ValueError(
                f"`layers_to_transform` must be a layer index, a list of them or None, but is {layers!r}. Write [0, 1] "
                "for the first two layers."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` must not be combined with a string in `target_modules` "
                f"({self.target_modules!r}). Give `target_modules` as a list, or put the indices into the expression."
            )
        if self.target_modules is None and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` needs `target_modules` as a list of names, but that is None. Name the modules."
            )
        pattern = self.layers_pattern
        if not (pattern is None or isinstance(pattern, str) or is_collection_of(str, pattern)):
            raise ValueError(
                f"`layers_pattern` must be the name of a module list, a list of names or None, but is {pattern!r}. "
                'Write "layers" for `model.layers.0`.'
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` ({self.layers_pattern!r}) needs `layers_to_transform`, but that is None. Set both "
                "or neither."
            )
        tokens: Any = self.trainable_token_indices
        by_module = tokens.items() if isinstance(tokens, dict) else [("", [] if tokens is None else tokens)]
        if not all(isinstance(name, str) and _are_indices(indices) for name, indices in by_module):
            raise ValueError(
                "`trainable_token_indices` must be a list of token indices, a dict from embedding name to such a list, "
                f"or None, but is {tokens!r}. Write [5, 6], or {{'embed_tokens': [5, 6]}}."
            )
        saved = self.modules_to_save  # PEFT compares ends of names: neither the whole model nor parts of the adapter
        if not (saved is None or (is_collection_of(str, saved) and all(name and PREFIX not in name for name in saved))):
            raise ValueError(
                f"`modules_to_save` must be a list of module names or None, but is {self.modules_to_save!r}. "
                "A single module is written as a list of one."
            )
        self._check_choice("bias", get_args(Bias))

    def _check_method(self) -> None:
        for name in ("residual", "pretraining", "init_weights"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, but is {value!r}. Choose one of the two.")
        self._check_choice("freeze_when", get_args(FreezeWhen))
        self._check_choice("stability_storage", get_args(StabilityStorage))
        self._check_choice("shrink", get_args(Shrink))
        if self.delay is not None:
            self._check_steps("delay", self.delay, minimum=0)
        self._check_steps("update_every", self.update_every, minimum=1)
        if self.init_rank is not None:
            self._check_rank("init_rank", self.init_rank)
        self._check_rank("min_rank", self.min_rank)
        if not is_number(self.stability_threshold) or not 0 < self.stability_threshold <= 1:
            raise ValueError(
                f"`stability_threshold` must be a number in (0, 1], but is {self.stability_threshold!r}. 0.9 is a "
                "common start."
            )
        if self.cutoff is not None and not (is_number(self.cutoff) and 0 <= self.cutoff < 1):
            raise ValueError(
                f"`cutoff` must be a number in [0, 1) or None, but is {self.cutoff!r}. 0.1 drops directions below a tenth of "
                "the largest."
            )
        if not is_number(self.layers_per_update) or not 0 < self.layers_per_update <= 1:
            raise ValueError(
                f"`layers_per_update` must be a number in (0, 1], but is {self.layers_per_update!r}. 1 updates every "
                "layer at once, the paper's 0.1 adds a tenth of them per update."
            )
        if self.max_rank_drop is not None and not (is_number(self.max_rank_drop) and 0 < self.max_rank_drop <= 1):
            raise ValueError(
                f"`max_rank_drop` must be a number in (0, 1] or None, but is {self.max_rank_drop!r}. 0.5 at most halves a "
                "rank per update; set `cutoff=0` to drop nothing."
            )
        scale = self.sigma_lr_scale
        if scale != "norm" and not (is_number(scale) and 0 < scale < math.inf):
            raise ValueError(
                f'`sigma_lr_scale` must be a number > 0 or "norm", but is {scale!r}. 1 gives Σ the learning rate of its '
                "parameter group."
            )
        if self.max_output_loss is not None and not (is_number(self.max_output_loss) and 0 <= self.max_output_loss < 1):
            raise ValueError(
                f"`max_output_loss` must be a number in [0, 1) or None, but is {self.max_output_loss!r}. 0.001 lets one "
                "update remove a thousandth of a layer's output energy."
            )

    def _check_combinations(self) -> None:
        if self.residual and self.delay != 0:
            raise ValueError(
                f"`residual=True` has no dense phase, so `delay` must be 0, but is {self.delay!r}. Leave `delay` out, "
                "or set `residual=False`."
            )
        if self.residual and self.pretraining:
            raise ValueError(
                "`pretraining=True` releases the base weights that `residual=True` needs. Choose `pretraining` for "
                "training from scratch, `residual` for fine-tuning a pretrained model."
            )
        if self.pretraining and self.trainable_token_indices is not None:
            raise ValueError(
                f"`trainable_token_indices` ({self.trainable_token_indices!r}) must be None with `pretraining=True`, which "
                "trains and saves every row of the embedding. Leave it out."
            )

    def _check_format(self) -> None:
        if self.rank_pattern is not None and not (
            isinstance(self.rank_pattern, dict)
            and all(isinstance(key, str) and is_count(value) for key, value in self.rank_pattern.items())
        ):
            raise ValueError(
                f"`rank_pattern` must map full module names to ranks ≥ 1, but is {self.rank_pattern!r}. Leave it out "
                "to let the method choose the ranks."
            )
        if self.format_version is not None and not is_count(self.format_version):
            raise ValueError(
                f"`format_version` must be None or an int ≥ 1, but is {self.format_version!r}. Leave it out; it is "
                "written when an adapter is saved."
            )
        if self.format_version is not None and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` of this adapter is {self.format_version}, but this release reads up to "
                f"{FORMAT_VERSION}. Upgrade oialr-peft."
            )

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not (isinstance(value, str) and value in choices):
            listed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"`{name}` must be one of {listed}, but is {value!r}. Choose one of them.")

    @staticmethod
    def _check_steps(name: str, value: Any, *, minimum: int) -> None:
        if is_int(value) and value >= minimum:
            return
        if isinstance(value, float) and 0 < value < 1:
            return
        raise ValueError(
            f"`{name}` must be an int ≥ {minimum} (optimizer steps) or a float in (0, 1) (fraction of all steps), but "
            f"is {value!r}. Write 100 for every hundredth step, 0.04 for 25 times in a run."
        )

    @staticmethod
    def _check_rank(name: str, value: Any) -> None:
        if is_count(value) or (isinstance(value, float) and 0 < value < 1):
            return
        raise ValueError(
            f"`{name}` must be an int ≥ 1 (a count) or a float in (0, 1) (fraction of min(out, in)), but is {value!r}. "
            "Write 16 for rank 16, 0.25 for a quarter of the full rank."
        )


def _are_indices(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_index, value))


def _with_lists(value: Any) -> Any:
    """The value with lists in the place of other collections; those of sets are sorted."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value
