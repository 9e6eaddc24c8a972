"""Saved files are checked before a model is changed: every error names the file and the tensor."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, TrainingArguments

from oialr_peft import OIALRConfig, OIALRTrainer, save_low_rank
from oialr_peft.tuner.layer import OIALRLinear

FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3, "init_weights": False}
LAYER = "base_model.model.bert.encoder.layer.0.attention.self.query"

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_model):
    """A saved adapter; tests work on copies."""
    directory = tmp_path_factory.mktemp("saved")
    get_peft_model(make_model("bert"), OIALRConfig(**{"mode": "replace", **FACTORED})).save_pretrained(
        directory / "adapter"
    )
    return directory / "adapter"


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def changed(directory, change):
    """Rewrites the weights of a saved adapter after `change` was made to them."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut_sigma(tensors):
    tensors[f"{LAYER}.oialr_sigma"] = tensors[f"{LAYER}.oialr_sigma"][:2, :2].contiguous()


def lose_u(tensors):
    del tensors[f"{LAYER}.oialr_u"]


def lose_layer(tensors):
    for part in ("u", "sigma", "vh"):
        del tensors[f"{LAYER}.oialr_{part}"]


def smaller_rank(tensors):
    for part, cut in (("u", (8, 2)), ("sigma", (2, 2)), ("vh", (2, 8))):
        tensors[f"{LAYER}.oialr_{part}"] = tensors[f"{LAYER}.oialr_{part}"][: cut[0], : cut[1]].contiguous()


def rank_zero(tensors):
    for part, cut in (("u", (8, 0)), ("sigma", (0, 0)), ("vh", (0, 8))):
        tensors[f"{LAYER}.oialr_{part}"] = tensors[f"{LAYER}.oialr_{part}"][: cut[0], : cut[1]].contiguous()


def whole_numbers(tensors):
    tensors[f"{LAYER}.oialr_sigma"] = tensors[f"{LAYER}.oialr_sigma"].to(torch.int64)


def other_model(tensors):
    tensors[f"{LAYER}.oialr_u"] = torch.zeros(9, 3)


def dense_too(tensors):
    tensors[f"{LAYER}.oialr_weight"] = torch.zeros(8, 8)


def dense_instead(tensors):
    lose_layer(tensors)
    tensors[f"{LAYER}.oialr_weight"] = torch.zeros(8, 8)


def scalar(tensors):
    tensors[f"{LAYER}.oialr_u"] = torch.zeros(())


DAMAGES = {
    cut_sigma: r"oialr_u` in `.*` has shape \(8, 3\), but \(8, 2\) would fit",
    lose_u: r"holds `.*oialr_sigma`, `.*oialr_vh` but not u: a layer is stored as",
    lose_layer: r"holds nothing for `bert.encoder.layer.0.attention.self.query`, .* has rank 3",
    smaller_rank: r"oialr_sigma` in `.*` is of rank 2, but the configuration beside it says rank 3",
    rank_zero: r"oialr_sigma` in `.*` has rank 0, which a 8×8 weight cannot have",
    whole_numbers: r"oialr_sigma` in `.*` must be floating-point, but is I64",
    other_model: r"oialr_u` in `.*` has shape \(9, 3\), but \(8, 3\) would fit the model",
    dense_too: r"holds .* but not these alone",
    dense_instead: r"oialr_weight` in `.*` is dense, but the configuration beside it says rank 3",
    scalar: r"oialr_u` in `.*` has shape \(\), but \(8, 3\) would fit",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_inconsistent_adapter_is_refused_and_the_model_stays_as_it_was(damage, adapter, bert):
    changed(adapter, damage)
    before = {key: value.clone() for key, value in bert.state_dict().items()}
    with pytest.raises(ValueError, match=DAMAGES[damage]) as raised:
        PeftModel.from_pretrained(bert, adapter)
    assert str(adapter / "adapter_model.safetensors") in str(raised.value)
    assert not any(isinstance(module, OIALRLinear) for module in bert.modules())
    assert list(bert.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in bert.state_dict().items())


@pytest.mark.parametrize("how", ["truncated", "no header", "huge header", "empty", "text"])
def test_a_damaged_file_is_refused_by_name(how, adapter, bert):
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[:-10],
            "no header": content[200:],
            "huge header": (1 << 62).to_bytes(8, "little") + content[8:],
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
        }[how]
    )
    with pytest.raises(ValueError, match=rf"`{re.escape(str(file))}` is damaged or no safetensors file: "):
        PeftModel.from_pretrained(bert, adapter)
    assert not any(isinstance(module, OIALRLinear) for module in bert.modules())


def test_pickled_weights_are_refused(adapter, bert):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin` is no safetensors file\. .* ask for the model in safe"):
        PeftModel.from_pretrained(bert, adapter)


def test_a_second_adapter_that_does_not_fit_leaves_the_first_as_it_is(adapter, saved, bert, make_inputs, outputs_of):
    changed(adapter, smaller_rank)
    model = PeftModel.from_pretrained(bert, saved).eval()
    expected = outputs_of(model, make_inputs("bert"))
    with pytest.raises(ValueError, match="is of rank 2, but the configuration beside it says rank 3"):
        model.load_adapter(adapter, "second")
    assert list(model.peft_config) == ["default"]
    assert_close(outputs_of(model, make_inputs("bert")), expected)
    model.load_adapter(saved, "second")  # the name is free


def test_an_adapter_of_another_model_is_refused(saved, gpt2):
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        PeftModel.from_pretrained(gpt2, saved)


@pytest.mark.parametrize("damage", [smaller_rank, other_model], ids=lambda damage: damage.__name__)
def test_a_run_is_not_resumed_from_a_damaged_checkpoint(damage, adapter, saved, bert, tmp_path):
    model = get_peft_model(bert, OIALRConfig(**{"mode": "replace", **FACTORED}))
    trainer = OIALRTrainer(model, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True))
    trainer._load_from_checkpoint(str(saved))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed(adapter, damage)
    with pytest.raises(ValueError, match=re.escape(str(adapter / "adapter_model.safetensors"))):
        trainer._load_from_checkpoint(str(adapter))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["", ".oialr_sigma"])
def test_neither_the_whole_model_nor_a_part_of_the_adapter_is_a_module_to_save(name):
    with pytest.raises(ValueError, match="`modules_to_save` must be a list of module names"):
        OIALRConfig(mode="replace", modules_to_save=["classifier", name])


def test_a_configuration_without_its_weights_is_refused(adapter, bert):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has the configuration of a saved adapter, but not its weights"):
        PeftModel.from_pretrained(bert, adapter)
    assert not any(isinstance(module, OIALRLinear) for module in bert.modules())


@pytest.fixture
def pretrained(tmp_path, make_model):
    """An adapter that holds everything."""
    get_peft_model(make_model("bert"), OIALRConfig(mode="pretraining", **FACTORED)).save_pretrained(tmp_path / "all")
    return tmp_path / "all"


OUTSIDE = "base_model.model.bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"holds nothing for `bert\.embeddings\.word_embeddings\.weight`, which is saved with an adapter"),
        (torch.zeros(5, 8), r"word_embeddings\.weight` in `.*` has shape \(5, 8\), which is not that of the model"),
        (torch.zeros(30, 8, dtype=torch.int32), r"is I32, but the model has floating-point numbers there"),
    ],
    ids=["missing", "shape", "type"],
)
def test_what_lies_outside_the_layers_is_checked_before_the_base_weights_are_released(value, message, pretrained, bert):
    file = pretrained / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[OUTSIDE]
    save_file(tensors if value is None else {**tensors, OUTSIDE: value}, file)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(bert, pretrained)
    assert all(parameter.numel() for parameter in bert.parameters())
    assert not any(isinstance(module, OIALRLinear) for module in bert.modules())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised again outside transformers
def test_a_tensor_without_a_place_is_named(pretrained, bert):
    file = pretrained / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.other.weight": torch.zeros(2)}, file)
    with pytest.warns(UserWarning, match=r"`base_model\.model\.other\.weight` in `.*` is left out, because this model"):
        PeftModel.from_pretrained(bert, pretrained)


# ---- standalone checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture
def standalone(tmp_path, make_model):
    save_low_rank(
        get_peft_model(make_model("bert"), OIALRConfig(**{"mode": "replace", **FACTORED})),
        tmp_path / "model",
    )
    return tmp_path / "model"


STANDALONE = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.zeros(2, 2)}, r"query\.u` in `.*model\.safetensors` has shape \(8, 3\), but \(8, 2\) would"),
        ({"u": torch.zeros(9, 3)}, None),
        ({"u": torch.zeros(8, 3, dtype=torch.int64)}, r"query\.u` in `.*model\.safetensors` must be floating-point"),
        (
            {"u": torch.zeros(8, 2), "sigma": torch.zeros(2, 2), "vh": torch.zeros(2, 8)},
            r"query\.sigma` in `.*model\.safetensors` is of rank 2, but the configuration beside it says rank 3",
        ),
    ],
    ids=["sigma", "other-model", "integers", "rank"],
)
def test_an_inconsistent_standalone_checkpoint_is_refused(change, message, standalone):
    file = standalone / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, **{f"{STANDALONE}.{part}": value for part, value in change.items()}}, file, {"format": "pt"})
    # what agrees with itself but not with the model, transformers refuses
    error = RuntimeError if message is None else ValueError
    with pytest.raises(error, match=message or "mismatch|size"):
        AutoModelForSequenceClassification.from_pretrained(standalone)


def test_a_truncated_standalone_checkpoint_is_refused_by_name(standalone):
    file = standalone / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Exception, match="model.safetensors|incomplete|deserializing") as raised:
        AutoModelForSequenceClassification.from_pretrained(standalone)
    assert "safetensors" in f"{type(raised.value)} {raised.value}".lower()


def test_a_pickled_standalone_checkpoint_is_refused(standalone):
    torch.save(load_file(standalone / "model.safetensors"), standalone / "pytorch_model.bin")
    (standalone / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin` is no safetensors file"):
        AutoModelForSequenceClassification.from_pretrained(standalone)


def test_ranks_that_no_layer_has_are_refused(standalone):
    config = json.loads((standalone / "config.json").read_text())
    config["quantization_config"]["ranks"] = {STANDALONE: "many"}
    (standalone / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must hold positive integers, but has 'many'"):
        AutoModelForSequenceClassification.from_pretrained(standalone)
