"""Of what kind a value is: for settings, and for what stands in a file. A bool is no number here."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an int.

    >>> is_int(3), is_int(3.0), is_int(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_index(value: Any) -> TypeGuard[int]:
    """Whether it is an int ≥ 0."""
    return is_int(value) and value >= 0


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is an int ≥ 1."""
    return is_int(value) and value >= 1


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is an int or a float, which may be NaN or infinite."""
    return isinstance(value, float) or is_int(value)


def is_collection_of(kind: type, value: Any) -> bool:
    """Whether it is a list, tuple or set, and all its items are of this type."""
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, kind) for item in value)
