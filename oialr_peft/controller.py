"""`OIALRController`: the engine that measures Stability, factors layers, and prunes them, between optimizer steps.

`schedule.py` says when, `factors.py` and `moments.py` say how, `layer.py` holds the tensors; here is the order of
events. A check at step t (t a multiple of ν):

1. every dense layer: Stability against the basis stored at the previous check, then store the new basis; factor the
   layers that qualify.
2. Σ update, when some layer is factored: the layers that are due are decomposed, then truncated. Optimizer state
   follows every change of basis and rank.

Before all that, after the first step: bases in the direction of the gradient, if the configuration asks for them.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr_peft.basis import kept_of, kept_shape, stability_error, stability_of_kept
from oialr_peft.config import OIALRConfig
from oialr_peft.decompositions import Decomposition, decompose
from oialr_peft.distributed import Job, Processes, refresh_reducers, refuse_join, require_supported_engine
from oialr_peft.factors import (
    DTYPES,
    Factors,
    Rotation,
    bounded_rank,
    changed,
    compute_dtype,
    factors_of,
    first_not_finite,
    not_finite,
    not_finite_error,
    require_finite,
    require_in_range,
)
from oialr_peft.inputs import RecentInputs
from oialr_peft.layer import OIALRLinear, starting_factors
from oialr_peft.learning_rate import SigmaLearningRate
from oialr_peft.model import adapter_layers
from oialr_peft.moments import OptimizerSlots, empty_state, is_moment, is_transportable, transport_state
from oialr_peft.movement import Movement
from oialr_peft.outcome import Expected, Outcome, exchanged
from oialr_peft.probes import GradientProbes
from oialr_peft.progress import decomposition_bar, log_check
from oialr_peft.pruning import UNKNOWN, count_to_keep, output_energies
from oialr_peft.schedule import Schedule, rank_of, steps_of
from oialr_peft.sharding import (
    is_sharded,
    like_shards_of,
    local,
    reshard_idle,
    shaped_as_whole,
    shard_new_parameters,
    whole,
)
from oialr_peft.values import is_count

logger = logging.getLogger(__name__)

RANKS_NAME = "oialr_ranks.json"
FORMAT_VERSION = 1  # of the state; raised when older releases could no longer read new ones
# share of directions kept from which a warning says so; no route is faster there than the dense layer
LITTLE_PRUNED = 0.9


@dataclass(frozen=True)
class OIALRUpdate:
    """What one check did.

    Attributes:
        step: optimizer step after which the check ran.
        stability: Stability by module name, for the dense layers that had an earlier basis to compare with.
        frozen: names of the layers factored in this check.
        ranks: rank (before, after) by module name, for the layers that took part in the Σ update.
        trainable: parameters that train after the check; of a masked layer, those of its rank.
        total: parameters of the dense model that this one stands for.
        seconds: duration of the check.

    Examples:
        >>> update = OIALRUpdate(step=40, frozen=["up"], ranks={"up": (10, 6)}, trainable=50, total=200)
        >>> update.trainable_percent
        25.0
    """

    step: int
    stability: dict[str, float] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def trainable_percent(self) -> float:
        """Trainable parameters in percent of the dense model's."""
        return 100 * self.trainable / self.total


class _Whole(NamedTuple):
    """The whole tensors of a sharded layer, on the process that decomposes it."""

    matrix: Tensor
    factors: Factors | None
    state: dict[str, Any]


class OIALRController:
    """Runs the method on a model with an OIALR adapter: `step()` once after each optimizer step.

    Trainer and callback only call it. The optimizer object is never replaced: parameters and their state are swapped
    inside it. It is an object that `accelerator.register_for_checkpointing` accepts.

    Each check is logged by the standard `logging` module, on the main process: one line at level INFO of the logger
    `oialr_peft.controller`, one for each layer at level DEBUG. `logging.basicConfig(level=logging.INFO)` shows the former.

    Args:
        model: the model, as `get_peft_model` or `model.add_adapter` made it; wrappers are fine.
        optimizer: trains the adapter; made after the adapter.
        total_steps: optimizer steps of the whole run, ≥ 1; fractions in the configuration refer to it.
        adapter_name: which adapter.
        disable_tqdm: no progress bar while a check decomposes for more than a second.

    Attributes:
        history: the `OIALRUpdate` of every check so far.

    Raises:
        ValueError: the model has no such adapter, the optimizer does not train it, or the configured steps do not fit
            into `total_steps`; or the engine that trains the model cannot follow changes of rank, see `docs/distributed.md`.

    Examples:
        In a loop of your own:

        >>> import torch
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
        >>> model = get_peft_model(model, OIALRConfig(target_modules=["0"], freeze_when="delay", delay=10, update_every=5))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        >>> controller = OIALRController(model, optimizer, total_steps=20)
        >>> for _ in range(20):
        ...     model(torch.randn(32, 6)).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     update = controller.step()  # None between checks
        >>> [(update.step, update.frozen) for update in controller.history]
        [(5, []), (10, ['0']), (15, []), (20, [])]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        adapter_name: str = "default",
        disable_tqdm: bool = False,
    ) -> None:
        require_supported_engine(model, optimizer)
        self.disable_tqdm = disable_tqdm
        self.model = model
        self.optimizer = optimizer
        self.adapter_name = adapter_name
        self.config = config_of(model, adapter_name)
        self.layers = adapter_layers(model, adapter_name)
        self.schedule = _schedule_of(self.config, total_steps)
        self.history: list[OIALRUpdate] = []
        self._steps = 0
        self._sigma_updates = 0
        self._bases: dict[str, Tensor] = {}
        self._reset_warned = False
        self._movement = Movement()
        self._recent = None if self.config.max_output_loss is None else RecentInputs(self.layers.values())
        if self._recent is not None:
            weakref.finalize(self, self._recent.close)
        self._trained = {name: layer.trained_parameter(adapter_name) for name, layer in self.layers.items()}
        self._require_trained_by_optimizer()
        # its learning rate stands for that of all layers, which schedules move alike
        self._group = OptimizerSlots(optimizer).group_of(next(iter(self._trained.values())))
        self._device = next(iter(self._trained.values())).device
        self._processes = Processes.of(model, self._device)
        self._sharded = is_sharded(model)
        self._whole: dict[str, _Whole] = {}
        if self._processes is not None:
            self._processes.require_same("The configuration", _settings_of(self.config, total_steps, self.layers))
        refresh_reducers(model)
        self._require_loaded_weights()
        self._dense_total = self._count_dense_model()
        for layer in self.layers.values():
            layer.controlled[adapter_name] = True
        torch_optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        torch_optimizer.register_step_post_hook(_forget_products_of(list(self.layers.values())))
        self._fused_step = _FusedStep(torch_optimizer)
        scale = self.config.sigma_lr_scale
        self._sigma_rate = SigmaLearningRate(torch_optimizer, self.layers.values(), adapter_name, scale)
        self._probes = self._new_probes()
        self._record_before_check()

    def step(self) -> OIALRUpdate | None:
        """Count one optimizer step; call it after the step, with gradients cleared.

        A step that Accelerate's gradient scaler skipped does not count, nor one that a fused optimizer skipped for any
        scaler. With a `torch.amp.GradScaler` of your own and another optimizer, leave the call out after a skipped step.

        Returns:
            The update, when this step was a check, else None.

        Raises:
            ValueError: a weight holds NaN or Inf; the message names the module, and nothing was changed. Or a layer's Σ
                would, because its dtype cannot hold a singular value.
            torch.linalg.LinAlgError: a weight cannot be decomposed. Layers that came before it in this check are changed.
        """
        if self._step_was_skipped():
            if self._probes is not None:
                self._probes.forget()
            return None
        self._steps += 1
        if self._probes is not None:
            self._turn_to_gradients(self._probes)
        rate = self.optimizer.param_groups[self._group]["lr"]
        self._movement.count_step(rate)
        self._sigma_rate.count_step(rate)
        if not self.schedule.is_check(self._steps):
            self._record_before_check()
            return None
        started = time.perf_counter()
        self._require_unchanged_parameters()
        refuse_join(self.model)
        reshard_idle(self.model)
        self._require_finite()
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            stability, frozen, ranks = self._check(OptimizerSlots(self.optimizer))
        update = OIALRUpdate(
            self._steps,
            stability,
            frozen,
            ranks,
            self._count_trainable(),
            self._dense_total,
            time.perf_counter() - started,
        )
        self.history.append(update)
        log_check(logger, update, self._ranks())
        self._warn_if_little_is_pruned(update)
        self._record_before_check()
        return update

    def _step_was_skipped(self) -> bool:
        if isinstance(self.optimizer, AcceleratedOptimizer) and self.optimizer.step_was_skipped:
            return True
        return self._fused_step.was_skipped

    # ---- the first step ----------------------------------------------------------------------------------------------

    def _new_probes(self) -> GradientProbes | None:
        """Probes of the gradients that bases are still to be taken from: of an adapter that has learned nothing yet."""
        if self.config.init_basis != "gradient":
            return None
        learned = [local(parameter.detach()).count_nonzero() for parameter in self._trained.values()]
        entries = int(torch.stack(learned).sum())
        if self._processes is not None:
            entries = -int(*self._processes.smallest([-entries]))
        if entries > 0:
            return None
        probes = GradientProbes(self.layers.values(), self.adapter_name)
        weakref.finalize(self, probes.close)
        return probes

    def _turn_to_gradients(self, probes: GradientProbes) -> None:
        """Put the leading directions of the first step's gradients in the place of U and V, beside a core of zeros."""
        refuse_join(self.model)
        reshard_idle(self.model)
        slots = OptimizerSlots(self.optimizer)
        find = partial(self._turned, probes=probes)
        names = list(self.layers)
        turned = 0
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            if self._processes is None:
                outcomes = find(names)
            else:
                self._processes.add_up(probes.sketches())
                shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
                jobs = [Job(name, shape, compute_dtype(self._trained[name]).itemsize) for name, shape in shapes.items()]
                outcomes = self._exchanged_by_all(jobs, find, self._expected_turned)
            for outcome in decomposition_bar(outcomes, total=len(names), disable=self.disable_tqdm):
                self._apply(outcome, slots)
                turned += outcome.factors is not None
        refresh_reducers(self.model)
        probes.close()
        self._probes = None
        if turned < len(names):
            warnings.warn(
                f"{len(names) - turned} of {len(names)} layers had no finite gradient other than zero in the first step, so "
                "they keep bases of their weights. Was the controller made before the first forward pass?",
                stacklevel=3,
            )

    def _turned(self, names: list[str], *, probes: GradientProbes) -> Iterator[Outcome]:
        usable = probes.usable()
        for name in names:
            if name not in usable:
                yield Outcome(name)
                continue
            found = probes.leading(name)
            factors = starting_factors(factors_of(found, found.u.dtype), self.config)
            dtype = self._trained[name].dtype
            yield Outcome(name, factors=Factors(*(factor.to(dtype).contiguous() for factor in factors)), state={})

    def _expected_turned(self, name: str, stability: float, rank: int, broken: bool) -> Outcome:
        """The outcome that another process found, with unset tensors to receive it into."""
        return Outcome(name) if rank == 0 else Outcome(name, factors=self._unset_factors(name, rank), state={})

    def _record_before_check(self) -> None:
        """Record the inputs of the next step if a check follows it."""
        if self._recent is not None:
            self._recent.forget()
            self._recent.recording = self.schedule.is_check(self._steps + 1) and self._may_truncate(self._steps + 1)

    def _may_truncate(self, step: int) -> bool:
        """Whether a check at `step` could find a layer to truncate."""
        return self.schedule.may_freeze(step) or not all(map(self._is_dense, self.layers))

    @property
    def steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._steps

    # ---- a check -----------------------------------------------------------------------------------------------------

    def _check(self, slots: OptimizerSlots) -> tuple[dict[str, float], list[str], dict[str, tuple[int, int]]]:
        """Stability, newly factored layers, and ranks before and after the Σ update."""
        names = list(self.layers)
        due = [names[index] for index in self.schedule.layers_due(self._sigma_updates + 1, len(names))]
        dense = [name for name in names if self._is_dense(name)]
        factored = [name for name in due if not self._is_dense(name)]
        outcomes = {}
        found = self._found_by_all([*dense, *factored], set(due), slots)
        for outcome in decomposition_bar(found, total=len(dense) + len(factored), disable=self.disable_tqdm):
            self._apply(outcome, slots)
            outcomes[outcome.name] = outcome.without_tensors()
        refresh_reducers(self.model)
        frozen = [name for name in dense if not self._is_dense(name)]
        self._sigma_rate.restart(frozen)
        if frozen or len(dense) < len(names):
            self._sigma_updates += 1
        stability = {name: s for name in dense if (s := outcomes[name].stability) is not None}
        self._movement.count_check(stability)
        ranks = {
            name: (before, self.layers[name].rank(self.adapter_name))
            for name in due
            if name in outcomes and (before := outcomes[name].rank_before) is not None
        }
        return stability, frozen, ranks

    def _found_by_all(self, names: list[str], due: set[str], slots: OptimizerSlots) -> Iterator[Outcome]:
        """The outcome of every layer; each is computed by one process and sent to the others."""
        find = partial(self._found_here, due=due, slots=slots)
        if self._processes is None:
            return find(names)
        jobs = [Job(name, self._shape_of(name), compute_dtype(self._trained[name]).itemsize) for name in names]
        gather = partial(self._gather, slots=slots) if self._sharded else None
        return self._exchanged_by_all(jobs, find, partial(self._expected, due=due, slots=slots), gather)

    def _exchanged_by_all(
        self,
        jobs: list[Job],
        find: Callable[[list[str]], Iterator[Outcome]],
        expected: Expected,
        gather: Callable[[list[str], set[str]], None] | None = None,
    ) -> Iterator[Outcome]:
        """The outcomes of all processes, each of which finds those of its own jobs.

        Args:
            jobs: of all of them.
            find: the outcomes of some layers, computed by this process.
            expected: for outcomes of other processes.
            gather: called by every process before the jobs of a round, with their names and those of its own.
        """
        assert self._processes is not None
        for shares in self._processes.rounds(jobs):
            mine = [job.name for job, owner in shares if owner == self._processes.index]
            if gather is not None:
                gather([job.name for job, _ in shares], set(mine))
            found: dict[str, Outcome] = {}
            failure = None
            try:
                found = {outcome.name: outcome for outcome in find(mine)}
            except Exception as error:  # raised below, when the other processes know of it
                failure = error
            self._whole.clear()
            yield from exchanged(self._processes, shares, found, failure, expected)

    def _found_here(self, names: list[str], due: set[str], slots: OptimizerSlots) -> Iterator[Outcome]:
        """The outcomes of these layers, computed by this process; the host waits twice per batch of decompositions."""
        intervals_left = self._movement.intervals_left(self.schedule.total_steps - self._steps)
        for decompositions in decompose([(name, self._matrix(name)) for name in names]):
            kept, stability = self._compared(decompositions)
            rotations = {
                found.name: self._rotation(found)
                for found in decompositions
                if found.name not in kept or self._freezes(found, stability.get(found.name), intervals_left)
            }
            ranks = self._ranks_after(rotations, due)
            broken = self._require_numbers(rotations, slots)
            for name in (found.name for found in decompositions):
                if name in rotations:
                    rotation = rotations[name].cut(ranks[name])
                    yield self._changed(name, rotation, stability.get(name), name in due, name in broken, slots)
                else:
                    yield Outcome(name, stability.get(name), kept[name])

    def _compared(self, decompositions: list[Decomposition]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What is kept of the bases of dense layers, and Stability of those that have an earlier one."""
        storage = self.config.stability_storage
        kept: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for found in decompositions:
            name = found.name
            if self._is_dense(name):
                kept[name] = kept_of(found, storage, self._trained[name])
                if name in self._bases:
                    values[name] = stability_of_kept(kept[name], self._bases[name], found.shape, storage)
        if not values:
            return kept, {}
        measured = torch.stack(list(values.values())).tolist()
        return kept, {name: min(1.0, max(-1.0, value)) for name, value in zip(values, measured, strict=True)}

    def _freezes(self, found: Decomposition, measured: float | None, intervals_left: float) -> bool:
        if measured is None:
            return self.schedule.freezes(self._steps, None)
        outlook = self._movement.outlook(found.name, measured, intervals_left)
        # a sketched value may be too high by chance; two standard deviations are given away
        measured -= 2 * stability_error(measured, found.shape, self.config.stability_storage)
        return self.schedule.freezes(self._steps, measured, outlook)

    def _rotation(self, found: Decomposition) -> Rotation:
        """From the trained matrix to its diagonal: U, V of a dense weight, P, Q of a core."""
        svd = found.svd()
        if self._is_dense(found.name):
            svd = svd.cut(self.layers[found.name].full_rank[self.adapter_name])
        return Rotation(svd.u, svd.s, svd.vh.mT)

    def _require_numbers(self, rotations: dict[str, Rotation], slots: OptimizerSlots) -> set[str]:
        """The layers whose optimizer state holds NaN or Inf, which a change of basis would spread over all of it.

        Raises:
            ValueError: a layer's new Σ would hold Inf.
        """
        singular_values = {
            name: found.singular_values.to(self._trained[name].dtype) for name, found in rotations.items()
        }
        states = {name: self._state(name, slots) for name in rotations}
        moments = {
            f"{name}.{key}": value
            for name, state in states.items()
            if is_transportable(state, self._trained[name].shape)
            for key, value in state.items()
            if is_moment(value)
        }
        found = not_finite(singular_values | moments)
        for name in found:
            if name in rotations:
                require_in_range(rotations[name].singular_values, self._trained[name].dtype, name)
        return {key.rpartition(".")[0] for key in found}

    def _ranks_after(self, rotations: dict[str, Rotation], due: set[str]) -> dict[str, int]:
        """Ranks to keep; those of layers that are not due stay as they are."""
        assert self.config.max_rank_drop is not None  # set when the configuration is made
        ranks = {name: rotation.singular_values.numel() for name, rotation in rotations.items()}
        counted = {name: self._count_to_keep(name, rotation) for name, rotation in rotations.items() if name in due}
        if not counted:
            return ranks
        for name, above in zip(counted, torch.stack(list(counted.values())).tolist(), strict=True):
            layer = self.layers[name]
            if above == UNKNOWN:
                warnings.warn(
                    f"What `{name}` was given in the last step gives outputs of NaN or Inf, so `max_output_loss` cannot be "
                    "kept: the layer keeps its rank in this check. Look for the batch or the layer that they come from.",
                    stacklevel=5,
                )
                continue
            ranks[name] = bounded_rank(
                above,
                ranks[name],
                max_rank_drop=self.config.max_rank_drop,
                min_rank=rank_of(self.config.min_rank, min(layer.out_features, layer.in_features)),
            )
        return ranks

    def _count_to_keep(self, name: str, rotation: Rotation) -> Tensor:
        """How many directions of a layer to keep, by its recent inputs if there is a bound."""
        assert self.config.cutoff is not None  # set when the configuration is made
        sample = None if self._recent is None else self._recent.samples.get(name)
        measured = None
        if sample is not None and sample.numel() > 0:
            layer, factors = self.layers[name], None if self._is_dense(name) else self._factors(name)
            # the base weights of sharded layers are on other processes
            with_base = layer.residual[self.adapter_name] and not self._sharded
            measured = output_energies(layer, rotation, factors, sample, with_base=with_base)
        return count_to_keep(rotation.singular_values, self.config.cutoff, self.config.max_output_loss, measured)

    def _changed(
        self, name: str, rotation: Rotation, stability: float | None, due: bool, broken: bool, slots: OptimizerSlots
    ) -> Outcome:
        """New factors and optimizer state of a layer whose trained matrix has the SVD `rotation`, cut to the new rank."""
        old, to_axes = self._trained[name], self.config.sigma_basis == "axes"
        rank_before = self._rank_before(name) if due else None
        factors = None if self._is_dense(name) else self._factors(name)
        if to_axes and factors is not None and factors.rank == rotation.singular_values.numel():
            # nothing is dropped, and the axes are the same
            return Outcome(name, factors=factors if broken else None, rank_before=rank_before, broken=broken)
        change = rotation.to_axes(factors) if to_axes else rotation.to_diagonal()
        new = change.to_factors(old.dtype) if factors is None else changed(factors, change)
        if broken:
            return Outcome(name, stability, None, new, None, rank_before, broken=True)
        size = self._size_for(name, new.rank)
        # zero rows and columns: the state of the dropped directions of a masked layer becomes zero, its shape stays
        p, q = (
            nn.functional.pad(side, (0, size - side.shape[1], 0, rows - side.shape[0]))
            for side, rows in zip((change.p, change.q), old.shape, strict=True)
        )
        state = transport_state(self._state(name, slots), old.shape, p, q)
        return Outcome(name, stability, None, new, state, rank_before)

    def _apply(self, outcome: Outcome, slots: OptimizerSlots) -> None:
        name = outcome.name
        if outcome.kept is not None:
            self._bases[name] = outcome.kept.cpu() if self.config.stability_storage == "cpu" else outcome.kept
        if outcome.factors is None:
            return
        old = self._trained[name]
        size = self._size_for(name, outcome.factors.rank)
        self._bases.pop(name, None)
        layer, state = self.layers[name], outcome.state
        layer.set_factors(self.adapter_name, outcome.factors, size=size)
        self._shard(layer)
        if self._sharded:
            sigma = layer.trained_parameter(self.adapter_name)
            state = state and {
                key: like_shards_of(sigma, value) if is_moment(value) else value for key, value in state.items()
            }
        self._trained[name] = layer.trained_parameter(self.adapter_name)
        slots.replace(old, self._trained[name], state)
        if outcome.broken:
            warnings.warn(
                f"The state that {type(self.optimizer).__name__} keeps for `{name}` holds NaN or Inf, so it is reset with "
                "the change of basis. Training has nearly diverged: lower the learning rate, or clip gradients.",
                stacklevel=4,
            )
        elif outcome.state is None and not self._reset_warned:
            self._reset_warned = True
            warnings.warn(
                f"The state that {type(self.optimizer).__name__} keeps for `{name}` cannot follow a change of basis, so "
                "it is reset for every layer when that is factored or pruned. AdamW, Adam, SGD and Muon from "
                "torch.optim keep theirs.",
                stacklevel=4,
            )

    def _shard(self, layer: OIALRLinear) -> None:
        """With FSDP, shard the parameters that were made for this layer."""
        if self._sharded:
            shard_new_parameters(self.model, [layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh])

    def _is_dense(self, name: str) -> bool:
        return self.layers[name].is_dense(self.adapter_name)

    def _matrix(self, name: str) -> Tensor:
        """What is decomposed: W in the dense phase, Σ (r, r) in the factored one."""
        if name in self._whole:
            return self._whole[name].matrix
        return self._trained[name].detach() if self._is_dense(name) else self._factors(name).sigma

    def _factors(self, name: str) -> Factors:
        factors = self._whole[name].factors if name in self._whole else None
        return factors or self.layers[name].factors(self.adapter_name)

    def _state(self, name: str, slots: OptimizerSlots) -> dict[str, Any]:
        return self._whole[name].state if name in self._whole else slots.state_of(self._trained[name])

    def _rank_before(self, name: str) -> int:
        """The rank before a Σ update: just after a dense layer is factored, it has its full one."""
        layer = self.layers[name]
        return layer.full_rank[self.adapter_name] if self._is_dense(name) else layer.rank(self.adapter_name)

    def _size_for(self, name: str, rank: int) -> int:
        """Directions that the tensors of a layer of this rank have: with masks, as many as before."""
        if self.config.shrink == "physical":
            return rank
        return self.layers[name].full_rank[self.adapter_name] if self._is_dense(name) else self._trained[name].shape[0]

    def _shape_of(self, name: str) -> tuple[int, int]:
        layer, rank = self.layers[name], self.layers[name].rank(self.adapter_name)
        return (layer.out_features, layer.in_features) if self._is_dense(name) else (rank, rank)

    # ---- several processes -------------------------------------------------------------------------------------------

    def _gather(self, names: list[str], mine: set[str], slots: OptimizerSlots) -> None:
        """The whole tensors of sharded layers, one layer after another; each process keeps those that it decomposes."""
        for name in names:
            factors = None
            if self._is_dense(name):
                matrix = whole(self._trained[name].detach())
            else:
                factors = self.layers[name].factors(self.adapter_name)
                matrix = factors.sigma
            state = slots.state_of(self._trained[name])
            if factors or self.schedule.may_freeze(self._steps):
                state = {key: whole(value) if is_moment(value) else value for key, value in state.items()}
            if name in mine:
                self._whole[name] = _Whole(matrix, factors, state)

    def _expected(
        self, name: str, stability: float, rank: int, broken: bool, *, due: set[str], slots: OptimizerSlots
    ) -> Outcome:
        """The outcome that another process found, with unset tensors to receive it into."""
        measured = stability if name in self._bases else None
        old, layer = self._trained[name], self.layers[name]
        m, n = layer.out_features, layer.in_features
        if rank == 0 and not self._is_dense(name):
            return Outcome(name, rank_before=self._rank_before(name) if name in due else None)
        if rank == 0:
            shape = kept_shape((m, n), self.config.stability_storage)
            dtype = torch.bfloat16 if self.config.stability_storage == "bf16" else compute_dtype(old)
            return Outcome(name, measured, torch.empty(shape, dtype=dtype, device=old.device))
        factors = self._unset_factors(name, rank)
        state = empty_state(shaped_as_whole(slots.state_of(old)), old.shape, self._size_for(name, rank))
        rank_before = self._rank_before(name) if name in due else None
        return Outcome(name, measured, None, factors, None if broken else state, rank_before, broken)

    def _unset_factors(self, name: str, rank: int) -> Factors:
        layer, old = self.layers[name], self._trained[name]
        empty = partial(torch.empty, dtype=old.dtype, device=old.device)
        return Factors(empty(layer.out_features, rank), empty(rank, rank), empty(rank, layer.in_features))

    def _require_finite(self) -> None:
        """Raise on every process when one of them holds NaN or Inf."""
        name = self._first_not_finite()
        if name is not None:
            raise not_finite_error(name)

    def _first_not_finite(self) -> str | None:
        """The first layer that holds NaN or Inf on any process, on which all agree.

        Raises:
            RuntimeError: the processes are at different steps.
        """
        name = first_not_finite({name: local(parameter) for name, parameter in self._trained.items()})
        if self._processes is not None:
            names = list(self._trained)
            position = len(names) if name is None else names.index(name)
            first, lowest, highest = self._processes.smallest([position, self._steps, -self._steps])
            if lowest != -highest:
                raise RuntimeError(
                    f"The processes are at different optimizer steps, {int(lowest)} to {int(-highest)}. Call `step()` "
                    "of the controller on every process, once after each optimizer step."
                )
            name = names[int(first)] if first < len(names) else None
        return name

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the weights and the optimizer: tensors, numbers and strings only."""
        return {
            "format_version": FORMAT_VERSION,
            "steps": self._steps,
            "sigma_updates": self._sigma_updates,
            "bases": dict(self._bases),
            "movement": self._movement.state_dict(),
            **self._sigma_rate.state_dict(),
            "history": [asdict(update) for update in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; load the weights and the optimizer state first.

        Parameters that loading the weights replaced are put into the optimizer in place of the old ones.

        Raises:
            ValueError: it is of a later format, or a stored basis belongs to no dense layer of this model, has another
                shape than `stability_storage` keeps, or holds integers, NaN or Inf. The controller is then as it was.
        """
        version = state_dict.get("format_version", 1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The controller state has format {version}; this release reads up to {FORMAT_VERSION}. Upgrade oialr-peft."
            )
        self._put_current_parameters_into_optimizer()
        dense = {name for name, layer in self.layers.items() if layer.is_dense(self.adapter_name)}
        foreign = sorted(set(state_dict["bases"]) - dense)
        if foreign:
            raise ValueError(
                f"The controller state holds a basis of {', '.join(foreign)}, which is not a dense layer of this model."
                " Load the model's weights from the same checkpoint first."
            )
        for name, basis in state_dict["bases"].items():
            shape = kept_shape(self._shape_of(name), self.config.stability_storage)
            if tuple(basis.shape) != shape or basis.dtype not in DTYPES:
                raise ValueError(
                    f"The controller state holds a basis of `{name}` with shape {tuple(basis.shape)} and {basis.dtype}, but "
                    f"`stability_storage={self.config.stability_storage!r}` keeps floating-point numbers of shape {shape}. "
                    "Resume with the setting of the first run."
                )
        require_finite(state_dict["bases"])
        self._steps = int(state_dict["steps"])
        if self._probes is not None and self._steps > 0:  # made before the weights were loaded
            self._probes.close()
            self._probes = None
        self._sigma_updates = int(state_dict["sigma_updates"])
        self._sigma_rate.load_state_dict(state_dict)
        if "movement" in state_dict:  # else saved by a release that did not measure it
            self._movement.load_state_dict(state_dict["movement"])
        self._bases = {
            name: basis if self.config.stability_storage == "cpu" else basis.to(self._trained[name].device)
            for name, basis in state_dict["bases"].items()
        }
        self._record_before_check()
        self.history = [
            OIALRUpdate(**{**update, "ranks": {name: (r[0], r[1]) for name, r in update["ranks"].items()}})
            for update in state_dict["history"]
        ]

    def register(self, accelerator: Accelerator) -> None:
        """Make `accelerator.save_state` include the schedule, and phases and ranks for `match`.

        Without FSDP, `accelerator.register_for_checkpointing(controller)` is enough.
        """

        def save_ranks(models: list[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
            if accelerator.is_main_process:
                Path(output_dir, RANKS_NAME).write_text(json.dumps(self._stored_ranks()), encoding="utf-8")

        accelerator.register_for_checkpointing(self)
        accelerator.register_save_state_pre_hook(save_ranks)

    def match(self, directory: str | os.PathLike[str]) -> None:
        """Give every layer the phase and rank that it has in a directory that `accelerator.save_state` wrote.

        With FSDP, call it before `accelerator.load_state(directory)`: shards are loaded into parameters of their shape.

        Raises:
            ValueError: the directory holds no ranks, or those of other layers.
        """
        file = Path(directory, RANKS_NAME)
        if not file.is_file():
            raise ValueError(
                f"`{directory}` has no {RANKS_NAME}. Call `controller.register(accelerator)` before "
                "`accelerator.save_state`."
            )
        self._match_ranks(json.loads(file.read_text(encoding="utf-8")))

    def _stored_ranks(self) -> dict[str, list[int] | None]:
        """By name, the rank and the number of stored directions; `None` for dense layers."""
        return {
            name: None if self._is_dense(name) else [layer.rank(self.adapter_name), self._trained[name].shape[0]]
            for name, layer in self.layers.items()
        }

    def _match_ranks(self, stored: dict[str, list[int] | None]) -> None:
        """Give every layer the phase and rank that a checkpoint has; the values are loaded afterwards."""
        if stored.keys() != self.layers.keys():
            raise ValueError(
                "The saved state is of other layers than those of this model. Load it into the same model."
            )
        slots = OptimizerSlots(self.optimizer)
        for name, ranks in stored.items():
            layer, old = self.layers[name], self._trained[name]
            rank, size = ranks or (None, None)
            layer.resize(self.adapter_name, size)
            if rank is not None:
                layer.ranks[self.adapter_name] = rank
            self._shard(layer)
            self._trained[name] = layer.trained_parameter(self.adapter_name)
            if self._trained[name] is not old:
                slots.replace(old, self._trained[name], {})
        refresh_reducers(self.model)

    def _put_current_parameters_into_optimizer(self) -> None:
        slots = OptimizerSlots(self.optimizer)
        for name, layer in self.layers.items():
            current = layer.trained_parameter(self.adapter_name)
            known = self._trained[name]
            if current is not known:
                slots.replace(known, current, slots.state_of(known))
            self._trained[name] = current
        refresh_reducers(self.model)

    # ---- invariants and counts ---------------------------------------------------------------------------------------

    def _require_trained_by_optimizer(self) -> None:
        if not self.layers:
            raise ValueError(
                f"The model has no layer with the adapter `{self.adapter_name}`. Make it with "
                "get_peft_model(model, OIALRConfig()) first, or pass its `adapter_name`."
            )
        slots = OptimizerSlots(self.optimizer)
        missing = [
            name for name, parameter in self._trained.items() if parameter.requires_grad and parameter not in slots
        ]
        if missing:
            raise ValueError(
                f"The optimizer does not train {len(missing)} of {len(self.layers)} OIALR layers, such as "
                f"`{missing[0]}`. Make the optimizer after the adapter, from the model's parameters."
            )

    def _require_loaded_weights(self) -> None:
        name = self._first_not_finite()
        if name is not None:
            raise ValueError(
                f"The adapter's weight of `{name}` holds NaN or Inf. If its configuration was read from a saved "
                "adapter, load the weights too (PeftModel.from_pretrained), or set `rank_pattern` and "
                "`format_version` to None to start a new adapter."
            )

    def _require_unchanged_parameters(self) -> None:
        for name, layer in self.layers.items():
            if layer.trained_parameter(self.adapter_name) is not self._trained[name]:
                raise RuntimeError(
                    f"The parameter of `{name}` was replaced since the last check, so the optimizer trains a stale "
                    "one. After loading weights during a run, call `load_state_dict` of the controller as well."
                )

    def _count_trainable(self) -> int:
        in_layers = {id(parameter) for parameter in self._trained.values()}
        trainable = sum(
            parameter.numel()
            for parameter in self.model.parameters()
            if parameter.requires_grad and id(parameter) not in in_layers
        )
        for name, layer in self.layers.items():
            if self._trained[name].requires_grad:
                dense = layer.is_dense(self.adapter_name)
                trainable += self._trained[name].numel() if dense else layer.rank(self.adapter_name) ** 2
        return trainable

    def _count_dense_model(self) -> int:
        """Parameters of the model without adapters: targets at their full size, everything else once."""
        targets = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        inside = {id(layer.get_base_layer().weight) for layer in self.layers.values()}
        for layer in self.layers.values():
            for container in (layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh):
                inside.update(id(parameter) for parameter in container.values())
        return targets + sum(p.numel() for p in self.model.parameters() if id(p) not in inside)

    def _ranks(self) -> dict[str, int | None]:
        """By name; `None` for dense layers."""
        return {
            name: None if self._is_dense(name) else layer.rank(self.adapter_name) for name, layer in self.layers.items()
        }

    def _warn_if_little_is_pruned(self, update: OIALRUpdate) -> None:
        """Warn after the first Σ update of all layers when the bound keeps so much that training gets no smaller."""
        bounded = self.config.max_output_loss is not None and not self.config.residual
        earlier = any(len(past.ranks) == len(self.layers) for past in self.history[:-1])
        if not bounded or earlier or len(update.ranks) < len(self.layers):
            return
        full = sum(layer.full_rank[self.adapter_name] for layer in self.layers.values())
        kept = sum(after for _, after in update.ranks.values()) / full
        if kept > LITTLE_PRUNED:
            warnings.warn(
                f"All layers are factored, and `max_output_loss={self.config.max_output_loss:g}` keeps {kept:.0%} of their "
                "directions, so training gets neither faster nor smaller. Pretrained language models are like this: use "
                "`residual=True` with an `init_rank` for them. Otherwise raise `max_output_loss`.",
                stacklevel=3,
            )

    def metrics(self) -> dict[str, float]:
        """The figures of the last check under the names that trackers show.

        Raises:
            ValueError: there was no check yet.
        """
        if not self.history:
            raise ValueError(
                "There was no check yet, so there are no metrics. Call `step()` until it returns an update."
            )
        update = self.history[-1]
        layers = self.layers.values()
        metrics = {
            "oialr/trainable_percent": update.trainable_percent,
            "oialr/rank_mean": sum(layer.rank(self.adapter_name) for layer in layers) / len(self.layers),
            "oialr/frozen_layers": float(sum(not layer.is_dense(self.adapter_name) for layer in layers)),
            "oialr/update_seconds": update.seconds,
        }
        if update.stability:
            metrics["oialr/stability_mean"] = sum(update.stability.values()) / len(update.stability)
        return metrics


class _FusedStep:
    """Whether the last step of a fused optimizer was skipped: a gradient scaler leaves that to it, and tells nobody else.

    While a scaler is in use, this waits for the device once a step, as scalers do for optimizers that are not fused.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.was_skipped = False
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        self.was_skipped = found_inf is not None and bool(found_inf)


def _forget_products_of(layers: list[OIALRLinear]) -> Callable[..., None]:
    """A hook for the optimizer, which may outlive controller and model: it must not hold on to them."""
    references = [weakref.ref(layer) for layer in layers]

    def after_optimizer_step(*_: Any) -> None:
        for reference in references:
            layer = reference()
            if layer is not None:
                layer.forget_products()

    return after_optimizer_step


def config_of(model: nn.Module, adapter_name: str) -> OIALRConfig:
    """The configuration of an adapter of the model."""
    for module in model.modules():
        config = module.__dict__.get("peft_config", {}).get(adapter_name)
        if isinstance(config, OIALRConfig):
            return config
    raise ValueError(
        f"The model has no OIALR adapter called `{adapter_name}`. Make it with get_peft_model(model, OIALRConfig()) "
        "first, or pass its `adapter_name`."
    )


def _schedule_of(config: OIALRConfig, total_steps: int) -> Schedule:
    if not is_count(total_steps):
        raise ValueError(
            f"`total_steps` must be an int ≥ 1, the optimizer steps of the whole run, but is {total_steps!r}. With "
            "gradient accumulation, count the updates, not the batches."
        )
    assert config.delay is not None
    for name, value in (("delay", config.delay), ("update_every", config.update_every)):
        if value > total_steps:
            raise ValueError(
                f"`{name}` is {value} optimizer steps, but the whole run has {total_steps}. Train longer, or lower it; "
                "a float in (0, 1) is a fraction of the run."
            )
    return Schedule(
        total_steps=total_steps,
        delay=steps_of(config.delay, total_steps),
        update_every=steps_of(config.update_every, total_steps),
        layers_per_update=config.layers_per_update,
        threshold=config.stability_threshold if config.freeze_when == "stable" else None,
        settle_ratio=config.settle_ratio if config.freeze_when == "settled" else None,
    )


def _settings_of(config: OIALRConfig, total_steps: int, layers: dict[str, OIALRLinear]) -> list[Any]:
    """What must be equal in all processes; nothing that depends on the device, of which each has its own."""
    shapes = {name: [layer.out_features, layer.in_features, layer.extra_repr()] for name, layer in layers.items()}
    return [config.to_dict(), total_steps, shapes]
