"""What saved files hold, checked by their headers before a model is changed for them. Only safetensors files are read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from oialr_peft.factors import Factors

PARTS = Factors._fields
_ADAPTER_PREFIX = "base_model.model."
_FLOATING = {"F16", "BF16", "F32", "F64"}


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "F32", "BF16", …


def tensors_in(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; their values are not read.

    Raises:
        ValueError: the file is damaged, truncated, or of another format.
    """
    if not os.fspath(path).endswith(".safetensors"):
        raise ValueError(
            f"`{path}` is no safetensors file. Files that are read by unpickling can run code and are refused: ask for "
            "the model in safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)
            return {
                key: StoredTensor(os.fspath(path), tuple(each.get_shape()), each.get_dtype())
                for key, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{path}` is damaged or no safetensors file: {error}. Get or save it again.") from error


def adapter_file(source: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The safetensors file of a saved adapter, or `None` where there are no weights at all.

    Args:
        source: a directory, or a repository of the Hub.
        subfolder: where in it the adapter is.
        **hub: of `hf_hub_download`, such as `revision`.

    Raises:
        ValueError: the weights are there, but only as a pickle.
    """
    name = SAFETENSORS_WEIGHTS_NAME
    directory = Path(source, subfolder or "")
    if directory.is_dir() or Path(source).is_dir():
        if (directory / name).is_file():
            return directory / name
        if (directory / WEIGHTS_NAME).is_file():
            tensors_in(directory / WEIGHTS_NAME)  # refuses it
        return None
    try:
        return Path(hf_hub_download(source, name, subfolder=subfolder, **hub))
    except EntryNotFoundError as error:
        raise ValueError(
            f"`{source}` has no `{name}`. Adapters are read from safetensors files only; save it as one."
        ) from error


def layer_of_key(key: str) -> tuple[str, str]:
    """Full module name and part ("weight", "u", "sigma", "vh") that a key of an adapter's file is of; "" if of no layer.

    >>> layer_of_key("base_model.model.encoder.0.query.oialr_sigma")
    ('encoder.0.query', 'sigma')
    """
    module, _, part = key.removeprefix(_ADAPTER_PREFIX).rpartition(".oialr_")
    return module, part


def low_rank_layer_of_key(key: str) -> tuple[str, str]:
    """Full module name and part that a key of a standalone checkpoint is of; "" if it is no factor."""
    module, _, part = key.rpartition(".")
    return (module, part) if part in PARTS else ("", part)


def by_layer(
    tensors: Mapping[str, StoredTensor], layer_of: Callable[[str], tuple[str, str]]
) -> dict[str, dict[str, StoredTensor]]:
    """The stored parts of each layer, by full module name.

    Args:
        tensors: by their names in the file.
        layer_of: `layer_of_key` or `low_rank_layer_of_key`.
    """
    layers: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in tensors.items():
        name, part = layer_of(key)
        if name:
            layers.setdefault(name, {})[part] = stored
    return layers


def layer_sizes(name: str, found: Mapping[str, StoredTensor]) -> tuple[int, int, int | None]:
    """Sizes m, n and rank of a stored layer; the rank of a dense one is `None`.

    Raises:
        ValueError: its parts do not fit each other.
    """
    _check_layer(f"{name}.", found, None, None)
    return *_outer_sizes(found), None if "weight" in found else found["sigma"].shape[0]


def check_adapter_file(
    path: str | os.PathLike[str], ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Whether an adapter's file agrees with itself, its configuration and the model.

    Args:
        path: the safetensors file.
        ranks: `rank_pattern` of its configuration: full module name → rank of the factored layers.
        shapes: (m, n) of the model's target layers by full module name.

    Raises:
        ValueError: a layer has neither a weight nor the three factors, a shape or a rank does not fit, a tensor is not
            floating-point, or some layers are missing. The message names the file and the tensor.
    """
    layers = by_layer(tensors_in(path), layer_of_key)
    for name, found in layers.items():
        _check_layer(f"{_ADAPTER_PREFIX}{name}.oialr_", found, ranks.get(name), shapes.get(name))
    for name, rank in ranks.items():
        if name not in layers:
            raise ValueError(
                f"`{path}` holds nothing for `{name}`, which its configuration says has rank {rank}. The file is "
                "incomplete, or belongs to another `adapter_config.json`."
            )
    missing = [name for name in shapes if name not in layers]
    if missing and len(missing) < len(shapes):
        raise ValueError(
            f"`{path}` holds nothing for `{missing[0]}`, which is a target in this model. The file is incomplete, or "
            "belongs to another model."
        )


def check_adapter_directory(directory: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]]) -> None:
    """`check_adapter_file` for a saved adapter and the configuration beside it, where there is one."""
    config, path = Path(directory, CONFIG_NAME), adapter_file(os.fspath(directory))
    if path is not None and config.is_file():
        ranks = json.loads(config.read_text(encoding="utf-8")).get("rank_pattern")
        check_adapter_file(path, ranks or {}, shapes)


def check_low_rank_files(paths: Iterable[str], ranks: Mapping[str, int]) -> None:
    """Whether the files of a standalone checkpoint agree with each other and their configuration.

    Args:
        paths: its safetensors files.
        ranks: full module name → rank; names on disk that transformers changes while loading are not compared.

    Raises:
        ValueError: as `check_adapter_file`.
    """
    tensors = {key: stored for path in paths for key, stored in tensors_in(path).items()}
    for name, found in by_layer(tensors, low_rank_layer_of_key).items():
        if set(found) == set(PARTS):
            _check_layer(f"{name}.", found, ranks.get(name), None)


def _check_layer(
    prefix: str, found: Mapping[str, StoredTensor], rank: int | None, shape: tuple[int, int] | None
) -> None:
    file = next(iter(found.values())).file
    if set(found) not in ({"weight"}, set(PARTS)):
        missing = sorted(set(PARTS) - set(found))
        raise ValueError(
            f"`{file}` holds {', '.join(f'`{prefix}{part}`' for part in sorted(found))} but not "
            f"{', '.join(missing) or 'these alone'}: a layer is stored as `weight`, or as `u`, `sigma` and `vh`."
        )
    for part, stored in found.items():
        if stored.dtype not in _FLOATING:
            raise ValueError(f"`{prefix}{part}` in `{stored.file}` must be floating-point, but is {stored.dtype}.")
    dense = "weight" in found
    size = found["weight"].shape[:1] if dense else found["sigma"].shape[:1]
    stored_rank = size[0] if size and not dense else None
    m, n = shape or _outer_sizes(found)
    fits = {"weight": (m, n), "u": (m, stored_rank), "sigma": (stored_rank, stored_rank), "vh": (stored_rank, n)}
    for part, stored in found.items():
        if stored.shape != fits[part]:
            raise ValueError(
                f"`{prefix}{part}` in `{stored.file}` has shape {stored.shape}, but {fits[part]} would fit the model and "
                "its other tensors. It was saved from another model, or is damaged."
            )
    if stored_rank is not None and not 1 <= stored_rank <= min(m, n):
        raise ValueError(f"`{prefix}sigma` in `{file}` has rank {stored_rank}, which a {m}×{n} weight cannot have.")
    if stored_rank != rank and not (rank is None and shape is None):
        raise ValueError(
            f"`{prefix}{'weight' if dense else 'sigma'}` in `{file}` is {'dense' if dense else f'of rank {stored_rank}'}, "
            f"but the configuration beside it says {'dense' if rank is None else f'rank {rank}'}. The two files do not "
            "belong together."
        )


def _outer_sizes(found: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Sizes (m, n) by the stored tensors alone; 0 where they have no such dimension."""
    tall, wide = (found["weight"],) * 2 if "weight" in found else (found["u"], found["vh"])
    return (tall.shape or (0,))[0], (wide.shape or (0,))[-1]
