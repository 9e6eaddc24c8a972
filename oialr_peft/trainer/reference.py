"""The reference of DPO and GRPO: an adapter that TRL makes, filled with what the trained one was at the start."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainingArguments

from oialr_peft.tuner.config import OIALRConfig


def fill_reference_adapter(model: Any, args: TrainingArguments) -> None:
    """Make the adapter `ref` equal to the one that trains, when a trainer of TRL has just added it.

    Given a `PeftModel`, these compare with a copy of its adapter, but copy only parameters whose names hold `.default.`;
    of this method, as of others in PEFT, they end with the adapter's name.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get("default")
    if not isinstance(config, OIALRConfig) or configs.get("ref") is not config:
        return
    # no longer the same object: a second training goes on with the reference it has
    configs["ref"] = copy.copy(config)
    state, before = (
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in ("default", "ref")
    )
    if before.keys() == state.keys() and all(torch.equal(tensor, before[key]) for key, tensor in state.items()):
        return
    if getattr(args, "precompute_ref_log_probs", False):
        raise ValueError(
            "`precompute_ref_log_probs=True` was computed with a reference that is not the adapter of this model: TRL adds "
            "it empty. Leave it out, or merge the adapter and pass a new one as `peft_config`."
        )
    set_peft_model_state_dict(model, state, adapter_name="ref")
