"""FSDP2 (`fully_shard`): whole tensors from shards for a check, and shards again of what the check made.

FSDP2 shards every parameter by itself, and a group of them communicates together. A parameter of a new shape therefore
takes the place of the old one in its group as if `fully_shard` had found it there; the rest of the group stays. All that
this takes from inside PyTorch is in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


def is_sharded(model: nn.Module) -> bool:
    """Whether some module in `model` was given to `fully_shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharding_group(model: nn.Module) -> dist.ProcessGroup:
    """The processes over which the parameters are sharded.

    Raises:
        ValueError: they are replicated as well, offloaded to the CPU, or sharded over several groups.
    """
    groups = list(_param_groups(model))
    for group in groups:
        if group.mesh_info.mesh.ndim != 1:
            raise ValueError(
                "Sharding with replication (HSDP) is not supported while ranks change. Shard over all processes: a mesh "
                "of one dimension."
            )
        if type(group.offload_policy) is not OffloadPolicy:
            raise ValueError("CPU offloading is not supported while ranks change. Leave `cpu_offload` out.")
    meshes = {group.mesh_info.mesh for group in groups}
    if len(meshes) != 1:
        raise ValueError("The model is sharded over several meshes, but a check needs one. Use one mesh for all.")
    return meshes.pop().get_group()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; every process must call it. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shards_of(reference: Tensor, tensor: Tensor) -> Tensor:
    """The local shard of a tensor that all processes hold, split as `reference`; the tensor if that is whole."""
    if not isinstance(reference, DTensor) or tensor.ndim == 0:
        return tensor
    # every process has the same values: nothing is sent
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def reshard_idle(model: nn.Module) -> None:
    """Free whole parameters that FSDP kept after the last use, so that modules show their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_new_parameters(model: nn.Module, containers: list[nn.Module]) -> None:
    """Shard the parameters of these modules that replaced sharded ones, in the groups of those.

    Args:
        containers: modules of one layer, whose parameters belong to one group.
    """
    inside = set(containers)
    for group in _param_groups(model):
        old = [param for param in group.fsdp_params if param._module_info.module in inside]
        if not old:
            continue
        gone = [param for param in old if _parameter_at(param) is not param.sharded_param]
        for param in gone:
            param._post_load_hook_handle.remove()
        group.fsdp_params = [param for param in group.fsdp_params if param not in gone]
        for container in containers:
            for name, parameter in container._parameters.items():
                if parameter is not None and not isinstance(parameter, DTensor):
                    group.fsdp_params.append(_sharded(parameter, container, name, group))
        _watch_state_dicts(group)
        return


def _param_groups(model: nn.Module) -> Iterator[FSDPParamGroup]:
    seen = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _parameter_at(param: FSDPParam) -> Any:
    return param._module_info.module._parameters.get(param._module_info.param_name)


def _sharded(parameter: nn.Parameter, module: nn.Module, name: str, group: FSDPParamGroup) -> FSDPParam:
    # private, so imported only by those who train with FSDP
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    made = FSDPParam(
        parameter,
        ParamModuleInfo(module, name),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        group.mp_policy,
        group.offload_policy,
    )
    made.init_dtype_attrs(group.mp_policy)
    return made


def _watch_state_dicts(group: FSDPParamGroup) -> None:
    """Hooks that reshard before a state dict is taken, on the modules that have parameters now."""
    handles = (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle)
    if not any(handles):
        return  # before the first forward, which registers them
    for by_module in handles:
        for handle in by_module.values():
            handle.remove()
        by_module.clear()
    group._register_state_dict_hooks()


def shaped_as_whole(state: dict[str, Any]) -> dict[str, Any]:
    """A state with plain tensors of the whole shape, but without values or memory, in place of sharded ones."""
    return {
        key: value.to_local().new_empty(()).expand(value.shape) if isinstance(value, DTensor) else value
        for key, value in state.items()
    }
