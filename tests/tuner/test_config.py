"""`OIALRConfig`: what it refuses and why, and that it survives every way of writing it down."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from bad_values import BAD_VALUES
from peft import PeftConfig, PeftType, get_peft_model

from oialr_peft import OIALRConfig
from oialr_peft.tuner.config import FORMAT_VERSION, Saving

PREDEFINED = {field.name for field in fields(PeftConfig)}  # checked by PEFT


@pytest.mark.parametrize(
    ("fields", "cutoff", "max_output_loss", "max_rank_drop"),
    [
        ({"mode": "replace"}, 0.9, 5e-5, 0.1),
        ({"mode": "pretraining"}, 0.9, 3e-3, 0.1),
        ({}, 0.01, None, 0.5),
        ({"mode": "replace", "cutoff": 0.1}, 0.1, None, 0.5),
        ({"cutoff": 0.1}, 0.1, None, 0.5),
        ({"mode": "replace", "max_output_loss": 0.5}, 0.9, 0.5, 0.1),
        ({"max_output_loss": 0.5}, 0.9, 0.5, 0.1),
        ({"cutoff": 0.2, "max_output_loss": 0.5}, 0.2, 0.5, 0.1),
        ({"max_output_loss": 0.5, "max_rank_drop": 0.7}, 0.9, 0.5, 0.7),
        ({"mode": "replace", "cutoff": 0.1, "max_rank_drop": 0.05}, 0.1, None, 0.05),
    ],
)
def test_the_rule_that_is_named_prunes_and_a_measured_one_where_none_is(fields, cutoff, max_output_loss, max_rank_drop):
    expected = {"cutoff": cutoff, "max_output_loss": max_output_loss, "max_rank_drop": max_rank_drop}
    settings = OIALRConfig(**fields).resolved()
    assert {name: getattr(settings, name) for name in expected} == expected
    again = OIALRConfig(**{**fields, **expected}).resolved()
    assert {name: getattr(again, name) for name in expected} == expected


MODES = ("adapter", "replace", "pretraining")


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_set_stays_so_and_follows_the_mode(mode):
    unset = OIALRConfig()
    assert {getattr(unset, name) for name in ("rank", "delay", "cutoff", "max_output_loss", "max_rank_drop")} == {None}
    before = copy.deepcopy(unset)
    unset.resolved()
    assert unset == before
    assert replace(unset, mode=mode) == OIALRConfig(mode=mode)
    assert replace(unset, mode=mode).resolved() == OIALRConfig(mode=mode).resolved()


@pytest.mark.parametrize("mode", MODES)
def test_every_setting_that_is_decided_has_a_field_and_a_value(mode):
    settings = OIALRConfig(mode=mode).resolved()
    names = {field.name for field in fields(settings)}
    assert names <= {field.name for field in fields(OIALRConfig)}
    open_ones = {name for name in names if getattr(settings, name) is None}
    assert open_ones == ({"max_output_loss"} if mode == "adapter" else {"rank"})  # no bound, and all directions
    with pytest.raises(FrozenInstanceError):
        settings.rank = 3


def test_a_correction_has_a_rank_of_its_own_and_other_modes_keep_all():
    assert [OIALRConfig(mode=mode).resolved().rank for mode in MODES] == [16, None, None]
    assert [OIALRConfig(mode=mode, rank=0.25).resolved().rank for mode in MODES] == [0.25] * 3


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("residual", True, 'Write `mode="adapter"`'),
        ("pretraining", True, 'Write `mode="pretraining"`'),
        ("init_rank", 8, "Write `rank`"),
        ("init_basis", "weight", "leave it out"),
        ("prune_by", "weight", "leave it out"),
        ("settle_ratio", 1.0, '`freeze_when` is "stable" or "delay"'),
        ("sigma_basis", "axes", "leave it out"),
    ],
)
def test_who_writes_a_former_name_is_told_the_present_one(name, value, remedy):
    with pytest.raises(ValueError, match=rf"`{name}` is no setting of OIALRConfig any more\..*{re.escape(remedy)}"):
        OIALRConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_VALUES.items() for value in values],
    ids=lambda value: str(value),
)
def test_a_bad_value_is_refused_with_the_field_the_value_and_a_remedy(name, value):
    extra = {"target_modules": ["dense"], "layers_to_transform": [0]} if name == "layers_pattern" else {}
    extra = {"target_modules": ["dense"]} if name == "layers_to_transform" else extra
    with pytest.raises(ValueError, match=rf"`{name}`") as error:
        OIALRConfig(**{**extra, name: value})
    message = str(error.value)
    assert repr(value) in message
    rule, _, remedy = re.sub(r"\d\.\d", "#", message).partition(". ")
    assert "must" in rule
    assert remedy.endswith(".")
    assert len(remedy.split()) >= 3


def test_every_field_of_the_method_has_a_bad_value_here():
    assert {field.name for field in fields(OIALRConfig)} - PREDEFINED == set(BAD_VALUES)


def test_every_field_has_a_help_text_for_command_lines():
    for field in fields(OIALRConfig):
        if field.name not in PREDEFINED:
            assert field.metadata["help"].strip(), field.name


def test_every_field_is_documented():
    for field in fields(OIALRConfig):
        if field.name not in PREDEFINED:
            assert re.search(rf"\b{field.name}\b.*:", OIALRConfig.__doc__), field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delay", 0),
        ("delay", 0.5),
        ("delay", 1000),
        ("update_every", 1),
        ("update_every", 0.999),
        ("cutoff", 0),
        ("cutoff", 0.99),
        ("stability_threshold", 1),
        ("layers_per_update", 1),
        ("layers_per_update", 0.01),
        ("max_rank_drop", 1),
        ("min_rank", 8),
        ("min_rank", 0.5),
        ("rank", 1),
        ("rank", 0.01),
        ("bias", "oialr_only"),
        ("bias", "all"),
        ("target_modules", "all-linear"),
        ("target_modules", r".*\.dense"),
        ("exclude_modules", []),
        ("modules_to_save", ["head"]),
        ("trainable_token_indices", [0, 3]),
        ("trainable_token_indices", {"embed": [0, 3]}),
        ("rank_pattern", {}),
        ("rank_pattern", {"encoder.dense": 3}),
        ("shrink", "mask"),
        ("stability_storage", "sketch"),
    ],
    ids=str,
)
def test_the_edges_of_each_range_are_allowed(name, value):
    config = OIALRConfig(**{"mode": "replace", name: value})
    stored = getattr(config, name)
    assert stored == (set(value) if name == "exclude_modules" else value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delay": 10}, r'`mode="adapter"` has no dense phase, so `delay` must be 0, but is 10\. Leave'),
        ({"delay": 0.1}, r'`mode="adapter"` .* `delay` must be 0, but is 0\.1\. Leave'),
        (
            {"mode": "pretraining", "trainable_token_indices": [1]},
            r'`trainable_token_indices` \(\[1\]\) must be None with `mode="pretraining"`',
        ),
        (
            {"target_modules": r".*dense", "layers_to_transform": [0]},
            r"`layers_to_transform` must not be combined with a string in `target_modules` \('\.\*dense'\)\. Give",
        ),
        ({"layers_to_transform": [0]}, r"`layers_to_transform` needs `target_modules` as a list .* None\. Name"),
        (
            {"target_modules": ["dense"], "layers_pattern": "layers"},
            r"`layers_pattern` \('layers'\) needs `layers_to_transform`, but that is None\. Set both",
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused_with_both_fields_and_a_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        OIALRConfig(**fields)


def test_an_unknown_task_type_is_refused():
    with pytest.raises(ValueError, match="Invalid task type: 'SINGING'"):
        OIALRConfig(task_type="SINGING")


def test_the_delay_is_zero_only_where_there_is_no_dense_phase():
    # little is pruned in fine-tuning, so that an early freeze gains nothing
    assert [OIALRConfig(mode=mode).resolved().delay for mode in MODES] == [0, 0.7, 0.1]
    assert OIALRConfig(mode="replace", delay=7).resolved().delay == 7


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mode": "replace"}, False),
        ({}, True),
        ({"mode": "replace", "freeze_when": "delay", "delay": 0}, True),
        ({"mode": "replace", "freeze_when": "delay"}, False),
        ({"mode": "replace", "freeze_when": "stable", "delay": 0}, False),
    ],
    ids=str,
)
def test_layers_start_factored_in_mode_adapter_and_with_a_delay_of_zero(fields, expected):
    assert OIALRConfig(**fields).resolved().starts_factored is expected


def test_the_type_cannot_be_changed():
    assert OIALRConfig(peft_type="LORA").peft_type is PeftType.OIALR


# ---- round trips -----------------------------------------------------------------------------------------------------

SETTINGS = {
    "default": {},
    "adapter": {"mode": "adapter", "rank": 0.25, "task_type": "SEQ_CLS"},
    "paper": {
        "mode": "replace",
        "freeze_when": "delay",
        "delay": 50,
        "update_every": 10,
        "layers_per_update": 0.1,
        "cutoff": 0.15,
    },
    "pretraining": {"mode": "pretraining", "stability_storage": "sketch", "shrink": "mask", "min_rank": 4},
    "targets": {
        "target_modules": ["query", "value"],
        "exclude_modules": ["pooler", "head"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layer",
        "modules_to_save": ["classifier"],
        "bias": "oialr_only",
        "trainable_token_indices": {"embed_tokens": [0, 1]},
        "base_model_name_or_path": "some/model",
        "inference_mode": True,
    },
    "expression": {"target_modules": r".*\.(query|value)", "exclude_modules": r".*pooler.*"},
    "ranks": {"rank_pattern": {"encoder.dense": 3}},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def config(request):
    return OIALRConfig(**copy.deepcopy(request.param))


@pytest.mark.parametrize("reader", [OIALRConfig, PeftConfig], ids=lambda cls: cls.__name__)
def test_a_saved_configuration_is_read_back_equal(config, reader, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = reader.from_pretrained(str(tmp_path))
    assert type(loaded) is OIALRConfig
    assert loaded == config
    assert loaded.peft_type is PeftType.OIALR


def test_a_dictionary_makes_an_equal_configuration(config):
    assert OIALRConfig(**config.to_dict()) == config
    assert PeftConfig.from_peft_type(**config.to_dict()) == config


def test_json_makes_an_equal_configuration(config):
    assert OIALRConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles_are_equal(config, copied):
    assert copied(config) == config
    assert type(copied(config)) is OIALRConfig


def test_sets_are_written_sorted(tmp_path):
    names = ["value", "query", "key", "dense", "pooler"]
    OIALRConfig(target_modules=names, exclude_modules=names[::-1]).save_pretrained(tmp_path / "first")
    OIALRConfig(target_modules=names[::-1], exclude_modules=names).save_pretrained(tmp_path / "second")
    first = (tmp_path / "first" / "adapter_config.json").read_text()
    assert first == (tmp_path / "second" / "adapter_config.json").read_text()
    assert json.loads(first)["target_modules"] == sorted(names)
    assert json.loads(first)["exclude_modules"] == sorted(names)


def test_the_dictionary_is_a_copy():
    config = OIALRConfig(rank_pattern={"encoder.dense": 3})
    config.to_dict()["rank_pattern"]["encoder.dense"] = 5
    assert config.rank_pattern == {"encoder.dense": 3}


def test_ranks_are_written_to_the_file_and_not_into_the_live_configuration(mlp, tmp_path):
    model = get_peft_model(
        mlp, OIALRConfig(target_modules=["up", "down"], mode="replace", freeze_when="delay", delay=0)
    )
    config = model.peft_config["default"]
    before = copy.deepcopy(config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {"up": 6, "down": 5}
    assert saved["format_version"] == FORMAT_VERSION
    assert config == before
    assert config.rank_pattern is None
    assert config.format_version is None


def test_dense_layers_are_missing_in_the_saved_ranks(mlp, tmp_path):
    get_peft_model(mlp, OIALRConfig(target_modules=["up", "down"], mode="replace")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {}


def test_a_configuration_alone_is_saved_without_a_format_version(tmp_path):
    OIALRConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rank_pattern"] is None
    assert saved["format_version"] is None
    assert not OIALRConfig.from_pretrained(str(tmp_path)).is_from_checkpoint


def test_the_live_configuration_is_restored_when_saving_fails(tmp_path):
    config = OIALRConfig()
    finished = []
    config.expect_saving(Saving({"encoder.dense": 3}, finished.append))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(AssertionError, match="should be a directory"):
        config.save_pretrained(str(file))
    assert config.rank_pattern is None
    assert config.format_version is None
    assert finished == []


def test_a_future_file_format_is_refused(tmp_path):
    OIALRConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=rf"`format_version` .* is {FORMAT_VERSION + 1}, .* Upgrade oialr-peft"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_a_field_of_a_later_release_is_ignored_with_a_warning(tmp_path):
    OIALRConfig(cutoff=0.2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_field": 1}))
    with pytest.warns(UserWarning, match="new_field"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.cutoff == 0.2
