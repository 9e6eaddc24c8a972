"""Code of a user who checks types strictly; `make package` gives it to mypy with the installed package."""

from __future__ import annotations

from typing import assert_type

import torch

from oialr_peft import (
    Factors,
    OIALRConfig,
    OIALRController,
    OIALRTrainer,
    OIALRUpdate,
    factorize,
    rank_table,
    save_low_rank,
    stability,
)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[OIALRUpdate]:
    controller = OIALRController(model, optimizer, total_steps=10)
    assert_type(controller.step(), OIALRUpdate | None)
    assert_type(rank_table(model)[0].rank, int)
    save_low_rank(model, "directory")
    return controller.history


def history(trainer: OIALRTrainer) -> list[OIALRUpdate]:
    controller = trainer.oialr_controller
    return [] if controller is None else controller.history


assert_type(factorize(torch.eye(3)), Factors)
assert_type(stability(torch.eye(3), torch.eye(3)), float)
assert_type(OIALRConfig(mode="replace", cutoff=0.2).cutoff, float | None)
OIALRConfig(mode="replace", cutoff="0.2")  # type: ignore[arg-type]  # an error, or mypy --strict reports an unused ignore
