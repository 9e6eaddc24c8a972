"""What a checkpoint holds, from its configuration and the headers of its safetensors files; no tensor is read."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from oialr_peft.files.card import hub_id
from oialr_peft.files.checkpoints import (
    StoredTensor,
    by_layer,
    layer_of_key,
    layer_sizes,
    low_rank_layer_of_key,
    read_json,
    tensors_in,
)
from oialr_peft.files.described import SavedLayer
from oialr_peft.storage.low_rank import METHOD, LowRankConfig
from oialr_peft.storage.record import RECORD_NAME, RunRecord, checkpoint_step, read_record
from oialr_peft.tuner.config import OIALRConfig

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Inspection(NamedTuple):
    """A checkpoint."""

    kind: str  # "adapter" or "low-rank checkpoint"
    location: str
    format_version: int | None
    base_model: str | None
    settings: Mapping[str, Any]  # of the method; empty of a low-rank checkpoint, which has none
    layers: Sequence[SavedLayer]
    tensors: Mapping[str, StoredTensor]
    record: RunRecord | None

    @property
    def stored(self) -> int:
        """Numbers in the target layers."""
        return sum(layer.stored_parameters for layer in self.layers)

    @property
    def dense(self) -> int:
        """Numbers that the target layers would have as dense weights."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(math.prod(tensor.shape) * BYTES.get(tensor.dtype, 1) for tensor in self.tensors.values())

    @property
    def others(self) -> int:
        """Numbers outside the target layers."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values()) - self.stored

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "kind": self.kind,
            "location": self.location,
            "format_version": self.format_version,
            "base_model": self.base_model,
            "bytes": self.bytes,
            "dense_parameters": self.dense,
            "stored_parameters": self.stored,
            "other_parameters": self.others,
            "compression": self.dense / self.stored if self.stored else None,
            "steps": None if self.record is None else self.record.steps,
            "total_steps": None if self.record is None else self.record.total_steps,
            "settings": dict(self.settings),
            "layers": [layer._asdict() for layer in self.layers],
        }


def inspect_checkpoint(source: str) -> Inspection:
    """What is in an adapter, a standalone low-rank checkpoint, a checkpoint of the Trainer, or the last one of a run.

    Args:
        source: a directory, or a repository of the Hub.

    Raises:
        ValueError: it is none of these, or a file is damaged.
        OSError: the Hub cannot be reached, or does not have the repository.
    """
    place = _place_of(source)
    config = place.json(CONFIG_NAME)
    record = place.record()
    if config is not None:
        return _adapter(place, config, record)
    config = place.json("config.json") or {}
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"`{source}` is no OIALR checkpoint: it has no {CONFIG_NAME}, and no config.json with low-rank layers. Name "
            "the directory of an adapter, of a low-rank checkpoint, or the `output_dir` of a training."
        )
    try:
        described = LowRankConfig(**quantization)
    except (TypeError, ValueError) as error:
        file = Path(place.location, "config.json")
        raise ValueError(f"The configuration in `{file}` cannot be used: {error}") from error
    tensors = {key: found for file in place.weight_files() for key, found in place.headers(file).items()}
    parts = by_layer(tensors, low_rank_layer_of_key)
    factored = {name: found for name, found in parts.items() if len(found) == 3}
    return Inspection(
        "low-rank checkpoint",
        place.location,
        described.format_version,
        next((name for name in _listed(config.get("architectures")) if isinstance(name, str)), None),
        {},
        _layers(factored),
        tensors,
        record,
    )


def _adapter(place: _Place, config: Mapping[str, Any], record: RunRecord | None) -> Inspection:
    if config.get("peft_type") != "OIALR":
        raise ValueError(
            f"`{place.location}` is an adapter of type {config.get('peft_type')!r}, not OIALR. Inspect one that was "
            "trained with OIALRConfig."
        )
    # refuses what no release wrote, and later formats
    settings = OIALRConfig.from_pretrained(place.location).resolved()
    tensors = place.headers(SAFETENSORS_WEIGHTS_NAME)
    return Inspection(
        "adapter",
        place.location,
        config.get("format_version"),
        config.get("base_model_name_or_path") or None,
        settings.shown(),
        _layers(by_layer(tensors, layer_of_key)),
        tensors,
        record,
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _layers(found: Mapping[str, Mapping[str, StoredTensor]]) -> list[SavedLayer]:
    """In natural order of names, as 2 before 10."""
    return [SavedLayer(name, *layer_sizes(name, found[name])) for name in sorted(found, key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---- where checkpoints are -----------------------------------------------------------------------------------------------


class _Place(ABC):
    """A directory or a repository: small files are read, of weights only the headers."""

    def __init__(self, location: str) -> None:
        self.location = location

    @abstractmethod
    def file(self, name: str) -> Path | None:
        """A small file; `None` where it does not exist."""

    @abstractmethod
    def headers(self, name: str) -> dict[str, StoredTensor]:
        """The tensors of a safetensors file by name."""

    def json(self, name: str) -> dict[str, Any] | None:
        """Content of a JSON file."""
        path = self.file(name)
        return None if path is None else read_json(path)

    def record(self) -> RunRecord | None:
        """What the run left that trained the checkpoint."""
        path = self.file(RECORD_NAME)
        return None if path is None else read_record(path)

    def weight_files(self) -> list[str]:
        """Names of the files of a model's weights."""
        index = self.json(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            return [SAFE_WEIGHTS_NAME]
        weight_map = index.get("weight_map")
        named: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        strange = [name for name in named if not isinstance(name, str) or Path(name).name != name]
        if strange or not named:
            file = Path(self.location, SAFE_WEIGHTS_INDEX_NAME)
            raise ValueError(
                f"`weight_map` in `{file}` must map tensors to files beside it, but has "
                f"{strange[:1]}. Do not trust this checkpoint, or save it again."
            )
        return sorted(set(named))


class _Directory(_Place):
    def file(self, name: str) -> Path | None:
        path = Path(self.location, name)
        return path if path.is_file() else None

    def headers(self, name: str) -> dict[str, StoredTensor]:
        return tensors_in(Path(self.location, name))


class _Repository(_Place):
    def file(self, name: str) -> Path | None:
        try:
            return Path(hf_hub_download(self.location, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def headers(self, name: str) -> dict[str, StoredTensor]:
        found = HfApi().parse_safetensors_file_metadata(self.location, name)
        return {key: StoredTensor(name, tuple(each.shape), each.dtype) for key, each in found.tensors.items()}


def require_source(source: str) -> None:
    """Raise a `ValueError` when this is neither a directory nor a possible name of a repository of the Hub."""
    if not Path(source).is_dir() and (hub_id(source) is None or Path(source).exists()):
        raise ValueError(f"`{source}` is no directory, and no name of a repository of the Hub. Check the spelling.")


def _place_of(source: str) -> _Place:
    require_source(source)
    directory = Path(source)
    return _Directory(str(_with_weights(directory))) if directory.is_dir() else _Repository(source)


def _with_weights(directory: Path) -> Path:
    """The directory itself, or the last checkpoint of a run that has nothing but checkpoints."""
    if any((directory / name).is_file() for name in (CONFIG_NAME, "config.json")):
        return directory
    numbered = [(number, path) for path in directory.iterdir() if (number := checkpoint_step(path)) is not None]
    saved = [(number, path) for number, path in numbered if (path / CONFIG_NAME).is_file()]
    return max(saved)[1] if saved else directory
