"""What users see while a run goes on: progress bars, log lines, and figures in trackers."""

from __future__ import annotations

import copy
import json
import logging
import re

import pytest
import torch
from peft import get_peft_model
from trainer_runs import trained
from transformers.utils import logging as transformers_logging

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.log import log_check
from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.parallel import progress
from oialr_peft.tuner.lookup import adapter_layers

STEPS, EVERY = 12, 3


@pytest.fixture
def impatient(monkeypatch):
    """Bars appear at once instead of after a second, and show every layer."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    before = transformers_logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **kwargs, mininterval=0))
    yield
    transformers_logging.set_tqdm_hook(before)


def run(model, **settings):
    """A run of the MLP, whose layers are factored in its second check."""
    config = OIALRConfig(mode="replace", freeze_when="delay", delay=2 * EVERY, update_every=EVERY, cutoff=0.3)
    model = get_peft_model(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = OIALRController(model, optimizer, total_steps=STEPS, **settings)
    for _ in range(STEPS):
        model(x=torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return controller


def bars(capsys):
    """The largest count and the total of the bars on the standard error stream."""
    found = re.findall(r"Decomposing weights:.*?\| (\d+)/(\d+) \[", capsys.readouterr().err)
    return max(((int(done), int(total)) for done, total in found), default=None)


@pytest.mark.usefixtures("impatient")
def test_a_long_check_shows_a_bar_over_the_layers(mlp, capsys):
    controller = run(mlp)
    assert bars(capsys) == (len(controller.layers), len(controller.layers))


def test_a_short_check_shows_no_bar(mlp, capsys):
    run(mlp)
    assert bars(capsys) is None


@pytest.mark.usefixtures("impatient")
def test_bars_can_be_turned_off(mlp, make_model, capsys, monkeypatch):
    run(mlp, disable_tqdm=True)
    transformers_logging.disable_progress_bar()
    try:
        run(make_model("mlp"))
        get_peft_model(make_model("mlp"), OIALRConfig(mode="adapter"))
    finally:
        transformers_logging.enable_progress_bar()
    monkeypatch.setenv("RANK", "1")
    run(make_model("mlp"))
    assert bars(capsys) is None


@pytest.mark.usefixtures("impatient")
def test_the_trainer_passes_its_own_setting_on(tmp_path, capsys):
    trained(tmp_path, max_steps=9, disable_tqdm=True)
    assert bars(capsys) is None
    trained(tmp_path, max_steps=9, disable_tqdm=False)
    assert bars(capsys) is not None


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "settings", [{"mode": "adapter"}, {"freeze_when": "delay", "delay": 0}], ids=["residual", "delay"]
)
def test_decomposing_a_model_at_creation_shows_a_bar(bert, capsys, settings):
    model = get_peft_model(bert, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **settings}))
    layers = len(adapter_layers(model))
    assert bars(capsys) == (layers, layers)
    copy.deepcopy(model)  # no bar is left in it


@pytest.mark.usefixtures("impatient")
def test_a_model_that_starts_dense_decomposes_nothing(bert, capsys):
    get_peft_model(bert, OIALRConfig(mode="replace", task_type="SEQ_CLS"))
    assert bars(capsys) is None


@pytest.mark.usefixtures("impatient")
def test_quantized_weights_count_too(capsys):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear8bitLt(8, 6, has_fp16_weights=False)
    linear.load_state_dict({"weight": torch.randn(6, 8), "bias": torch.zeros(6)})
    model = torch.nn.Sequential(linear.to("cpu"), torch.nn.Linear(6, 4))
    get_peft_model(model, OIALRConfig(target_modules=["0", "1"], mode="adapter"))
    assert bars(capsys) == (2, 2)


def lines(caplog, level):
    return [r.getMessage() for r in caplog.records if r.name == "oialr_peft.controller" and r.levelno == level]


def test_each_check_logs_what_it_did_in_one_line(mlp, caplog):
    with caplog.at_level(logging.INFO, logger="oialr_peft"):
        controller = run(mlp)
    first, second, *_ = found = lines(caplog, logging.INFO)
    assert len(found) == STEPS // EVERY
    assert first.startswith("step 3: froze no layer, 0 of 3 layers factored, ")
    update = controller.history[1]
    before, after = (sum(pair[i] for pair in update.ranks.values()) for i in (0, 1))
    assert "step 6: froze 3 layers (up, down, head), 3 of 3 layers factored" in second
    assert f"mean rank {after / 3:.1f}" in second
    assert f"{before - after} of {before} directions dropped" in second
    assert f"{update.trainable_percent:.1f} % trainable, {update.seconds:.2f} s" in second
    assert lines(caplog, logging.DEBUG) == []


def test_at_level_debug_each_layer_has_a_line(mlp, caplog):
    with caplog.at_level(logging.DEBUG, logger="oialr_peft"):
        controller = run(mlp)
    found = lines(caplog, logging.DEBUG)
    update = controller.history[1]
    before, after = update.ranks["down"]
    assert f"step 6: down: Stability {update.stability['down']:.4f}, frozen, rank {before} → {after}" in found
    assert sum(line.startswith("step 6:") for line in found) == 3


def test_many_names_are_shortened(caplog):
    names = [f"layer.{index}" for index in range(5)]
    update = OIALRUpdate(step=4, frozen=names, trainable=1, total=2)
    with caplog.at_level(logging.INFO, logger="oialr_peft"):
        log_check(logging.getLogger("oialr_peft.controller"), update, dict.fromkeys(names, 2))
    assert (
        "froze 5 layers (layer.0, layer.1, layer.2, 2 more), 5 of 5 layers factored" in lines(caplog, logging.INFO)[0]
    )


def test_only_the_main_process_logs(mlp, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.DEBUG, logger="oialr_peft"):
        run(mlp)
    assert not caplog.records


FIGURES = ("trainable_percent", "stability_mean", "rank_mean", "frozen_layers", "update_seconds")


def checks_of(trainer):
    """By name, the figures of each check as the Trainer logged them, by step."""
    entries = trainer.state.log_history
    return {
        name: {entry["step"]: entry[f"oialr/{name}"] for entry in entries if f"oialr/{name}" in entry}
        for name in FIGURES
    }


def offline_history(directory):
    """The entries of the one run that wandb has written to a directory without a network."""
    datastore = pytest.importorskip("wandb.sdk.internal.datastore")
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    store, entries, record = datastore.DataStore(), [], Record()
    store.open_for_scan(str(file))
    while (content := store.scan_data()) is not None:
        record.ParseFromString(content)
        items = record.history.item  # none in records of other kinds
        entries.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    store.close()
    return entries


def test_trackers_show_the_figures_of_every_check(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{variable}", value)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    wandb = pytest.importorskip("wandb")
    trainer = trained(
        tmp_path,
        max_steps=15,
        report_to=["tensorboard", "trackio", "wandb"],
        project="oialr",
        run_name="run",
        trackio_space_id=None,
    )
    wandb.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    stored = {"trackio": storage.get_logs("oialr", "run"), "wandb": offline_history(tmp_path)}
    for name, expected in checks_of(trainer).items():
        assert expected
        key = f"train/oialr/{name}"
        assert {event.step: event.value for event in events.Scalars(key)} == pytest.approx(expected)
        for tracker, entries in stored.items():
            found = {entry["train/global_step"]: entry[key] for entry in entries if key in entry}
            assert found == pytest.approx(expected), tracker
