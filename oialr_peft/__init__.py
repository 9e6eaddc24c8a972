"""Orthogonality-informed adaptive low-rank training (OIALR) as a PEFT method.

Importing this package registers the method with PEFT (type `"OIALR"`).

>>> from oialr_peft import OIALRConfig
>>> OIALRConfig().peft_type.value
'OIALR'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oialr_peft.tuner import registration as _registration

_registration.check_versions()
_registration.extend_peft_type()

from oialr_peft.engine.controller import OIALRController  # noqa: E402
from oialr_peft.engine.update import OIALRUpdate  # noqa: E402
from oialr_peft.linalg.factors import (  # noqa: E402
    Factors,
    factorize,
    polar_factor,
    rediagonalize,
    stability,
    truncate,
)
from oialr_peft.storage.export import save_dense, save_lora, save_low_rank, to_dense  # noqa: E402
from oialr_peft.storage.hub import keep_cards_in_pushes as _keep_cards_in_pushes  # noqa: E402
from oialr_peft.storage.low_rank import register as _register_format  # noqa: E402
from oialr_peft.tuner.config import OIALRConfig  # noqa: E402  (needs the extended enum)
from oialr_peft.tuner.model import OIALRModel  # noqa: E402

_registration.register(OIALRConfig, OIALRModel)
_register_format()
_keep_cards_in_pushes()

if TYPE_CHECKING:
    from oialr_peft.report import plot_history, rank_table
    from oialr_peft.trainer.callback import OIALRCallback
    from oialr_peft.trainer.mixin import OIALRTrainerMixin
    from oialr_peft.trainer.trainer import OIALRTrainer

__version__ = "0.1.0.dev0"

# importing these costs seconds (transformers.Trainer, matplotlib), so they are imported on first use
_LAZY = {
    "OIALRCallback": "oialr_peft.trainer.callback",
    "OIALRTrainer": "oialr_peft.trainer.trainer",
    "OIALRTrainerMixin": "oialr_peft.trainer.mixin",
    "plot_history": "oialr_peft.report",
    "rank_table": "oialr_peft.report",
}

__all__ = [
    "Factors",
    "OIALRCallback",
    "OIALRConfig",
    "OIALRController",
    "OIALRModel",
    "OIALRTrainer",
    "OIALRTrainerMixin",
    "OIALRUpdate",
    "factorize",
    "plot_history",
    "polar_factor",
    "rank_table",
    "rediagonalize",
    "save_dense",
    "save_lora",
    "save_low_rank",
    "stability",
    "to_dense",
    "truncate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'oialr_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
