"""Warnings that name the line of the user's that led to them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

PACKAGE = str(Path(__file__).resolve().parents[1])


def warn(message: str) -> None:
    """Give a `UserWarning` at the line that called this package, whatever of other packages is in between."""
    frame: FrameType | None = sys._getframe(1)
    level = entry = 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            entry = level
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=entry + 2)  # 1 is this function, 2 is who called it
