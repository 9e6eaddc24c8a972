"""The log lines of a check, by the standard `logging` module.

Each check gives one line at level INFO to the logger `oialr_peft.controller`, and one for each layer that it looked at, at
level DEBUG.
"""

from __future__ import annotations

import logging

from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.parallel.distributed import is_main_process

_NAMED = 3  # layers that a line calls by name


def log_check(logger: logging.Logger, update: OIALRUpdate, ranks: dict[str, int | None]) -> None:
    """Log what a check did, once for all processes.

    Args:
        logger: where to.
        update: what the check did.
        ranks: rank of every layer after it, by name; `None` for dense layers.
    """
    if not is_main_process():
        return
    factored = [rank for rank in ranks.values() if rank is not None]
    parts = [f"froze {_named(update.frozen)}", f"{len(factored)} of {len(ranks)} layers factored"]
    if factored:
        parts.append(f"mean rank {sum(factored) / len(factored):.1f}")
    if update.ranks:
        dropped = sum(before - after for before, after in update.ranks.values())
        parts.append(f"{dropped} of {sum(before for before, _ in update.ranks.values())} directions dropped")
    if update.stability:
        parts.append(f"mean Stability of dense layers {sum(update.stability.values()) / len(update.stability):.3f}")
    parts += [f"{update.trainable_percent:.1f} % trainable", f"{update.seconds:.2f} s"]
    logger.info("step %d: %s", update.step, ", ".join(parts))
    if logger.isEnabledFor(logging.DEBUG):
        for name in ranks:
            events = _events(update, name)
            if events:
                logger.debug("step %d: %s: %s", update.step, name, ", ".join(events))


def _named(names: list[str]) -> str:
    """`no layer`, or how many and the first of them."""
    if not names:
        return "no layer"
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return f"{len(names)} layer{'s' * (len(names) > 1)} ({', '.join(names[:_NAMED] + more)})"


def _events(update: OIALRUpdate, name: str) -> list[str]:
    """What a check found and did in one layer."""
    events = []
    if name in update.stability:
        events.append(f"Stability {update.stability[name]:.4f}")
    if name in update.frozen:
        events.append("frozen")
    if name in update.ranks:
        before, after = update.ranks[name]
        events.append(f"rank {before} → {after}")
    return events
