"""Numbers as people read them."""

from __future__ import annotations

from typing import Any


def percent(value: float) -> str:
    """Three digits, of which small values show what there is.

    >>> percent(12.345), percent(0.01234), percent(100)
    ('12.3 %', '0.0123 %', '100 %')
    """
    return f"{value:.3g} %"


def duration(seconds: float) -> str:
    """In the two largest units.

    >>> duration(4.2), duration(75), duration(7325)
    ('4.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def byte_size(size: float) -> str:
    """In decimal units.

    >>> byte_size(950), byte_size(1_234_567), byte_size(16e9)
    ('950 B', '1.23 MB', '16 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def figure(value: float) -> str:
    """Four digits.

    >>> figure(0.123456), figure(12345.6)
    ('0.1235', '12,350')
    """
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{float(f'{value:.4g}'):,.0f}"


def setting(value: Any) -> str:
    """As it is written in Python."""
    return repr(value)


def metric_name(name: str) -> str:
    """What an entry of the Trainer's log is called in a heading.

    >>> metric_name("eval_accuracy"), metric_name("eval_loss"), metric_name("loss")
    ('Validation accuracy', 'Validation loss', 'Training loss')
    """
    if name.startswith("eval_"):
        return f"Validation {name.removeprefix('eval_').replace('_', ' ')}"
    return f"Training {name.replace('_', ' ')}"
