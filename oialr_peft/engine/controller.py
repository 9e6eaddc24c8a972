"""`OIALRController`: the engine that measures Stability, factors layers, and prunes them, between optimizer steps.

`schedule.py` says when, `check.py` finds what a check does to each layer, `trained_layers.py` changes them; here is the order
of events. A check at step t (t a multiple of ν):

1. every dense layer: Stability against the basis stored at the previous check, then store the new basis; factor the
   layers that qualify.
2. Σ update, when some layer is factored: the layers that are due are decomposed, then truncated. Optimizer state
   follows every change of basis and rank.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr_peft.engine.check import Check
from oialr_peft.engine.inputs import RecentInputs
from oialr_peft.engine.learning_rate import SigmaLearningRate
from oialr_peft.engine.log import log_check
from oialr_peft.engine.outcome import Finder, Outcome, found_by_all
from oialr_peft.engine.schedule import Schedule
from oialr_peft.engine.state import RunState
from oialr_peft.engine.trained_layers import TrainedLayers
from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.engine.warn import warn
from oialr_peft.files.values import is_count
from oialr_peft.linalg.basis import kept_shape
from oialr_peft.linalg.factors import DTYPES, first_not_finite, not_finite_error, require_finite
from oialr_peft.linalg.moments import OptimizerSlots
from oialr_peft.parallel.distributed import Processes, refresh_reducers, refuse_join, require_supported_engine
from oialr_peft.parallel.progress import decomposition_bar
from oialr_peft.parallel.sharding import local, reshard_idle
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.quantities import steps_of
from oialr_peft.tuner.settings import Settings

logger = logging.getLogger("oialr_peft.controller")  # a name for users, who set its level; files may move

RANKS_NAME = "oialr_ranks.json"
# share of directions kept from which a warning says so; no route is faster there than the dense layer
LITTLE_PRUNED = 0.9


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
        settings: every setting of the adapter, decided.
        history: the `OIALRUpdate` of every check so far.

    Raises:
        ValueError: the model has no such adapter, the optimizer does not train it, or the configured steps do not fit
            into `total_steps`; or the engine that trains the model cannot follow changes of rank, see `docs/distributed.md`.

    Examples:
        In a loop of your own:

        >>> import torch
        >>> from oialr_peft import OIALRConfig
        >>> from peft import get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
        >>> rules = {"freeze_when": "delay", "delay": 10, "update_every": 5}
        >>> model = get_peft_model(model, OIALRConfig(target_modules=["0"], mode="replace", **rules))
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
        self._trained = TrainedLayers(model, optimizer, adapter_name)
        self.settings = self._trained.settings
        self.layers = self._trained.layers
        self.schedule = _schedule_of(self.settings, total_steps)
        self._state = RunState()
        self._reset_warned = False
        self._recent = RecentInputs(() if self.settings.max_output_loss is None else self.layers.values())
        weakref.finalize(self, self._recent.close)
        self._processes = Processes.of(model, self._trained.device)
        if self._processes is not None:
            self._processes.require_same("The configuration", _shared_facts(self.settings, total_steps, self.layers))
        refresh_reducers(model)
        self._require_loaded_weights()
        self._dense_total = self._trained.count_dense_model()
        for layer in self.layers.values():
            layer.controlled[adapter_name] = True
        torch_optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        torch_optimizer.register_step_post_hook(_forget_products_of(list(self.layers.values())))
        self._fused_step = _FusedStep(torch_optimizer)
        SigmaLearningRate(torch_optimizer, self.layers.values(), adapter_name, self.settings.sigma_lr_scale)
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
            self._recent.forget()
            return None
        self._state.steps += 1
        if not self.schedule.is_check(self._state.steps):
            self._record_before_check()
            return None
        started = time.perf_counter()
        self._trained.require_unchanged()
        refuse_join(self.model)
        reshard_idle(self.model)
        self._require_finite()
        with torch.no_grad(), torch.autocast(self._trained.device.type, enabled=False):
            stability, frozen, ranks = self._check(OptimizerSlots(self.optimizer))
        update = OIALRUpdate(
            self._state.steps,
            stability,
            frozen,
            ranks,
            self._trained.count_trainable(),
            self._dense_total,
            time.perf_counter() - started,
        )
        self.history.append(update)
        log_check(logger, update, self._trained.ranks())
        self._warn_if_little_is_pruned(update)
        self._record_before_check()
        return update

    def _step_was_skipped(self) -> bool:
        if isinstance(self.optimizer, AcceleratedOptimizer) and self.optimizer.step_was_skipped:
            return True
        return self._fused_step.was_skipped

    @property
    def steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._state.steps

    @property
    def history(self) -> list[OIALRUpdate]:
        """The `OIALRUpdate` of every check so far."""
        return self._state.history

    # ---- what changes layers -----------------------------------------------------------------------------------------

    def _check(self, slots: OptimizerSlots) -> tuple[dict[str, float], list[str], dict[str, tuple[int, int]]]:
        """Stability, newly factored layers, and ranks before and after the Σ update."""
        names = list(self.layers)
        due = [names[index] for index in self.schedule.layers_due(self._state.sigma_updates + 1, len(names))]
        dense = [name for name in names if self._trained.is_dense(name)]
        factored = [name for name in due if not self._trained.is_dense(name)]
        check = Check(
            self._trained,
            slots,
            schedule=self.schedule,
            step=self._state.steps,
            due=due,
            bases=self._state.bases,
            processes=self._processes,
            recent=self._recent,
        )
        outcomes = {}
        for outcome in self._applied(check, [*dense, *factored], slots):
            outcomes[outcome.name] = outcome.without_tensors()
        refresh_reducers(self.model)
        frozen = [name for name in dense if not self._trained.is_dense(name)]
        if frozen or len(dense) < len(names):
            self._state.sigma_updates += 1
        stability = {name: s for name in dense if (s := outcomes[name].stability) is not None}
        ranks = {
            name: (before, self.layers[name].rank(self.adapter_name))
            for name in due
            if name in outcomes and (before := outcomes[name].rank_before) is not None
        }
        return stability, frozen, ranks

    def _applied(self, finder: Finder, names: list[str], slots: OptimizerSlots) -> Iterator[Outcome]:
        """The outcomes of these layers, each put into its layer before it is returned."""
        found = finder.found(names) if self._processes is None else found_by_all(self._processes, names, finder)
        for outcome in decomposition_bar(found, total=len(names), disable=self.disable_tqdm):
            self._apply(outcome, slots)
            yield outcome

    def _apply(self, outcome: Outcome, slots: OptimizerSlots) -> None:
        name = outcome.name
        if outcome.kept is not None:
            self._state.bases[name] = outcome.kept.cpu() if self.settings.stability_storage == "cpu" else outcome.kept
        if outcome.factors is None:
            return
        self._state.bases.pop(name, None)
        self._trained.put(name, outcome.factors, outcome.state, slots)
        if outcome.broken:
            warn(
                f"The state that {type(self.optimizer).__name__} keeps for `{name}` holds NaN or Inf, so it is reset with "
                "the change of basis. Training has nearly diverged: lower the learning rate, or clip gradients.",
            )
        elif outcome.state is None and not self._reset_warned:
            self._reset_warned = True
            warn(
                f"The state that {type(self.optimizer).__name__} keeps for `{name}` cannot follow a change of basis, so "
                "it is reset for every layer when that is factored or pruned. AdamW, Adam, SGD and Muon from "
                "torch.optim keep theirs.",
            )

    # ---- before and after a check ------------------------------------------------------------------------------------

    def _record_before_check(self) -> None:
        """Record the next step if a check follows soon; begin anew after one."""
        if self.schedule.is_check(self._state.steps):
            self._recent.forget()
        check = self.schedule.next_check(self._state.steps)
        self._recent.recording = check == self._state.steps + 1 and self._may_truncate(check)

    def _may_truncate(self, step: int) -> bool:
        """Whether a check at `step` could find a layer to truncate."""
        return self.schedule.may_freeze(step) or not all(map(self._trained.is_dense, self.layers))

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
        name = first_not_finite({name: local(parameter) for name, parameter in self._trained.parameters.items()})
        if self._processes is not None:
            names = list(self.layers)
            position = len(names) if name is None else names.index(name)
            first, lowest, highest = self._processes.smallest([position, self._state.steps, -self._state.steps])
            if lowest != -highest:
                raise RuntimeError(
                    f"The processes are at different optimizer steps, {int(lowest)} to {int(-highest)}. Call `step()` "
                    "of the controller on every process, once after each optimizer step."
                )
            name = names[int(first)] if first < len(names) else None
        return name

    def _require_loaded_weights(self) -> None:
        name = self._first_not_finite()
        if name is not None:
            raise ValueError(
                f"The adapter's weight of `{name}` holds NaN or Inf. If its configuration was read from a saved "
                "adapter, load the weights too (PeftModel.from_pretrained), or set `rank_pattern` and "
                "`format_version` to None to start a new adapter."
            )

    def _warn_if_little_is_pruned(self, update: OIALRUpdate) -> None:
        """Warn after the first Σ update of all layers when the bound keeps so much that training gets no smaller."""
        bounded = self.settings.max_output_loss is not None and not self.settings.is_correction
        earlier = any(len(past.ranks) == len(self.layers) for past in self.history[:-1])
        if not bounded or earlier or len(update.ranks) < len(self.layers):
            return
        full = sum(layer.full_rank[self.adapter_name] for layer in self.layers.values())
        kept = sum(after for _, after in update.ranks.values()) / full
        if kept > LITTLE_PRUNED:
            warn(
                f"All layers are factored, and `max_output_loss={self.settings.max_output_loss:g}` keeps {kept:.0%} of their "
                "directions, so training gets neither faster nor smaller. Pretrained language models are like this: use "
                '`mode="adapter"` for them. Otherwise raise `max_output_loss`.',
            )

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the weights and the optimizer: tensors, numbers and strings only."""
        return self._state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; load the weights and the optimizer state first.

        Parameters that loading the weights replaced are put into the optimizer in place of the old ones.

        Raises:
            ValueError: it is of a later format, or a stored basis belongs to no dense layer of this model, has another
                shape than `stability_storage` keeps, or holds integers, NaN or Inf. The controller is then as it was.
        """
        state = RunState.from_dict(state_dict)
        self._trained.take_over_loaded()
        self._require_fitting(state.bases)
        if self.settings.stability_storage != "cpu":
            state.bases = {name: basis.to(self._trained.device) for name, basis in state.bases.items()}
        self._state = state
        self._recent.forget()
        self._record_before_check()

    def _require_fitting(self, bases: Mapping[str, Tensor]) -> None:
        dense = {name for name, layer in self.layers.items() if layer.is_dense(self.adapter_name)}
        foreign = sorted(set(bases) - dense)
        if foreign:
            raise ValueError(
                f"The controller state holds a basis of {', '.join(foreign)}, which is not a dense layer of this model."
                " Load the model's weights from the same checkpoint first."
            )
        for name, basis in bases.items():
            shape = kept_shape(self._trained.shape(name), self.settings.stability_storage)
            if tuple(basis.shape) != shape or basis.dtype not in DTYPES:
                raise ValueError(
                    f"The controller state holds a basis of `{name}` with shape {tuple(basis.shape)} and {basis.dtype}, but "
                    f"`stability_storage={self.settings.stability_storage!r}` keeps floating-point numbers of shape {shape}. "
                    "Resume with the setting of the first run."
                )
        require_finite(bases)

    def register(self, accelerator: Accelerator) -> None:
        """Make `accelerator.save_state` include the schedule, and phases and ranks for `match`.

        Without FSDP, `accelerator.register_for_checkpointing(controller)` is enough.
        """

        def save_ranks(models: list[nn.Module], weights: list[dict[str, Tensor]], output_dir: str) -> None:
            if accelerator.is_main_process:
                Path(output_dir, RANKS_NAME).write_text(json.dumps(self._trained.stored_ranks()), encoding="utf-8")

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
        self._trained.match(json.loads(file.read_text(encoding="utf-8")))

    # ---- what is reported --------------------------------------------------------------------------------------------

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


def _schedule_of(settings: Settings, total_steps: int) -> Schedule:
    if not is_count(total_steps):
        raise ValueError(
            f"`total_steps` must be an int ≥ 1, the optimizer steps of the whole run, but is {total_steps!r}. With "
            "gradient accumulation, count the updates, not the batches."
        )
    for name, value in (("delay", settings.delay), ("update_every", settings.update_every)):
        if value > total_steps:
            raise ValueError(
                f"`{name}` is {value} optimizer steps, but the whole run has {total_steps}. Train longer, or lower it; "
                "a float in (0, 1) is a fraction of the run."
            )
    return Schedule(
        total_steps=total_steps,
        delay=steps_of(settings.delay, total_steps),
        update_every=steps_of(settings.update_every, total_steps),
        layers_per_update=settings.layers_per_update,
        threshold=settings.stability_threshold if settings.freeze_when == "stable" else None,
    )


def _shared_facts(settings: Settings, total_steps: int, layers: dict[str, OIALRLinear]) -> list[Any]:
    """What must be equal in all processes; nothing that depends on the device, of which each has its own."""
    shapes = {name: [layer.out_features, layer.in_features, layer.extra_repr()] for name, layer in layers.items()}
    return [asdict(settings), total_steps, shapes]
