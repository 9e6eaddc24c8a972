"""Several processes: who decomposes what, what is sent, and how DistributedDataParallel takes parameters of new shapes.

A *process* is one of those that train a model together; *rank* always means the number of directions of a layer. Here is
no schedule and no linear algebra: those are in `schedule.py` and `factors.py`, and `controller.py` puts all together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from oialr_peft.linalg.decompositions import WORKSPACE_BYTES
from oialr_peft.parallel.sharding import is_sharded, sharding_group

_COPIES = 8  # of a matrix that its decomposition and the result hold together


def is_main_process() -> bool:
    """Whether this process speaks for all: also before the process group is made, as torchrun and Accelerate set it."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


class Job(NamedTuple):
    """One matrix to decompose."""

    name: str
    shape: tuple[int, int]
    itemsize: int  # bytes of one entry

    @property
    def cost(self) -> float:
        """Proportional to the time of an SVD of (m, n): k²·max(m, n)."""
        return float(min(self.shape)) ** 2 * max(self.shape)

    @property
    def bytes(self) -> int:
        """What the job holds in memory at once."""
        return _COPIES * self.shape[0] * self.shape[1] * self.itemsize


class Processes:
    """The processes that train one model together, seen from one of them.

    Every method that communicates must be called by all of them, in the same order.

    Args:
        group: the process group of the wrapper around the model.
        device: where the model is; messages are made there, as NCCL asks for.

    Attributes:
        count: how many there are.
        index: which one this is, from 0.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.count = group.size()
        self.index = group.rank()

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> Self | None:
        """Those that train `model`; `None` when it is one alone."""
        if is_sharded(model):
            return cls(sharding_group(model), device)
        wrappers = data_parallel_wrappers(model)
        if wrappers and wrappers[0].process_group.size() > 1:
            return cls(wrappers[0].process_group, device)
        return None

    def rounds(self, jobs: Sequence[Job]) -> Iterator[list[tuple[Job, int]]]:
        """Jobs with their owners, in rounds of at most `WORKSPACE_BYTES` of work for each process, unless one needs more.

        The longest first, each to the process with the least to do: at most 4/3 of the shortest possible time (Graham,
        *Bounds on Multiprocessing Timing Anomalies*, 1969). The order depends on names and shapes only.
        """
        waiting = sorted(jobs, key=lambda job: (-job.cost, job.name))
        while waiting:
            taken, held = 0, 0
            while taken < len(waiting) and (taken < self.count or held < self.count * WORKSPACE_BYTES):
                held += waiting[taken].bytes
                taken += 1
            owners = longest_first([job.cost for job in waiting[:taken]], self.count)
            yield list(zip(waiting[:taken], owners, strict=True))
            waiting = waiting[taken:]

    def smallest(self, values: Sequence[float]) -> list[float]:
        """The smallest of each value over all processes."""
        table = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(table, dist.ReduceOp.MIN, self.group)
        return table.tolist()

    def merged(self, table: Tensor) -> Tensor:
        """A table of which each process filled in its own rows and left the others zero: with all of them filled in."""
        everywhere = table.to(self.device)
        dist.all_reduce(everywhere, dist.ReduceOp.SUM, self.group)
        return everywhere.cpu()

    def send(self, messages: Sequence[tuple[Tensor, int]]) -> None:
        """Fill each contiguous tensor with what its owner has in it; every tensor is sent once."""
        pending = [
            dist.broadcast(tensor, dist.get_global_rank(self.group, owner), self.group, async_op=True)
            for tensor, owner in messages
        ]
        for work in pending:
            work.wait()

    def require_same(self, what: str, value: Any) -> None:
        """Raise a ValueError on every process when `value`, which JSON can write, differs between processes."""
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
        number = float(int.from_bytes(digest[:6]))  # 48 bits, exact in float64
        lowest, highest = self.smallest([number, -number])
        if lowest != -highest:
            raise ValueError(
                f"{what} differs between the {self.count} processes, so they could not stay equal. Give all processes "
                "the same configuration, model and number of steps."
            )


def longest_first(costs: Sequence[float], processes: int) -> list[int]:
    """The owner of each job, given in descending order of cost: the process that has the least to do so far.

    >>> longest_first([5.0, 4.0, 3.0, 3.0], 2)
    [0, 1, 1, 0]
    """
    load = [0.0] * processes
    owners = []
    for cost in costs:
        owner = load.index(min(load))
        load[owner] += cost
        owners.append(owner)
    return owners


# ---- engines ---------------------------------------------------------------------------------------------------------


def data_parallel_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules in `model`, itself included."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def require_supported_engine(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse, before the first step, what would train wrongly or hang.

    Raises:
        ValueError: the message says what to use instead.
    """
    _refuse_other_engines(model, optimizer)
    _refuse_scattered_parameters(model)
    wrappers = data_parallel_wrappers(model)
    for wrapper in wrappers:
        _refuse_options(wrapper)
    if (
        not wrappers
        and not is_sharded(model)
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        raise ValueError(
            f"Training runs on {dist.get_world_size()} processes, but the model is not wrapped for it, so each would "
            "train its own. Pass the model as `accelerator.prepare` or DistributedDataParallel returned it, or use "
            "OIALRTrainer; OIALRCallback serves one process."
        )


def _refuse_other_engines(model: nn.Module, optimizer: Optimizer) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    for part in (*model.modules(), optimizer, inner):
        if type(part).__module__.partition(".")[0] == "deepspeed":
            raise ValueError(
                "DeepSpeed keeps its own copies of parameters and optimizer state, which cannot follow a change of "
                "rank. Train with DistributedDataParallel: `accelerate launch --multi_gpu`."
            )
    if _is_zero(inner):
        raise ValueError(
            "ZeroRedundancyOptimizer spreads the optimizer state over processes, so it cannot follow a change of rank. "
            "Use the optimizer itself; once layers are factored, its state is small."
        )
    for module in model.modules():
        if isinstance(module, DataParallel):
            raise ValueError(
                "nn.DataParallel copies the model at every step. Start one process per GPU instead: "
                "`accelerate launch train.py`, or `torchrun --nproc_per_node=N train.py`."
            )
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                "FSDP1 joins parameters to flat ones, in which a layer cannot change its rank. Use FSDP2: "
                "`fsdp_version: 2` in the configuration of Accelerate, or `fully_shard`."
            )


def _is_zero(optimizer: Optimizer) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # imported here: its package compiles eight optimizers, which takes longer than importing all of this one
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return isinstance(optimizer, ZeroRedundancyOptimizer)


def _refuse_scattered_parameters(model: nn.Module) -> None:
    devices = set()
    sharded = is_sharded(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and not sharded:
            raise ValueError(
                f"`{name}` is split over processes (tensor parallelism), so its basis cannot be computed. Load the "
                "model without `tp_plan`, and train with DistributedDataParallel."
            )
        if parameter.is_meta:
            raise ValueError(
                f"`{name}` is on the meta device, so it holds no values: it was offloaded, or never loaded. Load the "
                "model without `device_map`, or with one that fits it on one device."
            )
        devices.add(parameter.device)
    if len(devices) > 1:
        raise ValueError(
            f"The model is spread over {', '.join(sorted(map(str, devices)))}. Load it without `device_map`, on one "
            "device per process, and train with DistributedDataParallel."
        )


def _refuse_options(wrapper: DistributedDataParallel) -> None:
    hooks = [state for _, state in wrapper._comm_hooks]
    reasons = {
        "`static_graph=True` fixes the set of parameters": wrapper.static_graph,
        "`mixed_precision` keeps copies of the parameters": wrapper.mixed_precision is not None,
        "`delay_all_reduce_named_params` fixes the parameters": bool(wrapper._delay_all_reduce_params),
        "the Python reducer of compiled autograd fixes the parameters": wrapper._use_python_reducer,
        "the PowerSGD hook keeps errors of the old shapes": any(type(s).__name__ == "PowerSGDState" for s in hooks),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(
                f"DistributedDataParallel: {reason}, but ranks change while an OIALR adapter trains. Leave that option "
                "out."
            )


def refresh_reducers(model: nn.Module) -> None:
    """Let DistributedDataParallel reduce the gradients of the parameters that the model has now.

    A reducer is bound to parameter objects: after some were replaced it would wait for gradients that never come, or
    not reduce any. It is made again only then; the wrapper object stays, so whoever holds it goes on as before, and
    communication hooks are registered again. As `DistributedDataParallel.__setstate__` does after unpickling.
    """
    for wrapper in data_parallel_wrappers(model):
        current = [
            parameter
            for name, parameter in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        ]
        if _trained_ones(current) == _trained_ones(wrapper._module_parameters):
            continue
        parameters, expect_sparse = wrapper._build_params_for_reducer()
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper.reducer._remove_autograd_hooks()
        wrapper._module_parameters = current
        wrapper._ddp_init_helper(parameters, expect_sparse, names, False)
        wrapper._has_rebuilt_buckets = False
        for hook, state in wrapper._comm_hooks:
            dist._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]


def _trained_ones(parameters: list[nn.Parameter]) -> list[int]:
    return [id(parameter) for parameter in parameters if parameter.requires_grad]


def refuse_join(model: nn.Module) -> None:
    """Raise a RuntimeError inside `DistributedDataParallel.join`, where processes without data miss the check."""
    if any(wrapper._join_config.enable for wrapper in data_parallel_wrappers(model)):
        raise RuntimeError(
            "`join` lets processes without data stop early, but a check needs all of them. Give every process the same "
            "number of batches: `even_batches=True` in Accelerate, or `drop_last=True`."
        )
