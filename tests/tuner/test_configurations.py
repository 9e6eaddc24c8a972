"""Configurations: every field with values of every kind, and every pair of fields, from construction to a check and back.

A configuration is refused with an error that names one of its fields, or it works.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bad_values import BAD_VALUES
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from torch import Tensor, nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg.factors import not_finite
from oialr_peft.tuner.lookup import adapter_layers

FIELDS = [field.name for field in dataclasses.fields(OIALRConfig)]
OWN_FIELDS = [name for name in FIELDS if name not in {field.name for field in dataclasses.fields(PeftConfig)}]
TOTAL_STEPS = 8

# values that work on `Tiny`, one check and all; the ends of each range and a value between
WORKING: dict[str, list[Any]] = {
    "target_modules": [None, ["up", "down"], ("up",), r".*\.(up|down)", "all-linear"],
    "exclude_modules": [None, [], ["down"], r".*\.0\.down"],
    "layers_to_transform": [None, 1, [0], [0, 1]],
    "layers_pattern": [None, "layers", ["layers"]],
    "modules_to_save": [None, [], ["head"]],
    "bias": ["none", "all", "oialr_only"],
    "trainable_token_indices": [None, [0, 3], {"embed_tokens": [1]}],
    "mode": ["adapter", "replace", "pretraining"],
    "rank": [None, 1, 100, 0.01, 0.99],
    "freeze_when": ["stable", "delay"],
    "delay": [None, 0, 2, 0.5],
    "stability_threshold": [1e-9, 0.5, 1],
    "update_every": [1, 2, 0.5, 1e-9],
    "cutoff": [None, 0, 0.1, 0.999999],
    "layers_per_update": [1e-9, 0.5, 1],
    "max_output_loss": [None, 0, 0.5, 0.999999],
    "max_rank_drop": [1e-9, 0.5, 1],
    "min_rank": [1, 100, 1e-9, 0.5],
    "sigma_lr_scale": ["norm", 1, 1e-9, 10.0],
    "stability_storage": ["full", "sketch", "bf16", "cpu"],
    "init_weights": [True, False],
    "shrink": ["physical", "mask"],
    "rank_pattern": [None, {}, {"decoder.layers.0.up": 2}, {"decoder.layers.1.down": 100}],
    "inference_mode": [False, True],
    "task_type": [None, "FEATURE_EXTRACTION"],
}
# without which a value of this field is refused, whatever the others are
NEEDED: dict[str, dict[str, Any]] = {
    "layers_to_transform": {"target_modules": ["up", "down"]},
    "layers_pattern": {"target_modules": ["up", "down"], "layers_to_transform": [0, 1]},
}
# of every kind of value, for every field
ODD = [
    None, True, False, 0, -1, 2, 10**30, 0.5, 1.0, -0.5, 1e300, math.nan, math.inf, "", "x", "none", b"x", 1 + 2j, [], [0],
    ["x"], [None], {}, {"x": 1}, {"x": [1]}, {1: "x"}, (), ("x",), set(), {"x"}, frozenset({"x"}), object(), int,
    np.float32(0.5), np.float64(0.5), np.int64(2), np.array([1, 2]), torch.tensor(0.5), torch.ones(2),
]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tiny(nn.Module):
    """An embedding, two blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, **_: object) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.decoder.layers:
            x = layer(x)
        return self.head(x)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


IDS = torch.tensor([[0, 1, 2, 3], [4, 3, 1, 1]])


def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().double()


def names_a_field(message: str) -> bool:
    return any(re.search(rf"`{name}[`=]", message) for name in FIELDS)


def made(fields: dict[str, Any]) -> OIALRConfig | None:
    """The configuration, or `None` when it is refused with an error that names a field."""
    try:
        return OIALRConfig(**{"mode": "replace", **fields})
    except (TypeError, ValueError) as error:
        refusal = str(error)
    assert names_a_field(refusal), f"{fields}: {refusal}"
    return None


def assert_survives_json(config: OIALRConfig) -> None:
    assert OIALRConfig(**{"mode": "replace", **json.loads(json.dumps(config.to_dict()))}) == config


# ---- construction ----------------------------------------------------------------------------------------------------


def pairs(values: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every pair of values of two fields."""
    for first, second in itertools.combinations(values, 2):
        for one, other in itertools.product(values[first], values[second]):
            yield {first: one, second: other}


def test_every_field_is_tried():
    assert WORKING.keys() | {"format_version"} >= set(OWN_FIELDS)
    assert BAD_VALUES.keys() == set(OWN_FIELDS)


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_a_value_of_any_kind_is_taken_or_refused_by_name(name):
    taken = 0
    for value in [*ODD, *WORKING.get(name, [])]:
        config = made({**NEEDED.get(name, {}), name: value})
        if config is not None:
            taken += 1
            assert_survives_json(config)
    assert 0 < taken < len(ODD)


def test_every_pair_of_good_values_is_a_configuration_or_a_contradiction_that_names_a_field():
    configs = [made(fields) for fields in pairs(WORKING)]
    assert len(configs) > 3000
    assert sum(config is None for config in configs) < 0.2 * len(configs)
    for config in configs:
        if config is not None:
            assert_survives_json(config)


def test_every_pair_with_a_bad_value_is_refused_with_the_name_of_one():
    bad = {name: values[:3] for name, values in BAD_VALUES.items()}
    good = {name: values[-2:] for name, values in WORKING.items() if name in bad}
    count = 0
    for first, second in itertools.permutations(bad, 2):
        for one, other in itertools.product(bad[first], [*bad[second], *good.get(second, [])]):
            context = {key: value for key, value in NEEDED.get(first, {}).items() if key != second}
            assert made({**context, first: one, second: other}) is None, (first, one, second, other)
            count += 1
    assert count > 8000


# ---- use -------------------------------------------------------------------------------------------------------------


@functools.cache
def covering() -> tuple[dict[str, Any], ...]:
    """Few configurations that hold every pair of working values, unless the two contradict each other.

    Greedy: from a pair that is still missing, each further field takes the allowed value that adds the most new pairs.
    """
    numbered = {name: list(range(len(values))) for name, values in WORKING.items()}

    def fields_of(chosen: dict[str, int]) -> dict[str, Any]:
        return {name: WORKING[name][index] for name, index in chosen.items()}

    def allowed(chosen: dict[str, int]) -> bool:
        return made({**needed_by(chosen), **fields_of(chosen)}) is not None

    def needed_by(chosen: dict[str, int]) -> dict[str, Any]:
        return {key: value for name in chosen if chosen[name] for key, value in NEEDED.get(name, {}).items()}

    def covered(chosen: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        return set(itertools.combinations(sorted(chosen.items()), 2))

    missing = set().union(*(covered(pair) for pair in pairs(numbered)))
    rows = []
    while missing:
        chosen = dict(min(missing))
        missing -= covered(chosen)
        if not allowed(chosen):
            continue
        for name in numbered:
            if name not in chosen:
                options = sorted(
                    numbered[name],
                    key=lambda index: -len(covered({**chosen, name: index}) & missing),
                )
                best = next((index for index in options if allowed({**chosen, name: index})), None)
                if best is not None:
                    chosen[name] = best
        missing -= covered(chosen)
        rows.append({**needed_by(chosen), **fields_of(chosen)})
    return tuple(rows)


def test_the_covering_configurations_hold_every_pair_that_is_allowed():
    for fields in pairs(WORKING):
        needed = {key: value for name in fields for key, value in NEEDED.get(name, {}).items()}
        held = any(all(row.get(name, ...) == value for name, value in fields.items()) for row in covering())
        assert held or made(needed | fields) is None, fields


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)


def assert_works(config: OIALRConfig, directory: Any) -> None:
    """A model with this configuration fits its base, trains through a check, and is saved and loaded."""
    base = outputs(tiny())
    model = get_peft_model(tiny(), config)
    layers = adapter_layers(model).values()
    whole = config.mode == "adapter" or all(
        layer.rank("default") == min(layer.form.m, layer.form.n) for layer in layers
    )
    assert torch.allclose(outputs(model), base) is (whole and config.init_weights)
    if not config.inference_mode:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        controller = OIALRController(model, optimizer, total_steps=TOTAL_STEPS)
        for _ in range(TOTAL_STEPS):
            model(input_ids=IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        assert controller.history
        assert controller.metrics()["oialr/trainable_percent"] > 0
    else:
        assert not any(layer.trained_parameter("default").requires_grad for layer in layers)
    assert not_finite(dict(model.named_parameters())) == []
    for layer in layers:
        if not layer.is_dense("default"):
            factors = layer.factors("default")
            eye = torch.eye(factors.rank, dtype=torch.float64)
            assert_close(factors.u.mT @ factors.u, eye)
            assert_close(factors.vh @ factors.vh.mT, eye)
    model.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(tiny(), directory)
    assert_close(outputs(loaded), outputs(model), atol=1e-9, rtol=0)
    again = OIALRConfig.from_pretrained(str(directory))
    written = {"rank_pattern", "format_version", "inference_mode"}
    for name in OWN_FIELDS:
        assert name in written or getattr(again, name) == getattr(config, name), name


@pytest.mark.filterwarnings("ignore:`rank_pattern` names modules that are not targets:RuntimeWarning")
@pytest.mark.parametrize("index", range(len(covering())))
def test_every_pair_of_settings_works_from_the_adapter_to_a_check_and_back(index, tmp_path):
    assert_works(OIALRConfig(**{"mode": "replace", **covering()[index]}), tmp_path)
