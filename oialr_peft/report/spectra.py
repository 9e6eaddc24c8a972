"""Singular values of Σ, of a model or of a saved adapter. Just after a Σ update Σ is diagonal; in general it is not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from safetensors import safe_open
from torch import Tensor, nn

from oialr_peft.files.checkpoints import adapter_file, layer_of_key, tensors_in
from oialr_peft.tuner.lookup import adapter_layers

Spectra = Mapping[str, Sequence[float]]  # singular values by full module name, largest first


def spectra_of_model(model: nn.Module, adapter_name: str = "default") -> dict[str, list[float]]:
    """Singular values of the factored layers of an adapter."""
    return {
        name: _singular_values(layer.factors(adapter_name).sigma)
        for name, layer in adapter_layers(model, adapter_name).items()
        if not layer.is_dense(adapter_name)
    }


def spectra_of_checkpoint(directory: str | os.PathLike[str], subfolder: str | None = None) -> dict[str, list[float]]:
    """Singular values of the factored layers of a saved adapter; only its Σ are read. Empty where no adapter is saved.

    Raises:
        ValueError: the file is damaged, or a pickle.
    """
    path = adapter_file(os.fspath(directory), subfolder)
    if path is None:
        return {}
    matrices = {key: layer_of_key(key) for key, stored in tensors_in(path).items() if len(stored.shape) == 2}
    with safe_open(path, "pt") as file:
        return {
            name: _singular_values(file.get_tensor(key))
            for key, (name, part) in matrices.items()
            if name and part == "sigma"
        }


def _singular_values(sigma: Tensor) -> list[float]:
    values: list[float] = torch.linalg.svdvals(sigma.detach().float()).tolist()
    return values
