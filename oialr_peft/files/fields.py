"""What the fields of a JSON file must be: predicates, and an error that names field and file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from oialr_peft.files.values import is_count, is_index, is_number

# by name, whether a value will do, and what it must be in words
Fields = Mapping[str, tuple[Callable[[Any], bool], str]]

_REMEDY = "Get the file again, or write a new one by training with OIALRTrainer."
_LARGEST = 2**63  # far above every count, far below what a float holds


def require_fields(data: Mapping[str, Any], fields: Fields, path: str | os.PathLike[str]) -> None:
    """Raise a `ValueError` that names field and file unless each field is what it must be.

    Args:
        data: from the file.
        fields: what they must be.
        path: of the file.
    """
    for name, (matches, expected) in fields.items():
        if not matches(data.get(name)):
            raise ValueError(f"`{name}` in `{path}` must be {expected}, but is {_shown(data.get(name))}. {_REMEDY}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def is_finite(value: Any) -> bool:
    """Whether it is a number that JSON can hold, far from where floats end."""
    return is_number(value) and abs(value) < _LARGEST


def is_amount(value: Any) -> bool:
    """Whether it is an int ≥ 0, and no absurd one."""
    return is_index(value) and value < _LARGEST


def is_size(value: Any) -> bool:
    """Whether it is an int ≥ 1, and no absurd one."""
    return is_count(value) and value < _LARGEST


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_object_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is an object all of whose values are such."""
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def is_list_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list all of whose items are such."""
    return lambda value: isinstance(value, list) and all(map(of, value))


def has_fields(fields: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Whether a value is an object with these fields and no other."""
    return lambda value: (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(matches(value[name]) for name, matches in fields.items())
    )


def is_plain(value: Any) -> bool:
    """What can be written as JSON again."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not is_number(value) or is_finite(value)


def is_pair(value: Any) -> bool:
    """Whether it is a list of two ints ≥ 0."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_amount, value))
