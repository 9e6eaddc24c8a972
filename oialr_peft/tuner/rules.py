"""What the fields of a configuration must be: a table of rules, each with its remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, get_args

from oialr_peft.files.values import is_collection_of, is_count, is_index, is_int, is_number
from oialr_peft.tuner.registration import PREFIX
from oialr_peft.tuner.settings import FreezeWhen, Mode, Shrink, StabilityStorage

BIASES = ("none", "all", "oialr_only")

# settings that an earlier state of this package had, and what to write now
FORMER_NAMES = {
    "residual": 'Write `mode="adapter"` for `residual=True`, and `mode="replace"` for `residual=False`.',
    "pretraining": 'Write `mode="pretraining"` for `pretraining=True`, and `mode="replace"` for `pretraining=False`.',
    "init_rank": "Write `rank`.",
    "init_basis": "It was removed; leave it out.",
    "prune_by": "It was removed; leave it out.",
    "settle_ratio": 'It was removed; `freeze_when` is "stable" or "delay".',
    "sigma_basis": "It was removed; leave it out.",
}


class Rule(NamedTuple):
    """What one field must be.

    Attributes:
        field: its name.
        holds: whether a value is allowed.
        must_be: the rule in words, after "must be" or "must".
        remedy: what to write instead, a sentence.
    """

    field: str
    holds: Callable[[Any], bool]
    must_be: str
    remedy: str

    def message(self, value: Any) -> str:
        """What an error says of a value that is not allowed."""
        return f"`{self.field}` must {self.must_be}, but is {value!r}. {self.remedy}"


class Combination(NamedTuple):
    """What several fields must be together.

    Attributes:
        holds: whether the fields, by name, fit each other.
        message: with the values of fields in braces; says the remedy.
    """

    holds: Callable[[dict[str, Any]], bool]
    message: str


def is_share(value: Any) -> bool:
    """Whether it is a float in (0, 1)."""
    return isinstance(value, float) and 0 < value < 1


def _is_one_of(choices: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def _is_rank(value: Any) -> bool:
    return is_count(value) or is_share(value)


def _are_indices(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_index, value))


def _are_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or is_collection_of(str, value)


def _are_token_indices(value: Any) -> bool:
    by_module = value.items() if isinstance(value, dict) else [("", [] if value is None else value)]
    return all(isinstance(name, str) and _are_indices(indices) for name, indices in by_module)


def _are_modules_to_save(value: Any) -> bool:
    # PEFT compares ends of names: neither the whole model nor parts of the adapter
    return value is None or (is_collection_of(str, value) and all(name and PREFIX not in name for name in value))


def _optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and holds(value)


def _steps(minimum: int) -> Callable[[Any], bool]:
    return lambda value: (is_int(value) and value >= minimum) or is_share(value)


def _choice(field: str, choices: Collection[str]) -> Rule:
    listed = ", ".join(map(repr, choices))
    return Rule(field, _is_one_of(choices), f"be one of {listed}", "Choose one of them.")


RANK = "be an int ≥ 1 (a count) or a float in (0, 1) (a share of min(out, in))"
RANK_REMEDY = "Write 16 for rank 16, 0.25 for a quarter of the full rank."
STEPS_REMEDY = "Write 100 for every hundredth step, 0.04 for 25 times in a run."

RULES = (
    Rule(
        "target_modules",
        _are_names,
        "be a list of module names, a regular expression or None",
        'For every linear layer, write "all-linear".',
    ),
    Rule(
        "target_modules",
        lambda value: isinstance(value, str) or value is None or len(value) > 0,
        "name at least one module",
        "Leave it out to target every linear layer.",
    ),
    Rule(
        "exclude_modules",
        _are_names,
        "be a list of module names, a regular expression or None",
        "A single module is written as a list of one.",
    ),
    Rule(
        "layers_to_transform",
        lambda value: value is None or is_index(value) or _are_indices(value),
        "be a layer index, a list of them or None",
        "Write [0, 1] for the first two layers.",
    ),
    Rule(
        "layers_pattern",
        _are_names,
        "be the name of a module list, a list of names or None",
        'Write "layers" for `model.layers.0`.',
    ),
    Rule(
        "trainable_token_indices",
        _are_token_indices,
        "be a list of token indices, a dict from embedding name to such a list, or None",
        "Write [5, 6], or {'embed_tokens': [5, 6]}.",
    ),
    Rule(
        "modules_to_save",
        _are_modules_to_save,
        "be a list of module names or None",
        "A single module is written as a list of one.",
    ),
    _choice("bias", BIASES),
    _choice("mode", get_args(Mode)),
    _choice("freeze_when", get_args(FreezeWhen)),
    _choice("stability_storage", get_args(StabilityStorage)),
    _choice("shrink", get_args(Shrink)),
    Rule("init_weights", lambda value: isinstance(value, bool), "be True or False", "Choose one of the two."),
    Rule("rank", _optional(_is_rank), f"{RANK} or None", RANK_REMEDY),
    Rule("min_rank", _is_rank, RANK, RANK_REMEDY),
    Rule(
        "delay",
        _optional(_steps(0)),
        "be an int ≥ 0 (optimizer steps), a float in (0, 1) (a share of all steps) or None",
        "Write 100 for step 100, 0.1 for a tenth of the run.",
    ),
    Rule(
        "update_every",
        _steps(1),
        "be an int ≥ 1 (optimizer steps) or a float in (0, 1) (a share of all steps)",
        STEPS_REMEDY,
    ),
    Rule(
        "stability_threshold",
        _number(lambda value: 0 < value <= 1),
        "be a number in (0, 1]",
        "0.9 is a common start.",
    ),
    Rule(
        "cutoff",
        _optional(_number(lambda value: 0 <= value < 1)),
        "be a number in [0, 1) or None",
        "0.1 drops directions below a tenth of the largest.",
    ),
    Rule(
        "layers_per_update",
        _number(lambda value: 0 < value <= 1),
        "be a number in (0, 1]",
        "1 updates every layer at once, the paper's 0.1 adds a tenth of them per update.",
    ),
    Rule(
        "max_rank_drop",
        _optional(_number(lambda value: 0 < value <= 1)),
        "be a number in (0, 1] or None",
        "0.5 at most halves a rank per update; set `cutoff=0` to drop nothing.",
    ),
    Rule(
        "max_output_loss",
        _optional(_number(lambda value: 0 <= value < 1)),
        "be a number in [0, 1) or None",
        "0.001 lets one update remove a thousandth of a layer's output energy.",
    ),
    Rule(
        "sigma_lr_scale",
        lambda value: (isinstance(value, str) and value == "norm") or (is_number(value) and 0 < value < math.inf),
        'be a number > 0 or "norm"',
        "1 gives Σ the learning rate of its parameter group.",
    ),
    Rule(
        "rank_pattern",
        _optional(
            lambda value: (
                isinstance(value, dict) and all(isinstance(key, str) and is_count(rank) for key, rank in value.items())
            )
        ),
        "map full module names to ranks ≥ 1",
        "Leave it out to let the method choose the ranks.",
    ),
    Rule(
        "format_version",
        _optional(is_count),
        "be None or an int ≥ 1",
        "Leave it out; it is written when an adapter is saved.",
    ),
)

COMBINATIONS = (
    Combination(
        lambda asked: not (isinstance(asked["target_modules"], str) and asked["layers_to_transform"] is not None),
        "`layers_to_transform` must not be combined with a string in `target_modules` ({target_modules!r}). Give "
        "`target_modules` as a list, or put the indices into the expression.",
    ),
    Combination(
        lambda asked: not (asked["target_modules"] is None and asked["layers_to_transform"] is not None),
        "`layers_to_transform` needs `target_modules` as a list of names, but that is None. Name the modules.",
    ),
    Combination(
        lambda asked: not (asked["layers_pattern"] and asked["layers_to_transform"] is None),
        "`layers_pattern` ({layers_pattern!r}) needs `layers_to_transform`, but that is None. Set both or neither.",
    ),
    Combination(
        lambda asked: asked["mode"] != "adapter" or asked["delay"] in (None, 0),
        '`mode="adapter"` has no dense phase, so `delay` must be 0, but is {delay!r}. Leave `delay` out, or set '
        '`mode="replace"`.',
    ),
    Combination(
        lambda asked: asked["mode"] != "pretraining" or asked["trainable_token_indices"] is None,
        '`trainable_token_indices` ({trainable_token_indices!r}) must be None with `mode="pretraining"`, which trains and '
        "saves every row of the embedding. Leave it out.",
    ),
)


def require_valid(asked: dict[str, Any]) -> None:
    """Raise a ValueError for the first rule that the fields of a configuration, by name, break."""
    for rule in RULES:
        if not rule.holds(asked[rule.field]):
            raise ValueError(rule.message(asked[rule.field]))
    for combination in COMBINATIONS:
        if not combination.holds(asked):
            raise ValueError(combination.message.format(**asked))


def require_present_names(names: Collection[str]) -> None:
    """Raise a ValueError for a setting that goes by another name now, or is gone."""
    for name in names:
        if name in FORMER_NAMES:
            raise ValueError(f"`{name}` is no setting of OIALRConfig any more. {FORMER_NAMES[name]}")
