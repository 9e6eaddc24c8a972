"""Peak memory of one call: counted tensor by tensor on a CPU, as the allocator reports it on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive while it is active; workspace inside one operation is not seen.

    Args:
        resident: tensors that exist already and count as well.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._count(resident)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _count(self, tensors: Iterable[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if id(storage) not in self._known:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], Any], resident: Sequence[Tensor], device: torch.device) -> int:
    """Peak memory of one call, `resident` tensors included and everything else that exists left out."""
    if device.type == "cuda":
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in resident)}
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return sum(storages.values()) + torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(resident) as counter:
        call()
    return counter.peak
