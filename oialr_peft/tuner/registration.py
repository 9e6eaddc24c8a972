"""Makes the method known to PEFT: the one place that touches PEFT's registries.

PEFT looks its methods up by members of the enum `PeftType`, which it does not let others extend; `aenum.extend_enum`
adds the member in a way that pickling and look-up by value respect. An adapter that is loaded in a process that has not
imported this package fails inside PEFT with ``KeyError: 'OIALR'``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import aenum
from packaging.version import Version
from peft import mapping
from peft.utils import PeftType, register_peft_method

NAME = "OIALR"
PREFIX = "oialr_"

# package: (oldest that works, first that is not supported); the reasons stand beside the bounds in pyproject.toml
SUPPORTED = {"peft": ("0.21", "0.22"), "transformers": ("5.23", "6")}


def check_versions() -> None:
    """Raise an `ImportError` that says which versions work when PEFT or transformers is outside the supported range."""
    for package, (oldest, first_unsupported) in SUPPORTED.items():
        installed = Version(version(package))
        # releases only: 0.22.0.dev0 already has what 0.22 changes
        if not Version(oldest) <= installed or installed.release >= Version(first_unsupported).release:
            raise ImportError(
                f"oialr_peft works with {package} >= {oldest}, < {first_unsupported}, but {installed} is installed. "
                f'Run: pip install "{package}>={oldest},<{first_unsupported}"'
            )


def extend_peft_type() -> None:
    """Give `peft.PeftType` the member `OIALR`, once."""
    if NAME not in PeftType.__members__:
        aenum.extend_enum(PeftType, NAME, NAME)


def register(config_class: type, model_class: type) -> None:
    """Register the method with PEFT; calling again with newly imported classes of the same name replaces the old ones.

    Raises:
        ImportError: another package registered a PEFT method called OIALR.
    """
    peft_type: Any = PeftType(NAME)
    registered = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is not None:
        if registered.__qualname__ != config_class.__qualname__ or registered.__module__ != config_class.__module__:
            raise ImportError(
                f"PEFT already has a method called {NAME}, from {registered.__module__}. Import only one of the two."
            )
        for table in (
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
            mapping.PEFT_TYPE_TO_TUNER_MAPPING,
            mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
            mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        ):
            table.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)
