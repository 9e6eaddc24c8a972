"""A process that is killed at any moment of training, check or save leaves a directory from which the training goes on.

What it leads to is, bit for bit, what a run that nobody killed leads to.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from mortal import PHASES, Moment, finished_states, run
from processes import forking_context

from oialr_peft.storage.record import checkpoint_step
from oialr_peft.trainer.resume import last_complete_checkpoint

CASES = {"replace": 20, "loop": 15, "pretraining": 15}  # how often each is killed
MARKS = {case: [pytest.mark.slow] + [pytest.mark.sentinel] * (case == "loop") for case in CASES}
KILLS_OF_A_RUN = 7  # then it may end


@pytest.fixture(scope="module")
def in_a_process() -> Callable[..., int]:
    """Runs `mortal.run` in a process; returns its exit status."""
    context = forking_context()

    def start(directory: Path, case: str, moment: Moment | None = None) -> int | None:
        directory.mkdir(exist_ok=True)
        process = context.Process(target=run, args=(directory, case, moment))
        process.start()
        process.join()
        return process.exitcode

    return start


def last_saved(directory: Path, case: str) -> int:
    """The step from which a run goes on."""
    if case == "loop":
        return max(finished_states(directory), default=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = last_complete_checkpoint(directory)
    return 0 if checkpoint is None else checkpoint_step(Path(checkpoint)) or 0


def end_of(directory: Path) -> tuple[str, dict[str, int]]:
    digest, _, events = (directory / "end").read_text().partition("\n")
    words = events.split()
    return digest, dict(zip(words[::2], map(int, words[1::2]), strict=True))


@pytest.mark.parametrize(
    ("case", "kills"),
    [("replace", 3), *(pytest.param(case, kills, marks=MARKS[case]) for case, kills in CASES.items())],
)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(case, kills, in_a_process, tmp_path):
    random = Random(case)
    assert in_a_process(tmp_path / "whole", case) == 0
    expected, events = end_of(tmp_path / "whole")
    assert events.keys() == PHASES.keys()
    killed, runs = 0, 0
    while killed < kills:
        directory, saved = tmp_path / f"run {runs}", 0
        for _ in range(min(KILLS_OF_A_RUN, kills - killed)):
            phase = list(PHASES)[killed % len(PHASES)]
            moment = Moment(phase, random.randint(1, 2), random.randint(1, events[phase]))
            status = in_a_process(directory, case, moment)
            if status == 0:  # there was no such moment before the end
                break
            assert status == -signal.SIGKILL
            assert last_saved(directory, case) >= saved, moment
            saved, killed = last_saved(directory, case), killed + 1
        if status != 0:
            assert in_a_process(directory, case) == 0
        assert end_of(directory)[0] == expected
        runs += 1
