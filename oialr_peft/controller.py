"""`OIALRController`: the engine that measures Stability, factors layers, and prunes them, between optimizer steps.

`schedule.py` says when, `factors.py` and `moments.py` say how, `layer.py` holds the tensors; here is the order of
events. A check at step t (t a multiple of ν):

1. every dense layer: Stability against the basis stored at the previous check, then store the new basis; factor the
   layers that qualify.
2. Σ update, when some layer is factored: the layers that are due are rediagonalized, then truncated. Optimizer state
   follows every change of basis and rank.
"""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from oialr_peft.basis import kept_of, stability_error, stability_of_kept
from oialr_peft.config import OIALRConfig
from oialr_peft.decompositions import Decomposition, decompose
from oialr_peft.factors import (
    Factors,
    Rotation,
    bounded_rank,
    count_above,
    factors_of,
    require_finite,
    rotate,
)
from oialr_peft.layer import OIALRLinear
from oialr_peft.model import adapter_layers
from oialr_peft.moments import OptimizerSlots
from oialr_peft.schedule import Schedule, rank_of, steps_of

logger = logging.getLogger(__name__)


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


class OIALRController:
    """Runs the method on a model with an OIALR adapter: `step()` once after each optimizer step.

    Trainer and callback only call it; in a loop of your own::

        controller = OIALRController(model, optimizer, total_steps=1000)
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()

    The optimizer object is never replaced: parameters and their state are swapped inside it. It is an object that
    `accelerator.register_for_checkpointing` accepts.

    Args:
        model: the model, as `get_peft_model` or `model.add_adapter` made it; wrappers are fine.
        optimizer: trains the adapter; made after the adapter.
        total_steps: optimizer steps of the whole run, ≥ 1; fractions in the configuration refer to it.
        adapter_name: which adapter.

    Attributes:
        history: the `OIALRUpdate` of every check so far.

    Raises:
        ValueError: the model has no such adapter, the optimizer does not train it, or the configured steps do not fit
            into `total_steps`.
        RuntimeError: training runs on several processes, which this release does not support.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, total_steps: int, adapter_name: str = "default"
    ) -> None:
        _require_one_process()
        self.model = model
        self.optimizer = optimizer
        self.adapter_name = adapter_name
        self.config = _config_of(model, adapter_name)
        self.layers = adapter_layers(model, adapter_name)
        self.schedule = _schedule_of(self.config, total_steps)
        self.history: list[OIALRUpdate] = []
        self._steps = 0
        self._sigma_updates = 0
        self._bases: dict[str, Tensor] = {}
        self._reset_warned = False
        self._trained = {name: layer.trained_parameter(adapter_name) for name, layer in self.layers.items()}
        self._require_trained_by_optimizer()
        self._require_finite()
        self._dense_total = self._count_dense_model()
        for layer in self.layers.values():
            layer.controlled[adapter_name] = True
        torch_optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        torch_optimizer.register_step_post_hook(_forget_products_of(list(self.layers.values())))

    def step(self) -> OIALRUpdate | None:
        """Count one optimizer step; call it after the step, with gradients cleared.

        A step that Accelerate's gradient scaler skipped does not count.

        Returns:
            The update, when this step was a check, else None.

        Raises:
            ValueError: a weight holds NaN or Inf; the message names the module.
        """
        if isinstance(self.optimizer, AcceleratedOptimizer) and self.optimizer.step_was_skipped:
            return None
        self._steps += 1
        if not self.schedule.is_check(self._steps):
            return None
        started = time.perf_counter()
        self._require_unchanged_parameters()
        require_finite(self._trained)
        with torch.no_grad(), torch.autocast(next(iter(self._trained.values())).device.type, enabled=False):
            slots = OptimizerSlots(self.optimizer)
            stability, frozen = self._freeze_stable_layers(slots)
            ranks = self._update_sigma(slots, frozen)
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
        self._report(update)
        return update

    @property
    def steps(self) -> int:
        """Optimizer steps counted so far."""
        return self._steps

    # ---- the two parts of a check ------------------------------------------------------------------------------------

    def _freeze_stable_layers(self, slots: OptimizerSlots) -> tuple[dict[str, float], list[str]]:
        measured: dict[str, float] = {}
        frozen: set[str] = set()
        weights = {
            name: layer.oialr_weight[self.adapter_name].detach()
            for name, layer in self.layers.items()
            if layer.is_dense(self.adapter_name)
        }
        for decompositions in decompose(list(weights.items())):
            measured |= self._compare_and_keep_bases(decompositions)
            for decomposition in decompositions:
                name = decomposition.name
                if self._freezes(measured.get(name), decomposition.shape):
                    self._freeze(decomposition, slots)
                    frozen.add(name)
        in_order = [name for name in self.layers if name in weights]
        return (
            {name: measured[name] for name in in_order if name in measured},
            [name for name in in_order if name in frozen],
        )

    def _compare_and_keep_bases(self, decompositions: list[Decomposition]) -> dict[str, float]:
        """Stability of those that have an earlier basis; the host waits once for all of them."""
        storage = self.config.stability_storage
        values: dict[str, Tensor] = {}
        for decomposition in decompositions:
            name = decomposition.name
            kept = kept_of(decomposition, storage, self._trained[name])
            if name in self._bases:
                values[name] = stability_of_kept(kept, self._bases[name], decomposition.shape, storage)
            self._bases[name] = kept
        if not values:
            return {}
        measured = torch.stack(list(values.values())).tolist()
        return {name: min(1.0, max(-1.0, value)) for name, value in zip(values, measured, strict=True)}

    def _freezes(self, measured: float | None, shape: Size) -> bool:
        if measured is not None:
            # a sketched value may be too high by chance; two standard deviations are given away
            measured -= 2 * stability_error(measured, shape, self.config.stability_storage)
        return self.schedule.freezes(self._steps, measured)

    def _freeze(self, decomposition: Decomposition, slots: OptimizerSlots) -> None:
        name = decomposition.name
        layer = self.layers[name]
        weight = layer.oialr_weight[self.adapter_name]
        kept = decomposition.svd().cut(layer.full_rank[self.adapter_name])
        sigma = layer.set_factors(self.adapter_name, factors_of(kept, kept.s.dtype))
        self._carry_state(slots, name, weight, sigma, kept.u, kept.vh.mT)
        self._bases.pop(name, None)

    def _update_sigma(self, slots: OptimizerSlots, frozen: list[str]) -> dict[str, tuple[int, int]]:
        layers = list(self.layers.items())
        if all(layer.is_dense(self.adapter_name) for _, layer in layers):
            return {}
        self._sigma_updates += 1
        due = [layers[index] for index in self.schedule.layers_due(self._sigma_updates, len(layers))]
        cores = {
            name: layer.factors(self.adapter_name).sigma for name, layer in due if not layer.is_dense(self.adapter_name)
        }
        fresh = [name for name in frozen if name in cores]
        # just factored: diagonal and descending already
        rotations = [(name, Rotation.identity(cores.pop(name).diagonal())) for name in fresh]
        ranks = self._rotate_and_cut(rotations, slots)
        for decompositions in decompose(list(cores.items())):
            found = [(decomposition.name, decomposition.svd()) for decomposition in decompositions]
            ranks |= self._rotate_and_cut([(name, Rotation(svd.u, svd.s, svd.vh.mT)) for name, svd in found], slots)
        return {name: ranks[name] for name, _ in due if name in ranks}

    def _rotate_and_cut(
        self, rotations: list[tuple[str, Rotation]], slots: OptimizerSlots
    ) -> dict[str, tuple[int, int]]:
        """Ranks before and after; the host waits once for all of them."""
        if not rotations:
            return {}
        counts = torch.stack([count_above(rotation.singular_values, self.config.cutoff) for _, rotation in rotations])
        ranks: dict[str, tuple[int, int]] = {}
        for (name, rotation), above in zip(rotations, counts.tolist(), strict=True):
            layer = self.layers[name]
            factors = layer.factors(self.adapter_name)
            kept = bounded_rank(
                above,
                factors.rank,
                max_rank_drop=self.config.max_rank_drop,
                min_rank=rank_of(self.config.min_rank, min(layer.out_features, layer.in_features)),
            )
            cut = rotation.cut(kept)
            self._store_rotated(name, layer, slots, rotate(factors, cut), cut)
            ranks[name] = factors.rank, kept
        return ranks

    def _store_rotated(
        self, name: str, layer: OIALRLinear, slots: OptimizerSlots, factors: Factors, rotation: Rotation
    ) -> None:
        old = layer.oialr_sigma[self.adapter_name]
        size = old.shape[0]
        masked = self.config.shrink == "mask"
        new = layer.set_factors(self.adapter_name, factors, size=size if masked else None)
        p, q = rotation.p, rotation.q
        if masked:
            # zero rows and columns: the state of the dropped directions becomes zero, its shape stays
            p, q = (nn.functional.pad(m, (0, size - m.shape[1], 0, size - m.shape[0])) for m in (p, q))
        self._carry_state(slots, name, old, new, p, q)

    def _carry_state(
        self, slots: OptimizerSlots, name: str, old: nn.Parameter, new: nn.Parameter, p: Tensor, q: Tensor
    ) -> None:
        self._trained[name] = new
        if not slots.transport(old, new, p, q) and not self._reset_warned:
            self._reset_warned = True
            warnings.warn(
                f"The state that {type(self.optimizer).__name__} keeps for `{name}` cannot follow a change of basis, so "
                "it is reset for every layer when that is factored or pruned. AdamW, Adam, SGD and Muon from "
                "torch.optim keep theirs.",
                stacklevel=5,
            )

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the weights and the optimizer: tensors, numbers and strings only."""
        return {
            "steps": self._steps,
            "sigma_updates": self._sigma_updates,
            "bases": dict(self._bases),
            "history": [asdict(update) for update in self.history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`; load the weights and the optimizer state first.

        Parameters that loading the weights replaced are put into the optimizer in place of the old ones.

        Raises:
            ValueError: a stored basis belongs to no dense layer of this model.
        """
        self._put_current_parameters_into_optimizer()
        dense = {name for name, layer in self.layers.items() if layer.is_dense(self.adapter_name)}
        foreign = sorted(set(state_dict["bases"]) - dense)
        if foreign:
            raise ValueError(
                f"The controller state holds a basis of {', '.join(foreign)}, which is not a dense layer of this model."
                " Load the model's weights from the same checkpoint first."
            )
        self._steps = int(state_dict["steps"])
        self._sigma_updates = int(state_dict["sigma_updates"])
        self._bases = {
            name: basis if self.config.stability_storage == "cpu" else basis.to(self._trained[name].device)
            for name, basis in state_dict["bases"].items()
        }
        self.history = [
            OIALRUpdate(**{**update, "ranks": {name: (r[0], r[1]) for name, r in update["ranks"].items()}})
            for update in state_dict["history"]
        ]

    def _put_current_parameters_into_optimizer(self) -> None:
        slots = OptimizerSlots(self.optimizer)
        for name, layer in self.layers.items():
            current = layer.trained_parameter(self.adapter_name)
            known = self._trained[name]
            if current is not known and known in slots:
                slots.replace(known, current, self.optimizer.state.get(known))
            self._trained[name] = current

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

    def _require_finite(self) -> None:
        for name, parameter in self._trained.items():
            if not bool(torch.isfinite(parameter).all()):
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

    def _report(self, update: OIALRUpdate) -> None:
        ranks = [layer.rank(self.adapter_name) for layer in self.layers.values()]
        logger.info(
            "step %d: %d layers frozen (%d of %d), mean rank %.1f, %.1f %% trainable, %.2f s",
            update.step,
            len(update.frozen),
            sum(not layer.is_dense(self.adapter_name) for layer in self.layers.values()),
            len(ranks),
            sum(ranks) / len(ranks),
            update.trainable_percent,
            update.seconds,
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


def _forget_products_of(layers: list[OIALRLinear]) -> Callable[..., None]:
    """A hook for the optimizer, which may outlive controller and model: it must not hold on to them."""
    references = [weakref.ref(layer) for layer in layers]

    def after_optimizer_step(*_: Any) -> None:
        for reference in references:
            layer = reference()
            if layer is not None:
                layer.forget_products()

    return after_optimizer_step


def _config_of(model: nn.Module, adapter_name: str) -> OIALRConfig:
    for module in model.modules():
        config = module.__dict__.get("peft_config", {}).get(adapter_name)
        if isinstance(config, OIALRConfig):
            return config
    raise ValueError(
        f"The model has no OIALR adapter called `{adapter_name}`. Make it with get_peft_model(model, OIALRConfig()) "
        "first, or pass its `adapter_name`."
    )


def _schedule_of(config: OIALRConfig, total_steps: int) -> Schedule:
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
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
        threshold=None if config.freeze_when == "delay" else config.stability_threshold,
    )


def _require_one_process() -> None:
    distributed: Callable[[], bool] = torch.distributed.is_initialized
    if torch.distributed.is_available() and distributed() and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "Training an OIALR adapter on several processes is not supported in this release: ranks would change on "
            "each process by itself. Run on one process."
        )
