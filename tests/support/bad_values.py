"""Values that the fields of `OIALRConfig` refuse."""

from __future__ import annotations

import math

BAD_VALUES = {
    "target_modules": [3, [], set(), [1], [["a"]], {"a": 1}],
    "exclude_modules": [3, [1], [["a"]], {"a": 1}],
    "layers_to_transform": ["0", 0.5, [0, "1"], [0.5], True, -1, [-1]],
    "layers_pattern": [3, [3], {"a": 1}],
    "modules_to_save": ["head", 3, [3], {"a": 1}],
    "bias": ["some", None, True, "lora_only"],
    "trainable_token_indices": ["0", [0.5], ["a"], {"embed": 3}, {3: [1]}],
    "mode": ["residual", None, True, "Adapter"],
    "init_weights": [None, 1, "gaussian"],
    "rank": [0, -1, 1.0, 1.5, 0.0, -0.5, math.nan, math.inf, "8", True],
    "freeze_when": ["never", None, "Stable", 1],
    "delay": [-1, 1.0, 0.0, 1.5, -0.5, math.nan, "10", True],
    "stability_threshold": [0, 0.0, -0.1, 1.01, math.nan, None, "0.9", True],
    "update_every": [0, -1, 0.0, 1.0, 2.5, math.nan, None, "10", True],
    "cutoff": [1, 1.0, -0.1, math.nan, "0.1", False],
    "layers_per_update": [0, 0.0, 1.1, math.nan, None, "1", True],
    "max_output_loss": [-0.1, 1, 1.0, math.nan, "0.1", True],
    "sigma_lr_scale": [0, -1.0, math.inf, math.nan, None, "spectral", True],
    "max_rank_drop": [0, 0.0, 1.1, -0.5, math.nan, "0.5", True],
    "min_rank": [0, -1, 1.0, 0.0, math.nan, None, "1", True],
    "stability_storage": ["disk", None, 1, True],
    "shrink": ["cut", None, 1, True],
    "rank_pattern": [3, ["a"], {"a": 0}, {"a": 0.5}, {"a": True}, {1: 2}],
    "format_version": [0, -1, "1", 1.0, True],
}
