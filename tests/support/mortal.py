"""Trainings that kill themselves at a chosen moment. Each runs in a process of its own, forked from one that imported all."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from trainer_runs import CASES, SETTINGS, accelerate_run, adapted, trained
from transformers import logging
from transformers.models.bert import modeling_bert  # noqa: F401  (so that no fork imports it)

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer
from oialr_peft.trainer.resume import last_complete_checkpoint

STEPS = 12
EVERY = 3  # steps between two saves
# what happens in a training; "save" is one of two, by what saves
PHASES = {
    "train": [(Accelerator, "backward")],
    "check": [(OIALRController, "_check")],
    "save": [(OIALRTrainer, "_save_checkpoint"), (Accelerator, "save_state")],
}


class Moment(NamedTuple):
    """A moment of a training: `event` calls and returns, of Python or C, after the `visit`-th begin of a phase."""

    phase: str
    visit: int
    event: int


class _Clock:
    """Counts visits and events of each phase, and kills the process at a moment."""

    def __init__(self, moment: Moment | None) -> None:
        self.moment, self.visits, self.events = moment, Counter(), Counter()
        for phase, methods in PHASES.items():
            for owner, name in methods:
                setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _watched(self, phase: str, method: Any) -> Any:
        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.visits[phase] += 1
            if self.moment is None or self.moment[:2] == (phase, self.visits[phase]):
                start = self.events[phase]
                sys.setprofile(lambda *_: self._count(phase, start))
            try:
                return method(*args, **kwargs)
            finally:
                if self.moment is None:
                    sys.setprofile(None)

        return watched

    def _count(self, phase: str, start: int) -> None:
        self.events[phase] += 1
        if self.moment is not None and self.events[phase] - start >= self.moment.event:
            os.kill(os.getpid(), signal.SIGKILL)


def run(directory: Path, case: str, moment: Moment | None = None) -> None:
    """Train to the end from the last complete checkpoint, if there is one, and write a digest of all that it led to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    clock = _Clock(moment)
    digest = _loop(directory) if case == "loop" else _trainer(directory, case)
    sys.setprofile(None)
    events = " ".join(f"{phase} {count // clock.visits[phase]}" for phase, count in clock.events.items())
    (directory / "end").write_text(f"{digest}\n{events}")


def _trainer(directory: Path, case: str) -> str:
    limit = 1 if case == "replace" else None
    settings = {"save_strategy": "steps", "save_steps": EVERY, "save_total_limit": limit, "max_steps": STEPS}
    resume = last_complete_checkpoint(directory) is not None
    trainer = trained(directory, model=adapted(**CASES[case]), resume=resume or None, **settings)
    return _digest(trainer.model, trainer.optimizer, trainer.oialr_controller)


def _loop(directory: Path) -> str:
    """A loop of one's own that saves beside the last state, and renames what is complete."""
    config = OIALRConfig(**{"mode": "replace", **SETTINGS})
    while True:
        done = finished_states(directory)
        last = directory / f"state-{done[-1]}" if done else None
        steps = (done[-1] if done else 0) + EVERY
        shutil.rmtree(directory / "unfinished", ignore_errors=True)
        state = accelerate_run(
            steps, save_at=steps, directory=directory / "unfinished", resume_from=last, config=config
        )
        (directory / "unfinished").replace(directory / f"state-{steps}")
        if steps == STEPS:
            return _digest(*state)


def finished_states(directory: Path) -> list[int]:
    """Steps of the states that the loop saved."""
    return sorted(int(path.name.partition("-")[2]) for path in directory.glob("state-*"))


def _digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer, controller: OIALRController) -> str:
    content = hashlib.sha256()
    tensors = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [torch.as_tensor(value) for value in state.values()]
    for tensor in tensors:
        content.update(tensor.detach().contiguous().numpy().tobytes())
    for update in controller.history:
        content.update(repr((update.step, update.stability, update.frozen, update.ranks)).encode())
    return content.hexdigest()
