"""What saved files hold, checked before a model is changed for them: headers of safetensors files, and JSON; nothing else."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from oialr_peft.linalg.factors import Factors

# every file of weights that a transformers checkpoint may have
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PARTS = Factors._fields
_ADAPTER_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_FLOATING = {"F16", "BF16", "F32", "F64"}
_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_STORED_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save)(?=\.)")  # without names of adapters


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "F32", "BF16", …


class Elsewhere(NamedTuple):
    """What an adapter's file may hold outside the target layers.

    Attributes:
        shapes: of the model's tensors, by name in the model without adapters.
        integers: names of those that are not floating-point.
        required: of each parameter that is always saved with the adapter, the names that it may have in the file; several
            when modules share it.
        token_rows: possible numbers of trained rows of an embedding.
    """

    shapes: Mapping[str, Sequence[int]]
    integers: Collection[str] = ()
    required: Collection[frozenset[str]] = ()
    token_rows: Collection[int] = ()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is damaged or holds something else; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"`{path}` is damaged or no JSON: {error}. Get or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold an object, but holds a {type(content).__name__}. Get or save it again.")
    return content


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
        # "np": for "pt", memory of the size of the file is reserved
        with safe_open(path, "np") as file:
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
    path: str | os.PathLike[str],
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    elsewhere: Elsewhere,
) -> None:
    """Whether an adapter's file agrees with itself, its configuration and the model.

    Args:
        path: the safetensors file.
        ranks: `rank_pattern` of its configuration: full module name → rank of the factored layers.
        shapes: (m, n) of the model's target layers by full module name.
        elsewhere: what it may hold beside these layers.

    Raises:
        ValueError: a layer has neither a weight nor the three factors, a shape or a rank does not fit, a tensor is not
            floating-point, or something is missing. The message names the file and the tensor.
    """
    tensors = tensors_in(path)
    layers = by_layer(tensors, layer_of_key)
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
    _check_elsewhere(path, {key: stored for key, stored in tensors.items() if not layer_of_key(key)[0]}, elsewhere)


def _check_elsewhere(path: str | os.PathLike[str], tensors: Mapping[str, StoredTensor], elsewhere: Elsewhere) -> None:
    """Checks the tensors of no layer; integers that this model does not have, such as positions, are no matter."""
    found = {
        _STORED_WRAPPERS.sub("", key.removeprefix(_ADAPTER_PREFIX)): (key, stored) for key, stored in tensors.items()
    }
    for name, (key, stored) in found.items():
        embedding = elsewhere.shapes.get(f"{name.removesuffix(_TOKENS)}.weight")
        if name.endswith(_TOKENS) and embedding is not None:
            fits = len(stored.shape) == 2 and stored.shape[0] in elsewhere.token_rows
            expected: Sequence[int] | None = (stored.shape[0] if fits else -1, embedding[1])
        else:
            expected = elsewhere.shapes.get(name)
        if expected is None:
            if stored.dtype in _FLOATING:
                warnings.warn(
                    f"`{key}` in `{path}` is left out, because this model has no place for it. Load the adapter into a "
                    "model of the class that it was trained on.",
                    stacklevel=2,
                )
        elif (stored.dtype in _FLOATING) == (name in elsewhere.integers):
            kind = "integers" if name in elsewhere.integers else "floating-point numbers"
            raise ValueError(
                f"`{key}` in `{path}` is {stored.dtype}, but the model has {kind} there. It was saved from another model, "
                "or is damaged."
            )
        elif stored.shape != tuple(expected):
            raise ValueError(
                f"`{key}` in `{path}` has shape {stored.shape}, which is not that of the model, {tuple(expected)}. It was "
                "saved from another model, or is damaged."
            )
    missing = next((names for names in elsewhere.required if names.isdisjoint(found)), None)
    if missing is not None:
        raise ValueError(
            f"`{path}` holds nothing for `{min(missing)}`, which is saved with an adapter of these settings. The file is "
            "incomplete, or belongs to another model."
        )


def without_wrappers(name: str) -> str:
    """The name that a parameter has in the model without adapters.

    >>> without_wrappers("encoder.query.base_layer.bias"), without_wrappers("classifier.modules_to_save.default.weight")
    ('encoder.query.bias', 'classifier.weight')
    """
    return _WRAPPERS.sub("", name)


def check_adapter_directory(
    directory: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int]], elsewhere: Elsewhere
) -> None:
    """`check_adapter_file` for a saved adapter and the configuration beside it, where there is one."""
    config, path = Path(directory, CONFIG_NAME), adapter_file(os.fspath(directory))
    if path is not None and config.is_file():
        check_adapter_file(path, _ranks_in(read_json(config), config), shapes, elsewhere)


def _ranks_in(content: Mapping[str, Any], config: Path) -> Mapping[str, int]:
    ranks = content.get("rank_pattern") or {}
    if not isinstance(ranks, dict):
        raise ValueError(f"`rank_pattern` in `{config}` must be an object, but is {ranks!r}. Get or save it again.")
    return ranks


def check_low_rank_files(paths: Sequence[str], ranks: Mapping[str, int], directory: str | os.PathLike[str]) -> None:
    """Whether the files of a standalone checkpoint agree with each other and their configuration.

    Args:
        paths: its safetensors files.
        ranks: full module name → rank; names on disk that transformers changes while loading are not compared.
        directory: of the checkpoint; if this is none, the files came from the Hub.

    Raises:
        ValueError: as `check_adapter_file`, or a file is outside the directory.
    """
    if os.path.isdir(directory):
        for path in paths:
            require_inside(directory, path)
    tensors = {key: stored for path in paths for key, stored in tensors_in(path).items()}
    layers = by_layer(tensors, low_rank_layer_of_key)
    complete = {name: found for name, found in layers.items() if set(found) == set(PARTS)}
    for name, found in complete.items():
        _check_layer(f"{name}.", found, ranks.get(name), None)
    if paths and len(complete) != len(ranks):
        raise ValueError(
            f"`{paths[0]}` and the files beside it hold the factors of {len(complete)} layers, but config.json has ranks "
            f"for {len(ranks)}. The checkpoint is incomplete, or its files do not belong together: get or save it again."
        )


def require_inside(directory: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Raise a `ValueError` when a file that a checkpoint names is not in its directory; links are not followed."""
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory)):
        raise ValueError(
            f"`{path}` is outside `{directory}`, whose index names it. Files of a checkpoint must be in its directory: do "
            "not trust this one."
        )


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
    if min(m, n) < 1:
        raise ValueError(
            f"`{prefix}{part}` in `{file}` has shape {stored.shape}, but a layer has at least one row and column."
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
