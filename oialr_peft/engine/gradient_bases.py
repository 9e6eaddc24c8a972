"""`GradientBases`: U and V in the direction of the first step's gradients, for `init_basis="gradient"`.

`probes.py` records the gradients; here are the outcomes that a controller puts into the layers after the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

from oialr_peft.engine.outcome import Outcome
from oialr_peft.engine.probes import GradientProbes
from oialr_peft.engine.trained_layers import TrainedLayers
from oialr_peft.linalg.factors import Factors, compute_dtype, factors_of
from oialr_peft.parallel.distributed import Job, Processes
from oialr_peft.parallel.sharding import local
from oialr_peft.tuner.layer import starting_factors


class GradientBases:
    """Probes of layers that have learned nothing yet, and the factors that follow from what they recorded.

    Args:
        trained: the layers.
        processes: that train the model together; `None` when it is one alone.
    """

    def __init__(self, trained: TrainedLayers, processes: Processes | None) -> None:
        self.trained = trained
        self._processes = processes
        self._probes = GradientProbes(trained.layers.values(), trained.adapter_name)
        weakref.finalize(self, self._probes.close)

    @classmethod
    def wanted(cls, trained: TrainedLayers, processes: Processes | None) -> bool:
        """Whether the configuration asks for them, and no layer has learned anything yet on any process."""
        if trained.config.init_basis != "gradient":
            return False
        learned = [local(parameter.detach()).count_nonzero() for parameter in trained.parameters.values()]
        entries = int(torch.stack(learned).sum())
        if processes is not None:
            entries = -int(*processes.smallest([-entries]))
        return entries == 0

    def forget(self) -> None:
        """Start again, after a step that did not count."""
        self._probes.forget()

    def close(self) -> None:
        """Stop recording, and free what was recorded."""
        self._probes.close()

    def jobs(self, names: list[str]) -> list[Job]:
        """The decompositions that these layers take."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.trained.layers.items()}
        parameters = self.trained.parameters
        return [Job(name, shapes[name], compute_dtype(parameters[name]).itemsize) for name in names]

    def gather(self, names: list[str], mine: set[str]) -> None:
        """Add what the processes have recorded of these layers up."""
        if self._processes is not None:
            self._processes.add_up(self._probes.sketches(names))

    def release(self) -> None:
        """Nothing: what was recorded is freed by `close`."""

    def found(self, names: list[str]) -> Iterator[Outcome]:
        """For each layer with a finite gradient other than zero, its leading directions beside a core of zeros."""
        usable = self._probes.usable()
        for name in names:
            if name not in usable:
                yield Outcome(name)
                continue
            leading = self._probes.leading(name)
            factors = starting_factors(factors_of(leading, leading.u.dtype), self.trained.config)
            dtype = self.trained.parameters[name].dtype
            yield Outcome(name, factors=Factors(*(factor.to(dtype).contiguous() for factor in factors)), state={})

    def expected(self, name: str, stability: float, rank: int, broken: bool) -> Outcome:
        """The outcome that another process found, with unset tensors to receive it into."""
        return Outcome(name) if rank == 0 else Outcome(name, factors=self.trained.unset_factors(name, rank), state={})
