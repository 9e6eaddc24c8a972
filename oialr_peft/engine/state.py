"""`RunState`: what a run saves beside weights and optimizer. One dataclass, one reader and one writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.files.checkpoints import tensors_in
from oialr_peft.files.fields import (
    Fields,
    has_fields,
    is_amount,
    is_finite,
    is_list_of,
    is_object_of,
    is_pair,
    is_size,
    is_text,
    require_fields,
)
from oialr_peft.files.writing import replacing

STATE_NAME = "oialr_state.safetensors"
FORMAT_VERSION = 1  # raised when older releases could no longer read new states


def update_of(stored: Mapping[str, Any]) -> OIALRUpdate:
    """The update with these fields; JSON makes lists of pairs."""
    ranks = {name: (before, after) for name, (before, after) in stored["ranks"].items()}
    return OIALRUpdate(**{**stored, "ranks": ranks})


@dataclass
class RunState:
    """Everything a resumed run needs beside the weights and the optimizer.

    In memory it is a dictionary of tensors, numbers and strings; in a file the tensors are safetensors, and everything else is
    JSON in their header.

    Attributes:
        steps: optimizer steps counted so far.
        sigma_updates: Σ updates so far.
        bases: what is kept of the bases of dense layers, by name.
        history: every check.
    """

    steps: int = 0
    sigma_updates: int = 0
    bases: dict[str, Tensor] = field(default_factory=dict)
    history: list[OIALRUpdate] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary that Accelerate saves."""
        return {
            "format_version": FORMAT_VERSION,
            "steps": self.steps,
            "sigma_updates": self.sigma_updates,
            "bases": dict(self.bases),
            "history": [asdict(update) for update in self.history],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunState:
        """From what `to_dict` gave.

        Raises:
            ValueError: it is of a later format.
        """
        version = stored.get("format_version", 1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The controller state has format {version}; this release reads up to {FORMAT_VERSION}. Upgrade oialr-peft."
            )
        history = [update_of(update) for update in stored["history"]]
        return cls(int(stored["steps"]), int(stored["sigma_updates"]), dict(stored["bases"]), history)

    def write(self, file: Path) -> None:
        """To a file, whole or not at all."""
        stored = self.to_dict()
        tensors = {name: basis.contiguous().cpu() for name, basis in stored.pop("bases").items()}
        with replacing(file) as unfinished:
            save_file(tensors, unfinished, metadata={"oialr": json.dumps(stored)})


def read_state(file: Path) -> dict[str, Any]:
    """The dictionary of a `RunState` that `RunState.write` wrote.

    Raises:
        ValueError: the file is damaged, or of another kind; the message names it.
    """
    tensors_in(file)
    with safe_open(file, framework="pt") as stored:
        header = (stored.metadata() or {}).get("oialr", "")
        # copies: a tensor of the file itself would change with it, and keep it on disk after it is deleted
        bases = {key: stored.get_tensor(key).clone() for key in stored.keys()}  # noqa: SIM118  (it is no dictionary)
    try:
        state = dict(json.loads(header))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`{file}` holds no state of a schedule: {error}. Resume from another checkpoint, or get this one again."
        ) from error
    require_fields(state, _FIELDS, file)
    return {**state, "bases": bases}


is_update = has_fields(
    {
        "step": is_amount,
        "stability": is_object_of(is_finite),
        "frozen": is_list_of(is_text),
        "ranks": is_object_of(is_pair),
        "trainable": is_amount,
        "total": is_size,
        "seconds": is_finite,
    }
)
_FIELDS: Fields = {
    "format_version": (lambda value: value is None or is_amount(value), "an int ≥ 1"),
    "steps": (is_amount, "an int ≥ 0"),
    "sigma_updates": (is_amount, "an int ≥ 0"),
    "history": (is_list_of(is_update), "a list of checks with the fields of OIALRUpdate"),
}
