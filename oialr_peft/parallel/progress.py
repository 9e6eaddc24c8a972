"""Progress bars of long decompositions, on the main process.

Bars are transformers' own, so `transformers.utils.logging.disable_progress_bar()` turns them off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.utils import logging as transformers_logging

from oialr_peft.parallel.distributed import is_main_process

PATIENCE = 1.0  # seconds after which a bar appears


def decomposition_bar(
    iterable: Iterable[Any] | None = None, *, total: int | None = None, disable: bool | None = False
) -> Any:
    """A bar over layers that are being decomposed, for as long as that lasts; on the main process only.

    Args:
        iterable: yields an item for each layer; without one, call `update()`.
        total: number of layers.
        disable: `TrainingArguments.disable_tqdm`.
    """
    return transformers_logging.tqdm(
        iterable,
        total=total,
        desc="Decomposing weights",
        unit="layer",
        delay=PATIENCE,
        leave=False,
        disable=disable or not is_main_process(),
    )
