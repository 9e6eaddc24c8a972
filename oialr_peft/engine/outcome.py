"""What is found for one layer in a check or after the first step, and how the processes tell each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from oialr_peft.linalg.factors import Factors
from oialr_peft.linalg.moments import is_moment, moments_of
from oialr_peft.parallel.distributed import Job, Processes


@dataclass(frozen=True)
class Outcome:
    """What was found for one layer: what is kept of its basis, or its new factors with their optimizer state.

    Neither of a factored layer that stays as it is.

    Attributes:
        name: of the layer.
        stability: of a dense layer that had an earlier basis.
        kept: of a layer that stays dense, see `basis.kept_of`.
        factors: of a layer that was factored, rotated or cut.
        state: what the optimizer keeps for the new sigma; `None` when it cannot follow and is reset.
        rank_before: of a layer that takes part in the Σ update.
        broken: whether the optimizer's state held NaN or Inf, and is reset therefore.
    """

    name: str
    stability: float | None = None
    kept: Tensor | None = None
    factors: Factors | None = None
    state: dict[str, Any] | None = None
    rank_before: int | None = None
    broken: bool = False

    def without_tensors(self) -> Outcome:
        """What is left to report."""
        return replace(self, kept=None, factors=None, state=None)

    def message(self, device: torch.device) -> list[Tensor]:
        """Everything that other processes need, contiguous and on `device`."""
        if self.kept is not None:
            return [self.kept.to(device).contiguous()]
        if self.factors is None:
            return []
        return [*(factor.contiguous() for factor in self.factors), *moments_of(self.state or {})]

    def received(self, message: list[Tensor]) -> Outcome:
        """With the tensors of a message in place of its own."""
        if not message:
            return self
        if self.factors is None:
            return replace(self, kept=message[0])
        u, sigma, vh, *moments = message
        values = iter(moments)
        state = self.state and {key: next(values) if is_moment(value) else value for key, value in self.state.items()}
        return replace(self, factors=Factors(u, sigma, vh), state=state)


class Finder(Protocol):
    """Finds outcomes of layers, in a process alone or in its share of several."""

    def jobs(self, names: list[str]) -> list[Job]:
        """The decompositions that these layers take."""

    def gather(self, names: list[str], mine: set[str]) -> None:
        """Called by every process before the layers of a round are decomposed: all names, and those of this process."""

    def found(self, names: list[str]) -> Iterator[Outcome]:
        """The outcomes of these layers, computed by this process."""

    def release(self) -> None:
        """Free what was gathered."""

    def expected(self, name: str, stability: float, rank: int, broken: bool) -> Outcome:
        """The outcome that another process found, with unset tensors to receive it into.

        `rank` 0 means that the layer stays dense, or factored as it is.
        """


def found_by_all(processes: Processes, names: list[str], finder: Finder) -> Iterator[Outcome]:
    """The outcome of every layer: each is computed by one process and sent to the others, which all call this.

    Raises:
        Exception: what kept this process from finding the outcomes of its share.
        RuntimeError: another process failed.
    """
    for shares in processes.rounds(finder.jobs(names)):
        mine = [job.name for job, owner in shares if owner == processes.index]
        finder.gather([job.name for job, _ in shares], set(mine))
        found: dict[str, Outcome] = {}
        failure = None
        try:
            found = {outcome.name: outcome for outcome in finder.found(mine)}
        except Exception as error:  # raised below, when the other processes know of it
            failure = error
        finder.release()
        yield from _exchanged(processes, shares, found, failure, finder)


def _exchanged(
    processes: Processes,
    shares: Sequence[tuple[Job, int]],
    found: Mapping[str, Outcome],
    failure: Exception | None,
    finder: Finder,
) -> list[Outcome]:
    """The outcomes of all processes: first four numbers for each, then each tensor once, from the one that computed it.

    Args:
        processes: all of them call this.
        shares: jobs of one round with their owners.
        found: the outcomes that this process owns, by name.
        failure: what kept this process from finding them all.
        finder: says what outcomes of other processes look like.

    Returns:
        Outcomes in the order of the shares, with the same tensors, bit for bit, in every process.

    Raises:
        Exception: the failure of this process.
        RuntimeError: another process failed.
    """
    table = torch.zeros(len(shares), 4, dtype=torch.float64)  # done, Stability, new rank (0: stays), broken state
    for row, (job, _) in zip(table, shares, strict=True):
        if job.name in found:
            outcome = found[job.name]
            rank = 0 if outcome.factors is None else outcome.factors.rank
            row.copy_(torch.tensor([1.0, outcome.stability or 0.0, rank, outcome.broken], dtype=row.dtype))
    rows = processes.merged(table).tolist()
    if failure is not None:
        raise failure
    for (done, *_), (job, owner) in zip(rows, shares, strict=True):
        if not done:
            raise RuntimeError(
                f"Process {owner} could not decompose `{job.name}`; its own error message says why. All processes stop. "
                "Go back to the last checkpoint."
            )
    outcomes = [
        found.get(job.name) or finder.expected(job.name, stability, int(rank), bool(broken))
        for (job, _), (_, stability, rank, broken) in zip(shares, rows, strict=True)
    ]
    messages = [outcome.message(processes.device) for outcome in outcomes]
    processes.send(
        [(tensor, owner) for message, (_, owner) in zip(messages, shares, strict=True) for tensor in message]
    )
    return [outcome.received(message) for outcome, message in zip(outcomes, messages, strict=True)]
