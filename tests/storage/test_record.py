"""What a run leaves for people: written by Trainer and callback, plain JSON, checked when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from tiny_runs import record
from trainer_runs import STEPS, adapted, trained
from transformers import Trainer

from oialr_peft import OIALRCallback
from oialr_peft.storage.record import RECORD_NAME, find_record, finite_numbers, read_record, write_record


def written(directory, **changes):
    """A record in a file, with some of its fields replaced."""
    write_record(record(), directory)
    file = directory / RECORD_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(record(), tmp_path)
    read = read_record(tmp_path / RECORD_NAME)
    assert asdict(read) == asdict(record()) | {name: asdict(read)[name] for name in ("layers", "history", "log")}
    assert list(read.layers) == list(record().layers)
    assert list(read.history) == list(record().history)
    assert list(read.log) == record().log
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


def test_figures_come_from_log_and_history():
    made = record()
    assert made.metrics == ["eval_loss", "eval_accuracy"]
    assert made.curve("eval_accuracy") == {50: 50 / 101, 100: 100 / 101}
    assert made.final_metrics["eval_accuracy"] == 100 / 101
    assert made.seconds == 12.5
    assert made.check_seconds == pytest.approx(0.55)
    shares = [100 * update.trainable / update.total for update in made.history]
    assert made.trainable_percent_mean == pytest.approx(sum(shares) / 10)
    assert made.factored == 6
    assert made.rank_mean == sum(layer.rank for layer in made.layers) / 6


def test_numbers_that_json_does_not_know_are_left_out(tmp_path):
    assert finite_numbers({"loss": float("nan"), "step": 3, "name": "x", "flag": True}) == {"loss": None, "step": 3}


def test_the_trainer_writes_a_record_beside_each_checkpoint_and_for_the_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 12, "eval_strategy": "steps", "eval_steps": 12}
    trainer = trained(tmp_path, **options)
    read = read_record(tmp_path / RECORD_NAME)
    assert list(read.history) == trainer.oialr_controller.history
    assert (read.steps, read.total_steps, read.model) == (STEPS, STEPS, "BertForSequenceClassification")
    assert read.seconds > 0
    assert read.settings["update_every"] == 3
    assert read.arguments["learning_rate"] == 5e-3
    assert {layer.name: layer.rank for layer in read.layers} == {
        name: layer.rank("default") for name, layer in trainer.oialr_controller.layers.items()
    }
    half = read_record(tmp_path / "checkpoint-12" / RECORD_NAME)
    assert half.steps == 12
    assert list(half.history) == [update for update in read.history if update.step <= 12]
    assert len(read.curve("eval_loss")) == 2
    trainer.evaluate(metric_key_prefix="eval_again")
    assert "eval_again_loss" in read_record(tmp_path / RECORD_NAME).metrics
    assert str(tmp_path) not in (tmp_path / RECORD_NAME).read_text()


def test_the_callback_writes_one_as_well(tmp_path):
    callback = OIALRCallback()
    trained(tmp_path, model=adapted(), trainer_class=Trainer, callbacks=[callback], max_steps=6)
    assert list(read_record(tmp_path / RECORD_NAME).history) == callback.controller.history


def test_the_record_of_a_run_that_was_killed_is_that_of_its_last_checkpoint(tmp_path):
    for step in (9, 10):
        write_record(record(), tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100").mkdir()
    assert find_record(tmp_path) == tmp_path / "checkpoint-10" / RECORD_NAME
    write_record(record(), tmp_path)
    assert find_record(tmp_path) == tmp_path / RECORD_NAME


def test_a_directory_without_a_record_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no oialr_history\.json\. Name the `output_dir`"):
        find_record(tmp_path)
    with pytest.raises(ValueError, match="nowhere` is no directory"):
        find_record(tmp_path / "nowhere")


def test_damaged_files_are_refused(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="is damaged or no JSON"):
        read_record(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold an object"):
        read_record(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", "many"),
        ("steps", True),
        ("model", 3),
        ("settings", []),
        ("layers", []),
        ("layers", [{"name": "a", "out_features": 0, "in_features": 1, "rank": None}]),
        ("layers", [{"name": "a", "out_features": 1, "in_features": 1}]),
        ("history", [{"step": 1}]),
        ("log", [{"loss": 1.0}]),
        ("log", [{"step": 1, "loss": "low"}]),
        ("versions", {"torch": 2}),
        ("format_version", None),
    ],
)
def test_a_field_of_another_type_is_named(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"`{field}` in `.*` must be .*, but is .* Get the file again"):
        read_record(written(tmp_path, **{field: value}))


def test_a_later_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has format 2; this release reads up to 1"):
        read_record(written(tmp_path, format_version=2))
