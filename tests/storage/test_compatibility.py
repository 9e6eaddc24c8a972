"""Files of earlier releases load, for ever, to what they held; files of later ones are refused with what to do.

`tests/data` holds checkpoints that are never made again; `frozen.py` says what they are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from frozen import (
    ADAPTERS,
    DATA,
    SAVED_AT,
    STEPS,
    TRAINING,
    Network,
    base_of,
    bert,
    expected,
    outputs,
    trainer,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import BertForSequenceClassification, TrainerCallback

from oialr_peft import OIALRConfig
from oialr_peft.engine import state as state_module
from oialr_peft.engine.state import STATE_NAME, read_state
from oialr_peft.storage import low_rank
from oialr_peft.storage.inspection import inspect_checkpoint
from oialr_peft.storage.record import FORMAT_VERSION, RECORD_NAME, read_record
from oialr_peft.tuner import config
from oialr_peft.tuner.lookup import adapter_layers

FORMATS = sorted(DATA.glob("format-*"))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, on any machine

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_every_format_has_its_checkpoints():
    assert [path.name for path in FORMATS] == [f"format-{each + 1}" for each in range(config.FORMAT_VERSION)]
    for directory in FORMATS:
        assert {path.name for path in directory.iterdir()} >= {*ADAPTERS, "standalone", "training"}
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 250_000


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_an_adapter_answers_as_when_it_was_saved(directory, name):
    case = directory / name
    given = expected(case)
    answer = given.pop("output")
    for trainable in (False, True):
        model = PeftModel.from_pretrained(base_of(case, Network()), case / "checkpoint", is_trainable=trainable)
        assert_close(outputs(model, given), answer, **CLOSE)
        layers = adapter_layers(model).values()
        assert all(layer.trained_parameter("default").requires_grad == trainable for layer in layers)
    found = inspect_checkpoint(str(case / "checkpoint"))
    ranks = {
        key: None if layer.is_dense("default") else layer.rank("default")
        for key, layer in adapter_layers(model).items()
    }
    assert {layer.name: layer.rank for layer in found.layers} == ranks


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_a_standalone_checkpoint_answers_as_when_it_was_saved(directory):
    given = expected(directory / "standalone")
    answer = given.pop("output")
    model = BertForSequenceClassification.from_pretrained(directory / "standalone" / "checkpoint")
    assert_close(outputs(model, given), answer, **CLOSE)
    assert_close(outputs(model.dequantize(), given), answer, **CLOSE)


class AtBegin(TrainerCallback):
    """Remembers the state of the schedule when the training begins."""

    def __init__(self) -> None:
        self.state = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = self.trainer.oialr_controller.state_dict()
        self.answer = outputs(self.trainer.model, self.given)
        self.trainer.model.train()


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_a_training_goes_on_where_it_was(directory, tmp_path):
    case = directory / "training"
    given = expected(case)
    answer, checkpoint = given.pop("output"), case / f"checkpoint-{SAVED_AT}"
    model = get_peft_model(base_of(case, bert()), OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **TRAINING}))
    resumed, begin = trainer(model, tmp_path, save_strategy="no"), AtBegin()
    begin.trainer, begin.given = resumed, given
    resumed.add_callback(begin)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_close(begin.answer, answer, **CLOSE)
    stored = read_state(checkpoint / STATE_NAME)
    assert begin.state["steps"] == stored["steps"] == SAVED_AT
    assert stored["bases"]
    for name, basis in stored["bases"].items():
        assert torch.equal(begin.state["bases"][name], basis)
    assert json.loads(json.dumps(begin.state["history"])) == stored["history"]
    assert resumed.oialr_controller.steps == STEPS
    assert any(update.frozen for update in resumed.oialr_controller.history)


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.name)
def test_a_record_of_a_run_is_read(directory):
    checkpoint = directory / "training" / f"checkpoint-{SAVED_AT}"
    read = read_record(checkpoint / RECORD_NAME)
    assert (read.steps, read.total_steps, read.model) == (SAVED_AT, STEPS, "BertForSequenceClassification")
    saved = {layer.name: layer.rank for layer in inspect_checkpoint(str(checkpoint)).layers}
    assert {layer.name: layer.rank for layer in read.layers} == saved
    assert [update.step for update in read.history] == [2, 4, 6]


# ---- from the future -------------------------------------------------------------------------------------------------


def later(file: Path, *keys: str) -> Path:
    """Raises the format version that stands under these keys of a JSON file."""
    content = json.loads(file.read_text())
    place = content
    for key in keys:
        place = place[key]
    place["format_version"] += 1
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def newest(tmp_path):
    return shutil.copytree(FORMATS[-1], tmp_path / "files")


def test_a_later_adapter_is_refused_with_the_remedy(newest):
    later(newest / "replace" / "checkpoint" / "adapter_config.json")
    message = rf"adapter_config.json` .*is {config.FORMAT_VERSION + 1}, but .* up to {config.FORMAT_VERSION}\. Upgrade"
    base = base_of(newest / "replace", Network())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, newest / "replace" / "checkpoint")
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(str(newest / "replace" / "checkpoint"))
    assert not adapter_layers(base)


def test_a_later_standalone_checkpoint_is_refused_with_the_remedy(newest):
    later(newest / "standalone" / "checkpoint" / "config.json", "quantization_config")
    message = f"has format {low_rank.FORMAT_VERSION + 1}; this release reads up to {low_rank.FORMAT_VERSION}. Upgrade"
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(newest / "standalone" / "checkpoint")
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(str(newest / "standalone" / "checkpoint"))


def test_a_later_state_of_a_training_is_refused_with_the_remedy(newest, tmp_path):
    checkpoint = newest / "training" / f"checkpoint-{SAVED_AT}"
    state = read_state(checkpoint / STATE_NAME)
    bases = state.pop("bases")
    header = json.dumps(state | {"format_version": state_module.FORMAT_VERSION + 1})
    save_file(bases, checkpoint / STATE_NAME, {"oialr": header})
    model = get_peft_model(
        base_of(newest / "training", bert()),
        OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **TRAINING}),
    )
    message = rf"{STATE_NAME}` .*has format {state_module.FORMAT_VERSION + 1}; this release reads up to .*\. Upgrade"
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))


def test_a_later_record_is_refused_with_the_remedy(newest):
    file = later(newest / "training" / f"checkpoint-{SAVED_AT}" / RECORD_NAME)
    with pytest.raises(ValueError, match=f"has format {FORMAT_VERSION + 1}; this release .*. Upgrade oialr-peft"):
        read_record(file)
    assert load_file(file.parent / STATE_NAME)
