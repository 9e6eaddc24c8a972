"""`Check`: what one check finds for each layer, as an `Outcome`; nothing is changed here.

A dense layer is decomposed, compared with its basis of the check before, and factored if the schedule says so. A factored layer
is decomposed if it takes part in the Σ update. Whatever is factored or due is cut to the rank that is worth keeping.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from oialr_peft.engine.inputs import RecentInputs
from oialr_peft.engine.outcome import Outcome
from oialr_peft.engine.pruning import UNKNOWN, directions_needed, output_energies
from oialr_peft.engine.schedule import Schedule
from oialr_peft.engine.trained_layers import TrainedLayers
from oialr_peft.engine.warn import warn
from oialr_peft.linalg.basis import kept_of, kept_shape, stability_error, stability_of_kept
from oialr_peft.linalg.decompositions import Decomposition, decompose
from oialr_peft.linalg.factors import (
    Rotation,
    bounded_rank,
    compute_dtype,
    not_finite,
    require_in_range,
    rotate,
)
from oialr_peft.linalg.moments import OptimizerSlots, empty_state, is_moment, is_transportable, transport_state
from oialr_peft.parallel.distributed import Job, Processes
from oialr_peft.parallel.sharding import shaped_as_whole
from oialr_peft.tuner.quantities import rank_of


class Check:
    """One check of all layers, as each process sees it.

    Args:
        trained: the layers.
        slots: of the optimizer that trains them.
        schedule: says when a layer freezes.
        step: optimizer step after which the check runs.
        due: names of the layers that take part in the Σ update.
        bases: what was kept of the bases of dense layers, by name; it may change while outcomes are used.
        processes: that train the model together; `None` when it is one alone.
        recent: what layers were given before the check, as far as the pruning rule asks for it.
    """

    def __init__(
        self,
        trained: TrainedLayers,
        slots: OptimizerSlots,
        *,
        schedule: Schedule,
        step: int,
        due: Collection[str],
        bases: Mapping[str, Tensor],
        processes: Processes | None,
        recent: RecentInputs,
    ) -> None:
        self.trained = trained
        self.slots = slots
        self.settings = trained.settings
        self.schedule = schedule
        self.step = step
        self.due = frozenset(due)
        self.bases = bases
        self.processes = processes
        self.recent = recent

    def jobs(self, names: list[str]) -> list[Job]:
        """The decompositions that these layers take."""
        parameters = self.trained.parameters
        return [Job(name, self.trained.shape(name), compute_dtype(parameters[name]).itemsize) for name in names]

    def gather(self, names: list[str], mine: set[str]) -> None:
        """Get the whole tensors of layers that are in shards."""
        if self.trained.sharded:
            self.trained.gather(names, mine, self.slots, freezing=self.schedule.may_freeze(self.step))

    def release(self) -> None:
        """Free them."""
        self.trained.release()

    def found(self, names: list[str]) -> Iterator[Outcome]:
        """The outcomes of these layers, computed by this process.

        The host waits a few times for each batch of decompositions, however many layers are in it, and on an accelerator once
        more for each eigendecomposition: of a layer that is cut or factored, and for directions of its outputs.

        Raises:
            ValueError: a layer's Σ would hold Inf, because its dtype cannot hold a singular value.
            torch.linalg.LinAlgError: a weight cannot be decomposed.
        """
        for decompositions in decompose([(name, self.trained.matrix(name)) for name in names]):
            kept, stability = self._compared(decompositions)
            rotations = {
                found.name: self._rotation(found)
                for found in decompositions
                if found.name not in kept or self._freezes(found, stability.get(found.name))
            }
            cut = self._cut(rotations)
            broken = self._require_numbers(rotations)
            for name in (found.name for found in decompositions):
                if name in rotations:
                    yield self._changed(name, cut[name], stability.get(name), name in broken)
                else:
                    yield Outcome(name, stability.get(name), kept[name])

    def expected(self, name: str, stability: float, rank: int, broken: bool) -> Outcome:
        """The outcome that another process found, with unset tensors to receive it into."""
        parameter, dense = self.trained.parameters[name], self.trained.is_dense(name)
        rank_before = self.trained.rank_before_update(name) if name in self.due else None
        measured = stability if name in self.bases else None
        if rank == 0 and not dense:
            return Outcome(name, rank_before=rank_before)
        if rank == 0:
            shape = kept_shape(self.trained.shape(name), self.settings.stability_storage)
            dtype = torch.bfloat16 if self.settings.stability_storage == "bf16" else compute_dtype(parameter)
            return Outcome(name, measured, torch.empty(shape, dtype=dtype, device=parameter.device))
        factors = self.trained.unset_factors(name, rank)
        state = shaped_as_whole(self.slots.state_of(parameter))
        unset = empty_state(state, parameter.shape, self.trained.size_for(name, rank))
        return Outcome(name, measured, None, factors, None if broken else unset, rank_before, broken)

    def _compared(self, decompositions: list[Decomposition]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What is kept of the bases of dense layers, and Stability of those that have an earlier one."""
        storage = self.settings.stability_storage
        kept: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for found in decompositions:
            name = found.name
            if self.trained.is_dense(name):
                kept[name] = kept_of(found, storage, self.trained.parameters[name])
                if name in self.bases:
                    values[name] = stability_of_kept(kept[name], self.bases[name], found.shape, storage)
        if not values:
            return kept, {}
        measured = torch.stack(list(values.values())).tolist()
        return kept, {name: min(1.0, max(-1.0, value)) for name, value in zip(values, measured, strict=True)}

    def _freezes(self, found: Decomposition, measured: float | None) -> bool:
        if measured is not None:  # a sketched value may be too high by chance; two standard deviations are given away
            measured -= 2 * stability_error(measured, found.shape, self.settings.stability_storage)
        return self.schedule.freezes(self.step, measured)

    def _rotation(self, found: Decomposition) -> Rotation:
        """From the trained matrix to its diagonal: U, V of a dense weight, P, Q of a core."""
        svd = found.svd()
        if self.trained.is_dense(found.name):
            svd = svd.cut(self.trained.full_rank(found.name))
        return Rotation(svd.u, svd.s, svd.vh.mT)

    def _require_numbers(self, rotations: dict[str, Rotation]) -> set[str]:
        """The layers whose optimizer state holds NaN or Inf, which a change of basis would spread over all of it."""
        parameters = self.trained.parameters
        singular_values = {name: found.singular_values.to(parameters[name].dtype) for name, found in rotations.items()}
        states = {name: self.trained.state(name, self.slots) for name in rotations}
        moments = {
            f"{name}.{key}": value
            for name, state in states.items()
            if is_transportable(state, parameters[name].shape)
            for key, value in state.items()
            if is_moment(value)
        }
        found = not_finite(singular_values | moments)
        for name in found:
            if name in rotations:
                require_in_range(rotations[name].singular_values, parameters[name].dtype, name)
        return {key.rpartition(".")[0] for key in found}

    def _cut(self, rotations: dict[str, Rotation]) -> dict[str, Rotation]:
        """The way to what is kept of each layer; layers that are not due keep all."""
        needed = {name: self._needed(name, rotation) for name, rotation in rotations.items() if name in self.due}
        numbers = torch.stack(list(needed.values())).tolist() if needed else []
        ranks = {
            name: self._bounded(name, number, rotations[name].rank)
            for name, number in zip(needed, numbers, strict=True)
        }
        return {name: rotation.cut(ranks.get(name, rotation.rank)) for name, rotation in rotations.items()}

    def _needed(self, name: str, rotation: Rotation) -> Tensor:
        """How many directions of a layer are worth keeping, by what was recorded where the rule asks for it."""
        settings, trained, recent = self.settings, self.trained, self.recent
        sample = recent.samples.get(name)
        measured = None
        if sample is not None and sample.numel() > 0:
            layer = trained.layers[name]
            # the base weights of sharded layers are on other processes
            with_base = layer.is_correction[trained.adapter_name] and not trained.sharded
            factors = None if trained.is_dense(name) else trained.factors(name)
            measured = output_energies(layer, rotation, factors, sample, with_base=with_base)
        return directions_needed(rotation.singular_values, settings.cutoff, settings.max_output_loss, measured)

    def _bounded(self, name: str, needed: int, rank: int) -> int:
        """The rank to keep of this one when so many directions are needed."""
        if needed == UNKNOWN:
            warn(
                f"Recent inputs of `{name}` give outputs of NaN or Inf, so what pruning would remove of them is unknown: the "
                "layer keeps its rank in this check. Look for the batch or the layer that they come from.",
            )
            return rank
        layer = self.trained.layers[name]
        min_rank = rank_of(self.settings.min_rank, min(layer.out_features, layer.in_features))
        return bounded_rank(needed, rank, max_rank_drop=self.settings.max_rank_drop, min_rank=min_rank)

    def _changed(self, name: str, cut: Rotation, stability: float | None, broken: bool) -> Outcome:
        """New factors and optimizer state of a layer, from the way of its trained matrix to what is kept of it."""
        trained = self.trained
        old = trained.parameters[name]
        rank_before = trained.rank_before_update(name) if name in self.due else None
        factors = None if trained.is_dense(name) else trained.factors(name)
        new = cut.to_factors(old.dtype) if factors is None else rotate(factors, cut)
        if broken:
            return Outcome(name, stability, None, new, None, rank_before, broken=True)
        size = trained.size_for(name, new.rank)
        # zero rows and columns: the state of the dropped directions of a masked layer becomes zero, its shape stays
        p, q = (
            nn.functional.pad(side, (0, size - side.shape[1], 0, rows - side.shape[0]))
            for side, rows in zip((cut.p, cut.q), old.shape, strict=True)
        )
        state = transport_state(trained.state(name, self.slots), old.shape, p, q)
        return Outcome(name, stability, None, new, state, rank_before)
