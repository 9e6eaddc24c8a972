"""What a run leaves for people to read: `oialr_history.json`, plain JSON that is checked when it is read.

It holds every check, the Trainer's log, the settings, and the layers as they were. Weights are in the checkpoints beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from oialr_peft.engine.state import is_update, update_of
from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.files.checkpoints import read_json
from oialr_peft.files.described import SavedLayer
from oialr_peft.files.fields import (
    Fields,
    has_fields,
    is_amount,
    is_finite,
    is_list_of,
    is_object_of,
    is_plain,
    is_size,
    is_text,
    require_fields,
)
from oialr_peft.files.values import is_number
from oialr_peft.files.writing import replacing

RECORD_NAME = "oialr_history.json"
FORMAT_VERSION = 1  # raised when older releases could no longer read new files

LogEntry = Mapping[str, float | None]  # by name; `None` was not finite

_TIMINGS = ("_runtime", "_per_second", "_time")  # endings of what an evaluation reports of itself, not of the model


@dataclass(frozen=True)
class RunRecord:
    """A run, as far as it has come.

    Attributes:
        steps: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        adapter_name: that trained.
        model: class of the model, if it is one of transformers.
        settings: fields of `OIALRConfig`.
        arguments: some of `TrainingArguments`.
        layers: the target layers as they are at the end, in module order.
        history: every check.
        log: entries of the Trainer's log, numbers only; each has a `step`.
        versions: release of each package that matters, by name.
    """

    steps: int
    total_steps: int
    adapter_name: str
    model: str | None
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any]
    layers: Sequence[SavedLayer]
    history: Sequence[OIALRUpdate]
    log: Sequence[LogEntry]
    versions: Mapping[str, str]

    def curve(self, metric: str) -> dict[int, float]:
        """Values of a metric by optimizer step; those that are not finite are left out."""
        return {int(entry["step"] or 0): value for entry in self.log if (value := entry.get(metric)) is not None}

    @property
    def metrics(self) -> list[str]:
        """Names of what evaluations measured of the model, in the order they were first logged."""
        names = dict.fromkeys(name for entry in self.log for name in entry)
        return [name for name in names if is_model_metric(name)]

    @property
    def final_metrics(self) -> dict[str, float]:
        """The last value of the loss and of each metric."""
        curves = {name: self.curve(name) for name in ("loss", *self.metrics)}
        return {name: curve[max(curve)] for name, curve in curves.items() if curve}

    @property
    def seconds(self) -> float | None:
        """Duration of the training, checks included; `None` while it runs."""
        return next((value for entry in reversed(self.log) if (value := entry.get("train_runtime")) is not None), None)

    @property
    def check_seconds(self) -> float:
        """Duration of all checks."""
        return sum(update.seconds for update in self.history)

    @property
    def trainable_percent_mean(self) -> float | None:
        """Trainable share after each check, averaged over the checks, in percent of the dense model."""
        shares = [update.trainable_percent for update in self.history]
        return sum(shares) / len(shares) if shares else None

    @property
    def factored(self) -> int:
        """Number of factored layers."""
        return sum(layer.rank is not None for layer in self.layers)

    @property
    def rank_mean(self) -> float:
        """Mean rank of the layers; that of a dense one is min(m, n)."""
        return sum(layer.rank_or_full for layer in self.layers) / len(self.layers)


def is_model_metric(name: str) -> bool:
    """Whether an entry of the log is what an evaluation measured of the model, not of itself.

    >>> [is_model_metric(name) for name in ("eval_loss", "eval_runtime", "loss")]
    [True, False, False]
    """
    return name.startswith("eval_") and not name.endswith(_TIMINGS)


def finite_numbers(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of an entry of the Trainer's log; NaN and Inf, which JSON does not know, become `None`."""
    numbers = {name: value for name, value in entry.items() if is_number(value)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def write_record(record: RunRecord, directory: str | os.PathLike[str]) -> None:
    """Write `oialr_history.json` to a directory, which is made if it does not exist; an older one is replaced at once."""
    fields = asdict(record) | {"layers": [layer._asdict() for layer in record.layers]}
    text = json.dumps({"format_version": FORMAT_VERSION, **fields}, ensure_ascii=False, allow_nan=False)
    Path(directory).mkdir(parents=True, exist_ok=True)
    with replacing(Path(directory, RECORD_NAME)) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def checkpoint_step(directory: Path) -> int | None:
    """The optimizer step in the name of a checkpoint of the Trainer; `None` for another directory.

    >>> checkpoint_step(Path("runs/checkpoint-20")), checkpoint_step(Path("runs"))
    (20, None)
    """
    name = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", directory.name)
    return int(name[1]) if name else None


def find_record(run: str | os.PathLike[str]) -> Path:
    """The record of a run's directory: its own, or that of its last checkpoint that has one.

    Raises:
        ValueError: there is none.
    """
    found = [(step, path) for path in Path(run).glob("*") if (step := checkpoint_step(path)) is not None]
    numbered = [path for _, path in sorted(found, reverse=True)]
    for directory in (Path(run), *numbered):
        if (directory / RECORD_NAME).is_file():
            return directory / RECORD_NAME
    what = "has no" if Path(run).is_dir() else "is no directory with an"
    raise ValueError(f"`{run}` {what} {RECORD_NAME}. Name the `output_dir` of a training with OIALRTrainer.")


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """The record in a file.

    Raises:
        ValueError: it is no JSON, of a later format, or a field is missing or of another type; the message names it.
    """
    data = read_json(path)
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"`{path}` has format {version}; this release reads up to {FORMAT_VERSION}. Upgrade oialr-peft."
        )
    require_fields(data, _FIELDS, path)
    fields: dict[str, Any] = {name: data.get(name) for name in RunRecord.__dataclass_fields__}
    fields["layers"] = tuple(SavedLayer(**layer) for layer in fields["layers"])
    fields["history"] = tuple(update_of(update) for update in fields["history"])
    return RunRecord(**fields)


# ---- what the fields of a file must be ---------------------------------------------------------------------------------


def _is_log_entry(value: Any) -> bool:
    return is_object_of(lambda number: number is None or is_finite(number))(value) and is_amount(value.get("step"))


_is_layer = has_fields(
    {
        "name": is_text,
        "out_features": is_size,
        "in_features": is_size,
        "rank": lambda rank: rank is None or is_size(rank),
    }
)
_FIELDS: Fields = {
    "format_version": (is_amount, "an int"),
    "steps": (is_amount, "an int ≥ 0"),
    "total_steps": (is_amount, "an int ≥ 0"),
    "adapter_name": (is_text, "a string"),
    "model": (lambda value: value is None or is_text(value), "a string or null"),
    "settings": (is_object_of(is_plain), "an object of finite numbers, strings and the like"),
    "arguments": (is_object_of(is_plain), "an object of finite numbers, strings and the like"),
    "layers": (
        lambda value: is_list_of(_is_layer)(value) and len(value) > 0,
        "a list of layers with name, out_features, in_features and rank",
    ),
    "history": (is_list_of(is_update), "a list of checks with the fields of OIALRUpdate"),
    "log": (is_list_of(_is_log_entry), "a list of objects that hold numbers and a step"),
    "versions": (is_object_of(is_text), "an object of strings"),
}
