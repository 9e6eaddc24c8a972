"""`TrainedLayers`: the layers of one adapter beside the optimizer that trains them.

Each layer trains one matrix: W (m, n) while it is dense, Σ (r, r) once it is factored. Here the matrices are read, replaced by
those of another basis or rank, and counted; what takes their place is found in `check.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr_peft.linalg.factors import Factors
from oialr_peft.linalg.moments import OptimizerSlots, is_moment
from oialr_peft.parallel.distributed import refresh_reducers
from oialr_peft.parallel.sharding import is_sharded, like_shards_of, shard_new_parameters, whole
from oialr_peft.tuner.lookup import adapter_layers, config_of


class _Whole(NamedTuple):
    """The whole tensors of a sharded layer, on the process that decomposes it."""

    matrix: Tensor
    factors: Factors | None
    state: dict[str, Any]


class TrainedLayers:
    """The layers of an adapter, the parameters that they train, and what the optimizer keeps for those.

    Layers are called by name. The optimizer is changed in place, by the `slots` that a caller made of it; with FSDP2, whole
    tensors are there between `gather` and `release`, on the process that asked for them.

    Args:
        model: with the adapter; wrappers are fine.
        optimizer: trains the adapter.
        adapter_name: which adapter.

    Attributes:
        settings: of the adapter.
        layers: by name, in module order.
        parameters: the parameter that each layer trains, as the optimizer knows it.
        device: of all of them.
        sharded: whether FSDP2 shards the model.

    Raises:
        ValueError: the model has no such adapter, or the optimizer does not train it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, adapter_name: str) -> None:
        self.model = model
        self.optimizer = optimizer
        self.adapter_name = adapter_name
        self.settings = config_of(model, adapter_name).resolved()
        self.layers = adapter_layers(model, adapter_name)
        self.parameters = {name: layer.trained_parameter(adapter_name) for name, layer in self.layers.items()}
        self._require_trained_by_optimizer()
        self.device = next(iter(self.parameters.values())).device
        self.sharded = is_sharded(model)
        self._whole: dict[str, _Whole] = {}

    # ---- reading -----------------------------------------------------------------------------------------------------

    def is_dense(self, name: str) -> bool:
        """Whether the layer still trains its whole weight."""
        return self.layers[name].is_dense(self.adapter_name)

    def matrix(self, name: str) -> Tensor:
        """What is decomposed: W (m, n) of a dense layer, Σ (r, r) of a factored one."""
        if name in self._whole:
            return self._whole[name].matrix
        return self.parameters[name].detach() if self.is_dense(name) else self.factors(name).sigma

    def factors(self, name: str) -> Factors:
        """U, Σ, V of a factored layer, at its rank."""
        factors = self._whole[name].factors if name in self._whole else None
        return factors or self.layers[name].factors(self.adapter_name)

    def state(self, name: str, slots: OptimizerSlots) -> dict[str, Any]:
        """What the optimizer keeps for the layer."""
        return self._whole[name].state if name in self._whole else slots.state_of(self.parameters[name])

    def shape(self, name: str) -> tuple[int, int]:
        """Of `matrix(name)`, without gathering it."""
        layer, rank = self.layers[name], self.layers[name].rank(self.adapter_name)
        return (layer.out_features, layer.in_features) if self.is_dense(name) else (rank, rank)

    def full_rank(self, name: str) -> int:
        """The largest rank that the layer may have."""
        return self.layers[name].full_rank[self.adapter_name]

    def rank_before_update(self, name: str) -> int:
        """The rank that a Σ update begins with: just after a dense layer is factored, that is its full one."""
        return self.full_rank(name) if self.is_dense(name) else self.layers[name].rank(self.adapter_name)

    def ranks(self) -> dict[str, int | None]:
        """By name; `None` for dense layers."""
        return {
            name: None if self.is_dense(name) else layer.rank(self.adapter_name) for name, layer in self.layers.items()
        }

    def size_for(self, name: str, rank: int) -> int:
        """Directions that the tensors of a layer of this rank have: with masks, as many as before."""
        if self.settings.shrink == "physical":
            return rank
        return self.full_rank(name) if self.is_dense(name) else self.parameters[name].shape[0]

    def unset_factors(self, name: str, rank: int) -> Factors:
        """Factors of this rank, to receive those that another process found."""
        layer, parameter = self.layers[name], self.parameters[name]
        empty = partial(torch.empty, dtype=parameter.dtype, device=parameter.device)
        return Factors(empty(layer.out_features, rank), empty(rank, rank), empty(rank, layer.in_features))

    # ---- several processes -------------------------------------------------------------------------------------------

    def gather(self, names: list[str], mine: set[str], slots: OptimizerSlots, *, freezing: bool) -> None:
        """Get the whole tensors of sharded layers, one layer after another; this process keeps those that are its own.

        Args:
            names: the same on every process, all of which call this.
            mine: those that this process decomposes.
            slots: of the optimizer.
            freezing: whether a dense layer may be factored, which takes its optimizer state as well.
        """
        for name in names:
            factors = None
            if self.is_dense(name):
                matrix = whole(self.parameters[name].detach())
            else:
                factors = self.layers[name].factors(self.adapter_name)
                matrix = factors.sigma
            state = slots.state_of(self.parameters[name])
            if factors or freezing:
                state = {key: whole(value) if is_moment(value) else value for key, value in state.items()}
            if name in mine:
                self._whole[name] = _Whole(matrix, factors, state)

    def release(self) -> None:
        """Free the whole tensors."""
        self._whole.clear()

    # ---- replacing ---------------------------------------------------------------------------------------------------

    def put(self, name: str, factors: Factors, state: dict[str, Any] | None, slots: OptimizerSlots) -> None:
        """Let the layer train the core of these factors, with this optimizer state; `None` resets that."""
        size = self.size_for(name, factors.rank)
        self.layers[name].set_factors(self.adapter_name, factors, size=size)
        self._shard_new_parameters_of(name)
        if self.sharded:
            sigma = self.layers[name].trained_parameter(self.adapter_name)
            state = state and {
                key: like_shards_of(sigma, value) if is_moment(value) else value for key, value in state.items()
            }
        self._take_over(name, state, slots)

    def match(self, stored: dict[str, list[int] | None]) -> None:
        """Give every layer the phase and rank of `stored_ranks()`; values are loaded afterwards.

        Raises:
            ValueError: the ranks are those of other layers.
        """
        if stored.keys() != self.layers.keys():
            raise ValueError(
                "The saved state is of other layers than those of this model. Load it into the same model."
            )
        slots = OptimizerSlots(self.optimizer)
        for name, ranks in stored.items():
            layer = self.layers[name]
            rank, size = ranks or (None, None)
            layer.resize(self.adapter_name, size)
            if rank is not None:
                layer.ranks[self.adapter_name] = rank
            self._shard_new_parameters_of(name)
            if layer.trained_parameter(self.adapter_name) is not self.parameters[name]:
                self._take_over(name, {}, slots)
        refresh_reducers(self.model)

    def stored_ranks(self) -> dict[str, list[int] | None]:
        """By name, the rank and the number of stored directions; `None` for dense layers."""
        return {
            name: None if self.is_dense(name) else [layer.rank(self.adapter_name), self.parameters[name].shape[0]]
            for name, layer in self.layers.items()
        }

    def take_over_loaded(self) -> None:
        """Put parameters that loading weights replaced into the optimizer in place of the old ones, with their state."""
        slots = OptimizerSlots(self.optimizer)
        for name, layer in self.layers.items():
            if layer.trained_parameter(self.adapter_name) is not self.parameters[name]:
                self._take_over(name, slots.state_of(self.parameters[name]), slots)
        refresh_reducers(self.model)

    def _take_over(self, name: str, state: dict[str, Any] | None, slots: OptimizerSlots) -> None:
        """Let the optimizer train the parameter that the layer has now."""
        old, new = self.parameters[name], self.layers[name].trained_parameter(self.adapter_name)
        self.parameters[name] = new
        slots.replace(old, new, state)

    def _shard_new_parameters_of(self, name: str) -> None:
        if self.sharded:
            layer = self.layers[name]
            shard_new_parameters(self.model, [layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh])

    # ---- invariants and counts ---------------------------------------------------------------------------------------

    def _require_trained_by_optimizer(self) -> None:
        if not self.layers:
            raise ValueError(
                f"The model has no layer with the adapter `{self.adapter_name}`. Make it with "
                "get_peft_model(model, OIALRConfig()) first, or pass its `adapter_name`."
            )
        slots = OptimizerSlots(self.optimizer)
        missing = [
            name for name, parameter in self.parameters.items() if parameter.requires_grad and parameter not in slots
        ]
        if missing:
            raise ValueError(
                f"The optimizer does not train {len(missing)} of {len(self.layers)} OIALR layers, such as "
                f"`{missing[0]}`. Make the optimizer after the adapter, from the model's parameters."
            )

    def require_unchanged(self) -> None:
        """Raise a RuntimeError when somebody else replaced a parameter."""
        for name, layer in self.layers.items():
            if layer.trained_parameter(self.adapter_name) is not self.parameters[name]:
                raise RuntimeError(
                    f"The parameter of `{name}` was replaced since the last check, so the optimizer trains a stale "
                    "one. After loading weights during a run, call `load_state_dict` of the controller as well."
                )

    def count_trainable(self) -> int:
        """Parameters of the model that train; of a masked layer, those of its rank."""
        in_layers = {id(parameter) for parameter in self.parameters.values()}
        trainable = sum(
            parameter.numel()
            for parameter in self.model.parameters()
            if parameter.requires_grad and id(parameter) not in in_layers
        )
        for name, layer in self.layers.items():
            if self.parameters[name].requires_grad:
                dense = self.is_dense(name)
                trainable += self.parameters[name].numel() if dense else layer.rank(self.adapter_name) ** 2
        return trainable

    def count_dense_model(self) -> int:
        """Parameters of the model without adapters: targets at their full size, everything else once."""
        targets = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        inside = {id(layer.get_base_layer().weight) for layer in self.layers.values()}
        for layer in self.layers.values():
            for container in (layer.oialr_weight, layer.oialr_u, layer.oialr_sigma, layer.oialr_vh):
                inside.update(id(parameter) for parameter in container.values())
        return targets + sum(p.numel() for p in self.model.parameters() if id(p) not in inside)
