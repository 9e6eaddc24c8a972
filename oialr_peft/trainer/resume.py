"""Where a run is resumed from: complete checkpoints of a directory, and the adapters in them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from oialr_peft.engine.state import STATE_NAME
from oialr_peft.storage.record import (
    checkpoint_step,
)
from oialr_peft.tuner.layer import OIALRLinear


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint of the most optimizer steps that was written to its end; `None` when there is none."""
    found = sorted(
        (step, path)
        for path in Path(output_dir).glob("*")
        if (step := checkpoint_step(path)) is not None and path.is_dir()
    )
    for _, directory in reversed(found):
        if _is_complete(directory):
            return str(directory)
        warnings.warn(f"`{directory}` was not written to its end, so it is passed over.", stacklevel=3)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return Path(checkpoint, STATE_NAME).is_file()


def saved_adapters(model: torch.nn.Module, checkpoint: str) -> Iterator[tuple[str, Path]]:
    """Each OIALR adapter of the model with the directory in the checkpoint that holds it."""
    layers = [module for module in model.modules() if isinstance(module, OIALRLinear)]
    for name in sorted({name for layer in layers for name in layer._all_available_adapter_names()}):
        directory = Path(checkpoint, name)
        yield name, directory if directory.is_dir() else Path(checkpoint)


def checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that the Trainer writes at this step."""
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")


def resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer resumed from, which it does not tell callbacks: the checkpoint of this step in `output_dir`."""
    directory = checkpoint_directory(args, state)
    if not directory.is_dir():
        raise ValueError(
            f"The training was resumed at step {state.global_step}, but `{directory}` does not exist. OIALRCallback "
            "finds its state only there; use OIALRTrainer to resume from any directory."
        )
    return directory
